"""
Make the report of a study: learning curves, aggregate scores, a table and one page to look through them.

    python -m benchmarks.report runs/dmc/results.csv --out runs/dmc/report
    python -m benchmarks.report benchmarks/results/mrq-*.csv --published <folder> --out runs/report

It takes the tables of ``benchmarks.study`` and the files of ``benchmarks.learning``.

``--published`` names a folder with the returns that the paper's authors published (``gym.csv``, ``dmc.csv``,
``dmc_visual.csv``, ``atari.csv``; columns ``env``, ``timesteps``, ``seed0``, ``seed1`` and so on). They are not part of this
project. Where it is given they stand behind the curves, and a table compares them with the runs of ``mrq``.
"""

import argparse
import html
import json
import re
import warnings
from collections.abc import Mapping, Sequence
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

#: id of the environment from the name in the published files, by file
PUBLISHED = {"gym.csv": "{}", "dmc.csv": "dmc/{}-v0", "dmc_visual.csv": "dmc-visual/{}-v0", "atari.csv": "ALE/{}"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PUBLISHED_COLOR = "#888888"
PUBLISHED_NAME = "published"


def read_results(path: Path) -> pd.DataFrame:
    """
    :param path: table of ``benchmarks.study``, or file of ``benchmarks.learning``
    :return: columns task, algorithm, seed, step, return, versions and machine, among others
    """
    lines = path.read_text().splitlines()
    table = pd.read_csv(path, comment="#" if lines[0].startswith("#") else None)
    if "algorithm" in table:
        return table
    heading = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    precision = re.search(r" --precision (\w+)", heading["command"])
    products = re.search(r" --matmul-precision (\w+)", heading["command"])
    # float32 with products in bfloat16 is another algorithm than plain float32
    variants = [match[1] for match in (precision, products) if match and match[1] not in ("float32", "highest")]
    algorithm = "-".join(["mrq", *variants])
    table = table.rename(columns={"env": "task", "timesteps": "step", "return_mean": "return"})
    short = ~table["task"].str.contains(r"-v\d+$")
    table.loc[short, "task"] = "dmc/" + table.loc[short, "task"] + "-v0"
    return table.assign(algorithm=algorithm, versions=heading["versions"], machine=heading["machine"])


def read_published(folder: Path) -> pd.DataFrame:
    """
    :param folder: with the published returns
    :return: columns task, step, seed, return
    """
    frames = []
    for name, pattern in PUBLISHED.items():
        path = folder / name
        if path.exists():
            long = pd.read_csv(path).melt(["env", "timesteps"], var_name="seed", value_name="return")
            long["task"] = long["env"].map(pattern.format)
            frames.append(long.rename(columns={"timesteps": "step"})[["task", "step", "seed", "return"]])
    if not frames:
        raise SystemExit(f"There is none of {', '.join(PUBLISHED)} in {folder}.")
    published = pd.concat(frames).dropna()
    # Version 5 of Gym's locomotion tasks is compared with version 4
    newer = published[published["task"].str.match(r"^[A-Za-z0-9]+-v4$")]
    return pd.concat([published, newer.assign(task=newer["task"].str.replace("-v4", "-v5"))])


def at_step(frame: pd.DataFrame, step: int) -> np.ndarray:
    """
    :param frame: results of one task and algorithm
    :param step: a step
    :return: return of each seed that got there, at its last evaluation up to this step, (n_seeds,)
    """
    reached = frame.groupby("seed")["step"].transform("max") >= step
    until = frame[reached & (frame["step"] <= step)].sort_values("step")
    return until.groupby("seed")["return"].last().to_numpy(dtype=float)


def last_common_step(results: pd.DataFrame, task: str) -> int:
    """
    :param results: of all tasks
    :param task: a task
    :return: last step that some run of every algorithm has reached
    """
    of_task = results[results["task"] == task]
    return int(of_task.groupby("algorithm")["step"].max().min())


def scale_of(task: str, results: pd.DataFrame, published: pd.DataFrame | None) -> tuple[float, float]:
    """
    :param task: a task
    :param results: of all tasks
    :param published: published returns, if there are any
    :return: returns that count as 0 and 1: 0 and 1000 in the DeepMind Control suite, elsewhere the mean return before training
        and that of the best algorithm, published or not, at the last common step
    """
    if task.startswith(("dmc/", "dmc-visual/")):
        return 0.0, 1000.0
    of_task = results[results["task"] == task]
    step = last_common_step(results, task)
    best = [at_step(frame, step).mean() for _, frame in of_task.groupby("algorithm")]
    if published is not None and (published["task"] == task).any():
        best.append(at_step(published[published["task"] == task], step).mean())
    low = float(of_task[of_task["step"] == 0]["return"].mean())
    high = float(np.nanmax(best))
    return low, high if high > low else low + 1.0


def scores(results: pd.DataFrame, published: pd.DataFrame | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """
    :param results: of all tasks
    :param published: published returns, if there are any
    :return: normalised returns at the last common step by algorithm, (n_seeds, n_tasks), and the tasks, which are those that
        all of these algorithms were run on. Where they have different numbers of seeds the first ones are taken.
    """
    algorithms = list(dict.fromkeys(results["algorithm"]))
    tasks = [task for task, frame in results.groupby("task", sort=False) if set(frame["algorithm"]) == set(algorithms)]
    by_algorithm: dict[str, list[np.ndarray]] = {algorithm: [] for algorithm in algorithms}
    for task in tasks:
        low, high = scale_of(task, results, published)
        step = last_common_step(results, task)
        for algorithm in algorithms:
            frame = results[(results["task"] == task) & (results["algorithm"] == algorithm)]
            by_algorithm[algorithm].append((at_step(frame, step) - low) / (high - low))
    matrices = {}
    for algorithm, columns in by_algorithm.items():
        n_seeds = min(map(len, columns), default=0)
        if n_seeds:
            matrices[algorithm] = np.stack([column[:n_seeds] for column in columns], axis=1)
    return matrices, tasks


def intervals(matrices: Mapping[str, Any], function: Any, reps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """
    :param matrices: scores by algorithm
    :param function: from scores to an array of statistics
    :param reps: bootstrap samples, stratified by task
    :return: statistics and their 95 % intervals, (2, n_statistics), by algorithm
    """
    with warnings.catch_warnings():
        # Of an argument that rliable hands on
        warnings.filterwarnings("ignore", "random_state is deprecated", FutureWarning)
        return library.get_interval_estimates(dict(matrices), function, reps=reps, random_state=np.random.RandomState(0))


def aggregates(matrices: Mapping[str, np.ndarray], reps: int) -> dict[str, Any]:
    """
    :param matrices: normalised scores by algorithm
    :param reps: bootstrap samples
    :return: interquartile mean and optimality gap of each algorithm, and the probability that ``mrq`` (else its first variant,
        else the first algorithm) improves on each of the others, each with its 95 % interval, None where there is but one seed
    """
    numbers: dict[str, Any] = {}

    def interval(limits: np.ndarray, *of: np.ndarray) -> list[float] | None:
        return limits.tolist() if min(map(len, of)) > 1 else None

    def statistics(matrix: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(matrix), metrics.aggregate_optimality_gap(matrix)])

    points, limits = intervals(matrices, statistics, reps)
    for algorithm, matrix in matrices.items():
        numbers[algorithm] = {
            name: {"value": float(points[algorithm][k]), "interval": interval(limits[algorithm][:, k], matrix)}
            for k, name in enumerate(("iqm", "optimality_gap"))
        }
        numbers[algorithm]["n_seeds"] = len(matrix)
    main = min(matrices, key=lambda name: (name != "mrq", not name.startswith("mrq")))
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


def compare_with_published(results: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """
    :param results: of all tasks
    :param published: published returns
    :return: a row for every task and step that both have: number, mean and spread of our seeds, mean and spread of theirs,
        whether every one of ours is within their spread or above it, and how many standard errors the means are apart
    """
    rows = []
    ours_alone = results[results["algorithm"].str.startswith("mrq")]
    for (task, algorithm), frame in ours_alone.groupby(["task", "algorithm"], sort=False):
        theirs_of_task = published[published["task"] == task]
        steps = sorted(set(frame["step"]) & set(theirs_of_task["step"]) - {0})
        for step in steps:
            ours, theirs = at_step(frame, step), theirs_of_task[theirs_of_task["step"] == step]["return"].to_numpy(dtype=float)
            if not len(ours):
                continue
            # The spread of ten seeds is the better known one, also for the error of our mean
            error = theirs.std(ddof=1) * np.sqrt(1 / len(ours) + 1 / len(theirs))
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
                    "at or above the lowest": bool((ours >= theirs.min()).all()),
                    "standard errors": (ours.mean() - theirs.mean()) / error if error > 0 else 0.0,
                }
            )
    return pd.DataFrame(rows)


def draw_curves(axes: Axes, task: str, results: pd.DataFrame, published: pd.DataFrame | None, colors: dict[str, str]) -> None:
    """Learning curves of one task: mean of the seeds, and their spread from the lowest to the highest."""
    of_task = results[results["task"] == task]
    last = of_task["step"].max()
    if published is not None:
        theirs = published[(published["task"] == task) & (published["step"] <= last)].groupby("step")["return"]
        if len(theirs):
            axes.fill_between(theirs.min().index, theirs.min(), theirs.max(), color=PUBLISHED_COLOR, alpha=0.25, linewidth=0)
            axes.plot(theirs.mean().index, theirs.mean(), color=PUBLISHED_COLOR, linestyle="--", label=PUBLISHED_NAME)
    for algorithm, frame in of_task.groupby("algorithm", sort=False):
        # Only steps that all seeds have, so that the mean is always of the same ones
        table = frame.pivot_table(index="step", columns="seed", values="return").dropna()
        axes.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=colors[algorithm], alpha=0.2, linewidth=0)
        label = f"{algorithm} ({table.shape[1]} seed{'s' if table.shape[1] > 1 else ''})"
        axes.plot(table.index, table.mean(axis=1), color=colors[algorithm], marker="o", markersize=3, label=label)
    axes.set_title(task)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0"))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_intervals(axes: Axes, rows: Sequence[tuple[str, float, Sequence[float] | None, str]], title: str, label: str) -> None:
    """Horizontal bars: name, value, 95 % interval (if there is one) and colour of each."""
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
    """Save a figure as PNG and SVG, and return its name."""
    figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")
    figure.savefig(folder / f"{name}.svg", bbox_inches="tight")
    plt.close(figure)
    return name


def final_table(results: pd.DataFrame, published: pd.DataFrame | None) -> pd.DataFrame:
    """
    :param results: of all tasks
    :param published: published returns, if there are any
    :return: a row for every task: the last common step, and mean and standard deviation of each algorithm there
    """
    rows = []
    for task in dict.fromkeys(results["task"]):
        step = last_common_step(results, task)
        row: dict[str, Any] = {"task": task, "steps": f"{step:,}"}
        for algorithm, frame in results[results["task"] == task].groupby("algorithm", sort=False):
            values = at_step(frame, step)
            spread = f" ± {values.std(ddof=1):.0f}" if len(values) > 1 else ""
            row[algorithm] = f"{values.mean():.0f}{spread} ({len(values)})"
        if published is not None:
            values = at_step(published[published["task"] == task], step)
            if len(values):
                row[PUBLISHED_NAME] = f"{values.mean():.0f} [{values.min():.0f}, {values.max():.0f}]"
        rows.append(row)
    table = pd.DataFrame(rows).fillna("")
    return table[[name for name in table if name != PUBLISHED_NAME] + [name for name in table if name == PUBLISHED_NAME]]


def markdown(table: pd.DataFrame) -> str:
    """
    :param table: of texts and numbers
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
    :param title: of the page
    :param sections: HTML
    :return: the page
    """
    return PAGE.format(title=html.escape(title), body="\n".join([f"<h1>{html.escape(title)}</h1>", *sections]))


def picture(name: str, description: str) -> str:
    """
    :param name: of a figure
    :param description: for those who do not see it
    :return: HTML that shows it
    """
    return f'<a href="{name}.svg"><img src="{name}.png" alt="{html.escape(description)}"></a>'


def make_report(results: pd.DataFrame, published: pd.DataFrame | None, out: Path, title: str, reps: int = 5000) -> None:
    """
    :param results: rows of ``benchmarks.study``
    :param published: published returns, if there are any
    :param out: folder for the report, ``index.html`` and what it shows
    :param title: of the page
    :param reps: bootstrap samples
    """
    out.mkdir(parents=True, exist_ok=True)
    algorithms = list(dict.fromkeys(results["algorithm"]))
    colors = {algorithm: COLORS[k % len(COLORS)] for k, algorithm in enumerate(algorithms)}
    tasks = list(dict.fromkeys(results["task"]))
    sections = []

    table = final_table(results, published)
    (out / "table.md").write_text(markdown(table) + "\n")
    sections += [
        "<h2>Returns</h2>",
        '<p class="note">Mean and standard deviation over seeds (number of seeds) at the last step that all algorithms have '
        "reached; of the published results mean and range of ten seeds.</p>",
        table.to_html(index=False, border=0),
    ]

    numbers: dict[str, Any] = {}
    matrices, common = scores(results, published)
    if matrices:
        numbers = aggregates(matrices, reps)
        figure, axes = plt.subplots(1, 2, figsize=(10, 0.7 + 0.45 * len(matrices)), sharey=True)
        for axis, key, name in zip(axes, ("iqm", "optimality_gap"), ("Interquartile mean", "Optimality gap"), strict=True):
            rows = [(a, numbers[a][key]["value"], numbers[a][key]["interval"], colors[a]) for a in matrices]
            draw_intervals(axis, rows, name, "normalised return, higher is better" if key == "iqm" else "lower is better")
        save(figure, out, "aggregates")
        sections += [
            "<h2>Over all tasks</h2>",
            f'<p class="note">Over the {len(common)} tasks that all algorithms were run on, with 95 % intervals of a '
            "bootstrap stratified by task, which a single seed does not have. Seeds: "
            + ", ".join(f"{html.escape(name)} {len(matrix)}" for name, matrix in matrices.items())
            + ". Returns are normalised: 0 to 1000 in the DeepMind Control suite; elsewhere from "
            "the return before training to that of the best algorithm.</p>",
            picture("aggregates", "interquartile mean and optimality gap of each algorithm"),
        ]
        improved = {name: row["probability_that_it_is_improved_on"] for name, row in numbers.items() if len(row) > 3}
        if improved:
            figure, axis = plt.subplots(figsize=(6, 0.7 + 0.45 * len(improved)))
            by = next(iter(improved.values()))["by"]
            rows = [(f"{by} over {name}", row["value"], row["interval"], colors[name]) for name, row in improved.items()]
            draw_intervals(axis, rows, "Probability of improvement", "probability that a run is better than one of the other")
            axis.axvline(0.5, color="black", linewidth=1, linestyle=":")
            axis.set_xlim(0, 1.02)
            save(figure, out, "improvement")
            sections.append(picture("improvement", f"probability that {by} improves on each other algorithm"))

    else:
        sections.append('<p class="note">There is no task that all algorithms were run on, hence nothing over all tasks.</p>')

    if published is not None:
        comparison = compare_with_published(results, published)
        if len(comparison):
            comparison.to_csv(out / "published.csv", index=False, float_format="%.2f")
            last = comparison[comparison["step"] == comparison.groupby(["task", "algorithm"])["step"].transform("max")]
            sections += [
                "<h2>Against the published results</h2>",
                '<p class="note">At the last step that both have. "standard errors" is the distance of the means, negative '
                'where ours is lower. All steps: <a href="published.csv">published.csv</a>.</p>',
                last.round(1).to_html(index=False, border=0),
            ]

    sections += ["<h2>Learning curves</h2>", '<p class="note">Mean over seeds, and the range from the lowest to the highest.']
    sections[-1] += " Grey: published.</p>" if published is not None else "</p>"
    sections.append('<div class="curves">')
    for task in tasks:
        figure, axis = plt.subplots(figsize=(5, 3.6))
        draw_curves(axis, task, results, published, colors)
        axis.legend(fontsize=8, frameon=False)
        sections.append(picture(save(figure, out, task.replace("/", "_")), f"learning curves on {task}"))
    sections.append("</div>")

    # Rows that are full, or nearly
    n_columns = 2 if len(tasks) == 4 else min(3, len(tasks))
    n_rows = -(-len(tasks) // n_columns)
    figure, grid = plt.subplots(
        n_rows, n_columns, figsize=(4.2 * n_columns, 3.1 * n_rows), squeeze=False, layout="constrained"
    )
    for axis, task in zip(grid.flat, tasks, strict=False):
        draw_curves(axis, task, results, published, colors)
    for axis in grid.flat[len(tasks) :]:
        axis.set_visible(False)
    entries: dict[str, Any] = {}
    for axis in grid.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label.split(" (")[0], handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), frameon=False)
    save(figure, out, "overview")

    machines = sorted(set(results["machine"])) if "machine" in results else []
    versions = sorted(set(results["versions"])) if "versions" in results else []
    sections += ["<h2>Made with</h2>", "<ul>", *(f"<li>{html.escape(line)}</li>" for line in (*versions, *machines)), "</ul>"]
    (out / "numbers.json").write_text(json.dumps({"tasks": common, "algorithms": numbers}, indent=2) + "\n")
    (out / "index.html").write_text(page(title, sections))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="tables of studies, and files of single runs")
    parser.add_argument("--published", type=Path, help="folder with the published returns")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--title", default="MR.Q")
    parser.add_argument("--reps", type=int, default=5000, help="bootstrap samples (default: %(default)s)")
    args = parser.parse_args(arguments)
    results = pd.concat([read_results(path) for path in args.results], ignore_index=True)
    published = read_published(args.published) if args.published else None
    make_report(results, published, args.out, args.title, args.reps)
    print(f"{args.out / 'index.html'}")


if __name__ == "__main__":
    main()
