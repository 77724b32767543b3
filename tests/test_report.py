"""
Reports of studies: their numbers agree with the runs, and all seeds are accounted for.
"""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image
from scipy import stats

from benchmarks import report
from benchmarks.scales import ATARI, scale_of
from sb3_mrq.envs import BENCHMARK_TASKS


def results(returns, steps=(0, 10, 20)):
    """Rows of a study: returns grow from 0 at the first step to those given, by task and algorithm, at the last."""
    return pd.DataFrame(
        [
            {
                "task": task,
                "algorithm": algorithm,
                "seed": seed,
                "step": step,
                "return": final * step / steps[-1],
                "versions": "v",
                "machine": "m",
            }
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
# Both tasks with a scale
SCORED = {
    (TASKS[0], "mrq"): [600, 800],
    (TASKS[0], "td3"): [100, 300],
    ("CartPole-v1", "mrq"): [250, 500],
    ("CartPole-v1", "td3"): [50, 100],
}


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "dmc.csv").write_text("env,timesteps,seed0,seed1\nwalker-walk,0,1,2\nwalker-walk,20,500,700\n")
    (folder / "gym.csv").write_text("env,timesteps,seed0,seed1\nHalfCheetah-v4,0,1,2\nHalfCheetah-v4,20,4500,5500\n")
    (folder / "atari.csv").write_text("env,timesteps,seed0,seed1\nPong-v5,0,-21,-20\n")
    (folder / "drq_dmc.csv").write_text("env,timesteps,seed0,seed1,seed2\nwalker-walk,20,800,900,1000\n")
    return folder


class TestReport:
    def test_published(self, published):
        table = report.read_published(published)
        assert set(table["task"]) == {"dmc/walker-walk-v0", "HalfCheetah-v4", "HalfCheetah-v5", "ALE/Pong-v5"}
        assert set(table[table["algorithm"] == "drq"]["task"]) == {"dmc/walker-walk-v0"}
        with pytest.raises(SystemExit, match=r"has no published returns: it must contain at least one of gym\.csv"):
            report.read_published(published.parent)

    def test_scores(self):
        of = report.scores(results(SCORED))
        assert of.tasks == [TASKS[0], "CartPole-v1"] and not of.left_out
        np.testing.assert_allclose(of.matrices["mrq"], [[0.6, 0.5], [0.8, 1.0]])
        np.testing.assert_allclose(of.matrices["td3"], [[0.1, 0.1], [0.3, 0.2]])
        # Seeds that only some tasks have do not count, and it is said which do
        of = report.scores(results({**SCORED, (TASKS[0], "td3"): [100, 300, 500]}))
        assert of.matrices["td3"].shape == (2, 2) and of.seeds["td3"] == {TASKS[0]: [0, 1], "CartPole-v1": [0, 1]}
        few = {**SCORED, (TASKS[0], "td3"): [100], ("CartPole-v1", "mrq"): [1, 2, 3]}
        of = report.scores(results(few))
        assert {name: matrix.shape for name, matrix in of.matrices.items()} == {"mrq": (2, 2), "td3": (1, 2)}

    def test_scores_do_not_depend_on_what_else_was_run(self):
        """Returns that count as 0 and 1 are fixed, and tasks without such are left out by name."""
        alone = report.scores(results({key: values for key, values in SCORED.items() if key[1] == "td3"}))
        np.testing.assert_allclose(alone.matrices["td3"], report.scores(results(SCORED)).matrices["td3"])
        pendulum = {("Pendulum-v1", "mrq"): [-150], ("Pendulum-v1", "td3"): [-140]}
        of = report.scores(results({**RETURNS, **pendulum, ("Ant-v5", "mrq"): [1]}))
        assert of.tasks == list(TASKS)
        assert of.left_out == {"Pendulum-v1": "no fixed scale", "Ant-v5": "no results of td3"}

    def test_every_task_of_the_paper_has_a_scale(self):
        scales = [scale_of(task) for task in BENCHMARK_TASKS]
        assert all(low < high for low, high in scales)
        assert len(ATARI) == 57 and len(set(ATARI.values())) == 57
        assert scale_of("Acrobot-v1") == (-500, -100) and scale_of("LunarLander-v3") == (-200, 200)
        # As the published runs are of version 4
        assert scale_of("HalfCheetah-v4") == scale_of("HalfCheetah-v5") == (-289.4, 10574)
        assert [scale_of(task) for task in ("ALE/Tetris-v5", "HalfCheetah-v2", "Pong-v5", "mine/HalfCheetah-v5")] == [None] * 4

    def test_runs_of_different_lengths(self):
        """Compared where all have been, and those that ended early are named."""
        table = pd.concat([results({(TASKS[0], "mrq"): [800]}, (0, 10, 20, 40)), results({(TASKS[0], "td3"): [100]})])
        of = report.scores(table)
        np.testing.assert_allclose([of.matrices["mrq"], of.matrices["td3"]], [[[0.4]], [[0.1]]])
        # One seed is enough
        short = results({(TASKS[0], "mrq"): [300]}, (0, 10)).assign(seed=7)
        table = pd.concat([table, short], ignore_index=True)
        assert report.last_common_step(table, TASKS[0]) == 10
        assert report.final_table(table, None)["mrq"][0] == "250 ± 71 (2)"
        assert report.remarks(table) == [
            f"td3 on {TASKS[0]}, seed 0: ended at 20 steps of 40.",
            f"mrq on {TASKS[0]}, seed 7: ended at 10 steps of 40.",
        ]
        # and evaluations at other steps are nothing to compare
        apart = pd.concat([table, results({(TASKS[0], "sac"): [300]}, (5, 15))])
        assert report.last_common_step(apart, TASKS[0]) is None
        assert report.final_table(apart, None)["steps"][0] == "none in common"

    def test_different_precisions(self):
        """The automatic choice is another one on other machines, and then runs of one name differ in more than the seed."""
        table = results({(TASKS[0], "mrq"): [600, 800, 700], (TASKS[0], "td3"): [200, 300]})
        machines = np.where(table["seed"] == 1, "1 threads of A, cpu, bfloat16", "1 threads of B, cpu, float32")
        table["machine"] = np.where(table["algorithm"] == "mrq", machines, "1 threads of A, cpu")
        assert report.remarks(table) == [f"mrq on {TASKS[0]}: seeds in different precisions, bfloat16 (1), float32 (0, 2)."]
        assert report.remarks(table[table["seed"] != 1]) == []

    def test_returns_that_are_not_numbers(self):
        """No older return stands in for one, nor for one of a step without evaluation."""
        table = results({(TASKS[0], "mrq"): [600, 800, 700]})
        table.loc[(table["seed"] == 1) & (table["step"] == 20), "return"] = np.nan
        assert report.at_step(table, 20).to_dict() == {0: 600, 2: 700} and report.at_step(table, 15).empty
        assert report.remarks(table) == [f"mrq on {TASKS[0]}, seed 1: left out, as its return at 20 steps is not a number."]
        assert report.scores(table).seeds == {"mrq": {TASKS[0]: [0, 2]}}

    def test_aggregates(self):
        numbers = report.aggregates(report.scores(results(SCORED)).matrices, reps=200)
        # The middle two of 0.5, 0.6, 0.8 and 1.0, and of 0.1, 0.1, 0.2 and 0.3
        assert numbers["mrq"]["iqm"]["value"] == pytest.approx(0.7)
        assert numbers["td3"]["iqm"]["value"] == pytest.approx(0.15)
        assert numbers["mrq"]["optimality_gap"]["value"] == pytest.approx((0.4 + 0.5 + 0.2) / 4)
        improved = numbers["td3"]["probability_that_it_is_improved_on"]
        # Two seeds are too few for an interval
        assert improved == {"by": "mrq", "value": 1.0, "interval": None} and numbers["mrq"]["iqm"]["interval"] is None
        matrices = report.scores(results({key: [*of, 400] for key, of in SCORED.items()})).matrices
        three = report.aggregates(matrices, reps=200)
        low, high = three["mrq"]["iqm"]["interval"]
        assert 0.4 <= low < three["mrq"]["iqm"]["value"] < high <= 1.0
        low, high = three["td3"]["probability_that_it_is_improved_on"]["interval"]
        assert 0 <= low < high <= 1
        # The same each time, and whoever else draws from numpy's generator does not notice
        before = np.random.get_state()[1].copy()
        assert report.aggregates(matrices, reps=200) == three
        np.testing.assert_array_equal(np.random.get_state()[1], before)

    def test_seeds_in_the_aggregates_are_named(self, tmp_path):
        one = {(TASKS[0], "td3"): [100], (TASKS[0], "mrq-bfloat16"): [600, 800, 700], (TASKS[0], "mrq-1-step"): [7, 8]}
        report.make_report(results({**one, ("Ant-v5", "td3"): [1]}), None, tmp_path, "Few seeds", reps=50)
        numbers = json.loads((tmp_path / "numbers.json").read_text())
        assert numbers["seeds"] == {
            "td3": {TASKS[0]: [0]},
            "mrq-bfloat16": {TASKS[0]: [0, 1, 2]},
            "mrq-1-step": {TASKS[0]: [0, 1]},
        }
        assert numbers["left_out"] == {"Ant-v5": "no results of mrq-bfloat16, mrq-1-step"}
        of = numbers["algorithms"]
        assert of["td3"]["iqm"] == {"value": pytest.approx(0.1), "interval": None}
        assert of["mrq-1-step"]["iqm"]["interval"] is None and of["mrq-bfloat16"]["iqm"]["interval"][0] >= 0.6
        improvement = {"by": "mrq-bfloat16", "value": 1.0, "interval": None}
        assert of["td3"]["probability_that_it_is_improved_on"] == improvement
        assert "probability_that_it_is_improved_on" not in of["mrq-bfloat16"]
        text = (tmp_path / "index.html").read_text()
        assert "With at least 3 seeds there are 95 % intervals" in text
        assert "Intervals from fewer than 5 seeds are too narrow." in text
        assert "td3 1, mrq-bfloat16 3, mrq-1-step 2." in text and f"mrq-bfloat16: {TASKS[0]} 0, 1, 2</li>" in text
        assert "Ant-v5: no results of mrq-bfloat16, mrq-1-step</li>" in text

    def test_comparison(self, published):
        table = report.compare_with_published(results(RETURNS), report.read_published(published)).set_index("task")
        walker, cheetah = table.loc[TASKS[0]], table.loc[TASKS[1]]
        assert (walker["step"], walker["seeds"], walker["mean"], walker["published mean"]) == (20, 2, 700, 600)
        # A variance of 20000 over two seeds each: 100 is 0.71 standard errors
        assert walker["standard errors"] == pytest.approx(100 / np.sqrt(20000 / 2 + 20000 / 2))
        assert walker["mean at or above the lowest"] and walker["all at or above the lowest"]
        assert not cheetah["mean at or above the lowest"] and not cheetah["all at or above the lowest"]
        # One seed of two below the lowest published one
        low = results({(TASKS[0], "mrq"): [100, 1300]})
        (row,) = report.compare_with_published(low, report.read_published(published)).to_dict("records")
        assert row["mean at or above the lowest"] and not row["all at or above the lowest"]
        assert cheetah["standard errors"] < 0

    def test_distance(self):
        """Welch's, with the spread of both; of a single seed it is not known."""
        theirs = np.array([90.0, 100, 100, 110])
        for ours in ([120.0, 120.5, 121], [60.0, 180, 90, 150, 120]):
            statistic = stats.ttest_ind(ours, theirs, equal_var=False).statistic
            assert report.distance(np.array(ours), theirs) == (pytest.approx(statistic), "Welch")
        deviation = theirs.std(ddof=1)
        assert report.distance(np.array([120.0]), theirs) == (
            pytest.approx(20 / (deviation * np.sqrt(1 + 1 / 4))),
            "published spread",
        )
        assert np.isnan(report.distance(np.array([1.0]), np.array([2.0, 2.0]))[0])

    def test_what_is_there_twice(self, tmp_path):
        paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
        results(RETURNS).to_csv(paths[0], index=False)
        results({(TASKS[1], "td3"): [5]}).to_csv(paths[1], index=False)
        with pytest.raises(SystemExit, match=rf"td3 on {TASKS[1]}, seed 0, at step 0 occurs twice: in .*a.csv and in .*b.csv"):
            report.main([*map(str, paths), "--out", str(tmp_path / "report")])

    def test_overview(self, published):
        """Numbers of seeds in every panel, what the bands are, and both versions of a task in one panel."""
        table = results({**RETURNS, ("HalfCheetah-v4", "sac"): [1, 2, 3]})
        panels = list(dict.fromkeys(report.panel_of(task, table["task"].unique()) for task in table["task"]))
        assert panels == list(TASKS)
        colors = {"mrq": "red", "td3": "green", "sac": "blue"}
        figure = report.draw_overview(panels, table, report.read_published(published), colors)
        legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes]
        assert legends == [
            ["mrq, published (2 seeds)", "mrq (2 seeds)", "td3 (2 seeds)"],
            ["mrq, published (2 seeds)", "mrq (2 seeds)", "td3 (2 seeds)", "sac on HalfCheetah-v4 (3 seeds)"],
        ]
        caption = "Thick lines: mean over seeds. Thin lines: each of fewer than 5. Bands: lowest to highest."
        shown = figure.get_supxlabel()
        assert " ".join(shown.split()) == f"{caption} Published returns are of v4 where v5 is shown."
        # Within two panels
        assert 80 < max(map(len, shown.splitlines())) < 120
        assert report.draw_overview(panels, table, None, colors).get_supxlabel() == caption
        # One band, of the published returns. Their mean, the means of two algorithms, and each seed
        assert len(figure.axes[0].collections) == 1 and len(figure.axes[0].lines) == 1 + 2 + 2 * 2
        many = results({(TASKS[0], "mrq"): [1, 2, 3, 4, 5]})
        (axis,) = report.draw_overview([TASKS[0]], many, None, colors).axes
        assert len(axis.collections) == 1 and len(axis.lines) == 1
        assert report.panel_of("HalfCheetah-v4", ["HalfCheetah-v4"]) == "HalfCheetah-v4"

    def test_report(self, published, tmp_path):
        path = tmp_path / "results.csv"
        table = results({**RETURNS, ("Ant-v5", "mrq"): [1]})
        table.assign(versions="python 3 & more", machine="x86_64").to_csv(path, index=False)
        out = tmp_path / "report"
        report.main([str(path), "--published", str(published), "--out", str(out), "--reps", "50", "--title", "A <study>"])
        text = (out / "index.html").read_text()
        assert "A &lt;study&gt;" in text and "python 3 &amp; more" in text
        shown = re.findall(r'src="([^"]+)"', text)
        tasks = {"dmc_walker-walk-v0.png", "HalfCheetah-v5.png", "Ant-v5.png"}
        assert set(shown) == {"aggregates.png", "improvement.png", *tasks}
        assert "Ant-v5: no results of td3</li>" in text and "-200 to 200 on LunarLander-v3. Left out:" in text
        for name in (*shown, "overview.png"):
            pixels = image.imread(out / name)
            assert pixels.shape[0] > 100 and pixels.std() > 0.01
            assert (out / name).with_suffix(".svg").read_text().lstrip().startswith("<?xml")
        lines = (out / "table.md").read_text().splitlines()
        assert lines[0] == "| task | steps | mrq | td3 | mrq, published |"
        assert lines[2] == "| dmc/walker-walk-v0 | 20 | 700 ± 141 (2) | 200 ± 141 (2) | 600 [500, 700] |"
        assert json.loads((out / "numbers.json").read_text())["algorithms"]["mrq"]["n_seeds"] == 2
        assert not re.search(r"https?://", text)

    def test_two_published_algorithms(self, published):
        """Each is compared with its own published returns, and variants with those of the algorithm."""
        returns = report.read_published(published)
        table = results({(TASKS[0], "mrq"): [600, 800], (TASKS[0], "drq-float32"): [700, 850], (TASKS[0], "td3"): [100, 300]})
        compared = report.compare_with_published(table, returns).set_index("algorithm")
        assert compared["published mean"].to_dict() == {"mrq": 600, "drq-float32": 900}
        assert compared["all at or above the lowest"].to_dict() == {"mrq": True, "drq-float32": False}
        final = report.final_table(table, returns)
        assert list(final) == ["task", "steps", "mrq", "drq-float32", "td3", "mrq, published", "drq, published"]
        assert final["drq, published"][0] == "900 [800, 1000]"
        (axis,) = report.draw_overview([TASKS[0]], table, returns, dict.fromkeys(set(table["algorithm"]), "red")).axes
        assert len(axis.collections) == 2
        # Returns of algorithms that were not run are left out
        assert list(report.final_table(table[table["algorithm"] != "mrq"], returns)).count("mrq, published") == 0

    def test_nothing_to_aggregate(self, tmp_path):
        """Comments in tables are skipped, and algorithms without a common task have no aggregates."""
        paths = [tmp_path / name for name in ("a.csv", "b.csv")]
        for path, (task, algorithm) in zip(paths, ((TASKS[0], "mrq-float32"), (TASKS[1], "mrq-bfloat16")), strict=True):
            path.write_text("# command: python -m x # y\n" + results({(task, algorithm): [30]}).to_csv(index=False))
        out = tmp_path / "report"
        report.main([*map(str, paths), "--out", str(out)])
        assert "There are no aggregates, as no task has a fixed scale" in (out / "index.html").read_text()

    def test_one_run(self, tmp_path):
        """Of one algorithm and one seed, with nothing to compare."""
        path, out = tmp_path / "results.csv", tmp_path / "report"
        results({(TASKS[0], "mrq"): [600]}).to_csv(path, index=False)
        report.main([str(path), "--out", str(out), "--reps", "20"])
        assert "| dmc/walker-walk-v0 | 20 | 600 (1) |" in (out / "table.md").read_text()
        assert not Path(out / "improvement.png").exists()
