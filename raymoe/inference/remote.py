"""Experts that other processes hold: what an engine asks of them, and the tiers that they are.

H hidden size.
"""

import threading
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from raymoe.inference.memory_file import ArenaError
from raymoe.inference.shared_slots import SharedSlots
from raymoe.inference.slots_handle import SlotsHandle
from raymoe.inference.tier_rate import TierRate
from raymoe.inference.tiers import NotHeld


class Parcel(NamedTuple):
    """One expert on its way."""

    data: np.ndarray
    """uint8 [bytes of the flat expert]; read only."""
    crc32: int
    """Of `data`, as its holder computed it when it had read the expert."""


class CorruptExpert(ValueError):
    """What arrived is not what was sent."""


class HostSpeed(NamedTuple):
    """What sending rows to a host costs."""

    way: TierRate
    """A call and its answer with n bytes in both together."""
    expert_s: float
    """Computing with an expert, whatever the number of rows."""
    row_s: float
    """For each row more."""


class Sent(Protocol):
    """Rows that a host computes."""

    def wait(self) -> Tensor:
        """The rows [n, H] that came back, in the order and dtype of those that went.

        Raises:
            NotHeld: the host has one of the experts no more.
            Exception: anything else is a failure.
        """
        ...


class RemoteExperts(Protocol):
    """The hosts of a model's experts, seen from an engine. Safe to use from several threads; implemented in `raymoe.actors`."""

    def on_node(self) -> Sequence[SlotsHandle]:
        """The shared memory of those hosts that are on the engine's node."""
        ...

    def give(self, layer: int, expert: int) -> Parcel:
        """One expert, from a host on whatever node.

        Raises:
            NotHeld: by what is known, no host has it.
            Exception: all hosts that should have it failed.
        """
        ...

    def holder(self, layer: int, expert: int) -> int | None:
        """The number of a host that has it, by what is known; costs no call."""
        ...

    def send(self, host: int, layer: int, rows: Tensor, experts: Sequence[int], counts: Sequence[int]) -> Sent:
        """Has a host compute rows [n, H]: the first counts[0] with experts[0], and so on. Does not wait.

        Raises:
            Exception: the host cannot be reached.
        """
        ...

    def speed(self, host: int) -> HostSpeed | None:
        """As measured; None: not yet."""
        ...

    def facts(self) -> dict[str, Any]:
        """For an engine's statistics: plain values."""
        ...

    def close(self) -> None:
        """Lets the hosts go on without us."""
        ...


class HostTier:
    """The hosts on all nodes as an `ExpertSource`. Every expert that arrives is compared with its checksum."""

    def __init__(self, remote: RemoteExperts, numel: Sequence[int], dtype: torch.dtype):
        """`numel`: elements of one expert, for each MoE layer; `dtype`: that hosts hold them in."""
        self._remote, self._numel, self._dtype = remote, list(numel), dtype

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """See `ExpertSource.read`."""
        data, crc32 = self._remote.give(layer, expert)
        wanted_bytes = self._numel[layer] * self._dtype.itemsize
        if data.nbytes != wanted_bytes:
            raise CorruptExpert(
                f"expert {expert} of MoE layer {layer} came with {data.nbytes} bytes, but has {wanted_bytes}"
            )
        found = zlib.crc32(data.data)
        if found != crc32:
            raise CorruptExpert(
                f"expert {expert} of MoE layer {layer} arrived with checksum {found:08x}, sent was {crc32:08x}"
            )
        copy_bytes(data, self._dtype, out)
        return wanted_bytes

    def facts(self) -> dict[str, Any]:
        """What hosts there are, and what they were asked."""
        return self._remote.facts()


class NodeTier:
    """The memory of the hosts on this node as an `ExpertSource`: a copy from one piece of memory to another, without a call."""

    def __init__(self, remote: RemoteExperts):
        self._remote = remote
        self._lock = threading.Lock()
        self._mapped: dict[SlotsHandle, SharedSlots | None] = {}

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """See `ExpertSource.read`."""
        for slots in self._slots():
            try:
                return slots.read(layer, expert, out)
            except NotHeld:
                continue
        raise NotHeld(f"no host on this node holds expert {expert} of MoE layer {layer}")

    def holds(self, layer: int, expert: int) -> bool:
        """Whether a read would find it."""
        return any(slots.holds(layer, expert) for slots in self._slots())

    def facts(self) -> dict[str, Any]:
        """How many hosts' memory is mapped."""
        return {"mapped_hosts": len(self._slots())}

    def close(self) -> None:
        """Lets go of the hosts' memory."""
        with self._lock:
            for slots in self._mapped.values():
                if slots is not None:
                    slots.close()
            self._mapped = {}

    def _slots(self) -> list[SharedSlots]:
        handles = self._remote.on_node()
        with self._lock:
            if self._mapped.keys() != set(handles):
                # whoever reads one of those that go keeps its memory until it is done
                self._mapped = {handle: self._mapped.get(handle) for handle in handles if handle in self._mapped} | {
                    handle: _attached(handle) for handle in handles if handle not in self._mapped
                }
            return [slots for slots in self._mapped.values() if slots is not None]


def _attached(handle: SlotsHandle) -> SharedSlots | None:
    """None where memory cannot be shared (another container, a host that has just ended): the host is then asked."""
    try:
        return SharedSlots.attach(handle)
    except ArenaError:
        return None


def bytes_of(tensor: Tensor) -> np.ndarray:
    """uint8 [bytes], without a copy if `tensor` is contiguous on the CPU: numpy has no bfloat16."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy(force=True)


def copy_bytes(data: np.ndarray, dtype: torch.dtype, out: Tensor) -> None:
    """Fills the flat `out` with uint8 [bytes], read only or not, which are elements of `dtype`; cast to that of `out`."""
    if out.dtype == dtype and out.device.type == "cpu":
        np.copyto(out.view(torch.uint8).numpy(), data)
    else:
        # torch knows no memory that must not be written
        out.copy_(torch.from_numpy(data.copy()).view(dtype))
