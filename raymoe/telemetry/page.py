"""The pieces that raymoe's HTML pages are made of: no network, no script, nothing beside the one file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from numbers import Integral, Real
from typing import Any

from raymoe.telemetry import plots
from raymoe.telemetry.parts import Table
from raymoe.telemetry.style import CSS

# pages show text that a model or a user wrote: it may hold anything, and must never fetch or run anything
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_FIGURE_HEIGHT_IN = 3.0


def page(title: str, subtitle: str, sections: Iterable[str], own_css: str = "") -> str:
    """A whole page. ``subtitle`` and ``sections`` are HTML, escaped by whoever made them; the title is text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}{own_css}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{subtitle}</header>\n"
        f"<main>\n{''.join(sections)}</main>\n<footer>Written by raymoe.</footer>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A part of the page with its title; nothing without a body."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def grid(items: Iterable[str]) -> str:
    """Cards side by side."""
    cards = "".join(items)
    return f'<div class="grid">{cards}</div>' if cards else ""


def figure(title: str, caption: str, draw: plots.Draw, height_in: float = _FIGURE_HEIGHT_IN) -> str:
    """A picture, drawn once for light and once for dark."""
    light, dark = (plots.data_uri(draw, theme, height_in) for theme in (plots.LIGHT, plots.DARK))
    return (
        f'<figure class="card"><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(f"{title}. {caption}")}"></picture>'
        f"<figcaption><b>{escape(title)}</b>{escape(caption)}</figcaption></figure>"
    )


def table(shown: Table) -> str:
    """A table with its note; nothing without rows."""
    if not shown.rows:
        return ""
    note = f'<p class="note">{escape(shown.note)}</p>' if shown.note else ""
    return f'{note}<div class="card scroll">{table_rows(shown.rows)}</div>'


def table_rows(rows: Sequence[Mapping[str, Any]], marked: int | None = None) -> str:
    """Rows as a table; columns that say nothing are left out. ``marked`` is the row to stand out."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    kinds = {
        column: ' class="number"' if all(_is_number(row.get(column, 0)) for row in rows) else "" for column in columns
    }
    head = "".join(f"<th{kinds[column]}>{escape(str(column))}</th>" for column in columns)
    body = "".join(
        ('<tr class="first">' if i == marked else "<tr>")
        + "".join(f"<td{kinds[column]}>{said(row.get(column))}</td>" for column in columns)
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def meta_list(meta: Mapping[str, Any]) -> str:
    """Names and what they are."""
    if not meta:
        return ""
    entries = "".join(f"<dt>{escape(str(key))}</dt><dd>{_described(value)}</dd>" for key, value in meta.items())
    return f'<div class="card"><dl>{entries}</dl></div>'


def said(value: Any) -> str:
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


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(key))} {said(item)}" for key, item in value.items())
    return said(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))
