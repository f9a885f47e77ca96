"""A training run from the driver's side: starts its controller, follows it, and ends it."""

import pickle
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymoe.actors.elastic_log import RunEvent
from raymoe.actors.orders import RunState, WorkerFacts, WorkerState
from raymoe.actors.placement_controller import Lease, PlacementController
from raymoe.actors.roster import answers, explain
from raymoe.actors.session import NAMESPACE
from raymoe.actors.step_summary import StepSummary
from raymoe.errors import RunFailed
from raymoe.telemetry.files import write_bytes
from raymoe.training.job import TrainJob
from raymoe.training.publication import Publication

_JOB_FILE = "job.pickle"
_POLL_S = 0.2
_RESTART_S = 60.0
"""How long a controller may be away."""


class WorkersFailed(RunFailed):
    """The run ended because workers could not be placed, failed or died; says which and why."""


class WorkerGroup:
    """Starts a run's actors, trains, saves. Use as a context manager: leaving it ends all the actors, unless the run is
    detached and goes on without us."""

    def __init__(self, job: TrainJob):
        self._job = job
        self.run = f"{job.folder.name}-{uuid.uuid4().hex[:6]}"
        """Its name, by which `raymoe status` and others find it."""
        self._timeout_s = job.config.worker_timeout_s
        self._controller: ActorHandle | None = None
        self._lease: ActorHandle | None = None
        self._known_events = 0
        self.events: list[RunEvent] = []
        """Deaths, joins and the like so far."""
        self.facts: list[WorkerFacts] = []
        """What each worker found at its start."""

    def __enter__(self) -> "WorkerGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._controller is None:
            return
        # one that is being restarted is ended by the lease
        with suppress(RayError, GetTimeoutError):
            ray.get(self._controller.end.remote(), timeout=15)
        ray.kill(self._controller)
        if self._lease is not None:
            ray.kill(self._lease)
        self._controller = None

    @property
    def controller(self) -> ActorHandle:
        """The run's `PlacementController`."""
        assert self._controller is not None, "start() comes first"
        return self._controller

    @property
    def workers(self) -> list[ActorHandle]:
        """The workers of the epoch in force, in the order of their ranks."""
        # a controller that has just been restarted has yet to find them
        until = time.monotonic() + _RESTART_S
        while not (members := self._ask("members")):
            if time.monotonic() > until:
                raise WorkersFailed(f"the controller has found no workers for {_RESTART_S:g} s")
            time.sleep(_POLL_S)
        return members

    def start(self) -> None:
        """Places the controller and the workers, forms the first epoch, and loads the model.

        Raises:
            WorkersFailed: the cluster has no room for them in time, or one failed.
        """
        # they go with the driver's node, and no other
        here = ray.get_runtime_context().get_node_id()
        same_node = NodeAffinitySchedulingStrategy(here, soft=False)
        self._lease = Lease.options(
            name=f"{self.run}/lease", namespace=NAMESPACE, scheduling_strategy=same_node
        ).remote()
        path = self._job.folder / _JOB_FILE
        write_bytes(path, pickle.dumps(self._job))
        self._controller = PlacementController.options(
            name=f"{self.run}/placement-controller",
            namespace=NAMESPACE,
            lifetime="detached",
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        ).remote(path, self.run)
        while not self.facts:
            time.sleep(_POLL_S / 4)
            self._check(self._ask("state"))
            self.facts = self._ask("facts")
        self._next_step = self.facts[0].next_step

    def train(self) -> Iterator[StepSummary]:
        """Runs all steps; yields each as it is done, once, also if workers die meanwhile and steps are repeated.

        Raises:
            WorkersFailed: the run cannot go on.
        """
        yield from self._follow(self._job.config.steps, keeps_records=True)

    def advance(self, num_steps: int) -> list[StepSummary]:
        """Some steps and no more; nothing is traced or saved."""
        return list(self._follow(self._next_step + num_steps, keeps_records=False))

    def publish(self, **changes: Any) -> None:
        """Gives the workers another publication than the controller's last; they apply it in the second step from now."""
        self._ask("publish", changes)

    def scale(self, num_workers: int) -> None:
        """Has so many workers from now on, as soon as there is room, or lets the last ones go."""
        self._ask("scale", num_workers)

    def publication(self) -> Publication | None:
        """What the controller published last."""
        return self._ask("state").publication

    def save(self, path: Path) -> None:
        """Writes the trained model as a Hugging Face directory; workers that die meanwhile are made up for.

        Raises:
            WorkersFailed: it could not be written.
        """
        self._ask("save", path)
        while (state := self._ask("state")).saved != str(path):
            self._check(state)
            time.sleep(_POLL_S)

    def states(self) -> list[WorkerState]:
        """Every worker's state, in the order of the ranks."""
        return self._all("state")

    def _follow(self, until: int, keeps_records: bool) -> Iterator[StepSummary]:
        self._ask("train", until, keeps_records)
        while True:
            fresh, events, state = self._ask("progress", self._next_step, self._known_events)
            self.events += events
            self._known_events += len(events)
            for summary in fresh:
                if summary.step < until:
                    self._next_step = summary.step + 1
                    yield summary
            self._check(state)
            if state.reached >= until and self._next_step >= until:
                return
            if not fresh:
                time.sleep(_POLL_S)

    def _check(self, state: RunState) -> None:
        if state.failure is not None:
            raise WorkersFailed(state.failure)

    def _ask(self, method: str, *args: Any) -> Any:
        """Asks the controller, and its successor if it is being restarted."""
        until = time.monotonic() + _RESTART_S
        while True:
            try:
                return ray.get(getattr(self.controller, method).remote(*args), timeout=_RESTART_S)
            except GetTimeoutError:
                raise WorkersFailed(f"the controller has not answered for {_RESTART_S:g} s") from None
            except (ActorUnavailableError, RayActorError) as error:
                if time.monotonic() > until:
                    raise WorkersFailed(f"the controller is gone: {error}") from None
                time.sleep(_POLL_S)

    def _all(self, method: str, *args: Any) -> list[Any]:
        workers = self.workers
        calls = {getattr(worker, method).remote(*args): rank for rank, worker in enumerate(workers)}
        results, errors = answers(calls, self._timeout_s)
        if errors:
            raise WorkersFailed(explain(errors))
        if len(results) < len(workers):
            silent = sorted(set(range(len(workers))) - results.keys())
            raise WorkersFailed(f"workers {', '.join(map(str, silent))} did not answer within {self._timeout_s:g} s")
        return [results[rank] for rank in range(len(workers))]
