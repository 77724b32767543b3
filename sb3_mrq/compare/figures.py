"""
Figures of a comparison: learning curves by seaborn, and aggregates by rliable.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rliable import plot_utils

from sb3_mrq.compare.scores import Estimates

PALETTE = sns.color_palette("colorblind")
# The same in all figures. Others take light blue, and then what is left.
COLORS = dict(zip(("MR.Q", "SAC", "TD3", "DR.Q", "DQN", "QR-DQN"), PALETTE, strict=False))
GREYS = ("#888888", "#A0845C")
AXIS_LABELS = {"step": "environment steps", "seconds": "seconds of training"}


def colors_of(labels: Sequence[str]) -> list[tuple[float, float, float]]:
    """
    :param labels: names of algorithms in figures
    :return: their colours
    """
    left = cycle([PALETTE[-1], *(color for label, color in COLORS.items() if label not in labels)])
    return [COLORS[label] if label in COLORS else next(left) for label in labels]


def draw_curves(results: pd.DataFrame, published: pd.DataFrame, x: str) -> Figure:
    """
    :param results: results of all tasks
    :param published: published returns, drawn in grey
    :param x: column of the horizontal axis, step or seconds
    :return: a figure with a panel for each task: mean and range of the seeds
    """
    curves = pd.concat([results, published], ignore_index=True)
    texts = {}
    for label, n_seeds in curves.groupby(["task", "label"])["seed"].nunique().groupby("label"):
        numbers = " to ".join(map(str, sorted({n_seeds.min(), n_seeds.max()})))
        texts[label] = f"{label}: " + (f"mean and range of {numbers} seeds" if n_seeds.max() > 1 else "1 seed")
    curve = curves.groupby(["task", "label", "step"])
    # Only steps that all seeds have, so that the mean is always over the same seeds
    complete = curve["seed"].transform("nunique") == curves.groupby(["task", "label"])["seed"].transform("nunique")
    # At the mean time of its seeds
    curves = curves.assign(seconds=curve["seconds"].transform("mean"), text=curves["label"].map(texts))[complete]
    grey = [texts[label] for label in published["label"].unique()]
    labels = list(results["label"].unique())
    colored = [texts[label] for label in labels]
    n_tasks = curves["task"].nunique()
    grid = sns.relplot(
        curves,
        kind="line",
        x=x,
        y="return",
        hue="text",
        hue_order=[*grey, *colored],
        palette=[*GREYS[: len(grey)], *colors_of(labels)],
        style="text",
        dashes={text: (3, 2) if text in grey else "" for text in texts.values()},
        errorbar=("pi", 100),
        col="task",
        col_order=sorted(set(results["task"])),
        col_wrap=min(n_tasks, 2 if n_tasks == 4 else 3),
        height=4 if n_tasks == 1 else 3,
        aspect=1.3,
        facet_kws={"sharex": False, "sharey": False, "legend_out": False},
    )
    grid.set_titles("{col_name}").set_axis_labels(AXIS_LABELS[x], "return")
    for axis in grid.axes.flat:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    sns.move_legend(grid, "lower center", bbox_to_anchor=(0.5, 1), ncol=1 if n_tasks == 1 else 2, title=None)
    grid.tight_layout()
    return grid.figure


def draw_aggregates(estimates: Estimates) -> Figure:
    """
    :param estimates: interquartile mean and optimality gap by algorithm
    :return: rliable's plot of them
    """
    algorithms = list(estimates[0])
    figure, _ = plot_utils.plot_interval_estimates(
        *estimates,
        ["Interquartile mean ↑", "Optimality gap ↓"],
        algorithms[::-1],
        colors=dict(zip(algorithms, colors_of(algorithms), strict=True)),
        subfigure_width=4.5,
        row_height=0.7,
        xlabel="normalised return",
        xlabel_y_coordinate=-0.7 / len(algorithms),
    )
    return figure


def save(figure: Figure, folder: Path, name: str) -> str:
    """
    :param figure: a figure
    :param folder: folder for its PNG file
    :param name: name of the file
    :return: Markdown that shows it
    """
    figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return f"![{name.replace('_', ' ')}]({name}.png)"
