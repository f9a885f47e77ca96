"""What was under way when, within a step: read and written as JSON lines, a span a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from raymoe.telemetry.files import write_text


@dataclass(frozen=True)
class Span:
    """Something that took time."""

    name: str
    """Such as attention, experts, gather."""

    layer: int | None
    """The MoE layer that it was for, if it was for one."""

    start_ns: int
    """On a clock that all spans of a process share."""

    end_ns: int

    lane: str
    """What could go on side by side: ``computation``, or a kind of transfer. Spans of a lane may lie in each other."""


def write_spans(path: str | os.PathLike[str], spans: Iterable[Span]) -> None:
    """Writes them whole or not at all."""
    write_text(path, "".join(json.dumps(asdict(span)) + "\n" for span in spans))


def read_spans(path: str | os.PathLike[str]) -> list[Span]:
    """
    Raises:
        ValueError: a line that is no span; names file and line.
    """
    spans = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                spans.append(Span(**json.loads(line)))
            except (ValueError, TypeError):
                raise ValueError(f"{os.fspath(path)}, line {number}: not a span of a timeline") from None
    return spans
