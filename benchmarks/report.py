"""
Make the report of a study: learning curves, aggregate scores, a table and one page to look through them.

    python -m benchmarks.report runs/study-dmc/results.csv --out runs/study-dmc/report
    python -m benchmarks.report benchmarks/results/study-*.csv --published <folder> --out runs/report

Algorithms are compared at the last step at which all runs of a task were evaluated. The page lists runs that ended early, and
seeds computed in different precisions.

``--published`` names a folder with the returns published by the papers' authors, which are not part of this project: of MR.Q
(``gym.csv``, ``dmc.csv``, ``dmc_visual.csv``, ``atari.csv``; columns ``env``, ``timesteps``, ``seed0``, ``seed1`` and so on)
and of DR.Q (``drq_gym.csv`` and so on). They are drawn behind the curves, and a table compares them with the runs of ``mrq``
and ``drq``.
"""

import argparse
import html
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rliable import library, metrics

from benchmarks.scales import IN_WORDS, scale_of
from sb3_mrq.hyperparameters import PRECISIONS

#: format of the environment id, given the name in the published file
PUBLISHED = {"gym.csv": "{}", "dmc.csv": "dmc/{}-v0", "dmc_visual.csv": "dmc-visual/{}-v0", "atari.csv": "ALE/{}"}
#: beginning of the names of the published files, by algorithm
PREFIXES = {"mrq": "", "drq": "drq_"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PUBLISHED_COLORS = {"mrq": "#888888", "drq": "#A0845C"}
# Fewer seeds are drawn individually: overlapping bands hide one another
SEEDS_OF_A_BAND = 5

#: fewest seeds for an interval
MIN_SEEDS = 3
#: columns that identify an evaluation
EVALUATION = ["task", "algorithm", "seed", "step"]


def read_all(paths: Sequence[Path]) -> pd.DataFrame:
    """
    :param paths: tables of ``benchmarks.study``
    :return: all of their rows, with the column file
    :raises SystemExit: if an evaluation occurs twice
    """
    results = pd.concat([pd.read_csv(path, comment="#").assign(file=str(path)) for path in paths], ignore_index=True)
    twice = results[results.duplicated(EVALUATION, keep=False)]
    if len(twice):
        task, algorithm, seed, step = twice.iloc[0][EVALUATION]
        files = twice[(twice[EVALUATION] == twice.iloc[0][EVALUATION]).all(axis=1)]["file"]
        raise SystemExit(
            f"The evaluation of {algorithm} on {task}, seed {seed}, at step {step} occurs twice: "
            f"in {' and in '.join(files)}. Give each run once."
        )
    return results


def read_published(folder: Path) -> pd.DataFrame:
    """
    :param folder: folder of the published returns
    :return: table with the columns task, algorithm, step, seed, return
    """
    frames = []
    for algorithm, prefix in PREFIXES.items():
        for name, pattern in PUBLISHED.items():
            path = folder / f"{prefix}{name}"
            if path.exists():
                long = pd.read_csv(path).melt(["env", "timesteps"], var_name="seed", value_name="return")
                long = long.assign(task=long["env"].map(pattern.format), algorithm=algorithm)
                frames.append(long.rename(columns={"timesteps": "step"})[["task", "algorithm", "step", "seed", "return"]])
    if not frames:
        raise SystemExit(f"{folder} has no published returns: it must contain at least one of {', '.join(PUBLISHED)}.")
    published = pd.concat(frames).dropna()
    # The published locomotion results are of version 4, to which version 5 is compared
    newer = published[published["task"].str.match(r"^[A-Za-z0-9]+-v4$")]
    return pd.concat([published, newer.assign(task=newer["task"].str.replace("-v4", "-v5"))])


def published_of(published: pd.DataFrame | None, task: str, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """
    :param published: published returns, if available
    :param task: a task
    :param names: names of algorithms and of their variants, such as ``mrq-float32``
    :return: published returns on the task, by algorithm
    """
    if published is None:
        return {}
    algorithms = {name.partition("-")[0] for name in names}
    of_task = published[(published["task"] == task) & published["algorithm"].isin(algorithms)]
    return dict(iter(of_task.groupby("algorithm", sort=False)))


def at_step(frame: pd.DataFrame, step: int | None) -> pd.Series:
    """
    :param frame: results of one task and algorithm
    :param step: a step
    :return: finite return of each seed at this step, indexed by seed
    """
    return frame[frame["step"] == step].set_index("seed")["return"].dropna().sort_index().astype(float)


def last_common_step(results: pd.DataFrame, task: str) -> int | None:
    """
    :param results: of all tasks
    :param task: a task
    :return: last step at which every run, all seeds of all algorithms, was evaluated; None if there is none
    """
    steps = results[results["task"] == task].groupby(["algorithm", "seed"])["step"]
    return max(set.intersection(*(set(of_run) for _, of_run in steps)), default=None)


def remarks(results: pd.DataFrame) -> list[str]:
    """
    :param results: results of all tasks
    :return: a sentence for each run that ended early or has no finite return, and for each algorithm whose seeds were computed
        in different precisions
    """
    sentences = []
    for task, of_task in results.groupby("task", sort=False):
        step, last = last_common_step(results, task), of_task["step"].max()
        for (algorithm, seed), run in of_task.groupby(["algorithm", "seed"], sort=False):
            name = f"{algorithm} on {task}, seed {seed}"
            end = run["step"].max()
            if end < last:
                sentences.append(f"{name}: ended at {end:,} steps of {last:,}.")
            if run[run["step"] == step]["return"].isna().any():
                sentences.append(f"{name}: left out, as its return at {step:,} steps is not a number.")
        for algorithm, runs in of_task.groupby("algorithm", sort=False):
            seeds = seeds_of_precisions(runs)
            if len(seeds) > 1:
                sentences.append(f"{algorithm} on {task}: seeds in different precisions, {', '.join(seeds)}.")
    return sentences


def seeds_of_precisions(runs: pd.DataFrame) -> list[str]:
    """
    :param runs: results of one task and algorithm
    :return: the seeds of each precision, for runs whose column machine ends in a precision, as MR.Q's in a study
    """
    precisions = runs["machine"].str.split(", ").str[-1]
    named = precisions.isin(PRECISIONS)
    return [
        f"{precision} ({', '.join(map(str, sorted(seeds.unique())))})"
        for precision, seeds in runs["seed"][named].groupby(precisions[named])
    ]


@dataclass
class Scores:
    """
    Normalised returns at the last common step.

    :param matrices: scores by algorithm, (n_seeds, n_tasks). Every task has as many seeds as the task with the fewest.
    :param tasks: tasks that have a scale and results of all algorithms
    :param seeds: seeds in the matrices, by algorithm and task
    :param left_out: reason for each task that is left out
    """

    matrices: dict[str, np.ndarray]
    tasks: list[str]
    seeds: dict[str, dict[str, list[int]]]
    left_out: dict[str, str]


def scores(results: pd.DataFrame) -> Scores:
    """
    :param results: results of all tasks
    :return: their scores
    """
    algorithms = list(dict.fromkeys(results["algorithm"]))
    columns: dict[str, dict[str, pd.Series]] = {}
    left_out = {}
    for task, of_task in results.groupby("task", sort=False):
        scale = scale_of(task)
        step = last_common_step(results, task)
        values = {algorithm: at_step(of_task[of_task["algorithm"] == algorithm], step) for algorithm in algorithms}
        missing = [algorithm for algorithm, of_seeds in values.items() if of_seeds.empty]
        if missing:
            left_out[task] = f"no results of {', '.join(missing)}"
        elif scale is None:
            left_out[task] = "no fixed scale"
        else:
            low, high = scale
            columns[task] = {algorithm: (of_seeds - low) / (high - low) for algorithm, of_seeds in values.items()}
    matrices, seeds = {}, {}
    for algorithm in algorithms if columns else ():
        n_seeds = min(len(column[algorithm]) for column in columns.values())
        used = {task: column[algorithm].iloc[:n_seeds] for task, column in columns.items()}
        matrices[algorithm] = np.stack(list(used.values()), axis=1)
        seeds[algorithm] = {task: [int(seed) for seed in column.index] for task, column in used.items()}
    return Scores(matrices, list(columns), seeds, left_out)


def intervals(matrices: Mapping[str, Any], function: Any, reps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """
    :param matrices: scores by algorithm
    :param function: maps scores to an array of statistics
    :param reps: bootstrap samples, stratified by task
    :return: statistics and their 95 % intervals, (2, n_statistics), by algorithm
    """
    before = np.random.get_state()
    # rliable accepts a generator, but draws from numpy's global one
    np.random.seed(0)
    try:
        return library.get_interval_estimates(dict(matrices), function, reps=reps)
    finally:
        np.random.set_state(before)


def aggregates(matrices: Mapping[str, np.ndarray], reps: int) -> dict[str, Any]:
    """
    :param matrices: normalised scores by algorithm
    :param reps: bootstrap samples
    :return: interquartile mean and optimality gap of each algorithm, and the probability that the first of ``mrq`` and ``drq``
        (else the first of their variants, else the first algorithm) improves on each of the others. Each has a 95 % interval,
        or None with fewer than ``MIN_SEEDS`` seeds.
    """
    numbers: dict[str, Any] = {}

    def interval(limits: np.ndarray, *of: np.ndarray) -> list[float] | None:
        return limits.tolist() if min(map(len, of)) >= MIN_SEEDS else None

    def statistics(matrix: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(matrix), metrics.aggregate_optimality_gap(matrix)])

    points, limits = intervals(matrices, statistics, reps)
    for algorithm, matrix in matrices.items():
        numbers[algorithm] = {
            name: {"value": float(points[algorithm][k]), "interval": interval(limits[algorithm][:, k], matrix)}
            for k, name in enumerate(("iqm", "optimality_gap"))
        }
        numbers[algorithm]["n_seeds"] = len(matrix)
    main = min(matrices, key=lambda name: (name not in PREFIXES, name.partition("-")[0] not in PREFIXES))
    pairs = {name: (matrices[main], matrix) for name, matrix in matrices.items() if name != main}
    if pairs:

        def improvement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            return np.array([metrics.probability_of_improvement(ours, theirs)])

        points, limits = intervals(pairs, improvement, min(reps, 2000))
        for name in pairs:
            numbers[name]["probability_that_it_is_improved_on"] = {
                "by": main,
                "value": float(points[name][0]),
                "interval": interval(limits[name][:, 0], *pairs[name]),
            }
    return numbers


def distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, str]:
    """
    :param ours: returns of our seeds
    :param theirs: returns of the published seeds
    :return: difference of the means in standard errors, negative if ours is lower, and the source of the standard error: the
        variances of both (Welch), or the published variance alone if we have a single seed
    """
    spread = theirs.var(ddof=1)
    own, source = (ours.var(ddof=1), "Welch") if len(ours) > 1 else (spread, "published spread")
    error = np.sqrt(own / len(ours) + spread / len(theirs))
    return float((ours.mean() - theirs.mean()) / error) if error > 0 else float("nan"), source


def compare_with_published(results: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """
    :param results: results of all tasks
    :param published: published returns
    :return: a row for every task and step that both have: number, mean and range of our seeds, mean and range of theirs,
        whether our mean and all our seeds reach the lowest of theirs, and the difference of the means in standard errors
    """
    rows = []
    for (task, algorithm), frame in results.groupby(["task", "algorithm"], sort=False):
        of_algorithm = published["algorithm"] == algorithm.partition("-")[0]
        theirs_of_task = published[of_algorithm & (published["task"] == task)]
        steps = sorted(set(frame["step"]) & set(theirs_of_task["step"]) - {0})
        for step in steps:
            ours, theirs = at_step(frame, step).to_numpy(), at_step(theirs_of_task, step).to_numpy()
            if not len(ours):
                continue
            errors, source = distance(ours, theirs)
            rows.append(
                {
                    "task": task,
                    "algorithm": algorithm,
                    "step": step,
                    "seeds": len(ours),
                    "mean": ours.mean(),
                    "min": ours.min(),
                    "max": ours.max(),
                    "published mean": theirs.mean(),
                    "published min": theirs.min(),
                    "published max": theirs.max(),
                    "mean at or above the lowest": bool(ours.mean() >= theirs.min()),
                    "all at or above the lowest": bool((ours >= theirs.min()).all()),
                    "standard errors": errors,
                    "these from": source,
                }
            )
    return pd.DataFrame(rows)


def panel_of(task: str, tasks: Sequence[str]) -> str:
    """
    :param task: a task
    :param tasks: all tasks
    :return: title of the panel it is drawn in: version 4 of a locomotion task shares the panel of version 5 and its published
        returns, every other task has its own
    """
    newer = task.removesuffix("-v4") + "-v5"
    return newer if task.endswith("-v4") and newer in tasks else task


def draw_curves(axes: Axes, panel: str, results: pd.DataFrame, published: pd.DataFrame | None, colors: dict[str, str]) -> None:
    """Learning curves of one panel: the mean of the seeds, and each seed if they are few, or else their range."""
    tasks = results["task"].unique()
    of_panel = results[[panel_of(task, tasks) == panel for task in results["task"]]]
    last = of_panel["step"].max()
    for name, frame in published_of(published, panel, of_panel["algorithm"]).items():
        theirs, color = frame[frame["step"] <= last].groupby("step")["return"], PUBLISHED_COLORS[name]
        axes.fill_between(theirs.min().index, theirs.min(), theirs.max(), color=color, alpha=0.25, linewidth=0)
        label = f"{name}, published ({frame['seed'].nunique()} seeds)"
        axes.plot(theirs.mean().index, theirs.mean(), color=color, linestyle="--", label=label)
    for (task, algorithm), frame in of_panel.groupby(["task", "algorithm"], sort=False):
        # Only steps that all seeds have, so that the mean is always over the same seeds
        table = frame.pivot(index="step", columns="seed", values="return").dropna()
        if table.shape[1] < SEEDS_OF_A_BAND:
            axes.plot(table.index, table, color=colors[algorithm], alpha=0.5, linewidth=0.7)
        else:
            axes.fill_between(
                table.index, table.min(axis=1), table.max(axis=1), color=colors[algorithm], alpha=0.2, linewidth=0
            )
        on = "" if task == panel else f" on {task}"
        label = f"{algorithm}{on} ({table.shape[1]} seed{'s' if table.shape[1] > 1 else ''})"
        style = ":o" if on else "-o"
        axes.plot(table.index, table.mean(axis=1), style, color=colors[algorithm], markersize=3, label=label)
    axes.set_title(panel)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0"))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_overview(
    panels: Sequence[str], results: pd.DataFrame, published: pd.DataFrame | None, colors: dict[str, str]
) -> Figure:
    """All panels in one figure, with the numbers of seeds and a caption that explains lines and bands."""
    # As few empty cells as possible
    n_columns = 2 if len(panels) == 4 else min(3, len(panels))
    n_rows = -(-len(panels) // n_columns)
    size = (4.2 * n_columns, 3.3 * n_rows + 0.3)
    figure, grid = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(grid.flat, panels, strict=False):
        draw_curves(axis, panel, results, published, colors)
        axis.legend(fontsize=7, frameon=False, loc="upper left")
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    caption = f"Thick lines: mean over seeds. Thin lines: each of fewer than {SEEDS_OF_A_BAND}. Bands: lowest to highest."
    if published is not None and any(re.fullmatch(r"\w+-v5", panel) for panel in panels):
        caption += " Published returns are of v4 where v5 is shown."
    # Letters per inch
    figure.supxlabel(textwrap.fill(caption, round(13.5 * size[0])), fontsize=9)
    return figure


def draw_intervals(axes: Axes, rows: Sequence[tuple[str, float, Sequence[float] | None, str]], title: str, label: str) -> None:
    """Horizontal bars, given by name, value, 95 % interval or None, and colour."""
    for y, (_, value, interval, color) in enumerate(rows):
        if interval is not None:
            low, high = interval
            axes.barh(y, high - low, left=low, height=0.6, color=color, alpha=0.35)
        axes.plot([value, value], [y - 0.3, y + 0.3], color=color, linewidth=2)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.use_sticky_edges = False
    axes.margins(x=0.05)
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, folder: Path, name: str) -> str:
    """Save a figure as reproducible PNG and SVG files and return its name."""
    figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return name


def final_table(results: pd.DataFrame, published: pd.DataFrame | None) -> pd.DataFrame:
    """
    :param results: results of all tasks
    :param published: published returns, if available
    :return: a row for every task: the last common step, and mean and standard deviation of each algorithm at that step
    """
    rows = []
    for task in dict.fromkeys(results["task"]):
        step = last_common_step(results, task)
        row: dict[str, Any] = {"task": task, "steps": "none in common" if step is None else f"{step:,}"}
        for algorithm, frame in results[results["task"] == task].groupby("algorithm", sort=False):
            values = at_step(frame, step)
            if len(values):
                spread = f" ± {values.std(ddof=1):.0f}" if len(values) > 1 else ""
                row[algorithm] = f"{values.mean():.0f}{spread} ({len(values)})"
        for name, frame in published_of(published, task, results["algorithm"]).items():
            values = at_step(frame, step)
            if len(values):
                row[f"{name}, published"] = f"{values.mean():.0f} [{values.min():.0f}, {values.max():.0f}]"
        rows.append(row)
    table = pd.DataFrame(rows).fillna("")
    return table[sorted(table, key=lambda name: name.endswith(", published"))]


def markdown(table: pd.DataFrame) -> str:
    """
    :param table: table of texts and numbers
    :return: the same in Markdown
    """

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"

    return "\n".join([line(list(table.columns)), line(["---"] * len(table.columns)), *(line(row) for row in table.to_numpy())])


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-size: 0.9rem; margin: 1rem 0; display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #ddd; padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem; }}
img {{ max-width: 100%; height: auto; }}
.note {{ color: #555; max-width: 50rem; }}
</style></head><body>
{body}
</body></html>
"""


def page(title: str, sections: Sequence[str]) -> str:
    """
    :param title: title of the page
    :param sections: sections in HTML
    :return: the page
    """
    return PAGE.format(title=html.escape(title), body="\n".join([f"<h1>{html.escape(title)}</h1>", *sections]))


def picture(name: str, description: str) -> str:
    """
    :param name: name of a figure
    :param description: alternative text
    :return: HTML that shows the figure
    """
    return f'<a href="{name}.svg"><img src="{name}.png" alt="{html.escape(description)}"></a>'


def html_list(lines: Sequence[str]) -> str:
    """
    :param lines: lines of text
    :return: HTML list, empty without lines
    """
    return "\n".join(["<ul>", *(f"<li>{html.escape(line)}</li>" for line in lines), "</ul>"]) if lines else ""


def over_all_tasks(of: Scores, numbers: dict[str, Any], out: Path, colors: dict[str, str]) -> list[str]:
    """
    :param of: scores
    :param numbers: their aggregates
    :param out: folder for the figures
    :param colors: colours by algorithm
    :return: sections in HTML
    """
    sections = ["<h2>Over all tasks</h2>"]
    not_in_it = html_list([f"{task}: {reason}" for task, reason in of.left_out.items()])
    if not of.matrices:
        nothing = "There are no aggregates, as no task has a fixed scale and results of all algorithms."
        return [*sections, f'<p class="note">{nothing}</p>', not_in_it]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.7 + 0.45 * len(of.matrices)), sharey=True)
    for axis, key, name in zip(axes, ("iqm", "optimality_gap"), ("Interquartile mean", "Optimality gap"), strict=True):
        rows = [(a, numbers[a][key]["value"], numbers[a][key]["interval"], colors[a]) for a in of.matrices]
        draw_intervals(axis, rows, name, "normalised return, higher is better" if key == "iqm" else "lower is better")
    save(figure, out, "aggregates")
    few = min(map(len, of.matrices.values()))
    sections += [
        f'<p class="note">Over {len(of.tasks)} task{"s" if len(of.tasks) > 1 else ""}. With at least {MIN_SEEDS} seeds there '
        "are 95 % intervals, from a bootstrap stratified by task. "
        + ("Intervals from fewer than 5 seeds are too narrow. " if few < 5 else "")
        + "Every task has as many seeds as the task with the fewest: "
        + ", ".join(f"{html.escape(name)} {len(matrix)}" for name, matrix in of.matrices.items())
        + f". Returns are normalised: {IN_WORDS}"
        + f". {'Left out:' if of.left_out else ''}</p>",
        not_in_it,
        picture("aggregates", "interquartile mean and optimality gap of each algorithm"),
        "<details><summary>Seeds of each task</summary>",
        html_list(
            [
                f"{algorithm}: " + "; ".join(f"{task} {', '.join(map(str, seeds))}" for task, seeds in by_task.items())
                for algorithm, by_task in of.seeds.items()
            ]
        ),
        "</details>",
    ]
    improvement = "probability_that_it_is_improved_on"
    improved = {name: row[improvement] for name, row in numbers.items() if improvement in row}
    if improved:
        figure, axis = plt.subplots(figsize=(6, 0.7 + 0.45 * len(improved)))
        by = next(iter(improved.values()))["by"]
        rows = [(f"{by} over {name}", row["value"], row["interval"], colors[name]) for name, row in improved.items()]
        draw_intervals(axis, rows, "Probability of improvement", "probability that a run is better than one of the other")
        axis.axvline(0.5, color="black", linewidth=1, linestyle=":")
        axis.set_xlim(0, 1.02)
        save(figure, out, "improvement")
        sections.append(picture("improvement", f"probability that {by} improves on each other algorithm"))
    return sections


def against_published(results: pd.DataFrame, published: pd.DataFrame, out: Path) -> list[str]:
    """
    :param results: results of all tasks
    :param published: published returns
    :param out: folder for the table
    :return: sections in HTML
    """
    comparison = compare_with_published(results, published)
    if not len(comparison):
        return []
    comparison.to_csv(out / "published.csv", index=False, float_format="%.2f")
    last = comparison[comparison["step"] == comparison.groupby(["task", "algorithm"])["step"].transform("max")]
    return [
        "<h2>Against the published results</h2>",
        '<p class="note">At the last common step, over all seeds with an evaluation there. "standard errors" is the '
        "difference of the means, negative if ours is lower, in Welch's standard errors: &radic;(s&sup2;/n + s&sup2;/n) of "
        "ours and theirs. For a single seed the published variance is used instead of ours; the variance of a few seeds is "
        "itself uncertain. "
        'All steps: <a href="published.csv">published.csv</a>.</p>',
        last.round(1).to_html(index=False, border=0),
    ]


def make_report(results: pd.DataFrame, published: pd.DataFrame | None, out: Path, title: str, reps: int = 5000) -> None:
    """
    :param results: rows of ``benchmarks.study``
    :param published: published returns, if available
    :param out: folder for ``index.html``, figures and tables
    :param title: title of the page
    :param reps: bootstrap samples
    """
    out.mkdir(parents=True, exist_ok=True)
    algorithms = list(dict.fromkeys(results["algorithm"]))
    colors = {algorithm: COLORS[k % len(COLORS)] for k, algorithm in enumerate(algorithms)}
    tasks = list(dict.fromkeys(results["task"]))

    table = final_table(results, published)
    (out / "table.md").write_text(markdown(table) + "\n")
    sections = [
        "<h2>Returns</h2>",
        '<p class="note">Mean and standard deviation over seeds (number of seeds) at the last step at which all runs of the '
        "task were evaluated; mean and range of the published results.</p>",
        table.to_html(index=False, border=0),
        html_list(remarks(results)),
    ]

    of = scores(results)
    numbers = aggregates(of.matrices, reps) if of.matrices else {}
    sections += over_all_tasks(of, numbers, out, colors)
    if published is not None:
        sections += against_published(results, published, out)

    sections += [
        "<h2>Learning curves</h2>",
        '<p class="note">Mean over seeds, and each seed, or the range from lowest to highest with at least '
        f"{SEEDS_OF_A_BAND} seeds.</p>",
        '<div class="curves">',
    ]
    panels = list(dict.fromkeys(panel_of(task, tasks) for task in tasks))
    for panel in panels:
        figure, axis = plt.subplots(figsize=(5, 3.6))
        draw_curves(axis, panel, results, published, colors)
        axis.legend(fontsize=8, frameon=False)
        sections.append(picture(save(figure, out, panel.replace("/", "_")), f"learning curves on {panel}"))
    sections.append("</div>")
    save(draw_overview(panels, results, published, colors), out, "overview")

    sections += [
        "<h2>Versions and machines</h2>",
        html_list([*sorted(set(results["versions"])), *sorted(set(results["machine"]))]),
    ]
    summary = {"tasks": of.tasks, "left_out": of.left_out, "seeds": of.seeds, "algorithms": numbers}
    (out / "numbers.json").write_text(json.dumps(summary, indent=2) + "\n")
    (out / "index.html").write_text(page(title, sections))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="tables of studies")
    parser.add_argument("--published", type=Path, help="folder with the published returns")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--title", default="MR.Q")
    parser.add_argument("--reps", type=int, default=5000, help="bootstrap samples (default: %(default)s)")
    args = parser.parse_args(arguments)
    results = read_all(args.results)
    published = read_published(args.published) if args.published else None
    make_report(results, published, args.out, args.title, args.reps)
    print(f"{args.out / 'index.html'}")


if __name__ == "__main__":
    main()
