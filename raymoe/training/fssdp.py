"""Fully sharded sparse data parallelism: the experts runtime of a training rank.

Every expert has one owner. Each step the plan says where copies of the hot ones go: they are gathered while the block's
attention computes, used, and their gradients return to the owner while the backward of earlier layers computes. With
re-materialisation copies are given up after forward and gathered again in backward. Source: Hecate (arXiv 2502.02581,
sections 3 and 4).
"""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.config import OptimizerConfig
from raymoe.models import MoELayer, attach_runtime
from raymoe.placement import Base
from raymoe.training.adamw import AdamWRows, square_sum
from raymoe.training.expert_layer import ExpertLayer, StepPlan
from raymoe.training.pool import ExpertPool, Place
from raymoe.training.stopwatch import Stopwatch
from raymoe.training.world import World


def kept_by(base: Base, rank: int) -> list[Place]:
    """(layer, expert) of all experts that live on a rank."""
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(base.resident[:, :, rank])]


class SparseExperts:
    """Stands behind every experts call of a model whose experts are spread over the ranks of `world`.

    A step is `begin_step`, then for each micro-batch `begin_micro`, the model's forward, `begin_backward` and the loss's
    backward and `finish_backward()`; then `share_gradients()` and `update()`. All ranks do the same.
    """

    def __init__(self, model: PreTrainedModel, base: Base, world: World, config: OptimizerConfig):
        self.world, self.base = world, base
        moe_layers = attach_runtime(model, self)
        self.pool = ExpertPool(moe_layers, kept_by(base, world.rank), model.dtype, world.device)
        self.watch = Stopwatch(len(moe_layers), world.device)
        self.layers = [
            ExpertLayer(layer, self.pool, world, self.watch, self._before_backward, self._after_backward)
            for layer in moe_layers
        ]
        for layer in self.layers:
            layer.layer.block.register_forward_pre_hook(lambda *_, layer=layer: self._start_block(layer))
        self._config = config
        self._set_holders: list[ExpertLayer | None] = []
        self._is_backward = False

    def bind(self, world: World) -> None:
        """Goes on among other ranks; `rehome` then says which experts live here."""
        self.world = world
        for layer in self.layers:
            layer.bind(world)

    def load_optimizer(self) -> None:
        """Makes the optimizer's state for the experts that the pool holds, once they have been read."""
        self.optimizer = AdamWRows(self.pool.kept, self._config)

    def begin_step(self, step: StepPlan, is_exact: bool = False) -> None:
        """Takes the step's plan; nothing is sent before the first block starts.

        Args:
            is_exact: measure what the cost model asks for; the device is synchronised for it.
        """
        self.watch.begin_step(is_exact)
        self._step = step
        num_sets = min(2, len(self.layers)) if step.policy.rematerialise else len(self.layers)
        has_copies = self.world.size > 1 and step.policy.materialises
        num_copies = min(step.state.extra_slots, self.base.owners.shape[1]) if has_copies else 0
        self.reserve(num_copies, num_sets)
        self._set_holders = [None] * self.pool.num_sets
        with self.watch.planning():
            for layer in self.layers:
                layer.begin_step(step)
        self.pool.kept_gradients.zero_()

    def begin_micro(self, is_first: bool, is_last: bool) -> None:
        """A forward and a backward pass begin."""
        self._is_first, self._is_last, self._is_backward = is_first, is_last, False

    def begin_backward(self) -> None:
        """The forward pass is over: experts calls from now on are recomputation."""
        self._is_backward = True

    def __call__(self, layer: MoELayer, hidden: Tensor, expert_index: Tensor, expert_weight: Tensor) -> Tensor:
        """hidden [T, H], expert_index [T, K], expert_weight [T, K] -> [T, H]."""
        this = self.layers[layer.index]
        if self._is_backward:
            return this.again(hidden, expert_index, expert_weight, lambda: self._fetch(this))
        self.watch.experts_are_reached(layer.index)
        return this.forward(hidden, expert_index, expert_weight, lambda: self._before_experts(this))

    def finish_backward(self) -> None:
        """Waits until every owner has what was sent to it in this pass."""
        self.watch.timeline.end("attention backward", 0)
        for layer in reversed(self.layers):
            layer.await_reduce()

    def share_gradients(self) -> None:
        """Gives replicas of experts the whole gradient, if any live beside the owners."""
        if (self.base.resident.sum(axis=2) > 1).any():
            for layer in reversed(self.layers):
                layer.share_gradients()

    def square_sum(self) -> Tensor:
        """Of the gradients of the experts that this rank owns, float64 scalar: over ranks each expert counts once."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for (layer, expert), slot in self.pool.slots.items():
            if self.base.owners[layer, expert] == self.world.rank:
                total += square_sum(self.pool.gradients[slot])
        return total

    def update(self, number: int, lr: float, scale: Tensor | None) -> None:
        """One update of the experts that live here; see `AdamWRows.step`."""
        self.optimizer.step(self.pool.gradients, self.pool.slots.values(), number, lr, scale)

    def reserve(self, copies_a_layer: int, num_sets: int) -> None:
        """Makes room for copies; see `ExpertPool.reserve`."""
        before = self.pool.parameters
        self.pool.reserve(copies_a_layer, num_sets)
        if self.pool.parameters is not before:
            self.optimizer.rebind(self.pool.kept)

    def rehome(self, base: Base) -> dict[Place, int]:
        """Takes another base; returns the slots of the experts that are new here, whose state is yet to come."""
        before = self.pool.parameters
        fresh = self.pool.rehome(kept_by(base, self.world.rank))
        if self.pool.parameters is not before:
            self.optimizer.rebind(self.pool.kept)
        self.base = base
        return fresh

    def state_bytes(self) -> dict[str, int]:
        """Bytes held, by part; copies are those slots that steps may fill, with their gradients."""
        a_row = self.pool.parameters[:1].nbytes
        kept = self.pool.num_kept * a_row
        return {
            "parameters": kept,
            "gradients": kept,
            "optimizer": self.optimizer.optimizer_bytes(),
            "copies": 2 * (self.pool.num_slots - self.pool.num_kept) * a_row,
        }

    def computed_rows(self) -> np.ndarray:
        """int64 [L]: routed rows that this rank computed in this step."""
        return torch.stack([layer.computed_rows for layer in self.layers]).cpu().numpy()

    def rows(self) -> Tensor:
        """int64 [L, E]: routed rows of this rank's own tokens in this step."""
        return torch.stack([layer.rows_E for layer in self.layers])

    def num_copies(self) -> int:
        """Copies that travelled in this step, over all layers and ranks."""
        return sum(int(np.count_nonzero(layer.placed.extra_copies())) for layer in self.layers)

    # when copies travel: each set of slots holds one layer's copies at a time

    def _start_block(self, layer: ExpertLayer) -> None:
        if not self._is_backward:
            self.watch.block_starts(layer.index)
        self._start_gather(layer)

    def _start_gather(self, layer: ExpertLayer) -> None:
        place = layer.index % len(self._set_holders)
        if self._set_holders[place] is not layer:
            self._set_holders[place] = layer
            layer.start_gather()

    def _fetch(self, layer: ExpertLayer) -> None:
        self._start_gather(layer)
        layer.await_gather()

    def _before_experts(self, layer: ExpertLayer) -> None:
        self._fetch(layer)
        if self._step.plan.timing == "overlapped":
            for following in self.layers[layer.index + 1 : layer.index + 2]:
                self._start_gather(following)

    def _before_backward(self, layer: ExpertLayer) -> None:
        self.watch.timeline.end("attention backward", layer.index + 1)
        self._fetch(layer)
        # two layers back: with re-materialisation its gradients lie in the same slots
        for later in self.layers[layer.index + 2 : layer.index + 3]:
            later.await_reduce()
        if self._is_first or self._step.policy.rematerialise:
            layer.clear_copy_gradients()

    def _after_backward(self, layer: ExpertLayer) -> None:
        self.watch.timeline.begin("attention backward", layer.index)
        if self._is_last or self._step.policy.rematerialise:
            layer.start_reduce()
        for earlier in self.layers[max(0, layer.index - 1) : layer.index]:
            self._start_gather(earlier)
