"""What a rank does when, within a step: for a picture that shows whether transfers hide behind computation."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

from raymoe.telemetry.spans import Span

COMPUTATION = "computation"

_OFF: AbstractContextManager[None] = nullcontext()


class Timeline:
    """Collects spans while it is on; off, as it is at first, it costs a call and a comparison.

    What happens between two lines of one function is a `span`; what is under way between two places, such as a transfer, is
    opened by `begin` and closed by `end`. Spans of computation are ranges of the torch profiler too. On a CUDA device spans
    are of the host, unless the timeline synchronises: the profiler's trace has the device's own times.

    Args:
        device: synchronised at both ends of each span of computation while the timeline is on, if it is a CUDA device.
    """

    def __init__(self, device: torch.device | None = None):
        self._device = device if device is not None and device.type == "cuda" else None
        self.is_on = False
        self._spans: list[Span] = []
        self._open: dict[tuple[str, int | None], tuple[int, str]] = {}

    def start(self) -> None:
        """Collects from now on; what was collected before is forgotten."""
        self._spans, self._open, self.is_on = [], {}, True

    def stop(self) -> list[Span]:
        """Collects no more; returns the spans that are closed, by their start."""
        self.is_on = False
        spans, self._spans, self._open = self._spans, [], {}
        return sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))

    def span(self, name: str, layer: int | None = None, lane: str = COMPUTATION) -> AbstractContextManager[None]:
        """For `with`: what runs inside is the span."""
        return self._span(name, layer, lane) if self.is_on else _OFF

    def begin(self, name: str, layer: int | None = None, lane: str = COMPUTATION) -> None:
        """Something begins; if it had begun already, it is taken to begin only now."""
        if self.is_on:
            self._open[name, layer] = self._now_ns(lane), lane

    def end(self, name: str, layer: int | None = None) -> None:
        """It has ended; nothing happens if it had not begun."""
        if self.is_on and (name, layer) in self._open:
            start_ns, lane = self._open.pop((name, layer))
            self._spans.append(Span(name, layer, start_ns, self._now_ns(lane), lane))

    @contextmanager
    def _span(self, name: str, layer: int | None, lane: str) -> Iterator[None]:
        with record_function(name if layer is None else f"{name} {layer}"):
            start_ns = self._now_ns(lane)
            try:
                yield
            finally:
                if self.is_on:
                    self._spans.append(Span(name, layer, start_ns, self._now_ns(lane), lane))

    def _now_ns(self, lane: str) -> int:
        if self._device is not None and lane == COMPUTATION:
            torch.cuda.synchronize(self._device)
        return time.perf_counter_ns()
