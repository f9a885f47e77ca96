import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import plan
from raymoe.kernels.tiles import tile_table

EXPERTS = 5


@settings(max_examples=100, deadline=None)
@given(
    index=st.lists(st.integers(0, EXPERTS), max_size=60),
    experts=st.none() | st.lists(st.integers(0, EXPERTS - 1), unique=True),
    block_rows=st.sampled_from([1, 4, 16]),
)
def test_covers_each_row_once_in_its_slot(index, experts, block_rows):
    routing = plan(torch.tensor(index, dtype=torch.int64).view(-1, 1), EXPERTS)
    slots = None if experts is None else [e + 10 for e in experts]
    tiles = tile_table(routing, block_rows, experts, slots)
    found = {}
    for row, end, slot in zip(*(x.tolist() for x in tiles), strict=True):
        for r in range(row, min(row + block_rows, end)):
            assert r not in found
            found[r] = slot
    wanted = range(EXPERTS) if experts is None else experts
    shift = 0 if experts is None else 10
    assert found == {r: e + shift for r, e in enumerate(routing.expert.tolist()) if e in wanted}
