"""
Every example and the notebook run with few steps and print their last lines.
"""

import re
import signal
import sys
from importlib.metadata import metadata
from pathlib import Path

import fork_server
import nbformat
import pytest
from nbclient import NotebookClient

EXTRAS = set(metadata("sb3-mrq").get_all("Provides-Extra"))
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Pattern in the last lines, number of steps, and further arguments. train.py has its own tests.
LAST_WORDS = {
    "atari": ("4 training steps, observations of", 8),
    "custom_encoder": ("FourierFeatures", 12),
    "dict_observations": ("6 training steps, observations Dict", 12),
    "demonstrations": ("demonstrated transitions, return -?[0-9]", 40),
    "dm_control_pixels": ("4 training steps", 8),
    "export_onnx": ("policy.onnx: .* actions differ from model.predict by at most", 12),
    "first_steps": ("one episode: -", 40),
    "goals": ("mean return -", 60),
    "offline": ("return of the data -[0-9]+, of the policy -[0-9]+", 20),
    "parallel_environments": ("24 steps of 4 environments, 8 training steps", 24),
    "resume_after_crash": ("finished after 20 steps, 20 transitions", 20),
    "search": ("best of 2 trials: -.* with {'learning_rate'", 12, "--trials", "2"),
    "vec_normalize": (r"return -.* \+- ", 12),
}


def test_all_are_known():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*LAST_WORDS, "train"}


@pytest.mark.parametrize("name", LAST_WORDS)
def test_docstrings(name):
    """An example says how it is called and which extra it needs."""
    docstring = (EXAMPLES / f"{name}.py").read_text("utf-8").split('"""')[1]
    assert f"python examples/{name}.py" in docstring
    (extra,) = re.findall(r"Needs (?:no extra|the extra ``(\w+)``)\.", docstring)
    assert extra in {"", *EXTRAS}


def run(name, folder, steps, *arguments):
    """Run an example in a folder."""
    # Targets are replaced every 5 steps, not 250 with as many encoder updates, which on images take minutes on a CPU
    code = (
        "import inspect, runpy, sys; from sb3_mrq import MRQ; init = inspect.unwrap(MRQ.__init__); "
        "init.__defaults__ = tuple(5 if d == 250 else d for d in init.__defaults__); "
        f"sys.argv = {[name, '--steps', str(steps), *arguments]!r}; "
        f"runpy.run_path({str(EXAMPLES / f'{name}.py')!r}, run_name='__main__')"
    )
    return fork_server.run([sys.executable, "-c", code], cwd=folder)


@pytest.mark.parametrize("name", LAST_WORDS)
def test_example(name, tmp_path):
    words, steps, *arguments = LAST_WORDS[name]
    process = run(name, tmp_path, steps, *arguments)
    assert process.returncode == 0, process.stderr
    assert re.search(words, process.stdout), process.stdout[-2000:]


def test_resuming_after_a_crash(tmp_path):
    killed = run("resume_after_crash", tmp_path, 20, "--crash-at", "15")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run("resume_after_crash", tmp_path, 20)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after 14 steps, 6 to go" in resumed.stdout
    assert "finished after 20 steps" in resumed.stdout


def test_notebook(tmp_path):
    notebook = nbformat.read(EXAMPLES / "quick_start.ipynb", as_version=4)
    # The committed notebook was run from top to bottom, and opens in Colab
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    check_outputs(notebook)
    assert "colab.research.google.com" in notebook.cells[0].source and "%pip install" in cells[0].source
    (steps,) = [cell for cell in cells if "STEPS = 6_000" in cell.source]
    steps.source = steps.source.replace("STEPS = 6_000", "STEPS = 300")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check_outputs(notebook)
    assert (tmp_path / "mrq_pendulum.zip").exists()


def check_outputs(notebook):
    """Two figures and a return."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert any("return -" in output.get("text", "") for output in outputs)
