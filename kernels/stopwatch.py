"""Time device work: CUDA events on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

# what a launch takes of the host, with room: the queue must stay filled while a run is timed
_LAUNCH_S = 60e-6
_CYCLES_PER_S = 2e9


def seconds(work: Callable[[], object], device: torch.device, calls: int = 1, *, is_queued: bool = False) -> float:
    """Mean seconds of `calls` calls in a row.

    Args:
        is_queued: let the device wait until all calls are launched, so that the host's launch time does not count. Only for
            calls that do not synchronise.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - started) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if is_queued:
        torch.cuda._sleep(int(calls * _LAUNCH_S * _CYCLES_PER_S))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def interleaved(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    calls: int | Mapping[str, int] = 1,
    is_queued: bool = False,
    budget_s: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of each work in each round: A B C, B C A, ..., so that drift of the machine meets all alike.

    A work leaves the rounds once it has used `budget_s` of the host's time and has three results.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    used = dict.fromkeys(works, 0.0)
    names = list(works)
    for at in range(rounds):
        for name in names[at % len(names) :] + names[: at % len(names)]:
            if used[name] > budget_s and len(found[name]) >= 3:
                continue
            started = time.perf_counter()
            count = calls if isinstance(calls, int) else calls[name]
            found[name].append(seconds(works[name], device, count, is_queued=is_queued))
            used[name] += time.perf_counter() - started
    return found


def matmul_ceiling(device: torch.device, size: int = 8192) -> float:
    """FLOP/s of a square bf16 matrix product, the best of 10; on random data, since zeros run faster."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / _best(lambda: torch.mm(left, right, out=product), device)


def copy_ceiling(device: torch.device, num_bytes: int = 4 << 30) -> float:
    """Bytes per second of a copy on the device, read plus written, the best of 10."""
    source = torch.randint(0, 127, (num_bytes,), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        work()
    return min(seconds(work, device) for _ in range(10))
