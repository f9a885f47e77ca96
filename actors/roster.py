"""The worker actors of a run: made, found again, asked all at once, and ended."""

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymoe.actors.expert_worker import ExpertWorker
from raymoe.actors.orders import WorkerState
from raymoe.actors.session import NAMESPACE, actor_names
from raymoe.config import TrainConfig
from raymoe.training.job import TrainJob
from raymoe.training.placing import PlanMismatch

KEEP_FREED_MEMORY = {
    # Ray brings it; where it lies elsewhere the loader warns and glibc's own serves, with the settings after it
    "LD_PRELOAD": str(Path(ray.__file__).parent / "core" / "libjemalloc.so"),
    "MALLOC_CONF": "narenas:1,oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:0,thp:always",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}
"""Allocator of workers on CPUs: jemalloc, told to keep what is freed. glibc by its own gives large blocks back to the kernel at
once, and they are faulted in page by page in every step anew, which took up to half of an expert's backward pass; told to keep
them, it cuts its heap up where sizes differ from step to step, and faults in more of it."""

_FREEING_S = 2.0

DIED = "died"
"""How `reason` begins where Ray has seen the process end."""


@ray.remote(num_cpus=0)
def _kill_process(pid: int) -> None:
    """Ends a worker's process on this node."""
    with suppress(OSError):  # it is gone
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ExpertWorker"):
            os.kill(pid, signal.SIGKILL)


class Roster:
    """The workers of the run `run` by their member numbers. They outlive whoever made them; `end` is what ends them."""

    def __init__(self, job: TrainJob, run: str):
        self._job, self._run, self._prefix = job, run, f"{run}/expert-worker-"
        self._handles: dict[int, ActorHandle] = {}
        self._next = 0

    def handles(self, members: Iterable[int]) -> dict[int, ActorHandle]:
        """Of those workers that there are, in that order; one may be ended meanwhile by another thread."""
        found = {member: self._handles.get(member) for member in members}
        return {member: handle for member, handle in found.items() if handle is not None}

    def __contains__(self, member: int) -> bool:
        return member in self._handles

    def hire(self, avoid: set[str] | None = None) -> int:
        """Makes a worker; Ray places it when there is room. Returns its number.

        Args:
            avoid: ids of nodes where it is not to be.
        """
        member, config = self._next, self._job.config
        where = {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}} if avoid else {}
        self._next += 1
        self._handles[member] = ExpertWorker.options(
            name=f"{self._prefix}{member}",
            namespace=NAMESPACE,
            # a worker must outlive the controller, which may be restarted
            lifetime="detached",
            num_cpus=config.worker_cpus,
            num_gpus=config.worker_gpus,
            runtime_env={"env_vars": worker_env(config)},
            **where,
        ).remote(self._run, member, self._job)
        return member

    def find(self) -> list[int]:
        """The workers that are there already, after a restart of who had made them."""
        for name in actor_names():
            if name.startswith(self._prefix):
                member = int(name.removeprefix(self._prefix))
                self._handles[member] = ray.get_actor(name, NAMESPACE)
                self._next = max(self._next, member + 1)
        return sorted(self._handles)

    def call(self, members: Iterable[int], method: str, *args: Any) -> dict[ray.ObjectRef, int]:
        """Calls a method of those workers that there are; returns whose each answer will be."""
        return {getattr(handle, method).remote(*args): member for member, handle in self.handles(members).items()}

    def free(self, members: Iterable[int]) -> None:
        """Frees workers from collectives that will never end. Returns when that is done, as far as they answer: it must not come
        upon them in their next epoch."""
        answers(self.call(members, "abort"), _FREEING_S)

    def dismiss(self, member: int, state: WorkerState | None = None) -> None:
        """Ends a worker.

        Args:
            state: of a worker that does not answer: a stopped process cannot end itself, and is killed by another on its node.
        """
        handle = self._handles.pop(member, None)
        if handle is None:
            return
        ray.kill(handle)
        if state is not None:
            there = NodeAffinitySchedulingStrategy(state.node, soft=False)
            _kill_process.options(scheduling_strategy=there).remote(state.pid)

    def end(self) -> None:
        """Ends all workers."""
        for member in list(self._handles):
            self.dismiss(member)


def answers(
    calls: dict[ray.ObjectRef, int], timeout_s: float, *, stop_early: bool = False
) -> tuple[dict[int, Any], dict[int, RayError]]:
    """What calls return within a time, by member, and the errors of those that fail.

    Args:
        stop_early: return at the first error.
    """
    results: dict[int, Any] = {}
    errors: dict[int, RayError] = {}
    waiting, until = list(calls), time.monotonic() + timeout_s
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0, until - time.monotonic()))
        if not done:
            break
        for ref in done:
            try:
                results[calls[ref]] = ray.get(ref)
            except RayError as error:
                errors[calls[ref]] = error
        if errors and stop_early:
            break
    return results, errors


def is_death(error: RayError) -> bool:
    """Whether an actor is gone, or cannot be reached, rather than that its method failed."""
    return isinstance(error, RayActorError)


def reason(error: RayError) -> str:
    """What happened to a worker, to be said behind its name."""
    if is_death(error):
        return f"{DIED}: {' '.join(str(error).split())}"
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"failed: {type(cause).__name__}: {' '.join(str(cause).split())}"


def explain(errors: dict[int, RayError]) -> str:
    """The cause of several errors: a death before an error of a worker's own, and that before a broken collective."""
    member, error = min(errors.items(), key=lambda item: (_blame(item[1]), item[0]))
    return f"worker {member} {reason(error)}"


def _blame(error: RayError) -> int:
    if is_death(error):
        return 0
    cause = error.cause if isinstance(error, RayTaskError) else error
    # a broken collective is a RuntimeError, and is what all the other ranks see
    return 2 if isinstance(cause, RuntimeError) and not isinstance(cause, PlanMismatch) else 1


def worker_env(config: TrainConfig) -> dict[str, str]:
    """Environment variables of a worker's process."""
    return (KEEP_FREED_MEMORY if config.worker_gpus == 0 else {}) | config.env
