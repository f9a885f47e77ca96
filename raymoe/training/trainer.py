"""The training step of one rank. No Ray in here: a rank is an actor in production and a plain process in tests.

B sequences in the global batch, n tokens in each, L MoE layers, E experts, D ranks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.config import OptimizerConfig
from raymoe.models import ExpertFiles, expert_parameter_names, warm_up_layers
from raymoe.placement import Base, Plan
from raymoe.training.batches import Batch, rank_slice
from raymoe.training.dense import ReplicatedDense
from raymoe.training.dense_sharded import ShardedDense
from raymoe.training.forms import counted, positions, predict
from raymoe.training.fssdp import SparseExperts
from raymoe.training.loss import RouterLogits, balance_loss, router_z_loss, token_loss_sum
from raymoe.training.micros import Micro, micro_batches, num_micros
from raymoe.training.placing import Placing
from raymoe.training.publication import Publication
from raymoe.training.report import StepReport
from raymoe.training.reshard import move_experts
from raymoe.training.schedule import learning_rate
from raymoe.training.world import World


@dataclass(frozen=True)
class TrainerConfig:
    """What a rank's step depends on, besides model and data; equal on all ranks."""

    optimizer: OptimizerConfig
    steps: int
    publication: Publication
    balance_weight: float = 0.0
    z_weight: float = 0.0
    micro_batch: int | None = None
    """Sequences that a rank takes through the model at once; None: all it has."""
    recompute: bool = False
    """Activation checkpointing: each block's forward runs again in backward."""
    dense: Literal["replicated", "sharded"] = "replicated"
    """Whether parameters that are not experts are on every rank, or sharded by FSDP2."""
    reshard_every: int | None = None
    """Steps between two re-shardings; None: as often as the policy has it; 0: never."""
    identity: dict[str, object] = field(default_factory=dict)
    """What makes this the run that it is: a checkpoint of another one is refused."""


class Trainer:
    """Trains `model`, whose experts are in `files`, together with the other ranks of `world`.

    Args:
        batch: gives the global batch of a step.
        base: where the experts live at first.
        experts: what stands behind the model's experts; `lora_start.start_lora` gives another.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: ExpertFiles,
        world: World,
        config: TrainerConfig,
        batch: Callable[[int], Batch],
        base: Base,
        experts: Callable[..., SparseExperts] = SparseExperts,
    ):
        self.model, self.world, self.config = model.train(), world, config
        self.batch = batch
        """Gives the global batch of a step."""
        self.dtype = model.dtype
        """Of parameters and computation."""
        self.expert_bytes = files.expert_bytes
        self.next_step = 0
        """The first one that has not been done."""
        self.placing = Placing(config.publication, base, world, config.reshard_every)
        if config.recompute:
            # transformers before 5.20 has the old name alone
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.experts = experts(model, self.placing.base, world, config.optimizer)
        for (layer, expert), slot in self.experts.pool.slots.items():
            files.read(layer, expert, self.experts.pool.parameters[slot])
        self.experts.load_optimizer()
        self.moe_layers = [layer.layer for layer in self.experts.layers]
        warm_up_layers(self.moe_layers, self.dtype, world.device, is_training=True)
        self._router_logits = RouterLogits(self.moe_layers)
        expert_parameters = expert_parameter_names(self.moe_layers)
        named = {name: p for name, p in model.named_parameters() if name not in expert_parameters and p.requires_grad}
        if config.dense == "sharded":
            blocks = [layer.block for layer in self.moe_layers]
            self.dense = ShardedDense(model, blocks, named, config.optimizer, world)
        else:
            self.dense = ReplicatedDense(named, config.optimizer, world)

    def step(self, number: int) -> StepReport:
        """Runs step `number`, counting from 0, in lock step with the other ranks.

        Raises:
            PlanMismatch: the ranks' plans differ.
            RuntimeError: a collective broke, because a rank died or the timeout passed.
        """
        started = time.perf_counter()
        moved_before, link_before = self.world.moved_bytes.copy(), self.world.link_bytes.copy()
        experts, placing = self.experts, self.placing
        placing.begin_step()
        base = placing.reshard()
        resharded = 0 if base is None else move_experts(experts, base)

        batch = self.batch(number)
        num_sequences, length = batch.counts.shape
        micros = num_micros(num_sequences, self.world.size, self.config.micro_batch)
        planning_ns = time.perf_counter_ns()
        plan = placing.plan(micros)
        planning_ns = time.perf_counter_ns() - planning_ns
        # until the controller has heard enough and published what it makes of it
        is_timed = not placing.publications.applied.is_measured
        experts.begin_step(plan, is_timed)
        self.dense.zero_gradients()

        loads = torch.zeros(plan.plan.owners.shape, dtype=torch.int64, device=self.world.device)
        losses = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        mine = rank_slice(batch, self.world.rank, self.world.size)
        for micro in micro_batches(mine, num_sequences, self.world, micros):
            experts.begin_micro(micro.is_first, micro.is_last)
            losses += self._forward_backward(micro, plan.plan, loads, counted(self.model, batch), num_sequences)
        experts.share_gradients()
        self.dense.reduce()
        norm, scale = self._clip()
        lr = learning_rate(self.config.optimizer, number, self.config.steps)
        experts.update(number, lr, scale)
        self.dense.step(number, lr, scale)

        self.next_step = number + 1
        dist.all_reduce(losses, group=self.world.dense)
        placing.history.append(loads.cpu().numpy())
        loss, balance, z = losses.tolist()
        watch = experts.watch
        computed_rows = experts.computed_rows()
        return StepReport(
            step=number,
            loss=loss,
            balance_loss=balance,
            z_loss=z,
            grad_norm=norm.item(),
            learning_rate=lr,
            tokens=num_sequences * length,
            step_s=time.perf_counter() - started,
            loads=experts.rows().cpu().numpy(),
            computed_rows=computed_rows,
            copies=experts.num_copies(),
            resharded=resharded,
            moved_bytes=dict(self.world.moved_bytes - moved_before),
            link_bytes=dict(self.world.link_bytes - link_before),
            planning_ns=planning_ns + watch.planning_ns,
            exposed_ns=watch.exposed_ns,
            attention_ns=int(np.median(watch.attention_ns)) if is_timed else 0,
            experts_ns=sum(watch.experts_ns),
            experts_backward_ns=watch.backward_ns,
        )

    def state_bytes(self) -> dict[str, int]:
        """Bytes of parameters, gradients and optimizer that this rank holds, by part; copies apart."""
        dense = self.dense.state_bytes()
        return {part: held + dense.get(part, 0) for part, held in self.experts.state_bytes().items()}

    def _forward_backward(
        self, micro: Micro, plan: Plan, loads: Tensor, num_counted: int, num_sequences: int
    ) -> Tensor:
        """One micro-batch; adds all ranks' rows to `loads` and returns this rank's part of the losses, float64 [3]."""
        config, experts = self.config, self.experts
        rows_before = experts.rows()
        # a pass that broke off leaves some
        self._router_logits.take()
        self._router_logits.is_keeping = True
        prediction = predict(self.model, micro.batch)
        self._router_logits.is_keeping = False
        router_logits = self._router_logits.take()
        rows = experts.rows() - rows_before
        self.placing.share(rows, plan)
        loads += rows
        # a batch of prompts alone has nothing to learn
        token_loss = token_loss_sum(*prediction) / max(num_counted, 1)
        # router losses are means over a pass, and passes count by their tokens
        num_positions = micro.num_sequences * positions(self.model, self.moe_layers, micro.batch.counts.shape[1])
        share = micro.num_sequences / num_sequences
        balance = share * balance_loss(router_logits, rows, num_positions)
        z = share * router_z_loss(router_logits, num_positions)
        experts.begin_backward()
        (token_loss + config.balance_weight * balance + config.z_weight * z).backward()
        experts.finish_backward()
        return torch.stack([loss.detach().double() for loss in (token_loss, balance, z)])

    def _clip(self) -> tuple[Tensor, Tensor | None]:
        """The global norm of the gradients, each expert counted once, and what they are to be multiplied by."""
        square = self.experts.square_sum() + self.dense.square_sum()
        dist.all_reduce(square, group=self.world.dense)
        norm = square.sqrt()
        if self.config.optimizer.clip_norm is None:
            return norm, None
        # the 1e-6 is torch.nn.utils.clip_grad_norm_'s
        scale = (self.config.optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm, scale.to(torch.promote_types(self.dtype, torch.float32))
