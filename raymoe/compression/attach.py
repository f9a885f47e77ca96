"""Put a compression on a model, take it off, or look past it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymoe.compression.calibrate import expert_scores, mean_outputs
from raymoe.compression.edits import LayerEdit
from raymoe.compression.settings import CALIBRATED, LEARNT, PRUNES, CompressionSettings, Keep, keep_by_layer
from raymoe.compression.vectors import Vectors
from raymoe.models import MoELayer, moe_layers, set_edit

_VECTORS = "compressed"
"""Under an experts module: its vectors. Dense parameters of the model to whoever trains it."""
_STATE = "_raymoe_compression"


@dataclass
class Compression:
    """What is on a model."""

    settings: CompressionSettings
    edits: dict[str, LayerEdit]
    originals: dict[str, Tensor] = field(default_factory=dict)
    """On the host: parameters of the model that a fit has changed, as they were."""


def compress(
    model: PreTrainedModel,
    *,
    keep: Keep | Sequence[Keep] = 0.5,
    method: str = "compressed_experts",
    tie_input: bool = False,
    calibration: Tensor | None = None,
) -> PreTrainedModel:
    """Puts a compression on `model`, in place, and returns it. Nothing is trained yet, and no weight of the model changes.

    Vectors begin as ones, so `compressed_experts` and `shared_vector` begin as `drop`, exactly.

    Args:
        keep: a share of a token's experts (rounded up), a number of them, or one of these for each MoE layer. For `magnitude`
            and `reap` the share of a layer's experts that stay.
        method: one of `METHODS`.
        tie_input: one vector on what gate and up read, which leaves them one product; else one for each.
        calibration: int64 [N, L] tokens, for `mean_vector` and `reap`.

    Raises:
        ValueError: a family without experts beside the main one, an unknown method, a keep that leaves no expert, a method
            that lacks its calibration, or a model that is compressed already; names the key.
    """
    layers = _editable(model)
    settings = CompressionSettings(method, keep_by_layer(keep, [layer.top_k for layer in layers]), tie_input)
    if method in CALIBRATED and calibration is None:
        raise ValueError(f"method: {method!r} is measured on text; give calibration, tokens [N, L]")
    install(model, settings)
    constants = {}
    if method == "mean_vector":
        assert calibration is not None
        constants = {layer: {"mean_output": mean} for layer, mean in mean_outputs(model, calibration).items()}
    elif method in PRUNES:
        scores = expert_scores(model, method, calibration)
        constants = {
            layer.name: {"is_pruned": _pruned(scores[layer.name], value, layer)}
            for layer, value in zip(layers, settings.keep, strict=True)
        }
    set_constants(model, constants)
    return model


def install(model: PreTrainedModel, settings: CompressionSettings) -> None:
    """Puts modules and edits on a model, vectors as ones.

    Raises:
        ValueError: as `compress`.
    """
    layers = _editable(model)
    if _STATE in model.__dict__:
        raise ValueError(f"the model is compressed already ({settings_of(model).method}); restore it first")
    if len(settings.keep) != len(layers):
        raise ValueError(f"keep: got {len(settings.keep)} values for {len(layers)} MoE layers")
    by_weight = model.config.model_type.removeprefix("raymoe_") != "phimoe"
    edits = {}
    for layer, keep in zip(layers, settings.keep, strict=True):
        vectors = None
        if settings.method in LEARNT:
            device = _device_of(layer)
            shared = settings.method == "shared_vector"
            vectors = Vectors(layer, tie_input=settings.tie_input, is_shared=shared, device=device)
            layer.experts.add_module(_VECTORS, vectors)
        edits[layer.name] = LayerEdit(layer, settings.method, keep, vectors, by_weight=by_weight)
    model.__dict__[_STATE] = Compression(settings, edits)
    set_edit(model, dict(edits))


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Takes the compression off: the model is bit for bit what it was, weights that a fit has changed included.

    Raises:
        ValueError: the model is not compressed.
    """
    found = state_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, original in found.originals.items():
            parameters[name].copy_(original)
    detach(model)
    return model


def detach(model: PreTrainedModel) -> Compression:
    """Takes modules and edits off, whatever the weights are, and returns what was on."""
    found = state_of(model)
    set_edit(model, None)
    for edit in found.edits.values():
        if edit.vectors is not None:
            delattr(edit.layer.experts, _VECTORS)
    del model.__dict__[_STATE]
    return found


@contextmanager
def as_full(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """While entered, the router's experts all run, with the weights that the model has now."""
    set_edit(model, None)
    try:
        yield model
    finally:
        set_edit(model, dict(state_of(model).edits))


@contextmanager
def as_dropped(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """While entered, the other experts do nothing, with the weights that the model has now."""
    edits = state_of(model).edits
    set_edit(model, {name: replace(edit, method="drop", vectors=None) for name, edit in edits.items()})
    try:
        yield model
    finally:
        set_edit(model, dict(edits))


def is_compressed(model: PreTrainedModel) -> bool:
    return _STATE in model.__dict__


def state_of(model: PreTrainedModel) -> Compression:
    """What is on a model. Raises ValueError if nothing is."""
    if _STATE not in model.__dict__:
        raise ValueError("the model is not compressed; raymoe.compression.compress does that")
    return model.__dict__[_STATE]


def settings_of(model: PreTrainedModel) -> CompressionSettings:
    """The settings of a compressed model. Raises ValueError if it is none."""
    return state_of(model).settings


def theta_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The learnt vectors of a compressed model by their names in it; none for a method without."""
    return {name: p for name, p in model.named_parameters() if is_vector(name)}


def is_vector(name: str) -> bool:
    """Whether a parameter of that name is a learnt vector."""
    return f".{_VECTORS}." in name


def constants_of(model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """What was measured when the model was compressed: {layer: {name: tensor}}."""
    return {name: dict(edit.constants) for name, edit in state_of(model).edits.items() if edit.constants}


def set_constants(model: PreTrainedModel, constants: dict[str, dict[str, Tensor]]) -> None:
    """Puts them to use."""
    for name, tensors in constants.items():
        edit = state_of(model).edits[name]
        edit.constants.clear()
        edit.constants.update({key: tensor.to(_device_of(edit.layer)) for key, tensor in tensors.items()})


def _editable(model: PreTrainedModel) -> list[MoELayer]:
    layers = moe_layers(model)
    if max(layer.top_k for layer in layers) < 2:
        raise ValueError(
            f"model family '{model.config.model_type}': its tokens take one expert, and compression needs others beside it"
        )
    return layers


def _pruned(scores: Tensor, keep: Keep, layer: MoELayer) -> Tensor:
    share = keep / layer.top_k if isinstance(keep, int) else keep
    num_kept = max(1, round(share * layer.num_experts))
    pruned = torch.ones(layer.num_experts, dtype=torch.bool)
    pruned[scores.argsort(descending=True, stable=True)[:num_kept].cpu()] = False
    return pruned


def _device_of(layer: MoELayer) -> Any:
    weight = (
        layer.router.get_parameter("weight") if hasattr(layer.router, "weight") else next(layer.router.parameters())
    )
    return weight.device
