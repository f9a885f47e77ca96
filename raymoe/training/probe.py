"""What one device of this machine can do: FLOP/s of a GEMM, memory, and the bandwidths of memory, host and files."""

from __future__ import annotations

import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class DeviceMeasurement:
    """One device. Bandwidths in bytes per second."""

    name: str
    flops_s: int
    """bfloat16 on CUDA, else float32."""
    memory_bytes: int
    """Of the device; on a CPU what this process may use."""
    memory_bytes_s: int
    """Reading its own memory."""
    host_memory_bytes: int
    host_bytes_s: int | None
    """From pinned host memory to the device; None on a CPU."""


def measure_device(device: torch.device, seconds: float = 0.3) -> DeviceMeasurement:
    """Measures this process's device, a few times `seconds` in all."""
    host_bytes = memory_limit_bytes()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes = properties.name, properties.total_memory
    else:
        name, memory_bytes = "CPU", host_bytes
    return DeviceMeasurement(
        name=name,
        flops_s=measure_flops(device, seconds),
        memory_bytes=memory_bytes,
        memory_bytes_s=measure_memory_bandwidth(device, seconds),
        host_memory_bytes=host_bytes,
        host_bytes_s=measure_host_bandwidth(device, seconds) if device.type == "cuda" else None,
    )


def memory_limit_bytes() -> int:
    """Memory that this process may use: the machine's, or what its control group allows if that is less."""
    limit = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            limit = min(limit, int(text))
    return limit


def measure_flops(device: torch.device, seconds: float = 0.3) -> int:
    """FLOP per second of a square GEMM: bfloat16 on CUDA, else float32 with this process's threads."""
    multiply, flops = gemm(device)
    return int(flops / _median_s(multiply, device, seconds))


def measure_memory_bandwidth(device: torch.device, seconds: float = 0.3) -> int:
    """Bytes per second at which the device reads an array larger than its caches: the better of a sum and a product."""
    num_bytes = min(1 << 30 if device.type == "cuda" else 1 << 29, memory_limit_bytes() // 16)
    rows = torch.ones(num_bytes // 4096 // 4, 4096, device=device)
    column = torch.ones(4096, device=device)
    times_s = [_median_s(read, device, seconds / 2) for read in (lambda: rows.sum(), lambda: torch.mv(rows, column))]
    return int(rows.nbytes / min(times_s))


def measure_host_bandwidth(device: torch.device, seconds: float = 0.3) -> int:
    """Bytes per second from pinned host memory to a CUDA device."""
    host = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    out = torch.empty_like(host, device=device)
    return int(host.nbytes / _median_s(lambda: out.copy_(host, non_blocking=True), device, seconds))


def measure_file_bandwidth(files: Sequence[Path], seconds: float = 0.5, threads: int = 4) -> int | None:
    """Bytes per second at which files are read past the page cache, where the file system can do that; None if there is
    nothing to read. Stops after `seconds`, or at the end of the files."""
    blocks = [(file, start) for file in files for start in range(0, file.stat().st_size, _BLOCK_BYTES)]
    if not blocks:
        return None
    # spread over all files, so that a short measurement sees more than the first one's beginning
    turns = iter([block for first in range(16) for block in blocks[first::16]])
    lock, read_bytes = threading.Lock(), [0] * threads
    deadline = time.perf_counter() + seconds

    def work(index: int) -> None:
        buffer = mmap.mmap(-1, _BLOCK_BYTES)
        while time.perf_counter() < deadline:
            with lock:
                block = next(turns, None)
            if block is None:
                return
            read_bytes[index] += _read_block(*block, buffer)

    started = time.perf_counter()
    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return int(sum(read_bytes) / (time.perf_counter() - started)) or None


def gemm(device: torch.device) -> tuple[Callable[[], torch.Tensor], int]:
    """A GEMM to call again and again, bfloat16 on CUDA, else float32; and its FLOPs."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left = torch.ones(size, size, dtype=dtype, device=device)
    right, out = torch.ones_like(left), torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out), 2 * size**3


def _median_s(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a call, the first one left out."""
    call()
    synchronise(device)
    times_s: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times_s) < 3 or time.perf_counter() < deadline:
        started = time.perf_counter()
        call()
        synchronise(device)
        times_s.append(time.perf_counter() - started)
    return statistics.median(times_s)


def synchronise(device: torch.device) -> None:
    """Waits for what the device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read_block(file: Path, start: int, buffer: mmap.mmap) -> int:
    """Reads one block, directly if the file system can, else after dropping it from the page cache."""
    try:
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        handle = os.open(file, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, start, len(buffer), os.POSIX_FADV_DONTNEED)
    try:
        return os.preadv(handle, [buffer], start)
    finally:
        os.close(handle)
