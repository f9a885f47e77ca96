"""How skewed, how sparse and how steady a trace is. S = steps, R = ranks, L = MoE layers, E = experts, D = devices."""

from __future__ import annotations

import numpy as np

from raymoe.placement.sharding import even_owners
from raymoe.placement.trace import LoadTrace

_TOP = (1, 2, 4, 8)


def trace_statistics(trace: LoadTrace, num_devices: int | None = None) -> dict[str, float]:
    """The figures by which traces are compared; each a mean over steps and layers that routed anything.

    Args:
        num_devices: D, devices that plain expert parallelism would spread the experts over; None: the trace's ranks.

    Returns:
        ``expert_max_mean``: busiest expert / mean, all ranks together; ``top1_share``, ``top2_share``, ``top4_share``,
        ``top8_share``: share of the rows that the busiest 1, 2, 4, 8 experts take; ``gini`` over the experts;
        ``zero_share``: share of the (step, rank, layer, expert) without a row; ``device_max_mean``: busiest device / mean
        when each computes the experts of the even split; ``drift``: total variation between the layer's distributions of
        successive steps; ``rank_distance``: total variation between a rank's distribution and that of all ranks together.
        NaN where there is nothing to compare: ``drift`` of one step, anything of a trace without rows.

    Raises:
        ValueError: ``num_devices`` below 1.
    """
    num_devices = trace.num_ranks if num_devices is None else num_devices
    owners_E = even_owners(1, trace.num_experts, num_devices)[0]
    load_SLE = trace.rows.sum(axis=1)
    total_SL = load_SLE.sum(axis=2)
    routed_SL = total_SL > 0
    share_SLE = load_SLE / np.maximum(total_SL, 1)[..., None]
    load_SLD = load_SLE @ (owners_E[:, None] == np.arange(num_devices)).astype(np.int64)
    falling = -np.sort(-share_SLE, axis=2)
    rank_E = np.arange(1, trace.num_experts + 1)
    # sum of share x rank, busiest first, is (E + 1) / 2 for equal shares and 1 for one expert alone
    gini_SL = (trace.num_experts + 1 - 2 * (falling * rank_E).sum(axis=2)) / trace.num_experts
    moved_SL = np.abs(np.diff(share_SLE, axis=0)).sum(axis=2) / 2
    tops = {f"top{n}_share": _mean(falling[..., :n].sum(axis=2), routed_SL) for n in _TOP}
    return {
        "expert_max_mean": _mean(falling[..., 0] * trace.num_experts, routed_SL),
        **tops,
        "gini": _mean(gini_SL, routed_SL),
        "zero_share": float((trace.rows == 0).mean()),
        "device_max_mean": _mean(load_SLD.max(axis=2) * num_devices / np.maximum(total_SL, 1), routed_SL),
        "drift": _mean(moved_SL, routed_SL[1:] & routed_SL[:-1]),
        "rank_distance": _rank_distance(trace.rows, share_SLE),
    }


def _rank_distance(rows: np.ndarray, share_SLE: np.ndarray) -> float:
    distance, count = 0.0, 0
    # step by step: the shares of all ranks and steps at once would be as large as the trace again
    for rows_RLE, share_LE in zip(rows, share_SLE, strict=True):
        total_RL = rows_RLE.sum(axis=2)
        apart_RL = np.abs(rows_RLE / np.maximum(total_RL, 1)[..., None] - share_LE).sum(axis=2) / 2
        distance += float(apart_RL[total_RL > 0].sum())
        count += int(np.count_nonzero(total_RL))
    return distance / count if count else float("nan")


def _mean(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[chosen].mean()) if chosen.any() else float("nan")
