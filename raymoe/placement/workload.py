"""What one step asks of one MoE layer, in bytes, FLOPs and nanoseconds. All layers of a model are alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, get_args

FanOut = Literal["p2p", "hierarchical", "chain"]

_LEAST = {
    "expert_bytes": 1,
    "row_bytes": 1,
    "row_flops": 1,
    "attention_ns": 0,
    "choices": 1,
    "gradient_bytes": 1,
    "state_bytes": 0,
}


@dataclass(frozen=True)
class Workload:
    """One MoE layer as the cost model sees it.

    Raises:
        ValueError: a number that is not whole or too small, or an unknown fan-out; names the field.
    """

    expert_bytes: int
    """Parameter bytes of one expert as it travels and is multiplied, X in the papers."""

    row_bytes: int
    """Bytes of one token's hidden state, one way."""

    row_flops: int
    """Forward FLOPs of one routed row in its expert."""

    attention_ns: int = 0
    """Forward time of what comes before the layer's experts (attention, norms, router): what transfers hide behind."""

    choices: int = 1
    """K: experts a token takes. A token that goes to one rank for several of them travels once."""

    gradient_bytes: int = 0
    """Bytes of one expert's gradient as it travels; 0: as ``expert_bytes``."""

    state_bytes: int = 0
    """What an owner keeps of an expert besides parameters and gradient: master copy and moments."""

    rematerialise: bool = False
    """Copies are freed after forward and gathered again in backward."""

    recompute: bool = False
    """Activation checkpointing: the layer's forward runs again in backward."""

    fan_out: FanOut = "hierarchical"
    """How copies travel. p2p: the owner sends to every holder. hierarchical: once to each node, which fans out.
    chain: once out of the owner's node, and from node to node."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gradient_bytes", self.gradient_bytes or self.expert_bytes)
        for field, least in _LEAST.items():
            value = getattr(self, field)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{field} = {value!r}: give a whole number of at least {least}")
            object.__setattr__(self, field, int(value))
        if self.fan_out not in get_args(FanOut):
            raise ValueError(f"fan_out = {self.fan_out!r}: choose one of {', '.join(get_args(FanOut))}")

    @classmethod
    def of_transformer(
        cls,
        *,
        hidden_size: int,
        expert_width: int,
        tokens: int,
        sequence_length: int,
        flops_s: int,
        choices: int,
        matrices: int = 3,
        parameter_bytes: int = 2,
        state_bytes: int = 12,
    ) -> Workload:
        """A layer of a plain transformer in mixed precision with Adam.

        Args:
            tokens: tokens a device takes through attention in one step.
            flops_s: FLOP per second of a device.
            matrices: of an expert, hidden_size x expert_width each: 3 gated, 2 not.
            parameter_bytes: of a parameter and of an activation in the compute dtype.
            state_bytes: of a parameter's master copy and two moments.

        Attention takes tokens x (8 d^2 + 4 n d) FLOPs forward: four projections and two products over n tokens.
        """
        parameters = matrices * hidden_size * expert_width
        attention_flops = tokens * (8 * hidden_size**2 + 4 * sequence_length * hidden_size)
        return cls(
            expert_bytes=parameters * parameter_bytes,
            row_bytes=hidden_size * parameter_bytes,
            row_flops=2 * parameters,
            attention_ns=attention_flops * 1_000_000_000 // flops_s,
            choices=choices,
            state_bytes=parameters * state_bytes,
        )

    def with_schedule(self, *, rematerialise: bool) -> Workload:
        """The same layer under the other schedule."""
        return self if rematerialise == self.rematerialise else replace(self, rematerialise=rematerialise)

    @property
    def exchanges(self) -> int:
        """All-to-alls of a step: dispatch and combine, forward and backward, and once more when recomputed."""
        return 6 if self.recompute else 4

    @property
    def forwards(self) -> int:
        """Expert computation of a step, in forward passes: backward counts two, recomputation one more."""
        return 4 if self.recompute else 3

    @property
    def backward_window(self) -> int:
        """Attention time that hides backward transfers, in forward passes."""
        return 3 if self.recompute else 2
