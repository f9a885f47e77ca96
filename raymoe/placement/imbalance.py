"""Eight imbalance workloads, each isolating one way in which the load of experts or ranks goes wrong.

Names and purposes are those of the reproducible workloads W0 to W7 proposed for Megatron-LM (NVIDIA/Megatron-LM, pull request
7488). Its exact definitions were not at hand: those below are our own, so figures are comparable here, not with it.

A hot expert is wanted ``HEAT`` times as much as a cold one. The hot set is an eighth of the experts (at least one). The layout is
that of plain expert parallelism: rank r owns a contiguous run of experts, as equal as the numbers allow. Where nothing else is
said every rank takes ``tokens_per_rank`` tokens, every expert is wanted alike, and hot sets are drawn once a layer.

| name | what is not even | what it isolates |
|---|---|---|
| W0_balanced | nothing but chance | what balancing costs when there is nothing to balance |
| W1_hot_experts | the hot set, a contiguous run in the layout | heat that falls on neighbours on few ranks |
| W2_hot_rank | all experts of one rank, the same rank in every layer | a whole device that is too slow, step after step |
| W3_spread_experts | as many experts as in W1, as hot, evenly spread over the layout | heat an expert without heat a device |
| W4_ragged_source | ranks take 1/4 to 7/4 of the mean number of tokens, in a new order each step | uneven sources, even experts |
| W5_zero_load | experts of a quarter of the ranks, and a quarter of the other experts, get no row | empty groups |
| W6_rotating_hotspot | W1, its run moving on by half its length each step | plans made from loads that are past |
| W7_burst | W0, but in 5 steps out of 20 (from the 10th) W1 with a run of its own | sudden heat that goes again |
"""

from __future__ import annotations

import numpy as np

from raymoe.placement.generate import check_sizes, routed_rows
from raymoe.placement.sharding import even_owners
from raymoe.placement.trace import LoadTrace

HEAT = 8
"""How many times a cold expert's popularity a hot one's is."""

WORKLOADS = (
    "W0_balanced",
    "W1_hot_experts",
    "W2_hot_rank",
    "W3_spread_experts",
    "W4_ragged_source",
    "W5_zero_load",
    "W6_rotating_hotspot",
    "W7_burst",
)

_PLACE, _TOKENS, _ROWS = range(3)
_CYCLE, _BURST = 20, range(10, 15)


def imbalance_trace(
    workload: str,
    *,
    steps: int,
    ranks: int,
    layers: int,
    experts: int,
    tokens_per_rank: int,
    choices: int,
    seed: int,
) -> LoadTrace:
    """The trace of a workload; every token takes exactly ``choices`` distinct experts.

    Step s is a function of workload, sizes, seed and s alone: more steps leave the earlier ones as they were.

    Args:
        workload: a name in ``WORKLOADS``, or its part before the underscore: ``W3``.
        tokens_per_rank: in W4 the mean over the ranks.

    Raises:
        ValueError: an unknown workload, a size below 1, a negative seed, or more choices than experts that get rows.
    """
    number = _number(workload)
    check_sizes(steps, ranks, layers, experts, tokens_per_rank, choices, seed)
    rows = np.empty((steps, ranks, layers, experts), dtype=np.int64)
    for step in range(steps):
        popularity_LE = _popularity(number, step, ranks, layers, experts, seed)
        fewest = int((popularity_LE > 0).sum(axis=1).min())
        if fewest < choices:
            raise ValueError(
                f"choices = {choices}: {WORKLOADS[number]} leaves {fewest} of {experts} experts to choose from on {ranks} ranks"
            )
        tokens_R = _tokens(number, step, ranks, tokens_per_rank, seed)
        popularity_RLE = np.broadcast_to(popularity_LE, (ranks, layers, experts))
        rows[step] = routed_rows(popularity_RLE, tokens_R, choices, _rng(seed, number, _ROWS, step))
    return LoadTrace(rows, WORKLOADS[number], choices)


def _number(workload: str) -> int:
    for number, name in enumerate(WORKLOADS):
        if workload in (name, name.partition("_")[0]):
            return number
    raise ValueError(f"no imbalance workload {workload!r}; there are: {', '.join(WORKLOADS)}")


def _rng(seed: int, number: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, number, *stream])


def _popularity(number: int, step: int, ranks: int, layers: int, experts: int, seed: int) -> np.ndarray:
    """float64 [L, E] of one step, the same for all ranks."""
    popularity_LE = np.ones((layers, experts))
    num_hot = max(1, experts // 8)
    run = np.arange(num_hot)
    cycle, phase = divmod(step, _CYCLE)
    # a burst has a place of its own each time
    rng = _rng(seed, number, _PLACE, cycle if number == 7 else 0)
    first_L1 = rng.integers(experts, size=(layers, 1))
    each_L1 = np.arange(layers)[:, None]
    match number:
        case 1:
            popularity_LE[each_L1, (first_L1 + run) % experts] = HEAT
        case 2:
            owners_E = even_owners(1, experts, ranks)[0]
            # with fewer experts than ranks some own nothing
            popularity_LE[:, owners_E == rng.choice(np.unique(owners_E))] = HEAT
        case 3:
            popularity_LE[each_L1, (first_L1 + run * experts // num_hot) % experts] = HEAT
        case 5:
            return _with_empty(popularity_LE, ranks, rng)
        case 6:
            moved = step * max(1, num_hot // 2)
            popularity_LE[each_L1, (first_L1 + moved + run) % experts] = HEAT
        case 7 if phase in _BURST:
            popularity_LE[each_L1, (first_L1 + run) % experts] = HEAT
    return popularity_LE


def _with_empty(popularity_LE: np.ndarray, ranks: int, rng: np.random.Generator) -> np.ndarray:
    layers, experts = popularity_LE.shape
    owners_E = even_owners(1, experts, ranks)[0]
    owning = np.unique(owners_E)
    num_empty = max(1, len(owning) // 4) if len(owning) > 1 else 0
    for layer in range(layers):
        is_empty_E = np.isin(owners_E, rng.permutation(owning)[:num_empty])
        others = rng.permutation(np.flatnonzero(~is_empty_E))
        popularity_LE[layer, is_empty_E] = 0
        popularity_LE[layer, others[: len(others) // 4]] = 0
    return popularity_LE


def _tokens(number: int, step: int, ranks: int, tokens_per_rank: int, seed: int) -> np.ndarray:
    """int64 [R]: tokens of each rank; they sum to ``ranks * tokens_per_rank``."""
    if number != 4 or ranks == 1:
        return np.full(ranks, tokens_per_rank)
    # 1/4 to 7/4 of the mean in equal steps: running sums are rounded, so that the total holds
    share_R = 0.25 + 1.5 * np.arange(ranks) / (ranks - 1)
    end_R = np.rint(np.cumsum(share_R) * tokens_per_rank).astype(np.int64)
    return _rng(seed, number, _TOKENS, step).permutation(np.diff(end_R, prepend=0))
