"""
Comparisons: every run is made once, none is lost, failures are reported, and evaluations are right.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import fork_server
import numpy as np
import pandas as pd
import pytest
import rl_zoo3
import torch as th
import yaml
from envs import VECTOR, SpaceEnv, note_deterministic, tiny_model
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from sb3_mrq import MRQ
from sb3_mrq.accelerate.precision import automatic_precision
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.compare import command, runner, versions
from sb3_mrq.compare.algorithms import VARIANTS, labels, resolve, zoo_section
from sb3_mrq.compare.evaluation import COLUMNS, EvaluationCallback
from sb3_mrq.compare.runs import Run
from sb3_mrq.compare.train import prepare
from sb3_mrq.zoo import scripts
from sb3_mrq.zoo.configuration import ConfigurationError
from sb3_mrq.zoo.exp_manager import CHECKPOINTS

TINY = ["--env", "Pendulum-v1", "--steps", "40", "--eval-freq", "20", "--eval-episodes", "1", "--seeds", "1", "--jobs", "1"]
TRAIN = ["-m", "sb3_mrq.compare.train"]


def plan(monkeypatch, *arguments):
    """The runs of a command, before they start."""
    monkeypatch.setattr(sys, "argv", ["sb3-mrq compare", *arguments])
    return command.plan(command.parse())


def rows_of(folder, name="evaluations.csv"):
    return list(csv.DictReader((Path(folder) / name).open()))


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """
    The command in this process, whose runs are forks, see fork_server.py. It returns the status and what was printed.
    ``code`` replaces the module of the runs.
    """

    def call(*arguments, code=None):
        def start(command, **kwargs):
            assert command[1:3] == TRAIN
            command = command if code is None else [command[0], "-c", code, *command[3:]]
            popen = partial(fork_server.Popen, kind="zoo") if fork_server.ENABLED else subprocess.Popen
            return popen(command, **kwargs)

        monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT))
        capsys.readouterr()
        status = 0
        try:
            scripts.run("compare", [*arguments, "--out", str(tmp_path)])
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr().out

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


class TestPlan:
    def test_suites_are_the_papers(self, monkeypatch):
        runs = [run for suite in command.SUITES for run in plan(monkeypatch, "--suite", suite, "--algos", "mrq")]
        assert len(runs) == 118 * 5 == len({run.folder for run in runs})
        lengths = {run.task: (run.steps, run.eval_freq) for run in runs}
        assert lengths["HalfCheetah-v5"] == (1_000_000, 5_000)
        assert lengths["dmc/walker-walk-v0"] == lengths["dmc-visual/walker-walk-v0"] == (500_000, 5_000)
        assert lengths["ALE/Pong-v5"] == (2_500_000, 100_000)

    def test_defaults(self, monkeypatch):
        """Algorithms that take the actions, and twenty evaluations."""
        for env, algorithms in (("Pendulum-v1", ["mrq", "td3", "sac"]), ("CartPole-v1", ["mrq", "dqn", "qrdqn"])):
            runs = plan(monkeypatch, "--env", env, "--steps", "2000", "--seeds", "1")
            assert [run.algorithm for run in runs] == algorithms and {run.eval_freq for run in runs} == {100}

    def test_each_run_once(self, monkeypatch):
        arguments = ["--env", "Pendulum-v1", "Pendulum-v1", "--algos", "mrq, sac,mrq", "--first-seed", "3", "--seeds", "2"]
        runs = plan(monkeypatch, *TINY, *arguments)
        assert [(run.algorithm, run.seed) for run in runs] == [("mrq", 3), ("sac", 3), ("mrq", 4), ("sac", 4)]


class TestAlgorithms:
    def test_hyperparameters(self):
        assert resolve("mrq-1-step:precision=float32") == ("mrq", ["n_steps:1", "precision:float32"])
        assert resolve("sac:gamma=0.9") == ("sac", ["gamma:0.9"])
        for name in VARIANTS:
            resolve(name)

    @pytest.mark.parametrize(
        "name, message",
        [
            ("mqr", "no algorithm mqr. Did you mean mrq?"),
            ("mrq:gama=1", "no hyperparameter gama. Did you mean gamma?"),
            ("mrq:gamma", "gamma in mrq:gamma sets nothing: write mrq:NAME=VALUE"),
        ],
    )
    def test_mistakes(self, name, message):
        with pytest.raises(ConfigurationError, match=re.escape(message)):
            resolve(name)

    def test_names_in_figures(self):
        names = ["mrq-bfloat16", "drq", "qrdqn", "td3", "mrq-no-encoder-loss", "mrq:n_steps=1", "mrq-float32-medium"]
        assert list(labels(pd.DataFrame({"algorithm": names, "task": "a"}))) == [
            *("MR.Q", "DR.Q", "QR-DQN", "TD3", "MR.Q, no encoder losses", "MR.Q, n_steps=1", "MR.Q, float32 medium")
        ]

    @pytest.mark.parametrize("tasks, expected", [("ab", ["MR.Q", "MR.Q"]), ("aa", ["MR.Q, bfloat16", "MR.Q, float32"])])
    def test_precision_in_figures(self, tasks, expected):
        """It is told if one task was run in both."""
        assert list(labels(pd.DataFrame({"algorithm": ["mrq-bfloat16", "mrq-float32"], "task": [*tasks]}))) == expected

    def test_zoo_hyperparameters(self):
        assert zoo_section("mrq", "dmc/walker-walk-v0") is None
        assert zoo_section("td3", "Pendulum-v1") is None
        cheetah = zoo_section("td3", "HalfCheetah-v5")
        assert cheetah["learning_starts"] == 10_000 and cheetah == zoo_section("td3", "dmc/walker-walk-v0")
        assert zoo_section("td3", "Humanoid-v5") != cheetah
        assert zoo_section("td3", "OfOnesOwn") is None

    @pytest.mark.parametrize("algorithm", ["dqn", "qrdqn", "ppo", "ppo_lstm"])
    def test_atari_games_have_one_preprocessing(self, algorithm, tmp_path):
        theirs = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algorithm}.yml").read_text())["atari"]
        section = zoo_section(algorithm, "ALE/Pong-v5")
        run = Run("ALE/Pong-v5", algorithm, 0, 40, 20, 1, str(tmp_path), 1, "cpu", "")
        run.folder.mkdir(parents=True)
        assert "--conf-file" in prepare(run)
        assert yaml.safe_load((run.folder / "hyperparams.yml").read_text()) == {"ALE/Pong-v5": section}
        assert section.pop("env_wrapper") == "sb3_mrq.envs.AtariWrapper"
        assert set(theirs) - set(section) == {"env_wrapper", "frame_stack"}
        assert section == {name: theirs[name] for name in section}
        assert zoo_section("sac", "ALE/Pong-v5") is None


# A checkpoint every ten steps; the first process of the run is killed by the 31st step
KILLED = """
import os, sys, sb3_mrq.compare.train as train; from sb3_mrq import MRQ
train.CHECKPOINT_FREQ, store = (10, 10), MRQ._store_transition
def dying(self, *args):
    if self.num_timesteps == 31 and '--trained-agent' not in sys.argv: os._exit(9)
    store(self, *args)
MRQ._store_transition = dying; train.main()
"""
# SIGTERM comes to the first process of the run in its last evaluation
TERMINATED_AT_THE_END = """
import os, signal, sys, sb3_mrq.compare.train as train; from sb3_mrq import MRQ
predict = MRQ.predict
def dying(self, *args, **kwargs):
    if self.num_timesteps == 40 and '--trained-agent' not in sys.argv: os.kill(os.getpid(), signal.SIGTERM)
    return predict(self, *args, **kwargs)
MRQ.predict = dying; train.main()
"""


class TestCompare:
    def test_from_beginning_to_end(self, compare, tmp_path):
        status, output = compare(*TINY, "--algos", "mrq-1-step,sac,dqn")
        assert status == 1 and f"3 runs in {tmp_path}, 0 of them already finished." in output
        assert re.search(r"FAILED dqn on Pendulum-v1, seed 0: exit status 1: .*action spaces.* \(see .*log.txt\)", output)
        rows = rows_of(tmp_path, "results.csv")
        assert tuple(rows[0]) == COLUMNS
        assert [(row["algorithm"], row["step"]) for row in rows] == [
            (algorithm, step) for algorithm in ("mrq-1-step", "sac") for step in ("0", "20", "40")
        ]
        assert all(-2000 < float(row["return"]) < 0 and row["length"] == "200.0" for row in rows)
        assert all(row["versions"] == versions.versions() and "threads" in row["machine"] for row in rows)
        precision = automatic_precision(th.device("cpu"))
        assert [row["machine"].endswith(f", {precision}") for row in rows] == [True] * 3 + [False] * 3
        folder = tmp_path / "runs" / "mrq-1-step" / "Pendulum-v1" / "seed0"
        assert "n_steps" in next(folder.glob("zoo/**/config.yml")).read_text()
        assert output.count(str(tmp_path / "README.md")) == 1
        text = (tmp_path / "README.md").read_text()
        for figure in re.findall(r"\((.*\.png)\)", text):
            assert (tmp_path / figure).stat().st_size > 10_000
        assert "| MR.Q, 1-step targets | SAC |" in text

        # Finished runs are left alone
        before = (folder / "evaluations.csv").stat().st_mtime_ns
        status, output = compare(*TINY, "--algos", "mrq-1-step,sac")
        assert status == 0 and "2 runs" in output and "2 of them already finished" in output
        assert (folder / "evaluations.csv").stat().st_mtime_ns == before
        # and results of other settings are never replaced
        with pytest.raises(ConfigurationError, match="steps was 40, not 60"):
            compare(*TINY, "--algos", "mrq-1-step", "--steps", "60")

    @pytest.mark.parametrize("code, failure", [(KILLED, "exit status 9"), (TERMINATED_AT_THE_END, "stopped by a signal")])
    def test_resumes_an_interrupted_run(self, compare, tmp_path, code, failure):
        """From its last checkpoint, and its evaluations go on too."""
        folder = tmp_path / "runs" / "mrq" / "Pendulum-v1" / "seed0"
        status, output = compare(*TINY, "--algos", "mrq", code=code)
        assert status == 1 and failure in output and not (tmp_path / "results.csv").exists()
        first = rows_of(folder)
        if code == KILLED:
            # As of a step after the checkpoint
            with (folder / "evaluations.csv").open("a") as file:
                file.write("Pendulum-v1,mrq,0,35,-1,0,200,7,v,m\n")
        assert compare(*TINY, "--algos", "mrq", code=code)[0] == 0
        rows = rows_of(tmp_path, "results.csv")
        assert [row["step"] for row in rows] == ["0", "20", "40"] and rows_of(folder)[:2] == first[:2]
        assert "Resuming from the checkpoint" in (folder / "log.txt").read_text()
        assert not (folder / CHECKPOINTS).exists()

    def test_errors_of_the_runner_stop_no_other_run(self, compare, monkeypatch):
        begun = []

        def execute(run):
            begun.append(run.algorithm)
            if run.algorithm == "sac":
                raise OSError("No space left on device")
            return "failed too"

        monkeypatch.setattr(runner, "execute", execute)
        status, output = compare(*TINY, "--algos", "sac,td3")
        assert status == 1 and begun == ["sac", "td3"]
        assert "FAILED sac on Pendulum-v1, seed 0: OSError('No space left on device')" in output

    def test_number_of_runs_side_by_side(self, monkeypatch):
        runs = [Run("Pendulum-v1", "mrq", 0, 1, 1, 1, "x", 3, device, "") for device in ("cpu", "auto")]
        monkeypatch.setattr(runner, "cpu_count", lambda: 16)
        monkeypatch.setattr(th.cuda, "is_available", lambda: True)
        monkeypatch.setattr(runner, "execute", lambda run: None)
        seen = []
        pool = runner.ThreadPoolExecutor
        monkeypatch.setattr(runner, "ThreadPoolExecutor", lambda jobs: seen.append(jobs) or pool(jobs))
        for part, jobs in ((runs[:1], None), (runs[1:], None), (runs, 7), ([], None)):
            with runner.local_runs(part, jobs):
                pass
        assert seen == [5, runner.RUNS_PER_GPU, 7, 16]


def wait_for(condition, seconds=60):
    """Until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


class TestEnds:
    """However a comparison ends, its runs end too, with a checkpoint."""

    @pytest.fixture
    def running(self, tmp_path, request):
        """The process of a comparison, once the run of MR.Q has begun, and the folder of that run. A parameter is added."""
        more = getattr(request, "param", ["--algos", "mrq", "--jobs", "1"])
        if "--ray" in more:
            pytest.importorskip("ray")
        arguments = ["--env", "Pendulum-v1", "--steps", "1000000", "--seeds", "1", "--eval-episodes", "1", *more]
        arguments = [sys.executable, "-m", "sb3_mrq.zoo", "compare", *arguments, "--out", str(tmp_path)]
        # Without SIGINT, as in the background of a script
        if fork_server.ENABLED and "--ray" not in more:
            process = fork_server.Popen(arguments, stdout=subprocess.PIPE, ignore_ctrl_c=True, kind="zoo")
        else:
            ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
            process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, preexec_fn=ignore)
        folder = tmp_path / "runs" / "mrq" / "Pendulum-v1" / "seed0"
        # Ray takes its time
        wait_for(lambda: (folder / "evaluations.csv").exists() and rows_of(folder), seconds=300)
        yield process, folder
        process.kill()
        process.wait()

    @pytest.mark.parametrize(
        "running", [["--algos", "mrq", "--jobs", "1"], ["--algos", "mrq", "--ray"]], indirect=True, ids=["local", "ray"]
    )
    def test_terminated(self, running):
        process, folder = running
        process.terminate()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 130 and "Stopped: 0 of 1 runs are finished." in output
        assert "Training was stopped by SIGTERM, after a checkpoint" in (folder / "log.txt").read_text()
        assert list((folder / CHECKPOINTS).glob("mrq_*/model.zip"))

    def test_killed(self, running):
        process, folder = running
        commands = subprocess.run(["ps", "-eo", "pid,args", "-ww"], capture_output=True, text=True).stdout.splitlines()
        (pid,) = [line.split()[0] for line in commands if TRAIN[1] in line and str(folder.parents[3]) in line]
        os.kill(int(pid), signal.SIGSTOP)
        process.kill()
        process.wait()
        # The run lives on, for now: nothing else may touch its folder
        settings = json.loads((folder / "settings.json").read_text())
        run = Run(**settings, out=str(folder.parents[3]), threads=1, device="auto", gym_packages="")
        runner.stopping.clear()
        assert "seed0 is in use by another process, which must end first" in runner.execute(run)
        os.kill(int(pid), signal.SIGCONT)
        wait_for(lambda: not Path("/proc", pid).exists())
        assert list((folder / CHECKPOINTS).glob("mrq_*/model.zip"))


class TestEvaluations:
    @pytest.fixture
    def run(self, tmp_path):
        run = Run("task", "mrq", 0, 45, 10, 2, str(tmp_path), 1, "cpu", "")
        run.folder.mkdir(parents=True)
        return run

    @staticmethod
    def learn(model, run, steps, *before, env=SpaceEnv, after=(), **kwargs):
        """Learn with evaluations, and return them."""
        evaluation = EvaluationCallback(make_vec_env(env), run)
        model.learn(steps, callback=[*before, evaluation, *after], **kwargs)
        return [(row["step"], row["return"]) for row in rows_of(run.folder)]

    @pytest.mark.filterwarnings("ignore:Nothing will be learned")
    def test_resumed_runs_are_evaluated_on_the_same_episodes(self, run, tmp_path):
        """Returns depend on the seeds of the environments alone. The last evaluation is at the end, whatever the interval."""

        class StopAt(BaseCallback):
            def _on_step(self):
                return self.num_timesteps < 23

        def model():
            return tiny_model(SpaceEnv(), learning_starts=1000, seed=0)

        straight = self.learn(model(), run, 45)
        assert [step for step, _ in straight] == ["0", "10", "20", "30", "40", "45"]
        assert len({value for _, value in straight}) == 6
        first = model()
        assert self.learn(first, run, 45, after=[StopAt()]) == straight[:3]
        # Seconds go on, also those since the last evaluation
        assert 0 < first.training_seconds < 60
        first.training_seconds = 600.0
        first.save(tmp_path / "model")
        resumed = MRQ.load(tmp_path / "model", env=SpaceEnv())
        assert self.learn(resumed, run, 45 - 23, reset_num_timesteps=False) == straight
        seconds = [float(row["seconds"]) for row in rows_of(run.folder)]
        assert seconds[2] < 60 and 600 <= seconds[3] < 660

    @pytest.mark.filterwarnings("ignore:Nothing will be learned")
    @pytest.mark.parametrize("step", [20, 45])
    def test_signal_in_an_evaluation(self, step, run, tmp_path):
        """The evaluation is finished, and the resumed run does not repeat it."""

        class Ends(SpaceEnv):
            rows = 1

            def step(self, action):
                if len((run.folder / "evaluations.csv").read_text().splitlines()) == self.rows:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().step(action)

        def model():
            return tiny_model(SpaceEnv(), learning_starts=1000, seed=0)

        Ends.rows = 0
        straight = self.learn(model(), run, 45, env=Ends)
        n_before = [row[0] for row in straight].index(str(step))
        Ends.rows = 1 + n_before
        checkpoints = ResumableCheckpointCallback(1000, tmp_path / "checkpoints")
        assert self.learn(model(), run, 45, checkpoints, env=Ends) == straight[: n_before + 1]
        Ends.rows = 0
        resumed = MRQ.resume(tmp_path / "checkpoints", SpaceEnv(), device="cpu")
        assert resumed.num_timesteps == step
        assert self.learn(resumed, run, resumed.remaining_timesteps, env=Ends, reset_num_timesteps=False) == straight

    @pytest.mark.parametrize("actions, deterministic", [(spaces.Discrete(3), False), (spaces.Box(-1, 1, (2,)), True)])
    def test_discrete_policies_are_evaluated_by_samples(self, run, monkeypatch, actions, deterministic):
        """Section 6: argmax(GumbelSoftmax(u)). Training draws the same numbers all the same."""
        model = tiny_model(SpaceEnv(VECTOR, actions))
        seen = note_deterministic(model, monkeypatch)
        callback = EvaluationCallback(DummyVecEnv([lambda: Monitor(SpaceEnv(VECTOR, actions))]), run)
        callback.init_callback(model)
        before = th.get_rng_state()
        callback.on_training_start({}, {})
        assert set(seen) == {deterministic}
        assert th.equal(th.get_rng_state(), before)

    def test_random_actions(self, run):
        """A part of them, the same for the same seed."""
        env = DummyVecEnv([lambda: Monitor(SpaceEnv(VECTOR, spaces.Discrete(5)))])
        callback = EvaluationCallback(env, run, 0.25)
        model = SimpleNamespace(action_space=env.action_space, predict=lambda *_, **__: (np.zeros(1, dtype=int), None))
        callback.model = model

        def actions(seed):
            env.action_space.seed(seed)
            callback.random = np.random.default_rng(seed)
            return [int(callback.predict(None)[0][0]) for _ in range(1000)]

        # Of the random actions a fifth are the one that was given
        assert np.mean(np.array(actions(0)) != 0) == pytest.approx(0.25 * 4 / 5, abs=0.03)
        assert actions(1) == actions(1) != actions(2)

    def test_statistics_are_found_among_other_wrappers(self, run):
        """The monitor of Atari games is over VecNormalize."""
        train = VecNormalize(DummyVecEnv([SpaceEnv]))
        test = VecMonitor(VecNormalize(DummyVecEnv([SpaceEnv]), training=False, norm_reward=False))
        model = tiny_model(train)
        train.reset()
        for _ in range(10):
            train.step(np.array([train.action_space.sample()]))
        callback = EvaluationCallback(test, run)
        callback.init_callback(model)
        callback.on_training_start({}, {})
        np.testing.assert_array_equal(test.venv.obs_rms.mean, train.obs_rms.mean)
        assert test.venv.obs_rms.count == train.obs_rms.count > 10 and test.venv.obs_rms is not train.obs_rms


def test_versions(tmp_path, monkeypatch):
    assert f"sb3-mrq {version('sb3-mrq')}" in versions.versions() and f"mujoco {version('mujoco')}" in versions.versions()

    def git(*arguments):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / "package").mkdir()
    assert versions.commit(tmp_path) is None
    git("init")
    assert versions.commit(tmp_path) is None
    (tmp_path / "file").write_text("")
    git("add", ".")
    git("commit", "-m", "First")
    git("tag", "v1")
    short = git("rev-parse", "--short", "HEAD").strip()
    assert versions.commit(tmp_path) == short
    # Installed inside of another repository
    assert versions.commit(tmp_path / "package") is None
    (tmp_path / "file").write_text("changed")
    assert versions.commit(tmp_path) == f"{short}-dirty"
    with monkeypatch.context() as changed:
        changed.setenv("PATH", "")
        assert versions.commit(tmp_path) is None
    monkeypatch.setattr(versions, "commit", lambda _: "1234567-dirty")
    assert f"sb3-mrq {version('sb3-mrq')} (1234567-dirty), stable-baselines3" in versions.versions()
