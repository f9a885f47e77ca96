"""What the controller and the workers of a run tell each other about epochs. Plain data.

A worker keeps its number, its member number, for life; its rank is its place among the members of an epoch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from raymoe.training.link_probe import LinkMeasurement
from raymoe.training.publication import Publication
from raymoe.training.regroup import FromSnapshots, Live

Phase = Literal["new", "preparing", "ready", "entering", "idle", "running", "broken", "failed"]


@dataclass(frozen=True)
class EpochOrder:
    """What a worker needs to be a rank of an epoch."""

    number: int
    rendezvous: str
    members: tuple[int, ...]
    """In the order of the ranks."""
    publication: Publication
    """What its ranks plan from at first."""
    source: Live | FromSnapshots | None = None
    """Where their state comes from; None: from files, as at the start of a run."""
    resumes: Path | None = None
    """The checkpoint that a start from files goes on from."""
    measures_links: bool = False
    """Whether its ranks measure the links between them before they begin."""


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker found as it entered an epoch."""

    nodes: tuple[int, ...]
    """Node of every rank."""
    links: LinkMeasurement | None
    """None where the order did not ask."""
    publication: Publication
    """What it plans from at first."""
    owners: np.ndarray
    """int64 [L, E], by rank."""
    next_step: int
    """The first step to do."""
    state_bytes: dict[str, int]
    """What it holds of parameters, gradients and optimizer, by part."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What entering took, by part."""


@dataclass(frozen=True)
class Outcome:
    """How a worker's part of an epoch ended."""

    kind: Literal["reached", "stopped", "broken", "failed"]
    """`reached` the step it was to go to; `stopped` before it because a publication said so; `broken`: a collective broke;
    `failed`: this worker itself could not go on."""
    next_step: int
    """The first step that it has not done."""
    error: str = ""
    """Type and text."""


@dataclass(frozen=True)
class WorkerState:
    """What a worker is doing and holds, as it says while a step runs."""

    member: int
    rank: int | None
    node: str
    pid: int
    phase: Phase
    is_leaving: bool
    """Its process was sent SIGTERM."""
    epoch: int
    next_step: int
    owned_experts: tuple[int, ...]
    """By layer."""
    state_bytes: dict[str, int]
    snapshot_bytes: dict[str, int]
    snapshot_step: int | None
    """The newest step whose snapshots all ranks hold, as far as it knows."""
    kernel_calls: dict[str, int]
    """By backend."""


@dataclass(frozen=True)
class RunState:
    """A run as its controller sees it."""

    run: str
    epoch: int
    """-1 before the first."""
    members: tuple[int, ...]
    """In the order of the ranks."""
    next_step: int
    """The first step that is not done."""
    reached: int
    """Steps done, as far as they were asked for."""
    least: int
    most: int
    """Workers that it goes on with, and that it has when there is room."""
    publication: Publication | None
    workers: tuple[WorkerState, ...]
    """What they last said."""
    waits_for: str | None
    """Why training stands still; None: it does not."""
    saved: str | None
    """The folder that the model was last written to."""
    failure: str | None
    """Why the run ended; None: it goes on."""
