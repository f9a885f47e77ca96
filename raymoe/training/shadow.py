"""A rank's state in host memory, in one run of bytes that another process of the machine can map and keep.

Layout: a header of int64 words, then the index (pickled: whose state it is, and where which tensor stands), then the tensors.
The header's step is written last, so that what a killed writer left unfinished is never taken for a snapshot.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_WORDS = 8
_STEP, _INDEX_BYTES, _SHARED_BYTES = range(3)
_HEADER_BYTES = 8 * _WORDS
_ALIGNMENT = 64
_SPARE = 1.1
"""Room for an index that grows a little."""
_UNFINISHED = -1

Key = tuple[object, ...]


@dataclass(frozen=True)
class ShadowIndex:
    """What stands beside the tensors of a shadow."""

    epoch: int
    members: tuple[int, ...]
    """Of the epoch, in the order of its ranks."""
    member: int
    """Whose state it is."""
    common: dict[str, object]
    """What is equal on all ranks."""
    places: dict[Key, tuple[int, torch.dtype, tuple[int, ...]]]
    """Offset in bytes, dtype and shape of each tensor."""


class Shadow:
    """One snapshot's memory. `of_size` makes one, `mapped` shares that of another process."""

    def __init__(self, memory: mmap.mmap | np.ndarray, descriptor: int | None = None):
        self.descriptor = descriptor
        """Of the memory file, for others to map; None if nobody can."""
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._header = np.frombuffer(memory, dtype=np.int64, count=_WORDS)

    @staticmethod
    def of_size(num_bytes: int, *, is_shared: bool) -> Shadow:
        """Fresh memory.

        Args:
            is_shared: others may map it. It has no name, and goes when the last process that has it open goes, however it ends.
        """
        if is_shared and hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("raymoe-snapshot")
            os.ftruncate(descriptor, num_bytes)
            shadow = Shadow(mmap.mmap(descriptor, num_bytes), descriptor)
        else:
            shadow = Shadow(np.zeros(num_bytes, dtype=np.uint8))
        shadow.begin()
        return shadow

    @staticmethod
    def mapped(pid: int, descriptor: int, inode: int) -> Shadow:
        """That of another process on this machine.

        Raises:
            OSError: it cannot be reached from here.
        """
        # opened anew: it lives on when its maker is gone
        own = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
        try:
            found = os.fstat(own)
            if found.st_ino != inode:
                raise OSError(f"descriptor {descriptor} of process {pid} is not the memory that was meant")
            return Shadow(mmap.mmap(own, found.st_size))
        finally:
            os.close(own)

    @property
    def inode(self) -> int:
        """Of the memory file; 0 if nobody can map it."""
        return os.fstat(self.descriptor).st_ino if self.descriptor is not None else 0

    @property
    def num_bytes(self) -> int:
        """Of its memory."""
        return len(self.bytes)

    @property
    def shared(self) -> Tensor:
        """uint8, a view: what a buddy keeps, behind the header."""
        return self.bytes[_HEADER_BYTES : int(self._header[_SHARED_BYTES])]

    @property
    def step(self) -> int | None:
        """Steps done when it was taken; None while it is being written."""
        step = int(self._header[_STEP])
        return None if step == _UNFINISHED else step

    def index(self) -> ShadowIndex:
        """Of the snapshot that it holds now."""
        stop = _HEADER_BYTES + int(self._header[_INDEX_BYTES])
        return pickle.loads(self.bytes[_HEADER_BYTES:stop].numpy().tobytes())

    def tensors(self, keys: Iterable[Key] | None = None) -> dict[Key, Tensor]:
        """Views of some tensors, or of all."""
        places = self.index().places
        return {key: _view(self.bytes, places[key]) for key in (places if keys is None else keys)}

    def shared_tensors(self) -> dict[Key, Tensor]:
        """Views of what a buddy keeps; the rest may not be here."""
        stop = int(self._header[_SHARED_BYTES])
        return {key: _view(self.bytes, place) for key, place in self.index().places.items() if place[0] < stop}

    def begin(self) -> None:
        """What it holds no longer counts."""
        self._header[_STEP] = _UNFINISHED

    def write(self, step: int, layout: Layout, tensors: Mapping[Key, Tensor]) -> None:
        """Copies a state of this layout into it."""
        self.begin()
        self._header[_INDEX_BYTES], self._header[_SHARED_BYTES] = len(layout.index), layout.shared_bytes
        self.bytes[_HEADER_BYTES : _HEADER_BYTES + len(layout.index)].numpy()[:] = np.frombuffer(layout.index, np.uint8)
        for key, place in layout.places.items():
            _view(self.bytes, place).copy_(tensors[key])
        self._header[_STEP] = step

    @staticmethod
    def needed(shared_bytes: int) -> int:
        """Bytes of memory that keep what an owner shares."""
        return _HEADER_BYTES + shared_bytes

    def expect(self, index_bytes: int, shared_bytes: int) -> None:
        """`shared` is about to be filled from elsewhere; `finish` says that it is."""
        self.begin()
        self._header[_INDEX_BYTES], self._header[_SHARED_BYTES] = index_bytes, self.needed(shared_bytes)

    def finish(self, step: int) -> None:
        """What was expected is here."""
        self._header[_STEP] = step

    @property
    def index_bytes(self) -> int:
        return int(self._header[_INDEX_BYTES])

    def close(self) -> None:
        """Gives the memory back, here; whoever has mapped it keeps it."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a state will stand."""

    index: bytes
    places: dict[Key, tuple[int, torch.dtype, tuple[int, ...]]]
    shared_bytes: int
    """Up to where a buddy keeps it."""
    num_bytes: int

    @staticmethod
    def of(
        epoch: int,
        members: tuple[int, ...],
        member: int,
        common: dict[str, object],
        shared: Mapping[Key, Tensor],
        private: Mapping[Key, Tensor],
    ) -> Layout:
        """Places tensors one after another.

        Args:
            shared: what a buddy keeps too.
            private: the rest.
        """
        start = 0
        while True:
            places, offset = {}, _HEADER_BYTES + start
            offset = _place(shared, places, offset)
            shared_bytes = offset
            offset = _place(private, places, offset)
            index = pickle.dumps(ShadowIndex(epoch, members, member, common, places))
            if len(index) <= start:
                return Layout(index, places, shared_bytes, offset)
            start = int(len(index) * _SPARE) + 4096


def _place(
    tensors: Mapping[Key, Tensor], places: dict[Key, tuple[int, torch.dtype, tuple[int, ...]]], offset: int
) -> int:
    for key, tensor in tensors.items():
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        places[key] = offset, tensor.dtype, tuple(tensor.shape)
        offset += tensor.nbytes
    return offset


def _view(memory: Tensor, place: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
    offset, dtype, shape = place
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return memory[offset : offset + size].view(dtype).view(shape)
