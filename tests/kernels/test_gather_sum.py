import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import gather_sum, plan
from raymoe.kernels.gather_sum import choices_at_once, triton_gather_sum
from raymoe.kernels.plan import Plan

# half a unit in the last place that is stored; the interpreter truncates to bfloat16
STORED = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7}
NUM_EXPERTS = 4


def tolerance(top_k, dtype):
    """Of a sum of K products, relative to the sum of their magnitudes: K roundings of sums, one of each product, one stored."""
    return (top_k + 1) * (2**-53 if dtype == torch.float64 else 2**-24) + STORED[dtype]


def oracle(rows, index, routing, weight):
    out = torch.zeros(len(index), rows.shape[1], dtype=torch.float64)
    place = {slot: row for row, slot in enumerate(routing.order.tolist())}
    for t, choices in enumerate(index):
        for k, e in enumerate(choices):
            if e < NUM_EXPERTS:
                factor = 1.0 if weight is None else float(weight[t, k])
                out[t] += factor * rows[place[t * len(choices) + k]].double()
    return out


def check(num_tokens, top_k, num_cols, dtype, weight_dtype, index=None):
    index = torch.randint(0, NUM_EXPERTS + 1, (num_tokens, top_k)) if index is None else index
    routing = plan(index, NUM_EXPERTS)
    rows = torch.randn(index.numel(), num_cols).to(dtype)
    weight = torch.rand(index.shape).to(weight_dtype) if weight_dtype is not None else None
    want = oracle(rows, index.tolist(), routing, weight)
    # rows of both signs may add up to nearly nothing
    magnitude = oracle(rows.abs(), index.tolist(), routing, weight)
    real = int(routing.offsets[-1])
    rows[real:] = float("nan")
    if weight is not None:
        weight[index == NUM_EXPERTS] = float("nan")
    for given_rows in (rows, rows[:real]):
        got = triton_gather_sum(given_rows, routing, weight, dtype)
        assert got.dtype == dtype
        # what is stored below the smallest normal number is as far apart as there
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((got.double() - want).abs() <= tolerance(top_k, dtype) * magnitude + least).all()


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    top_k=st.integers(1, 12) | st.sampled_from([17, 23, 64]),
    num_cols=st.integers(1, 140),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.float32, None),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, None),
            (torch.float16, torch.float16),
            (torch.float64, torch.float64),
        ]
    ),
)
def test_matches_oracle(num_tokens, top_k, num_cols, dtypes):
    check(num_tokens, top_k, num_cols, *dtypes)


@pytest.mark.parametrize(("top_k", "dtype"), [(8, torch.bfloat16), (11, torch.float32), (2, torch.float64)])
def test_block_sizes_of_a_device(monkeypatch, top_k, dtype):
    monkeypatch.setattr(gather_sum, "is_interpreted", lambda: False)
    check(7, top_k, 300, dtype, torch.float32)


def test_nobody_has_an_expert():
    check(9, 3, 20, torch.float32, torch.float32, index=torch.full((9, 3), NUM_EXPERTS))


def test_dropped_choices_do_not_see_row_0():
    # they read it, as some address must be read; it is not theirs
    routing = plan(torch.tensor([[0, 4], [4, 4], [4, 1]]), NUM_EXPERTS)
    rows = torch.ones(6, 5)
    rows[0] = float("nan")
    got = triton_gather_sum(rows, routing, torch.ones(3, 2), torch.float32)
    assert got[0].isnan().all()
    assert got[1:].tolist() == [[0.0] * 5, [1.0] * 5]


def test_addresses_past_32_bits():
    # 4 GB of address space, of which one page is touched
    torch.utils.deterministic.fill_uninitialized_memory = False
    last = 2**25 + 1
    rows = torch.empty(last + 1, 64, dtype=torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = True
    rows[last] = 3.0
    none = torch.empty(0, dtype=torch.int64)
    routing = Plan(none, none, none, torch.tensor([[last]]), torch.tensor([0, last + 1], dtype=torch.int32))
    assert (triton_gather_sum(rows, routing, None, torch.float32) == 3.0).all()


@pytest.mark.parametrize(
    ("top_k", "at_once"), [(0, 1), (1, 1), (6, 6), (8, 8), (9, 5), (10, 5), (12, 6), (17, 6), (64, 8)]
)
def test_choices_come_in_equal_chunks(top_k, at_once):
    assert choices_at_once(top_k) == at_once
