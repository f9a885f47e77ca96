"""A cache of ids alone: what demand-only caching would have fetched, told beside the real cache or from a recorded trace."""

from collections.abc import Iterable

from raymoe.inference.eviction import EvictionPolicy, Key


class GhostCache:
    """Does with expert ids what `ExpertCache` does for one thread that fetches on demand only. Not locked."""

    def __init__(self, policy: EvictionPolicy, num_slots: int):
        """`policy`: a fresh one; `num_slots`: at least 1."""
        assert num_slots >= 1
        self.policy = policy
        self.resident: set[Key] = set()
        self._num_slots = num_slots

    def visit(self, layer: int, wanted: Iterable[int]) -> list[int]:
        """A layer wants distinct experts, residents first; returns those that had to be fetched."""
        here, missing = [], []
        for expert in wanted:
            (here if (layer, expert) in self.resident else missing).append(expert)
        if here:
            self.policy.used(layer, here)
        for expert in missing:
            if len(self.resident) >= self._num_slots:
                # what was computed with before in this layer may go as well
                self._evict(layer)
            self.resident.add((layer, expert))
            self.policy.used(layer, [expert])
        return missing

    def resize(self, num_slots: int) -> None:
        """The budget has changed; what is too much goes at once."""
        self._num_slots = num_slots
        self.policy.resized(num_slots)
        while len(self.resident) > num_slots:
            self._evict(0)

    def _evict(self, layer: int) -> None:
        victim = self.policy.victim(layer, self.resident.__contains__)
        assert victim is not None, "somebody is resident"
        self.resident.discard(victim)
        self.policy.dropped(*victim)
