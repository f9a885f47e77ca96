"""Find the MoE layers of any transformers model that follows the experts interface, and of switch_transformers.

E experts, K choices per token, S routed rows, H hidden size, I expert width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from raymoe.kernels import ExpertSpec
from raymoe.models import switch
from raymoe.models.layout import ExpertLayout

_INTERFACE_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_ROUTER_NAMES = ("gate", "router")
_ACTIVATIONS = {
    type(ACT2FN[name]): ours
    for name, ours in {
        "silu": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
        "relu2": "relu2",
    }.items()
}


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One MoE layer of a model: its experts, its router, and how an expert looks."""

    index: int
    """Counts MoE layers only, from 0."""
    name: str
    """Path of the experts module, e.g. `model.layers.3.mlp.experts`."""
    decoder_layer: int
    """Number of the transformer block; an encoder-decoder's decoder counts on from its encoder."""
    num_experts: int
    top_k: int
    layout: ExpertLayout
    spec: ExpertSpec
    experts: nn.Module
    router: nn.Module
    block: nn.Module
    """The transformer block: attention, then these experts."""


def moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The MoE layers of `model`, in forward order.

    Raises:
        ValueError: the model has no layer that follows transformers' experts interface; names the family.
    """
    found: list[MoELayer] = []
    blocks: dict[str, int] = {}
    for name, module in model.named_modules():
        stack, _, number = name.rpartition(".")
        if number.isdigit() and _is_block(name):
            blocks[name] = len(blocks)
        is_switch = switch.is_switch_experts(module)
        if not is_switch and not all(hasattr(module, flag) for flag in _INTERFACE_FLAGS):
            continue
        mlp = model.get_submodule(stack)
        router = _router_of(mlp, name)
        block_path = _block_path(name)
        found.append(
            MoELayer(
                index=len(found),
                name=name,
                decoder_layer=blocks[block_path] if is_switch else int(block_path.rpartition(".")[2]),
                num_experts=len(list(module.children()))
                if is_switch
                else next(iter(module.parameters(recurse=False))).shape[0],
                top_k=1 if is_switch else _top_k(mlp, router, model),
                layout=switch.layout_of(module) if is_switch else ExpertLayout.of(module),
                spec=switch.spec_of(module, _ACTIVATIONS) if is_switch else spec_of(module),
                experts=module,
                router=router,
                block=model.get_submodule(block_path),
            )
        )
    if not found:
        family = model.config.model_type
        raise ValueError(
            f"model family '{family}' ({type(model).__name__}) has no MoE layer behind transformers' experts interface, "
            "so raymoe cannot reach its experts. Families that follow it include mixtral, olmoe, qwen2_moe, qwen3_moe, "
            "phimoe, deepseek_v2, deepseek_v3 and gpt_oss; switch_transformers is known besides."
        )
    return found


def spec_of(experts: Any) -> ExpertSpec:
    """What `raymoe.kernels` must know of a transformers experts module: its interface flags and its gate."""
    post_norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
    spec = ExpertSpec(is_gated=experts.has_gate, is_transposed=experts.is_transposed, post_norm=post_norm)
    if type(experts)._apply_gate is _default_apply_gate or not experts.has_gate:
        activation = _ACTIVATIONS.get(type(experts.act_fn))
        if activation is not None:
            # the default gate chunks in two whatever is_concatenated says
            return replace(spec, activation=activation)
        if not experts.has_gate:
            return replace(spec, gate_fn=experts.act_fn)
    return _clamped_gate(experts, spec) or replace(spec, gate_fn=experts._apply_gate)


def _clamped_gate(experts: Any, spec: ExpertSpec) -> ExpertSpec | None:
    """The gpt-oss gate as numbers, if the family's own `_apply_gate` computes just that (probed on random rows)."""
    limit, alpha = getattr(experts, "limit", None), getattr(experts, "alpha", None)
    if limit is None or alpha is None or experts.is_concatenated:
        return None
    rows = torch.linspace(-3.0 * limit, 3.0 * limit, 64, dtype=torch.float64).view(4, 16)
    gate, up = rows[:, ::2].clamp(max=limit), rows[:, 1::2].clamp(-limit, limit)
    if not torch.allclose(experts._apply_gate(rows), (up + 1) * gate * torch.sigmoid(alpha * gate), rtol=1e-12, atol=0):
        return None
    return replace(spec, is_interleaved=True, gate_limit=float(limit), gate_alpha=float(alpha), up_offset=1.0)


def expert_parameter_names(layers: list[MoELayer]) -> set[str]:
    """Names in the model of all parameters that belong to experts."""
    return {
        f"{layer.name}.{name}"
        for layer in layers
        for name, _ in layer.experts.named_parameters(recurse=switch.is_switch_experts(layer.experts))
    }


def expert_parameters(layer: MoELayer) -> dict[str, Tensor]:
    """The experts' parameters [E, *shape] by the names of `layer.layout`; a copy where the family keeps experts apart."""
    if switch.is_switch_experts(layer.experts):
        return {name: torch.stack([p.data for p in each]) for name, each in switch.parameters_of(layer.experts).items()}
    return dict(layer.experts.named_parameters(recurse=False))


def weights_of(layer: MoELayer, views: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Picks from `{parameter name: [slots, *shape]}` what `raymoe.kernels` takes: (gate_up, down, biases or None)."""
    return select_weights(layer.spec, views)


def select_weights(
    spec: ExpertSpec, parameters: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """`weights_of` for whoever has the spec alone."""
    up = "gate_up_proj" if spec.is_gated else "up_proj"
    biases = (parameters[f"{up}_bias"], parameters["down_proj_bias"]) if "down_proj_bias" in parameters else None
    return parameters[up], parameters["down_proj"], biases


def _block_path(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.experts`."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    assert match is not None, f"{name} lies in no numbered block"
    return match[0]


def _is_block(name: str) -> bool:
    """Whether `name` is the path of a transformer block: the first number in it is its last part."""
    return not any(part.isdigit() for part in name.split(".")[:-1])


def _router_of(mlp: nn.Module, name: str) -> nn.Module:
    for candidate in _ROUTER_NAMES:
        if isinstance(getattr(mlp, candidate, None), nn.Module):
            return getattr(mlp, candidate)
    raise ValueError(
        f"{name}: no router beside the experts (looked for {' and '.join(_ROUTER_NAMES)} in {type(mlp).__name__})"
    )


def _top_k(mlp: nn.Module, router: nn.Module, model: PreTrainedModel) -> int:
    for owner, attribute in (
        (router, "top_k"),
        (mlp, "top_k"),
        (model.config.get_text_config(), "num_experts_per_tok"),
    ):
        if isinstance(getattr(owner, attribute, None), int):
            return getattr(owner, attribute)
    raise ValueError(f"model family '{model.config.model_type}': cannot tell how many experts a token takes")
