"""The seam with transformers: an experts function of ours, and the runtime that may stand behind it.

Importing this module registers "raymoe" with transformers' experts interface. Without a runtime it computes
`raymoe.kernels.moe_mlp` on the module's own parameters; `attach_runtime` puts training's sparse placement or serving's expert
cache in that place, for every MoE layer of one model. switch_transformers has no such interface: without a runtime it computes
as transformers does.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from raymoe.kernels import moe_mlp
from raymoe.models import switch
from raymoe.models.layers import MoELayer, moe_layers, select_weights, spec_of

ExpertsRuntime = Callable[..., Tensor]
"""(layer, hidden [T, H], expert_index [T, K] int64, expert_weight [T, K]) -> [T, H] in hidden's dtype.

Behind an `ExpertsEdit` that scales rows it also takes `input_scale` and `hidden_scale`, as `raymoe.kernels.moe_mlp` does. An
index of `layer.num_experts` is no expert: a token that the router dropped."""

ExpertsEdit = Callable[[Tensor, Tensor, Tensor, Callable[..., Tensor]], Tensor]
"""(hidden, expert_index, expert_weight, compute) -> [T, H]: another use of one layer's experts than the router's.

`compute(hidden, expert_index, expert_weight, input_scale=None, hidden_scale=None)` is the layer without the edit, whatever runtime
stands behind it."""

_IMPLEMENTATION = "raymoe"


def attach_runtime(model: PreTrainedModel, runtime: ExpertsRuntime) -> list[MoELayer]:
    """Sends every experts call of `model` to `runtime`; returns the model's MoE layers.

    Raises:
        ValueError: the model's family does not follow the experts interface.
    """
    layers = moe_layers(model)
    if not switch.is_switch_experts(layers[0].experts):
        model.set_experts_implementation(_IMPLEMENTATION)
    for layer in layers:
        if switch.is_switch_experts(layer.experts):
            switch.route_to_runtime(layer.experts, layer, runtime)
            switch.settle_router(layer.router)
        layer.experts.__dict__ |= {"_raymoe_layer": layer, "_raymoe_runtime": runtime}
    return layers


def detach_runtime(model: PreTrainedModel) -> None:
    """Undoes `attach_runtime`: the modules compute on their own parameters again."""
    for layer in moe_layers(model):
        if switch.is_switch_experts(layer.experts):
            switch.unroute(layer.experts)
        for attribute in ("_raymoe_runtime", "_raymoe_layer"):
            layer.experts.__dict__.pop(attribute, None)


def set_edit(model: PreTrainedModel, edits: dict[str, ExpertsEdit] | None) -> None:
    """Puts an edit before the experts of layers, by `MoELayer.name`; None takes all away. It goes before any runtime.

    Raises:
        ValueError: switch_transformers, whose tokens take one expert.
    """
    layers = moe_layers(model)
    if switch.is_switch_experts(layers[0].experts):
        raise ValueError(
            "model family 'switch_transformers': its tokens take one expert, and nothing is left beside it to edit"
        )
    model.set_experts_implementation(_IMPLEMENTATION)
    for layer in layers:
        layer.experts.__dict__.pop("_raymoe_edit", None)
        if edits is not None and layer.name in edits:
            layer.experts.__dict__["_raymoe_edit"] = edits[layer.name]


def _experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    edit = self.__dict__.get("_raymoe_edit")
    if edit is not None:
        return edit(hidden_states, top_k_index, top_k_weights, functools.partial(_compute, self))
    return _compute(self, hidden_states, top_k_index, top_k_weights)


def _compute(self: nn.Module, hidden: Tensor, expert_index: Tensor, expert_weight: Tensor, **scales: Any) -> Tensor:
    runtime = self.__dict__.get("_raymoe_runtime")
    if runtime is not None:
        return runtime(self._raymoe_layer, hidden, expert_index, expert_weight, **scales)
    spec = self.__dict__.get("_raymoe_spec")
    if spec is None:
        spec = self.__dict__["_raymoe_spec"] = spec_of(self)
    gate_up, down, biases = select_weights(spec, dict(self.named_parameters(recurse=False)))
    return moe_mlp(hidden, gate_up, down, expert_index, expert_weight, spec=spec, biases=biases, **scales)


ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _experts_forward)
