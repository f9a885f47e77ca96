"""Gates in the kernels' epilogues, value and slope, against autograd over the torch gate."""

import pytest
import torch

from raymoe.kernels import plan
from raymoe.kernels.gmm_gate import gmm_gate
from raymoe.kernels.gmm_gate_grad import gmm_gate_grad
from raymoe.kernels.spec import apply_gate
from raymoe.kernels.tiles import gmm_config, tile_table
from tests.kernels.oracle import SPECS

ROWS, INNER = 20, 33


def through_kernels(spec, pre, grad_inner, weight):
    """Feeds chosen pre-activations and inner gradients in, by way of identity weights."""
    routing = plan(torch.zeros(ROWS, 1, dtype=torch.int64), 1)
    config = gmm_config(routing, torch.float32)
    tiles = tile_table(routing, config.rows)
    inner, kept = torch.empty(ROWS, INNER), torch.empty_like(pre)
    gmm_gate(pre, torch.eye(pre.shape[1])[None], routing.token, tiles, config, spec, inner, pre=kept)
    assert torch.equal(kept, pre)
    back = gmm_gate_grad(grad_inner, torch.eye(INNER)[None], routing.token, pre, weight, tiles, config, spec)
    return inner, back


@pytest.mark.parametrize("name", SPECS)
def test_value_and_slope(name):
    spec = SPECS[name]
    pre = torch.randn(ROWS, spec.gate_up_factor * INNER) * 3
    grad_inner, weight = torch.randn(ROWS, INNER), torch.rand(ROWS)
    inner, back = through_kernels(spec, pre, grad_inner, weight)

    exact = pre.double().requires_grad_()
    value = apply_gate(exact, spec)
    (slope,) = torch.autograd.grad(value, exact, grad_inner.double() * weight.double()[:, None])
    # float32 exponentials of arguments up to about 15
    torch.testing.assert_close(inner.double(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back.pre.double(), slope, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.scaled_inner, inner * weight[:, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back.row_weight, (grad_inner * inner).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_nan_reaches_the_result(name):
    # a clamp or a relu must not hide that a model has diverged
    spec = SPECS[name]
    pre = torch.full((ROWS, spec.gate_up_factor * INNER), float("nan"))
    inner, _ = through_kernels(spec, pre.nan_to_num(), torch.ones(ROWS, INNER), torch.ones(ROWS))
    assert not inner.isnan().any()
    routing = plan(torch.zeros(ROWS, 1, dtype=torch.int64), 1)
    config = gmm_config(routing, torch.float32)
    weight = torch.eye(pre.shape[1])[None]
    gmm_gate(pre, weight, routing.token, tile_table(routing, config.rows), config, spec, inner)
    assert inner.isnan().all()
