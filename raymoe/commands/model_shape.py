"""The sizes of a model's MoE layers, from its configuration alone: no weights are read or made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelShape:
    """What planning asks of a model."""

    name: str
    hidden_size: int
    expert_width: int
    matrices: int
    """Of an expert, hidden_size x expert_width each: 3 gated, 2 not."""
    num_layers: int
    """MoE layers."""
    num_experts: int
    choices: int
    """K: experts a token takes."""


def shape_of_model(path: Path) -> ModelShape:
    """Sizes of the model that a Hugging Face ``config.json``, or the directory that holds one, describes.

    The model is built without memory, so that sizes are those of its parameters whatever its family calls them.

    Raises:
        ValueError: no such file, not a configuration, a family without the experts interface, or layers that differ.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from raymoe.models import moe_layers

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"--model-config: no such file {file}; give a config.json or the directory that holds one")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**fields).get_text_config()
    except (ValueError, TypeError) as error:
        raise ValueError(f"--model-config: {file} is not a transformers configuration: {error}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = moe_layers(model)
    sizes = {(layer.num_experts, layer.top_k, layer.layout) for layer in layers}
    if len(sizes) > 1:
        raise ValueError(f"--model-config: the MoE layers of {file} differ in size; planning takes them as alike")
    (down,) = (field for field in layers[0].layout.fields if field.name == "down_proj")
    width, hidden = down.shape if layers[0].spec.is_transposed else down.shape[::-1]
    return ModelShape(
        name=config.model_type,
        hidden_size=hidden,
        expert_width=width,
        matrices=3 if layers[0].spec.is_gated else 2,
        num_layers=len(layers),
        num_experts=layers[0].num_experts,
        choices=layers[0].top_k,
    )
