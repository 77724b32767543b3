"""
Normalised returns of all tasks, and their aggregates by rliable.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from rliable import library, metrics

from sb3_mrq.compare.scales import scale_of

#: bootstrap samples
REPS = 2000

Matrices = dict[str, np.ndarray]
#: values and their intervals, (n,) and (2, n), by algorithm
Estimates = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def at_last_common_step(results: pd.DataFrame) -> pd.DataFrame:
    """
    :param results: results of all tasks
    :return: its rows at the last step at which every run of the task, all seeds of all algorithms, was evaluated
    """
    runs = results.groupby(["task", "algorithm", "seed"])["step"].agg(set)
    last = {task: max(set.intersection(*steps), default=-1) for task, steps in runs.groupby("task")}
    return results[results["step"] == results["task"].map(last)]


def normalise(final: pd.DataFrame) -> tuple[Matrices, list[str]]:
    """
    :param final: see :func:`at_last_common_step`
    :return: normalised returns by label of the algorithm, (n_seeds, n_tasks), and the tasks: those with a scale and results of
        all algorithms. Every task has as many seeds as the task with the fewest.
    """
    algorithms = list(final["label"].unique())
    columns: dict[str, Matrices] = {}
    for task, rows in final.dropna(subset="return").sort_values("seed").groupby("task"):
        scale = scale_of(task)
        if scale is not None and set(rows["label"]) == set(algorithms):
            score = (rows["return"] - scale[0]) / (scale[1] - scale[0])
            columns[task] = {name: of_name.to_numpy() for name, of_name in score.groupby(rows["label"])}
    matrices = {}
    for name in algorithms if columns else ():
        n_seeds = min(len(column[name]) for column in columns.values())
        matrices[name] = np.stack([column[name][:n_seeds] for column in columns.values()], axis=1)
    return matrices, list(columns)


def _estimates(scores: Mapping[str, Any], function: Callable[..., np.ndarray]) -> Estimates:
    """
    :param scores: scores by algorithm, or pairs of them
    :param function: maps scores to an array of statistics
    :return: statistics and their 95 % intervals, by a bootstrap stratified by task
    """
    before = np.random.get_state()
    # rliable accepts a generator, but draws from NumPy's global one
    np.random.seed(0)
    try:
        return library.get_interval_estimates(dict(scores), function, reps=REPS)
    finally:
        np.random.set_state(before)


def aggregates(matrices: Matrices) -> Estimates:
    """
    :param matrices: scores by algorithm
    :return: interquartile mean and optimality gap of each algorithm
    """

    def statistics(matrix: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(matrix), metrics.aggregate_optimality_gap(matrix)])

    return _estimates(matrices, statistics)


def improvement(matrices: Matrices) -> Estimates:
    """
    :param matrices: scores by algorithm
    :return: probability that a run of the first algorithm is better than a run of each other one
    """
    first, *others = matrices
    pairs = {name: (matrices[first], matrices[name]) for name in others}
    return _estimates(pairs, lambda *pair: np.array([metrics.probability_of_improvement(*pair)]))
