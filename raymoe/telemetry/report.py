"""A run's report as one HTML file: no network, no script, nothing beside it. L = MoE layers, E = experts a layer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from raymoe.telemetry import plots
from raymoe.telemetry.files import write_text
from raymoe.telemetry.page import figure, grid, meta_list, page, said, section, table, table_rows
from raymoe.telemetry.parts import Answer, Event, Number, Report, Score, Serving, Timeline, Training
from raymoe.telemetry.plots_timeline import draw_timeline, timeline_height

_MOST_EVENTS = 200


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Writes the report, whole or not at all. Figures, style and numbers are all in the one file."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page as text. Everything that comes from the run is escaped."""
    sections = [
        section("In short", _summary(report.summary)),
        section("Training", _training(report.training)),
        section("What happened", _events(report.events)),
        section("Within a step", _timeline(report.timeline)),
        section("Where the tokens go", _loads(report.loads)),
        section("Evaluation", _evaluation(report.evaluation)),
        section("Serving", _serving(report.serving)),
        *(section(each.title, table(each)) for each in report.tables),
        section("About this run", meta_list(report.meta)),
    ]
    subtitle = f"<p>{escape(report.subtitle)}</p>" if report.subtitle else ""
    return page(report.title, subtitle, sections)


def _summary(numbers: Sequence[Number]) -> str:
    cards = "".join(
        f'<div><div class="label">{escape(number.label)}</div><div class="value">{said(number.value)}</div>'
        f'<div class="note">{escape(number.note)}</div></div>'
        for number in numbers
    )
    return f'<div class="numbers">{cards}</div>' if cards else ""


def _training(training: Training | None) -> str:
    if training is None or len(training.step) == 0:
        return ""
    return grid([*_curves(training), *_imbalance(training), *_overhead(training)])


def _curves(training: Training) -> Iterable[str]:
    curves = (
        ("Loss", training.loss, "cross-entropy, nats per token", False),
        ("Throughput", training.tokens_per_s, "tokens per second, all workers", True),
        ("Step time", training.step_s, "seconds per step", True),
    )
    for title, values, y_label, from_zero in curves:
        known = _known(values)
        if known.size:
            caption = (
                f"Median {said(np.median(known))}." if from_zero else f"First {said(known[0])}, last {said(known[-1])}."
            )
            if len(values) >= plots.SMOOTHED_FROM:
                caption += " Bold: running mean."
            draw = plots.lines(
                {title: values}, training.step, x_label="step", y_label=y_label, from_zero=from_zero, is_smoothed=True
            )
            yield figure(title, caption, draw)


def _imbalance(training: Training) -> Iterable[str]:
    curves = {
        "experts, as routed": training.expert_imbalance,
        "ranks, rows at their owners": training.owner_imbalance,
        "ranks, as placed": training.device_imbalance,
    }
    curves = {label: values for label, values in curves.items() if _known(values).size}
    if curves:
        means = ", ".join(f"{label} {said(_known(values).mean())}" for label, values in curves.items())
        caption = f"Busiest over mean; 1 is perfectly even. Over the run: {means}."
        draw = plots.lines(
            curves, training.step, x_label="step", y_label="max / mean", is_smoothed=True, even_at=1, from_zero=True
        )
        yield figure("Imbalance", caption, draw, 3.4)


def _overhead(training: Training) -> Iterable[str]:
    step_s = plots.as_floats(training.step_s)
    curves = {}
    for label, values in (("waiting for experts", training.exposed_s), ("planning", training.planning_s)):
        if step_s.size and len(values):
            curves[label] = 100 * plots.as_floats(values) / step_s
    if curves:
        medians = ", ".join(f"{label} {said(np.nanmedian(values))} %" for label, values in curves.items())
        draw = plots.lines(
            curves, training.step, x_label="step", y_label="% of the step", is_smoothed=True, from_zero=True
        )
        yield figure("What placement costs", f"Of the slowest rank's step; medians: {medians}.", draw)


def _events(events: Sequence[Event]) -> str:
    rows = [{"step": event.step, "what": event.name, "": event.text} for event in events[:_MOST_EVENTS]]
    if not rows:
        return ""
    more = len(events) - len(rows)
    note = f'<p class="note">And {more} more.</p>' if more else ""
    return f'<div class="card scroll">{table_rows(rows)}</div>{note}'


def _timeline(timeline: Timeline | None) -> str:
    if timeline is None or not timeline.spans:
        return ""
    start_ns = min(span.start_ns for span in timeline.spans)
    end_ns = max(span.end_ns for span in timeline.spans)
    caption = f"{said((end_ns - start_ns) / 1e6)} ms. {timeline.note}".strip()
    return figure("One step of one rank", caption, draw_timeline(timeline.spans), timeline_height(timeline.spans))


def _loads(loads: np.ndarray | None) -> str:
    if loads is None:
        return ""
    loads = loads.astype(np.float64)
    total = loads.sum(axis=1, keepdims=True)
    if not total.any():
        return '<p class="note">No rows were routed.</p>'
    # a layer without a row has no shares: its line in the map stays empty
    shares = np.divide(loads, total, out=np.full(loads.shape, np.nan), where=total > 0)
    ratios = shares.max(axis=1) * loads.shape[1]
    layer = int(np.nanargmax(ratios))
    expert = int(np.argmax(shares[layer]))
    caption = (
        f"{loads.shape[0]} layers x {loads.shape[1]} experts. The hottest is expert {expert} of layer {layer}: "
        f"{said(100 * shares[layer, expert])} % of its layer's rows, {said(ratios[layer])} times an even share."
    )
    draw = plots.heat_map(100 * shares, ratios)
    return figure("Expert load", caption, draw, plots.heat_map_height(loads.shape[0]))


def _evaluation(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    rows = [{"": s.name, "bits per byte": s.bits_per_byte, "note": s.note} for s in scores]
    table = table_rows(rows, marked=0)
    drawn = [s for s in scores if math.isfinite(s.bits_per_byte)]
    figures = []
    if drawn:
        draw = plots.bars(
            [s.name for s in drawn], [s.bits_per_byte for s in drawn], x_label="bits per byte (lower is better)"
        )
        figures.append(figure("Held-out text", "Lower is better.", draw, 1.1 + 0.38 * len(drawn)))
    return grid([*figures, f'<div class="card scroll">{table}</div>'])


def _serving(serving: Serving | None) -> str:
    if serving is None:
        return ""
    return grid(_cache(serving)) + "".join(
        ["<h3>Answers</h3>", grid(map(_answer, serving.answers))] * bool(serving.answers)
    )


def _cache(serving: Serving) -> Iterable[str]:
    hits, misses = np.nansum(plots.as_floats(serving.hits)), np.nansum(plots.as_floats(serving.misses))
    if hits + misses > 0:
        caption = (
            f"{said(100 * hits / (hits + misses))} % of {said(int(hits + misses))} wanted experts were in the cache."
        )
        draw = plots.stacked(
            {"hits": serving.hits, "misses": serving.misses},
            serving.step,
            x_label=serving.unit,
            y_label=f"experts wanted per {serving.unit}",
        )
        yield figure("Expert cache", caption, draw)


def _answer(answer: Answer) -> str:
    facts = [
        ("first token after {} ms", None if answer.ttft_s is None else 1000 * answer.ttft_s),
        ("{} tokens/s", answer.tokens_per_s),
        ("{} tokens", answer.num_tokens),
    ]
    told = " &middot; ".join(form.format(said(value)) for form, value in facts if value is not None)
    return (
        f'<div class="card answer"><p class="prompt">{escape(answer.prompt)}</p>'
        f'<p class="text">{escape(answer.text)}</p><p class="facts">{told}</p></div>'
    )


def _known(values: plots.Numbers) -> np.ndarray:
    array = plots.as_floats(values)
    return array[np.isfinite(array)]
