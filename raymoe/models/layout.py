"""An expert as one flat buffer: what is owned, sent, cached and fetched is always one contiguous run of elements.

H hidden size, I expert width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

_ALIGN = (
    16  # elements: grouped GEMMs want 16-byte strides, and 16 elements hold that for every dtype of one byte or more
)


@dataclass(frozen=True)
class ExpertField:
    """One parameter of one expert, e.g. `gate_up_proj` [2I, H], at `offset` elements into the flat expert."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ExpertLayout:
    """Where the parameters of one expert lie in its flat buffer; fields start at multiples of 16 elements."""

    fields: tuple[ExpertField, ...]
    numel: int

    @classmethod
    def of(cls, experts: nn.Module) -> "ExpertLayout":
        """Layout of a transformers experts module: every parameter whose first dimension counts the experts."""
        return cls.of_shapes({name: tuple(p.shape[1:]) for name, p in experts.named_parameters(recurse=False)})

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "ExpertLayout":
        """Layout of an expert whose parameters have these names and shapes."""
        fields, offset = [], 0
        for name, shape in shapes.items():
            field = ExpertField(name, shape, offset)
            fields.append(field)
            offset += -(-field.numel // _ALIGN) * _ALIGN
        return cls(tuple(fields), offset)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The parameters inside `buffer` [slots, numel], as strided views [slots, *shape] that share its memory."""
        slots = buffer.shape[0]
        return {
            field.name: buffer[:, field.offset : field.offset + field.numel].view(slots, *field.shape)
            for field in self.fields
        }

    @torch.no_grad()
    def pack(self, parameters: Mapping[str, Tensor], out: Tensor) -> None:
        """Copies `{name: [slots, *shape]}` into `out` [slots, numel]; the padding between fields becomes zero."""
        out.zero_()
        for name, view in self.views(out).items():
            view.copy_(parameters[name])
