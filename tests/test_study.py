"""
Studies and their reports: every run is made once, what fails is told, and the numbers in the report are those of the runs.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch as th
from envs import VECTOR, SpaceEnv, tiny_model
from gymnasium import spaces
from matplotlib import image
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from test_buffer import NumberEnv

from benchmarks import report, study
from benchmarks.evaluation import EvaluationCallback, RandomActions
from sb3_mrq import MRQ

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

    def test_zoo_hyperparameters(self):
        assert study.zoo_section("mrq", "dmc/walker-walk-v0") is None
        assert study.zoo_section("td3", "Pendulum-v1") is None
        cheetah = study.zoo_section("td3", "HalfCheetah-v5")
        assert cheetah["learning_starts"] == 10_000 and cheetah == study.zoo_section("td3", "dmc/walker-walk-v0")
        assert study.zoo_section("td3", "Humanoid-v5") != cheetah
        assert study.zoo_section("td3", "OfOnesOwn") is None

    def test_from_beginning_to_end(self, tmp_path, capsys):
        arguments = ["--tasks", "Pendulum-v1", "--algos", "mrq-1-step,sac,dqn", *TINY, "--out", str(tmp_path)]
        with pytest.raises(SystemExit) as error:
            study.main(arguments)
        assert error.value.code == 1
        output = capsys.readouterr().out
        assert "3 runs, 0 of them finished before." in output and f"2 of 3 runs are in {tmp_path / 'results.csv'}" in output
        assert re.search(r"FAILED dqn on Pendulum-v1, seed 0: exit status 1: .*action spaces.* \(see .*log.txt\)", output)

        rows = list(csv.DictReader((tmp_path / "results.csv").open()))
        assert tuple(rows[0]) == study.RESULT_COLUMNS
        assert [(row["algorithm"], row["step"]) for row in rows] == [
            (algorithm, step) for algorithm in ("mrq-1-step", "sac") for step in ("0", "20", "40")
        ]
        assert all(-2000 < float(row["return"]) < 0 and row["length"] == "200.0" for row in rows)
        assert all("torch" in row["versions"] and "threads" in row["machine"] for row in rows)
        folder = tmp_path / "runs" / "mrq-1-step" / "Pendulum-v1" / "seed0"
        assert "n_steps" in next(folder.glob("zoo/**/config.yml")).read_text()

        # Finished ones stay as they are, one that was broken off begins anew
        record = tmp_path / "runs" / "sac" / "Pendulum-v1" / "seed0" / "run.json"
        before = record.stat().st_mtime_ns, (folder / "run.json").stat().st_mtime_ns
        record.write_text(json.dumps({"versions": "", "machine": ""}))
        study.main([*arguments[:3], "mrq-1-step,sac", *arguments[4:]])
        assert "2 runs, 1 of them finished before." in capsys.readouterr().out
        assert record.stat().st_mtime_ns > before[0] and (folder / "run.json").stat().st_mtime_ns == before[1]
        assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == 6

    def test_goes_on_where_it_was_broken_off(self, tmp_path, monkeypatch):
        """A run of MRQ that is killed goes on from its last checkpoint, and its evaluations do too."""
        run = study.parse(["--tasks", "Pendulum-v1", *TINY, "--out", str(tmp_path)])[1][0]
        monkeypatch.setattr(study.Run, "command", breaking_off(study.Run.command))
        assert "exit status 9" in study.execute(run)
        assert run.can_go_on() and not run.finished()
        evaluations = run.folder / "evaluations.csv"
        # As of a step after the checkpoint
        evaluations.write_text(evaluations.read_text() + "Pendulum-v1,35,0,-1,0,200,7\n")
        first = list(csv.DictReader(evaluations.open()))
        assert study.execute(run) is None and run.finished()
        rows = list(csv.DictReader(evaluations.open()))
        assert [row["timesteps"] for row in rows] == ["0", "20", "40"] and rows[:2] == first[:2]
        assert "Resuming from the checkpoint" in (run.folder / "log.txt").read_text()
        assert not run.can_go_on()

    def test_what_fails_on_this_side_stops_no_other(self, tmp_path, monkeypatch):
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

    def test_one_table_for_all_commands(self, tmp_path):
        """A study given other tasks keeps the rows of before; runs to be made anew with other settings have none."""
        for task in ("Pendulum-v1", "Acrobot-v1"):
            run = study.parse(["--tasks", task, *TINY, "--out", str(tmp_path)])[1][0]
            run.folder.mkdir(parents=True)
            (run.folder / "run.json").write_text(json.dumps({"settings": run.settings, "versions": "v", "machine": "m"}))
            (run.folder / "evaluations.csv").write_text(f"{','.join(study.COLUMNS)}\n{task},20,0,-7,0,200,1\n")

        def tasks(*arguments):
            runs = study.parse([*arguments, "--out", str(tmp_path)])[1]
            n_runs = study.gather(runs, tmp_path)
            rows = list(csv.DictReader((tmp_path / "results.csv").open()))
            assert len(rows) == n_runs and all(row["return"] == "-7" and row["step"] == "20" for row in rows)
            return [row["task"] for row in rows]

        assert tasks("--tasks", "CartPole-v1", *TINY) == ["Acrobot-v1", "Pendulum-v1"]
        assert tasks("--tasks", "Pendulum-v1", *TINY) == ["Acrobot-v1", "Pendulum-v1"]
        assert tasks("--tasks", "Pendulum-v1", *TINY, "--hyperparams", "n_steps:1") == ["Acrobot-v1"]

    def test_on_ray(self, tmp_path, capsys):
        pytest.importorskip("ray")
        arguments = ["--tasks", "Pendulum-v1", "--algos", "sac,dqn", *TINY, "--out", str(tmp_path)]
        with pytest.raises(SystemExit):
            study.main([*arguments, "--backend", "ray"])
        output = capsys.readouterr().out
        assert "1 of 2 runs are in" in output and "FAILED dqn on Pendulum-v1, seed 0: exit status 1" in output


def breaking_off(command):
    """Commands of runs with a checkpoint every ten steps, the first of which is killed by the 31st step."""
    code = (
        "import os, sys, benchmarks.study_run as run; from sb3_mrq import MRQ\n"
        "run.CHECKPOINT_FREQ, store = 10, MRQ._store_transition\n"
        "def dying(self, *args):\n"
        "    if self.num_timesteps == 31 and '--trained-agent' not in sys.argv: os._exit(9)\n"
        "    store(self, *args)\n"
        "MRQ._store_transition = dying; run.main()"
    )

    def changed(run):
        python, _, _, *arguments = command(run)
        return [python, "-c", code, *arguments]

    return changed


def test_random_actions():
    class Noted(NumberEnv):
        action_space = spaces.Discrete(5)
        taken = []  # noqa: RUF012

        def step(self, action):
            self.taken.append(int(action))
            return super().step(action)

    env = RandomActions(DummyVecEnv([Noted, Noted]), 0.25, seed=0)
    env.reset()
    for _ in range(1000):
        env.step(np.array([0, 0]))
    # Of the random actions a fifth are the one that was given
    assert np.mean(np.array(Noted.taken) != 0) == pytest.approx(0.25 * 4 / 5, abs=0.03)


def test_discrete_policies_are_evaluated_by_samples(tmp_path, monkeypatch):
    """Section 6: argmax(GumbelSoftmax(u)). Training draws the same numbers all the same."""
    model = tiny_model(SpaceEnv(VECTOR, spaces.Discrete(3)))
    seen = []
    predict = model.predict

    def noted(*args, deterministic, **kwargs):
        seen.append(deterministic)
        return predict(*args, deterministic=deterministic, **kwargs)

    monkeypatch.setattr(model, "predict", noted)
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
    assert [row["timesteps"] for row in rows] == ["0", "100"]
    assert int(rows[0]["seconds"]) < 60 and 600 <= int(rows[1]["seconds"]) < 660


def results(returns, steps=(0, 10, 20)):
    """Rows of a study: returns grow from 0 at the first step to those given, by task and algorithm, at the last."""
    return pd.DataFrame(
        [
            {"task": task, "algorithm": algorithm, "seed": seed, "step": step, "return": final * step / steps[-1]}
            for (task, algorithm), finals in returns.items()
            for seed, final in enumerate(finals)
            for step in steps
        ]
    )


TASKS = ("dmc/walker-walk-v0", "HalfCheetah-v5")
RETURNS = {
    (TASKS[0], "mrq"): [600, 800],
    (TASKS[0], "td3"): [100, 300],
    (TASKS[1], "mrq"): [3000, 5000],
    (TASKS[1], "td3"): [1000, 2000],
}


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "dmc.csv").write_text("env,timesteps,seed0,seed1\nwalker-walk,0,1,2\nwalker-walk,20,500,700\n")
    (folder / "gym.csv").write_text("env,timesteps,seed0,seed1\nHalfCheetah-v4,0,1,2\nHalfCheetah-v4,20,4500,5500\n")
    (folder / "atari.csv").write_text("env,timesteps,seed0,seed1\nPong-v5,0,-21,-20\n")
    return folder


class TestReport:
    def test_published(self, published):
        table = report.read_published(published)
        assert set(table["task"]) == {"dmc/walker-walk-v0", "HalfCheetah-v4", "HalfCheetah-v5", "ALE/Pong-v5"}
        with pytest.raises(SystemExit, match=r"There is none of gym\.csv"):
            report.read_published(published.parent)

    def test_scores(self, published):
        matrices, tasks = report.scores(results(RETURNS), None)
        assert tasks == list(TASKS)
        np.testing.assert_allclose(matrices["mrq"], [[0.6, 0.75], [0.8, 1.25]])
        np.testing.assert_allclose(matrices["td3"], [[0.1, 0.25], [0.3, 0.5]])
        # The published ones are the best on HalfCheetah
        matrices, _ = report.scores(results(RETURNS), report.read_published(published))
        np.testing.assert_allclose(matrices["mrq"], [[0.6, 0.6], [0.8, 1.0]])
        # Tasks that only some were run on do not count, and neither do seeds that only some have
        more = results({**RETURNS, ("Ant-v5", "mrq"): [1], (TASKS[0], "td3"): [100, 300, 500]})
        matrices, tasks = report.scores(more, None)
        assert tasks == list(TASKS) and len(matrices["td3"]) == 2

    def test_runs_of_different_lengths(self):
        """Compared where all have been."""
        table = pd.concat([results({(TASKS[0], "mrq"): [800]}, (0, 10, 20, 40)), results({(TASKS[0], "td3"): [100]})])
        matrices, _ = report.scores(table, None)
        np.testing.assert_allclose([matrices["mrq"], matrices["td3"]], [[[0.4]], [[0.1]]])

    def test_aggregates(self):
        numbers = report.aggregates(report.scores(results(RETURNS), None)[0], reps=200)
        # The middle two of 0.6, 0.75, 0.8 and 1.25, and of 0.1, 0.25, 0.3 and 0.5
        assert numbers["mrq"]["iqm"]["value"] == pytest.approx(0.775)
        assert numbers["td3"]["iqm"]["value"] == pytest.approx(0.275)
        assert numbers["mrq"]["optimality_gap"]["value"] == pytest.approx((0.4 + 0.25 + 0.2) / 4)
        improved = numbers["td3"]["probability_that_it_is_improved_on"]
        assert improved == {"by": "mrq", "value": 1.0, "interval": [1.0, 1.0]}
        low, high = numbers["mrq"]["iqm"]["interval"]
        assert 0.6 <= low < 0.775 < high <= 1.25

    def test_no_interval_of_one_seed(self, tmp_path):
        one = results({(TASKS[0], "td3"): [100], (TASKS[0], "mrq-bfloat16"): [600, 800], (TASKS[0], "mrq-1-step"): [7]})
        numbers = report.aggregates(report.scores(one, None)[0], 50)
        assert numbers["td3"]["iqm"] == {"value": pytest.approx(0.1), "interval": None}
        low, high = numbers["mrq-bfloat16"]["iqm"]["interval"]
        assert low == pytest.approx(0.6) and high == pytest.approx(0.8)
        improvement = {"by": "mrq-bfloat16", "value": 1.0, "interval": None}
        assert numbers["td3"]["probability_that_it_is_improved_on"] == improvement
        assert "probability_that_it_is_improved_on" not in numbers["mrq-bfloat16"]
        report.make_report(one, None, tmp_path, "One seed", reps=50)
        assert (
            "which a single seed does not have. Seeds: td3 1, mrq-bfloat16 2, mrq-1-step 1."
            in (tmp_path / "index.html").read_text()
        )

    def test_comparison(self, published):
        table = report.compare_with_published(results(RETURNS), report.read_published(published)).set_index("task")
        walker, cheetah = table.loc[TASKS[0]], table.loc[TASKS[1]]
        assert (walker["step"], walker["seeds"], walker["mean"], walker["published mean"]) == (20, 2, 700, 600)
        # A spread of 141.4 over two seeds each: 100 is 0.71 standard errors
        assert walker["standard errors"] == pytest.approx(100 / (np.sqrt(20000) * np.sqrt(0.5 + 0.5)))
        assert walker["at or above the lowest"] and not cheetah["at or above the lowest"]
        assert cheetah["standard errors"] < 0

    def test_report(self, published, tmp_path):
        path = tmp_path / "results.csv"
        results(RETURNS).assign(versions="python 3 & more", machine="x86_64").to_csv(path, index=False)
        out = tmp_path / "report"
        report.main([str(path), "--published", str(published), "--out", str(out), "--reps", "50", "--title", "A <study>"])
        text = (out / "index.html").read_text()
        assert "A &lt;study&gt;" in text and "python 3 &amp; more" in text
        shown = re.findall(r'src="([^"]+)"', text)
        assert set(shown) == {"aggregates.png", "improvement.png", "dmc_walker-walk-v0.png", "HalfCheetah-v5.png"}
        for name in (*shown, "overview.png"):
            pixels = image.imread(out / name)
            assert pixels.shape[0] > 100 and pixels.std() > 0.01
            assert (out / name).with_suffix(".svg").read_text().lstrip().startswith("<?xml")
        lines = (out / "table.md").read_text().splitlines()
        assert lines[0] == "| task | steps | mrq | td3 | published |"
        assert lines[2] == "| dmc/walker-walk-v0 | 20 | 700 ± 141 (2) | 200 ± 141 (2) | 600 [500, 700] |"
        assert json.loads((out / "numbers.json").read_text())["algorithms"]["mrq"]["n_seeds"] == 2
        assert not re.search(r"https?://", text)

    def test_files_of_single_runs(self, tmp_path):
        heading = "# command: python -m benchmarks.learning walker-walk --seed 3{}\n# versions: v\n# machine: m\n"
        columns = "env,timesteps,seed,return_mean,return_std,length_mean,seconds\n"
        for name, arguments, row in (
            ("a.csv", "", "walker-walk,5000,3,30.5,1,500,10\n"),
            ("b.csv", " --precision bfloat16", "HalfCheetah-v5,5000,3,-3,1,1000,10\n"),
            ("c.csv", " --matmul-precision medium --threads 1", "CartPole-v1,5000,3,9,1,9,10\n"),
        ):
            (tmp_path / name).write_text(heading.format(arguments) + columns + row)
        rows = [report.read_results(tmp_path / name).iloc[0] for name in ("a.csv", "b.csv", "c.csv")]
        assert [(row["task"], row["algorithm"], row["seed"], row["step"], row["return"]) for row in rows] == [
            ("dmc/walker-walk-v0", "mrq", 3, 5000, 30.5),
            ("HalfCheetah-v5", "mrq-bfloat16", 3, 5000, -3),
            ("CartPole-v1", "mrq-medium", 3, 5000, 9),
        ]
        out = tmp_path / "report"
        report.main([str(tmp_path / name) for name in ("a.csv", "b.csv")] + ["--out", str(out)])
        assert "There is no task that all algorithms were run on" in (out / "index.html").read_text()

    def test_one_run(self, tmp_path):
        """Of one algorithm and one seed, with nothing to compare."""
        path, out = tmp_path / "results.csv", tmp_path / "report"
        results({(TASKS[0], "mrq"): [600]}).to_csv(path, index=False)
        report.main([str(path), "--out", str(out), "--reps", "20"])
        assert "| dmc/walker-walk-v0 | 20 | 600 (1) |" in (out / "table.md").read_text()
        assert not Path(out / "improvement.png").exists()
