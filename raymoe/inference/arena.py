"""One copy of the experts in a node's memory, for all engines on it: made and filled by one process, mapped by the others."""

import mmap
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymoe.config import check_fits
from raymoe.config.precision import Precision
from raymoe.inference.expert_precision import ExpertCodec
from raymoe.inference.memory_file import ArenaError, map_existing, map_new
from raymoe.inference.tiers import ExpertSource, NotHeld
from raymoe.models import MoELayer
from raymoe.models.open_file import BLOCK, round_up

Key = tuple[int, int]


@dataclass(frozen=True)
class ArenaHandle:
    """What another process on the node needs to map an arena. Small but for `held`, and can be pickled."""

    pid: int
    number: int
    """Of the descriptor in that process."""
    inode: int
    num_bytes: int
    precision: str
    dtype: str
    held: tuple[Key, ...] | None
    """(layer, expert) in the order they lie in; None: all of the model's."""


class ArenaTier:
    """An `ExpertSource` in shared memory. Safe to use from several threads; experts can be read as soon as they are filled in.

    It is an unnamed file in memory (memfd): there is nothing to unlink, and it goes when the last process that maps it ends,
    however it ends. Its pages count as memory of the process that made it.
    """

    def __init__(self, layers: Sequence[MoELayer], number: int | None, handle: ArenaHandle, memory: mmap.mmap):
        """For `create` and `attach`."""
        self.handle = handle
        self._number = number
        self._layers = list(layers)
        precision, dtype = Precision.parse(handle.precision), getattr(torch, handle.dtype)
        self._codecs = [ExpertCodec(layer.layout, layer.spec, precision, dtype) for layer in layers]
        self._place, _ = _places(self._codecs, layers, handle.held)
        with warnings.catch_warnings():
            # torch cannot know a read-only tensor, and says so
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._is_filled = self._bytes[: len(self._place)]
        """[held] 1 where the expert is there, in the arena itself, so that all see it."""
        self._index = {key: index for index, key in enumerate(self._place)}

    @classmethod
    def create(
        cls,
        layers: Sequence[MoELayer],
        *,
        dtype: torch.dtype,
        precision: Precision | None = None,
        experts: Iterable[Key] | None = None,
        name: str = "arena",
    ) -> "ArenaTier":
        """Allocates an empty arena.

        Args:
            dtype: that experts are held in; with a lossy precision, their biases.
            precision: default native.
            experts: (layer, expert) that it is for; None: all.
            name: of the file in memory, by which `find_existing` finds it.

        Raises:
            ValueError: there is not the memory; says how much is wanted and how much there is.
            ArenaError: the system has no such files.
        """
        precision = precision or Precision()
        held = None if experts is None else tuple(dict.fromkeys(experts))
        codecs = [ExpertCodec(layer.layout, layer.spec, precision, dtype) for layer in layers]
        _, num_bytes = _places(codecs, layers, held)
        check_fits(f"the arena of {precision} experts", num_bytes)
        number, memory = map_new(name, num_bytes)
        inode = os.fstat(number).st_ino
        kind = str(dtype).removeprefix("torch.")
        return cls(
            layers, number, ArenaHandle(os.getpid(), number, inode, num_bytes, str(precision), kind, held), memory
        )

    @staticmethod
    def size(layers: Sequence[MoELayer], dtype: torch.dtype, precision: Precision) -> int:
        """Bytes that an arena of all experts takes."""
        codecs = [ExpertCodec(layer.layout, layer.spec, precision, dtype) for layer in layers]
        return _places(codecs, layers, None)[1]

    @classmethod
    def attach(cls, handle: ArenaHandle, layers: Sequence[MoELayer], *, is_writable: bool = False) -> "ArenaTier":
        """Maps another process's arena, to read only unless told otherwise.

        Args:
            layers: of the same model.
            is_writable: the mapping can be written: CUDA asks for that before it pins one, and so does `fill`.

        Raises:
            ArenaError: its maker has ended, or is another user's or in another container.
        """
        memory = map_existing(
            "arena", handle.pid, handle.number, handle.inode, handle.num_bytes, is_writable=is_writable
        )
        return cls(layers, None, handle, memory)

    def __enter__(self) -> "ArenaTier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def memory(self) -> Tensor:
        """uint8 [num_bytes], all of it, to be registered with CUDA as pinned; never to be written."""
        return self._bytes

    @property
    def num_filled(self) -> int:
        """Experts that are there by now."""
        return int(self._is_filled.sum())

    def fill(self, source: ExpertSource, experts: Iterable[Key] | None = None, *, is_stored: bool = False) -> int:
        """Reads experts that are not there yet from the tier below; for one thread of one process at a time.

        Args:
            is_stored: the source delivers bytes as this precision stores them.

        Returns:
            Bytes that the source delivered.

        Raises:
            Exception: what the source raises; the experts before that one stay.
        """
        moved_bytes = 0
        for layer, expert in self._place if experts is None else experts:
            index = self._index[layer, expert]
            if self._is_filled[index]:
                continue
            stored, codec = self._stored(layer, expert), self._codecs[layer]
            if is_stored:
                moved_bytes += source.read(layer, expert, stored)
            elif codec.is_plain:
                moved_bytes += source.read(layer, expert, stored.view(codec.dtype))
            else:
                flat = torch.empty(codec.layout.numel, dtype=torch.float32)
                moved_bytes += source.read(layer, expert, flat)
                codec.encode(flat, stored)
            self._is_filled[index] = 1
        return moved_bytes

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """See `ExpertSource.read`; lossy experts are decoded."""
        index = self._index.get((layer, expert))
        if index is None or not self._is_filled[index]:
            raise NotHeld(f"the arena does not hold expert {expert} of MoE layer {layer}")
        codec = self._codecs[layer]
        codec.decode(self._stored(layer, expert), out)
        return codec.num_bytes

    def pool(self, layer: int) -> Tensor:
        """[E, numel] of a layer whose experts are all there, exact: to compute with in place of slots, never to be written.

        Raises:
            ArenaError: they are lossy, or some are missing.
        """
        codec, count = self._codecs[layer], self._layers[layer].num_experts
        keys = [(layer, expert) for expert in range(count)]
        if codec.precision.is_lossy or not all(k in self._index and self._is_filled[self._index[k]] for k in keys):
            raise ArenaError(
                f"arena: MoE layer {layer} is not there as a whole and native; read its experts one by one"
            )
        stride = self.slots.shape[1]
        starts = [self._place[key] for key in keys]
        if starts != [starts[0] + stride * expert for expert in range(count)]:
            raise ArenaError(f"arena: the experts of MoE layer {layer} do not lie in order; read them one by one")
        whole = self._bytes[starts[0] : starts[0] + stride * count].view(count, stride)
        return whole[:, : codec.num_bytes].view(codec.dtype)

    @property
    def slots(self) -> Tensor:
        """uint8 [experts, bytes of the largest, in whole blocks]: all, in the order of layers; never to be written."""
        start, count = next(iter(self._place.values())), len(self._place)
        return self._bytes[start:].view(count, -1)

    def facts(self) -> dict[str, Any]:
        """For an engine's statistics."""
        return {
            "precision": self.handle.precision,
            "num_bytes": self.handle.num_bytes,
            "held": len(self._place),
            "filled": self.num_filled,
        }

    def close(self) -> None:
        """Lets the memory go, unless someone still maps it; of the maker: nobody can attach any more."""
        number, self._number = self._number, None
        if number is not None:
            os.close(number)
        self._bytes = self._is_filled = torch.empty(0, dtype=torch.uint8)
        self._index = {}

    def __del__(self) -> None:
        if getattr(self, "_number", None) is not None:
            self.close()

    def _stored(self, layer: int, expert: int) -> Tensor:
        start = self._place[layer, expert]
        return self._bytes[start : start + self._codecs[layer].num_bytes]


def _places(
    codecs: Sequence[ExpertCodec], layers: Sequence[MoELayer], held: tuple[Key, ...] | None
) -> tuple[dict[Key, int], int]:
    """Where experts begin, each at a whole block so that direct I/O may write there, and the bytes of all."""
    keys = held if held is not None else [(i, e) for i, layer in enumerate(layers) for e in range(layer.num_experts)]
    position = max(BLOCK, round_up(len(keys)))
    # all alike, so that they can be computed with as slots of one pool
    stride = round_up(max(codec.num_bytes for codec in codecs))
    place = {}
    for layer, expert in keys:
        if not (0 <= layer < len(layers) and 0 <= expert < layers[layer].num_experts):
            raise ArenaError(f"arena: there is no expert {expert} in MoE layer {layer}")
        place[layer, expert] = position
        position += stride
    return place, position
