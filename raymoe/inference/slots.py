"""The memory of the expert cache: slots of one expert each, as many as a budget allows, given back when it shrinks."""

import mmap

import torch
from torch import Tensor

from raymoe.config import parse_memory
from raymoe.inference.pages import give_back


def slots_for(budget: str | int, num_experts: int, expert_bytes: int, total_bytes: int) -> int:
    """How many experts of `expert_bytes` fit a budget such as "50%" (of `total_bytes`) or "512MiB", at most all of them.

    Raises:
        ValueError: the budget is malformed, or holds not even one expert; names the smallest that does.
    """
    budget_bytes = parse_memory(budget, total_bytes)
    if budget_bytes < expert_bytes:
        # rounded up to three digits, so that the share named here is itself enough
        share = -(-100_000 * expert_bytes // total_bytes) / 1000
        raise ValueError(
            f"expert_memory: {budget} is {budget_bytes} bytes, less than one expert. The smallest budget that works is "
            f"{expert_bytes} bytes, or {share:g}% of the {total_bytes} bytes that all {num_experts} experts take as they are."
        )
    return min(budget_bytes // expert_bytes, num_experts)


class SlotPool:
    """Numbers of free slots, and their memory. Not locked: whoever owns it is.

    On a CPU there is address space for `most` slots, and memory for those that have been used and not given back since; on a
    GPU there is memory for `now` slots from the beginning.
    """

    def __init__(self, most: int, now: int, numel: int, dtype: torch.dtype, device: torch.device):
        """Reserves slots of `numel` elements each."""
        self._most = most if device.type == "cpu" else now
        self._stride_bytes = numel * dtype.itemsize
        if device.type == "cpu":
            memory = mmap.mmap(-1, self._most * self._stride_bytes)
            self.tensor: Tensor = torch.frombuffer(memory, dtype=dtype).view(self._most, numel)
        else:
            self.tensor = torch.zeros(self._most, numel, dtype=dtype, device=device)
        self._free = list(range(self._most - 1, -1, -1))
        self.limit = now
        """Slots that may be in use."""

    @classmethod
    def of(cls, tensor: Tensor) -> "SlotPool":
        """Slots of memory that is there and stays: all of them are taken, for good."""
        pool = cls.__new__(cls)
        pool.tensor, pool._most, pool.limit = tensor, len(tensor), len(tensor)
        pool._stride_bytes, pool._free = tensor.stride(0) * tensor.itemsize, []
        return pool

    @property
    def in_use(self) -> int:
        """Slots that are taken."""
        return self._most - len(self._free)

    def take(self) -> int | None:
        """A free slot; None if the limit is reached."""
        return self._free.pop() if self.in_use < self.limit else None

    def give(self, slot: int) -> None:
        """Frees a slot; above the limit its memory goes as well."""
        if self.in_use > self.limit:
            self._discard(slot)
        self._free.append(slot)

    def set_limit(self, limit: int) -> None:
        """Changes how many may be in use; those above it go as they are given back.

        Raises:
            ValueError: more than there is memory for.
        """
        if limit > self._most:
            raise ValueError(
                f"expert_memory: {limit} slots are more than the {self._most} that the engine was started with; on a GPU the "
                "budget can only shrink"
            )
        if limit < self.limit:
            for slot in self._free:
                self._discard(slot)
        self.limit = limit

    def _discard(self, slot: int) -> None:
        if self.tensor.device.type == "cpu":
            give_back(self.tensor.data_ptr() + slot * self._stride_bytes, self._stride_bytes)
