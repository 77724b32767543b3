"""
The script ``report``: one page in Markdown with the figures, tables and aggregates of finished runs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sb3_mrq.compare.algorithms import base_of, label, labels
from sb3_mrq.compare.evaluation import COLUMNS
from sb3_mrq.compare.figures import draw_aggregates, draw_curves, save
from sb3_mrq.compare.published import compare_with_published, read_published
from sb3_mrq.compare.runs import EVALUATIONS, FINISHED
from sb3_mrq.compare.scales import IN_WORDS
from sb3_mrq.compare.scores import Estimates, aggregates, at_last_common_step, improvement, normalise
from sb3_mrq.zoo.configuration import ConfigurationError

#: fewest seeds for an interval
MIN_SEEDS = 3
#: columns that identify an evaluation
EVALUATION = ["task", "algorithm", "seed", "step"]


def read_results(paths: Sequence[Path]) -> pd.DataFrame:
    """
    :param paths: folders of comparisons, or tables
    :return: the evaluations of all finished runs, with the names of the algorithms in the column label. MR.Q is first, then
        DR.Q, then other algorithms.
    :raises ConfigurationError: if there are no results, if a file is no table of evaluations, or if an evaluation occurs twice
    """
    frames = []
    for path in paths:
        found = [pd.read_csv(mark.with_name(EVALUATIONS)) for mark in path.glob(f"runs/*/*/*/{FINISHED}")]
        if not found:
            table = path / "results.csv" if path.is_dir() else path
            if not table.exists():
                raise ConfigurationError(f"There are no finished runs in {path}.")
            found = [pd.read_csv(table, comment="#")]
            missing = [name for name in COLUMNS if name not in found[0]]
            if missing:
                raise ConfigurationError(f"{table} is not a table of a comparison: it has no column {missing[0]}.")
        frames += [frame.assign(file=str(path)) for frame in found]
    results = pd.concat(frames, ignore_index=True)
    twice = results[results.duplicated(EVALUATION, keep=False)].sort_values(EVALUATION)
    if len(twice):
        task, algorithm, seed, step = twice.iloc[0][EVALUATION]
        files = " and in ".join(twice["file"][:2])
        raise ConfigurationError(f"Step {step} of {algorithm} on {task}, seed {seed}, is in {files}. Give each run once.")
    first = results["algorithm"].map(lambda name: {"mrq": 0, "drq": 1}.get(base_of(name), 2))
    results = results.drop(columns="file").assign(label=labels(results), first=first)
    return results.sort_values(["first", "label", *EVALUATION], ignore_index=True).drop(columns="first")


def markdown(table: pd.DataFrame) -> str:
    """
    :param table: a table
    :return: the same in Markdown
    """
    rows = [list(table), ["---"] * table.shape[1], *table.round(1).fillna("").values.tolist()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def final_table(results: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """
    :param results: results of all tasks
    :param published: published returns
    :return: mean, standard deviation and number of seeds of each algorithm at the last common step, with a row for every task
    """
    final = at_last_common_step(results)
    steps, last = final.groupby("task")["step"].first(), results.groupby("task")["step"].max()
    final = pd.concat([final, published[published["step"] == published["task"].map(steps)]])

    def text(returns: pd.Series) -> str:
        spread = f" ± {returns.std():.1f}" if returns.count() > 1 else ""
        return f"{returns.mean():.1f}{spread} ({returns.count()})"

    table = final.groupby(["task", "label"])["return"].agg(text).unstack()[list(final["label"].unique())]
    # Some runs may have ended earlier than others
    table.insert(0, "steps", [f"{n:,}" if n == last[task] else f"{n:,} of {last[task]:,}" for task, n in steps.items()])
    return table.reset_index()


def over_all_tasks(results: pd.DataFrame, out: Path) -> list[str]:
    """
    :param results: results of all tasks
    :param out: folder for the figures
    :return: paragraphs in Markdown
    """
    matrices, tasks = normalise(at_last_common_step(results))
    left_out = sorted(set(results["task"]) - set(tasks))
    reason = "a fixed scale, results of all algorithms or a step at which all were evaluated"
    without = f"Left out, without {reason}: {', '.join(left_out)}." if left_out else ""
    if not matrices:
        return [without]
    first, *others = matrices
    both, better = aggregates(matrices), improvement(matrices)

    n_seeds = {name: len(matrix) for name, matrix in matrices.items()}

    def cell(estimates: Estimates, name: str, k: int, n: int) -> str:
        value, (low, high) = estimates[0][name][k], estimates[1][name][:, k]
        return f"{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if n >= MIN_SEEDS else "")

    table = pd.DataFrame(
        {
            "algorithm": list(matrices),
            "seeds": list(n_seeds.values()),
            "interquartile mean": [cell(both, name, 0, n) for name, n in n_seeds.items()],
            "optimality gap": [cell(both, name, 1, n) for name, n in n_seeds.items()],
            f"probability that {first} is better": ["", *(cell(better, name, 0, min(n_seeds.values())) for name in others)],
        }
    )
    return [
        f"Over {len(tasks)} task{'s' if len(tasks) > 1 else ''}. Every task counts with as many seeds as the task with the "
        f"fewest. From {MIN_SEEDS} seeds on there are 95 % intervals, by a bootstrap stratified by task; with fewer than 5 "
        f"they are too narrow. Returns are normalised: {IN_WORDS}.",
        without,
        markdown(table),
        save(draw_aggregates(both), out, "aggregates") if min(n_seeds.values()) >= MIN_SEEDS else "",
    ]


def against_published(results: pd.DataFrame, published: pd.DataFrame) -> list[str]:
    """
    :param results: results of all tasks
    :param published: published returns
    :return: paragraphs in Markdown, none without published returns
    """
    comparison = compare_with_published(results, published)
    if not len(comparison):
        return []
    return [
        "## Against the published returns",
        "At the last step that both have, over all seeds with an evaluation there. The last column is the difference of the "
        "means, negative if ours is lower, in Welch's standard errors, which are uncertain for a few seeds. Gym tasks were "
        "published in version 4.",
        markdown(comparison.groupby(["task", "algorithm"], sort=False).tail(1)),
    ]


def make_report(results: pd.DataFrame, published: Path | None, out: Path, title: str) -> Path:
    """
    :param results: results of all tasks
    :param published: folder of published returns, if available
    :param out: folder for the page, ``results.csv`` and the figures
    :param title: title of the page
    :return: the page
    """
    theirs = results[:0] if published is None else read_published(published, results)
    theirs = theirs.assign(label=theirs["algorithm"].map(label) + ", published")
    out.mkdir(parents=True, exist_ok=True)
    results[list(COLUMNS)].to_csv(out / "results.csv", index=False)
    machines = results.groupby(["label", "algorithm"], sort=False)["machine"].unique()
    paragraphs = [
        f"# {title}",
        save(draw_curves(results, theirs, "step"), out, "curves_steps"),
        "Mean, standard deviation and number of seeds at the last step at which all runs of the task were evaluated:",
        markdown(final_table(results, theirs)),
        "## Against wall-clock time",
        "Seconds of training without evaluations. They compare only if the machines and their load were the same.",
        save(draw_curves(results, theirs[:0], "seconds"), out, "curves_time"),
        "## Over all tasks",
        *over_all_tasks(results, out),
        *against_published(results, theirs),
        "## Algorithms, machines and versions",
        "\n".join(f"- {label}: `{name}`, on {'; '.join(np.sort(of))}" for (label, name), of in machines.items()),
        "\n".join(f"- {text}" for text in sorted(set(results["versions"]))),
    ]
    page = out / "README.md"
    page.write_text("\n\n".join(filter(None, paragraphs)) + "\n")
    return page


def report_script() -> None:
    """
    Write the report requested on the command line.
    """
    parser = argparse.ArgumentParser(description="Report on comparisons: learning curves, aggregates and tables on one page.")
    parser.add_argument("results", nargs="+", type=Path, help="folders of comparisons, or their tables (results.csv)")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="published returns to compare with")
    parser.add_argument("--out", type=Path, help="folder for the report (default: the folder of the comparison, if it is one)")
    parser.add_argument("--title", default="Comparison", help="title of the page (default: %(default)s)")
    args = parser.parse_args()
    if args.out is None and (len(args.results) > 1 or not args.results[0].is_dir()):
        parser.error("--out FOLDER is needed for tables and for several folders.")
    print(make_report(read_results(args.results), args.published, args.out or args.results[0], args.title))
