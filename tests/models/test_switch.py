"""switch_transformers as a MoE family like the others: found, routed through a runtime, read and recorded."""

import copy
from typing import Any

import pytest
import torch

from raymoe.kernels import moe_mlp
from raymoe.models import (
    CheckpointWriter,
    attach_runtime,
    detach_runtime,
    expert_parameter_names,
    expert_parameters,
    load_without_experts,
    moe_layers,
    router_logits,
    router_losses,
    weights_of,
)
from raymoe.models.record import RoutingRecorder
from tests.tiny_models import FAMILIES, tiny_model, tiny_switch

TOLERANCE = 1e-5  # fp32 sums taken in another order, as for the other families


def ids(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)).item()


def resident(model):
    """A runtime on the model's own parameters, differentiable; counts the rows that no expert takes."""
    dropped = []

    def runtime(layer, hidden, index, weight):
        dropped.append(int((index == layer.num_experts).sum()))
        parameters = {
            name: torch.stack([p for n, p in layer.experts.named_parameters() if n.endswith(theirs)])
            for name, theirs in (("up_proj", "wi.weight"), ("down_proj", "wo.weight"))
        }
        gate_up, down, biases = weights_of(layer, parameters)
        assert biases is None
        return moe_mlp(hidden, gate_up, down, index, weight, spec=layer.spec)

    return runtime, dropped


def run(model, tokens, decoder_tokens):
    logits = model(input_ids=tokens, decoder_input_ids=decoder_tokens).logits
    generator = torch.Generator().manual_seed(7)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_layers_stand_in_forward_order():
    layers = moe_layers(tiny_switch())
    assert [(layer.index, layer.name, layer.decoder_layer) for layer in layers] == [
        (0, "encoder.block.1.layer.1.mlp.experts", 1),
        (1, "encoder.block.3.layer.1.mlp.experts", 3),
        (2, "decoder.block.1.layer.2.mlp.experts", 5),
        (3, "decoder.block.3.layer.2.mlp.experts", 7),
    ]
    for layer in layers:
        assert (layer.num_experts, layer.top_k, layer.spec.is_gated) == (5, 1, False)
        assert [(field.name, field.shape) for field in layer.layout.fields] == [
            ("up_proj", (48, 32)),
            ("down_proj", (32, 48)),
        ]


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("capacity", [2, 64])
@pytest.mark.parametrize("router_bias", [False, True])
def test_logits_and_every_gradient(capacity, act, router_bias):
    theirs = tiny_switch(expert_capacity=capacity, dense_act_fn=act, router_bias=router_bias)
    ours = copy.deepcopy(theirs)
    runtime, dropped = resident(ours)
    attach_runtime(ours, runtime)
    expected, expected_grads = run(theirs, ids(3, 21), ids(3, 7, seed=6))
    logits, grads = run(ours, ids(3, 21), ids(3, 7, seed=6))
    assert relative_error(logits, expected) <= TOLERANCE
    assert len(dropped) == 4
    assert (sum(dropped) > 0) == (capacity == 2)
    # an expert that no token took has no gradient there, and one of zeros here
    assert expected_grads.keys() <= grads.keys()
    for name, gradient in grads.items():
        assert relative_error(gradient, expected_grads.get(name, torch.zeros_like(gradient))) <= TOLERANCE, name


def test_bf16_weights_come_in_the_rows_dtype():
    theirs = tiny_switch(dtype=torch.bfloat16)
    ours = copy.deepcopy(theirs)
    seen = []

    def runtime(layer, hidden, index, weight):
        seen.append((hidden.dtype, index.dtype, weight.dtype, tuple(index.shape), tuple(weight.shape)))
        return resident(ours)[0](layer, hidden, index, weight)

    attach_runtime(ours, runtime)
    with torch.no_grad():
        expected = theirs(input_ids=ids(2, 9), decoder_input_ids=ids(2, 5)).logits
        logits = ours(input_ids=ids(2, 9), decoder_input_ids=ids(2, 5)).logits
    assert seen == [(torch.bfloat16, torch.int64, torch.bfloat16, (n, 1), (n, 1)) for n in (18, 18, 10, 10)]
    # bf16 has eight bits, and the error passes through eight blocks
    assert relative_error(logits, expected) <= 2e-2


def test_dropped_tokens_are_no_experts():
    model = tiny_switch(expert_capacity=1)
    calls = []

    def runtime(layer, hidden, index, weight):
        calls.append((index, weight))
        return torch.zeros_like(hidden)

    attach_runtime(model, runtime)
    with torch.no_grad():
        model(input_ids=ids(2, 11), decoder_input_ids=ids(2, 4))
    for (index, weight), length in zip(calls, (11, 11, 4, 4), strict=True):
        for sequence in index.view(2, length).tolist():
            kept = [expert for expert in sequence if expert < 5]
            assert len(kept) == len(set(kept))
        assert (weight[index == 5] == 0).all()
        assert (weight[index < 5] > 0).all()
    assert any((index == 5).any() for index, _ in calls)


def test_detached_it_is_transformers_again():
    model = tiny_switch()
    arguments = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 5)}
    with torch.no_grad():
        expected = model(**arguments).logits
        attach_runtime(model, lambda layer, hidden, index, weight: torch.zeros_like(hidden))
        assert not torch.equal(model(**arguments).logits, expected)
        detach_runtime(model)
        assert torch.equal(model(**arguments).logits, expected)


def test_dropout_inside_the_experts_is_refused_when_training():
    model = tiny_switch(dropout_rate=0.1).train()
    attach_runtime(model, lambda layer, hidden, index, weight: torch.zeros_like(hidden))
    with pytest.raises(ValueError, match=r"dropout_rate: 0\.1 .* train with dropout_rate: 0"):
        model(input_ids=ids(1, 3), decoder_input_ids=ids(1, 3))


def test_an_activation_that_the_kernels_lack_is_named():
    with pytest.raises(ValueError, match="dense_act_fn: Tanh is not an activation"):
        moe_layers(tiny_switch(dense_act_fn="tanh"))


def test_experts_left_in_the_files_give_the_same_logits(tmp_path):
    model = tiny_switch()
    model.save_pretrained(tmp_path)
    arguments = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 5)}
    with torch.no_grad():
        expected = model(**arguments).logits
    loaded, files = load_without_experts(tmp_path, torch.float32)
    assert {n for n, p in loaded.named_parameters() if p.is_meta} == expert_parameter_names(files.layers)
    assert loaded.lm_head.weight is loaded.shared.weight

    def runtime(layer, hidden, index, weight):
        flat = torch.full((layer.num_experts, layer.layout.numel), torch.nan)
        for expert in set(index.flatten().tolist()) - {layer.num_experts}:
            assert files.read(layer.index, expert, flat[expert]) == 2 * 48 * 32 * 4
        gate_up, down, _ = weights_of(layer, layer.layout.views(flat))
        return moe_mlp(hidden, gate_up, down, index, weight, spec=layer.spec)

    attach_runtime(loaded, runtime)
    with torch.no_grad():
        assert relative_error(loaded(**arguments).logits, expected) <= TOLERANCE


def test_a_layer_may_be_written_whole(tmp_path):
    model = tiny_switch()
    layers = moe_layers(model)
    experts = expert_parameter_names(layers)
    with CheckpointWriter(tmp_path / "out", model) as writer:
        writer.add({name: value for name, value in model.state_dict().items() if name not in experts})
        for layer in layers:
            writer.add({f"{layer.name}.{name}": value for name, value in expert_parameters(layer).items()})
    reopened = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert reopened.keys() == model.state_dict().keys()
    assert all(torch.equal(reopened[name], value) for name, value in model.state_dict().items())


def test_the_recorder_sees_experts_and_dropped_tokens():
    model = tiny_switch(expert_capacity=2)
    masks = []
    layers = moe_layers(model)
    hooks = [layer.router.register_forward_hook(lambda _m, _i, out: masks.append(out[0])) for layer in layers]
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=ids(2, 9), decoder_input_ids=ids(2, 5))
    for hook in hooks:
        hook.remove()
    for chosen, mask in zip(recorder.take(), masks, strict=True):
        expected = [[row.index(1)] if 1 in row else [5] for sequence in mask.tolist() for row in sequence]
        assert chosen.tolist() == expected


def kept_logits(model, **arguments) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(logits, inputs) of the routers, layer by layer."""
    logits, inputs = [], []

    def keep(layer):
        def hook(_module: Any, taken: tuple, outputs: Any) -> None:
            logits.append(router_logits(layer, outputs))
            inputs.append(taken[0].flatten(0, -2))

        return hook

    for layer in moe_layers(model):
        layer.router.register_forward_hook(keep(layer))
    model(**arguments)
    return logits, inputs


def test_router_logits_are_those_of_the_classifier():
    model = tiny_switch()
    logits, inputs = kept_logits(model, input_ids=ids(2, 9), decoder_input_ids=ids(2, 5))
    for layer, found, hidden in zip(moe_layers(model), logits, inputs, strict=True):
        expected = hidden @ layer.router.get_parameter("classifier.weight").T
        assert torch.allclose(found, expected, atol=1e-6)
        assert found.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_router_logits_of_the_other_families(family):
    model = tiny_model(family)
    logits, _ = kept_logits(model, input_ids=ids(2, 9))
    assert [tuple(found.shape) for found in logits] == [(18, layer.num_experts) for layer in moe_layers(model)]


def test_losses_that_configurations_ask_for():
    expected = dict.fromkeys(FAMILIES, (0.001, 0.0)) | {"olmoe": (0.01, 0.0)}
    expected |= {"deepseek_v2": (0.0, 0.0), "deepseek_v3": (0.0, 0.0)}
    assert {family: tuple(router_losses(tiny_model(family).config)) for family in FAMILIES} == expected
    assert tuple(router_losses(tiny_model("mixtral", router_aux_loss_coef=0.25).config)) == (0.25, 0.0)
    switch = tiny_switch(router_aux_loss_coef=0.5, router_z_loss_coef=0.125)
    assert tuple(router_losses(switch.config)) == (0.5, 0.125)
