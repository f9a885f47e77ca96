import pytest
import torch
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from raymoe.models import moe_layers
from raymoe.training.loss import RouterLogits, balance_loss, router_z_loss, token_loss_sum
from tests.tiny_models import FAMILIES, tiny_model


def test_balance_loss_is_transformers_own():
    torch.manual_seed(3)
    logits = [torch.randn(50, 8) for _ in range(3)]
    loads = torch.stack([layer.topk(2).indices.flatten().bincount(minlength=8) for layer in logits])
    expected = load_balancing_loss_func(tuple(logits), num_experts=8, top_k=2)
    assert torch.allclose(balance_loss(logits, loads, 150), expected, rtol=1e-6)


def test_parts_of_the_batch_add_up_to_its_loss():
    logits = [torch.randn(50, 8, dtype=torch.float64) for _ in range(3)]
    loads = torch.randint(1, 40, (3, 8))
    parts = sum(balance_loss([layer[rows] for layer in logits], loads, 150) for rows in (slice(0, 13), slice(13, 50)))
    assert torch.allclose(parts, balance_loss(logits, loads, 150), rtol=1e-12)


def test_perfect_balance_gives_k():
    loads = torch.full((2, 8), 50 * 3 // 8 + 0.75)
    assert balance_loss([torch.zeros(50, 8)] * 2, loads, 100).item() == pytest.approx(3.0)


def test_z_loss_is_switchs_own():
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    logits = torch.randn(4, 25, 8, dtype=torch.float64)
    assert router_z_loss([logits], 100).item() == pytest.approx(router_z_loss_func(logits).item(), rel=1e-12)


def test_token_loss_keeps_the_dtype_and_sums_what_counts():
    logits, targets = torch.randn(2, 5, 11, dtype=torch.float64), torch.randint(0, 11, (2, 5))
    counts = torch.rand(2, 5) < 0.6
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0][counts].sum()
    loss = token_loss_sum(logits, targets, counts)
    assert loss.dtype == torch.float64
    assert torch.allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_router_logits_of_every_family(family):
    model = tiny_model(family)
    layers = moe_layers(model)
    kept = RouterLogits(layers)
    with torch.no_grad():
        model(torch.randint(2, 96, (2, 9)))
    logits = kept.take()
    assert [tuple(layer.shape) for layer in logits] == [(18, layer.num_experts) for layer in layers]
    assert kept.take() == []
