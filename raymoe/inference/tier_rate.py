"""How fast a tier is: measured once at the start, in a time that nobody notices."""

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from raymoe.models.open_file import aligned_empty

_PROBE_BYTES = 4096


class TierRate(NamedTuple):
    """A read of n bytes takes latency_s + n / bytes_per_s."""

    bytes_per_s: float
    latency_s: float
    reads: int
    """That this was measured with."""
    read_s: float = 0.0
    """Of the largest read among them."""

    def seconds(self, num_bytes: float) -> float:
        """One read of so many bytes, as the tier counts them."""
        return self.latency_s + num_bytes / self.bytes_per_s


def measure(
    source: Any,
    numel: Sequence[int],
    num_experts: Sequence[int],
    dtype: torch.dtype,
    *,
    limit_s: float = 0.3,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> TierRate:
    """Reads random experts for `limit_s` seconds (and until the read under way is done), one at a time.

    Latency and bandwidth are told apart where reads differ in size: layers with larger experts, or a source that has
    `probe(layer, expert, num_bytes)`, a request for less than an expert. Otherwise the latency is in the bandwidth, and 0.

    Args:
        source: an `ExpertSource`. Experts that it does not hold are passed over.
        numel: elements of one expert, for each MoE layer.
        num_experts: of each MoE layer.
        dtype: of the slots that experts come to, on `device`.

    Raises:
        LookupError: it holds none of the experts that were asked for.
        Exception: whatever its reads raise.
    """
    order = [(layer, expert) for layer, count in enumerate(num_experts) for expert in range(count)]
    random.Random(seed).shuffle(order)
    is_cpu = torch.device(device).type == "cpu"
    out = aligned_empty(max(numel), dtype=dtype) if is_cpu else torch.empty(max(numel), dtype=dtype, device=device)
    # pages of a new buffer come when they are first touched, which is no matter of the tier's
    out.zero_()
    probe = getattr(source, "probe", None)
    times: dict[int, list[float]] = defaultdict(list)
    end_s = time.perf_counter() + limit_s
    for layer, expert in order:
        begin_s = time.perf_counter()
        try:
            moved_bytes = source.read(layer, expert, out[: numel[layer]])
        except LookupError:
            continue
        if not is_cpu:
            torch.cuda.synchronize(device)
        times[moved_bytes].append(time.perf_counter() - begin_s)
        if probe is not None and moved_bytes > 2 * _PROBE_BYTES:
            begin_s = time.perf_counter()
            probe(layer, expert, _PROBE_BYTES)
            times[_PROBE_BYTES].append(time.perf_counter() - begin_s)
        if time.perf_counter() >= end_s:
            break
    if not times:
        raise LookupError("the tier holds no expert to measure it with")
    return fit(times)


def fit(times: dict[int, list[float]]) -> TierRate:
    """A line through the median times of the smallest and the largest size; {bytes: seconds of each read}."""
    # the first read of a size warms up caches, connections and buffers
    typical = {size: median(found[1:] or found) for size, found in times.items()}
    small, large = min(typical), max(typical)
    reads = sum(map(len, times.values()))
    shortest_s = 1e-9
    if large > small and typical[large] > typical[small]:
        bytes_per_s = (large - small) / (typical[large] - typical[small])
        return TierRate(bytes_per_s, max(0.0, typical[small] - small / bytes_per_s), reads, typical[large])
    return TierRate(large / max(typical[large], shortest_s), 0.0, reads, typical[large])
