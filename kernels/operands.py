"""What the backends hand each other. T tokens, K choices per token, E experts, H hidden size, I expert width."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Experts(NamedTuple):
    """The weights of a layer's experts, in the layout that the spec says; all may be strided views of flat expert buffers."""

    gate_up: Tensor
    """[E, 2I, H]."""
    down: Tensor
    """[E, H, I]."""
    gate_up_bias: Tensor | None = None
    """[E, 2I]."""
    down_bias: Tensor | None = None
    """[E, H]."""
    gate_up_scale: Tensor | None = None
    """float32 [E, 2I] with quantised weights: what each output channel is multiplied with."""
    down_scale: Tensor | None = None
    """float32 [E, H], likewise."""

    def at(self, slot: int) -> Experts:
        """The expert there alone, as views with E = 1."""
        here = slice(slot, slot + 1)
        extras = (None if x is None else x[here] for x in self[2:])
        return Experts(self.gate_up[here], self.down[here], *extras)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    gate_up: bool
    down: bool
    expert_weight: bool
    gate_up_bias: bool
    down_bias: bool
    hidden_scale: bool


class Gradients(NamedTuple):
    """Gradients of what `moe_mlp` takes; None where not wanted."""

    hidden: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None
    expert_weight: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    hidden_scale: Tensor | None = None
