from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import ExpertSpec, calls, moe_mlp
from tests.kernels.oracle import SPECS, assert_close, errors, make_case, relative_error

BACKENDS = ("reference", "torch", "triton")
# relative, over a whole tensor: the type's rounding through three products, with room for cancellation
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# Triton's interpreter truncates to bfloat16 instead of rounding, which biases sums
INTERPRETED_BF16 = 4e-2
# drawn sizes reach a single token, whose one weight gradient may nearly cancel
DRAWN = 5e-5
# the interpreter takes its time for every tile
FEWER = {"reference": {}, "torch": {}, "triton": {"tokens": 6, "experts": 3}}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_oracle(backend, name):
    assert_close(make_case(SPECS[name], with_extras=True, **FEWER[backend]), backend, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["silu", "ungated_relu2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_oracle_without_bias_and_scale(backend, name):
    assert_close(make_case(SPECS[name], **FEWER[backend]), backend, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", SPECS)
def test_grouped_mm_matches_oracle(name):
    # sizes that grouped_mm takes; those above are odd and take the loop
    case = make_case(SPECS[name], hidden=32, inner=24, with_extras=True)
    assert_close(case, "torch", TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float64_is_exact(backend, name):
    case = make_case(SPECS[name], dtype=torch.float64, with_extras=True)
    assert_close(case, backend, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden", [40, 37])
def test_half_types(backend, dtype, hidden):
    sizes = {"hidden": hidden, "inner": 24} | FEWER[backend]
    case = make_case(dtype=dtype, weight_dtype=torch.float32, with_extras=True, **sizes)
    is_truncated = backend == "triton" and dtype == torch.bfloat16
    assert_close(case, backend, INTERPRETED_BF16 if is_truncated else TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["silu", "gpt_oss"])
def test_several_tiles_each_way(name):
    case = make_case(SPECS[name], tokens=20, top_k=2, experts=2, hidden=70, inner=66, with_extras=True)
    assert_close(case, "triton", TOLERANCE[torch.float32])


def sizes(tokens: int, experts: int, hidden: list[int], inner: list[int]) -> st.SearchStrategy[dict]:
    """Odd small sizes, and those around tiles."""
    return st.fixed_dictionaries(
        {
            "tokens": st.integers(0, tokens),
            "top_k": st.integers(1, 8),
            "experts": st.integers(1, experts),
            "hidden": st.integers(1, 45) | st.sampled_from(hidden),
            "inner": st.integers(1, 40) | st.sampled_from(inner),
            "with_extras": st.booleans(),
            "seed": st.integers(0, 1000),
        }
    )


@settings(max_examples=25, deadline=None)
@given(size=sizes(24, 9, [16, 36, 65, 100, 129], [8, 20, 63, 72]))
def test_any_size_torch(size):
    assert_close(make_case(**size), "torch", DRAWN)


@settings(max_examples=5, deadline=None)
@given(size=sizes(8, 4, [16, 65, 100], [8, 63, 72]))
def test_any_size_triton(size):
    assert_close(make_case(**size), "triton", DRAWN)


INDICES = {
    "no_tokens": torch.empty(0, 2, dtype=torch.int64),
    "no_choices": torch.empty(7, 0, dtype=torch.int64),
    "all_on_one": torch.full((35, 2), 3),
    "none_has_an_expert": torch.full((9, 2), 5),
    "duplicates": torch.tensor([[1, 1, 1], [1, 4, 1], [5, 0, 0]]),
    "tile_edge": torch.arange(5).repeat_interleave(torch.tensor([15, 16, 17, 0, 1])).view(-1, 1),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_edges(backend, name):
    case = make_case(hidden=20, inner=12, with_extras=True, index=INDICES[name])
    assert_close(case, backend, TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_experts_at_all(backend):
    case = make_case(experts=0, with_extras=True, index=torch.zeros(6, 2, dtype=torch.int64))
    assert_close(case, backend, tolerance=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_a_token_stays_with_it(backend):
    case = make_case(tokens=12, hidden=20, inner=12)
    case.index[4] = 5
    with torch.no_grad():
        case.hidden[[4, 7]] = float("nan")
        case.index[7, 0] = 2
    out = case.run(backend)
    # token 4 has no expert: its NaN is never read
    assert out.isnan().any(dim=1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_an_idle_expert_is_not_read(backend):
    case = make_case(index=torch.tensor([[0, 1], [1, 3], [3, 0]]))
    with torch.no_grad():
        case.gate_up[2] = float("nan")
        case.down[4] = float("nan")
    found = torch.autograd.grad(case.run(backend), list(case.leaves.values()), case.grad_out)
    assert not any(g.isnan().any() for g in found)
    assert not found[1][[2, 4]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slot_views(backend):
    experts, hidden, inner = 4, 20, 12
    buffer = torch.randn(experts, 3 * hidden * inner + 8) * 0.2
    buffer.requires_grad_()
    gate_up = buffer[:, : 2 * inner * hidden].view(experts, 2 * inner, hidden)
    down = buffer[:, 2 * inner * hidden : 3 * inner * hidden].view(experts, hidden, inner)
    case = make_case(experts=experts, hidden=hidden, inner=inner)
    grads = []
    for weights in ((gate_up, down), (gate_up.contiguous(), down.contiguous())):
        case.gate_up, case.down = weights
        grads.append(torch.autograd.grad(case.run(backend), buffer, case.grad_out, retain_graph=True)[0])
    # the same products, read through other strides
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    assert not grads[0][:, 3 * inner * hidden :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    case = make_case(hidden=20, inner=12, with_extras=True)
    want = case.run(backend)
    for name in ("hidden", "weight", "scale", "gate_up_bias", "down_bias", "index"):
        tensor = getattr(case, name)
        setattr(case, name, torch.stack([tensor, tensor], dim=-1)[..., 0])
    assert torch.equal(case.run(backend), want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_is_deterministic(backend):
    case = make_case(with_extras=True, **FEWER[backend])

    def run():
        return [x.clone() for x in torch.autograd.grad(case.run(backend), list(case.leaves.values()), case.grad_out)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    case = make_case(with_extras=True)
    for name, leaf in case.leaves.items():
        if name != "scale":
            leaf.requires_grad_(False)
    assert errors(case, backend).keys() == {"out", "scale"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients(backend):
    case = make_case()
    with torch.no_grad():
        out = case.run(backend)
    assert not out.requires_grad
    assert torch.equal(out, case.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_routing_weight_multiplies_before_rounding(backend):
    # almost half a step of float16 above 1.25
    weight = 1.25 + 0.9 * 2.0**-11
    case = make_case(hidden=8, inner=8, index=torch.zeros(9, 1, dtype=torch.int64), dtype=torch.float16)
    case.weight = torch.ones(9, 1)
    rows = case.run(backend)
    case.weight = torch.full((9, 1), weight)
    assert torch.equal(case.run(backend), (rows.float() * weight).half())
    assert not torch.equal(case.run(backend), rows * torch.tensor(weight).half())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gate_and_norm_functions(backend):
    scale = torch.linspace(0.5, 1.5, 37, requires_grad=True)

    def norm(rows):
        return rows / rows.pow(2).mean(-1, keepdim=True).add(1e-3).sqrt() * scale

    spec = ExpertSpec(gate_fn=lambda pre: F.silu(pre[:, :19]).clamp(max=0.2) * pre[:, 19:], post_norm=norm)
    case = make_case(spec)
    out = case.run(backend)
    (got,) = torch.autograd.grad(out.sum(), scale)
    rows = torch.zeros_like(out)
    for t, k in (case.index < 5).nonzero().tolist():
        e = case.index[t, k]
        row = norm(case.down[e] @ spec.gate_fn((case.gate_up[e] @ case.hidden[t])[None])[0])
        rows[t] = rows[t] + case.weight[t, k] * row
    (want,) = torch.autograd.grad(rows.sum(), scale)
    # float32 on both sides
    torch.testing.assert_close(out, rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rows_without_expert_cost_no_gemm(monkeypatch):
    seen = []
    grouped_mm = F.grouped_mm

    def spy(x, *args, **kwargs):
        seen.append(x.shape[0])
        return grouped_mm(x, *args, **kwargs)

    monkeypatch.setattr(F, "grouped_mm", spy)
    case = make_case(tokens=50, hidden=16, inner=8)
    case.run("torch")
    assert seen == [(case.index < 5).sum().item()] * 2


@pytest.mark.parametrize("inner", [12, 19], ids=["grouped_mm", "loop"])
@pytest.mark.parametrize("name", ["silu", "gpt_oss"])
def test_torch_where_the_host_cannot_count(monkeypatch, name, inner):
    # on a device the rows without an expert stay in, and grouped_mm leaves them (here: NaN) as it found the memory
    for module in ("combine", "torch_backend"):
        monkeypatch.setattr(import_module(f"raymoe.kernels.{module}"), "real_rows", lambda plan: None)
    case = make_case(SPECS[name], hidden=20, inner=inner, with_extras=True)
    assert_close(case, "torch", TOLERANCE[torch.float32])


def sliced(tensor: torch.Tensor, fill: float) -> torch.Tensor:
    """As large, but a strided view of a wider buffer, as flat gradient buffers give it."""
    buffer = torch.full((tensor.shape[0], tensor[0].numel() + 8), fill, dtype=tensor.dtype)
    return buffer[:, : tensor[0].numel()].view(tensor.shape)


@pytest.mark.parametrize("name", ["silu", "gpt_oss", "ungated_relu2"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_grad_into(backend, name):
    # expert 1 has no rows
    index = torch.tensor([[0, 2], [2, 2], [3, 0], [0, 4], [4, 4]])
    case = make_case(SPECS[name], experts=4, hidden=20, inner=12, with_extras=True, index=index)
    leaves = list(case.leaves.values())
    want = dict(zip(case.leaves, torch.autograd.grad(case.run(backend), leaves, case.grad_out), strict=True))
    weights = {"gate_up": case.gate_up, "down": case.down}
    into = {name: sliced(weight, 0.5) for name, weight in weights.items()}
    for buffer in into.values():
        buffer[1] = float("nan")
    for times in (1, 2):
        out = case.run(backend, grad_into=(into["gate_up"], into["down"]))
        out.backward(case.grad_out)
        for name, buffer in into.items():
            assert weights[name].grad is None
            active = [0, 2, 3]
            added = times * want[name][active].double()
            # of what is added; the buffer rounds to float32 around 0.5
            assert relative_error(buffer[active].double() - 0.5, added) <= TOLERANCE[torch.float32]
            # not a byte of an idle expert
            assert torch.equal(buffer[1].view(torch.int32), torch.full_like(buffer[1], float("nan")).view(torch.int32))
    for name in want.keys() - into.keys():
        assert torch.equal(case.leaves[name].grad, 2 * want[name])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_grad_into_where_the_weights_want_none(backend):
    # gathered weights are no leaves: the buffers are where their gradients belong
    case = make_case(experts=3, tokens=6, hidden=20, inner=12)
    want = torch.autograd.grad(case.run(backend), [case.hidden, case.gate_up, case.down], case.grad_out)
    for weight in (case.gate_up, case.down):
        weight.requires_grad_(False)
    into = torch.zeros_like(case.gate_up), torch.zeros_like(case.down)
    case.run(backend, grad_into=into).backward(case.grad_out)
    for got, grad in zip((case.hidden.grad, *into), want, strict=True):
        assert relative_error(got, grad) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_grad_into_waits_for_backward(backend):
    case = make_case(experts=3, tokens=6, hidden=20, inner=12)
    into = torch.zeros_like(case.gate_up), torch.zeros_like(case.down)
    with torch.no_grad():
        out = case.run(backend, grad_into=into)
    assert torch.equal(out, case.run(backend, grad_into=into))
    assert not any(buffer.any() for buffer in into)


WRONG_INTO = {
    "shape": ((5, 37, 38), (5, 37, 19), torch.float32, r"grad_into for gate_up is torch.float32 \(5, 37, 38\)"),
    "second": (
        (5, 38, 37),
        (4, 37, 19),
        torch.float32,
        r"grad_into for down .*\(4, 37, 19\).*down torch.float32 \(5, 37, 19\)",
    ),
    "dtype": ((5, 38, 37), (5, 37, 19), torch.bfloat16, "grad_into for gate_up is torch.bfloat16.*must be alike"),
}


@pytest.mark.parametrize("name", WRONG_INTO)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_grad_into_like_the_weights(backend, name):
    *shapes, dtype, message = WRONG_INTO[name]
    with pytest.raises(ValueError, match=message):
        make_case().run(backend, grad_into=tuple(torch.zeros(shape, dtype=dtype) for shape in shapes))


@pytest.mark.parametrize(("backend", "message"), [("reference", "takes no grad_into"), ("cpu", "a gradient is wanted")])
def test_grad_into_is_refused(backend, message):
    case = make_case()
    with pytest.raises(ValueError, match=message):
        case.run(backend, grad_into=(torch.zeros_like(case.gate_up), torch.zeros_like(case.down)))


def test_activation_is_a_shorthand():
    case = make_case(SPECS["relu"])
    short = moe_mlp(case.hidden, case.gate_up, case.down, case.index, case.weight, activation="relu", backend="torch")
    assert torch.equal(short, case.run("torch"))


def test_calls_are_counted():
    before = calls().get("reference", 0)
    make_case().run("reference")
    assert calls()["reference"] == before + 1


WRONG = {
    "hidden": ({"hidden": torch.zeros(13)}, "hidden must be a float tensor"),
    "gate_up": ({"gate_up": torch.zeros(5, 38, 36)}, r"gate_up is \(5, 38, 36\), expected \(5, 38, 37\)"),
    "gate_up_rank": ({"gate_up": torch.zeros(38, 37)}, "stack the experts"),
    "down": ({"down": torch.zeros(4, 37, 19)}, r"down is \(4, 37, 19\), expected \(5, 37, 19\)"),
    "dtype": ({"down": torch.zeros(5, 37, 19).double()}, "down is torch.float64, hidden is torch.float32"),
    "index_tokens": ({"index": torch.zeros(12, 3).long()}, r"expert_index must be \[T, K\] with T=13"),
    "index_dtype": ({"index": torch.zeros(13, 3)}, "expert_index must be an integer tensor"),
    "index_range": ({"index": torch.full((13, 3), 6)}, "there are 5 experts"),
    "weight": ({"weight": torch.zeros(13, 2)}, "expert_weight must be a float tensor"),
    "bias": ({"gate_up_bias": torch.zeros(5, 19), "down_bias": torch.zeros(5, 37)}, r"biases\[0\] is \(5, 19\)"),
    "scale": ({"scale": torch.zeros(13, 37)}, r"hidden_scale is \(13, 37\), expected \(13, 19\)"),
    "is_gated": ({"spec": SPECS["ungated_relu2"]}, "is_gated=False"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_errors_name_the_argument(backend, name):
    changes, message = WRONG[name]
    case = make_case()
    for field, value in changes.items():
        setattr(case, field, value)
    with pytest.raises(ValueError, match=message):
        case.run(backend)


def test_contradicting_activation():
    case = make_case()
    with pytest.raises(ValueError, match="contradicts"):
        moe_mlp(case.hidden, case.gate_up, case.down, case.index, case.weight, activation="relu", spec=ExpertSpec())
