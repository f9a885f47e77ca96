"""switch_transformers: experts that are modules of their own, chosen by a one-hot mask that also says who is dropped.

The family does not follow transformers' experts interface, so what the interface gives for the others is here.
T tokens, E experts, H hidden size, I expert width.
"""

import re
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
    SwitchTransformersTop1Router,
)

from raymoe.kernels import ExpertSpec
from raymoe.models.layout import ExpertLayout

PARAMETERS = {"up_proj": "wi.weight", "down_proj": "wo.weight"}
"""Our names for the parameters of an expert, and theirs."""
LOGITS_POSITION = 2
"""Of the router's output (mask, probability, logits)."""

_BLOCK = re.compile(r"\bblock\.\d+\.layer\.\d+\.mlp\.experts\.")
_EXPERT = re.compile(r"(.*\.experts)\.expert_(\d+)\.(wi|wo)\.weight$")


def is_switch_experts(module: nn.Module) -> bool:
    return isinstance(module, SwitchTransformersExperts)


def is_switch_router(module: nn.Module) -> bool:
    return isinstance(module, SwitchTransformersTop1Router)


def settle_router(router: nn.Module) -> None:
    """Brings the classifier to the dtype in which it computes: its first forward would do so in place, under the feet of
    whoever holds its parameters."""
    this: Any = router
    this.classifier.to(this.dtype)


def layout_of(experts: nn.Module) -> ExpertLayout:
    """`up_proj` [I, H] and `down_proj` [H, I] of one expert."""
    first: Any = experts.get_submodule("expert_0")
    return ExpertLayout.of_shapes(
        {ours: tuple(first.get_parameter(theirs).shape) for ours, theirs in PARAMETERS.items()}
    )


def spec_of(experts: nn.Module, activations: dict[type, str]) -> ExpertSpec:
    """Not gated, with the activation of `dense_act_fn`.

    Raises:
        ValueError: an activation that the kernels do not have.
    """
    act: Any = experts.get_submodule("expert_0").act
    if type(act) not in activations:
        raise ValueError(
            f"dense_act_fn: {type(act).__name__} is not an activation of raymoe's kernels; use one of "
            f"{', '.join(activations.values())}"
        )
    return ExpertSpec(activation=activations[type(act)], is_gated=False)


def parameters_of(experts: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{our name: the parameter of every expert, in their order}."""
    return {
        ours: [experts.get_submodule(f"expert_{e}").get_parameter(theirs) for e in range(len(list(experts.children())))]
        for ours, theirs in PARAMETERS.items()
    }


def stored_name(parameter: str, expert: int) -> str:
    """Name in model and file of one expert's part of `...experts.up_proj`."""
    module, _, ours = parameter.rpartition(".")
    return f"{module}.expert_{expert}.{PARAMETERS[ours]}"


def is_parameter(name: str) -> bool:
    """Whether `name` is one of our names for all experts of a layer of this family."""
    return name.endswith((".experts.up_proj", ".experts.down_proj")) and _BLOCK.search(name) is not None


def parameter_of(stored: str) -> tuple[str, int] | None:
    """(`...experts.up_proj`, expert) of a name in model or file; None if it is no expert's."""
    match = _EXPERT.match(stored)
    if match is None:
        return None
    ours = next(ours for ours, theirs in PARAMETERS.items() if theirs.startswith(match[3]))
    return f"{match[1]}.{ours}", int(match[2])


def chosen_experts(mask: Tensor) -> Tensor:
    """int64 [T, 1]: the expert of each token, E for a token that was dropped, from the router's mask [T, 1, E]."""
    mask = mask.flatten(0, -2)
    return mask.argmax(-1, keepdim=True).masked_fill(~mask.any(-1, keepdim=True), mask.shape[-1])


def route_to_runtime(experts: nn.Module, layer: Any, runtime: Any) -> None:
    """Makes `experts` call `runtime(layer, hidden [T, H], expert_index [T, 1], expert_weight [T, 1])`."""

    def forward(self: nn.Module, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        dropout: Any = self.get_submodule("expert_0").dropout
        if self.training and dropout.p > 0:
            raise ValueError(
                f"dropout_rate: {dropout.p} in config.json would drop activations inside the experts, which raymoe's kernels "
                "do not do; train with dropout_rate: 0"
            )
        index = chosen_experts(selected_experts)
        weight = routing_weights.masked_fill(index == selected_experts.shape[-1], 0)
        return runtime(layer, hidden_states, index, weight)

    experts.__dict__["forward"] = MethodType(forward, experts)


def unroute(experts: nn.Module) -> None:
    """Undoes `route_to_runtime`."""
    experts.__dict__.pop("forward", None)
