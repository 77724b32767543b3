"""
Reports of comparisons: their numbers agree with the runs, and all seeds are accounted for.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image
from scipy import stats

from sb3_mrq.compare import figures, report, scores
from sb3_mrq.compare.evaluation import COLUMNS
from sb3_mrq.compare.published import compare_with_published, read_published
from sb3_mrq.compare.scales import ATARI, scale_of
from sb3_mrq.envs import BENCHMARK_TASKS
from sb3_mrq.zoo.configuration import ConfigurationError

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


@pytest.fixture(autouse=True)
def few_bootstrap_samples(monkeypatch):
    monkeypatch.setattr(scores, "REPS", 200)


@pytest.fixture
def results(tmp_path):
    """Rows of runs: returns grow from 0 at the first step to those given, by task and algorithm, at the last."""

    def make(returns, steps=(0, 10, 20)):
        rows = [
            (task, algorithm, seed, step, final * step / steps[-1], 0.0, 10.0, seed + 2.0 * step, "v", "m, cpu")
            for (task, algorithm), finals in returns.items()
            for seed, final in enumerate(finals)
            for step in steps
        ]
        path = tmp_path / "results.csv"
        path.write_text("# command: x # y\n" + pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))
        return report.read_results([path])

    return make


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "dmc.csv").write_text(
        "env,timesteps,seed0,seed1\nwalker-walk,0,1,2\nwalker-walk,20,500,700\nwalker-walk,30,1,1\n"
    )
    (folder / "gym.csv").write_text("env,timesteps,seed0,seed1\nHalfCheetah-v4,0,1,2\nHalfCheetah-v4,20,4500,5500\n")
    (folder / "atari.csv").write_text("env,timesteps,seed0,seed1\nPong-v5,0,-21,-20\n")
    (folder / "drq_dmc.csv").write_text("env,timesteps,seed0,seed1,seed2\nwalker-walk,20,800,900,1000\n")
    return folder


@pytest.fixture
def script(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sb3-mrq report", *map(str, arguments)])
        report.report_script()

    return call


class TestScores:
    def test_normalised(self, results):
        matrices, tasks = scores.normalise(scores.at_last_common_step(results(SCORED)))
        # In the order of the tasks' names
        np.testing.assert_allclose(matrices["MR.Q"], [[0.5, 0.6], [1.0, 0.8]])
        np.testing.assert_allclose(matrices["TD3"], [[0.1, 0.1], [0.2, 0.3]])
        assert list(matrices) == ["MR.Q", "TD3"] and tasks == ["CartPole-v1", TASKS[0]]
        # Every task has as many seeds as the task with the fewest
        matrices, _ = scores.normalise(scores.at_last_common_step(results({**SCORED, (TASKS[0], "td3"): [100]})))
        assert {name: matrix.shape for name, matrix in matrices.items()} == {"MR.Q": (2, 2), "TD3": (1, 2)}

    def test_left_out(self, results):
        """Tasks without a scale, and tasks without results of all algorithms."""
        pendulum = {("Pendulum-v1", "mrq"): [-150], ("Pendulum-v1", "td3"): [-140]}
        table = scores.at_last_common_step(results({**SCORED, **pendulum, ("Ant-v5", "mrq"): [1]}))
        matrices, tasks = scores.normalise(table)
        assert matrices["MR.Q"].shape == (2, 2) and tasks == ["CartPole-v1", TASKS[0]]
        assert scores.normalise(table[table["task"] == "Pendulum-v1"]) == ({}, [])

    def test_every_task_of_the_paper_has_a_scale(self):
        scales = [scale_of(task) for task in BENCHMARK_TASKS]
        assert all(low < high for low, high in scales)
        assert len(ATARI) == 57 and len(set(ATARI.values())) == 57 and ATARI["Pong"] == (-20.7, 14.6)
        assert scale_of("Acrobot-v1") == (-500, -100) and scale_of("LunarLander-v3") == (-200, 200)
        # As the published runs are of version 4
        assert scale_of("HalfCheetah-v4") == scale_of("HalfCheetah-v5") == (-289.4, 10574)
        assert [scale_of(task) for task in ("ALE/Tetris-v5", "HalfCheetah-v2", "Pong-v5", "mine/HalfCheetah-v5")] == [None] * 4

    def test_runs_of_different_lengths(self, results):
        """Compared where all have been, and the table says so."""
        long, short = results({(TASKS[0], "mrq"): [800]}, (0, 10, 20, 40)), results({(TASKS[0], "td3"): [100]})
        table = pd.concat([long, short], ignore_index=True)
        (row,) = report.final_table(table, table[:0]).to_dict("records")
        assert row == {"task": TASKS[0], "steps": "20 of 40", "MR.Q": "400.0 (1)", "TD3": "100.0 (1)"}
        apart = pd.concat([table, results({(TASKS[0], "sac"): [300]}, (5, 15))], ignore_index=True)
        assert scores.at_last_common_step(apart).empty

    def test_returns_that_are_not_numbers(self, results):
        """No older return stands in for one."""
        table = results({(TASKS[0], "mrq"): [600, 800, 700]})
        table.loc[(table["seed"] == 1) & (table["step"] == 20), "return"] = np.nan
        np.testing.assert_allclose(scores.normalise(scores.at_last_common_step(table))[0]["MR.Q"], [[0.6], [0.7]])
        assert report.final_table(table, table[:0])["MR.Q"].tolist() == ["650.0 ± 70.7 (2)"]

    def test_aggregates(self, results):
        matrices, _ = scores.normalise(scores.at_last_common_step(results(SCORED)))
        points, _ = scores.aggregates(matrices)
        # The middle two of 0.5, 0.6, 0.8 and 1.0, and of 0.1, 0.1, 0.2 and 0.3
        np.testing.assert_allclose(points["MR.Q"], [0.7, (0.4 + 0.5 + 0.2) / 4])
        assert points["TD3"][0] == pytest.approx(0.15)
        assert scores.improvement(matrices)[0]["TD3"] == [1]
        three = results({key: [*of_seeds, 400] for key, of_seeds in SCORED.items()})
        matrices, _ = scores.normalise(scores.at_last_common_step(three))
        before = np.random.get_state()[1].copy()
        points, limits = scores.aggregates(matrices)
        assert 0.4 <= limits["MR.Q"][0, 0] < points["MR.Q"][0] < limits["MR.Q"][1, 0] <= 1.0
        # The same each time, and whoever else draws from NumPy's generator does not notice
        np.testing.assert_array_equal(scores.aggregates(matrices)[1]["MR.Q"], limits["MR.Q"])
        np.testing.assert_array_equal(np.random.get_state()[1], before)


class TestPublished:
    def test_read(self, results, published):
        table = read_published(published, results({**RETURNS, ("HalfCheetah-v4", "mrq"): [1]}))
        assert set(table["task"]) == {"dmc/walker-walk-v0", "HalfCheetah-v4", "HalfCheetah-v5"}
        assert set(table["algorithm"]) == {"mrq"} and table["step"].max() == 20
        with pytest.raises(ConfigurationError, match=r"has no published returns: it must contain at least one of gym\.csv"):
            read_published(published / "nowhere", results(RETURNS))

    def test_comparison(self, results, published):
        table = results({**RETURNS, (TASKS[0], "drq-float32"): [700, 850, 600], (TASKS[1], "mrq"): [3000]})
        compared = compare_with_published(table, read_published(published, table)).set_index(["task", "algorithm"])
        walker, cheetah = compared.loc[TASKS[0], "MR.Q"], compared.loc[TASKS[1], "MR.Q"]
        assert (walker["step"], walker["seeds"], walker["mean"], walker["published mean"]) == (20, 2, 700, 600)
        assert (walker["min"], walker["max"], walker["published min"], walker["published max"]) == (600, 800, 500, 700)
        # A variance of 20000 over two seeds each: 100 is 0.71 standard errors
        assert walker["standard errors"] == pytest.approx(100 / np.sqrt(20000 / 2 + 20000 / 2))
        # The spread of a single seed is not known
        assert np.isnan(cheetah["standard errors"])
        # Variants are compared with their algorithm
        expected = stats.ttest_ind([700, 850, 600], [800, 900, 1000], equal_var=False).statistic
        assert compared.loc[TASKS[0], "DR.Q"]["standard errors"] == pytest.approx(expected)


class TestReport:
    def test_page(self, results, published, tmp_path, script):
        results({**RETURNS, ("Ant-v5", "mrq"): [1]})
        out = tmp_path / "report"
        script(tmp_path / "results.csv", "--published", published, "--out", out, "--title", "A comparison")
        text = (out / "README.md").read_text()
        assert text.startswith("# A comparison\n")
        # Two seeds are too few for intervals
        assert set(re.findall(r"\((.*\.png)\)", text)) == {"curves_steps.png", "curves_time.png"}
        for path in out.glob("*.png"):
            pixels = image.imread(path)
            assert pixels.shape[0] > 100 and pixels.std() > 0.01
        lines = text.splitlines()
        assert "| task | steps | MR.Q | TD3 | MR.Q, published |" in lines
        walker = "| dmc/walker-walk-v0 | 20 | 700.0 ± 141.4 (2) | 200.0 ± 141.4 (2) | 600.0 ± 141.4 (2) |"
        assert walker in lines and "| Ant-v5 | 20 | 1.0 (1) |  |  |" in lines
        assert re.search(r"^Left out, without a fixed scale, .*: Ant-v5\.$", text, re.MULTILINE)
        assert "| TD3 | 2 | 0.16 | 0.82 | 1.00 |" in lines
        assert "- MR.Q: `mrq`, on m, cpu" in lines and "- v" in lines
        # From the report's own table the same report can be made
        script(out, "--published", published, "--title", "A comparison")
        assert (out / "README.md").read_text() == text

    def test_intervals(self, results, tmp_path, script):
        results({key: [*of_seeds, 400] for key, of_seeds in SCORED.items()})
        script(tmp_path / "results.csv", "--out", tmp_path / "report")
        text = (tmp_path / "report" / "README.md").read_text()
        number = r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]"
        assert re.search(
            rf"\| MR\.Q \| 3 \| {number} \| {number} \|  \|\n\| TD3 \| 3 \| {number} \| {number} \| {number} \|", text
        )
        assert image.imread(tmp_path / "report" / "aggregates.png").std() > 0.01
        assert "![aggregates](aggregates.png)" in text

    def test_curves(self, results, published):
        """Every line and band is named, and drawn at the right place."""
        table = results({**RETURNS, (TASKS[0], "mrq"): [600, 800, 1000]})
        table = table[(table["seed"] < 2) | (table["step"] < 20)]
        theirs = read_published(published, table).assign(label="MR.Q, published")
        figure = figures.draw_curves(table, theirs, "step")
        texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        assert texts == [
            "MR.Q, published: mean and range of 2 seeds",
            "MR.Q: mean and range of 2 to 3 seeds",
            "TD3: mean and range of 2 seeds",
        ]
        assert [axis.get_title() for axis in figure.axes] == sorted(TASKS)
        published_line, ours, td3 = figure.axes[1].get_lines()[:3]
        np.testing.assert_allclose(published_line.get_ydata(), [1.5, 600])
        # Without the step that one of the seeds lacks
        np.testing.assert_allclose(ours.get_xydata(), [[0, 0], [10, 400]])
        np.testing.assert_allclose(td3.get_ydata(), [0, 100, 200])
        band = figure.axes[1].collections[2].get_paths()[0].vertices
        assert (band[:, 1].min(), band[:, 1].max()) == (0, 300)
        # At the mean time of the seeds
        ours = figures.draw_curves(table, theirs[:0], "seconds").axes[1].get_lines()[0]
        np.testing.assert_allclose(ours.get_xdata(), [1, 21])

    def test_order(self, results):
        """MR.Q, then DR.Q, then others, whatever the order of the rows."""
        table = results({(TASKS[0], name): [1] for name in ("sac", "drq-no-fade", "mrq-1-step", "drq", "mrq")})
        assert list(table["label"].unique()) == ["MR.Q", "MR.Q, 1-step targets", "DR.Q", "DR.Q, no fading replay", "SAC"]

    def test_mistakes(self, results, tmp_path, script, capsys):
        results(RETURNS)
        path, other = tmp_path / "results.csv", tmp_path / "other.csv"
        other.write_text(path.read_text())
        with pytest.raises(ConfigurationError, match=r"seed 0, is in .*results\.csv and .*other\.csv\. Give each run once"):
            script(path, other, "--out", tmp_path)
        other.write_text("task,step\n")
        with pytest.raises(ConfigurationError, match="it has no column algorithm"):
            script(other, "--out", tmp_path)
        with pytest.raises(ConfigurationError, match="There are no finished runs in"):
            script(Path("nowhere"), "--out", tmp_path)
        with pytest.raises(SystemExit):
            script(path)
        assert "--out FOLDER is needed" in capsys.readouterr().err
