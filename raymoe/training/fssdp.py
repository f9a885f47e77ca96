"""Fully sharded sparse data parallelism: the experts runtime of a training rank.

Every expert has one owner. Each step the plan says where copies of the hot ones go: they are gathered while the block's
attention computes, used, and their gradients return to the owner while the backward of earlier layers computes. Tokens go to
the nearest copy. Source: Hecate (arXiv 2502.02581, sections 3 and 4).

T tokens here, M tokens received, K choices per token, E experts, H hidden size.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.kernels import moe_mlp
from raymoe.models import MoELayer, attach_runtime
from raymoe.placement import ClusterSpec, DispatchTable, Plan, assign
from raymoe.training.dispatch import exchange, gather_sum, make_routes, spread
from raymoe.training.shard import ExpertShard
from raymoe.training.sparse import Pending, Transfers, sparse_all_gather, sparse_reduce_scatter
from raymoe.training.world import World


@dataclass
class _LayerStep:
    """One layer in the step under way; the last ones are there once its block has started."""

    transfers: Transfers
    dispatch: DispatchTable
    starts_next: bool
    """Whether the next layer's copies start to travel with this layer's experts."""
    gather: Pending | None = field(init=False, default=None)
    slots: Tensor = field(init=False)
    block_started_ns: int = field(init=False)


class SparseExperts:
    """Stands behind every experts call of a model whose experts are spread over the ranks of `world`.

    A step is `begin_step(plan)`, the model's forward, the loss's backward, `finish_backward()`; all ranks do the same.
    """

    def __init__(self, model: PreTrainedModel, owners: list[list[int]], world: World):
        self.layers = attach_runtime(model, self)
        self.world = world
        self.shards = [
            ExpertShard(
                layer,
                [expert for expert, owner in enumerate(owners[layer.index]) if owner == world.rank],
                model.dtype,
                world.device,
            )
            for layer in self.layers
        ]
        for layer, shard in zip(self.layers, self.shards, strict=True):
            layer.block.register_forward_pre_hook(lambda *_, index=layer.index: self._start_block(index))
            shard.on_gradient = self._gradient_ready
        self._steps: list[_LayerStep] = []
        self._reductions: list[Pending] = []
        self._ready: set[int] = set()
        self.loads = torch.zeros(len(self.layers), self.layers[0].num_experts, dtype=torch.int64, device=world.device)
        """int64 [L, E]: routed rows of this rank's own tokens in this step."""
        self.computed_rows = torch.zeros(len(self.layers), dtype=torch.int64, device=world.device)
        """int64 [L]: routed rows that this rank computed in this step."""
        self.attention_ns = [0] * len(self.layers)
        """Time from a block's start to its experts in the last timed step, by layer."""
        self.experts_ns = [0] * len(self.layers)
        """Time of the experts' forward computation in it, by layer."""
        self._is_timed = False

    def begin_step(self, plan: Plan, cluster: ClusterSpec, is_timed: bool = False) -> None:
        """Takes the step's plan; nothing is sent before the first block starts.

        Args:
            is_timed: measure what the cost model asks for; the device is synchronised for it.
        """
        self._is_timed = is_timed
        rank = self.world.rank
        self._steps = [
            _LayerStep(
                Transfers.of(layer_plan, rank),
                DispatchTable(layer_plan, [rank], cluster, plan.dispatch),
                starts_next=plan.timing == "overlapped",
            )
            for layer_plan in map(plan.layer, range(plan.num_layers))
        ]
        for shard in self.shards:
            shard.zero_gradient()
        self.loads.zero_()
        self._ready.clear()
        self._reductions.clear()

    def __call__(self, layer: MoELayer, hidden: Tensor, expert_index: Tensor, expert_weight: Tensor) -> Tensor:
        """hidden [T, H], expert_index [T, K], expert_weight [T, K] -> [T, H]."""
        step, shard, world = self._steps[layer.index], self.shards[layer.index], self.world
        if self._is_timed:
            self.attention_ns[layer.index] = self._now_ns() - step.block_started_ns
        self.loads[layer.index] = expert_index.flatten().bincount(minlength=layer.num_experts + 1)[:-1]
        counts_ED = step.dispatch.counts(self.loads[layer.index].cpu().numpy()[None])[0]
        rank_TK = torch.from_numpy(assign(expert_index.flatten().cpu().numpy(), counts_ED))
        rank_TK = rank_TK.to(hidden.device).view_as(expert_index)
        routes = make_routes(rank_TK, world)

        to_N = torch.arange(world.size, device=hidden.device).repeat_interleave(
            torch.tensor(routes.sends, device=hidden.device)
        )
        index_NK = expert_index[routes.token_N].where(rank_TK[routes.token_N] == to_N[:, None], layer.num_experts)
        there = routes.sends, routes.receives, world
        back = routes.receives, routes.sends, world
        index_MK = exchange(index_NK, *there)
        hidden_M = exchange(spread(hidden, routes), *there)
        weight_MK = exchange(spread(expert_weight, routes), *there)

        assert step.gather is not None, "the block's hook started it"
        step.gather.wait()
        slot_MK = step.slots[index_MK]
        self.computed_rows[layer.index] = (slot_MK < len(shard.pool)).sum()
        if step.starts_next and layer.index + 1 < len(self.layers):
            self._start_gather(layer.index + 1)
        gate_up, down, biases = shard.weights()
        started_ns = self._now_ns()
        partial_M = moe_mlp(
            hidden_M,
            gate_up,
            down,
            slot_MK,
            weight_MK,
            spec=layer.spec,
            biases=biases,
            grad_into=shard.weight_gradients(),
        )
        self.experts_ns[layer.index] = self._now_ns() - started_ns
        return gather_sum(exchange(partial_M, *back), routes)

    def finish_backward(self) -> None:
        """Waits until every owner has the whole gradient of its experts, and shows it to the optimizer."""
        while len(self._reductions) < len(self.layers):
            self._reduce_next()
        for reduction in self._reductions:
            reduction.wait()
        for shard in self.shards:
            shard.publish_gradient()

    def _start_block(self, index: int) -> None:
        self._steps[index].block_started_ns = self._now_ns()
        if self._steps[index].gather is None:
            self._start_gather(index)

    def _start_gather(self, index: int) -> None:
        step, shard = self._steps[index], self.shards[index]
        step.gather = sparse_all_gather(shard, step.transfers, self.world)
        step.slots = shard.slot_table()

    def _now_ns(self) -> int:
        if self._is_timed and self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return time.perf_counter_ns()

    def _gradient_ready(self, index: int) -> None:
        # last layer first on every rank, whatever order the gradients come in: both ends of a pair must agree
        self._ready.add(index)
        while len(self.layers) - 1 - len(self._reductions) in self._ready:
            self._reduce_next()

    def _reduce_next(self) -> None:
        index = len(self.layers) - 1 - len(self._reductions)
        shard, transfers = self.shards[index], self._steps[index].transfers
        self._reductions.append(sparse_reduce_scatter(shard, transfers, self.world))
