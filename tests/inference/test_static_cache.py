"""Sequences that change places between the caches of static batches."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Cache, DynamicCache, EncoderDecoderCache, GptOssConfig, Qwen3NextConfig

from raymoe.inference.static_cache import bytes_per_sequence, can_exchange, exchange, keep_rows, num_moved, settle

LAYERS, HEADS, LENGTH, WIDTH = 2, 3, 5, 4


def rows(numbers: list[int], layer: int, part: int) -> torch.Tensor:
    """[sequences, heads, length, width], telling which sequence, layer and part they are of."""
    value = torch.tensor(numbers, dtype=torch.float32) + 100 * layer + 1000 * part
    return value[:, None, None, None].expand(-1, HEADS, LENGTH, WIDTH).clone()


def filled(numbers: list[int], first_part: int = 0) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(rows(numbers, layer, first_part), rows(numbers, layer, first_part + 1), layer)
    return cache


def holds(cache: Cache, numbers: list[int], first_part: int = 0) -> bool:
    layers: list[Any] = cache.layers
    return len(layers) == LAYERS and all(
        torch.equal(kept, rows(numbers, index, first_part + part))
        for index, layer in enumerate(layers)
        for part, kept in enumerate((layer.keys, layer.values))
    )


@st.composite
def deals(draw):
    """(sizes of the batches, the same places dealt to new batches)."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    places = [(batch, row) for batch, size in enumerate(sizes) for row in range(size)]
    shuffled = draw(st.permutations(places))
    cuts = sorted(draw(st.sets(st.integers(1, len(places)), max_size=3)) | {len(places)})
    return sizes, [shuffled[a:b] for a, b in itertools.pairwise([0, *cuts])]


@settings(max_examples=40)
@given(deals())
def test_every_sequence_takes_its_rows_along(deal):
    sizes, groups = deal
    ends = [0, *itertools.accumulate(sizes)]
    batches = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    caches = [filled(batch) for batch in batches]
    settled, homes = settle(sizes, groups)
    assert [sorted(group) for group in settled] == [sorted(group) for group in groups]
    dealt = exchange(caches, settled, homes)
    assert len({id(cache) for cache in dealt}) == len(groups)
    for group, cache in zip(settled, dealt, strict=True):
        assert holds(cache, [batches[batch][row] for batch, row in group])


@settings(max_examples=40)
@given(deals())
def test_what_stays_is_not_counted_as_moved(deal):
    sizes, groups = deal
    settled, homes = settle(sizes, groups)
    taken = [home for home in homes if home is not None]
    assert len(set(taken)) == len(taken)
    stay = 0
    for group, home in zip(settled, homes, strict=True):
        if home is not None:
            assert len(group) == sizes[home]
            # whoever was in the batch before keeps the row
            assert all(place == (home, row) for row, place in enumerate(group) if place[0] == home)
            stay += sum(place[0] == home for place in group)
    assert num_moved(settled, homes) == sum(sizes) - stay


def test_an_exchange_of_two_moves_two():
    settled, homes = settle([3, 3], [[(1, 0), (0, 1), (0, 2)], [(0, 0), (1, 1), (1, 2)]])
    assert settled == [[(1, 0), (0, 1), (0, 2)], [(0, 0), (1, 1), (1, 2)]]
    assert homes == [0, 1]
    assert num_moved(settled, homes) == 2
    assert num_moved(*settle([3, 3], [[(0, 2), (0, 0), (0, 1)], [(1, 2), (1, 0), (1, 1)]])) == 0


def test_encoder_decoders_take_both_caches_along():
    caches = [EncoderDecoderCache(filled(batch), filled(batch, first_part=2)) for batch in ([0, 1], [2], [3])]
    settled, homes = settle([2, 1, 1], [[(2, 0), (0, 1), (0, 0), (1, 0)]])
    (cache,) = exchange(caches, settled, homes)
    assert isinstance(cache, EncoderDecoderCache)
    assert holds(cache.self_attention_cache, [3, 1, 0, 2])
    assert holds(cache.cross_attention_cache, [3, 1, 0, 2], first_part=2)
    assert cache.is_updated == {0: True, 1: True}
    assert bytes_per_sequence(cache) == 2 * 2 * LAYERS * HEADS * LENGTH * WIDTH * 4
    keep_rows(cache, [2, 0])
    assert holds(cache.self_attention_cache, [0, 3])
    assert holds(cache.cross_attention_cache, [0, 3], first_part=2)


def test_what_is_more_than_keys_and_values_stays_where_it_is():
    assert can_exchange(filled([0]))
    assert can_exchange(EncoderDecoderCache(filled([0]), filled([0])))
    assert can_exchange(DynamicCache(config=GptOssConfig(num_hidden_layers=2)))
    assert not can_exchange(DynamicCache(config=Qwen3NextConfig(num_hidden_layers=4)))


@pytest.mark.parametrize("groups", [[[(0, 0)], [(0, 1)]], [[(0, 1)], [(0, 0)]]])
def test_a_batch_may_be_cut_in_two(groups):
    settled, homes = settle([2], groups)
    assert homes == [None, None]
    dealt = exchange([filled([7, 8])], settled, homes)
    assert [holds(cache, [7 + group[0][1]]) for cache, group in zip(dealt, groups, strict=True)] == [True, True]
