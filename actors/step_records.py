"""What a worker writes down of its steps: metrics always; routing trace, profile and checkpoints if wanted."""

from contextlib import ExitStack
from types import TracebackType

from raymoe.telemetry import TraceWriter, metrics
from raymoe.training.checkpoint import Checkpointer
from raymoe.training.job import TrainJob
from raymoe.training.profile import profiled_steps
from raymoe.training.report import StepReport
from raymoe.training.state import TrainerState
from raymoe.training.trainer import Trainer


class StepRecords:
    """Use as a context manager around the steps of one rank in one epoch. Leaving it waits for the last checkpoint, unless by
    an exception.

    Args:
        run: its name.
        is_kept: whether trace, profile and checkpoints are written.
    """

    def __init__(self, job: TrainJob, trainer: Trainer, run: str, epoch: int, is_kept: bool):
        self._job, self._trainer, self._run, self._epoch, self._is_kept = job, trainer, run, epoch, is_kept
        self._open = ExitStack()
        self._checkpointer: Checkpointer | None = None

    def __enter__(self) -> "StepRecords":
        if self._is_kept:
            with ExitStack() as opening:
                self._begin(opening)
                self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if kind is None and self._checkpointer is not None:
                self._checkpointer.wait()

    def before(self, step: int) -> None:
        """A step is about to begin."""
        if self._is_kept:
            self._profile(step)

    def after(self, report: StepReport) -> None:
        """A step is done."""
        _measure(report, self._trainer.world.rank)
        if not self._is_kept:
            return
        self._trace.append(report.step, report.loads, rank=self._trainer.world.rank)
        done, config = report.step + 1, self._job.config
        if self._checkpointer is not None and (done % config.checkpoint.every_steps == 0 or done == config.steps):
            self._checkpointer.save(done, self._state)

    def _begin(self, opening: ExitStack) -> None:
        job, trainer, rank = self._job, self._trainer, self._trainer.world.rank
        first = trainer.next_step
        name = f"rank-{rank}" + (f"-from-{first}" if first else "") + (f"-epoch-{self._epoch}" if self._epoch else "")
        path = job.folder / "trace" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = TraceWriter(path, job.num_layers, job.num_experts, choices=job.workload.choices)
        self._trace = opening.enter_context(writer)
        timeline = trainer.experts.watch.timeline
        profiled = profiled_steps(timeline, job.folder, rank, first, job.config.steps, job.config.profile_steps)
        self._profile = opening.enter_context(profiled)
        if job.config.checkpoint.folder is not None:
            self._checkpointer = Checkpointer(
                job.config.checkpoint.folder, rank=rank, size=trainer.world.size, group=None,
                keep=job.config.checkpoint.keep, resumed_step=first if job.resumes or self._epoch else None, run=self._run,
            )  # fmt: skip
            opening.callback(self._checkpointer.close)
            self._state = TrainerState(trainer)


def _measure(report: StepReport, rank: int) -> None:
    moved = report.moved_bytes
    metrics.TRAIN_MATERIALISED_BYTES_TOTAL.inc(
        moved.get("sparse_all_gather", 0) + moved.get("sparse_reduce_scatter", 0)
    )
    metrics.TRAIN_ALLTOALL_BYTES_TOTAL.inc(moved.get("all_to_all", 0))
    if rank == 0:
        metrics.TRAIN_STEP_S.observe(report.step_s)
        metrics.TRAIN_LOSS.set(report.loss)
        metrics.TRAIN_TOKENS_TOTAL.inc(report.tokens)
        metrics.TRAIN_TOKENS_PER_S.set(report.tokens / report.step_s)
