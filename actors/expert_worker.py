"""The actor of a training rank. Thin: the step is `raymoe.training.Trainer`."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray.actor import ActorHandle

from raymoe import env
from raymoe.actors.metrics import export_metrics
from raymoe.actors.session import free_address
from raymoe.models import CheckpointWriter
from raymoe.telemetry import TraceWriter, metrics
from raymoe.training.checkpoint import Checkpointer
from raymoe.training.data.prepare import TOKENIZER_FOLDER
from raymoe.training.export import write_model
from raymoe.training.job import TrainJob
from raymoe.training.link_probe import LinkMeasurement, LinkProbe
from raymoe.training.lora import MergedWriter
from raymoe.training.lora_files import write_adapters
from raymoe.training.profile import profiled_steps
from raymoe.training.publication import Publication
from raymoe.training.report import StepReport
from raymoe.training.state import TrainerState
from raymoe.training.tokenizer import load_tokenizer
from raymoe.training.trainer import Trainer
from raymoe.training.world import join_world, leave_world

logger = logging.getLogger("raymoe")


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker found at the start of an epoch."""

    nodes: tuple[int, ...]
    """Node of every rank."""
    links: LinkMeasurement
    publication: Publication
    """What it plans from at first."""
    next_step: int
    """The first step to do: after the last one of a checkpoint, or 0."""
    state_bytes: dict[str, int]
    """What it holds of parameters, gradients and optimizer, by part."""


@ray.remote(concurrency_groups={"control": 1})  # pyright: ignore[reportCallIssue]  (Ray's overloads lack concurrency_groups)
class ExpertWorker:
    """One rank: owns a part of the experts, and runs the training step in lock step with the others.

    The constructor takes a path-sized job and no tensors, so that a restart costs nothing; `start` brings the state.
    """

    def __init__(self, rank: int, job: TrainJob):
        logging.basicConfig(level=env.log_level())
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        export_metrics()
        self._rank, self._job = rank, job
        self._trainer: Trainer | None = None

    def __repr__(self) -> str:
        return f"ExpertWorker[{self._rank}]"

    def rendezvous(self) -> str:
        """An address on this worker's node where an epoch's ranks can meet."""
        return free_address()

    def start(self, rendezvous: str) -> WorkerFacts:
        """Joins the epoch, reads its part of the model, and measures what the controller wants to know."""
        config = self._job.config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        node = ray.get_runtime_context().get_node_id()
        world = join_world(rendezvous, self._rank, config.workers, config.worker_timeout_s, device, node)
        self._trainer = self._job.build_trainer(world)
        links = LinkProbe(world, world.nodes, self._trainer.expert_bytes).measure()
        trainer = self._trainer
        return WorkerFacts(
            world.nodes, links, trainer.placing.publications.applied, trainer.next_step, trainer.state_bytes()
        )

    def run(self, controller: ActorHandle) -> None:
        """Trains to the last step; every step's report goes to the controller."""
        job, trainer = self._job, self._trainer
        assert trainer is not None, "start() comes first"
        first = trainer.next_step
        name = f"rank-{self._rank}" + (f"-from-{first}" if first else "")
        trace_path = job.folder / "trace" / f"{name}.parquet"
        trace_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                _checkpointing(job, trainer) as save,
                TraceWriter(trace_path, job.num_layers, job.num_experts, choices=job.workload.choices) as trace,
                profiled_steps(
                    trainer.experts.watch.timeline, job.folder, self._rank, trainer.next_step, job.config.steps,
                    job.config.profile_steps,
                ) as profile,
            ):  # fmt: skip
                for step in range(trainer.next_step, job.config.steps):
                    profile(step)
                    report = trainer.step(step)
                    trace.append(step, report.loads, rank=self._rank)
                    self._record(report)
                    controller.report.remote(self._rank, report)
                    save(step + 1)
        except BaseException:
            # at once: the closing sockets free every rank that waits for this one
            leave_world()
            raise

    def advance(self, num_steps: int, controller: ActorHandle) -> None:
        """Some steps and no more, for who wants to look between them; nothing is traced or saved."""
        trainer = self._trainer
        assert trainer is not None, "start() comes first"
        for _ in range(num_steps):
            controller.report.remote(self._rank, trainer.step(trainer.next_step))

    def save(self, path: Path) -> None:
        """Writes the whole model as a Hugging Face directory; every rank calls it, rank 0 writes."""
        assert self._trainer is not None, "start() comes first"
        lora = self._job.config.lora
        if lora is not None:
            write_adapters(self._trainer, path.with_name("adapter"), lora, base=str(self._job.model_path))
        if self._rank > 0:
            write_model(self._trainer, None)
            return
        tokenizer = load_tokenizer(self._job.folder / TOKENIZER_FOLDER)
        kind = MergedWriter if lora is not None else CheckpointWriter
        with kind(path, self._trainer.model, tokenizer, source=self._job.model_path) as writer:
            write_model(self._trainer, writer)

    @ray.method(concurrency_group="control")
    def publish(self, publication: Publication) -> None:
        """Takes the controller's publication while a step runs; the ranks agree on when to apply it."""
        assert self._trainer is not None, "start() comes first"
        self._trainer.placing.publications.put(publication)

    @ray.method(concurrency_group="control")
    def state(self) -> dict[str, object]:
        """What this worker is and holds, while a step runs: rank, process, backends of the kernels, bytes of its state."""
        from raymoe import kernels

        assert self._trainer is not None, "start() comes first"
        return {
            "rank": self._rank,
            "pid": os.getpid(),
            "kernel_calls": kernels.calls(),
            "owned_experts": self._trainer.experts.base.resident[:, :, self._rank].sum(axis=1).tolist(),
            "state_bytes": self._trainer.state_bytes(),
        }

    def _record(self, report: StepReport) -> None:
        moved = report.moved_bytes
        metrics.TRAIN_MATERIALISED_BYTES_TOTAL.inc(
            moved.get("sparse_all_gather", 0) + moved.get("sparse_reduce_scatter", 0)
        )
        metrics.TRAIN_ALLTOALL_BYTES_TOTAL.inc(moved.get("all_to_all", 0))
        if self._rank == 0:
            metrics.TRAIN_STEP_S.observe(report.step_s)
            metrics.TRAIN_LOSS.set(report.loss)
            metrics.TRAIN_TOKENS_TOTAL.inc(report.tokens)
            metrics.TRAIN_TOKENS_PER_S.set(report.tokens / report.step_s)


@contextmanager
def _checkpointing(job: TrainJob, trainer: Trainer) -> Iterator[Callable[[int], None]]:
    """What to call after each step with the number of steps done: saves when it is time."""
    config, world = job.config.checkpoint, trainer.world
    if config.folder is None:
        yield lambda done: None
        return
    checkpointer = Checkpointer(
        config.folder, rank=world.rank, size=world.size, group=None, keep=config.keep,
        resumed_step=trainer.next_step if job.resumes else None,
    )  # fmt: skip
    state = TrainerState(trainer)

    def save(done: int) -> None:
        if done % config.every_steps == 0 or done == job.config.steps:
            checkpointer.save(done, state)

    try:
        yield save
        checkpointer.wait()
    finally:
        checkpointer.close()
