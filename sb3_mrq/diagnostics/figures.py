"""
One figure for each item of a diagnosis. matplotlib is imported when figures are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sb3_mrq.diagnostics import measures
from sb3_mrq.diagnostics.results import DORMANT_SHARE, LOW_RANK, TAIL_WEIGHT, EmbeddingHealth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, RED = "#2364aa", "#d1661c", "#8a8f98", "#b3261e"
# Maximum number of points in a scatter plot: more are indistinguishable
_POINTS = 3000
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#4a4f57",
    "axes.grid": True,
    "axes.labelcolor": "#22262b",
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
}


class Item(NamedTuple):
    """
    :param title: title of the figure
    :param reading: explanation of the figure
    :param draw: function that draws it
    :param size: size of the figure, in inches
    """

    title: str
    reading: str
    draw: Callable[[Any, Figure], None]
    size: tuple[float, float]


def draw(diagnosis: Any) -> dict[str, Figure]:
    """
    :param diagnosis: the diagnosis
    :return: a figure for each item, by name
    :raises ImportError: if matplotlib is not installed
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib. Install it with: pip install "sb3-mrq[train]"') from error

    figures = {}
    for name, item in ITEMS.items():
        with matplotlib.rc_context(_STYLE):
            # Not from pyplot, which would keep a reference and may open windows
            figure = Figure(figsize=item.size, layout="constrained")
            FigureCanvasAgg(figure)
            item.draw(diagnosis, figure)
            # Compute the layout once, not each time the figure is saved
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            figures[name] = figure
    return figures


def _subsample(n: int) -> np.ndarray:
    """Indices of at most ``_POINTS`` of n points, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, _POINTS)).astype(int)) if n else np.arange(0)


def _number(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.2f}" if abs(value) < 99.5 else f"{value:.3g}"


def _empty_panel(axes: Axes, text: str) -> None:
    """Explain an empty panel."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes, fontsize=10)


def _steps_ahead(
    axes: Axes, lines: list[tuple[np.ndarray, str, str, Any]], title: str, label: str, lowest: float = -np.inf
) -> None:
    """
    Plot values against the number of steps ahead.

    :param lines: values, label, colour and style of each line
    :param lowest: smaller values are clipped to this one and drawn as triangles
    """
    for values, name, colour, style in lines:
        steps = np.arange(1, len(values) + 1)
        shown = np.maximum(values, lowest)
        axes.plot(steps, shown, style, color=colour, marker="o", markersize=5, label=name, clip_on=False, zorder=3)
        below = values < lowest
        if below.any():
            axes.plot(steps[below], shown[below], "v", color=colour, markersize=9, clip_on=False, zorder=3)
    axes.set(title=title, xlabel="steps ahead", ylabel=label, xticks=np.arange(1, len(lines[0][0]) + 1))


def _draw_model(diagnosis: Any, figure: Figure) -> None:
    accuracy = diagnosis.model
    panels: Any = figure.subplots(1, 3)
    for axes, name, title in zip(
        panels, ("reward", "termination", "embedding"), ("Reward", "Termination", "Next embedding"), strict=True
    ):
        r2 = getattr(accuracy, f"{name}_r2")
        if np.isnan(r2).all():
            if name == "embedding":
                axes.set_title(title)
                _empty_panel(axes, "The embedding\ndoes not vary.")
                continue
            if name == "termination" and not accuracy.n_terminated.any():
                axes.set_title(title)
                _empty_panel(axes, "No episode terminated.")
                continue
            rmse = getattr(accuracy, f"{name}_rmse")
            unit = f" ({diagnosis.reward_unit})" if name == "reward" else ""
            _steps_ahead(axes, [(rmse, "linear model", BLUE, "-")], title, f"root mean squared error{unit}")
            axes.set_ylim(0, 1.15 * np.nanmax(rmse) if np.nanmax(rmse) > 0 else 1)
            axes.text(0.03, 0.05, "It does not vary, so R² is undefined.", transform=axes.transAxes, color="#4a4f57")
            continue
        lines: list[tuple[np.ndarray, str, str, Any]] = [(r2, "linear model", BLUE, "-")]
        if name == "embedding":
            lines.append((accuracy.embedding_r2_unchanged, "no change at all", ORANGE, "--"))
        _steps_ahead(axes, lines, title, "R²", lowest=-1.0)
        lowest = min(np.nanmin(values) for values, *_ in lines)
        axes.axhline(0, color=GREY, linestyle=":", label="always the mean")
        axes.set_ylim(max(min(lowest, 0), -1) - 0.08, 1.04)
        if lowest < -1:
            axes.text(0.04, 0.12, f"down to {_number(lowest)}", transform=axes.transAxes, color=RED)
        if name == "termination":
            axes.set_title(f"{title} ({accuracy.n_terminated[0]} seen)")
    handles = {line.get_label(): line for axes in panels for line in axes.lines if not str(line.get_label()).startswith("_")}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))


def _scatter(axes: Axes, x: np.ndarray, y: np.ndarray, colour: Any, **kwargs: Any) -> Any:
    """
    Scatter plot with equal axes and the identity line.

    :param colour: a colour, or an array of numbers
    """
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        _empty_panel(axes, "There are no finite values.")
        return None
    both = np.concatenate([x[finite], y[finite]])
    low, high = both.min(), both.max()
    margin = 0.04 * (high - low) or max(abs(high), 1.0) * 0.04
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color="#4a4f57", linewidth=1, linestyle="--", zorder=2)
    shown = np.flatnonzero(finite)[_subsample(int(finite.sum()))]
    colours = colour[shown] if isinstance(colour, np.ndarray) else colour
    drawn = axes.scatter(x[shown], y[shown], c=colours, s=9, linewidths=0, zorder=3, rasterized=True, **kwargs)
    axes.set(xlim=limits, ylim=limits)
    axes.set_aspect("equal", adjustable="box")
    return drawn


def _draw_probe(diagnosis: Any, figure: Figure) -> None:
    probe = diagnosis.probe
    panels: Any = figure.subplots(1, 2)
    for axes, r2, prediction, colour, name in (
        (panels[0], probe.z_sa_r2, probe.z_sa_prediction, BLUE, "From z_sa"),
        (panels[1], probe.raw_r2, probe.raw_prediction, ORANGE, "From observation and action"),
    ):
        axes.set_title(f"{name}: R² = {_number(r2)}")
        _scatter(axes, probe.q, prediction, colour, alpha=0.45)
        axes.set(xlabel=f"Q ({diagnosis.reward_unit})", ylabel="held-out linear prediction")


def _draw_spectrum(axes: Axes, health: EmbeddingHealth) -> None:
    shares = health.spectrum[health.spectrum > 0]
    axes.set_title(f"{health.name}: effective rank {health.effective_rank:.1f} of {health.dim}")
    if len(shares) == 0:
        _empty_panel(axes, "It does not vary.")
        return
    axes.plot(np.arange(1, len(shares) + 1), shares, color=BLUE, marker=".", markersize=4)
    axes.axvline(health.effective_rank, color=BLUE, linestyle=":", label="effective rank")
    axes.axvline(LOW_RANK, color=RED, linestyle="--", linewidth=1.2, label=f"flagged below {LOW_RANK:g}")
    axes.set(xlabel="direction", ylabel="share of singular values", yscale="log", xscale="log", xlim=(0.9, 1.1 * health.dim))
    axes.set_ylim(min(max(shares.min(), 1e-6) / 2, 1e-3), 1.5)
    axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")


def _draw_units(axes: Axes, health: EmbeddingHealth) -> None:
    axes.set_title(f"{health.name}: {health.dormant_share:.0%} dormant units")
    deviations = np.maximum(health.unit_deviations, 1e-5)
    bins = np.geomspace(1e-5, max(10.0, deviations.max()), 41)
    dormant = deviations <= measures.DORMANT
    axes.hist([deviations[~dormant], deviations[dormant]], bins=bins.tolist(), color=[BLUE, RED], stacked=True)
    axes.axvline(measures.DORMANT, color=RED, linestyle="--", linewidth=1.2)
    axes.set(xscale="log", xlabel="deviation of a unit / mean deviation", ylabel="units")
    side: dict[str, Any] = dict(ha="right", va="top", transform=axes.get_xaxis_transform(), color=RED, fontsize=9)
    axes.text(measures.DORMANT * 0.85, 0.97, f"dormant\n(flagged above {DORMANT_SHARE:.0%})", **side)


def _draw_norms(axes: Axes, health: EmbeddingHealth) -> None:
    axes.set_title(f"{health.name}: norm {health.norms.mean():.3g}, variation {health.variation:.2g}")
    middle = health.norms.mean()
    least = max(0.01 * middle, 1e-6)
    bins = np.linspace(min(health.norms.min(), middle - least), max(health.norms.max(), middle + least), 31)
    axes.hist(health.norms, bins=bins.tolist(), color=BLUE)
    axes.set(xlabel="Euclidean norm", ylabel="states")


def _draw_collapse(diagnosis: Any, figure: Figure) -> None:
    panels: Any = figure.subplots(2, 3)
    for row, health in zip(panels, (diagnosis.z_s, diagnosis.z_sa), strict=True):
        for axes, panel in zip(row, (_draw_spectrum, _draw_units, _draw_norms), strict=True):
            panel(axes, health)
    verdict = "\n".join(f"FLAG  {flag}" for flag in diagnosis.flags) or "Nothing is flagged."
    figure.suptitle(verdict, color=RED if diagnosis.flags else "#1c7a3e", fontsize=10.5, x=0.01, ha="left")


def _numbered_steps(path: np.ndarray, min_distance: float = 0.14) -> list[int]:
    """
    Select steps of a path to number: the first, the last, and steps in between that are far enough apart on the map.

    :param path: path relative to the size of the map, (T, 2)
    :param min_distance: minimum distance between two numbers
    :return: indices of the steps
    """
    last = len(path) - 1
    chosen = [0] if last == 0 else [0, last]
    for step in np.unique(np.linspace(0, last, 41).astype(int)):
        if np.linalg.norm(path[chosen] - path[step], axis=1).min() >= min_distance:
            chosen.append(int(step))
    return chosen


def _draw_map(diagnosis: Any, figure: Figure) -> None:
    from matplotlib.collections import LineCollection

    embedded = diagnosis.map
    axes: Any = figure.subplots()
    background = _subsample(len(embedded.points))
    axes.scatter(*embedded.points[background].T, s=6, color="#d5d8dc", linewidths=0, label="other episodes", rasterized=True)
    path, values = embedded.points[embedded.episode], embedded.values[embedded.episode]
    lines = LineCollection(
        list(np.stack([path[:-1], path[1:]], axis=1)), colors="#4a4f57", linewidths=0.7, alpha=0.6, zorder=2
    )
    axes.add_collection(lines)
    points = axes.scatter(*path.T, c=values, cmap="viridis", s=20, linewidths=0, zorder=3)
    last = len(path) - 1
    for step in _numbered_steps(path / np.maximum(np.ptp(embedded.points, axis=0), 1e-12)):
        name = {0: "start", last: f"end, {last}"}.get(step, str(step))
        marker, size = {0: ("o", 10), last: ("s", 10)}.get(step, ("o", 6))
        axes.plot(*path[step], marker, color="black", markerfacecolor="none", markersize=size, markeredgewidth=1.2, zorder=4)
        box = dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor="none", alpha=0.8)
        axes.annotate(name, path[step], (7, 7), textcoords="offset points", fontsize=9, zorder=5, bbox=box)
    figure.colorbar(points, ax=axes, label=f"value ({diagnosis.reward_unit})", fraction=0.045, pad=0.02)
    first, second = embedded.variance_shares
    axes.set(xlabel=f"first component, {first:.0%} of the variance", ylabel=f"second component, {second:.0%} of the variance")
    axes.set_title(f"One episode of {last} steps, numbered in time; grey: all episodes")


def _draw_returns(diagnosis: Any, figure: Figure) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    returns, unit = diagnosis.returns, diagnosis.reward_unit
    panels: Any = figure.subplots(1, 2, width_ratios=[1, 1.35])
    counted = returns.counted
    panels[0].set_title(f"Every step: bias {_number(returns.bias)}, R² {_number(returns.r2)}")
    if counted.any():
        drawn = _scatter(
            panels[0],
            returns.realised[counted],
            returns.predicted[counted],
            returns.tail_weight[counted],
            cmap=LinearSegmentedColormap.from_list("fading", [BLUE, "#cfd4da"]),
            vmin=0,
            vmax=TAIL_WEIGHT,
        )
        if returns.tail_weight[counted].any():
            figure.colorbar(drawn, ax=panels[0], label="weight of the bootstrapped value", fraction=0.045, pad=0.02)
    else:
        _empty_panel(panels[0], "All episodes were truncated too early.")
    panels[0].set(xlabel=f"realised discounted return ({unit})", ylabel=f"predicted ({unit})")
    predicted, realised = returns.predicted[returns.episode], returns.realised[returns.episode]
    steps = np.arange(len(predicted))
    panels[1].plot(steps, realised, color="#22262b", label="realised")
    panels[1].plot(steps, predicted, color=BLUE, label="predicted")
    beyond = np.flatnonzero(~counted[returns.episode])
    if len(beyond):
        panels[1].axvspan(
            beyond[0], max(len(steps) - 1, beyond[0]), color="#eef0f2", zorder=0, label="too close to the truncation"
        )
    panels[1].set(xlabel="step of the episode", ylabel=f"discounted return ({unit})")
    panels[1].set_title("One episode in time")
    panels[1].legend(loc="best")


ITEMS = {
    "model": Item(
        "Linear model",
        "How well the linear model, unrolled along the actions taken, predicts reward, termination and next embedding; an R² "
        "of 1 is perfect, 0 is no better than always predicting the mean, and the prediction of the embedding should also be "
        "better than assuming no change.",
        _draw_model,
        (11, 3.7),
    ),
    "probe": Item(
        "Linear probe of Q",
        "How much of Q a linear function explains on held-out segments of episodes; points on the dashed line and an R² near "
        "1 from z_sa mean that Q is nearly linear in the embedding, the claim behind the method, and the second panel shows "
        "the same for the raw observation and action.",
        _draw_probe,
        (10, 4.8),
    ),
    "collapse": Item(
        "Collapse of the embeddings",
        "Whether the embeddings still distinguish states; singular values should fall off slowly with an effective rank "
        "well above the red line, units should lie to the right of theirs, and norms should neither vanish nor explode.",
        _draw_collapse,
        (11.5, 6.2),
    ),
    "map": Item(
        "Map of an episode",
        "The state embeddings of one episode on the first two principal components of all embeddings, connected in time; if "
        "the embedding is meaningful, neighbours on the map have similar values (colours).",
        _draw_map,
        (8.6, 5.6),
    ),
    "returns": Item(
        "Predicted and realised return",
        "Q of the action taken against the discounted rewards that followed; points above the dashed line are "
        "overestimated, points below it are underestimated, and points are paler the larger the weight of a bootstrapped "
        "value.",
        _draw_returns,
        (11, 4.4),
    ),
}
