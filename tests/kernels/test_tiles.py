import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import plan, tiles
from raymoe.kernels.tiles import max_tiles, tile_table

EXPERTS = 5


def oracle(index, experts, slots, block_rows):
    """[(first row, end of the expert's rows, slot)], expert by expert."""
    found = []
    for expert, slot in zip(experts, slots, strict=True):
        first = sum(e < expert for e in index)
        end = first + index.count(expert)
        found += [(row, end, slot) for row in range(first, end, block_rows)]
    return found


def check(index, num_experts, experts, block_rows):
    routing = plan(torch.tensor(index, dtype=torch.int64).view(-1, 1), num_experts)
    slots = [e + 10 for e in experts] if experts is not None else ()
    table = tile_table(routing, block_rows, experts, slots)
    assert all(x.dtype == torch.int32 for x in table)
    found = list(zip(table.row.tolist(), table.end.tolist(), table.slot.tolist(), strict=True))
    ids, slots = (range(num_experts), range(num_experts)) if experts is None else (experts, slots)
    want = oracle(index, ids, slots, block_rows)
    assert table.count.tolist() == [len(want)]
    assert found[: len(want)] == want
    assert all(row >= end for row, end, _ in found[len(want) :])


@settings(max_examples=60, deadline=None)
@given(
    index=st.lists(st.integers(0, EXPERTS), max_size=60),
    experts=st.none() | st.lists(st.integers(0, EXPERTS - 1), unique=True),
    block_rows=st.sampled_from([1, 4, 16]),
)
def test_matches_oracle(index, experts, block_rows):
    check(index, EXPERTS, experts, block_rows)


@pytest.mark.parametrize("experts", [None, [77, 3, 4, 98, 0], []])
def test_block_sizes_of_a_device(monkeypatch, experts):
    monkeypatch.setattr(tiles, "is_interpreted", lambda: False)
    check(torch.randint(0, 100, (150,)).tolist(), 99, experts, 1)


@pytest.mark.parametrize("index", [[], [0] * 33, [4] * 32, [5] * 7])
def test_all_on_one_expert_or_none(index):
    check(index, EXPERTS, None, 16)


def test_no_experts():
    check([0, 0, 0], 0, None, 16)


def test_room_for_every_routing():
    # the worst routing: every expert but one gets a single row
    for num_rows, num_experts, block_rows in [(128, 128, 16), (100, 7, 16), (5, 9, 4), (64, 1, 64), (0, 3, 8)]:
        used = min(num_rows, num_experts)
        rows = [1] * (used - 1) + [num_rows - used + 1] if used else []
        spread = sum(-(-r // block_rows) for r in rows)
        assert spread <= max_tiles(num_rows, num_experts, block_rows) <= spread + 1
