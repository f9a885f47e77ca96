import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import plan, plan_triton
from raymoe.kernels.plan import Plan


def oracle(rows, top_k, num_experts):
    """The five fields of a plan as lists."""
    slots = [(e, t * top_k + k) for t, choices in enumerate(rows) for k, e in enumerate(choices)]
    run = sorted(slots)
    order = [slot for _, slot in run]
    inverse = [[order.index(t * top_k + k) for k in range(top_k)] for t in range(len(rows))]
    offsets = [sum(e < limit for e, _ in slots) for limit in range(num_experts + 1)]
    return Plan(order, [slot // top_k for slot in order], [e for e, _ in run], inverse, offsets)


def assert_same(got, want):
    for name, a, b in zip(Plan._fields, got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert torch.equal(a, b), name


@st.composite
def routings(draw):
    num_experts = draw(st.integers(0, 9) | st.just(70))
    top_k = draw(st.integers(1, 9))
    # a few experts only: runs of one expert longer than a chunk
    some = draw(st.lists(st.integers(0, num_experts), min_size=1, max_size=4)) if draw(st.booleans()) else None
    entry = st.sampled_from(some) if some else st.integers(0, num_experts)
    return num_experts, top_k, draw(st.lists(st.lists(entry, min_size=top_k, max_size=top_k), max_size=30))


@settings(max_examples=40, deadline=None)
@given(routings(), st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]))
def test_matches_oracle(routing, dtype):
    num_experts, top_k, rows = routing
    index = torch.tensor(rows, dtype=dtype).view(len(rows), top_k)
    got = plan_triton.plan_triton(index, num_experts)
    assert tuple(x.tolist() for x in got) == oracle(rows, top_k, num_experts)
    assert_same(got, plan(index.long(), num_experts))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (8, 4), (11, 3), (64, 1), (5, 13)])
@pytest.mark.parametrize("expert", [0, 1, 4])
def test_one_expert_or_none(shape, expert):
    index = torch.full(shape, expert)
    assert_same(plan_triton.plan_triton(index, 4), plan(index, 4))


@pytest.mark.parametrize(("one_launch_slots", "num_experts"), [(4096, 128), (4096, 3), (0, 128), (0, 3)])
def test_block_sizes_of_a_device(monkeypatch, one_launch_slots, num_experts):
    monkeypatch.setattr(plan_triton, "is_interpreted", lambda: False)
    monkeypatch.setattr(plan_triton, "ONE_LAUNCH_SLOTS", one_launch_slots)
    index = torch.randint(0, num_experts + 1, (70, 8))
    assert_same(plan_triton.plan_triton(index, num_experts), plan(index, num_experts))


def test_many_experts():
    index = torch.randint(0, 1025, (50, 2))
    assert_same(plan_triton.plan_triton(index, 1024), plan(index, 1024))


@pytest.mark.parametrize("num_tokens", [5, 30])
def test_whatever_is_no_expert_sorts_last(num_tokens):
    # nothing checks a router's output on a device; rows must stay a permutation, as they become addresses
    index = torch.randint(0, 4, (num_tokens, 3))
    index[0], index[1, 1], index[4, 2] = -1, 2**40, 5
    known = index.where((index >= 0) & (index < 4), 4)
    assert_same(plan_triton.plan_triton(index, 4), plan(known, 4))


def test_strided_index():
    index = torch.randint(0, 6, (4, 25)).T
    assert_same(plan_triton.plan_triton(index, 5), plan(index, 5))
