"""The actor of a training rank. Thin: the step is `raymoe.training.Trainer`."""

import gc
import logging
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from raymoe import env
from raymoe.actors.metrics import export_metrics
from raymoe.actors.notice import Notice
from raymoe.actors.orders import EpochOrder, Outcome, Phase, WorkerFacts, WorkerState
from raymoe.actors.sent_reports import SentReports
from raymoe.actors.session import use_nodes_interface
from raymoe.actors.step_records import StepRecords
from raymoe.models import CheckpointWriter
from raymoe.training.data.prepare import TOKENIZER_FOLDER
from raymoe.training.export import write_model
from raymoe.training.held_memory import HeldMemory
from raymoe.training.job import TrainJob
from raymoe.training.link_probe import LinkProbe
from raymoe.training.lora import MergedWriter
from raymoe.training.lora_files import write_adapters
from raymoe.training.placing import PlanMismatch
from raymoe.training.publication import Publication
from raymoe.training.regroup import enter_epoch, evacuate
from raymoe.training.report import StepReport
from raymoe.training.snapshot import Held, Snapshots
from raymoe.training.state import TrainerState
from raymoe.training.tokenizer import load_tokenizer
from raymoe.training.trainer import Trainer
from raymoe.training.world import World, join_world, leave_world, open_meeting

logger = logging.getLogger("raymoe")


# control answers while a step runs; follow blocks, once for a controller and once more for its successor
@ray.remote(concurrency_groups={"control": 2, "follow": 4})  # pyright: ignore[reportCallIssue]  (Ray's overloads lack concurrency_groups)
class ExpertWorker:
    """One rank of each epoch that it is a member of: owns a part of the experts, and steps in lock step with the others.

    The constructor takes a path-sized job and no tensors; `enter` brings the state. Killed it never comes back: another worker
    with another number takes its place.
    """

    def __init__(self, run: str, member: int, job: TrainJob):
        logging.basicConfig(level=env.log_level())
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        export_metrics()
        use_nodes_interface()
        self._notice = Notice()
        self._member, self._job, self._run = member, job, run
        self._node: str = ray.get_runtime_context().get_node_id()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._trainer: Trainer | None = None
        self._snapshots = Snapshots()
        self._memory = HeldMemory()
        self._phase: Phase = "new"
        self._epoch = -1
        self._ended = threading.Condition()
        self._outcomes: dict[tuple[int, int], Outcome] = {}
        self._order: EpochOrder | None = None
        self._reports = SentReports()
        # what is imported stays: `join_world` collects garbage while all wait for it
        gc.collect()
        gc.freeze()

    def __repr__(self) -> str:
        return f"ExpertWorker[{self._member}]"

    @property
    def _running(self) -> Trainer:
        assert self._trainer is not None, "enter() comes first"
        return self._trainer

    def rendezvous(self) -> str:
        """An address at this worker where an epoch's ranks can meet."""
        return open_meeting(ray.util.get_node_ip_address())

    def prepare(self, share: int) -> None:
        """Does a step alone before it joins others, so that nothing is done for the first time while they wait for it.

        Args:
            share: workers that a batch is split over.
        """
        self._phase = "preparing"
        timeout_s = self._job.config.worker_timeout_s
        world = join_world(self.rendezvous(), 0, 1, timeout_s, self._device, self._node)
        self._trainer = self._job.rehearsing_trainer(world, share)
        self._trainer.step(0)
        # what it rehearsed with was a part
        self._trainer.batch = self._job.batches()
        leave_world()
        self._phase = "ready"

    def enter(self, order: EpochOrder) -> WorkerFacts:
        """Becomes a rank of a new epoch; returns when all its ranks are there and have their state."""
        self._phase = "entering"
        started = time.perf_counter()
        leave_world()
        rank, timeout_s = order.members.index(self._member), self._job.config.worker_timeout_s
        world = join_world(
            order.rendezvous, rank, len(order.members), timeout_s, self._device, self._node, member=self._member
        )
        met = time.perf_counter()
        self._trainer = trainer = self._taught(world, order)
        self._snapshots.attach(world, order.number, trainer.placing.commits)
        self._epoch, self._order = order.number, order
        seconds = {"meet": met - started, "restore": time.perf_counter() - met}
        links = LinkProbe(world, world.nodes, trainer.expert_bytes).measure() if order.measures_links else None
        self._phase = "idle"
        self._facts = WorkerFacts(
            world.nodes, links, trainer.placing.publications.applied, trainer.placing.base.owners, trainer.next_step,
            trainer.state_bytes(), seconds,
        )  # fmt: skip
        return self._facts

    def run(self, epoch: int, until: int, controller: ActorHandle, keeps_records: bool = True) -> None:
        """Trains until so many steps are done, or the epoch ends; `follow` tells how it ended.

        Args:
            keeps_records: write the routing trace, checkpoints and profile.
        """
        if (epoch, until) in self._outcomes:
            return  # asked for by a controller that is no more, and done
        self._phase = "running"
        try:
            outcome = self._train(until, controller, keeps_records)
        except BaseException as error:
            # at once: the closing sockets free every rank that waits for this one
            leave_world()
            outcome = Outcome(_kind_of(error, self._running.world), self._running.next_step, _said(error))
            logger.debug("worker %d", self._member, exc_info=True)
        self._phase = "idle" if outcome.kind in ("reached", "stopped") else outcome.kind
        with self._ended:
            self._outcomes[epoch, until] = outcome
            self._ended.notify_all()

    @ray.method(concurrency_group="follow")
    def follow(self, epoch: int, until: int) -> Outcome:
        """Waits for the end of a `run`."""
        with self._ended:
            self._ended.wait_for(lambda: (epoch, until) in self._outcomes)
            return self._outcomes[epoch, until]

    def settle(self) -> None:
        """Returns when this worker's last snapshot is with its buddy."""
        self._snapshots.wait()

    def snap(self) -> None:
        """Takes a snapshot between two steps; all workers do, after all have settled. Returns when it is with the buddy."""
        self._snapshots.take(TrainerState(self._running), is_agreed=True)
        self._snapshots.wait()

    def evacuate(self, leaving: list[int]) -> int:
        """Moves all experts off the ranks that leave; returns how many. All ranks do it together."""
        return evacuate(self._running, leaving)

    def save(self, path: Path) -> None:
        """Writes the whole model as a Hugging Face directory; every rank calls it, rank 0 writes."""
        trainer, lora = self._running, self._job.config.lora
        if lora is not None:
            write_adapters(trainer, path.with_name("adapter"), lora, base=str(self._job.model_path))
        if trainer.world.rank > 0:
            write_model(trainer, None)
            return
        tokenizer = load_tokenizer(self._job.folder / TOKENIZER_FOLDER)
        kind = MergedWriter if lora is not None else CheckpointWriter
        with kind(path, trainer.model, tokenizer, source=self._job.model_path) as writer:
            write_model(trainer, writer)

    @ray.method(concurrency_group="control")
    def publish(self, publication: Publication) -> None:
        """Takes the controller's publication while a step runs; the ranks agree on when to apply it."""
        self._running.placing.publications.put(publication)

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        """Frees this worker from a collective that will never end."""
        leave_world()

    @ray.method(concurrency_group="control")
    def held(self) -> list[Held]:
        """The snapshots in this worker's memory, its own and those it keeps for others."""
        return self._snapshots.held()

    @ray.method(concurrency_group="control")
    def facts(self) -> WorkerFacts:
        """What `enter` returned last, with the newest publication."""
        publications = self._running.placing.publications
        return replace(self._facts, publication=publications.held(publications.newest))

    @ray.method(concurrency_group="control")
    def order(self) -> EpochOrder | None:
        """The last one that this worker entered an epoch by."""
        return self._order

    @ray.method(concurrency_group="control")
    def reports(self, epoch: int, known: int) -> list[StepReport]:
        """Of an epoch's steps from `known` on, as far back as they are kept: for a controller that was not there."""
        return self._reports.since(epoch, known)

    @ray.method(concurrency_group="control")
    def state(self) -> WorkerState:
        """What this worker is doing and holds."""
        from raymoe import kernels

        trainer = self._trainer
        rank = trainer.world.rank if trainer is not None and self._epoch >= 0 else None
        return WorkerState(
            member=self._member,
            rank=rank,
            node=self._node,
            pid=os.getpid(),
            phase=self._phase,
            is_leaving=self._notice.is_given,
            epoch=self._epoch,
            next_step=trainer.next_step if trainer is not None else 0,
            owned_experts=() if rank is None or trainer is None else _owned(trainer),
            state_bytes={} if trainer is None else trainer.state_bytes(),
            snapshot_bytes=self._snapshots.num_bytes(),
            snapshot_step=self._snapshots.agreed,
            kernel_calls=kernels.calls(),
        )

    def _taught(self, world: World, order: EpochOrder) -> Trainer:
        """A trainer of the new world with its state."""
        job, trainer = self._job, self._trainer
        if order.source is None:
            return job.start_trainer(world, order.publication, order.resumes)
        assert trainer is not None, "a joiner has prepared itself"
        if job.config.dense == "sharded":
            # FSDP2's parameters are bound to their ranks
            self._trainer = None
            trainer = job.start_trainer(world, order.publication, None)
        enter_epoch(trainer, world, order.publication, order.source, self._snapshots)
        return trainer

    def _snap(self, trainer: Trainer, report: StepReport) -> StepReport:
        """Takes a snapshot, and says in the report what it cost."""
        snapshots = self._snapshots
        if not snapshots.take(TrainerState(trainer)):
            return report
        return replace(report, snapshot_s=snapshots.last_take_s, snapshot_sent_bytes=snapshots.last_sent_bytes)

    def _train(self, until: int, controller: ActorHandle, keeps_records: bool) -> Outcome:
        job, trainer = self._job, self._running
        rank, epoch = trainer.world.rank, self._epoch
        with StepRecords(job, trainer, self._run, epoch, is_kept=keeps_records) as records:
            try:
                if self._snapshots.agreed is None and trainer.placing.publications.applied.snapshot_every:
                    # what the dead kept for the living is gone, and who is new has nothing yet
                    self._snapshots.take(TrainerState(trainer))
                while trainer.next_step < until:
                    if trainer.placing.is_stopping:
                        return Outcome("stopped", trainer.next_step)
                    records.before(trainer.next_step)
                    report = trainer.step(trainer.next_step)
                    every = trainer.placing.publications.applied.snapshot_every
                    if every and trainer.next_step % every == 0:
                        report = self._snap(trainer, report)
                    self._memory.after_step()
                    # where the epoch is broken meanwhile, its groups are gone
                    self._reports.send(controller, rank, epoch, report, goes_on=dist.is_initialized)
                    records.after(report)
            except BaseException:
                # before the records are closed: a checkpoint in the making waits for the other ranks too
                leave_world()
                raise
        return Outcome("reached", until)


def _owned(trainer: Trainer) -> tuple[int, ...]:
    owned = np.bincount([layer for layer, _ in trainer.experts.pool.slots], minlength=len(trainer.experts.layers))
    return tuple(owned.tolist())


def _kind_of(error: BaseException, world: World) -> Literal["broken", "failed"]:
    """A broken collective is a RuntimeError, of one of several texts; alone there are none."""
    is_broken = isinstance(error, RuntimeError) and not isinstance(error, PlanMismatch) and world.size > 1
    return "broken" if is_broken else "failed"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
