"""Traces of some steps of a rank: the torch profiler's, and the timeline of the last of them."""

import gzip
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from raymoe.telemetry.spans import write_spans
from raymoe.training.timeline import Timeline

PROFILE_FOLDER = "profile"
SKIPPED_STEPS = 10
"""Steps before the first one that is traced: they allocate, warm up, and measure costs."""


def trace_path(folder: Path, rank: int) -> Path:
    """The rank's Chrome trace, for `chrome://tracing` or Perfetto, in a run's folder."""
    return folder / PROFILE_FOLDER / f"rank-{rank}.json.gz"


def timeline_path(folder: Path, rank: int) -> Path:
    """The spans of the last traced step; see `raymoe.telemetry.spans`."""
    return folder / PROFILE_FOLDER / f"timeline-{rank}.jsonl"


@contextmanager
def profiled_steps(
    timeline: Timeline, folder: Path, rank: int, first: int, last: int, num_steps: int
) -> Iterator[Callable[[int], None]]:
    """What to call before each step with its number: it begins to trace, and ends when `num_steps` steps are done.

    Args:
        folder: of the run.
        first: the run's first step.
        last: the step after the run's last. Tracing starts `SKIPPED_STEPS` after `first`, earlier if the run is too short.
        num_steps: how many steps are traced; 0: none, and nothing is done.
    """
    begin = max(first, min(first + SKIPPED_STEPS, last - num_steps))
    end = min(begin + num_steps, last)
    profiler: profile | None = None

    def finish() -> None:
        nonlocal profiler
        if profiler is None:
            return
        spans = timeline.stop()
        profiler.stop()
        target = trace_path(folder, rank)
        target.parent.mkdir(parents=True, exist_ok=True)
        _export(profiler, target)
        write_spans(timeline_path(folder, rank), spans)
        profiler = None

    def before(step: int) -> None:
        nonlocal profiler
        if step == end:
            finish()
        if step == begin and num_steps:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            profiler = profile(activities=activities)
            profiler.start()
        if profiler is not None:
            timeline.start()

    yield before
    finish()


def _export(profiler: profile, target: Path) -> None:
    """Writes the trace whole or not at all, and compressed."""
    plain = target.with_name(f"{target.name}.{os.getpid()}.plain")
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as trace, gzip.open(partial, "wb") as packed:
            shutil.copyfileobj(trace, packed)
        os.replace(partial, target)
    finally:
        plain.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
