"""Keeps reads into a slot and computation with it apart on a device that runs behind the host's back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class SlotOrder:
    """For a CPU, where who returns has finished."""

    @contextmanager
    def writing(self, slot: int) -> Iterator[None]:
        """Around the read that fills a slot, on whatever thread."""
        yield

    def before_use(self, slots: Sequence[int]) -> None:
        """The calling thread's computation is about to use slots that have been filled."""

    def used(self, slots: Sequence[int]) -> None:
        """All of the computation that uses them has been started."""


class CudaSlotOrder(SlotOrder):
    """By events: a read waits on a stream of its own for the computation that last used the slot, and the other way round."""

    def __init__(self, num_slots: int, device: torch.device):
        self._device = device
        self._filled = [torch.cuda.Event() for _ in range(num_slots)]
        self._used = [torch.cuda.Event() for _ in range(num_slots)]
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def writing(self, slot: int) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[slot])
            yield
            self._filled[slot].record(self._stream)

    def before_use(self, slots: Sequence[int]) -> None:
        stream = torch.cuda.current_stream(self._device)
        for slot in slots:
            stream.wait_event(self._filled[slot])

    def used(self, slots: Sequence[int]) -> None:
        stream = torch.cuda.current_stream(self._device)
        for slot in slots:
            self._used[slot].record(stream)
