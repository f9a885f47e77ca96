"""Which tensor in a checkpoint's files belongs to which parameter: read off transformers' own conversion table.

Files hold experts one by one (`experts.7.w1.weight`) or already fused (`experts.gate_up_proj`); memory holds them fused.
Everything here that touches transformers' private conversion API is in this file.
"""

import re
from dataclasses import dataclass

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

__all__ = ["CheckpointNames", "Target", "revert_weight_conversion"]

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


def _stacks_experts(converter: WeightConverter) -> bool:
    kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
    return len(kinds) == len(converter.operations) and kinds in (
        [(MergeModulelist, 0)],
        [(MergeModulelist, 0), (Concatenate, 1)],
    )
