"""The imbalance workloads: each is uneven in the way that it is named for, and in no other."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from raymoe.placement.imbalance import HEAT, WORKLOADS, imbalance_trace
from raymoe.placement.sharding import even_owners
from raymoe.placement.statistics import trace_statistics
from raymoe.placement.trace import LoadTrace

SMALL: dict[str, Any] = {
    "steps": 6,
    "ranks": 4,
    "layers": 3,
    "experts": 16,
    "tokens_per_rank": 500,
    "choices": 2,
    "seed": 0,
}
WIDE: dict[str, Any] = {
    "steps": 20,
    "ranks": 8,
    "layers": 3,
    "experts": 32,
    "tokens_per_rank": 4000,
    "choices": 2,
    "seed": 3,
}


def workload(name: str, **changed) -> LoadTrace:
    return imbalance_trace(name, **WIDE | changed)


def is_run(experts: list[int], num_experts: int) -> bool:
    """Whether they follow each other, the last being followed by the first."""
    return any(sorted((first + i) % num_experts for i in range(len(experts))) == experts for first in experts)


def share_of(trace: LoadTrace) -> np.ndarray:
    """Shares of all ranks together, [S, L, E]."""
    load = trace.rows.sum(axis=1)
    return load / load.sum(axis=-1, keepdims=True)


def hot_experts(trace: LoadTrace) -> list[list[list[int]]]:
    """The experts with more than twice the median of their step and layer, as lists [S][L]."""
    share = share_of(trace)
    is_hot = share > 2 * np.median(share, axis=-1, keepdims=True)
    return [[np.flatnonzero(layer).tolist() for layer in step] for step in is_hot]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_more_steps_leave_the_earlier_ones_of_workloads(workload):
    longer = imbalance_trace(workload, **WIDE | {"steps": 23})
    assert longer.name == workload
    assert (longer.rows[:20] == imbalance_trace(workload, **WIDE).rows).all()


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_trace_depends_on_its_arguments_alone(name):
    trace = workload(name)
    np.random.seed(1)  # a global state, which must not matter
    assert (workload(name).rows == trace.rows).all()
    assert (workload(name, seed=4).rows != trace.rows).any()
    assert (trace.rows.shape, trace.choices) == ((20, 8, 3, 32), 2)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="no imbalance workload 'W8'; there are: W0_balanced, W1_hot_experts"):
        workload("W8")
    with pytest.raises(ValueError, match="choices = 33: a token takes distinct experts, and there are only 32"):
        workload("W0", choices=33)


def test_w0_is_even():
    assert share_of(workload("W0")) == pytest.approx(np.full((20, 3, 32), 1 / 32), rel=0.15)


def test_w1_is_hot_in_one_place_for_all_steps():
    trace = workload("W1", layers=6)
    hot = hot_experts(trace)
    assert all(step == hot[0] for step in hot)
    assert all(len(layer) == 4 and is_run(layer, 32) for layer in hot[0])
    assert len({tuple(layer) for layer in hot[0]}) > 1
    share = share_of(trace)[0, 0]
    assert share[hot[0][0]] == pytest.approx(HEAT / (4 * HEAT + 28), rel=0.1)


def test_w2_is_hot_on_all_experts_of_one_rank_in_every_layer():
    trace = workload("W2")
    (hot,) = {tuple(layer) for step in hot_experts(trace) for layer in step}
    assert len(set(even_owners(1, 32, 8)[0, list(hot)])) == 1
    assert len(hot) == 4
    # a rank holds as many experts here as the hot set of W1 has: the heat is the same, the place another
    assert share_of(trace)[0, 0, list(hot)] == pytest.approx(HEAT / (4 * HEAT + 28), rel=0.1)


def test_w3_is_as_hot_as_w1_but_on_as_many_ranks_as_can_be():
    hot = hot_experts(workload("W3"))
    assert all(step == hot[0] for step in hot)
    for layer in hot[0]:
        assert len(layer) == 4
        assert len(set(even_owners(1, 32, 8)[0, layer])) == 4
    w1, w3 = (trace_statistics(workload(name)) for name in ("W1", "W3"))
    for name in ("expert_max_mean", "top4_share", "gini"):
        assert w3[name] == pytest.approx(w1[name], rel=0.05)
    assert w3["device_max_mean"] < w1["device_max_mean"] / 1.7


def test_w4_has_ragged_sources_and_even_experts():
    trace = workload("W4")
    tokens = trace.rows.sum(axis=-1) / 2
    assert (tokens == tokens[:, :, :1]).all()
    even_steps = 4000 * (0.25 + 1.5 * np.arange(8) / 7)
    assert (np.abs(np.sort(tokens[:, :, 0], axis=1) - even_steps) < 1).all()
    assert (tokens[:, :, 0].sum(axis=1) == 8 * 4000).all()
    assert len({tuple(step) for step in tokens[:, :, 0]}) > 1
    assert trace.tokens_per_rank == 4000
    assert share_of(trace) == pytest.approx(np.full((20, 3, 32), 1 / 32), rel=0.15)
    assert (workload("W4", ranks=1).rows.sum(axis=-1) == 8000).all()


def test_w5_leaves_experts_and_whole_ranks_empty():
    load = workload("W5").rows.sum(axis=1)
    assert ((load == 0) == (load[:1] == 0)).all()
    for layer in load[0]:
        by_rank = layer.reshape(8, 4)
        assert (by_rank.sum(axis=1) == 0).sum() >= 2
        # 2 of 8 ranks, and 6 of the 24 experts of the others
        assert (layer == 0).sum() == 8 + 6
        assert layer[layer > 0] == pytest.approx(np.full(18, layer.sum() / 18), rel=0.1)


def test_w5_needs_enough_experts_for_a_token():
    assert (imbalance_trace("W5", **SMALL | {"experts": 4, "choices": 3, "ranks": 4}).rows.sum(axis=-1) == 1500).all()
    with pytest.raises(ValueError, match="choices = 4: W5_zero_load leaves 3 of 4 experts to choose from on 4 ranks"):
        imbalance_trace("W5", **SMALL | {"experts": 4, "choices": 4})


def test_w6_moves_on_by_half_its_length_each_step():
    hot = hot_experts(workload("W6"))
    for earlier, later in pairwise(hot):
        for before, after in zip(earlier, later, strict=True):
            assert len(after) == 4
            assert is_run(after, 32)
            assert sorted((expert + 2) % 32 for expert in before) == after


def test_w7_is_hot_for_five_steps_of_twenty():
    hot = hot_experts(workload("W7", steps=40))
    assert [step for step in range(40) if any(hot[step])] == [*range(10, 15), *range(30, 35)]
    assert all(hot[step] == hot[10] for step in range(10, 15))
    assert all(is_run(layer, 32) and len(layer) == 4 for layer in hot[10])
    assert hot[10] != hot[30]


@pytest.mark.parametrize("name", WORKLOADS)
def test_short_names_and_every_size(name):
    assert (workload(name[:2], steps=2).rows == workload(name, steps=2).rows).all()
    for ranks, experts, choices in ((1, 1, 1), (3, 7, 3), (5, 2, 1), (1, 8, 6)):
        sizes = SMALL | {"ranks": ranks, "experts": experts, "choices": choices}
        rows = imbalance_trace(name, **sizes).rows
        assert rows.sum() == 6 * ranks * 3 * 500 * choices
        assert (rows <= rows.sum(axis=-1, keepdims=True) // choices).all()
