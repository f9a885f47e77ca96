"""Some of a model's experts, held in memory for others: read in the background, given away, computed with. No Ray.

S rows, H hidden size, L MoE layers, E experts of the layer with the most.
"""

import logging
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raymoe.config import check_fits, parse_memory
from raymoe.config.precision import Precision
from raymoe.inference.eviction import Key
from raymoe.inference.expert_form import ExpertForm
from raymoe.inference.remote import Parcel, bytes_of
from raymoe.inference.shared_slots import SharedSlots
from raymoe.inference.slots_handle import SlotsHandle, slot_bytes
from raymoe.inference.tiers import ExpertSource, NotHeld
from raymoe.kernels import expert_rows, plan
from raymoe.models import MoELayer

_log = logging.getLogger(__name__)

_GRACE_S = 1.0
"""What was given is copied by the transport only after `give` has returned: so long its slot stays as it is."""
_RETRY_S = 5.0
_MEASURED_ROWS = 8
_STEPS = 4
"""In so many steps at most others take the place of what is held: not all goes before the first has come."""


class Computed(NamedTuple):
    """Rows as they go back."""

    rows: np.ndarray
    """uint8: [S, H] in the dtype that they came in."""
    seconds: float
    """That the computation took."""


class Holding:
    """Holds what it is told to, hottest first, and what else there is room for. Safe to use from several threads.

    In host memory the experts can be mapped by engines on the node (`handle`); in a GPU's they cannot.
    """

    def __init__(
        self,
        layers: Sequence[MoELayer],
        source: ExpertSource,
        *,
        memory: str | int,
        dtype: torch.dtype,
        precision: Precision | None = None,
        device: torch.device | str = "cpu",
    ):
        """Allocates the memory and starts the thread that reads experts into it.

        Args:
            source: the tier below, the checkpoint's files.
            memory: a share of what all experts take, or bytes, see `raymoe.config.parse_memory`.
            dtype: of the computation.
            precision: that experts come in, default native; held as engines hold them (`ExpertForm`), so either can compute.

        Raises:
            ValueError: the memory does not hold one expert, or is more than the process may have.
        """
        self.layers, self.device = list(layers), torch.device(device)
        self._source, self._dtype = source, dtype
        form = ExpertForm(layers, precision or Precision(), dtype)
        self._numel, self._num_experts = form.numel, form.num_experts
        stride_bytes = slot_bytes(self._numel, form.dtype.itemsize)
        num_slots = self._slots_for(memory, stride_bytes)
        self._shared: SharedSlots | None = None
        if self.device.type == "cpu":
            check_fits(f"expert_hosts.memory: {memory}", num_slots * stride_bytes)
            self._shared = SharedSlots.create(num_slots, self._numel, self._num_experts, form.dtype)
            self._pool = self._shared.pool
        else:
            self._pool = torch.zeros(
                num_slots, stride_bytes // form.dtype.itemsize, dtype=form.dtype, device=self.device
            )
        self._weights = form.weights(self._pool)
        self.num_slots = num_slots
        self._changed = threading.Condition()
        self._wanted: dict[Key, None] = {}
        self._slot: dict[Key, int] = {}
        self._crc32: dict[Key, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._pins: dict[int, int] = {}
        self._given_s: dict[int, float] = {}
        self._retry_s: dict[Key, float] = {}
        self.changes = 0
        """Counts up whenever it holds something else than before."""
        self._counts = {"given": 0, "given_bytes": 0, "computed_rows": 0, "read_bytes": 0, "failed_reads": 0}
        self._compute_s = 0.0
        self._is_closed = False
        self._thread = threading.Thread(target=self._fill, name="expert-host-fill", daemon=True)
        self._thread.start()

    @property
    def handle(self) -> SlotsHandle | None:
        """For engines on this node; None in a GPU's memory."""
        return None if self._shared is None else self._shared.handle

    @property
    def call_bytes(self) -> tuple[int, int]:
        """That one row takes there and back, and that the largest expert takes: what calls carry."""
        width = max(self._width(layer) for layer in range(len(self.layers)))
        return 2 * width * self._dtype.itemsize, max(self._numel) * self._pool.itemsize

    @property
    def num_experts(self) -> list[int]:
        """Of each MoE layer."""
        return list(self._num_experts)

    def hold(self, keys: Iterable[Key]) -> None:
        """Replaces what is to be held: (layer, expert), hottest first; those beyond the memory are left out.

        Others stay as long as nobody needs their room.

        Raises:
            ValueError: there is no such expert.
        """
        wanted = dict.fromkeys(list(dict.fromkeys(keys))[: self.num_slots])
        for layer, expert in wanted:
            if not (0 <= layer < len(self._numel) and 0 <= expert < self._num_experts[layer]):
                raise ValueError(f"there is no expert {expert} in MoE layer {layer}")
        with self._changed:
            self._wanted, self._retry_s = wanted, {}
            self._changed.notify_all()

    def held(self) -> np.ndarray:
        """bool [L, E]: what can be asked for now."""
        found = np.zeros((len(self._numel), max(self._num_experts)), dtype=bool)
        with self._changed:
            keys = list(self._crc32)
        if keys:
            found[tuple(zip(*keys, strict=True))] = True
        return found

    @property
    def is_settled(self) -> bool:
        """Whether all that is wanted is held."""
        with self._changed:
            return self._wanted.keys() <= self._crc32.keys()

    def give(self, keys: Sequence[Key]) -> list[Parcel | None]:
        """Experts in the order asked for; None for those that are not held. To be copied soon: see `_GRACE_S`."""
        parcels: list[Parcel | None] = []
        with self._changed:
            for key in keys:
                if key not in self._crc32:
                    parcels.append(None)
                    continue
                slot = self._slot[key]
                self._given_s[slot] = time.monotonic()
                data = bytes_of(self._pool[slot, : self._numel[key[0]]])
                # what is given away must not be written by who gets it
                data.flags.writeable = False
                self._counts["given"] += 1
                self._counts["given_bytes"] += data.nbytes
                parcels.append(Parcel(data, self._crc32[key]))
        return parcels

    def compute(
        self, layer: int, rows: np.ndarray, dtype: torch.dtype, experts: Sequence[int], counts: Sequence[int]
    ) -> Computed:
        """Rows through experts of one layer, with the kernel that engines use, so that nobody's result changes.

        Args:
            rows: uint8, [S, H] of `dtype`: the first counts[0] for experts[0], and so on.
            experts: distinct, ascending.

        Raises:
            NotHeld: one of them is not here.
        """
        keys = [(layer, expert) for expert in experts]
        with self._changed:
            if missing := [key for key in keys if key not in self._crc32]:
                raise NotHeld(f"this host does not hold expert {missing[0][1]} of MoE layer {layer}")
            slots = [self._slot[key] for key in keys]
            for slot in slots:
                self._pins[slot] = self._pins.get(slot, 0) + 1
        try:
            began_s = time.perf_counter()
            out = self._rows(layer, torch.from_numpy(rows.copy()).view(dtype).to(self.device), experts, slots, counts)
            answer = bytes_of(out)
            seconds = time.perf_counter() - began_s
        finally:
            with self._changed:
                for slot in slots:
                    self._pins[slot] -= 1
                    if not self._pins[slot]:
                        del self._pins[slot]
        with self._changed:
            self._counts["computed_rows"] += sum(counts)
            self._compute_s += seconds
        return Computed(answer, seconds)

    def compute_speed(self) -> tuple[float, float] | None:
        """(seconds for an expert, seconds for each of its rows), as measured now; None while nothing is held."""
        key = next(iter(self._crc32), None)
        if key is None:
            return None
        layer, expert = key
        width = self._width(layer)
        times = []
        for count in (1, 1 + _MEASURED_ROWS):
            rows = bytes_of(torch.zeros(count, width, dtype=self._dtype))
            tries = [self.compute(layer, rows, self._dtype, [expert], [count]).seconds for _ in range(4)]
            times.append(min(tries))
        return times[0], max(0.0, times[1] - times[0]) / _MEASURED_ROWS

    def facts(self) -> dict[str, Any]:
        """Plain values for statistics."""
        with self._changed:
            return {
                "slots": self.num_slots,
                "wanted": len(self._wanted),
                "held": len(self._crc32),
                "bytes": self.num_slots * self._pool.stride(0) * self._pool.itemsize,
                "device": str(self.device),
                **self._counts,
                "compute_s": round(self._compute_s, 6),
            }

    def close(self) -> None:
        """Ends the thread and lets the memory go. Safe to call again."""
        with self._changed:
            self._is_closed = True
            self._crc32 = {}
            self._changed.notify_all()
        self._thread.join()
        self._weights = []
        self._pool = torch.empty(0, 0)
        if self._shared is not None:
            self._shared.close()

    def _width(self, layer: int) -> int:
        """Of a layer's rows."""
        down = self._weights[layer].down
        return down.shape[2 if self.layers[layer].spec.is_transposed else 1]

    def _slots_for(self, memory: str | int, stride_bytes: int) -> int:
        total = sum(self._num_experts)
        budget_bytes = parse_memory(memory, total * stride_bytes)
        if budget_bytes < stride_bytes:
            raise ValueError(
                f"expert_hosts.memory: {memory} is {budget_bytes} bytes, less than one expert takes; give at least {stride_bytes}"
            )
        return min(budget_bytes // stride_bytes, total)

    def _rows(
        self, layer: int, rows: Tensor, experts: Sequence[int], slots: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        moe = self.layers[layer]
        gate_up, down, biases, scales = self._weights[layer]
        # each row is a token with one choice; they come sorted, so the plan leaves them where they are
        chosen = torch.repeat_interleave(torch.tensor(experts), torch.tensor(counts)).to(self.device)
        routed = plan(chosen[:, None], moe.num_experts)
        hidden = rows.view(sum(counts), -1)
        out = torch.empty_like(hidden)
        expert_rows(
            hidden, gate_up, down, routed, experts, slots=slots, out=out, spec=moe.spec, biases=biases, scales=scales
        )
        return out

    # filling

    def _fill(self) -> None:
        while True:
            with self._changed:
                while (job := self._begin()) is None and not self._is_closed:
                    self._changed.wait(timeout=self._pause_s())
                if job is None:
                    return
            self._read(*job)

    def _pause_s(self) -> float | None:
        """How long there is nothing to do unless somebody calls; None: for ever."""
        return None if self._wanted.keys() <= self._crc32.keys() else _GRACE_S / 4

    def _begin(self) -> tuple[Key, int] | None:
        now_s = time.monotonic()
        key = next((k for k in self._wanted if k not in self._slot and self._retry_s.get(k, 0.0) <= now_s), None)
        if key is None or self._is_closed:
            return None
        slot = next((slot for slot in self._free if self._is_idle(slot, now_s)), None)
        if slot is None:
            if not self._free:
                self._make_room()
                slot = next((slot for slot in self._free if self._is_idle(slot, now_s)), None)
            if slot is None:
                return None
        self._free.remove(slot)
        self._slot[key] = slot
        return key, slot

    def _make_room(self) -> None:
        """Gives up some that are not wanted, for some that are: from now on they are not given, else they might never be idle."""
        num_missing = sum(key not in self._slot for key in self._wanted)
        others = sorted(
            (key for key in self._crc32 if key not in self._wanted),
            key=lambda key: self._given_s.get(self._slot[key], 0.0),
        )
        for key in others[: min(num_missing, max(1, self.num_slots // _STEPS))]:
            self._free.append(self._slot.pop(key))
            del self._crc32[key]
            self.changes += 1

    def _is_idle(self, slot: int, now_s: float) -> bool:
        return slot not in self._pins and now_s - self._given_s.get(slot, -_GRACE_S) >= _GRACE_S

    def _read(self, key: Key, slot: int) -> None:
        layer, expert = key
        memory = self._shared.clear(slot) if self._shared is not None else self._pool[slot]
        part = memory[: self._numel[layer]]
        try:
            # padding is part of what is summed and given
            part.zero_()
            moved_bytes = self._source.read(layer, expert, part)
        except Exception as error:
            _log.warning("expert host: expert %d of MoE layer %d cannot be read: %s", expert, layer, error)
            with self._changed:
                del self._slot[key]
                self._free.append(slot)
                self._retry_s[key] = time.monotonic() + _RETRY_S
                self._counts["failed_reads"] += 1
            return
        crc32 = zlib.crc32(bytes_of(part).data)
        if self._shared is not None:
            self._shared.publish(slot, key)
        with self._changed:
            self._crc32[key] = crc32
            self.changes += 1
            self._counts["read_bytes"] += moved_bytes
