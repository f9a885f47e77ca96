"""The actor that sees all ranks: gathers their reports, settles placement parameters, keeps the epochs going."""

import logging
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from raymoe import env
from raymoe.actors.elastic_log import ElasticLog, RunEvent
from raymoe.actors.epoch_keeper import EpochKeeper
from raymoe.actors.metrics import export_metrics
from raymoe.actors.orders import RunState, WorkerFacts
from raymoe.actors.roster import Roster
from raymoe.actors.session import NAMESPACE
from raymoe.actors.step_book import StepBook
from raymoe.actors.step_summary import StepSummary
from raymoe.actors.wishes import Wishes
from raymoe.training.job import TrainJob
from raymoe.training.report import StepReport

logger = logging.getLogger("raymoe")

EVENTS_FILE = "events.jsonl"
CHECKPOINT_FOLDER = "checkpoint"
"""In the run's folder: the trained model as a Hugging Face directory."""
_WISHES_FILE = "wishes.json"
_POLL_S = 0.5


@ray.remote(num_cpus=0)
class Lease:
    """Lives as long as the process that made it: Ray ends it together with its owner."""

    def ping(self) -> None:
        """Answers."""


# reports come one after another; whoever asks or wishes is answered meanwhile
@ray.remote(num_cpus=0, max_restarts=-1, concurrency_groups={"control": 4})  # pyright: ignore[reportCallIssue]  (Ray's overloads lack concurrency_groups)
class PlacementController:
    """Settles what is slower than a step. Per-step plans are made by the ranks themselves, from what it last published.

    It may be killed at any time: the workers go on with their steps, and Ray starts it again, to find them by their names. The
    actor `run/lease` lives as long as whoever started the run.

    Args:
        job_path: file with the pickled `TrainJob`, where all nodes see it: a restart needs it when the driver's objects are gone.
        run: the run's name, which those of all its actors begin with.
    """

    def __init__(self, job_path: Path, run: str):
        logging.basicConfig(level=env.log_level())
        export_metrics()
        job: TrainJob = pickle.loads(job_path.read_bytes())
        self._job, self._run = job, run
        is_new = not ray.get_runtime_context().was_current_actor_reconstructed
        workers, self._wishes_path = job.config.workers, job.folder / _WISHES_FILE
        self._wishes = Wishes(workers.max, workers.min) if is_new else Wishes.load(self._wishes_path)
        self._wishes.save(self._wishes_path)
        self._checkpoint = job.folder / CHECKPOINT_FOLDER
        self._roster = Roster(job, run)
        self._log = ElasticLog(job.folder / EVENTS_FILE, is_new)
        self._book = StepBook(job, self._first_step)
        me = ray.get_actor(f"{run}/placement-controller", NAMESPACE)
        self._keeper = EpochKeeper(job, self._wishes, self._roster, self._book, self._log, me)
        self._thread = threading.Thread(target=self._keeper.run, name="keeper", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    def __repr__(self) -> str:
        return "PlacementController"

    def report(self, rank: int, epoch: int, report: StepReport) -> None:
        """One rank's account of one step."""
        publication = self._book.report(rank, epoch, report)
        order = self._keeper.order
        if publication is not None and order is not None and order.number == epoch:
            self._roster.call(order.members, "publish", publication)

    @ray.method(concurrency_group="control")
    def train(self, until: int, keeps_records: bool) -> None:
        """So many steps are to be done; `state` says when they are."""
        self._wishes.keeps_records = keeps_records
        self._wishes.until = max(self._wishes.until, until)
        self._wishes.save(self._wishes_path)

    @ray.method(concurrency_group="control")
    def progress(self, known: int, known_events: int) -> tuple[list[StepSummary], list[RunEvent], RunState]:
        """Steps from `known` on, events from `known_events` on, and the run as it is."""
        return self._book.summaries(known), self._log.since(known_events), self._state()

    @ray.method(concurrency_group="control")
    def state(self) -> RunState:
        """The run as it is."""
        return self._state()

    @ray.method(concurrency_group="control")
    def facts(self) -> list[WorkerFacts]:
        """What the ranks of the epoch in force found as it began, in their order; empty while there is none."""
        return self._keeper.facts

    @ray.method(concurrency_group="control")
    def members(self) -> list[ActorHandle]:
        """The workers of the epoch in force that there still are, in the order of their ranks."""
        order = self._keeper.order
        return [] if order is None else list(self._roster.handles(order.members).values())

    @ray.method(concurrency_group="control")
    def publish(self, changes: dict[str, Any]) -> None:
        """Gives the workers another publication; they apply it in the second step from now."""
        order = self._keeper.order
        assert order is not None, "the run has begun"
        publication = self._book.next_publication(**changes)
        ray.get(list(self._roster.call(order.members, "publish", publication)))

    @ray.method(concurrency_group="control")
    def scale(self, num_workers: int) -> None:
        """Has so many workers from now on, as soon as there is room, or lets the last ones go.

        Raises:
            ValueError: the run cannot.
        """
        config = self._job.config
        if not 1 <= num_workers <= config.batch:
            raise ValueError(f"{num_workers} workers: a step has {config.batch} sequences, give 1 to {config.batch}")
        self._wishes.least = min(self._wishes.least, num_workers)
        self._wishes.most = num_workers
        self._wishes.save(self._wishes_path)

    @ray.method(concurrency_group="control")
    def drain(self, node: str) -> None:
        """Takes workers off a node, by its id in hex, and places no new ones there."""
        self._wishes.leaving_nodes.add(node)
        self._wishes.save(self._wishes_path)

    @ray.method(concurrency_group="control")
    def save(self, path: Path) -> None:
        """Has the model written as a Hugging Face directory once the steps are done; `state` says when it is."""
        self._keeper.saved = None
        self._wishes.save_to = str(path)
        self._wishes.save(self._wishes_path)

    @ray.method(concurrency_group="control")
    def end(self) -> None:
        """Ends all workers; returns when they are gone."""
        self._end()

    def _end(self) -> None:
        self._wishes.is_over = True
        self._thread.join(timeout=10)
        # the keeper may still wait for workers that have just been asked for
        self._roster.end()

    def _first_step(self, step: int) -> None:
        """Of an epoch; the first of a run is nothing that happened."""
        if (order := self._keeper.order) is None or order.number > 0:
            self._log.add("resumed", step + 1, f"step {step} is done")

    def _state(self) -> RunState:
        keeper = self._keeper
        order = keeper.order
        return RunState(
            run=self._run,
            epoch=order.number if order is not None else -1,
            members=order.members if order is not None else (),
            next_step=self._book.next_step,
            reached=keeper.reached,
            least=self._wishes.least,
            most=self._wishes.most,
            publication=self._book.publication,
            workers=tuple(keeper.states[m] for m in sorted(keeper.states)),
            waits_for=keeper.waits_for,
            saved=keeper.saved,
            failure=keeper.failure,
        )

    def _watch_lease(self) -> None:
        """Whoever started the run is gone: it ends, or goes on and is saved at its end."""
        try:
            lease = ray.get_actor(f"{self._run}/lease", NAMESPACE)
            while not self._wishes.is_over:
                ray.get(lease.ping.remote())
                time.sleep(_POLL_S)
            return
        except (RayError, ValueError) as gone:
            logger.debug("%s", gone)
        if self._job.config.detached:
            logger.warning("whoever started the run is gone; it goes on, and its model will be in %s", self._checkpoint)
            self._wishes.until, self._wishes.save_to = self._job.config.steps, str(self._checkpoint)
            self._wishes.save(self._wishes_path)
            while self._keeper.saved is None and self._keeper.failure is None and not self._wishes.is_over:
                time.sleep(_POLL_S)
        else:
            logger.warning("whoever started the run is gone, and the run ends")
        self._end()
        ray.kill(ray.get_actor(f"{self._run}/placement-controller", NAMESPACE))
