"""What expert hosts say of themselves, and what engines are told of them. L MoE layers, E experts of the layer with the most."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ray.actor import ActorHandle

from raymoe.inference.slots_handle import SlotsHandle


class HostState(NamedTuple):
    """What a host says of itself."""

    pid: int
    node: str
    """Its id, in hex."""
    handle: SlotsHandle | None
    num_experts: list[int]
    """Of each MoE layer of the model."""
    num_slots: int
    changes: int
    held: np.ndarray | None
    """bool [L, E]; None: as at the number of changes that the caller knows."""
    speed: tuple[float, float] | None
    """Seconds to compute with an expert, and for each of its rows."""
    call_bytes: tuple[int, int]
    """Of a row there and back, and of the largest expert."""
    is_settled: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class HostEntry:
    """One host, as engines need to know it."""

    number: int
    node: str
    actor: ActorHandle
    handle: SlotsHandle | None
    held: np.ndarray
    """bool [L, E]."""
    speed: tuple[float, float] | None
    """Seconds to compute with an expert, and for each of its rows."""
    call_bytes: tuple[int, int]
    """See `HostState`."""


@dataclass(frozen=True)
class Directory:
    """Who holds what, as of `version`. One that is out of date costs a detour, nothing else."""

    version: int
    hosts: tuple[HostEntry, ...]
