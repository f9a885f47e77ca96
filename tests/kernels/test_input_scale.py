"""Scales on what experts read: one vector a token, or one for the gate and one for up."""

import pytest
import torch

from raymoe.kernels import combine, expert_rows, moe_mlp, plan
from tests.kernels.oracle import SPECS, make_case, oracle, relative_error

GATED = [name for name, spec in SPECS.items() if spec.is_gated]


def scales(case, count: int, seed: int = 7) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (1 + 0.5 * torch.randn(case.hidden.shape, generator=generator, dtype=torch.float64))
        .to(case.hidden.dtype)
        .requires_grad_()
        for _ in range(count)
    )


def run(case, input_scale, backend: str) -> torch.Tensor:
    return case.run(backend, input_scale=input_scale)


def truth_of(case, gate_scale, up_scale) -> torch.Tensor:
    """Each half of gate_up on its own inputs: the oracle on [x * g; x * u] and weights with zeros elsewhere, in float64."""
    dim = 2 if case.spec.is_transposed else 1
    is_gate = torch.arange(case.gate_up.shape[dim]) % 2 == 0
    if not case.spec.is_interleaved:
        is_gate = torch.arange(case.gate_up.shape[dim]) < case.gate_up.shape[dim] // 2
    shape = (1, 1, -1) if case.spec.is_transposed else (1, -1, 1)
    gate_up = case.gate_up.double()
    wide = torch.cat([gate_up * is_gate.view(shape), gate_up * ~is_gate.view(shape)], dim=3 - dim)
    hidden = case.hidden.double()
    rows = torch.cat([hidden * gate_scale.double(), hidden * up_scale.double()], dim=1)
    # the oracle sums into as many columns as it reads: down gets the rest as zeros
    down = case.down.double()
    extra = torch.zeros_like(down)
    down = torch.cat([down, extra], dim=2 if case.spec.is_transposed else 1)
    biases = [None if b is None else b.double() for b in (case.gate_up_bias, case.down_bias)]
    if biases[1] is not None:
        biases[1] = torch.cat([biases[1], torch.zeros_like(biases[1])], dim=1)
    scale = None if case.scale is None else case.scale.double()
    full = oracle(rows, wide, down, case.index.tolist(), case.weight.double(), case.spec, *biases, scale)
    return full[:, : hidden.shape[1]]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("name", GATED)
def test_pair_and_tied_match_the_oracle(name, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    case = make_case(SPECS[name], with_extras=True, tokens=7)
    for count in (1, 2):
        given = scales(case, count)
        out = run(case, given[0] if count == 1 else given, backend)
        want = truth_of(case, given[0], given[-1])
        assert relative_error(out, want) < 2e-6
        leaves = [*case.leaves.values(), *given]
        got = torch.autograd.grad(out, leaves, case.grad_out)
        wanted = torch.autograd.grad(want, leaves, case.grad_out.double(), materialize_grads=True, allow_unused=True)
        assert max(relative_error(g, w) for g, w in zip(got, wanted, strict=True)) < 5e-6


@pytest.mark.parametrize("name", ["silu", "gpt_oss"])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_by_differences(name, count):
    case = make_case(
        SPECS[name], tokens=3, top_k=2, experts=3, hidden=4, inner=6, dtype=torch.float64, with_extras=True
    )
    weight = case.weight.detach().nan_to_num().requires_grad_()

    def layer(hidden, gate_up, down, weight, hidden_scale, *given):
        input_scale = given[0] if count == 1 else given
        return moe_mlp(hidden, gate_up, down, case.index, weight, spec=case.spec, biases=case.biases,
                       hidden_scale=hidden_scale, input_scale=input_scale, backend="torch")  # fmt: skip

    assert torch.autograd.gradcheck(
        layer, (case.hidden, case.gate_up, case.down, weight, case.scale, *scales(case, count))
    )


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "triton"])
@pytest.mark.parametrize("count", [1, 2])
def test_rows_of_subsets_equal_the_layer(backend, count):
    dtype = torch.bfloat16 if backend == "cpu" else torch.float32
    case = make_case(dtype=dtype, with_extras=True, tokens=9)
    given = tuple(s.detach() for s in scales(case, count))
    input_scale = given[0] if count == 1 else given
    routing = plan(case.index, 5)
    rows = torch.full((case.index.numel(), 37), torch.nan, dtype=dtype)
    try:
        for part in ([3, 0], [1, 4, 2]):
            expert_rows(case.hidden, case.gate_up, case.down, routing, part, out=rows, spec=case.spec, biases=case.biases,
                        hidden_scale=case.scale, input_scale=input_scale, backend=backend)  # fmt: skip
    except ValueError as error:
        if "cannot run this" in str(error):
            pytest.skip(str(error))
        raise
    got = combine(rows, routing, case.weight.detach())
    with torch.no_grad():
        want = run(case, input_scale, "reference")
    # three roundings to bfloat16 (8 bits) stand between the two
    assert relative_error(got, want) < (3 * 2**-8 if backend == "cpu" else 2e-6)


def test_weight_gradients_of_the_pair_go_into_buffers():
    case = make_case(with_extras=True)
    given = scales(case, 2)
    into = (torch.zeros_like(case.gate_up), torch.zeros_like(case.down))
    case.run("torch", input_scale=given, grad_into=into).backward(case.grad_out)
    want = torch.autograd.grad(run(case, given, "reference"), (case.gate_up, case.down), case.grad_out)
    assert max(relative_error(got, exact) for got, exact in zip(into, want, strict=True)) < 2e-6


def test_bad_scales_name_the_argument():
    case = make_case()
    with pytest.raises(ValueError, match=r"input_scale must be a float tensor \(13, 37\)"):
        run(case, torch.ones(13, 36), "torch")
    with pytest.raises(ValueError, match=r"input_scale is a pair.*is_gated"):
        run(make_case(SPECS["ungated_relu2"]), (torch.ones(13, 37), torch.ones(13, 37)), "torch")
