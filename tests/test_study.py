"""
Studies: every run is made once, none is lost, failures are reported, and evaluations are right.
"""

import csv
import json
import os
import re
import shutil
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
import pytest
import torch as th
import yaml
from envs import VECTOR, SpaceEnv, note_deterministic, tiny_model
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from test_buffer import NumberEnv

from benchmarks import evaluation, study, study_run
from benchmarks.evaluation import EvaluationCallback, RandomActions
from sb3_mrq import MRQ
from sb3_mrq.accelerate.precision import automatic_precision
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.envs import AtariWrapper

ROOT = Path(__file__).resolve().parents[1]

TINY = ["--steps", "40", "--eval-freq", "20", "--eval-episodes", "1", "--seeds", "1"]


class TestStudy:
    def test_suites_are_the_papers(self):
        runs = [run for suite in study.SUITES for run in study.parse(["--suite", suite, "--out", "x"])[1]]
        assert len(runs) == 118 * 10 == len({run.folder for run in runs})
        lengths = {run.task: (run.steps, run.eval_freq) for run in runs}
        assert lengths["HalfCheetah-v5"] == (1_000_000, 5_000)
        assert lengths["dmc/walker-walk-v0"] == lengths["dmc-visual/walker-walk-v0"] == (500_000, 5_000)
        assert lengths["ALE/Pong-v5"] == (2_500_000, 100_000)

    def test_wrong_names(self, capsys):
        for arguments, message in (
            (["--tasks", "Pendulum-v1", "--algos", "mqr", "--steps", "1"], "no algorithm mqr. Did you mean mrq"),
            (["--tasks", "Pendulum-v1"], "--steps is needed for Pendulum-v1"),
        ):
            with pytest.raises(SystemExit):
                study.parse([*arguments, "--out", "x"])
            assert message in capsys.readouterr().err

    def test_variants(self):
        """Precisions by name, as the default depends on the machine."""
        for precision in ("float32", "bfloat16"):
            _, (run,) = study.parse(["--tasks", "Pendulum-v1", "--algos", f"mrq-{precision}", *TINY, "--out", "x"])
            command = run.command()
            assert command[command.index("--algo") + 1] == "mrq" and command[-2:] == [
                "--hyperparams",
                f"precision:'{precision}'",
            ]

    def test_zoo_hyperparameters(self):
        assert study.zoo_section("mrq", "dmc/walker-walk-v0") is None
        assert study.zoo_section("td3", "Pendulum-v1") is None
        cheetah = study.zoo_section("td3", "HalfCheetah-v5")
        assert cheetah["learning_starts"] == 10_000 and cheetah == study.zoo_section("td3", "dmc/walker-walk-v0")
        assert study.zoo_section("td3", "Humanoid-v5") != cheetah
        assert study.zoo_section("td3", "OfOnesOwn") is None

    @pytest.mark.parametrize("algorithm", ["dqn", "qrdqn", "ppo", "ppo_lstm"])
    def test_atari_games_have_one_preprocessing(self, algorithm, tmp_path):
        theirs = yaml.safe_load((Path(study.rl_zoo3.__file__).parent / "hyperparams" / f"{algorithm}.yml").read_text())[
            "atari"
        ]
        section = study.zoo_section(algorithm, "ALE/Pong-v5")
        assert section.pop("env_wrapper") == "sb3_mrq.envs.AtariWrapper"
        assert set(theirs) - set(section) == {"env_wrapper", "frame_stack"}
        assert section == {name: theirs[name] for name in section}
        assert study.zoo_section("sac", "ALE/Pong-v5") is None
        # The configuration of this package has the same for MR.Q
        ours = yaml.safe_load((ROOT / "hyperparams" / "mrq.yml").read_text())["atari"]
        assert ours["env_wrapper"] == "sb3_mrq.envs.AtariWrapper" and "frame_stack" not in ours
        run = study.parse(["--tasks", "ALE/Pong-v5", "--algos", algorithm, *TINY, "--out", str(tmp_path)])[1][0]
        study.prepare(run)
        assert "--conf-file" in run.command()
        written = yaml.safe_load((run.folder / "hyperparams.yml").read_text())
        assert written == {"ALE/Pong-v5": study.zoo_section(algorithm, "ALE/Pong-v5")}

    def test_some_of_the_seeds(self, tmp_path):
        arguments = ["--tasks", "Pendulum-v1", "--algos", "mrq,sac", *TINY[:-2], "--seeds", "2", "--out", str(tmp_path)]
        runs = study.parse([*arguments, "--first-seed", "3"])[1]
        assert [(run.algorithm, run.seed) for run in runs] == [("mrq", 3), ("sac", 3), ("mrq", 4), ("sac", 4)]
        assert [run.seed for run in study.parse(arguments)[1]] == [0, 0, 1, 1]

    def test_each_run_once(self):
        """Two runs cannot share a folder."""
        _, runs = study.parse(["--tasks", "Pendulum-v1", "Pendulum-v1", "--algos", "mrq, sac,mrq", *TINY, "--out", "x"])
        assert [run.algorithm for run in runs] == ["mrq", "sac"]

    def test_runs_at_once(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
        assert [study.jobs_here(threads, "cpu") for threads in (1, 3, 32)] == [16, 5, 1]
        assert study.jobs_here(1, "auto") == (study.RUNS_PER_GPU if th.cuda.is_available() else 16)
        monkeypatch.setattr(th.cuda, "is_available", lambda: True)
        assert [study.jobs_here(*of) for of in ((1, "auto"), (16, "cuda"), (1, "cpu"))] == [study.RUNS_PER_GPU, 1, 16]

    def test_runs_find_the_benchmarks_from_any_folder(self, tmp_path, monkeypatch):
        """Workers of Ray may have been started anywhere."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "of one's own"))
        run = study.parse(["--tasks", "Pendulum-v1", "--algos", "sac", *TINY, "--out", str(tmp_path)])[1][0]
        started = []

        def start(command, env, **_):
            started.append(env["PYTHONPATH"])
            imported = fork_server.run([*command[:3], "--help"], kind="zoo", env=without_parent(env))
            assert "No module named" not in imported.stderr and "not enough values" in imported.stderr

        monkeypatch.setattr(study, "start", start)
        study.execute(run)
        assert started == [os.pathsep.join([str(ROOT), str(tmp_path / "of one's own")])]

    def test_images_have_fewer_checkpoints(self):
        images = spaces.Box(0, 255, (84, 84, 3), np.uint8)
        for space in (images, spaces.Dict({"image": images, "vector": VECTOR})):
            assert study_run.checkpoint_freq(space, 2_500_000) == study_run.checkpoint_freq(space, 500_000) == 50_000
            # Such a run takes hours on a CPU
            assert study_run.checkpoint_freq(space, 20_000) == 5_000
        assert study_run.checkpoint_freq(VECTOR, 500_000) == 5_000

    def test_folder_by_default(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(study, "execute", lambda run: None)
        study.main("--suite dmc --algos mrq,td3,sac --seeds 1 --steps 30000 --jobs 1".split())
        assert "Results go to runs/study-dmc/results.csv." in capsys.readouterr().out
        assert (tmp_path / "runs" / "study-dmc" / "results.csv").exists()
        assert study.parse(["--tasks", "Pendulum-v1", "--steps", "9"])[0].out == Path("runs/study")

    @pytest.mark.usefixtures("forked")
    def test_from_beginning_to_end(self, tmp_path, capsys):
        arguments = ["--tasks", "Pendulum-v1", "--algos", "mrq-1-step,sac,dqn", *TINY, "--out", str(tmp_path)]
        with pytest.raises(SystemExit) as error:
            study.main(arguments)
        assert error.value.code == 1
        output = capsys.readouterr().out
        table = tmp_path / "results.csv"
        assert (
            f"3 runs, 0 of them already finished. Results go to {table}." in output and f"2 of 3 runs are in {table}" in output
        )
        assert re.search(r"FAILED dqn on Pendulum-v1, seed 0: exit status 1: .*action spaces.* \(see .*log.txt\)", output)

        rows = list(csv.DictReader((tmp_path / "results.csv").open()))
        assert tuple(rows[0]) == study.RESULT_COLUMNS
        assert [(row["algorithm"], row["step"]) for row in rows] == [
            (algorithm, step) for algorithm in ("mrq-1-step", "sac") for step in ("0", "20", "40")
        ]
        assert all(-2000 < float(row["return"]) < 0 and row["length"] == "200.0" for row in rows)
        assert all(row["versions"] == evaluation.versions() and "threads" in row["machine"] for row in rows)
        precision = automatic_precision(th.device("cpu"))
        assert [row["machine"].endswith(f", {precision}") for row in rows] == [True] * 3 + [False] * 3
        folder = tmp_path / "runs" / "mrq-1-step" / "Pendulum-v1" / "seed0"
        assert "n_steps" in next(folder.glob("zoo/**/config.yml")).read_text()

        # Finished runs are left alone, an interrupted one starts again
        record = tmp_path / "runs" / "sac" / "Pendulum-v1" / "seed0" / "run.json"
        before = record.stat().st_mtime_ns, (folder / "run.json").stat().st_mtime_ns
        record.write_text(json.dumps({"versions": "", "machine": ""}))
        study.main([*arguments[:3], "mrq-1-step,sac", *arguments[4:]])
        assert "2 runs, 1 of them already finished." in capsys.readouterr().out
        assert record.stat().st_mtime_ns > before[0] and (folder / "run.json").stat().st_mtime_ns == before[1]
        assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == 6

    @pytest.mark.usefixtures("forked")
    def test_resumes_an_interrupted_run(self, tmp_path, monkeypatch):
        """A run of MRQ that is killed goes on from its last checkpoint, and its evaluations do too."""
        run = study.parse(["--tasks", "Pendulum-v1", *TINY, "--out", str(tmp_path)])[1][0]
        monkeypatch.setattr(study.Run, "command", running_code(study.Run.command, KILLED))
        assert "exit status 9" in study.execute(run)
        assert run.can_resume() and not run.finished()
        evaluations = run.folder / "evaluations.csv"
        # As of a step after the checkpoint
        evaluations.write_text(evaluations.read_text() + "Pendulum-v1,0,35,-1,0,200,7\n")
        first = list(csv.DictReader(evaluations.open()))
        # The first part was made with other versions
        versions = run.folder / study.VERSIONS
        now = versions.read_text()
        assert now == f"{evaluation.versions()}\n"
        versions.write_text("python 2\n")
        assert study.execute(run) is None and run.finished()
        assert json.loads((run.folder / "run.json").read_text())["versions"] == f"python 2 / {now.strip()}"
        rows = list(csv.DictReader(evaluations.open()))
        assert [row["step"] for row in rows] == ["0", "20", "40"] and rows[:2] == first[:2]
        assert "Resuming from the checkpoint" in (run.folder / "log.txt").read_text()
        assert not run.can_resume()

    @pytest.mark.usefixtures("forked")
    def test_is_not_finished_without_its_last_training_steps(self, tmp_path, monkeypatch):
        run = study.parse(["--tasks", "Pendulum-v1", *TINY, "--out", str(tmp_path)])[1][0]
        monkeypatch.setattr(study.Run, "command", running_code(study.Run.command, TERMINATED_AT_THE_END))
        assert study.execute(run) is not None
        assert run.can_resume() and not run.finished()
        assert study.execute(run) is None and run.finished()
        rows = list(csv.DictReader((run.folder / "evaluations.csv").open()))
        assert [row["step"] for row in rows] == ["0", "20", "40"]

    def test_errors_of_the_study_stop_no_other_run(self, tmp_path, monkeypatch):
        runs = study.parse(["--tasks", "Pendulum-v1", "--algos", "sac,td3", *TINY, "--out", str(tmp_path)])[1]

        def execute(run):
            if run.algorithm == "sac":
                raise OSError("No space left on device")

        monkeypatch.setattr(study, "execute", execute)
        failures = {run.algorithm: failure for run, failure in study.run_locally(runs, 1)}
        assert failures == {"sac": "OSError('No space left on device')", "td3": None}

    def test_other_settings_are_other_runs(self, tmp_path):
        runs = [
            study.parse(["--tasks", "Pendulum-v1", "--steps", steps, "--out", str(tmp_path)])[1][0] for steps in ("5", "6")
        ]
        runs[0].folder.mkdir(parents=True)
        (runs[0].folder / "run.json").write_text(json.dumps({"settings": runs[0].settings}))
        assert runs[0].finished() and not runs[1].finished()
        # A study that recorded its device
        elsewhere = {**runs[0].settings, "device": "cuda:3"}
        (runs[0].folder / "run.json").write_text(json.dumps({"settings": elsewhere, "versions": "", "machine": ""}))
        assert runs[0].finished() and len(study.finished_runs(tmp_path)) == 1

    def test_nothing_is_deleted_for_other_settings(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(study, "start", lambda *_, **__: None)
        evaluations = f"{','.join(evaluation.COLUMNS)}\nPendulum-v1,0,{{}},-7,0,200,1\n"
        for n, steps in enumerate((40, 60, 80)):
            arguments = ["--tasks", "Pendulum-v1", *TINY, "--out", str(tmp_path), "--steps", str(steps)]
            run = study.parse(arguments)[1][0]
            with pytest.raises(SystemExit):
                study.main(arguments)
            output = capsys.readouterr().out
            assert ("has results of other settings and will be renamed to seed0.old-<n>" in output) == (n > 0)
            assert not (run.folder / "evaluations.csv").exists() and run.recorded_settings()["steps"] == steps
            # As if it had been run
            record = {"settings": run.settings, "versions": "v", "machine": "m"}
            (run.folder / "run.json").write_text(json.dumps(record))
            (run.folder / "evaluations.csv").write_text(evaluations.format(steps))
        for n, steps in ((1, 40), (2, 60)):
            old = run.folder.with_name(f"seed0.old-{n}")
            assert f"Pendulum-v1,0,{steps}," in (old / "evaluations.csv").read_text()
            assert json.loads((old / "run.json").read_text())["settings"]["steps"] == steps
        assert [run.steps for run in study.finished_runs(tmp_path)] == [80]

    @pytest.mark.parametrize("content", ["", '{"settings": {"ta', "[]"])
    def test_records_that_were_cut_short(self, tmp_path, content):
        run = study.parse(["--tasks", "Pendulum-v1", *TINY, "--out", str(tmp_path)])[1][0]
        (run.folder / study.CHECKPOINTS / "mrq_1_30_steps").mkdir(parents=True)
        for name in ("run.json", "settings.json"):
            (run.folder / name).write_text(content)
        assert not run.finished() and not run.can_resume() and study.gather([run], tmp_path) == 0
        study.prepare(run)
        assert run.recorded_settings() == run.settings

    def test_errors_on_this_side(self, tmp_path, monkeypatch, capsys):
        """A table that cannot be written for now ends nothing; anything else ends all runs."""
        runs = study.parse(["--tasks", "Pendulum-v1", "--algos", "sac,td3,mrq", *TINY, "--out", str(tmp_path)])[1]
        begun = []

        def execute(run):
            begun.append(run)
            time.sleep(0.2)

        def fail(error):
            def failing(*_):
                raise error

            return failing

        monkeypatch.setattr(study, "execute", execute)
        monkeypatch.setattr(study, "gather", fail(OSError("No space left on device")))
        assert study.collect(study.run_locally(runs, 1), runs, 3, tmp_path) == {} and begun == runs
        assert "results.csv could not be written: OSError('No space" in capsys.readouterr().out
        begun.clear()
        monkeypatch.setattr(study, "gather", fail(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            study.collect(study.run_locally(runs, 1), runs, 3, tmp_path)
        assert len(begun) < 3 and study.stopping.is_set()

    def test_one_table_for_all_commands(self, tmp_path):
        """A study given other tasks keeps the rows of before; runs to be made anew with other settings have none."""
        for task in ("Pendulum-v1", "Acrobot-v1"):
            run = study.parse(["--tasks", task, *TINY, "--out", str(tmp_path)])[1][0]
            run.folder.mkdir(parents=True)
            (run.folder / "run.json").write_text(json.dumps({"settings": run.settings, "versions": "v", "machine": "m"}))
            (run.folder / "evaluations.csv").write_text(f"{','.join(evaluation.COLUMNS)}\n{task},0,20,-7,0,200,1\n")

        def tasks(*arguments):
            runs = study.parse([*arguments, "--out", str(tmp_path)])[1]
            n_runs = study.gather(runs, tmp_path)
            rows = list(csv.DictReader((tmp_path / "results.csv").open()))
            assert len(rows) == n_runs and all(row["return"] == "-7" and row["step"] == "20" for row in rows)
            return [row["task"] for row in rows]

        assert tasks("--tasks", "CartPole-v1", *TINY) == ["Acrobot-v1", "Pendulum-v1"]
        assert tasks("--tasks", "Pendulum-v1", *TINY) == ["Acrobot-v1", "Pendulum-v1"]
        assert tasks("--tasks", "Pendulum-v1", *TINY, "--hyperparams", "n_steps:1") == ["Acrobot-v1"]

    def test_on_ray(self, tmp_path):
        pytest.importorskip("ray")
        arguments = ["--tasks", "Pendulum-v1", "--algos", "sac,dqn", *TINY, "--out", str(tmp_path), "--jobs", "1"]
        command = [sys.executable, "-m", "benchmarks.study", *arguments, "--backend", "ray"]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert process.returncode == 1, process.stderr
        assert "1 of 2 runs are in" in process.stdout
        assert "FAILED dqn on Pendulum-v1, seed 0: exit status 1" in process.stdout

    def test_share_of_a_gpu(self):
        shares = [
            study.gpu_share(*of) for of in (("cuda", True), ("cuda:1", True), ("auto", True), ("auto", False), ("cpu", True))
        ]
        assert shares == [0.5, 0.5, 0.5, 0, 0]
        assert study.gpu_share("cuda", False) == 0.5  # a cluster that grows on demand


def without_parent(env):
    """The environment for a fork, whose parent is the fork server and not the study."""
    return {name: value for name, value in env.items() if name != study.STUDY_PROCESS}


@pytest.fixture
def forked(monkeypatch):
    """Studies of this process start their runs as forks, see fork_server.py."""

    def start(command, *, env, **kwargs):
        return fork_server.Popen(command, env=without_parent(env), kind="zoo", **kwargs)

    if fork_server.ENABLED:
        monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT))


def wait_for(condition, seconds=60):
    """Until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


class TestEnds:
    """However a study ends, its runs end too, with a checkpoint."""

    @pytest.fixture
    def running(self, tmp_path, request):
        """The process of a study, once its only run has begun, and that run. A parameter is the backend."""
        arguments = ["--tasks", "Pendulum-v1", "--steps", "1000000", "--seeds", "1", "--eval-episodes", "1"]
        arguments += ["--hyperparams", "learning_starts:1000000", "--out", str(tmp_path)]
        backend = getattr(request, "param", "local")
        if backend == "ray":
            pytest.importorskip("ray")
        arguments += ["--backend", backend, "--jobs", "1"]
        run = study.parse(arguments)[1][0]
        command = [sys.executable, "-m", "benchmarks.study", *arguments]
        # Without SIGINT, as in the background of a script
        if fork_server.ENABLED and backend == "local":
            process = fork_server.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, ignore_ctrl_c=True, kind="zoo")
        else:
            ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=ignore)
        # Ray takes its time
        wait_for((run.folder / "evaluations.csv").exists, seconds=60 if backend == "local" else 300)
        yield process, run
        process.kill()
        process.wait()

    @staticmethod
    def is_free(run):
        try:
            study.lock(run.folder).close()
        except study.InUseError:
            return False
        return True

    @pytest.mark.parametrize("running", ["local", "ray"], indirect=True)
    def test_terminated(self, running):
        process, run = running
        process.terminate()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 130 and "Stopped. 0 runs are in" in output
        assert self.is_free(run) and run.can_resume()
        assert "Training was stopped by SIGTERM, after a checkpoint" in (run.folder / "log.txt").read_text()

    def test_killed(self, running):
        process, run = running
        run_process = re.search(r"process (\d+)", run.folder.with_name("seed0.lock").read_text())[1]
        os.kill(int(run_process), signal.SIGSTOP)
        process.kill()
        process.wait()
        # The run lives on, for now: nothing else may touch its folder
        assert re.search(rf"seed0 is in use by process {run_process} on .*, which must end first", study.execute(run))
        assert len(list(csv.DictReader((run.folder / "evaluations.csv").open()))) >= 1
        os.kill(int(run_process), signal.SIGCONT)
        wait_for(lambda: self.is_free(run))
        assert run.can_resume()

    def test_signals(self):
        """Of a terminal that is closed, too, unless they are ignored, as by nohup."""
        numbers = (signal.SIGTERM, signal.SIGHUP)
        # The tests themselves may have been started by nohup
        before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
        try:
            for number in numbers:
                with study.signals_as_ctrl_c(), pytest.raises(KeyboardInterrupt, match=number.name):
                    os.kill(os.getpid(), number)
                    time.sleep(1)
            assert all(signal.getsignal(number) == signal.SIG_DFL for number in numbers)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            with study.signals_as_ctrl_c():
                os.kill(os.getpid(), signal.SIGHUP)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# A checkpoint every ten steps; the first process of the run is killed by the 31st step
KILLED = """
import os, sys, benchmarks.study_run as run; from sb3_mrq import MRQ
run.CHECKPOINT_FREQ, store = 10, MRQ._store_transition
def dying(self, *args):
    if self.num_timesteps == 31 and '--trained-agent' not in sys.argv: os._exit(9)
    store(self, *args)
MRQ._store_transition = dying; run.main()
"""
# SIGTERM comes to the first process of the run in its last evaluation
TERMINATED_AT_THE_END = """
import os, signal, sys, benchmarks.study_run as run; from sb3_mrq import MRQ
predict = MRQ.predict
def dying(self, *args, **kwargs):
    if self.num_timesteps == 40 and '--trained-agent' not in sys.argv: os.kill(os.getpid(), signal.SIGTERM)
    return predict(self, *args, **kwargs)
MRQ.predict = dying; run.main()
"""


def running_code(command, code):
    """Commands of runs that run this code instead of their module."""

    def changed(run):
        python, _, _, *arguments = command(run)
        return [python, "-c", code, *arguments]

    return changed


def noted_env():
    """A class of environments that share a note of the actions they were given."""

    class Noted(NumberEnv):
        action_space = spaces.Discrete(5)
        taken = []  # noqa: RUF012

        def step(self, action):
            self.taken.append(int(action))
            return super().step(action)

    return Noted


def test_random_actions():
    Noted = noted_env()
    env = RandomActions(DummyVecEnv([Noted, Noted]), 0.25, seed=0)
    env.reset()
    for _ in range(1000):
        env.step(np.array([0, 0]))
    # Of the random actions a fifth are the one that was given
    assert np.mean(np.array(Noted.taken) != 0) == pytest.approx(0.25 * 4 / 5, abs=0.03)


def test_random_actions_begin_anew_with_a_seed():
    Noted = noted_env()
    env = RandomActions(DummyVecEnv([Noted]), 0.5, seed=0)
    for seed in (1, 1, 2):
        env.seed(seed)
        env.reset()
        for _ in range(50):
            env.step(np.array([0]))
    assert Noted.taken[:50] == Noted.taken[50:100] != Noted.taken[100:]


def test_lengths_on_atari_are_steps_of_the_agent():
    pytest.importorskip("ale_py")
    kwargs = dict(max_num_frames_per_episode=40)
    env = evaluation.papers_atari(make_vec_env("ALE/Pong-v5", env_kwargs=kwargs, wrapper_class=AtariWrapper), seed=0)
    env.reset()
    lengths = [info["episode"]["l"] for _ in range(20) for info in env.step(np.array([0]))[3] if "episode" in info]
    assert lengths == [10, 10]


def test_statistics_are_found_among_other_wrappers():
    """Frames stacked over VecNormalize, and random actions over both."""
    train = VecFrameStack(VecNormalize(DummyVecEnv([SpaceEnv])), 2)
    test = RandomActions(VecFrameStack(VecNormalize(DummyVecEnv([SpaceEnv]), training=False, norm_reward=False), 2), 0.1, 0)
    train.reset()
    for _ in range(10):
        train.step(np.array([train.action_space.sample()]))
    evaluation.copy_normalization(train, test)
    ours, theirs = train.venv, test.venv.venv
    np.testing.assert_array_equal(theirs.obs_rms.mean, ours.obs_rms.mean)
    assert theirs.obs_rms.count == ours.obs_rms.count > 10 and theirs.ret_rms.var == ours.ret_rms.var != 1
    assert theirs.obs_rms is not ours.obs_rms
    evaluation.copy_normalization(DummyVecEnv([SpaceEnv]), test)
    with pytest.raises(ValueError, match="normalized for training, but not for evaluation"):
        evaluation.copy_normalization(train, DummyVecEnv([SpaceEnv]))


def test_versions(tmp_path, monkeypatch):
    assert f"sb3-mrq {version('sb3-mrq')}" in evaluation.versions() and f"mujoco {version('mujoco')}" in evaluation.versions()

    def git(*arguments):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert evaluation.commit(package) is None
    git("init")
    # Installed inside of another repository
    assert evaluation.commit(package) is None
    git("add", ".")
    git("commit", "-m", "First")
    git("tag", "v1")
    short = git("rev-parse", "--short", "HEAD").strip()
    assert evaluation.commit(package) == short
    (package / "__init__.py").write_text("changed = True")
    assert evaluation.commit(package) == f"{short}-dirty"
    with monkeypatch.context() as changed:
        changed.setenv("PATH", "")
        assert evaluation.commit(package) is None
    monkeypatch.setattr(evaluation, "commit", lambda _: "1234567-dirty")
    assert f"sb3-mrq {version('sb3-mrq')} (1234567-dirty), stable-baselines3" in evaluation.versions()


@pytest.mark.filterwarnings("ignore:Nothing will be learned")
def test_resumed_runs_are_evaluated_on_the_same_episodes(tmp_path):
    """Returns depend on the seeds of the environments alone. The last evaluation is at the end, whatever the interval."""

    class StopAt(BaseCallback):
        def _on_step(self):
            return self.num_timesteps < 23

    def learn(model, path, steps, *callbacks, **kwargs):
        env = make_vec_env(SpaceEnv, seed=1000)
        model.learn(steps, callback=[EvaluationCallback(env, path, 10, 2, "task"), *callbacks], **kwargs)
        return [(row["step"], row["return"]) for row in csv.DictReader(path.open())]

    straight = learn(tiny_model(SpaceEnv(), learning_starts=1000, seed=0), tmp_path / "straight.csv", 45)
    assert [step for step, _ in straight] == ["0", "10", "20", "30", "40", "45"]
    assert len({value for _, value in straight}) == 6
    model = tiny_model(SpaceEnv(), learning_starts=1000, seed=0)
    assert learn(model, tmp_path / "broken.csv", 45, StopAt()) == straight[:3]
    model.save(tmp_path / "model")
    model = MRQ.load(tmp_path / "model", env=SpaceEnv())
    assert learn(model, tmp_path / "broken.csv", 45 - 23, reset_num_timesteps=False) == straight
    # The first one as the environments come
    env = make_vec_env(SpaceEnv, seed=1000)
    first = evaluation.evaluate_policy(model, env, 2)[0]
    assert straight[0][1] == f"{first:.2f}"


@pytest.mark.filterwarnings("ignore:Nothing will be learned")
@pytest.mark.parametrize("step", [20, 45])
def test_signal_in_an_evaluation(step, tmp_path):
    """The evaluation is finished, and the resumed run does not repeat it."""
    path = tmp_path / "evaluations.csv"

    class Ends(SpaceEnv):
        rows = 0

        def step(self, action):
            if path.exists() and len(path.read_text().splitlines()) == self.rows:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(action)

    def learn(model, steps, rows=0, **kwargs):
        Ends.rows = rows
        callbacks = [
            ResumableCheckpointCallback(1000, tmp_path / "checkpoints"),
            EvaluationCallback(make_vec_env(Ends, seed=1000), path, 10, 2, "task"),
        ]
        model.learn(steps, callback=callbacks, **kwargs)
        return [(row["step"], row["return"]) for row in csv.DictReader(path.open())]

    def model():
        return tiny_model(SpaceEnv(), learning_starts=1000, seed=0)

    straight = learn(model(), 45)
    path.unlink()
    shutil.rmtree(tmp_path / "checkpoints")
    n_before = [row[0] for row in straight].index(str(step))
    assert learn(model(), 45, 1 + n_before) == straight[: n_before + 1]
    resumed = MRQ.resume(tmp_path / "checkpoints", SpaceEnv(), device="cpu")
    assert resumed.num_timesteps == step
    assert learn(resumed, resumed.remaining_timesteps, reset_num_timesteps=False) == straight


def test_discrete_policies_are_evaluated_by_samples(tmp_path, monkeypatch):
    """Section 6: argmax(GumbelSoftmax(u)). Training draws the same numbers all the same."""
    model = tiny_model(SpaceEnv(VECTOR, spaces.Discrete(3)))
    seen = note_deterministic(model, monkeypatch)
    env = DummyVecEnv([lambda: Monitor(SpaceEnv(VECTOR, spaces.Discrete(3)))])
    callback = EvaluationCallback(env, tmp_path / "evaluations.csv", 10, 1, "task")
    callback.init_callback(model)
    before = th.get_rng_state()
    callback.on_training_start({}, {})
    assert seen and not any(seen)
    assert th.equal(th.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:Nothing will be learned")
def test_seconds_of_training_go_on(tmp_path):
    """Those since the last evaluation too: they are saved with the model."""
    path = tmp_path / "evaluations.csv"

    def learn(model, steps, **kwargs):
        env = DummyVecEnv([lambda: Monitor(SpaceEnv())])
        model.learn(steps, callback=EvaluationCallback(env, path, 100, 1, "task"), **kwargs)

    model = tiny_model(SpaceEnv(), learning_starts=1000)
    learn(model, 90)
    assert 0 < model.training_seconds < 60
    model.training_seconds = 600.0
    model.save(tmp_path / "model")
    learn(MRQ.load(tmp_path / "model", env=SpaceEnv()), 20, reset_num_timesteps=False)
    rows = list(csv.DictReader(path.open()))
    assert [row["step"] for row in rows] == ["0", "90", "100", "110"]
    assert int(rows[1]["seconds"]) < 60 and 600 <= int(rows[2]["seconds"]) < 660
