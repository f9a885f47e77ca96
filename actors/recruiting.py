"""Workers on their way into a run: placed by Ray, warmed up while the others train, then ready to be taken in."""

import math
import time

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from raymoe.actors.elastic_log import ElasticLog
from raymoe.actors.roster import Roster, reason
from raymoe.config import TrainConfig
from raymoe.errors import RunFailed
from raymoe.training.job import TrainJob

_FAILURES = 5
_PATIENCE_S = 5.0
"""One stop for several joiners is better than one for each, but not at any price."""


class Recruiting:
    """Keeps as many workers on their way as are wanted and as the cluster has room for."""

    def __init__(self, job: TrainJob, roster: Roster, log: ElasticLog):
        self._config, self._roster, self._log = job.config, roster, log
        self._num_failures = 0
        self._preparing: dict[ray.ObjectRef, int] = {}
        self.ready: list[int] = []
        """Those that could join now."""
        self._ready_since = 0.0
        self._asked_for = 0

    @property
    def is_settled(self) -> bool:
        """Whether those that are ready need not wait for others."""
        return not self._preparing or time.monotonic() - self._ready_since > _PATIENCE_S

    def ask_for_capacity(self, num_workers: int) -> None:
        """Tells the autoscaler, if there is one, how many workers the run would have."""
        if num_workers != self._asked_for:
            self._asked_for = num_workers
            config = self._config
            bundle = {"CPU": math.ceil(config.worker_cpus)} | (
                {"GPU": math.ceil(config.worker_gpus)} if config.worker_gpus else {}
            )
            request_resources(bundles=[bundle] * num_workers)

    def look(self, wanted: int, share: int, step: int, avoid: set[str]) -> None:
        """Sees who is ready, and makes more if there is room.

        Args:
            wanted: workers that should be ready or on their way.
            share: workers that a batch will be split over.
            step: the next one to do, for the log.
            avoid: ids of nodes where no worker is to be.

        Raises:
            RunFailed: none that is made becomes ready.
        """
        waiting = list(self._preparing)
        for ref in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0] if waiting else []:
            member = self._preparing.pop(ref)
            try:
                ray.get(ref)
            except RayError as error:
                self._roster.dismiss(member)
                self._num_failures += 1
                self._log.add("unfit", step, f"worker {member} {reason(error)}", worker=member)
                if self._num_failures >= _FAILURES:
                    raise RunFailed(
                        f"{_FAILURES} workers in a row could not be prepared; worker {member} {reason(error)}"
                    ) from None
                continue
            self._num_failures = 0
            if not self.ready:
                self._ready_since = time.monotonic()
            self.ready.append(member)
        while len(self.ready) > wanted:
            self._roster.dismiss(self.ready.pop())
        # one at a time: what the cluster calls available is not at once what has been promised
        if len(self.ready) + len(self._preparing) < wanted and room(self._config) > 0:
            member = self._roster.hire(avoid)
            self._preparing |= self._roster.call([member], "prepare", share)

    def take(self, most: int) -> list[int]:
        """Those that join now."""
        taken, self.ready = self.ready[:most], self.ready[most:]
        return taken


def room(config: TrainConfig) -> int:
    """Workers that the cluster could place now, as far as its sums say."""
    free = ray.available_resources()
    counts = [int(free.get("CPU", 0) // config.worker_cpus)]
    if config.worker_gpus:
        counts.append(int(free.get("GPU", 0) // config.worker_gpus))
    return min(counts)
