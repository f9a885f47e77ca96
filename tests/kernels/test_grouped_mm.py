from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import cpu_products, grouped_mm
from tests.kernels.oracle import relative_error

# relative, over a whole tensor: one product, its inputs exact
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LAYOUTS = ("in_out", "out_in", "slots", "scattered")


def matrices(experts: int, size_in: int, size_out: int, dtype: torch.dtype, layout: str = "out_in") -> torch.Tensor:
    """[E, in, out] as it may lie in memory."""
    values = (torch.randn(experts, size_in, size_out, dtype=torch.float64) * size_in**-0.5).to(dtype)
    if layout == "in_out":
        return values
    if layout == "out_in":
        return values.mT.contiguous().mT
    if layout == "slots":
        buffer = torch.full((experts, size_in * size_out + 8), float("nan"), dtype=dtype)
        view = buffer[:, : size_in * size_out].view(experts, size_out, size_in).mT
        return view.copy_(values)
    # no unit stride at all
    buffer = torch.full((experts, size_in, 2 * size_out), float("nan"), dtype=dtype)
    return buffer[..., ::2].copy_(values)


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def oracle(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Row by row, in the dtype of its operands."""
    ends = offsets.tolist()
    rows = [0 * weight[:, 0].sum(0) for _ in x]
    for e in range(len(ends) - 1):
        for row in range(ends[e], ends[e + 1]):
            rows[row] = (x[row][:, None] * weight[e]).sum(0)
    return torch.stack(rows) if rows else x @ weight.sum(0)


def check(counts, size_in, size_out, dtype, layout, behind=4):
    """Forward and both gradients; rows behind the last run are NaN in x and in the gradient that comes."""
    offsets = offsets_of(counts)
    total = sum(counts)
    x = torch.randn(total + behind, size_in, dtype=torch.float64).to(dtype)
    weight = matrices(len(counts), size_in, size_out, dtype, layout)
    grad = torch.randn(total + behind, size_out, dtype=torch.float64).to(dtype)
    exact = [t.to(torch.float64, copy=True).requires_grad_() for t in (x, weight)]
    want = oracle(*exact, offsets)
    want_grads = torch.autograd.grad(
        want, exact, grad.to(torch.float64, copy=True), allow_unused=True, materialize_grads=True
    )
    x[total:] = float("nan")
    grad[total:] = float("nan")
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    got = grouped_mm(*leaves, offsets)
    grads = torch.autograd.grad(got, leaves, grad)
    assert [t.dtype for t in (got, *grads)] == [dtype] * 3
    assert not got[total:].any()
    assert not grads[0][total:].any()
    for a, b in zip((got, *grads), (want, *want_grads), strict=True):
        assert relative_error(a, b) <= TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(40, 24), (37, 45)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_oracle(dtype, sizes, layout):
    check([3, 0, 17, 1, 0], *sizes, dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[0, 0, 9], [0, 0], [], [4, 4, 4]], ids=["one", "none", "no_experts", "alike"])
def test_runs(counts, dtype):
    check(counts, 40, 24, dtype, "out_in")
    check(counts, 40, 24, dtype, "out_in", behind=0)


@pytest.mark.parametrize("is_fast", [True, False])
def test_ways_of_the_loop(monkeypatch, is_fast):
    # large matrices are multiplied one by one, with swapped operands where there is a matrix unit
    monkeypatch.setattr(cpu_products, "LARGE_BYTES", 1)
    # the package holds the function under the module's name
    monkeypatch.setattr(import_module("raymoe.kernels.grouped_mm"), "has_fast_half", lambda dtype: is_fast)
    monkeypatch.setattr(F, "grouped_mm", None)
    check([3, 0, 17, 1, 0], 40, 24, torch.bfloat16, "out_in")
    check([3, 0, 17, 1, 0], 40, 24, torch.bfloat16, "slots")


def test_small_matrices_take_torchs_own(monkeypatch):
    calls = []
    real = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    check([3, 0, 17, 1, 0], 40, 24, torch.bfloat16, "out_in")
    # forward and the gradient of x
    assert len(calls) == 2


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), max_size=5),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    layout=st.sampled_from(LAYOUTS),
    behind=st.integers(0, 3),
)
def test_any_size(counts, sizes, layout, behind):
    torch.manual_seed(0)
    check(counts, *sizes, torch.float64, layout, behind)


def leaves_in(dtype: torch.dtype, sizes=(8, 16)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    offsets = offsets_of([3, 0, 4])
    return torch.randn(9, sizes[0]).to(dtype), matrices(3, *sizes, dtype, "out_in"), offsets


def test_gradcheck():
    x, weight, offsets = leaves_in(torch.float64, (5, 3))
    assert torch.autograd.gradcheck(
        lambda *leaves: grouped_mm(*leaves, offsets), (x.requires_grad_(), weight.requires_grad_())
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_into_adds(dtype, layout):
    x, weight, offsets = leaves_in(dtype)
    grad = torch.randn(9, 16).to(dtype)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    want = torch.autograd.grad(grouped_mm(*leaves, offsets), leaves, grad)
    into = matrices(3, 8, 16, dtype, layout)
    into[1] = float("nan")
    canary = into[1].clone()
    before = into.clone()
    for times in (1, 2):
        grouped_mm(*leaves, offsets, grad_into=into).backward(grad)
        assert weight.grad is None
        for e in (0, 2):
            # the buffer is rounded to its own type each time
            added = before[e].double() + times * want[1][e].double()
            assert relative_error(into[e], added) <= TOLERANCE[dtype]
    # an expert without rows is not touched: not a byte
    assert torch.equal(into[1].contiguous().view(torch.uint8), canary.contiguous().view(torch.uint8))
    assert torch.equal(x.grad, 2 * want[0])


def test_grad_into_where_the_weight_wants_none():
    # a buffer is asked for by giving it
    x, weight, offsets = leaves_in(torch.float64)
    into = torch.zeros_like(weight)
    x.requires_grad_()
    grouped_mm(x, weight, offsets, grad_into=into).sum().backward()
    want = torch.autograd.grad(grouped_mm(x, weight.requires_grad_(), offsets).sum(), weight)[0]
    assert torch.equal(into, want)


def test_only_the_gradient_asked_for():
    x, weight, offsets = leaves_in(torch.float64)
    both = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    want = torch.autograd.grad(grouped_mm(*both, offsets).square().sum(), both)
    for at in (0, 1):
        given = [both[at] if i == at else t for i, t in enumerate((x, weight))]
        assert torch.equal(torch.autograd.grad(grouped_mm(*given, offsets).square().sum(), both[at])[0], want[at])


@pytest.mark.parametrize("shape", ["rows", "gradient"])
def test_strided_rows(shape):
    x, weight, offsets = leaves_in(torch.float32)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    grad = torch.randn(9, 16)
    want_out = grouped_mm(*leaves, offsets)
    want = torch.autograd.grad(want_out, leaves, grad)
    wide = torch.stack([x, x], -1)[..., 0] if shape == "rows" else x
    out = grouped_mm(wide, weight, offsets)
    assert torch.equal(out, want_out)
    got = torch.autograd.grad(out, leaves, grad.T.contiguous().T if shape == "gradient" else grad)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


WRONG = {
    "x_rank": ({"x": torch.zeros(9)}, r"x must be a float tensor \[S, K\] and weight \[E, K, N\]"),
    "x_type": ({"x": torch.zeros(9, 8).int()}, "got torch.int32"),
    "inner": ({"weight": torch.zeros(3, 7, 16)}, r"got torch.float32 \(9, 8\) and \(3, 7, 16\)"),
    "offsets_type": ({"offsets": torch.zeros(4).long()}, r"offsets must be int32 \[4\].*got torch.int64"),
    "offsets_length": ({"offsets": torch.zeros(3).int()}, r"offsets must be int32 \[4\].*got torch.int32 \(3,\)"),
    "weight_type": ({"weight": torch.zeros(3, 8, 16).half()}, "weight is torch.float16 on cpu, x is torch.float32"),
    "into_type": ({"grad_into": torch.zeros(3, 8, 16).half()}, "grad_into is torch.float16 on cpu"),
    "into_shape": ({"grad_into": torch.zeros(3, 16, 8)}, r"grad_into is \(3, 16, 8\), weight \(3, 8, 16\)"),
    "device": ({"weight": torch.zeros(3, 8, 16, device="meta")}, "weight is torch.float32 on meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name):
    changes, message = WRONG[name]
    given = dict(zip(("x", "weight", "offsets"), leaves_in(torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        grouped_mm(**(given | changes))


def test_ops_keep_their_promises():
    x, _, offsets = leaves_in(torch.float32)
    weight = matrices(3, 8, 16, torch.float32, "slots")
    grad = torch.randn(9, 16)
    ops = torch.ops.raymoe
    leaves = x.clone().requires_grad_(), weight.detach().requires_grad_()
    torch.library.opcheck(ops.grouped_mm.default, (*leaves, offsets, None))
    torch.library.opcheck(ops.grouped_mm.default, (x, weight, offsets, None))
    torch.library.opcheck(ops.grouped_mm_input_grad.default, (grad, weight, offsets))
    torch.library.opcheck(ops.grouped_mm_weight_grad.default, (x, grad, weight, offsets))
    torch.library.opcheck(ops.grouped_mm_weight_grad_into.default, (x, grad, offsets, torch.zeros_like(weight)))
