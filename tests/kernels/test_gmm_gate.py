"""The GEMMs with a gate in their epilogue, value and slope, in each of their variants, against autograd over the torch gate."""

from dataclasses import replace

import pytest
import torch

from raymoe.kernels import plan
from raymoe.kernels.configs import GemmConfig
from raymoe.kernels.gmm_gate import gmm_gate
from raymoe.kernels.gmm_gate_grad import gmm_gate_grad
from raymoe.kernels.spec import apply_gate
from raymoe.kernels.tiles import tile_table
from tests.kernels.oracle import SPECS

EXPERTS, HIDDEN, INNER = 3, 24, 20
CONFIG = GemmConfig(16, 16, 16, group=2)
VARIANTS = {
    "pointers": {},
    "weights": {"weights": "descriptor", "slices": 2},
    "both": {"weights": "descriptor", "inputs": "descriptor"},
    "swapped": {"is_swapped": True},
    "swapped_weights": {"is_swapped": True, "weights": "descriptor", "slices": 2},
    "flattened": {"weights": "descriptor", "is_persistent": True, "is_flattened": True, "slices": 4},
}
# every variant with a gate in halves, every spec with the first and the last
CASES = [
    (spec, name) for spec in SPECS for name in VARIANTS if spec == "clamped_silu" or name in ("pointers", "flattened")
]


def layer(spec):
    """A routing with an idle expert and rows without one, and random operands."""
    routing = plan(torch.tensor([[0, 2, 3]] * 9 + [[2, 2, 3]] * 3), EXPERTS)
    tokens, rows, up_size = 12, 36, spec.gate_up_factor * INNER

    def matrices(out_size, in_size):
        shape = (in_size, out_size) if spec.is_transposed else (out_size, in_size)
        weight = torch.randn(EXPERTS, *shape)
        return weight.mT if spec.is_transposed else weight

    return routing, {
        "x": torch.randn(tokens, HIDDEN),
        "gate_up": matrices(up_size, HIDDEN) * 0.3,
        "down": matrices(HIDDEN, INNER),
        "gate_up_bias": torch.randn(EXPERTS, up_size),
        "down_bias": torch.randn(EXPERTS, HIDDEN),
        "scale": torch.randn(tokens, INNER),
        "pre": torch.empty(rows, up_size),
        "inner": torch.empty(rows, INNER),
        "row_weight": torch.rand(rows),
    }


def exact(operands, name, rows=slice(None)):
    return operands[name][rows].double()


@pytest.mark.parametrize(("spec", "variant"), CASES)
def test_forward(spec, variant):
    spec, config = SPECS[spec], replace(CONFIG, **VARIANTS[variant])
    routing, t = layer(spec)
    tiles = tile_table(routing, config.rows)
    gmm_gate(
        t["x"],
        t["gate_up"],
        routing.token,
        tiles,
        config,
        spec,
        t["inner"],
        pre=t["pre"],
        bias=t["gate_up_bias"],
        scale=t["scale"],
    )
    real = int(routing.offsets[-1])
    token, expert = routing.token[:real], routing.expert[:real]
    pre = torch.einsum("rh,rnh->rn", exact(t, "x", token), exact(t, "gate_up", expert))
    pre = pre + exact(t, "gate_up_bias", expert)
    # float32 sums of 24 products, then exponentials
    torch.testing.assert_close(t["pre"][:real].double(), pre, rtol=1e-5, atol=1e-5)
    want = apply_gate(pre, spec) * exact(t, "scale", token)
    torch.testing.assert_close(t["inner"][:real].double(), want, rtol=1e-4, atol=1e-5)
    assert t["inner"][real:].isnan().all()
    # without keeping the pre-activations, and from rows in order, the same bits
    again = torch.empty_like(t["inner"])
    x = t["x"][routing.token]
    options = {"is_sorted": True, "bias": t["gate_up_bias"], "scale": t["scale"]}
    gmm_gate(x, t["gate_up"], routing.token, tiles, config, spec, again, **options)
    assert torch.equal(again[:real], t["inner"][:real])


@pytest.mark.parametrize(("spec", "variant"), CASES)
def test_backward(spec, variant):
    # bias and scale have parts of their own in the kernel: each spec is seen with them and without
    has_extras = variant != "pointers"
    spec, config = SPECS[spec], replace(CONFIG, **VARIANTS[variant])
    routing, t = layer(spec)
    t["pre"].normal_()
    grad_out = t["x"]
    back = gmm_gate_grad(
        grad_out,
        t["down"].transpose(1, 2),
        routing.token,
        t["pre"],
        t["row_weight"],
        tile_table(routing, config.rows),
        config,
        spec,
        bias=t["down_bias"] if has_extras else None,
        scale=t["scale"] if has_extras else None,
    )
    real = int(routing.offsets[-1])
    token, expert = routing.token[:real], routing.expert[:real]
    pre = exact(t, "pre", slice(real)).requires_grad_()
    s = exact(t, "row_weight", slice(real)).requires_grad_()
    c = (exact(t, "scale", token) if has_extras else torch.ones(real, INNER).double()).requires_grad_()
    inner = c * apply_gate(pre, spec)
    rows = torch.einsum("ri,rhi->rh", inner, exact(t, "down", expert))
    rows = rows + exact(t, "down_bias", expert) if has_extras else rows
    loss = (s[:, None] * rows * exact(t, "x", token)).sum()
    grad_pre, grad_weight, grad_scale = torch.autograd.grad(loss, (pre, s, c))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(back.pre[:real].double(), grad_pre, **close)
    torch.testing.assert_close(back.scaled_inner[:real].double(), s[:, None] * inner, **close)
    torch.testing.assert_close(back.row_weight[:real].double(), grad_weight, **close)
    if has_extras:
        torch.testing.assert_close(back.scale[:real].double(), grad_scale, **close)
    else:
        assert back.scale is None
    assert back.pre[real:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("name", ["silu", "gpt_oss", "ungated_relu2"])
def test_quantised_weights(name, dtype):
    spec, config = SPECS[name], replace(CONFIG, **VARIANTS["swapped_weights"])
    routing, t = layer(spec)
    # whole numbers up to 15 are exact in both types; 32 columns in, for TMA's 16 bytes
    up_size = spec.gate_up_factor * INNER
    shape = (EXPERTS, 32, up_size) if spec.is_transposed else (EXPERTS, up_size, 32)
    weight = torch.randint(-15, 16, shape).to(dtype)
    weight = weight.mT if spec.is_transposed else weight
    weight_scale = torch.rand(EXPERTS, up_size) * 0.05
    x = torch.randn(12, 32)
    tiles = tile_table(routing, config.rows)
    gmm_gate(x, weight, routing.token, tiles, config, spec, t["inner"], pre=t["pre"], weight_scale=weight_scale)
    real = int(routing.offsets[-1])
    token, expert = routing.token[:real], routing.expert[:real]
    pre = torch.einsum("rh,rnh->rn", x.double()[token], weight.double()[expert]) * weight_scale.double()[expert]
    torch.testing.assert_close(t["pre"][:real].double(), pre, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(t["inner"][:real].double(), apply_gate(pre, spec), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_nan_reaches_the_result(name):
    # a clamp or a relu must not hide that a model has diverged
    spec = SPECS[name]
    routing = plan(torch.zeros(20, 1, dtype=torch.int64), 1)
    tiles = tile_table(routing, CONFIG.rows)
    weight = torch.eye(spec.gate_up_factor * 17)[None]
    inner = torch.empty(20, 17)
    x = torch.randn(20, weight.shape[1])
    gmm_gate(x, weight, routing.token, tiles, CONFIG, spec, inner)
    assert not inner.isnan().any()
    gmm_gate(torch.full_like(x, float("nan")), weight, routing.token, tiles, CONFIG, spec, inner)
    assert inner.isnan().all()
