"""The expert cache as an encoder-decoder's decoder sees it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymoe.inference.cache import ExpertCache
from raymoe.inference.counters import CacheCounters
from raymoe.inference.eviction import Key


class DecoderCache:
    """An `ExpertCache` whose layers are the decoder's, counted from 0: what predictors work with.

    An encoder's layers are not visited while tokens are decoded: nothing is foretold of them, and what they cost is not held
    against those who foretell. Of a model without encoder it is the whole cache.
    """

    def __init__(self, cache: ExpertCache, first: int, num_experts: int):
        """`first`: MoE layers before the decoder's; `num_experts`: of all the decoder's layers."""
        self._cache, self._first = cache, first
        self._aside = CacheCounters()
        self.num_experts = num_experts

    def __getattr__(self, name: str) -> Any:
        # whatever does not count layers is the cache's own
        return getattr(self._cache, name)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Around an encoder's forward pass."""
        before = self._cache.totals()
        yield
        self._aside = self._aside - (before - self._cache.totals())

    def totals(self) -> CacheCounters:
        """As `ExpertCache.totals`, without what encoders did."""
        return self._cache.totals() - self._aside

    def expect(self, layer: int, probability: Mapping[int, float]) -> None:
        """As `ExpertCache.expect`."""
        self._cache.expect(layer + self._first, probability)

    def wish(self, keys: Iterable[Key]) -> None:
        """As `ExpertCache.wish`."""
        self._cache.wish((layer + self._first, expert) for layer, expert in keys)

    def residents(self) -> NDArray[np.bool_]:
        """As `ExpertCache.residents`."""
        return self._cache.residents()[self._first :]
