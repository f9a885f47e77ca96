"""How much of the paged KV cache may be used, changed while it is in use."""

from math import ceil

from transformers.generation.continuous_batching.cache import PagedAttentionCache

from raymoe.inference.pages import give_back


class KvBudget:
    """Withholds sectors, the units that transformers' cache hands out, from those that requests may have.

    The cache is one tensor and keeps its addresses: it cannot grow over what it was made with. On a CPU (Linux) the memory of
    withheld sectors goes back to the system; on a GPU it stays with the tensor. Not safe to use while a step is computed.
    """

    def __init__(self, cache: PagedAttentionCache, kv_tokens: int):
        """`kv_tokens`: how many tokens the cache was made for, over all requests."""
        self.most_tokens = kv_tokens
        self.tokens = kv_tokens
        """What requests may have, or will, when those that have more are done or taken out."""
        self._cache = cache
        self._most = cache.num_sectors
        self._withheld: list[int] = []

    @property
    def bytes(self) -> int:
        """Bytes that requests may have now, over all layers."""
        return (self._most - len(self._withheld)) * self._cache.bytes_per_sector

    def set(self, tokens: int) -> None:
        """From now on requests may have that many tokens together; `settle` makes it true as they end."""
        assert 0 < tokens <= self.most_tokens
        self.tokens = tokens
        pool = self._cache.pool
        while len(self._withheld) > self._target:
            pool.free_sectors.append(self._withheld.pop())
        self.settle()

    def settle(self) -> None:
        """Takes what is free by now of what is still to be withheld. Cheap when there is nothing to do."""
        missing = self._target - len(self._withheld)
        # what is asked of it is what fits and how full it is
        self._cache.num_sectors = self._most - self._target
        if not missing:
            return
        pool = self._cache.pool
        pool.try_to_free_sectors()
        if pool.num_free_sectors < missing and self._cache.evict_cached_blocks():
            pool.try_to_free_sectors()
        taken = [pool.free_sectors.pop() for _ in range(min(missing, pool.num_free_sectors))]
        self._withheld += taken
        memory, size = self._cache.cache_tensor, self._cache.bytes_per_sector
        if memory.device.type == "cpu":
            for sector in taken:
                give_back(memory.data_ptr() + sector * size, size)

    @property
    def _target(self) -> int:
        return self._most - ceil(self._most * self.tokens / self.most_tokens)
