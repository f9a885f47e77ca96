"""The workers and the controller of one training run, from the driver's side."""

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from raymoe.actors.expert_worker import ExpertWorker, WorkerFacts
from raymoe.actors.placement_controller import PlacementController, StepSummary
from raymoe.config import TrainConfig
from raymoe.errors import RunFailed
from raymoe.training.job import TrainJob
from raymoe.training.placing import PlanMismatch

logger = logging.getLogger("raymoe")

NAMESPACE = "raymoe"
_POLL_S = 0.25
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}
"""glibc's settings for workers on CPUs. By its own it gives large blocks back to the kernel at once, and they are faulted in
page by page in every step anew, which took up to half of an expert's backward pass."""


class WorkersFailed(RunFailed):
    """The run ended because workers could not be placed, failed or died; says which and why."""


class WorkerGroup:
    """Starts a run's actors, trains, saves. Use as a context manager: leaving it ends all the actors."""

    def __init__(self, job: TrainJob):
        self._job = job
        self._run = f"{job.folder.name}-{uuid.uuid4().hex[:6]}"
        self._timeout_s = job.config.worker_timeout_s
        self._controller: ActorHandle | None = None
        self.workers: list[ActorHandle] = []
        self.facts: list[WorkerFacts] = []
        """What each worker found at its start."""

    def __enter__(self) -> "WorkerGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    @property
    def controller(self) -> ActorHandle:
        """The run's `PlacementController`."""
        assert self._controller is not None, "start() comes first"
        return self._controller

    def start(self) -> None:
        """Places the controller and the workers, forms the epoch, and loads the model.

        Raises:
            WorkersFailed: the cluster has no room for them in time, or one failed.
        """
        config = self._job.config
        named = {"namespace": NAMESPACE}
        self._controller = PlacementController.options(name=f"{self._run}/placement-controller", **named).remote(
            self._job
        )
        resources = {
            "num_cpus": config.worker_cpus,
            "num_gpus": config.worker_gpus,
            "runtime_env": {"env_vars": _worker_env(config)},
        }
        self.workers = [
            ExpertWorker.options(name=f"{self._run}/expert-worker-{rank}", **named, **resources).remote(rank, self._job)
            for rank in range(config.workers)
        ]
        meeting, *_ = self._gather([worker.rendezvous.remote() for worker in self.workers], "could not be placed")
        measurements = self._gather([worker.start.remote(meeting) for worker in self.workers], "did not start")
        self.facts = measurements
        self._advanced = measurements[0].next_step
        ray.get(self.controller.register.remote(self.workers, measurements), timeout=self._timeout_s)

    def train(self) -> Iterator[StepSummary]:
        """Runs all steps; yields each as it is done.

        Raises:
            WorkersFailed: a worker died or failed.
        """
        running: dict[ray.ObjectRef, int] = {
            worker.run.remote(self.controller): rank for rank, worker in enumerate(self.workers)
        }
        known = self.facts[0].next_step
        while known < self._job.config.steps:
            if _failures(running, wait_s=_POLL_S):
                raise self._explain(running)
            fresh = ray.get(self.controller.progress.remote(known), timeout=self._timeout_s)
            yield from fresh
            known += len(fresh)
        self._gather(list(running), "did not finish")

    def publish(self, **changes: Any) -> None:
        """Gives the workers another publication than the controller's last; they apply it in the second step from now."""
        held = self.controller.publish.remote(changes)
        self._gather([worker.publish.remote(held) for worker in self.workers], "did not take a publication")

    def advance(self, num_steps: int) -> list[StepSummary]:
        """Some steps and no more, all workers together."""
        known = self._advanced
        calls: list[ray.ObjectRef] = [worker.advance.remote(num_steps, self.controller) for worker in self.workers]
        self._gather(calls, "did not finish")
        self._advanced += num_steps
        steps: list[StepSummary] = []
        while len(steps) < num_steps:
            # reports come a moment after the calls end
            steps = ray.get(self.controller.progress.remote(known), timeout=self._timeout_s)
        return steps

    def save(self, path: Path) -> None:
        """Writes the trained model as a Hugging Face directory."""
        self._gather([worker.save.remote(path) for worker in self.workers], "did not save")

    def states(self) -> list[dict[str, object]]:
        """Every worker's state, in the order of the ranks."""
        return self._gather([worker.state.remote() for worker in self.workers], "did not report their state")

    def _gather(self, refs: list[ray.ObjectRef], what: str) -> list:
        try:
            return ray.get(refs, timeout=self._timeout_s)
        except GetTimeoutError:
            config = self._job.config
            raise WorkersFailed(
                f"{config.workers} workers {what} within {self._timeout_s:g} s. They need {config.worker_cpus:g} "
                f"CPUs and {config.worker_gpus:g} GPUs each; free in the cluster: {_free()}. Lower 'workers', free "
                "resources, or raise 'worker_timeout_s'."
            ) from None
        except RayError:
            raise self._explain({ref: rank for rank, ref in enumerate(refs)}) from None

    def _explain(self, running: dict[ray.ObjectRef, int]) -> WorkersFailed:
        """Names the cause: a death before an error of our own before a collective that broke because of them."""
        # a rank whose peer is gone needs a moment to notice
        failures = _failures(running, wait_s=2)
        rank, error = min(failures.items(), key=lambda item: (_blame(item[1]), item[0]))
        logger.debug("worker %d: %s", rank, error)
        if isinstance(error, RayActorError):
            return WorkersFailed(f"worker {rank} died: {' '.join(str(error).split())}")
        cause = error.cause if isinstance(error, RayTaskError) else error
        return WorkersFailed(f"worker {rank} failed: {type(cause).__name__}: {' '.join(str(cause).split())}")

    def _kill(self) -> None:
        for actor in [*self.workers, self._controller]:
            if actor is not None:
                ray.kill(actor)
        self.workers, self._controller = [], None


def _worker_env(config: TrainConfig) -> dict[str, str]:
    return (KEEP_FREED_MEMORY if config.worker_gpus == 0 else {}) | config.env


def _failures(running: dict[ray.ObjectRef, int], wait_s: float) -> dict[int, RayError]:
    """The errors, by rank, of the calls that end within `wait_s`."""
    done, _ = ray.wait(list(running), num_returns=len(running), timeout=wait_s)
    failures = {}
    for ref in done:
        try:
            ray.get(ref)
        except RayError as error:
            failures[running[ref]] = error
    return failures


def _blame(error: RayError) -> int:
    if isinstance(error, RayActorError):
        return 0
    cause = error.cause if isinstance(error, RayTaskError) else error
    # a broken collective is a RuntimeError, and is what all the other ranks see
    return 2 if isinstance(cause, RuntimeError) and not isinstance(cause, PlanMismatch) else 1


def _free() -> str:
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"
