"""The actor that sees all ranks: gathers their reports, settles placement parameters, shows the run's state."""

import logging
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import ray
from ray.actor import ActorHandle

from raymoe import env
from raymoe.actors.metrics import export_metrics
from raymoe.placement import overlap_degree
from raymoe.telemetry import metrics
from raymoe.training.job import TrainJob
from raymoe.training.trainer import StepReport

logger = logging.getLogger("raymoe")

_MEASURED_STEPS = 4
_UNMEASURED_STEPS = 2  # the first steps allocate and warm up
_KEPT_STEPS = 4096  # a driver asks several times a second


@dataclass(frozen=True)
class StepSummary:
    """One step over all ranks."""

    step: int
    loss: float
    balance_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    step_s: float
    """Of the slowest rank."""
    expert_imbalance: float
    """Busiest expert over the mean, averaged over layers: what the router asks for."""
    owner_imbalance: float
    """Busiest worker's rows over the mean, had every row gone to its expert's owner: what expert parallelism computes."""
    worker_imbalance: float
    """Busiest worker's rows over the mean, averaged over layers: what the placement leaves of it."""
    loads: np.ndarray
    """int64 [L, E], rows of all ranks."""
    copies: int
    moved_bytes: dict[str, int]
    """Sent by all ranks, by kind of collective."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


@ray.remote(num_cpus=0, concurrency_groups={"control": 1})  # pyright: ignore[reportCallIssue]  (Ray's overloads lack concurrency_groups)
class PlacementController:
    """Settles what is slower than a step. Per-step plans are made by the ranks themselves, from what it last published."""

    def __init__(self, job: TrainJob):
        logging.basicConfig(level=env.log_level())
        export_metrics()
        self._job = job
        self._publication = job.first_publication
        self._workers: list[ActorHandle] = []
        self._bandwidth_bytes_s = 0
        self._expert_bytes = 1
        self._reports: dict[int, dict[int, StepReport]] = {}
        self._attention_ns: list[int] = []
        self._summaries: deque[StepSummary] = deque(maxlen=_KEPT_STEPS)
        self._num_steps = 0

    def __repr__(self) -> str:
        return "PlacementController"

    def register(self, workers: list[ActorHandle], measurements: list[dict[str, int]]) -> None:
        """Takes the ranks of the epoch, with what each measured at its start."""
        self._workers = workers
        self._bandwidth_bytes_s = min(measured["bandwidth_bytes_s"] for measured in measurements)
        self._expert_bytes = measurements[0]["expert_bytes"]

    def report(self, rank: int, report: StepReport) -> None:
        """One rank's account of one step."""
        reports = self._reports.setdefault(report.step, {})
        reports[rank] = report
        if len(reports) == self._job.config.workers:
            del self._reports[report.step]
            summary = summarise(list(reports.values()), self._job.owners)
            self._summaries.append(summary)
            self._num_steps += 1
            metrics.TRAIN_EXPERT_IMBALANCE_RATIO.set(summary.worker_imbalance)
            self._settle_overlap(min(each.attention_ns for each in reports.values()))

    @ray.method(concurrency_group="control")
    def progress(self, known: int) -> list[StepSummary]:
        """Summaries of the steps after the first `known` ones, as far back as they are kept."""
        return [summary for summary in list(self._summaries) if summary.step >= known]

    @ray.method(concurrency_group="control")
    def state(self) -> dict[str, object]:
        """The run as it is: steps done, what is published, what was measured."""
        return {
            "steps": self._num_steps,
            "publication": self._publication,
            "bandwidth_bytes_s": self._bandwidth_bytes_s,
            "expert_bytes": self._expert_bytes,
        }

    def _settle_overlap(self, attention_ns: int) -> None:
        """With `overlap_degree: auto`, publishes the t that hides behind the attention, once it has been seen working."""
        experts = self._job.config.experts
        if experts.overlap_degree != "auto" or self._publication.version > 0 or self._bandwidth_bytes_s == 0:
            return
        if self._num_steps > _UNMEASURED_STEPS:
            self._attention_ns.append(attention_ns)
        if len(self._attention_ns) < _MEASURED_STEPS:
            return
        degree = overlap_degree(int(np.median(self._attention_ns)), self._bandwidth_bytes_s, self._expert_bytes)
        degree = min(degree, self._job.num_experts)
        slots = degree if experts.extra_slots is None else experts.extra_slots
        self._publication = replace(self._publication, version=1, overlap_degree=degree, extra_slots=slots)
        logger.info("overlap degree %d: attention %.1f ms, %.0f MB/s between workers", degree,
                    np.median(self._attention_ns) / 1e6, self._bandwidth_bytes_s / 1e6)  # fmt: skip
        for worker in self._workers:
            worker.publish.remote(self._publication)


def summarise(reports: list[StepReport], owners: np.ndarray) -> StepSummary:
    """One step's reports of all ranks as one. owners int64 [L, E]."""
    first = reports[0]
    loads_LE = np.sum([report.loads for report in reports], axis=0)
    owned_DL = np.stack([(loads_LE * (owners == rank)).sum(1) for rank in range(len(reports))])
    computed_DL = np.stack([report.computed_rows for report in reports])
    kinds = sorted({kind for report in reports for kind in report.moved_bytes})
    return StepSummary(
        step=first.step,
        loss=first.loss,
        balance_loss=first.balance_loss,
        grad_norm=first.grad_norm,
        learning_rate=first.learning_rate,
        tokens=first.tokens,
        step_s=max(report.step_s for report in reports),
        expert_imbalance=_imbalance(loads_LE.T),
        owner_imbalance=_imbalance(owned_DL),
        worker_imbalance=_imbalance(computed_DL),
        loads=loads_LE,
        copies=first.copies,
        moved_bytes={kind: sum(report.moved_bytes.get(kind, 0) for report in reports) for kind in kinds},
    )


def _imbalance(rows_NL: np.ndarray) -> float:
    """Max over mean along the first axis, averaged over layers."""
    return float((rows_NL.max(0) / rows_NL.mean(0)).mean())
