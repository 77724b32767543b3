"""
The command ``sb3-mrq`` in this process: mistakes end in one line and status 2, bugs in a traceback.
"""

import re
import shutil
import sys
import zipfile
from pathlib import Path

import matplotlib.image
import pytest
import rl_zoo3.utils

import sb3_mrq
from sb3_mrq import MRQ
from sb3_mrq.command_line import USAGE, is_expected, main
from sb3_mrq.zoo import scripts

SMALL = [
    "-params",
    "learning_starts:20",
    "batch_size:8",
    "policy_kwargs:dict(net_arch=dict(encoder=[8],qf=[8],pi=[8]),z_s_dim=8,z_sa_dim=8,z_a_dim=4)",
]
TRAIN = ["train", "--algo", "mrq", "--env", "Pendulum-v1", "--eval-freq", "-1", "-n", "20", "--device", "cpu"]
ENJOY = ["enjoy", "--algo", "mrq", "--env", "Pendulum-v1", "--no-render", "-n", "3", "--device", "cpu"]
MODEL = "logs/mrq/Pendulum-v1_1/Pendulum-v1.zip"


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Scripts write to where they are called."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(monkeypatch, capsys):
    """Call the command; its status and what it prints."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sb3-mrq", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as error:
            status = error.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on each of two tasks."""
    folder = tmp_path_factory.mktemp("trained")
    for env in ("Pendulum-v1", "CartPole-v1"):
        arguments = ["--algo", "mrq", "--env", env, "--eval-freq", "15", "--eval-episodes", "2", "-n", "30"]
        scripts.run("train", [*arguments, "-f", str(folder / "logs"), *SMALL])
    return folder


@pytest.fixture
def files(trained, tmp_path):
    """The runs, and files that are no models."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    content = Path(MODEL).read_bytes()
    Path("cut.zip").write_bytes(content[: len(content) // 2])
    Path("empty.zip").touch()
    Path("text").write_text("text")
    zipfile.ZipFile("nothing.zip", "w").close()
    for name, source in (("cut", "cut.zip"), ("other", "logs/mrq/CartPole-v1_1/CartPole-v1.zip")):
        run = Path(name) / "mrq" / "Pendulum-v1_1"
        run.mkdir(parents=True)
        shutil.copy(source, run / "Pendulum-v1.zip")


MISTAKES = [
    ([*TRAIN, "-params", "gamma:2"], "gamma is 2, but must be between 0 and 1"),
    ([*TRAIN, "-params", "precision:float33"], "precision is 'float33', but must be one of"),
    ([*TRAIN, "-params", "gamma:"], "-params gamma: sets nothing: write gamma:VALUE"),
    ([*TRAIN, "-params", "gamma"], "-params gamma sets nothing: write gamma:VALUE"),
    ([*TRAIN, "-params", "policy_kwargs:dict("], "-params policy_kwargs:dict( is not valid in Python: '(' was never closed"),
    ([*TRAIN, "-params", "policy_kwargs:dict(z_s_dim=many)"], "name 'many' is not defined"),
    ([*TRAIN, "-params", "policy_kwargs:many"], "name 'many' is not defined"),
    ([*TRAIN, "-params", "policy:NoPolicy"], "policy is 'NoPolicy', but must be one of the names"),
    ([*TRAIN, "-params", "env_wrapper:no_module.Wrapper"], "No module named 'no_module'"),
    ([*TRAIN, "-params", "n_envs:0"], "n_envs is 0, but must be an integer of at least 1"),
    ([*TRAIN, "-params", "n_timesteps:many"], "n_timesteps is 'many', but must be a number"),
    ([*TRAIN, "-params", "noise_type:pink", "noise_std:1"], 'Unknown noise type "pink"'),
    ([*TRAIN, "--gym-packages", "no_package"], "No module named 'no_package'"),
    ([*TRAIN, "-conf", "nowhere.py"], "nowhere.py: No such file or directory"),
    ([*TRAIN, "-conf", "no_module"], "No module named 'no_module'"),
    ([*TRAIN, "-f", "text"], "text/mrq cannot be made: Not a directory"),
    ([*TRAIN, "-f", "text/logs"], "cannot be made: Not a directory"),
    ([*TRAIN, "-tb", "text"], "The folder text/Pendulum-v1 cannot be made: Not a directory"),
    ([*TRAIN, "--device", "foo"], "The device foo cannot be used: Expected one of cpu, cuda"),
    ([*TRAIN, "-i", "nowhere.zip"], "There is no file or folder nowhere.zip"),
    ([*TRAIN, "-i", "cut.zip"], "No data found in the saved file"),
    ([*TRAIN, "-i", "empty.zip"], "empty.zip wasn't a zip-file"),
    ([*TRAIN, "-i", "nothing.zip"], "No data found in the saved file"),
    ([*TRAIN, "-i", "logs/mrq/CartPole-v1_1/CartPole-v1.zip"], "spaces do not match"),
    ([*ENJOY], "There is no model of mrq for Pendulum-v1 in the folder rl-trained-agents. Name the log folder"),
    ([*ENJOY, "-f", "nowhere"], "There is no model of mrq for Pendulum-v1 in the folder nowhere"),
    ([*ENJOY, "-f", "logs", "--load-checkpoint", "7"], "No model found for mrq on Pendulum-v1"),
    ([*ENJOY, "-f", "logs", "--device", "foo"], "The device foo cannot be used"),
    ([*ENJOY, "-f", "cut"], "No data found in the saved file"),
    ([*ENJOY, "-f", "other"], "Unexpected observation shape"),
    (["record_training", *ENJOY[1:5], "-f", "nowhere"], "There is no model of mrq for Pendulum-v1 in the folder nowhere"),
    (["benchmark", "--log-dir", "nowhere", "--no-hub"], "nowhere: No such file or directory"),
    (["diagnose", "--env", "Pendulum-v1", "-n", "0"], "n_episodes is 0, but must be at least 1"),
    (
        ["diagnose", "--env", "Pendulum-v1", "-o", "text"],
        "text cannot be made: File exists. Choose another one with -o",
    ),
    (["diagnose", "--env", "Pendulum-v1", "--device", "foo"], "The device foo cannot be used"),
    (["diagnose", "--env", "Pendulum-v1", "--n-envs", "0"], "n-envs is 0"),
    (["diagnose", "--env", "Pendulum-v1", "--model", "empty.zip"], "empty.zip wasn't a zip-file"),
    (["diagnose", "--env", "Pendulum-v1", "--model", MODEL, "--vec-normalize", "text"], "text holds no statistics"),
    (["all_plots", "-f", "nowhere"], "-a mrq -e Pendulum-v1 -f logs"),
    (
        ["all_plots", "-a", "mrq", "-e", "Pendulum-v1", "-f", "nowhere"],
        "no results of evaluations for mrq on Pendulum-v1 in nowhere",
    ),
    (["plot_train", "-a", "mrq", "-e", "Acrobot-v1", "-f", "logs"], "no results of training for mrq on Acrobot-v1 in logs"),
    (["plot_from_file", "-i", "nowhere.pkl"], "nowhere.pkl: No such file or directory"),
    (["compare", "--env", "Pendulum-v2", "--steps", "9"], "There is no task Pendulum-v2. Did you mean Pendulum-v1?"),
    (["compare", "--env", "Pendulum-v1"], "--steps is needed for Pendulum-v1"),
    (["compare", "--env", "Pendulum-v1", "--steps", "0"], "--steps is 0, but must be at least 1"),
    (["compare", "--env", "Pendulum-v1", "--steps", "9", "--algos", "mqr"], "There is no algorithm mqr. Did you mean mrq?"),
    (["compare", "--suite", "dcm"], "invalid choice: 'dcm'"),
    (["report", "nowhere"], "--out FOLDER is needed"),
    (["report", "logs"], "There are no finished runs in logs"),
    (["report", "text", "--out", "here"], "text is not a table of a comparison"),
    (["trian"], "There is no script trian. Did you mean train?"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_mistakes(files, command, arguments, message):
    status, _, errors = command(*arguments)
    assert status == 2
    assert message in errors.splitlines()[-1]
    assert re.match(rf"sb3-mrq {arguments[0]}: error: \S", errors.splitlines()[-1])


class TestBugs:
    """What is not raised on purpose, and what the user's own code raises, keeps its traceback."""

    @pytest.mark.parametrize("error", [ValueError("of a bug"), TypeError("of a bug"), FileNotFoundError(2, "a bug", "file")])
    def test_outside(self, command, monkeypatch, error):
        def fail(*args):
            raise error

        monkeypatch.setattr("gymnasium.envs.classic_control.PendulumEnv.step", fail)
        with pytest.raises(type(error), match="a bug"):
            command(*TRAIN)

    def test_inside(self, command, monkeypatch):
        monkeypatch.setattr(scripts, "_evaluation_arguments", lambda options: 5)
        with pytest.raises(TypeError, match="must be an iterable"):
            command(*TRAIN)

    @pytest.mark.parametrize("statement", ["one, two = [1]", "int('x')", "[][0]"])
    def test_no_statement_of_the_package_raises_it(self, statement):
        for file in (scripts.__file__, rl_zoo3.utils.__file__):
            namespace = vars(scripts if file == scripts.__file__ else rl_zoo3.utils)
            with pytest.raises((ValueError, IndexError)) as caught:
                exec(compile(statement, file, "exec"), namespace)
            assert not is_expected(caught.value)


def test_text_without_quotes(command):
    text = ["precision:float32", "encoder_learning_rate:lin_1e-4", "noise_type:normal", "noise_std:.1", "policy:MlpPolicy"]
    assert command(*TRAIN, *SMALL, *text, "--env-kwargs", "render_mode:rgb_array")[0] == 0
    model = MRQ.load(MODEL)
    assert (model.precision, model.encoder_lr_schedule(0.5)) == ("float32", 5e-5)
    assert type(model.action_noise).__name__ == "NormalActionNoise"
    assert model.policy_kwargs["z_s_dim"] == 8
    assert "render_mode: rgb_array" in Path(MODEL).with_suffix("").joinpath("args.yml").read_text()
    # With quotes it works as before, and rl-zoo3 is as it was
    assert command(*TRAIN, *SMALL, "precision:'float32'")[0] == 0
    assert rl_zoo3.utils.StoreDict.__call__.__module__ == "rl_zoo3.utils"


class TestDefaults:
    def test_mrq(self, command, files):
        status, output, _ = command("train", *TRAIN[3:], *SMALL)
        assert status == 0 and "No --algo is given: mrq is used." in output
        assert Path("logs/mrq/Pendulum-v1_2/Pendulum-v1.zip").is_file()
        status, output, _ = command("enjoy", *ENJOY[3:], "-f", "logs")
        assert status == 0 and "Loading logs/mrq/Pendulum-v1_2/Pendulum-v1.zip" in output

    def test_another_algorithm(self, command):
        status, output, _ = command("train", "--algo=td3", *TRAIN[3:])
        assert status == 0 and "No --algo" not in output
        assert Path("logs/td3/Pendulum-v1_1/Pendulum-v1.zip").is_file()

    @pytest.mark.parametrize("script", scripts.SCRIPTS)
    def test_help(self, command, monkeypatch, script):
        """It needs no model, and no results."""
        status, output, errors = command(script, "--help")
        assert status == 0 and output.startswith("usage: ") and errors == ""


class TestPlots:
    def test_file(self, command, files):
        status, _, errors = command("plot_train", "-a", "mrq", "-e", "Pendulum-v1", "-f", "logs", "-w", 1, "-o", "figure.png")
        assert status == 0 and "display" not in errors
        assert matplotlib.image.imread("figure.png").std() > 0

    @pytest.mark.parametrize("output", ["nowhere/figure.png", "figure.text"])
    def test_no_such_file(self, command, files, output):
        status, _, errors = command("plot_train", "-a", "mrq", "-e", "Pendulum-v1", "-f", "logs", "-w", 1, "-o", output)
        assert status == 2
        assert f"plot_train: error: The figure cannot be written to {output}: " in errors.splitlines()[-1]

    def test_no_display(self, command, files, monkeypatch):
        matplotlib.use("agg")
        status, _, errors = command("plot_train", "-a", "mrq", "-e", "Pendulum-v1", "-f", "logs", "-w", 1)
        assert status == 0
        assert "There is no display, so no figure will be shown. Write it to a file with -o FILE." in errors

    def test_evaluations(self, command, files):
        status, output, _ = command("all_plots", "-a", "mrq", "-e", "Pendulum-v1", "-f", "logs", "--no-display")
        assert status == 0 and re.search(r"\|Pendulum-v1 *\| *-\d", output)


class TestWithoutRlZoo3:
    @pytest.fixture(autouse=True)
    def blocked(self, monkeypatch):
        for name in list(sys.modules):
            if name.startswith(("rl_zoo3", "sb3_mrq.zoo")):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "rl_zoo3", None)

    def test_help(self, command):
        assert command("--help")[:2] == (0, USAGE + "\n")
        assert command()[0] == 2

    def test_version(self, command):
        assert command("--version")[:2] == (0, f"sb3-mrq {sb3_mrq.__version__}\n")

    def test_script(self, command):
        status, _, errors = command("train")
        assert status == 2
        assert errors == 'sb3-mrq train: error: rl_zoo3 is not installed. Install it with: pip install "sb3-mrq[zoo]"\n'


def test_usage_names_all_scripts():
    assert set(scripts.SCRIPTS) <= set(re.findall(r"\w+", USAGE))


def test_entry_point():
    """It does not import the package of the scripts, which needs rl-zoo3."""
    root = Path(__file__).resolve().parent.parent
    assert 'sb3-mrq = "sb3_mrq.command_line:main"' in (root / "pyproject.toml").read_text()
