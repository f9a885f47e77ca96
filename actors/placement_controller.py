"""The actor that sees all ranks: gathers their reports, settles placement parameters, shows the run's state."""

import logging
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import ray
from ray.actor import ActorHandle

from raymoe import env
from raymoe.actors.expert_worker import WorkerFacts
from raymoe.actors.metrics import export_metrics
from raymoe.placement import ClusterSpec
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
        self._facts: list[WorkerFacts] = []
        self._reports: dict[int, dict[int, StepReport]] = {}
        self._attention_ns: list[int] = []
        self._row_ns: list[float] = []
        self._summaries: deque[StepSummary] = deque(maxlen=_KEPT_STEPS)
        self._num_steps = 0

    def __repr__(self) -> str:
        return "PlacementController"

    def register(self, workers: list[ActorHandle], facts: list[WorkerFacts]) -> None:
        """Takes the ranks of the epoch, with what each found at its start."""
        self._workers, self._facts = workers, facts

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
            self._settle(list(reports.values()))

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
        }

    def _settle(self, reports: list[StepReport]) -> None:
        """Publishes what the cost model needs, once steps have been seen working."""
        if self._publication.version > 0 or len(self._facts) < 2:
            return
        if self._num_steps > _UNMEASURED_STEPS:
            self._attention_ns.append(min(each.attention_ns for each in reports))
            self._row_ns.append(float(np.median([each.row_ns for each in reports])))
        if len(self._attention_ns) < _MEASURED_STEPS:
            return
        job = self._job
        attention_ns, row_ns = int(np.median(self._attention_ns)), float(np.median(self._row_ns))
        cluster = measured_cluster(self._facts, int(job.workload.row_flops * 1e9 / max(row_ns, 1e-3)))
        workload = replace(job.workload, attention_ns=attention_ns)
        self._publication = replace(
            self._publication, version=1, cluster=cluster, workload=workload, extra_slots=job.extra_slots
        )
        logger.info("measured: attention %.1f ms, a routed row %.1f us, %.0f MB/s and %.0f us between workers",
                    attention_ns / 1e6, row_ns / 1e3, cluster.inter_bytes_s / 1e6, cluster.latency_ns / 1e3)  # fmt: skip
        for worker in self._workers:
            worker.publish.remote(self._publication)


def measured_cluster(facts: list[WorkerFacts], flops_s: int) -> ClusterSpec:
    """The ranks' nodes and the slowest of their links. Where the cores that compute also copy, copies hide behind nothing."""
    nodes = list(dict.fromkeys(each.node for each in facts))
    bandwidth = max(min(each.bandwidth_bytes_s for each in facts), 1)
    return ClusterSpec(
        tuple(nodes.index(each.node) for each in facts),
        bandwidth,
        bandwidth,
        latency_ns=max(each.latency_ns for each in facts),
        flops_s=max(flops_s, 1),
        overlap_percent=0 if facts[0].device == "cpu" else 100,
    )


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
