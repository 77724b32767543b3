"""
rl-zoo3's scripts through the command line, with discrete actions, each in its own process. Most are forks, see fork_server.py.
tests/test_readme.py runs the commands of the README, with continuous actions, and the installed command.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fork_server
import imageio_ffmpeg
import numpy as np
import pytest

from sb3_mrq import MRQ
from sb3_mrq.zoo.hub import model_card

HERE = Path(__file__).resolve().parent
# Small networks, a short warm-up
SMALL = [
    "-params",
    "learning_starts:100",
    "batch_size:8",
    "policy_kwargs:dict(net_arch=dict(encoder=[8], qf=[8], pi=[8]), z_s_dim=8, z_sa_dim=8, z_a_dim=4)",
]
FAST = ["--num-threads", "1", "--device", "cpu"]
ENV_ID = "CartPole-v1"
# The command line, with the scripts that a script starts as forks too
FORKED_CHILDREN = """
import os, shlex, subprocess, sys
from sb3_mrq.zoo.cli import main
call, fork = subprocess.call, shlex.split(os.environ["FORK_ZOO"])
subprocess.call = lambda command, **kwargs: call([*fork, *command] if command[0] == sys.executable else command, **kwargs)
main()
"""


def call(folder, *arguments, command=("-m", "sb3_mrq.zoo"), environment=os.environ, fork="zoo", **variables):
    """
    Run a script in a folder and return the result.

    :param fork: kind of fork, None for a real process
    """
    command = [sys.executable, *command, *map(str, arguments)]
    environment = {**environment, **variables}
    if "PYTHONPATH" in variables and "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    if fork is not None:
        return fork_server.run(command, kind=fork, cwd=folder, env=environment)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def zoo(folder, *arguments, **environment):
    """Run a script in a folder and return its output."""
    result = call(folder, *arguments, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def n_frames(video):
    return imageio_ffmpeg.count_frames_and_secs(str(video))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a short training run."""
    folder = tmp_path_factory.mktemp(ENV_ID)
    zoo(
        folder,
        *("train", "--algo", "mrq", "--env", ENV_ID, "-n", 400, "--eval-freq", 100, "--eval-episodes", 2, *FAST),
        *("--save-freq", 200, "--save-replay-buffer", "--seed", 1, *SMALL),
    )
    return folder


class TestOneTask:
    def test_train(self, folder):
        run = folder / "logs" / "mrq" / f"{ENV_ID}_1"
        files = {path.name for path in run.iterdir()}
        expected = {"best_model.zip", "evaluations.npz", "rl_model_200_steps.zip", "rl_model_400_steps.zip", "0.monitor.csv"}
        assert files >= expected | {f"{ENV_ID}.zip", "replay_buffer.pkl"}
        evaluations = np.load(run / "evaluations.npz")
        assert evaluations["timesteps"].tolist() == [100, 200, 300, 400]
        assert evaluations["results"].shape == (4, 2)
        model = MRQ.load(run / f"{ENV_ID}.zip", device="cpu")
        assert (model.num_timesteps, model._n_updates, model.seed) == (400, 300, 1)

    def test_continue(self, folder):
        agent = folder / "logs" / "mrq" / f"{ENV_ID}_1" / f"{ENV_ID}.zip"
        zoo(
            folder,
            *("train", "--algo", "mrq", "--env", ENV_ID, "-i", agent, "-n", 50, "--eval-freq", -1, *FAST),
            *("-f", "continued"),
        )
        model = MRQ.load(folder / "continued" / "mrq" / f"{ENV_ID}_1" / f"{ENV_ID}.zip", device="cpu")
        # Trained at every step: the warm-up was in the replay buffer
        assert (model.num_timesteps, model._n_updates) == (50, 350)

    def test_enjoy(self, folder):
        # An episode takes 500 steps at most
        arguments = ["enjoy", "--algo", "mrq", "--env", ENV_ID, "-f", "logs", "--no-render", "-n", 600, *FAST]
        for which in (["--load-best"], ["--load-checkpoint", 200], ["--load-last-checkpoint"]):
            output = zoo(folder, *arguments, *which)
            assert re.search(r"Mean reward: -?\d+\.\d+ \+/- \d+\.\d+", output)
            name = {"--load-best": "best_model", "--load-checkpoint": "rl_model_200_steps"}.get(which[0], "rl_model_400_steps")
            assert f"Loading logs/mrq/{ENV_ID}_1/{name}.zip" in output

    def test_record_video(self, folder):
        zoo(folder, "record_video", "--algo", "mrq", "--env", ENV_ID, "-f", "logs", "-n", 30)
        (video,) = (folder / "logs" / "mrq" / f"{ENV_ID}_1" / "videos").glob("*.mp4")
        assert n_frames(video) >= 30

    def test_plots(self, folder):
        figures = folder / "figures"
        figures.mkdir()
        environment = dict(MPLBACKEND="module://save_figures_backend", PYTHONPATH=str(HERE), FIGURES=str(figures))
        # Two runs of an algorithm are the least that plot_from_file takes
        runs = folder / "two" / "mrq"
        for number in (1, 2):
            shutil.copytree(folder / "logs" / "mrq" / f"{ENV_ID}_1", runs / f"{ENV_ID}_{number}")
        episodes = sum(1 for _ in (runs / f"{ENV_ID}_1" / "0.monitor.csv").open()) - 2

        output = zoo(folder, "plot_train", "-a", "mrq", "-e", ENV_ID, "-f", "two", "-w", 1, **environment)
        assert f"figure 1: points of its lines [{episodes}, {episodes}]" in output

        arguments = ["-a", "mrq", "-e", ENV_ID, "-f", "two", "--no-million"]
        output = zoo(folder, "all_plots", *arguments, "-o", "results", **environment)
        assert "figure 1: points of its lines [4]" in output
        assert re.search(rf"\|{ENV_ID} *\| *-?\d", output)

        output = zoo(folder, "plot_from_file", "-i", "results.pkl", "-o", "curve.png", "--format", "png", **environment)
        assert "points of its lines [4]" in output
        assert (folder / "curve.png").stat().st_size > 5000
        assert len(list(figures.iterdir())) >= 3


@pytest.fixture(scope="module")
def visual(tmp_path_factory):
    """A few random steps in a task with a slash in its id, in worker processes, without MUJOCO_GL."""
    folder = tmp_path_factory.mktemp("visual")
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    zoo(
        folder,
        *("train", "--algo", "mrq", "--env", "dmc-visual/cartpole-balance-v0", "--vec-env", "subproc", "-n", 20, *FAST),
        *("--eval-freq", -1, "--save-freq", 10, "-params", "n_envs:2"),
        environment=environment,
    )
    return folder


def test_video_of_mujoco(tmp_path, monkeypatch):
    """Without a display, and without MUJOCO_GL."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    arguments = ["--algo", "mrq", "--env", "InvertedPendulum-v5"]
    zoo(tmp_path, "train", *arguments, "-n", 20, "--eval-freq", -1, *FAST)
    zoo(tmp_path, "record_video", *arguments, "-f", "logs", "-n", 10)
    (video,) = (tmp_path / "logs" / "mrq" / "InvertedPendulum-v5_1" / "videos").glob("*.mp4")
    assert n_frames(video) >= 10


def test_subproc(visual):
    model = MRQ.load(visual / "logs" / "mrq" / "dmc-visual-cartpole-balance-v0_1" / "dmc-visual-cartpole-balance-v0.zip")
    assert model.observation_space.shape == (9, 84, 84)


def forked_children():
    """Arguments of ``zoo`` for scripts that start other scripts."""
    return {"command": ("-c", FORKED_CHILDREN), "FORK_ZOO": shlex.join(fork_server.shell_command("zoo"))}


def test_record_training(visual):
    arguments = ["--algo", "mrq", "--env", "dmc-visual/cartpole-balance-v0", "-f", "logs", "-n", 12]
    zoo(visual, "record_training", *arguments, **forked_children())
    videos = visual / "logs" / "mrq" / "dmc-visual-cartpole-balance-v0_1" / "videos"
    names = sorted(path.name for path in videos.glob("*.mp4"))
    assert "training.mp4" in names
    # The final model and two checkpoints
    assert n_frames(videos / "training.mp4") >= 3 * 12


def test_benchmark(visual):
    arguments = ["--log-dir", "logs", "--benchmark-dir", "bench", "-n", 600, "--no-hub", "--num-threads", 1]
    zoo(visual, "benchmark", *arguments, **forked_children())
    (row,) = [line for line in (visual / "benchmark.md").read_text().splitlines() if "cartpole" in line]
    algo, task, mean, _, trained, steps, episodes = [cell.strip() for cell in row.strip("|").split("|")]
    assert (algo, task, trained) == ("mrq", "dmc-visual-cartpole-balance-v0", "500k")
    assert 0 < float(mean) < 1000
    assert (int(steps), int(episodes)) == (500, 1)


def test_another_algorithm(tmp_path):
    arguments = ["--algo", "td3", "--env", "Pendulum-v1", *FAST]
    output = zoo(tmp_path, "train", *arguments, "-n", 250, "--eval-freq", 200, "--eval-episodes", 1)
    assert "rl_zoo3/hyperparams/td3.yml" in output
    assert np.load(tmp_path / "logs" / "td3" / "Pendulum-v1_1" / "evaluations.npz")["results"].shape == (1, 1)
    output = zoo(tmp_path, "enjoy", *arguments, "-f", "logs", "--no-render", "-n", 200)
    assert "Mean reward" in output


def test_to_the_hub_and_back(tmp_path):
    arguments = ["--algo", "mrq", "--env", "CartPole-v1"]
    zoo(tmp_path, "train", *arguments, "-n", 50, "--eval-freq", -1, *FAST)
    through_hub = ("-c", "import local_hub; from sb3_mrq.zoo.cli import main; main()")
    variables = dict(command=through_hub, PYTHONPATH=str(HERE), HUB=str(tmp_path / "remote"))

    zoo(tmp_path, "push_to_hub", *arguments, "-f", "logs", "-orga", "us", "-n", 30, "--device", "cpu", **variables)
    repository = tmp_path / "remote" / "us" / "mrq-CartPole-v1"
    card = (repository / "README.md").read_text()
    assert "- name: MRQ" in card and "mean_reward" in card and "## Hyperparameters" in card and "rl_zoo3.enjoy" not in card
    assert n_frames(repository / "replay.mp4") >= 30

    # As the model card says, in a folder of one's own
    download, enjoy = re.findall(r"^sb3-mrq ((?:load_from_hub|enjoy) .*)$", card, flags=re.MULTILINE)
    (tmp_path / "elsewhere").mkdir()
    zoo(tmp_path / "elsewhere", *shlex.split(download), **variables)
    # An episode has at most 500 steps
    output = zoo(tmp_path / "elsewhere", *shlex.split(enjoy), "--no-render", "-n", 510, *FAST)
    assert "Mean reward" in output
    (code,) = re.findall(r"^```python\n(from huggingface_sb3.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    command = ("-c", f"import local_hub\n{code}\nprint(model.num_timesteps)")
    assert zoo(tmp_path, **variables | {"command": command}).split()[-1] == "50"


def test_model_card():
    """With the options of the upload, and the extra that the task needs."""
    theirs = "# Card\npython -m rl_zoo3.enjoy\n## Hyperparameters\n```python\n{'n_steps': 3}\n```\n"
    arguments = ["--algo", "drq", "--env", "dmc/walker-walk-v0", "-orga", "us", "-f", "logs"]
    card = model_card(theirs, [*arguments, "-name", "other"])
    assert "sb3-mrq enjoy --algo drq --env dmc/walker-walk-v0 -f logs" in card
    assert "sb3-mrq load_from_hub --algo drq --env dmc/walker-walk-v0 -orga us -name other -f logs" in card
    assert 'DRQ.load(load_from_hub("us/other", "drq-dmc-walker-walk-v0.zip"))' in card
    assert "`zoo` and `dmc`" in card and "{'n_steps': 3}" in card and "rl_zoo3" not in card
    assert "with the extra `zoo`," in model_card(theirs, ["--algo", "mrq", "--env", "CartPole-v1", "-orga", "us"])
    assert model_card(theirs, ["--algo", "td3", "--env", "Pendulum-v1", "-orga", "us"]) == theirs


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory where Linux tells it")
def test_watching_atari_takes_little_memory(tmp_path):
    arguments = ["--algo", "mrq", "--env", "ALE/Pong-v5", *FAST]
    zoo(tmp_path, "train", *arguments, "-n", 20, "--eval-freq", -1)
    command = ("-c", "from sb3_mrq.zoo.cli import main; main(); print(open('/proc/self/status').read())")
    output = zoo(tmp_path, "enjoy", *arguments, "-f", "logs", "--no-render", "-n", 200, command=command, fork=None)
    peak_kb = int(re.search(r"VmHWM:\s+(\d+) kB", output)[1])
    assert peak_kb * 1024 < 1e9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "There is no script trian. Did you mean train?"),
        (["train", "--algo", "mrq", "--env", "dmc/cartpole-swinup-v0"], "Did you mean dmc/cartpole-swingup-v0?"),
        (["enjoy", "--algo", "mrq", "--env", "ALE/Pongo-v5"], "There is no task ALE/Pongo-v5. Did you mean ALE/Pong-v5?"),
        (["train", "--algo", "mrq", "-params", "gama:0.9"], "MRQ has no hyperparameter gama. Did you mean gamma?"),
        (["train", "--algo", "mrq", "--env", "sb3_mrq.envs:dmc/walker-walk-v0"], "use --gym-packages sb3_mrq.envs --env dmc/"),
        (["train", "--algo", "mrq", "-conf", "nowhere.yml"], "nowhere.yml cannot be read: No such file"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    result = call(tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def without(folder, *modules):
    """Environment variables under which some modules cannot be imported."""
    for module in modules:
        (folder / "blocked" / module).mkdir(parents=True)
        (folder / "blocked" / module / "__init__.py").write_text(
            f"raise ModuleNotFoundError('No module named {module}', name={module!r})"
        )
    return {"PYTHONPATH": str(folder / "blocked")}


def test_without_rl_zoo3(tmp_path):
    environment = without(tmp_path, "rl_zoo3")
    result = call(tmp_path, "train", fork=None, **environment)
    assert result.returncode != 0
    assert 'pip install "sb3-mrq[zoo]"' in result.stderr.splitlines()[-1]


def test_without_what_plots_need(tmp_path):
    arguments = ["-a", "mrq", "-e", "Pendulum-v1", "-f", "logs"]
    result = call(tmp_path, "plot_train", *arguments, fork="scripts", **without(tmp_path, "seaborn"))
    assert result.stderr.splitlines()[-1] == (
        'sb3-mrq plot_train: error: seaborn is not installed. Install it with: pip install "sb3-mrq[zoo]"'
    )


def test_atari_without_ale_py(tmp_path):
    arguments = ["--algo", "mrq", "--env", "ALE/Pong-v5", "-n", "10"]
    result = call(tmp_path, "train", *arguments, fork="scripts", **without(tmp_path, "ale_py"))
    assert result.returncode != 0
    assert 'pip install "sb3-mrq[atari]"' in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_usage(tmp_path):
    result = call(tmp_path, "--help")
    assert result.returncode == 0 and "usage: sb3-mrq" in result.stdout
    for script in ("train", "enjoy", "record_video", "record_training", "plot_train", "all_plots", "plot_from_file"):
        assert script in result.stdout
    assert call(tmp_path).returncode == 2
    for script in ("push_to_hub", "load_from_hub"):
        result = call(tmp_path, script, "--help")
        assert result.returncode == 0 and "mrq" in result.stdout


def test_offline(folder, tmp_path):
    """From the replay buffer of the run: training steps alone, then environment steps after them."""
    buffer = next(folder.glob("logs/mrq/*/replay_buffer.pkl"))
    task = ["train", "--algo", "mrq", "--env", ENV_ID, *FAST, *SMALL, "--eval-freq", 20, "--eval-episodes", 1]
    data = ["--dataset", buffer, "--offline-steps", 40]
    for n, arguments in enumerate(([], ["-n", 30]), start=1):
        zoo(tmp_path, *task, *data, *arguments)
        run = tmp_path / "logs" / "mrq" / f"{ENV_ID}_{n}"
        model = MRQ.load(run / f"{ENV_ID}.zip")
        assert (model.num_timesteps, model._n_updates) == ((40, 40) if n == 1 else (70, 70))
        steps = np.load(run / "evaluations.npz")["timesteps"].tolist()
        assert steps == ([20, 40] if n == 1 else [20, 40, 60])
    for wrong in (data[:2], data[2:], [*data[:3], "many"]):
        result = call(tmp_path, *task, *wrong)
        assert result.returncode == 2
        assert "--offline-steps" in result.stderr
    result = call(tmp_path, *task, "--dataset", "missing/none-v0", "--offline-steps", 5)
    assert result.returncode != 0
