"""The Triton backend's own functions: what autograd does not show of them, and every way its operands can travel."""

from dataclasses import replace

import pytest
import torch

from raymoe.kernels import plan, triton_backend
from raymoe.kernels.configs import INTERPRETED
from raymoe.kernels.operands import Experts, Needs
from raymoe.kernels.triton_backend import backward_triton, expert_rows_triton, forward_triton
from tests.kernels.oracle import SPECS, assert_close, make_case, oracle, relative_error

ALL = Needs(*[True] * len(Needs._fields))
CONFIGS = {
    "descriptors": {"weights": "descriptor", "inputs": "descriptor", "slices": 2},
    "swapped": {"weights": "descriptor", "is_swapped": True},
    "flattened": {"weights": "descriptor", "is_persistent": True, "is_flattened": True},
    "tall": {"rows": 32},
}
# as in test_moe_mlp: float32 through three products
TOLERANCE = 3e-6


@pytest.fixture
def every_gemm(monkeypatch):
    """Gives each kind's interpreted config other fields."""

    def use(**changes):
        monkeypatch.setattr(
            triton_backend, "gemm_config", lambda kind, *_: replace(INTERPRETED[kind], cols=32, inner=16, **changes)
        )

    return use


def parts(case):
    experts = Experts(case.gate_up.detach(), case.down.detach(), case.gate_up_bias, case.down_bias)
    return case.hidden.detach(), experts, plan(case.index, 5), case.weight.detach()


def both_ways(case, needs=ALL, into=None):
    hidden, experts, routing, weight = parts(case)
    with torch.no_grad():
        out, pre = forward_triton(hidden, experts, routing, weight, case.spec, case.scale, keep_pre=True)
        grads = backward_triton(
            case.grad_out, hidden, experts, routing, weight, case.spec, case.scale, pre, needs, into=into
        )
    return out, grads


@pytest.mark.parametrize("spec", ["silu", "gpt_oss"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_way_gives_the_layer(every_gemm, name, spec):
    every_gemm(**CONFIGS[name])
    # sizes that TMA takes; tiles end within the experts' rows and columns
    assert_close(make_case(SPECS[spec], hidden=36, inner=20, with_extras=True), "triton", TOLERANCE)


@pytest.mark.parametrize(("name", "is_transposed"), [("tall", False), ("descriptors", True)])
def test_adds_weight_gradients_into(every_gemm, name, is_transposed):
    every_gemm(**CONFIGS[name])
    case = make_case(SPECS["gelu_tanh" if is_transposed else "silu"], hidden=36, inner=20, with_extras=True)
    _, want = both_ways(case)
    # gradients as views of one flat buffer, as a trainer keeps them
    sizes = [case.gate_up[0].numel(), case.down[0].numel()]
    buffer = torch.ones(5, sum(sizes) + 4)
    into = (
        buffer[:, : sizes[0]].view(case.gate_up.shape),
        buffer[:, sizes[0] : sum(sizes)].view(case.down.shape),
    )
    _, got = both_ways(case, into=into)
    assert got.gate_up is None
    assert got.down is None
    torch.testing.assert_close(into[0] - 1, want.gate_up, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(into[1] - 1, want.down, rtol=1e-5, atol=1e-5)
    assert (buffer[:, sum(sizes) :] == 1).all()
    for name in set(Needs._fields) - {"gate_up", "down"}:
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_only_what_is_needed():
    case = make_case(tokens=5, hidden=12, inner=8, with_extras=True)
    _, want = both_ways(case)
    for name in Needs._fields:
        _, got = both_ways(case, Needs._make(field == name for field in Needs._fields))
        assert {field for field in Needs._fields if getattr(got, field) is not None} == {name}
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_pre_activations_only_on_demand():
    case = make_case()
    hidden, experts, routing, weight = parts(case)
    kept, pre = forward_triton(hidden, experts, routing, weight, case.spec, None, keep_pre=True)
    out, nothing = forward_triton(hidden, experts, routing, weight, case.spec, None, keep_pre=False)
    assert nothing is None
    assert pre.shape == (39, 38)
    assert torch.equal(out, kept)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_experts(every_gemm, dtype):
    every_gemm(**CONFIGS["swapped"])
    case = make_case(hidden=32, inner=32, with_extras=True)
    # the oracle sees the weights that the quantised ones stand for
    scales = [torch.rand(5, out_size) * 0.02 for out_size in (64, 32)]
    whole = [torch.randint(-15, 16, weight.shape) for weight in (case.gate_up, case.down)]
    case.gate_up, case.down = (w * s[..., None] for w, s in zip(whole, scales, strict=True))
    weights = [w.to(dtype) for w in whole]
    experts = Experts(*weights, case.gate_up_bias, case.down_bias, *scales)
    routing = plan(case.index, 5)
    with torch.no_grad():
        out, _ = forward_triton(case.hidden, experts, routing, case.weight, case.spec, case.scale, keep_pre=False)
        rows = torch.empty(39, 32)
        expert_rows_triton(case.hidden, experts, routing, range(5), range(5), rows, case.spec, case.scale)
        names = ("hidden", "gate_up", "down", "weight", "gate_up_bias", "down_bias", "scale")
        exact = [getattr(case, name).double() for name in names]
        want = oracle(*exact[:3], case.index.tolist(), exact[3], case.spec, *exact[4:])
    assert relative_error(out, want) <= TOLERANCE
    real = int(routing.offsets[-1])
    assert rows[:real].isfinite().all()
