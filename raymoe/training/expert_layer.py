"""One MoE layer of a training rank in one step: where its experts are, where its tokens go, and its computation.

T tokens here, N (token, rank) pairs sent, M received, K choices per token, E experts, D ranks, H hidden size.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.kernels import moe_mlp
from raymoe.models import MoELayer
from raymoe.placement import (
    GLOBAL_DISPATCH,
    DispatchTable,
    LayerPlan,
    PlacementState,
    Plan,
    Policy,
    assign,
    dispatch_counts,
    owned,
)
from raymoe.training.dispatch import Routes, exchange, gather_sum, make_routes, spread
from raymoe.training.pool import ExpertPool
from raymoe.training.sparse import Moves, Pending, Transport
from raymoe.training.stopwatch import Stopwatch
from raymoe.training.world import World

# torch 2.13 has the new name, and warns of the old one
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class StepPlan:
    """What all layers of one step go by; the same on every rank."""

    plan: Plan
    policy: Policy
    state: PlacementState
    transport: Transport
    num_micros: int = 1
    """Micro-batches that the step's gradient is accumulated over."""

    @property
    def needs_all_rows(self) -> bool:
        """Whether ranks tell each other how many rows they route to each expert before a layer's tokens travel."""
        return self.policy.calibrates or self.plan.dispatch in GLOBAL_DISPATCH


class ExpertLayer:
    """Stands behind one layer's experts. When copies are fetched and gradients sent home is `SparseExperts`' to say.

    Args:
        before_backward: called when the experts' backward pass begins, with this layer.
        after_backward: called when the gradients of all its experts are there.
    """

    def __init__(
        self,
        layer: MoELayer,
        pool: ExpertPool,
        world: World,
        watch: Stopwatch,
        before_backward: Callable[["ExpertLayer"], None],
        after_backward: Callable[["ExpertLayer"], None],
    ):
        self.layer, self.index = layer, layer.index
        self.before_backward, self.after_backward = before_backward, after_backward
        self._pool, self._world, self.watch = pool, world, watch
        self.rows_E = torch.zeros(layer.num_experts, dtype=torch.int64, device=world.device)
        """int64 [E]: rows that this rank's own tokens took in this step."""
        self.computed_rows = torch.zeros((), dtype=torch.int64, device=world.device)
        """int64: rows that this rank computed in this step."""
        self.placed: LayerPlan
        """Where the layer's experts are in this step, late copies included."""
        self._gathering: Pending | None = None
        self._reducing: Pending | None = None
        self._routes: Routes | None = None

    def bind(self, world: World) -> None:
        """Goes on among other ranks; what was under way among those before has ended, well or not."""
        for pending in (self._gathering, self._reducing):
            if pending is not None:
                with suppress(RuntimeError):
                    pending.wait()
        self._world = world
        self._gathering = self._reducing = self._routes = None

    def begin_step(self, step: StepPlan) -> None:
        """Takes the step's plan; nothing is sent yet."""
        self._step = step
        self._is_calibrated = not step.policy.calibrates
        self._copy_slots: dict[int, int] = {}
        self._known_moves: dict[bytes, Moves] = {}
        self._place(step.plan.layer(self.index))
        self._table = None
        if not step.needs_all_rows:
            self._table = DispatchTable(self.placed, [self._world.rank], step.state.cluster, step.plan.dispatch)
        self.rows_E.zero_()
        self.computed_rows.zero_()

    def start_gather(self) -> None:
        """Starts to bring this step's copies into their slots."""
        extra_ED = self.placed.extra_copies()
        if extra_ED.any():
            self.watch.timeline.begin("gather", self.index, "gather")
        self._gathering = self._gather(extra_ED, self._pool.parameters)

    def await_gather(self) -> None:
        """Waits for the copies."""
        if self._gathering is not None:
            with self.watch.exposed():
                self._gathering.wait()
            self.watch.timeline.end("gather", self.index)
            self._gathering = None

    def clear_copy_gradients(self) -> None:
        for slot in self._copy_slots.values():
            self._pool.gradients[slot].zero_()

    def start_reduce(self) -> None:
        """Starts to send the gradients of copies and replicas to the owners."""
        beside_ED = self._beside_owners(self.placed.copies)
        if beside_ED.any():
            self.watch.timeline.begin("reduce", self.index, "reduce")
        moves = self._moves(beside_ED)
        self._reducing = self._step.transport.reduce(moves, self._rows(self._pool.gradients), self._world)

    def await_reduce(self) -> None:
        """Waits until the owners have the sums of what was sent."""
        if self._reducing is not None:
            with self.watch.exposed():
                self._reducing.wait()
            self.watch.timeline.end("reduce", self.index)
            self._reducing = None

    def share_gradients(self) -> None:
        """Gives replicas that live elsewhere the owners' sums, so that all of them make the same update."""
        assert self.placed.resident is not None
        with self.watch.exposed():
            self._gather(self._beside_owners(self.placed.resident), self._pool.gradients).wait()

    def forward(
        self, hidden: Tensor, expert_index: Tensor, expert_weight: Tensor, before: Callable[[], None]
    ) -> Tensor:
        """hidden [T, H], expert_index [T, K], expert_weight [T, K] -> [T, H].

        Args:
            before: called when the tokens are here, before the experts compute.
        """
        rows_E = expert_index.flatten().bincount(minlength=self.layer.num_experts + 1)[:-1]
        self.rows_E += rows_E
        self._routes = self._route(expert_index, rows_E) if self._world.size > 1 else None
        return self._travel(hidden, expert_index, expert_weight, before, is_counted=True)

    def again(self, hidden: Tensor, expert_index: Tensor, expert_weight: Tensor, before: Callable[[], None]) -> Tensor:
        """The last forward once more, for activation checkpointing: by the same routes, and not counted again."""
        return self._travel(hidden, expert_index, expert_weight, before, is_counted=False)

    def run(self, hidden: Tensor, slot: Tensor, expert_weight: Tensor) -> Tensor:
        """Experts that are here on rows that are here, [M, H]; in backward the gradients of weights land in the pool."""
        gate_up, down, biases = self._pool.weights(self.layer)
        return moe_mlp(
            hidden,
            gate_up,
            down,
            slot,
            expert_weight,
            spec=self.layer.spec,
            biases=biases,
            grad_into=self._pool.weight_gradients(self.layer),
        )

    def _route(self, expert_index: Tensor, rows_E: Tensor) -> Routes:
        """Settles which rank computes each row, after late copies if the policy wants some."""
        step, rank = self._step, self._world.rank
        if self._table is not None:
            with self.watch.planning():
                counts_ED = self._table.counts(rows_E.cpu().numpy()[None])[0]
        else:
            rows_DE = self._rows_of_all(rows_E)
            with self.watch.planning():
                late = self._calibrate(rows_DE)
            if late is not None:
                with self.watch.exposed():
                    self._gather(late, self._pool.parameters).wait()
            with self.watch.planning():
                [counts_ED] = dispatch_counts(rows_DE, self.placed, step.state.cluster, step.plan.dispatch, [rank])
        with self.watch.planning():
            ranks = assign(expert_index.flatten().cpu().numpy(), counts_ED)
            rank_TK = torch.from_numpy(ranks).to(expert_index.device).view_as(expert_index)
        return make_routes(rank_TK, self._world)

    def _rows_of_all(self, rows_E: Tensor) -> np.ndarray:
        rows = rows_E.new_empty(self._world.size * len(rows_E))
        _all_gather(rows, rows_E, group=self._world.tokens)
        return rows.view(self._world.size, -1).cpu().numpy()

    def _calibrate(self, rows_DE: np.ndarray) -> np.ndarray | None:
        """Places the late copies that the policy wants once it knows the first micro-batch's rows: uint8 [E, D] or None."""
        if self._is_calibrated:
            return None
        self._is_calibrated = True
        step, planned = self._step, self.placed
        placed = step.policy.calibrate(self.index, rows_DE * step.num_micros, step.plan, step.state)
        late = placed.copies & ~planned.copies & 1
        if not late.any():
            return None
        self._place(placed)
        return late

    def _travel(
        self,
        hidden: Tensor,
        expert_index: Tensor,
        expert_weight: Tensor,
        before: Callable[[], None],
        is_counted: bool,
    ) -> Tensor:
        routes, world = self._routes, self._world
        if routes is None:
            before()
            return self._compute(hidden, expert_index, expert_weight, is_counted)
        there, back = (routes.sends, routes.receives, world), (routes.receives, routes.sends, world)
        with self.watch.timeline.span("dispatch", self.index):
            index_MK = exchange(expert_index[routes.token_N].where(routes.is_there_NK, self.layer.num_experts), *there)
            hidden_M = exchange(spread(hidden, routes), *there)
            weight_MK = exchange(spread(expert_weight, routes), *there)
        before()
        out = self._compute(hidden_M, index_MK, weight_MK, is_counted)
        with self.watch.timeline.span("combine", self.index):
            return gather_sum(exchange(out, *back), routes)

    def _compute(self, hidden: Tensor, expert_index: Tensor, expert_weight: Tensor, is_counted: bool) -> Tensor:
        slot = self._slot_table[expert_index]
        if not is_counted:
            return _LocalExperts.apply(hidden, expert_weight, slot, self)
        self.computed_rows += (slot < self._pool.num_slots).sum()
        with self.watch.experts(self.index):
            return _LocalExperts.apply(hidden, expert_weight, slot, self)

    def _place(self, placed: LayerPlan) -> None:
        """Gives copies their slots; those that have one keep it."""
        self.placed = placed
        here = np.flatnonzero(placed.extra_copies()[:, self._world.rank]).tolist()
        for expert in here:
            if expert not in self._copy_slots:
                self._copy_slots[expert] = self._pool.copy_slot(self.index, len(self._copy_slots))
        self._slots = self._pool.layer_slots(self.index) | self._copy_slots
        self._slot_table = self._pool.slot_table(self._slots, self.layer.num_experts)

    def _beside_owners(self, copies_ED: np.ndarray) -> np.ndarray:
        return copies_ED & ~owned(self.placed.owners, self.placed.num_devices) & 1

    def _moves(self, extra_ED: np.ndarray) -> Moves:
        # gather and reduce mostly move the same copies, and what a move works out it keeps
        key = extra_ED.tobytes()
        if key not in self._known_moves:
            self._known_moves[key] = Moves.of(self.placed.owners, extra_ED, self._world.rank, self._world.nodes)
        return self._known_moves[key]

    def _rows(self, pool: Tensor) -> dict[int, Tensor]:
        return {expert: pool[slot] for expert, slot in self._slots.items()}

    def _gather(self, extra_ED: np.ndarray, pool: Tensor) -> Pending:
        return self._step.transport.gather(self._moves(extra_ED), self._rows(pool), self._world)


class _LocalExperts(torch.autograd.Function):
    """`ExpertLayer.run` with a strict order in backward: first copies are awaited, then all gradients of the experts
    made, then they are sent. A graph of its own is kept inside, because autograd promises no order among its leaves.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, expert_weight: Tensor, slot: Tensor, layer: ExpertLayer) -> Tensor:
        inputs = hidden.detach().requires_grad_(), expert_weight.detach().requires_grad_()
        with torch.enable_grad():
            out = layer.run(inputs[0], slot, inputs[1])
        ctx.inputs, ctx.root, ctx.layer = inputs, torch.autograd.graph.get_gradient_edge(out), layer
        return out.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.layer.before_backward(ctx.layer)
        with ctx.layer.watch.experts_backward():
            torch.autograd.backward(ctx.root, gradient)
        ctx.layer.after_backward(ctx.layer)
        # with a gradient for both, always: what follows exchanges them with ranks that wait for it
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in ctx.inputs]
        ctx.inputs = ctx.root = None
        return *gradients, None, None
