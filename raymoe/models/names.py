"""Which tensor in a checkpoint's files belongs to which parameter: read off transformers' own conversion table.

Files hold experts one by one (`experts.7.w1.weight`) or already fused (`experts.gate_up_proj`); memory holds them fused, but
for switch_transformers, where `experts.up_proj` and `experts.down_proj` are our names for all `wi` and `wo` of a layer.
Everything here that touches transformers' private conversion API is in this file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from raymoe.models import switch

__all__ = ["CheckpointNames", "Target", "original_experts", "original_tensors"]

_EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Target:
    """Where one tensor of a file goes."""

    parameter: str
    """Name in the model, e.g. `model.layers.0.mlp.experts.gate_up_proj`."""
    expert: int | None
    """Which expert's slice of it; None: the whole parameter."""
    part: int
    """Position among the tensors that are concatenated (along the first dimension of the expert) to fill that slice."""
    parts: int
    """How many those are."""


class CheckpointNames:
    """Maps names in a family's files to names in its model."""

    def __init__(self, model: PreTrainedModel):
        transforms = get_model_conversion_mapping(model)
        self._renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        self._converters = [item for item in transforms if isinstance(item, WeightConverter)]
        self._parts = {
            pattern: (part, converter)
            for converter in self._converters
            for part, pattern in enumerate(converter.source_patterns)
        }
        self._family = model.config.model_type

    def target(self, key: str) -> Target:
        """Where the tensor called `key` in a file goes.

        Raises:
            ValueError: the family converts that tensor in a way that cannot be read expert by expert.
        """
        if (unfused := switch.parameter_of(key)) is not None:
            return Target(*unfused, 0, 1)
        parameter, pattern = rename_source_key(key, self._renamings, self._converters)
        number = _EXPERT_NUMBER.search(key)
        if pattern is None:
            return Target(parameter, None, 0, 1)
        part, converter = self._parts[pattern]
        if number is None or not _stacks_experts(converter):
            raise ValueError(
                f"tensor '{key}': family '{self._family}' stores it in a form that raymoe cannot read expert by expert yet. "
                "Write the checkpoint again with save_pretrained(..., save_original_format=False) and use that."
            )
        return Target(parameter, int(number[1]), part, len(converter.source_patterns))


def original_tensors(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`parameters`, named as in the model, under the family's original names and in its original pieces.

    Experts are whole layers: [E, *shape] each.
    """
    return revert_weight_conversion(model, dict(parameters))


def original_experts(
    model: PreTrainedModel, parameters: Mapping[str, Tensor], experts: Sequence[int]
) -> dict[str, Tensor] | None:
    """The tensors that hold some experts in the family's original files, one expert in a tensor.

    Args:
        parameters: {name in the model: [len(experts), *shape]} of one layer.

    Returns:
        None for a family whose original files hold a layer's experts fused.
    """
    if all(switch.is_parameter(name) for name in parameters):
        return {
            switch.stored_name(name, expert): rows[position]
            for name, rows in parameters.items()
            for position, expert in enumerate(experts)
        }
    tensors = {}
    for name, tensor in revert_weight_conversion(model, dict(parameters)).items():
        position = _EXPERT_NUMBER.search(name)
        if position is None:
            return None
        tensors[f"{name[: position.start(1)]}{experts[int(position[1])]}{name[position.end(1) :]}"] = tensor
    return tensors


def _stacks_experts(converter: WeightConverter) -> bool:
    kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
    return len(kinds) == len(converter.operations) and kinds in (
        [(MergeModulelist, 0)],
        [(MergeModulelist, 0), (Concatenate, 1)],
    )
