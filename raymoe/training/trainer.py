"""The training step of one rank. No Ray in here: a rank is an actor in production and a plain process in tests.

L MoE layers, E experts, D ranks.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from raymoe.config import OptimizerConfig
from raymoe.models import CheckpointWriter, ExpertFiles, expert_parameter_names, warm_up_layers
from raymoe.placement import Base, PlacementState, Plan, policy
from raymoe.training.batches import rank_slice
from raymoe.training.fssdp import SparseExperts
from raymoe.training.loss import RouterLogits, balance_loss, token_loss_sum
from raymoe.training.optimizer import ShardedAdamW
from raymoe.training.publication import Publication, PublicationBox
from raymoe.training.world import World


class PlanMismatch(RuntimeError):
    """Ranks planned differently: the epoch must end before they wait for each other's messages."""


@dataclass(frozen=True)
class TrainerConfig:
    """What a rank's step depends on, besides model and data; equal on all ranks."""

    optimizer: OptimizerConfig
    steps: int
    balance_weight: float
    publication: Publication


@dataclass(frozen=True)
class StepReport:
    """One rank's account of one step. Losses and loads are of the global batch."""

    step: int
    loss: float
    """Cross entropy, nats a token."""
    balance_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    """Of all ranks."""
    step_s: float
    loads: np.ndarray
    """int64 [L, E], rows of this rank's own tokens."""
    computed_rows: np.ndarray
    """int64 [L], rows this rank computed."""
    copies: int
    """Expert copies that were made over all layers and ranks."""
    moved_bytes: dict[str, int]
    """Bytes this rank sent in this step, by kind of collective."""
    attention_ns: int
    """From a block's start to its experts: the median over layers; 0 if the step was not timed."""
    row_ns: float
    """Forward computation of one routed row in its expert: the mean over layers; 0 if the step was not timed."""


class Trainer:
    """Trains `model`, whose experts are in `files`, together with the other ranks of `world`.

    Args:
        batch: gives the global batch of a step, int64 [B, n + 1].
        owners: int64 [L, E], owner of every expert.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: ExpertFiles,
        world: World,
        config: TrainerConfig,
        batch: Callable[[int], Tensor],
        owners: np.ndarray,
    ):
        self.model, self.world, self.config = model.train(), world, config
        self._batch = batch
        self._owners = owners
        self.expert_bytes = files.expert_bytes
        self.publications = PublicationBox(config.publication)
        self._agreed = config.publication.version
        self.experts = SparseExperts(model, owners.tolist(), world)
        self._read_owned(files)
        warm_up_layers(self.experts.layers, model.dtype, world.device, is_training=True)
        self._router_logits = RouterLogits(self.experts.layers)
        expert_parameters = expert_parameter_names(self.experts.layers)
        dense = [p for name, p in model.named_parameters() if name not in expert_parameters]
        self.optimizer = ShardedAdamW(dense, self.experts.shards, config.optimizer, config.steps, world)
        self._history: deque[np.ndarray] = deque()

    def step(self, number: int) -> StepReport:
        """Runs step `number`, counting from 0, in lock step with the other ranks.

        Raises:
            PlanMismatch: the ranks' plans differ.
            RuntimeError: a collective broke, because a rank died or the timeout passed.
        """
        started = time.perf_counter()
        sent_before = self.world.moved_bytes.copy()
        self.publications.agree(self._agreed)
        plan = self._plan()
        # until the controller has heard enough and published what it makes of it
        is_timed = self.publications.applied.version == 0
        self.experts.begin_step(plan, self.publications.applied.cluster, is_timed)
        self.optimizer.zero_gradients()

        batch = self._batch(number)
        tokens = batch.shape[0] * (batch.shape[1] - 1)
        mine = rank_slice(batch, self.world.rank, self.world.size).to(self.world.device)
        logits = self.model(input_ids=mine[:, :-1], use_cache=False).logits
        router_logits = self._router_logits.take()
        loads = self._share_loads(plan)
        token_loss = token_loss_sum(logits, mine[:, 1:])
        balance = balance_loss(router_logits, loads, tokens)
        (token_loss / tokens + self.config.balance_weight * balance).backward()

        self.experts.finish_backward()
        self.optimizer.reduce_dense_gradients()
        norm = self.optimizer.clip()
        learning_rate = self.optimizer.step(number)

        losses = torch.stack([token_loss.detach().double() / tokens, balance.detach().double()])
        dist.all_reduce(losses, group=self.world.dense)
        self._history.append(loads.cpu().numpy())
        return StepReport(
            step=number,
            loss=losses[0].item(),
            balance_loss=losses[1].item(),
            grad_norm=norm.item(),
            learning_rate=learning_rate,
            tokens=tokens,
            step_s=time.perf_counter() - started,
            loads=self.experts.loads.cpu().numpy().copy(),
            computed_rows=self.experts.computed_rows.cpu().numpy().copy(),
            copies=int(plan.copies.sum()) - plan.owners.size,
            moved_bytes=dict(self.world.moved_bytes - sent_before),
            attention_ns=int(np.median(self.experts.attention_ns)) if is_timed else 0,
            row_ns=self._row_ns() if is_timed else 0.0,
        )

    def measure_links(self) -> tuple[int, int]:
        """Bytes per second at which this rank sends an expert while it receives one, all ranks at once, and the time of a
        message of one byte in nanoseconds; (0, 0) if it is alone."""
        if self.world.size == 1:
            return 0, 0
        latency_s, expert_s = self._message_s(1), self._message_s(self.expert_bytes)
        return int(self.expert_bytes / max(expert_s - latency_s, 1e-9)), int(latency_s * 1e9)

    def _message_s(self, num_bytes: int, repeats: int = 5) -> float:
        out = torch.zeros(num_bytes, dtype=torch.uint8, device=self.world.device)
        into = torch.empty_like(out)
        following = (self.world.rank + 1) % self.world.size
        preceding = (self.world.rank - 1) % self.world.size
        times_s = []
        for _ in range(repeats):
            dist.barrier(group=self.world.experts)
            started = time.perf_counter()
            operations = [
                dist.P2POp(dist.isend, out, group=self.world.experts, group_peer=following),
                dist.P2POp(dist.irecv, into, group=self.world.experts, group_peer=preceding),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            if into.is_cuda:
                torch.cuda.synchronize(into.device)
            times_s.append(time.perf_counter() - started)
        return float(np.median(times_s))

    def _row_ns(self) -> float:
        rows = int(self.experts.computed_rows.sum())
        return sum(self.experts.experts_ns) / rows if rows else 0.0

    def write(self, writer: CheckpointWriter | None) -> None:
        """Brings every layer's experts to rank 0, one layer at a time, and writes them; all ranks call it, rank 0 with a
        writer."""
        if writer is not None:
            expert_parameters = expert_parameter_names(self.experts.layers)
            state = self.model.state_dict()
            writer.add({name: value for name, value in state.items() if name not in expert_parameters})
        for shard, owners_E in zip(self.experts.shards, self._owners, strict=True):
            flat = self._collect(shard.parameter.data, owners_E)
            if writer is not None:
                layer = shard.layer
                writer.add({f"{layer.name}.{name}": view for name, view in layer.layout.views(flat).items()})

    def _plan(self) -> Plan:
        published = self.publications.applied
        state = PlacementState(
            base=Base.of_owners(self._owners, self.world.size),
            cluster=published.cluster,
            workload=published.workload,
            extra_slots=published.extra_slots,
            overlap_degree=published.overlap_degree,
            window=published.window,
        )
        while len(self._history) > published.window:
            self._history.popleft()
        history = np.array(self._history, dtype=np.int64).reshape(-1, *self._owners.shape)
        return policy(published.policy).prepare(history, state)

    def _share_loads(self, plan: Plan) -> Tensor:
        """Sums the loads over ranks; with them goes what all ranks must agree on: the plan, and the newest publication."""
        loads = self.experts.loads.clone()
        dist.all_reduce(loads, group=self.world.dense)
        digest = plan.digest()
        agreed = torch.tensor([self.publications.newest, digest, -digest], device=self.world.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self.world.dense)
        newest, lowest, highest = agreed.tolist()
        if lowest != -highest:
            raise PlanMismatch(
                f"rank {self.world.rank} planned {digest:x}, other ranks between {lowest:x} and {-highest:x}; "
                "they must run the same version of raymoe and numpy"
            )
        self._agreed = newest
        return loads

    def _read_owned(self, files: ExpertFiles) -> None:
        for shard in self.experts.shards:
            for slot, expert in enumerate(shard.owned):
                files.read(shard.layer.index, expert, shard.pool[slot])

    def _collect(self, owned: Tensor, owners_E: np.ndarray) -> Tensor:
        """[N, numel] of this rank's experts -> [E, numel] of all of them on rank 0, in the order of the experts."""
        if self.world.rank > 0:
            if len(owned):
                dist.send(owned.contiguous(), group=self.world.experts, group_dst=0)
            return owned
        flat = owned.new_empty(len(owners_E), owned.shape[1])
        for rank in range(self.world.size):
            mine = torch.from_numpy(np.flatnonzero(owners_E == rank)).to(owned.device)
            if rank > 0 and len(mine):
                received = owned.new_empty(len(mine), owned.shape[1])
                dist.recv(received, group=self.world.experts, group_src=rank)
                flat[mine] = received
            elif rank == 0:
                flat[mine] = owned
        return flat
