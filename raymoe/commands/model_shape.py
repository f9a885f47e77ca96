"""The sizes that `raymoe plan --trace` asks of a model."""

from __future__ import annotations

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

    Raises:
        ValueError: not such a file, a family without the experts interface, or layers that differ.
    """
    # it imports torch and transformers
    from raymoe.models.size import model_size

    try:
        size = model_size(path)
    except ValueError as error:
        raise ValueError(f"--model-config: {error}") from None
    if size.expert_parameters * size.parameter_bytes != size.layers * size.experts * size.expert_bytes:
        raise ValueError(f"--model-config: the MoE layers of {path} differ in size; planning takes them as alike")
    return ModelShape(
        name=size.model_type,
        hidden_size=size.hidden_size,
        expert_width=size.expert_width,
        matrices=size.matrices,
        num_layers=size.layers,
        num_experts=size.experts,
        choices=size.choices,
    )
