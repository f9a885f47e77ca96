"""Slots of one expert each in shared memory: filled and refilled by one process, read meanwhile by others on its node.

Unlike an arena (`raymoe.inference.arena`), which holds the same experts for good, its owner may change who is in it at any time.
"""

import mmap
import os
import warnings
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from raymoe.inference.eviction import Key
from raymoe.inference.memory_file import map_existing, map_new
from raymoe.inference.slots_handle import SlotsHandle
from raymoe.inference.tiers import NotHeld

_WHAT = "shared-experts"


class SharedSlots:
    """An `ExpertSource`. One thread of the owner writes; any number of threads and processes read at the same time.

    A reader never waits. It looks at the slot's version before and after it copies, as with a seqlock, and finds the expert not
    held if the owner has touched the slot in between.
    """

    def __init__(self, handle: SlotsHandle, memory: mmap.mmap, number: int | None):
        """For `create` and `attach`."""
        self.handle = handle
        self._number = number
        self._memory: mmap.mmap | None = memory
        table = np.frombuffer(memory, dtype=np.int64, count=handle.num_slots * 2).reshape(-1, 2)
        self._version, self._code = table[:, 0], table[:, 1]
        with warnings.catch_warnings():
            # torch cannot know a read-only tensor, and says so
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            rest = torch.frombuffer(memory, dtype=torch.uint8, offset=handle.table_bytes)
        self.pool: Tensor = rest.view(getattr(torch, handle.dtype)).view(handle.num_slots, -1)
        """[slots, at least numel of the largest expert]; for others than the owner to be read through `read` only."""

    @classmethod
    def create(cls, num_slots: int, numel: list[int], num_experts: list[int], dtype: torch.dtype) -> "SharedSlots":
        """Allocates empty slots.

        Args:
            numel: elements of one expert, for each MoE layer.
            num_experts: of each MoE layer.

        Raises:
            ArenaError: there is not the memory, or the system has no such files.
        """
        name = str(dtype).removeprefix("torch.")
        sizes = SlotsHandle(os.getpid(), -1, -1, num_slots, tuple(numel), max(num_experts), name, dtype.itemsize)
        number, memory = map_new(_WHAT, sizes.num_bytes)
        handle = replace(sizes, number=number, inode=os.fstat(number).st_ino)
        slots = cls(handle, memory, number)
        slots._code[:] = -1
        return slots

    @classmethod
    def attach(cls, handle: SlotsHandle) -> "SharedSlots":
        """Maps another process's slots, to read only.

        Raises:
            ArenaError: its owner has ended, or is another user's or in another container.
        """
        memory = map_existing(_WHAT, handle.pid, handle.number, handle.inode, handle.num_bytes)
        return cls(handle, memory, None)

    def __enter__(self) -> "SharedSlots":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def clear(self, slot: int) -> Tensor:
        """Of the owner: nobody finds an expert there from now on; returns the slot's memory, to be written."""
        self._code[slot] = -1
        self._version[slot] += 1
        return self.pool[slot]

    def publish(self, slot: int, key: Key) -> None:
        """Of the owner: what has been written there is that expert."""
        self._version[slot] += 1
        self._code[slot] = key[0] * self.handle.most_experts + key[1]

    def holds(self, layer: int, expert: int) -> bool:
        """Whether it is there at this moment."""
        return bool((self._code == layer * self.handle.most_experts + expert).any())

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """See `ExpertSource.read`."""
        code = layer * self.handle.most_experts + expert
        found = np.flatnonzero(self._code == code)
        if not found.size:
            raise NotHeld(f"no slot holds expert {expert} of MoE layer {layer}")
        slot = int(found[0])
        before = self._version[slot]
        part = self.pool[slot, : self.handle.numel[layer]]
        out.copy_(part)
        if self._code[slot] != code or self._version[slot] != before:
            raise NotHeld(f"expert {expert} of MoE layer {layer} left its slot while it was read")
        return part.nbytes

    def close(self) -> None:
        """Lets the memory go, unless someone still maps it or has a view; of the owner: nobody can attach any more."""
        number, self._number = self._number, None
        if number is not None:
            os.close(number)
        self.pool = torch.empty(0, 0)
        self._version = self._code = np.zeros(0, dtype=np.int64)
        self._memory = None

    def __del__(self) -> None:
        if getattr(self, "_number", None) is not None:
            self.close()
