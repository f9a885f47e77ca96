"""What a run's report says; ``report.py`` makes a page of it. L = MoE layers, E = experts a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from raymoe.telemetry.plots import Numbers
from raymoe.telemetry.spans import Span


@dataclass(frozen=True)
class Number:
    """One figure for the top of the page."""

    label: str

    value: float | int | str
    """A number is rounded to four digits; give text to choose the form, for example with its unit."""

    note: str = ""
    """Conditions or comparison, in a few words."""


@dataclass(frozen=True)
class Table:
    """Rows as a command prints them; columns are the keys, in order of first appearance."""

    title: str

    rows: Sequence[Mapping[str, Any]]

    note: str = ""


@dataclass(frozen=True)
class Training:
    """How a run went. Every curve is empty or as long as ``step``; None or NaN where a value is missing.

    Raises:
        ValueError: a curve of another length; names it.
    """

    step: Numbers

    loss: Numbers = ()
    """Cross-entropy, nats per token."""

    tokens_per_s: Numbers = ()

    step_s: Numbers = ()

    expert_imbalance: Numbers = ()
    """Busiest expert over the mean expert: what the router makes."""

    owner_imbalance: Numbers = ()
    """Busiest rank over the mean rank if every row went to its expert's owner: what plain expert parallelism would compute."""

    device_imbalance: Numbers = ()
    """Busiest rank over the mean rank as it was computed: what placement leaves."""

    exposed_s: Numbers = ()
    """Waiting for expert parameters and gradients, on the rank that waited longest."""

    planning_s: Numbers = ()
    """Planning and bookkeeping, on the slowest rank."""

    def __post_init__(self) -> None:
        for curve in fields(self):
            length = len(getattr(self, curve.name))
            if length not in (0, len(self.step)):
                raise ValueError(f"training.{curve.name} has {length} values for {len(self.step)} steps")


@dataclass(frozen=True)
class Event:
    """Something that does not happen in every step."""

    step: int
    """Before or in which it happened."""

    name: str

    text: str = ""


@dataclass(frozen=True)
class Timeline:
    """One step of one rank, span by span."""

    spans: Sequence[Span]

    note: str = ""
    """Which step and rank, and where more of it is."""


@dataclass(frozen=True)
class Score:
    """One line of an evaluation."""

    name: str

    bits_per_byte: float

    note: str = ""


@dataclass(frozen=True)
class Answer:
    """One served request. Prompt and text are shown as text, whatever they hold."""

    prompt: str

    text: str

    ttft_s: float | None = None

    tokens_per_s: float | None = None

    num_tokens: int | None = None


@dataclass(frozen=True)
class Serving:
    """What serving did: answers, and what the expert cache found, step by step.

    Raises:
        ValueError: hits, misses and steps of different lengths.
    """

    answers: Sequence[Answer] = ()

    step: Numbers = ()
    """Where each value of hits and misses stands, counted in ``unit``."""

    hits: Numbers = ()
    """Experts that were wanted since the step before, and found in the cache."""

    misses: Numbers = ()
    """Experts that were wanted since the step before, and had to be waited for."""

    unit: str = "forward pass"
    """What one step is: names the axis, for example "second"."""

    def __post_init__(self) -> None:
        if not len(self.step) == len(self.hits) == len(self.misses):
            raise ValueError(
                f"serving has {len(self.step)} steps, {len(self.hits)} hits and {len(self.misses)} misses: one each a step"
            )


@dataclass(frozen=True)
class Report:
    """All parts but the title are optional; a part that is missing leaves no trace on the page.

    Raises:
        ValueError: loads that are not [L, E] or are negative.
    """

    title: str

    subtitle: str = ""

    summary: Sequence[Number] = ()

    training: Training | None = None

    events: Sequence[Event] = ()
    """What happened, in order."""

    timeline: Timeline | None = None

    loads: np.ndarray | None = None
    """Routed rows of each expert over the run, [L, E]."""

    evaluation: Sequence[Score] = ()
    """The model first, then what it is measured against."""

    serving: Serving | None = None

    tables: Sequence[Table] = ()

    meta: Mapping[str, Any] = field(default_factory=dict)
    """As ``results.run_meta`` gives it, and whatever else belongs to the run."""

    def __post_init__(self) -> None:
        if self.loads is None:
            return
        loads = np.asarray(self.loads)
        if loads.ndim != 2 or loads.size == 0 or loads.min() < 0:
            raise ValueError(f"loads must be [L, E] and not negative, got shape {loads.shape}")
        object.__setattr__(self, "loads", loads)
