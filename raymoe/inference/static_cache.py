"""Keys and values of sequences that decode in several batches, and may change places between two steps.

A place is (batch, row). With static caches ExpertFlow merges and re-indexes all keys and values at every step (arXiv
2410.17954); here only those of sequences that go to another batch are copied, as long as batches keep their sizes.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Place = tuple[int, int]


def can_exchange(cache: Cache) -> bool:
    """Whether a sequence's part of the cache is a row of keys and values, and nothing else."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in _layers(cache))


def bytes_per_sequence(cache: Cache) -> int:
    """Bytes of one sequence's keys and values now."""
    return sum(tensor[:1].nbytes for layer in _layers(cache) for tensor in (layer.keys, layer.values))


def keep_rows(cache: Cache, rows: Sequence[int]) -> None:
    """Drops all sequences but these, which take the first rows in that order."""
    # transformers' name for picking rows comes from beam search; it is the one that every kind of layer has
    cache.reorder_cache(torch.tensor(rows, dtype=torch.int64))  # pyright: ignore[reportArgumentType]


def settle(sizes: Sequence[int], groups: Sequence[Sequence[Place]]) -> tuple[list[list[Place]], list[int | None]]:
    """Orders new groups so that few sequences move.

    Args:
        sizes: sequences of each batch now.
        groups: the places that the members of each new batch have now; together every place once.

    Returns:
        (groups with the members that stay in the rows they have, the batch that each takes over: one of the same size, or
        None where all its rows are copied).
    """
    overlaps = sorted(
        (-sum(batch == old for old, _ in group), new, batch)
        for new, group in enumerate(groups)
        for batch, size in enumerate(sizes)
        if len(group) == size
    )
    homes: list[int | None] = [None] * len(groups)
    taken: set[int] = set()
    for _, new, batch in overlaps:
        if homes[new] is None and batch not in taken:
            homes[new] = batch
            taken.add(batch)
    return [_in_place(group, home) for group, home in zip(groups, homes, strict=True)], homes


def num_moved(groups: Sequence[Sequence[Place]], homes: Sequence[int | None]) -> int:
    """Sequences whose keys and values are copied, for what `settle` gave."""
    return sum(
        place != (home, row) for group, home in zip(groups, homes, strict=True) for row, place in enumerate(group)
    )


@torch.inference_mode()
def exchange(caches: Sequence[Cache], groups: Sequence[Sequence[Place]], homes: Sequence[int | None]) -> list[Cache]:
    """The caches of the new batches, for what `settle` gave; the old ones are not to be used any more.

    All must be equally long, and such that `can_exchange`.
    """
    dealt = [caches[home] if home is not None else _like(caches[0]) for home in homes]
    old_layers = zip(*(list(_layers(cache)) for cache in caches), strict=True)
    new_layers = zip(*(list(_layers(cache)) for cache in dealt), strict=True)
    for old, new in zip(old_layers, new_layers, strict=True):
        for name in ("keys", "values"):
            tensors = _dealt([getattr(layer, name) for layer in old], groups, homes)
            for layer, tensor in zip(new, tensors, strict=True):
                setattr(layer, name, tensor)
    return dealt


def _dealt(tensors: list[Tensor], groups: Sequence[Sequence[Place]], homes: Sequence[int | None]) -> list[Tensor]:
    """`tensors` [rows, ...] of each batch now -> those of the new batches; a home's own tensor is written over."""
    made: list[Tensor] = []
    writes: list[tuple[Tensor, list[int], Tensor]] = []
    for group, home in zip(groups, homes, strict=True):
        coming = [row for row, place in enumerate(group) if place != (home, row)]
        rows = [tensors[batch][row] for batch, row in (group[row] for row in coming)]
        if home is None:
            made.append(torch.stack(rows))
            continue
        made.append(tensors[home])
        if coming:
            writes.append((tensors[home], coming, torch.stack(rows)))
    # all rows have been read by now
    for tensor, rows, values in writes:
        tensor[rows] = values
    return made


def _in_place(group: Sequence[Place], home: int | None) -> list[Place]:
    if home is None:
        return list(group)
    stay = {row: (batch, row) for batch, row in group if batch == home}
    come = iter([place for place in group if place[0] != home])
    return [stay[row] if row in stay else next(come) for row in range(len(group))]


def _parts(cache: Cache) -> Iterator[Cache]:
    if isinstance(cache, EncoderDecoderCache):
        yield from (cache.self_attention_cache, cache.cross_attention_cache)
    else:
        yield cache


def _layers(cache: Cache) -> Iterator[Any]:
    for part in _parts(cache):
        yield from part.layers


def _like(cache: Cache) -> Cache:
    """Another cache of the same kind and length, whose keys and values are to be set."""
    twin = copy.copy(cache)
    if isinstance(cache, EncoderDecoderCache) and isinstance(twin, EncoderDecoderCache):
        twin.self_attention_cache = _like(cache.self_attention_cache)
        twin.cross_attention_cache = _like(cache.cross_attention_cache)
        twin.is_updated = dict(cache.is_updated)
    else:
        twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
