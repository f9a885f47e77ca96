import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import plan
from raymoe.kernels.plan import has_expert, real_rows


@st.composite
def routings(draw):
    num_experts = draw(st.integers(0, 6))
    shape = (draw(st.integers(0, 12)), draw(st.integers(1, 8)))
    entry = st.integers(0, num_experts)
    return num_experts, draw(st.lists(st.lists(entry, min_size=shape[1], max_size=shape[1]), max_size=shape[0]))


@settings(max_examples=100, deadline=None)
@given(routings())
def test_matches_oracle(routing):
    num_experts, rows = routing
    top_k = len(rows[0]) if rows else 3
    slots = [(e, t * top_k + k) for t, choices in enumerate(rows) for k, e in enumerate(choices)]
    result = plan(torch.tensor(rows, dtype=torch.int64).view(len(rows), top_k), num_experts)

    want = sorted(slots)
    assert result.order.tolist() == [slot for _, slot in want]
    assert result.expert.tolist() == [e for e, _ in want]
    assert result.token.tolist() == [slot // top_k for _, slot in want]
    assert result.offsets.tolist() == [sum(e < limit for e, _ in slots) for limit in range(num_experts + 1)]
    assert result.order[result.inverse.flatten()].tolist() == list(range(len(slots)))
    assert result.inverse.shape == (len(rows), top_k)
    assert real_rows(result) == sum(e < num_experts for e, _ in slots) == has_expert(result).sum()
    assert result.num_experts == num_experts


def test_offsets_are_what_grouped_mm_takes():
    assert plan(torch.zeros(3, 2, dtype=torch.int64), 4).offsets.dtype == torch.int32


def test_takes_int32():
    index = torch.randint(0, 5, (9, 2))
    assert all(torch.equal(a, b) for a, b in zip(plan(index.int(), 4), plan(index, 4), strict=True))


@pytest.mark.parametrize("index", [torch.zeros(3), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)])
def test_refuses_other_tensors(index):
    with pytest.raises(ValueError, match=r"integer tensor \[T, K\]"):
        plan(index, 4)


@pytest.mark.parametrize("value", [-1, 5])
def test_refuses_values_out_of_range(value):
    with pytest.raises(ValueError, match="use 0 to 3, or 4 for no expert"):
        plan(torch.tensor([[0, value]]), 4)
