"""The page that `raymoe plan --trace --report` writes: recommendation, where the time goes, the table, what was assumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from raymoe.commands.plan_found import Comparison, named, shortly
from raymoe.placement.compare import MEMORY_SHARE_PERCENT
from raymoe.telemetry import page, plots, run_meta
from raymoe.telemetry.files import write_text
from raymoe.telemetry.parts import Table

_PARTS = {
    "attention_ms": "attention",
    "compute_ms": "experts, busiest device",
    "all_to_all_ms": "all-to-all",
    "exposed_ms": "transfers that nothing hides",
    "reshard_ms": "moving experts to new homes",
}


def write_plan_report(path: str | os.PathLike[str], found: Comparison, command: str, seed: int) -> None:
    """Writes the page, whole or not at all: one file, without script or network, light or dark as the reader's system is."""
    write_text(path, render(found, command, seed))


def render(found: Comparison, command: str, seed: int) -> str:
    """The page as text; what comes from the user is escaped."""
    title = f"What placement brings: {found.trace.name} on {found.cluster.name}"
    sections = [
        page.section("Recommendation", _advice(found)),
        page.section("Where a step's time goes", page.grid(_figures(found))),
        page.section("Policies", _table(found, _COLUMNS) + f'<p class="note">{escape(_NOTE)}</p>'),
        page.section("What was simulated", page.meta_list(_simulated(found))),
        page.section("In detail", _table(found, _DETAILS)),
        page.section("How each policy was done", page.table(Table("", _sources(found)))),
        page.section("About this page", page.meta_list(run_meta(command) | {"seed": seed})),
    ]
    subtitle = "<p>All times are simulated: a cost model's, not measured.</p>"
    return page.page(title, subtitle, sections, _OWN_CSS)


_OWN_CSS = "td:first-child { white-space: nowrap; } th, td { padding: 0.35rem 0.5rem; }"
_NOTE = (
    "A step is all MoE layers with their attention, forward and backward; an MoE layer's time is without its attention. "
    "The ideal is perfectly even experts and no transfer. Imbalance is the busiest device over the mean; moved is what goes "
    "over all links in a step; memory is that of the experts on the fullest device. (bound): told the loads before the step; "
    "not a policy one can run."
)


def _advice(found: Comparison) -> str:
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in found.advice.reasons)
    listed = f"<ul>{reasons}</ul>" if reasons else ""
    return f'<div class="card"><p><b>{escape(found.advice.headline)}</b></p>{listed}</div>'


def _simulated(found: Comparison) -> dict[str, str]:
    each = found.workload
    return {
        **found.lines,
        "about the cluster": " ".join(found.cluster.note.split()),
        "copies travel": each.fan_out,
        "assumed": (
            f"a plain transformer's attention, {each.attention_ns / 1e6:.3g} ms a layer forward, with backward twice that; an "
            f"expert of {each.expert_bytes / 1e6:.3g} MB with {each.state_bytes / 1e6:.3g} MB of optimizer state; experts may take "
            f"{MEMORY_SHARE_PERCENT} % of a device's memory; layers alike"
        ),
    }


def _figures(found: Comparison) -> list[str]:
    names = [named(row) for row in found.rows]
    parts = {label: [row[part] for row in found.rows] for part, label in _PARTS.items()}
    advised = found.advice.policy
    step = page.figure(
        "A step, by policy",
        f"Milliseconds, all layers, forward and backward; fastest first. Recommended: {advised}.",
        stacked_bars(names, parts, x_label="ms per step (simulated)"),
        1.5 + 0.3 * len(names),
    )
    curves = {name: _imbalance(found, name) for name in dict.fromkeys(("ep", advised))}
    means = ", ".join(f"{name} {curve.mean():.2f}" for name, curve in curves.items())
    draw = plots.lines(
        curves,
        np.arange(found.trace.num_steps),
        x_label="step",
        y_label="busiest device / mean",
        is_smoothed=True,
        even_at=1,
        from_zero=True,
    )
    return [
        step,
        page.figure(
            "Imbalance of devices", f"Mean over layers; 1 is perfectly even. Over the run: {means}.", draw, 3.4
        ),
    ]


def _imbalance(found: Comparison, name: str) -> np.ndarray:
    simulation = next(each for each in found.simulations if each.policy == name)
    return simulation.of("imbalance").mean(axis=1)


def stacked_bars(names: Sequence[str], parts: Mapping[str, Sequence[float]], *, x_label: str) -> plots.Draw:
    """Horizontal bars put together of parts, up to five, the first in grey: what is common to all. The total is beside."""

    def draw(figure: Figure, theme: plots.Theme) -> None:
        axes = plots.styled_axes(figure, theme, x_label, "")
        place = np.arange(len(names))
        left = np.zeros(len(names))
        for (label, values), colour in zip(parts.items(), (theme.faint, *theme.cycle), strict=False):
            axes.barh(place, values, left=left, color=colour, height=0.65, label=label)
            left += np.asarray(values)
        axes.set_yticks(place, names, parse_math=False)
        axes.tick_params(axis="y", labelcolor=theme.ink, left=False)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, float(left.max()) * 1.2 or 1)
        for y, total in enumerate(left):
            axes.text(total, y, f"  {shortly(total)}", va="center", fontsize=8.5, color=theme.ink)
        plots.legend(axes, theme)

    return draw


_Columns = dict[str, Callable[[dict[str, Any]], Any]]


_COLUMNS: _Columns = {
    "policy": named,
    "step, ms": lambda row: row["step_ms"],
    "vs ep": lambda row: f"{row['step_speedup_over_ep']:.2f}x",
    "MoE layer, ms": lambda row: row["moe_ms"],
    "layer vs ep": lambda row: f"{row['speedup_over_ep']:.2f}x",
    "of ideal, %": lambda row: 100 * row["ideal_share"],
    "imbalance": lambda row: row["imbalance"],
    "moved, GB": lambda row: row["bytes"] / 1e9,
    "memory, GB": lambda row: row["memory_bytes"] / 1e9,
    "fits": lambda row: {True: "yes", False: "no", None: None}[row["fits"]],
}
_DETAILS: _Columns = {
    "policy": named,
    "layer p5 to p95, ms": lambda row: f"{shortly(row['moe_p5_ms'])} to {shortly(row['moe_p95_ms'])}",
    "at the start, ms": lambda row: row["cold_ms"],
    "between nodes, GB": lambda row: row["far_bytes"] / 1e9,
    "within nodes, GB": lambda row: row["near_bytes"] / 1e9,
    "copies a layer": lambda row: row["copies"],
    "slots": lambda row: row["extra_slots"],
    "forecast error, %": lambda row: 100 * row["forecast_error"],
    "planning a layer, ms, measured": lambda row: row["plan_ms"],
}


def _table(found: Comparison, columns: _Columns) -> str:
    shown = [{column: of(row) for column, of in columns.items()} for row in found.rows]
    advised = next(i for i, row in enumerate(found.rows) if row["policy"] == found.advice.policy)
    return f'<div class="card scroll">{page.table_rows(shown, marked=advised)}</div>'


def _sources(found: Comparison) -> list[dict[str, Any]]:
    return [
        {"policy": policy.name, "source": policy.source, "assumed where the source is silent": policy.assumed}
        for policy in found.policies
    ]
