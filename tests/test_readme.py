"""
Every command and snippet of the README and of the page on the command line is executed, one after the other in one folder for
each. Long ones are shortened: shell functions replace the commands and add arguments, which override earlier ones.
"""

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import fork_server
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from test_docs import code_of, run_code

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
COMMAND_LINE = ROOT / "docs" / "command-line.md"
STEPS = int(os.environ.get("SB3_MRQ_README_STEPS", "240"))
EXTRAS = set(metadata("sb3-mrq").get_all("Provides-Extra"))

# Two commands cannot be executed within a test: .ci/run executes them
IN_CI = {
    'pip install -c .ci/constraints.txt ".[all]"': '-m pip install -c .ci/constraints.txt ".[all]"',
    "make test": "make test ",
}
FUNCTIONS = f"""
set -euo pipefail
params="-params learning_starts:{STEPS // 2} batch_size:8"
mrq="target_update_interval:20 policy_kwargs:dict(net_arch=dict(encoder=[8],qf=[8],pi=[8]),z_s_dim=8,z_sa_dim=8,z_a_dim=4)"
evaluations="--eval-freq {STEPS // 2} --eval-episodes 2"
once="--eval-freq {STEPS} --eval-episodes 1"
sb3-mrq() {{
    local more=
    case "$*" in
        *-optimize*) more="-n {STEPS} --n-trials 1 --n-evaluations 1 --eval-episodes 1 --no-optim-plots" ;;
        train*td3*) more="-n {STEPS} $evaluations $params" ;;
        train*" -i "*) more="-n {STEPS} --eval-freq -1" ;;
        train*) more="-n {STEPS} --save-freq {STEPS // 2} $evaluations $params $mrq" ;;
        enjoy*|record_video*) more="-n 20" ;;
        diagnose*) more="-n 2" ;;
        compare*) more="--env Pendulum-v1 --algos mrq,td3 --seeds 1 --steps {STEPS} --jobs 1 $once" ;;
        speed*) more="--env Pendulum-v1 --seconds 0" ;;
    esac
    case "$*" in
        # The installed command itself
        train*" --algo mrq "*" --seed 1 "*) command sb3-mrq "$@" $more ;;
        # Without compiling, and with few updates
        speed*) TORCHDYNAMO_DISABLE=1 "$PYTHON" -c "
import sys, sb3_mrq.speed
from sb3_mrq.command_line import main
sb3_mrq.speed.INTERVAL = 2
sys.exit(main())" "$@" $more ;;
        # The same program in a fork of a process that has imported torch
        *) $FORK_ZOO "$PYTHON" "$(type -P sb3-mrq)" "$@" $more ;;
    esac
}}
make() {{
    # Everything is set up already. They train a task with short episodes, the second one in a fork.
    local python="$PYTHON"
    case "$*" in
        train*ENV=*) python="$FORK_SCRIPTS $PYTHON" ;;
        train*) ;;
        *) echo "no replacement for make $*"; return 1 ;;
    esac
    command make -C {ROOT} -o setup python="$python" "$@" ENV=InvertedPendulum-v5 STEPS={STEPS} OUT="$PWD/make"
}}
"""


def blocks(page):
    """The blocks of commands: the indented ones."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in found]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each page."""
    return {page: tmp_path_factory.mktemp(page.stem) for page in (README, COMMAND_LINE)}


BLOCKS = [(page, block) for page in (README, COMMAND_LINE) for block in blocks(page)]


@pytest.mark.skipif(os.name == "nt", reason="bash")
@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page.stem}-{number}" for number, (page, _) in enumerate(BLOCKS)])
def test_commands(page, block, folders):
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    lines = []
    for line in block.splitlines():
        command = line.partition("    #")[0].strip()
        if command in IN_CI:
            assert IN_CI[command] in ci
        elif re.fullmatch(r'pip install (\.|"\.\[[a-z0-9,]+\]")', command):
            # tests/test_distribution.py installs the wheel
            assert set(re.findall(r"[a-z0-9]+", command.partition("[")[2])) <= EXTRAS
        else:
            lines.append(line)
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        "PYTHON": sys.executable,
        "FORK_ZOO": shlex.join(fork_server.shell_command("zoo")),
        "FORK_SCRIPTS": shlex.join(fork_server.shell_command("scripts")),
        "MPLBACKEND": "agg",
        "SDL_VIDEODRIVER": "dummy",
    }
    script = FUNCTIONS + "\n".join(lines)
    result = subprocess.run(
        ["bash", "-c", script], cwd=folders[page], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_what_the_commands_leave(folders):
    readme, folder = folders[README], folders[COMMAND_LINE]
    if not (readme / "logs").exists() or not (folder / "logs").exists():
        pytest.skip("the commands were not run")
    assert set(pd.read_csv(readme / "runs/compare/results.csv")["algorithm"]) == {"mrq", "td3"}
    assert (readme / "runs/compare/README.md").exists()
    assert list(readme.glob("make/**/*.mp4"))
    assert list(folder.glob("make/**/*.mp4"))
    assert np.load(folder / "logs/td3/Pendulum-v1_1/evaluations.npz")["results"].shape == (2, 2)
    (trials,) = (folder / "logs/mrq").glob("report_*.csv")
    assert pd.read_csv(trials)["state"].tolist() == ["COMPLETE"]
    assert list(folder.glob("logs/mrq/Pendulum-v1_1/videos/*.mp4"))
    assert (folder / "logs/mrq/Pendulum-v1_1/diagnosis/index.html").exists()
    assert (folder / "continued/mrq/Pendulum-v1_1/Pendulum-v1.zip").exists()
    assert matplotlib.image.imread(folder / "scores.png").std() > 0


def test_snippets(tmp_path):
    """The blocks of Python, one after the other in one process."""
    assert code_of(README)
    run_code(README, tmp_path)


def test_length():
    assert len(README.read_text("utf-8").split()) < 900


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "index.md"], ids=lambda page: page.stem)
def test_extras(page):
    """The table of extras has them all."""
    text = page.read_text("utf-8")
    table = re.search(r"^\| extra \| for \|\n(.*?)^\n", text, re.MULTILINE | re.DOTALL).group(1)
    named = re.findall(r"`([a-z0-9]+)`", "\n".join(line.split("|")[1] for line in table.splitlines()))
    assert sorted(named) == sorted(EXTRAS - {"all"})


def test_links():
    """Files that the README links to are there, and it links to every page of the documentation."""
    text = README.read_text("utf-8")
    targets = {target.partition("#")[0] for target in re.findall(r'(?:\]\(|src=")([^)"\s]+)[)"]', text)}
    files = {target for target in targets if target and "://" not in target}
    assert not [target for target in files if not (ROOT / target).exists()]
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= files
