"""The report's figures, each drawn for a light and for a dark page.

matplotlib through its objects, not pyplot: no global figure, no display, usable from any thread. Colours are those of Okabe
and Ito, told apart with any colour vision. A figure is narrow, so that its letters stay readable on a phone.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Numbers = Sequence[float | None] | np.ndarray

SMOOTHED_FROM = 20
"""Points from which a smoothed curve gets its running mean."""

_WIDTH_IN = 5.2
_MOST_POINTS = 600
_MOST_LABELLED_LAYERS = 32
# writing a figure changes matplotlib's global settings for a moment
_render_lock = threading.Lock()


@dataclass(frozen=True)
class Theme:
    ink: str
    faint: str
    grid: str
    cycle: tuple[str, ...]


LIGHT = Theme(ink="#1c2430", faint="#5b6675", grid="#dde2e8", cycle=("#0072b2", "#d55e00", "#009e73", "#cc79a7"))
DARK = Theme(ink="#e8ecf1", faint="#a3adba", grid="#333c48", cycle=("#56b4e9", "#e69f00", "#2fc49a", "#e29cc4"))

Draw = Callable[[Figure, Theme], None]


def as_floats(values: Numbers) -> np.ndarray:
    """float64, with NaN where a value is missing."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def data_uri(draw: Draw, theme: Theme, height_in: float) -> str:
    """Draws a figure on a transparent ground and returns it as an SVG that a page can carry in itself."""
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    draw(figure, theme)
    buffer = io.BytesIO()
    with _render_lock:
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def lines(
    series: Mapping[str, Numbers],
    x: Numbers,
    *,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    is_smoothed: bool = False,
    even_at: float | None = None,
) -> Draw:
    """Curves over ``x``; smoothed ones get their running mean on top. ``even_at`` marks the ideal with a dashed line."""
    steps = as_floats(x)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = styled_axes(figure, theme, x_label, y_label)
        marker = "o" if steps.size == 1 else None
        for (label, values), colour in zip(series.items(), theme.cycle, strict=False):
            y = as_floats(values)
            if is_smoothed and y.size >= SMOOTHED_FROM:
                width = max(2, y.size // 50)
                axes.plot(*_thinned(steps, y), color=colour, alpha=0.3, linewidth=0.9)
                axes.plot(*_thinned(steps, _running_mean(y, width)), color=colour, label=label, linewidth=1.8)
            else:
                axes.plot(*_thinned(steps, y), color=colour, label=label, linewidth=1.8, marker=marker)
        if even_at is not None:
            axes.axhline(even_at, color=theme.faint, linewidth=1, linestyle="--", label="perfectly even")
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(series) > 1 or even_at is not None:
            legend(axes, theme)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))

    return draw


def heat_map(shares: np.ndarray, ratios: np.ndarray) -> Draw:
    """shares [L, E] in percent of the layer's rows, and beside it each layer's busiest expert over the mean, [L]."""

    def draw(figure: Figure, theme: Theme) -> None:
        num_layers, num_experts = shares.shape
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
        _dress(left, theme, "expert", "MoE layer")
        _dress(right, theme, "max / mean", "")
        edges_E, edges_L = np.arange(num_experts + 1) - 0.5, np.arange(num_layers + 1) - 0.5
        mesh = left.pcolormesh(edges_E, edges_L, shares, cmap="cividis", vmin=0, rasterized=True)
        left.grid(visible=False)
        left.invert_yaxis()
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        bar = figure.colorbar(mesh, ax=left, location="top", aspect=40, pad=0.02)
        bar.set_label("share of the layer's routed rows, %", color=theme.faint, fontsize=9)
        bar.ax.tick_params(colors=theme.faint, labelsize=8)
        bar.outline.set_visible(False)
        right.barh(np.arange(num_layers), ratios, color=theme.cycle[0], height=0.7)
        right.grid(visible=False, axis="y")
        right.tick_params(labelleft=False, left=False)
        right.set_xlim(0, max(1.0, float(np.nanmax(ratios))) * 1.45)
        right.xaxis.set_major_locator(MaxNLocator(nbins=2))
        right.axvline(1, color=theme.faint, linewidth=1, linestyle="--")
        if num_layers <= _MOST_LABELLED_LAYERS:
            for layer, ratio in enumerate(ratios):
                if np.isfinite(ratio):
                    right.text(ratio, layer, f" {ratio:.1f}", va="center", fontsize=8, color=theme.ink)

    return draw


def heat_map_height(num_layers: int) -> float:
    """Inches that leave every layer a visible row."""
    return min(7.0, 1.7 + 0.2 * num_layers)


def bars(names: Sequence[str], values: Sequence[float], *, x_label: str) -> Draw:
    """Horizontal bars with their values; the first one is the one the report is about."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = styled_axes(figure, theme, x_label, "")
        place = np.arange(len(names))
        colours = [theme.cycle[0]] + [theme.grid] * (len(names) - 1)
        axes.barh(place, values, color=colours, height=0.65, edgecolor=theme.faint, linewidth=0.6)
        # a name is text, never matplotlib's mathematics between dollar signs
        axes.set_yticks(place, names, parse_math=False)
        axes.tick_params(axis="y", labelcolor=theme.ink, left=False)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, max(values) * 1.18 or 1)
        for y, value in enumerate(values):
            axes.text(value, y, f"  {value:.3f}", va="center", fontsize=9, color=theme.ink)

    return draw


def stacked(series: Mapping[str, Numbers], x: Numbers, *, x_label: str, y_label: str) -> Draw:
    """Counts on top of one another over ``x``."""
    steps = as_floats(x)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = styled_axes(figure, theme, x_label, y_label)
        thin = [_thinned(steps, np.nan_to_num(as_floats(values))) for values in series.values()]
        axes.stackplot(
            thin[0][0], *[y for _, y in thin], labels=list(series), colors=theme.cycle[: len(series)], alpha=0.85
        )
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        legend(axes, theme)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))

    return draw


def styled_axes(figure: Figure, theme: Theme, x_label: str, y_label: str) -> Axes:
    axes = figure.subplots()
    _dress(axes, theme, x_label, y_label)
    return axes


def _dress(axes: Axes, theme: Theme, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, color=theme.faint, fontsize=9)
    axes.set_ylabel(y_label, color=theme.faint, fontsize=9)
    axes.tick_params(colors=theme.faint, labelsize=8.5, length=0)
    axes.grid(visible=True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def legend(axes: Axes, theme: Theme) -> None:
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=theme.ink,
    )


def _running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Mean of the values that are there, up to ``width`` to either side: a falling curve is not shown late."""
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(y))])
    there = np.concatenate([[0], np.cumsum(np.isfinite(y))])
    place = np.arange(y.size)
    # fewer to the right means fewer to the left, else the ends would lean inwards
    reach = np.minimum(width, np.minimum(place, y.size - 1 - place))
    first, last = place - reach, place + reach + 1
    count = there[last] - there[first]
    return np.divide(total[last] - total[first], count, out=np.full(y.shape, np.nan), where=count > 0)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``_MOST_POINTS`` points, each the mean of its stretch: a long run must not make a heavy page."""
    stride = -(-y.size // _MOST_POINTS)
    if stride <= 1:
        return x, y
    starts = np.arange(0, y.size, stride)
    there = np.isfinite(y)
    count = np.add.reduceat(there, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(there, y, 0.0), starts)
    return x[starts], np.divide(total, count, out=np.full(starts.size, np.nan), where=count > 0)
