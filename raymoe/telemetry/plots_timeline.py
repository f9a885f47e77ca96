"""The picture of one step of one rank: what computes, and which transfers are under way meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from raymoe.telemetry.plots import DARK, LIGHT, Draw, Theme, styled_axes
from raymoe.telemetry.spans import Span

_FIRST_LANE = "computation"
_BACKWARD = " backward"
_MORE_COLOURS = ("#f0e442", "#999999")
_ON_COLOUR = "#1c2430"
_NARROW_SHARE = 0.04
"""Spans shorter than this share of the picture are not numbered."""


def draw_timeline(spans: Sequence[Span]) -> Draw:
    """Time runs to the right, in ms from the first span; a row a lane, and as many more as spans of a lane overlap without one
    lying in the other. A span in another of its lane is drawn over it. What ends in "backward" has the paler colour of the
    same without it. Numbers are MoE layers.
    """
    rows = _rows(spans)
    names = list(dict.fromkeys(span.name for _, members in rows for span in members))
    kinds = list(dict.fromkeys(name.removesuffix(_BACKWARD) for name in names))
    start_ns = min(span.start_ns for span in spans)
    length_ms = max(span.end_ns - start_ns for span in spans) / 1e6

    def draw(figure: Figure, theme: Theme) -> None:
        axes = styled_axes(figure, theme, "ms", "")
        colours = (*theme.cycle, *_MORE_COLOURS, *(LIGHT if theme is DARK else DARK).cycle[:2])
        look_of = {
            name: to_rgba(
                colours[kinds.index(name.removesuffix(_BACKWARD)) % len(colours)],
                0.55 if name.endswith(_BACKWARD) else 1.0,
            )
            for name in names
        }
        for place, (_, members) in enumerate(rows):
            for depth, span in _nested(members):
                left_ms, width_ms = (span.start_ns - start_ns) / 1e6, (span.end_ns - span.start_ns) / 1e6
                height = max(0.76 - 0.22 * depth, 0.2)
                look = look_of[span.name]
                axes.barh(place, width_ms, left=left_ms, height=height, color=look, edgecolor=theme.grid, linewidth=0.4)
                if span.layer is not None and width_ms > _NARROW_SHARE * length_ms:
                    axes.text(
                        left_ms + width_ms / 2,
                        place,
                        str(span.layer),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color=_ON_COLOUR,
                    )
        axes.set_yticks(range(len(rows)), [lane for lane, _ in rows], parse_math=False)
        axes.tick_params(axis="y", labelcolor=theme.ink)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        axes.set_xlim(0, length_ms or 1)
        patches = [Patch(color=look_of[name], label=name) for name in names]
        figure.legend(
            handles=patches, loc="outside upper left", ncols=4, frameon=False, fontsize=8.5, labelcolor=theme.ink
        )

    return draw


def timeline_height(spans: Sequence[Span]) -> float:
    """Inches that give every row room."""
    return 1.4 + 0.4 * len(_rows(spans))


def _rows(spans: Sequence[Span]) -> list[tuple[str, list[Span]]]:
    """(lane, spans of a row), computation first."""
    lanes = sorted({span.lane for span in spans}, key=lambda lane: (lane != _FIRST_LANE, lane))
    rows: list[tuple[str, list[Span]]] = []
    for lane in lanes:
        of_lane: list[list[Span]] = []
        for span in sorted(
            (each for each in spans if each.lane == lane), key=lambda each: (each.start_ns, -each.end_ns)
        ):
            free = next((row for row in of_lane if not any(_cross(span, other) for other in row)), None)
            if free is None:
                of_lane.append([span])
            else:
                free.append(span)
        rows += [(lane if place == 0 else "", members) for place, members in enumerate(of_lane)]
    return rows


def _cross(one: Span, other: Span) -> bool:
    """Whether they overlap and neither lies in the other."""
    first, second = sorted((one, other), key=lambda each: (each.start_ns, -each.end_ns))
    return second.start_ns < first.end_ns < second.end_ns


def _nested(members: Sequence[Span]) -> list[tuple[int, Span]]:
    """Each span with how many of the row it lies in, outer ones first."""
    placed: list[tuple[int, Span]] = []
    around: list[Span] = []
    for span in sorted(members, key=lambda each: (each.start_ns, -each.end_ns)):
        while around and around[-1].end_ns <= span.start_ns:
            around.pop()
        placed.append((len(around), span))
        around.append(span)
    return placed
