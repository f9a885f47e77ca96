"""Who keeps whose snapshot, and who owns what after members have changed: properties, and all answers tried on small cases."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement import buddies, owners_after


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_buddies_are_elsewhere_and_evenly_burdened(nodes):
    found = buddies(nodes)
    if len(nodes) == 1:
        assert found == [None]
        return
    others = {node: [rank for rank in range(len(nodes)) if nodes[rank] != node] for node in nodes}
    kept = [found.count(rank) for rank in range(len(nodes))]
    for rank, buddy in enumerate(found):
        assert buddy is not None
        assert buddy != rank
        assert not others[nodes[rank]] or nodes[buddy] != nodes[rank]
        # nobody it could have gone to keeps two fewer
        candidates = others[nodes[rank]] or [other for other in range(len(nodes)) if other != rank]
        assert kept[buddy] <= min(kept[other] for other in candidates) + 1


def test_equal_nodes_keep_one_each():
    for nodes in ([0] * 5, [0, 0, 1, 1], [0, 1, 2], [0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1, 2, 2, 2]):
        assert set(buddies(nodes)) == set(range(len(nodes))), nodes


@st.composite
def changes(draw, most_layers: int = 4, most_experts: int = 9, most_ranks: int = 5):
    """Owners by old ranks, and for each new rank the old one or None."""
    shape = draw(st.integers(1, most_layers)), draw(st.integers(1, most_experts))
    old_size = draw(st.integers(1, most_ranks))
    owners = draw(st.lists(st.integers(0, old_size - 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    stays = draw(st.lists(st.booleans(), min_size=old_size, max_size=old_size))
    joins = draw(st.integers(0, 2))
    survivors = [rank for rank in range(old_size) if stays[rank]] + [None] * joins
    return np.array(owners, dtype=np.int64).reshape(shape), draw(st.permutations(survivors or [0]))


def staying(owners: np.ndarray, after: np.ndarray, survivors: list) -> int:
    """Experts that are where they were."""
    return sum(survivors[new] == old for old, new in zip(owners.flat, after.flat, strict=True))


@given(changes())
def test_owners_after_are_even_and_move_as_few_as_even_shares_allow(change):
    owners, survivors = change
    size = len(survivors)
    after = owners_after(owners, survivors)
    assert after.shape == owners.shape
    assert after.dtype == np.int64
    counts = np.bincount(after.flatten(), minlength=size)
    assert len(counts) == size
    assert counts.max() - counts.min() <= 1
    # the ranks that held most have the larger shares, and each keeps up to its share
    held = sorted((int((owners == old).sum()) if old is not None else 0 for old in survivors), reverse=True)
    each, odd = divmod(owners.size, size)
    assert staying(owners, after, survivors) == sum(
        min(number, each + (place < odd)) for place, number in enumerate(held)
    )
    assert np.array_equal(after, owners_after(owners.copy(), list(survivors)))


@given(changes(most_layers=2, most_experts=3, most_ranks=3))
def test_nothing_even_moves_fewer(change):
    owners, survivors = change
    size = len(survivors)
    most = 0
    for tried in itertools.product(range(size), repeat=owners.size):
        counts = np.bincount(tried, minlength=size)
        if counts.max() - counts.min() <= 1:
            most = max(most, staying(owners, np.array(tried), survivors))
    assert staying(owners, owners_after(owners, survivors), survivors) == most


def test_an_even_split_stays_even_in_every_layer():
    owners = np.repeat(np.arange(4), 2)[None].repeat(3, axis=0)
    after = owners_after(owners, [0, 1, 3])
    for layer in after:
        assert np.ptp(np.bincount(layer, minlength=3)) <= 1
    assert np.array_equal(owners_after(owners, [0, 1, 2, 3]), owners)
    # a joiner takes from all layers alike
    joined = owners_after(owners, [0, 1, 2, 3, None])
    assert np.ptp((joined == 4).sum(axis=1)) <= 1


def test_errors():
    with pytest.raises(ValueError, match="names no rank"):
        owners_after(np.zeros((1, 2), dtype=np.int64), [])
    with pytest.raises(ValueError, match=r"survivors = \[0, 0\] names an old rank twice"):
        owners_after(np.zeros((1, 2), dtype=np.int64), [0, 0])
