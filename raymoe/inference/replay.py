"""Cache policies on recorded demands, without weights: how many experts each would have fetched, and how few anybody could.

A trace is a list of steps; a step has for each layer the distinct experts that were wanted there.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from raymoe.inference.eviction import EvictionPolicy, Key
from raymoe.inference.eviction_oracle import Trace


@dataclass(frozen=True)
class ReplayCounts:
    """What a trace cost."""

    steps: int
    hits: int
    misses: int
    """Experts that had to be fetched."""

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


def replay(
    trace: Trace,
    policy: Callable[[int, int], EvictionPolicy],
    slots: int,
    predict: Callable[[int, int], dict[int, dict[int, float]]] | None = None,
) -> ReplayCounts:
    """Runs a trace through a policy as `ExpertCache` would on one thread: residents first, then what is missing.

    Args:
        policy: makes it from (layers, slots).
        predict: (step, layer) -> by later layer the probability of experts at its next visit; told before the layer's demand.

    Raises:
        ValueError: fewer than one slot.
    """
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    rule = policy(len(trace[0]) if trace else 1, slots)
    resident: set[Key] = set()
    hits = misses = 0
    for number, step in enumerate(trace):
        for layer, wanted in enumerate(step):
            if predict is not None:
                for later, probability in predict(number, layer).items():
                    rule.expect(later, probability)
            here = [expert for expert in wanted if (layer, expert) in resident]
            missing = [expert for expert in wanted if (layer, expert) not in resident]
            if here:
                rule.used(layer, here)
            hits += len(here)
            misses += len(missing)
            for expert in missing:
                if len(resident) >= slots:
                    # what was computed with before in this layer may go as well
                    victim = rule.victim(layer, resident.__contains__)
                    assert victim is not None, "somebody is resident"
                    resident.discard(victim)
                    rule.dropped(*victim)
                resident.add((layer, expert))
                rule.used(layer, [expert])
    return ReplayCounts(len(trace), hits, misses)


def belady(trace: Trace, slots: int) -> ReplayCounts:
    """A bound that no policy can beat, prefetching or not: what is wanted again soonest stays, and an expert that is wanted
    later than all that is resident is computed with and not kept.

    Least when experts may pass without taking a slot, which a cache cannot do: under its own rules L. A. Belady's choice (IBM
    Systems Journal 1966) is no longer the best where several experts are wanted at once. O(n log n) in the demands.

    Raises:
        ValueError: fewer than one slot.
    """
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    visits = [(layer, wanted) for step in trace for layer, wanted in enumerate(step)]
    upcoming: dict[Key, int] = {}
    following: list[dict[int, int]] = [{} for _ in visits]
    for time in range(len(visits) - 1, -1, -1):
        layer, wanted = visits[time]
        following[time] = {expert: upcoming.get((layer, expert), len(visits)) for expert in wanted}
        upcoming |= {(layer, expert): time for expert in wanted}
    next_use: dict[Key, int] = {}
    furthest: list[tuple[int, Key]] = []
    hits = misses = 0
    for time, (layer, wanted) in enumerate(visits):
        for expert in wanted:
            is_hit = (layer, expert) in next_use
            hits, misses = hits + is_hit, misses + (not is_hit)
            next_use[layer, expert] = following[time][expert]
            heapq.heappush(furthest, (-next_use[layer, expert], (layer, expert)))
        while len(next_use) > slots:
            last, key = heapq.heappop(furthest)
            # entries of the past stay in the heap until they come up
            if next_use.get(key) == -last:
                del next_use[key]
    return ReplayCounts(len(trace), hits, misses)
