"""Every family with our experts function equals the untouched transformers model, forward and backward."""

import copy

import pytest
import torch

import raymoe.models
from tests.tiny_models import FAMILIES, tiny_model

# fp32 sums taken in another order: relative error of the whole tensor, 1e-5 is the bound the project promises
TOLERANCE = 1e-5


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)).item()


def run(model, ids):
    logits = model(ids).logits
    generator = torch.Generator().manual_seed(7)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient(family):
    theirs = tiny_model(family)
    theirs.set_experts_implementation("eager")
    ours = copy.deepcopy(theirs)
    ours.set_experts_implementation("raymoe")
    ids = torch.randint(2, 96, (3, 21))

    expected_logits, expected_grads = run(theirs, ids)
    logits, grads = run(ours, ids)

    assert relative_error(logits, expected_logits) <= TOLERANCE
    assert grads.keys() == expected_grads.keys()
    assert any("experts" in name for name in grads)
    for name, expected in expected_grads.items():
        assert relative_error(grads[name], expected) <= TOLERANCE, name


@pytest.mark.parametrize("family", FAMILIES)
def test_runtime_sees_every_layer_and_row(family):
    model = tiny_model(family)
    calls = []

    def runtime(layer, hidden, index, weight):
        calls.append((layer.index, tuple(hidden.shape), tuple(index.shape), tuple(weight.shape)))
        assert index.max() < layer.num_experts
        return torch.zeros_like(hidden)

    layers = raymoe.models.attach_runtime(model, runtime)
    ids = torch.randint(2, 96, (2, 9))
    with torch.no_grad():
        model(ids)
        assert calls == [(i, (18, 32), (18, layer.top_k), (18, layer.top_k)) for i, layer in enumerate(layers)]
        raymoe.models.detach_runtime(model)
        model(ids)
    assert len(calls) == len(layers)


def test_family_outside_the_interface_is_named():
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, kv_channels=8, num_hidden_layers=1, num_key_value_heads=1
    )
    with torch.device("meta"):
        model = JetMoeForCausalLM(config)
    with pytest.raises(ValueError, match=r"'jetmoe' .* has no MoE layer"):
        raymoe.models.moe_layers(model)
