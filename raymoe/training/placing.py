"""What a rank plans each step from: the loads of past steps, where experts live, and what the controller published.

L = MoE layers, E = experts a layer.
"""

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.placement import Base, PlacementState, Plan, Policy, policy
from raymoe.training.expert_layer import StepPlan
from raymoe.training.publication import Publication, PublicationBox
from raymoe.training.sparse import transport
from raymoe.training.world import World

_KEPT_HISTORY = 128


class PlanMismatch(RuntimeError):
    """Ranks planned differently: the epoch must end before they wait for each other's messages."""


@dataclass
class Commits:
    """Steps done at the newest snapshot that is complete here, and everywhere; -1: there is none in this epoch."""

    committed: int = -1
    agreed: int = -1


def first_base(first: Publication, owners: np.ndarray, world: World) -> Base:
    """Where experts live at the beginning of a run: what the policy makes of owners int64 [L, E]."""
    placing = Placing(first, Base.of_owners(owners, world.size), world, None)
    return placing.policy.start(placing.base, placing.state())


class Placing:
    """Every rank holds one and gives it the same loads, so all of them arrive at the same plans.

    Args:
        base: where experts live.
        reshard_every: steps between two re-shardings; None: as often as the policy has it; 0: never.
    """

    def __init__(self, first: Publication, base: Base, world: World, reshard_every: int | None):
        self.publications = PublicationBox(first)
        self.commits = Commits()
        self.history: deque[np.ndarray] = deque(maxlen=_KEPT_HISTORY)
        self.base = base
        self.steps_since_reshard = 0
        self._world, self._reshard_every = world, reshard_every
        self._agreed = first.version

    @property
    def is_stopping(self) -> bool:
        """Whether the epoch ends here, at the same step on all ranks."""
        return self.publications.held(self._agreed).is_stop

    def begin_step(self) -> None:
        """Applies the publication that all ranks hold."""
        self.publications.agree(self._agreed)

    def reshard(self) -> Base | None:
        """Where experts should live from now on, if it is time to ask and the answer is another than now."""
        interval = self.policy.interval if self._reshard_every is None else self._reshard_every
        if not interval or not self.history or self._world.size == 1:
            return None
        self.steps_since_reshard += 1
        if self.steps_since_reshard % interval:
            return None
        since = min(self.steps_since_reshard, len(self.history))
        base = self.policy.reshard(np.array(self.history)[-since:], self.state())
        self._check_equal(_digest(base))
        if base is self.base:
            return None
        self.base, self.steps_since_reshard = base, 0
        return base

    def plan(self, num_micros: int) -> StepPlan:
        """The next step's plan."""
        published = self.publications.applied
        this, state = self.policy, self.state()
        recent = list(self.history)[-published.window :]
        history = np.array(recent, dtype=np.int64).reshape(-1, *self.base.owners.shape)
        plan = this.prepare(history, state)
        if published.dispatch is not None:
            plan = replace(plan, dispatch=published.dispatch)
        return StepPlan(plan, this, state, transport(published.transport), num_micros)

    def share(self, loads: Tensor, plan: Plan) -> None:
        """Sums loads [L, E] over ranks in place; with them goes what all ranks must agree on.

        Raises:
            PlanMismatch: the ranks' plans differ.
        """
        dist.all_reduce(loads, group=self._world.dense)
        self._agreed = self._check_equal(plan.digest())

    def _check_equal(self, digest: int) -> int:
        """Returns the newest publication that all ranks hold."""
        words = torch.tensor(
            [self.publications.newest, self.commits.committed, digest, -digest], device=self._world.device
        )
        dist.all_reduce(words, op=dist.ReduceOp.MIN, group=self._world.dense)
        newest, self.commits.agreed, lowest, highest = words.tolist()
        if lowest != -highest:
            raise PlanMismatch(
                f"rank {self._world.rank} planned {digest:x}, other ranks between {lowest:x} and {-highest:x}; "
                "they must run the same version of raymoe and numpy"
            )
        return newest

    @property
    def policy(self) -> Policy:
        """The one in force."""
        return policy(self.publications.applied.policy)

    def state(self) -> PlacementState:
        """What it plans from besides the loads."""
        published = self.publications.applied
        return PlacementState(
            base=self.base,
            cluster=published.cluster,
            workload=published.workload.with_schedule(rematerialise=self.policy.rematerialise),
            extra_slots=published.extra_slots,
            overlap_degree=published.overlap_degree,
            window=published.window,
            steps_since_reshard=self.steps_since_reshard,
            dispatch=published.dispatch,
        )


def _digest(base: Base) -> int:
    return Plan(base.owners, base.resident, {}, base.resident).digest()
