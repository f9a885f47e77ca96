"""Whether a model can be trained on a cluster: arithmetic on sizes, nothing is loaded or measured.

Memory is an estimate of what raymoe keeps. Bytes are whole, times float64 nanoseconds.
H hidden size, K choices per token, L MoE layers, E experts a layer, D devices, n tokens a sequence, A attention width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.memory import BUFFERED_LAYERS
from raymoe.placement.workload import Workload

RESERVE = 0.1
"""Share of a memory that stays free for the runtime, the allocator and communication buffers."""


class ModelNumbers(Protocol):
    """What `raymoe.models.ModelSize` holds, as far as it is asked here."""

    @property
    def parameter_bytes(self) -> int: ...
    @property
    def dense_parameters(self) -> int: ...
    @property
    def lookup_parameters(self) -> int: ...
    @property
    def expert_parameters(self) -> int: ...
    @property
    def active_parameters(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def choices(self) -> int: ...
    @property
    def expert_bytes(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def attention_width(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...


@dataclass(frozen=True)
class TrainingFit:
    """What one device of a training run keeps, in bytes, and how many devices that takes."""

    devices: int
    """Of the cluster."""
    usable_bytes: int
    """Of a device, without the reserve."""
    dense_bytes: int
    """Dense parameters, gradients and optimizer state: on every device."""
    owned_bytes: int
    """The same of the experts that a device owns, on the fullest."""
    activation_bytes: int
    """An estimate; with `recompute` that of one block at a time."""
    recompute: bool
    """Whether activations must be computed again in backward."""
    devices_needed: int | None
    """Smallest number of such devices, recomputing activations if that is what it takes; None: no number is enough,
    because dense part and activations alone are too large for one device."""
    extra_slots: int
    """m: copies a layer that fit beside all that, kept from forward to backward."""
    extra_slots_rematerialised: int
    """The same if copies are freed after forward and gathered again in backward."""

    @property
    def needed_bytes(self) -> int:
        return self.dense_bytes + self.owned_bytes + self.activation_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.usable_bytes

    @property
    def rematerialise(self) -> bool:
        """Whether copies fit only if they are re-materialised."""
        return self.extra_slots == 0 < self.extra_slots_rematerialised


def fit_training(
    model: ModelNumbers,
    cluster: ClusterSpec,
    *,
    tokens: int,
    parameter_bytes: int = 2,
    gradient_bytes: int = 2,
    state_bytes: int = 12,
) -> TrainingFit:
    """What training takes of each device's memory.

    Dense parameters are on every device, experts with their owners, each parameter with gradient, master copy and moments.
    m copies a layer, kept to backward, take m (L X + 2 G): parameters X of all layers, gradients G of two at a time;
    re-materialised ones 2 m (X + G).

    Args:
        tokens: tokens a device takes in one step.
        parameter_bytes, gradient_bytes, state_bytes: of one parameter; 2, 2 and 12 are mixed precision with Adam.

    Raises:
        ValueError: the cluster says nothing of its devices' memory, or fewer than one token.
    """
    if cluster.memory_bytes is None:
        raise ValueError("the cluster does not say how much memory a device has: give 'memory', e.g. memory: 80GB")
    if tokens < 1:
        raise ValueError(f"tokens = {tokens}: must be at least 1")
    usable = int(cluster.memory_bytes * (1 - RESERVE))
    each = parameter_bytes + gradient_bytes + state_bytes
    experts = model.layers * model.experts
    expert_numel = model.expert_parameters // experts
    dense_bytes = model.dense_parameters * each

    def needed(activations: int) -> int | None:
        owned_each = (usable - dense_bytes - activations) // (expert_numel * each)
        return -(-experts // owned_each) if owned_each > 0 else None

    plain, recomputed = (
        activation_bytes(model, tokens, parameter_bytes, recompute=recompute) for recompute in (False, True)
    )
    devices = cluster.num_devices
    recompute = (needed(plain) or devices + 1) > devices
    activations = recomputed if recompute else plain
    owned_bytes = -(-experts // devices) * expert_numel * each
    spare = max(usable - dense_bytes - owned_bytes - activations, 0)
    copy, gradient = expert_numel * parameter_bytes, expert_numel * gradient_bytes
    return TrainingFit(
        devices=devices,
        usable_bytes=usable,
        dense_bytes=dense_bytes,
        owned_bytes=owned_bytes,
        activation_bytes=activations,
        recompute=recompute,
        devices_needed=needed(activations),
        extra_slots=min(spare // (model.layers * copy + BUFFERED_LAYERS * gradient), model.experts),
        extra_slots_rematerialised=min(spare // (BUFFERED_LAYERS * (copy + gradient)), model.experts),
    )


def activation_bytes(model: ModelNumbers, tokens: int, parameter_bytes: int, *, recompute: bool) -> int:
    """What forward keeps for backward: an estimate, to be right within a third or so.

        tokens x parameter_bytes x (blocks x 4 H + dense / H + L K (2 H + expert / H)) + tokens x vocab x (parameter_bytes + 8)

    Each matrix of H x w keeps about w elements a token, so `dense` and `expert` (parameters of all blocks without embeddings,
    and of one expert) over H count them; 4 H are the norms' inputs and outputs, 2 H the rows that go to an expert and come
    back; the logits are kept once in the compute dtype and twice in float32. Attention keeps no square (as flash attention).
    With `recompute` each block keeps its input, H, and one block is whole at a time.
    """
    hidden = model.hidden_size
    expert_numel = model.expert_parameters // (model.layers * model.experts)
    routed = model.choices * (2 * hidden + expert_numel // hidden)
    dense = 4 * hidden + _block_parameters(model) // hidden
    kept = model.blocks * dense + model.layers * routed
    elements = model.blocks * hidden + dense + routed if recompute else kept
    return tokens * (elements * parameter_bytes + model.vocab_size * (parameter_bytes + 8))


def training_workload(
    model: ModelNumbers,
    cluster: ClusterSpec,
    *,
    tokens: int,
    sequence_length: int,
    recompute: bool,
    parameter_bytes: int = 2,
    state_bytes: int = 12,
) -> Workload:
    """One MoE layer of the model for the cost model and the simulator.

    What comes before the experts takes tokens x (2 p + 2 n A) FLOPs forward: p dense parameters of the block, and two
    products of n tokens and width A, halved by the causal mask.
    """
    expert_numel = model.expert_parameters // (model.layers * model.experts)
    return Workload(
        expert_bytes=expert_numel * parameter_bytes,
        row_bytes=model.hidden_size * parameter_bytes,
        row_flops=2 * expert_numel,
        attention_ns=_block_flops(model, tokens, sequence_length) * 1_000_000_000 // cluster.flops_s,
        choices=model.choices,
        state_bytes=expert_numel * state_bytes,
        recompute=recompute,
    )


def training_step_ns(
    model: ModelNumbers,
    cluster: ClusterSpec,
    workload: Workload,
    *,
    moe_ns: float,
    tokens: int,
    sequence_length: int,
    gradient_bytes: int = 2,
) -> float:
    """A whole step: all MoE layers, their attention, blocks without experts, the logits, the dense gradients' all-reduce.

    Args:
        moe_ns: one MoE layer's step without its attention, as the simulator gives it.

    The all-reduce is a ring, 2 (D - 1) / D of the gradients over each device's link, or over each node's if there are
    several, and hides behind nothing. The optimizer's own time is left out.
    """
    passes = workload.forwards
    flops = model.blocks * _block_flops(model, tokens, sequence_length)
    flops += 2 * tokens * model.vocab_size * model.hidden_size
    parts = cluster.num_nodes if cluster.num_nodes > 1 else cluster.num_devices
    ring_bytes = 2 * (parts - 1) * model.dense_parameters * gradient_bytes / parts
    return model.layers * moe_ns + passes * flops * 1e9 / cluster.flops_s + ring_bytes * 1e9 / cluster.budget_bytes_s


def _block_parameters(model: ModelNumbers) -> int:
    """Dense parameters of one block on average: without embeddings and output projection."""
    outside = model.lookup_parameters + model.vocab_size * model.hidden_size
    return max(model.dense_parameters - outside, 0) // model.blocks


def _block_flops(model: ModelNumbers, tokens: int, sequence_length: int) -> int:
    return tokens * 2 * (_block_parameters(model) + sequence_length * model.attention_width)
