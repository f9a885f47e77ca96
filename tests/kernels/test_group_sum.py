import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import group_sum as module
from raymoe.kernels import plan
from raymoe.kernels.group_sum import group_sum
from tests.kernels.oracle import relative_error

# sums of some hundred rows in float32, rounded once; the interpreter truncates to bfloat16
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def check(index, num_experts, num_cols, is_gathered, is_weighted, dtype=torch.float32):
    routing = plan(index, num_experts)
    real = int(routing.offsets[-1])
    rows = (torch.randn(index.shape[0] if is_gathered else index.numel(), num_cols) + 1).to(dtype)
    weight = torch.rand(index.numel()) if is_weighted else None
    want = torch.zeros(num_experts, num_cols, dtype=torch.float64)
    for r in range(real):
        row = rows[routing.token[r] if is_gathered else r].double()
        want[routing.expert[r]] += row if weight is None else row * weight[r].double()
    if not is_gathered:
        rows[real:] = float("nan")
    if weight is not None:
        weight[real:] = float("nan")
    got = group_sum(rows, routing.offsets, row_weight=weight, token=routing.token if is_gathered else None)
    assert got.dtype == dtype
    assert relative_error(got, want) <= TOLERANCE[dtype]


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    top_k=st.integers(1, 4),
    num_experts=st.integers(0, 6),
    num_cols=st.integers(1, 100),
    is_gathered=st.booleans(),
    is_weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_matches_oracle(num_tokens, top_k, num_experts, num_cols, is_gathered, is_weighted, dtype):
    check(
        torch.randint(0, num_experts + 1, (num_tokens, top_k)), num_experts, num_cols, is_gathered, is_weighted, dtype
    )


@pytest.mark.parametrize("num_rows", [31, 32, 33, 300])
def test_all_on_one_expert(num_rows):
    check(torch.full((num_rows, 1), 2), 4, 10, False, True)


def test_block_sizes_of_a_device(monkeypatch):
    monkeypatch.setattr(module, "is_interpreted", lambda: False)
    check(torch.randint(0, 3, (700, 1)), 2, 150, True, True)
