"""Where a rank's step goes: planning, transfers that nothing hides, attention, experts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raymoe.training.timeline import Timeline


class Stopwatch:
    """Nanoseconds of the step under way."""

    def __init__(self, num_layers: int, device: torch.device):
        self._device = device
        self._is_exact = False
        self.timeline = Timeline(device)
        """What was under way when; off unless the step is traced."""
        self.attention_ns = [0] * num_layers
        """From a block's start to its experts in the last exact step, by layer."""
        self.experts_ns = [0] * num_layers
        """Forward computation of the experts in the step under way, by layer."""
        self.backward_ns = 0
        """Backward computation of the experts in the step under way."""
        self._block_started_ns = [0] * num_layers
        self.planning_ns = 0
        """Planning and bookkeeping: what placement costs besides moving things."""
        self.exposed_ns = 0
        """Waiting for expert parameters and gradients."""

    def begin_step(self, is_exact: bool) -> None:
        """Args: is_exact: what the cost model asks for is wanted; a CUDA device is synchronised for it."""
        self._is_exact = is_exact
        self.experts_ns = [0] * len(self.experts_ns)
        self.planning_ns = self.exposed_ns = self.backward_ns = 0

    @contextmanager
    def planning(self) -> Iterator[None]:
        started_ns = time.perf_counter_ns()
        with self.timeline.span("planning"):
            yield
        self.planning_ns += time.perf_counter_ns() - started_ns

    @contextmanager
    def exposed(self) -> Iterator[None]:
        started_ns = time.perf_counter_ns()
        with self.timeline.span("wait"):
            yield
        self.exposed_ns += time.perf_counter_ns() - started_ns

    def block_starts(self, layer: int) -> None:
        self._block_started_ns[layer] = self._now_ns()
        self.timeline.begin("attention", layer)

    def experts_are_reached(self, layer: int) -> None:
        self.attention_ns[layer] = self._now_ns() - self._block_started_ns[layer]
        self.timeline.end("attention", layer)

    @contextmanager
    def experts(self, layer: int) -> Iterator[None]:
        started_ns = self._now_ns()
        with self.timeline.span("experts", layer):
            yield
        self.experts_ns[layer] += self._now_ns() - started_ns

    @contextmanager
    def experts_backward(self) -> Iterator[None]:
        started_ns = self._now_ns()
        with self.timeline.span("experts backward"):
            yield
        self.backward_ns += self._now_ns() - started_ns

    def _now_ns(self) -> int:
        if self._is_exact and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter_ns()
