import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import combine, plan
from tests.kernels.oracle import relative_error

# a weighted sum of up to 8 rows, relative to the whole
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 1e-2}


def oracle(rows, index, order, weight, num_experts):
    place = {slot: row for row, slot in enumerate(order)}
    out = [0 * rows[0].double() for _ in index]
    for t, choices in enumerate(index):
        for k, e in enumerate(choices):
            if e < num_experts:
                out[t] = out[t] + weight[t, k].double() * rows[place[t * len(choices) + k]].double()
    return torch.stack(out)


def draw(tokens, top_k, dtype, weight_dtype, seed, num_experts=4, num_cols=11):
    torch.manual_seed(seed)
    index = torch.randint(0, num_experts + 1, (tokens, top_k))
    routing = plan(index, num_experts)
    rows = torch.randn(tokens * top_k, num_cols).to(dtype)
    weight = torch.rand(tokens, top_k).to(weight_dtype)
    return index, routing, rows, weight


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_matches_oracle(monkeypatch, backend, dtype, weight_dtype):
    monkeypatch.setenv("RAYMOE_KERNELS", backend)

    @settings(max_examples=10, deadline=None)
    @given(tokens=st.integers(1, 40), top_k=st.integers(1, 8), seed=st.integers(0, 99))
    def check(tokens, top_k, seed):
        index, routing, rows, weight = draw(tokens, top_k, dtype, weight_dtype, seed)
        want = oracle(rows, index.tolist(), routing.order.tolist(), weight, 4)
        rows[routing.offsets[-1] :] = float("nan")
        weight[index == 4] = float("nan")
        got = combine(rows, routing, weight)
        assert got.dtype == dtype
        assert relative_error(got, want) <= TOLERANCE[dtype]

    check()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("with_tail", [True, False])
def test_gradients(monkeypatch, backend, with_tail):
    monkeypatch.setenv("RAYMOE_KERNELS", backend)
    index, routing, rows, weight = draw(9, 3, torch.float64, torch.float64, seed=0)
    real = int(routing.offsets[-1])
    assert 0 < real < rows.shape[0]
    grad = torch.randn(9, 11, dtype=torch.float64)
    leaves = [rows.requires_grad_(), weight.requires_grad_()]
    want = torch.autograd.grad(oracle(rows, index.tolist(), routing.order.tolist(), weight, 4), leaves, grad)
    poisoned = rows.detach().clone()
    poisoned[real:] = float("nan")
    poisoned = (poisoned if with_tail else poisoned[:real]).requires_grad_()
    masked = weight.detach().masked_fill(index == 4, float("nan")).requires_grad_()
    got = torch.autograd.grad(combine(poisoned, routing, masked), [poisoned, masked], grad)
    assert relative_error(got[0], want[0][: poisoned.shape[0]]) <= TOLERANCE[torch.float64]
    assert relative_error(got[1], want[1]) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_other_rows_do_not_matter(monkeypatch, backend):
    # serving fills rows in any order around what it has: a token's sum may depend on its own rows only
    monkeypatch.setenv("RAYMOE_KERNELS", backend)
    index = torch.tensor([[0, 1], [2, 1], [3, 4]])
    routing = plan(index, 4)
    rows = torch.randn(6, 5)
    weight = torch.rand(3, 2)
    before = combine(rows, routing, weight)
    rows[routing.inverse[0]] = float("nan")
    assert torch.equal(combine(rows, routing, weight)[1:], before[1:])


def test_wrong_weight_shape():
    routing = plan(torch.zeros(3, 2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"expert_weight is \(3, 1\)"):
        combine(torch.zeros(6, 5), routing, torch.zeros(3, 1))
