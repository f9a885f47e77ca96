"""A run's report as one HTML file: no network, no script, nothing beside it. L = MoE layers, E = experts a layer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from numbers import Integral, Real
from typing import Any

import numpy as np

from raymoe.telemetry import plots
from raymoe.telemetry.files import write_text
from raymoe.telemetry.parts import Answer, Number, Report, Score, Serving, Table, Training
from raymoe.telemetry.style import CSS

# the page shows text that a model wrote: it may hold anything, and must never fetch or run anything
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_FIGURE_HEIGHT_IN = 3.0


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Writes the report, whole or not at all. Figures, style and numbers are all in the one file."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page as text. Everything that comes from the run is escaped."""
    sections = [
        _section("In short", _summary(report.summary)),
        _section("Training", _training(report.training)),
        _section("Where the tokens go", _loads(report.loads)),
        _section("Evaluation", _evaluation(report.evaluation)),
        _section("Serving", _serving(report.serving)),
        *(_section(table.title, _table(table)) for table in report.tables),
        _section("About this run", _meta(report.meta)),
    ]
    subtitle = f"<p>{escape(report.subtitle)}</p>" if report.subtitle else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(report.title)}</h1>{subtitle}</header>\n"
        f"<main>\n{''.join(sections)}</main>\n<footer>Written by raymoe.</footer>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def _grid(items: Iterable[str]) -> str:
    cards = "".join(items)
    return f'<div class="grid">{cards}</div>' if cards else ""


def _figure(title: str, caption: str, draw: plots.Draw, height_in: float = _FIGURE_HEIGHT_IN) -> str:
    light, dark = (plots.data_uri(draw, theme, height_in) for theme in (plots.LIGHT, plots.DARK))
    return (
        f'<figure class="card"><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(f"{title}. {caption}")}"></picture>'
        f"<figcaption><b>{escape(title)}</b>{escape(caption)}</figcaption></figure>"
    )


def _summary(numbers: Sequence[Number]) -> str:
    cards = "".join(
        f'<div><div class="label">{escape(number.label)}</div><div class="value">{_said(number.value)}</div>'
        f'<div class="note">{escape(number.note)}</div></div>'
        for number in numbers
    )
    return f'<div class="numbers">{cards}</div>' if cards else ""


def _training(training: Training | None) -> str:
    if training is None or len(training.step) == 0:
        return ""
    return _grid([*_curves(training), *_imbalance(training)])


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
                f"Median {_said(np.median(known))}."
                if from_zero
                else f"First {_said(known[0])}, last {_said(known[-1])}."
            )
            if len(values) >= plots.SMOOTHED_FROM:
                caption += " Bold: running mean."
            draw = plots.lines(
                {title: values}, training.step, x_label="step", y_label=y_label, from_zero=from_zero, is_smoothed=True
            )
            yield _figure(title, caption, draw)


def _imbalance(training: Training) -> Iterable[str]:
    curves = {
        "experts, as routed": training.expert_imbalance,
        "ranks, rows at their owners": training.owner_imbalance,
        "ranks, as placed": training.device_imbalance,
    }
    curves = {label: values for label, values in curves.items() if _known(values).size}
    if curves:
        means = ", ".join(f"{label} {_said(_known(values).mean())}" for label, values in curves.items())
        caption = f"Busiest over mean; 1 is perfectly even. Over the run: {means}."
        draw = plots.lines(
            curves, training.step, x_label="step", y_label="max / mean", is_smoothed=True, even_at=1, from_zero=True
        )
        yield _figure("Imbalance", caption, draw, 3.4)


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
        f"{_said(100 * shares[layer, expert])} % of its layer's rows, {_said(ratios[layer])} times an even share."
    )
    draw = plots.heat_map(100 * shares, ratios)
    return _figure("Expert load", caption, draw, plots.heat_map_height(loads.shape[0]))


def _evaluation(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    rows = [{"": s.name, "bits per byte": s.bits_per_byte, "note": s.note} for s in scores]
    table = _rows(rows, marked=0)
    drawn = [s for s in scores if math.isfinite(s.bits_per_byte)]
    figures = []
    if drawn:
        draw = plots.bars(
            [s.name for s in drawn], [s.bits_per_byte for s in drawn], x_label="bits per byte (lower is better)"
        )
        figures.append(_figure("Held-out text", "Lower is better.", draw, 1.1 + 0.38 * len(drawn)))
    return _grid([*figures, f'<div class="card scroll">{table}</div>'])


def _serving(serving: Serving | None) -> str:
    if serving is None:
        return ""
    return _grid(_cache(serving)) + "".join(
        ["<h3>Answers</h3>", _grid(map(_answer, serving.answers))] * bool(serving.answers)
    )


def _cache(serving: Serving) -> Iterable[str]:
    hits, misses = np.nansum(plots.as_floats(serving.hits)), np.nansum(plots.as_floats(serving.misses))
    if hits + misses > 0:
        caption = (
            f"{_said(100 * hits / (hits + misses))} % of {_said(int(hits + misses))} wanted experts were in the cache."
        )
        draw = plots.stacked(
            {"hits": serving.hits, "misses": serving.misses},
            serving.step,
            x_label=serving.unit,
            y_label=f"experts wanted per {serving.unit}",
        )
        yield _figure("Expert cache", caption, draw)


def _answer(answer: Answer) -> str:
    facts = [
        ("first token after {} ms", None if answer.ttft_s is None else 1000 * answer.ttft_s),
        ("{} tokens/s", answer.tokens_per_s),
        ("{} tokens", answer.num_tokens),
    ]
    said = " &middot; ".join(form.format(_said(value)) for form, value in facts if value is not None)
    return (
        f'<div class="card answer"><p class="prompt">{escape(answer.prompt)}</p>'
        f'<p class="text">{escape(answer.text)}</p><p class="facts">{said}</p></div>'
    )


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f'{note}<div class="card scroll">{_rows(table.rows)}</div>'


def _rows(rows: Sequence[Mapping[str, Any]], marked: int | None = None) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    kinds = {
        column: ' class="number"' if all(_is_number(row.get(column, 0)) for row in rows) else "" for column in columns
    }
    head = "".join(f"<th{kinds[column]}>{escape(str(column))}</th>" for column in columns)
    body = "".join(
        ('<tr class="first">' if i == marked else "<tr>")
        + "".join(f"<td{kinds[column]}>{_said(row.get(column))}</td>" for column in columns)
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _meta(meta: Mapping[str, Any]) -> str:
    if not meta:
        return ""
    entries = "".join(f"<dt>{escape(str(key))}</dt><dd>{_described(value)}</dd>" for key, value in meta.items())
    return f'<div class="card"><dl>{entries}</dl></div>'


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(key))} {_said(item)}" for key, item in value.items())
    return _said(value)


def _known(values: plots.Numbers) -> np.ndarray:
    array = plots.as_floats(values)
    return array[np.isfinite(array)]


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def _said(value: Any) -> str:
    """A value as the page shows it: four digits that matter, thousands apart, a dash for what is not known."""
    if value is None or (isinstance(value, Real) and not math.isfinite(value)):
        return "&ndash;"
    if isinstance(value, bool) or not isinstance(value, Real):
        return escape(str(value))
    if isinstance(value, Integral):
        return f"{int(value):,}"
    number = float(value)
    if number and (abs(number) < 1e-4 or abs(number) >= 1e15):
        return f"{number:.3e}"
    digits = max(0, 3 - math.floor(math.log10(abs(number)))) if number else 0
    text = f"{number:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
