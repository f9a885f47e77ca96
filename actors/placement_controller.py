"""The actor that sees all ranks: gathers their reports, settles placement parameters, shows the run's state."""

import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from raymoe import env
from raymoe.actors.expert_worker import WorkerFacts
from raymoe.actors.metrics import export_metrics
from raymoe.placement import ClusterSpec
from raymoe.telemetry import metrics
from raymoe.training.job import TrainJob
from raymoe.training.publication import Publication
from raymoe.training.report import StepReport

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
    z_loss: float
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
    resharded: int
    """Experts that changed homes before the step."""
    moved_bytes: dict[str, int]
    """Sent by all ranks, by kind of collective."""
    link_bytes: dict[str, int]
    """The same by link, `near` within nodes and `far` between them."""
    planning_s: float
    """Planning and bookkeeping, of the slowest rank."""
    exposed_s: float
    """Waiting for expert parameters and gradients, of the rank that waited longest."""
    experts_s: float
    """Computing experts, forward and backward, of the rank that took longest."""

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
        self._publication: Publication | None = None
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
        self._publication = facts[0].publication

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

    def publish(self, changes: dict[str, Any]) -> Publication:
        """The last publication with other fields, under the next version; whoever asks hands it to the workers."""
        assert self._publication is not None, "register() comes first"
        self._publication = replace(self._publication, version=self._publication.version + 1, **changes)
        return self._publication

    @ray.method(concurrency_group="control")
    def state(self) -> dict[str, object]:
        """The run as it is: steps done, what is published, what was measured."""
        return {
            "steps": self._num_steps,
            "publication": self._publication,
        }

    def _settle(self, reports: list[StepReport]) -> None:
        """Publishes what the cost model needs, once steps have been seen working."""
        first = self._publication
        if first is None or first.version > 0 or len(self._facts) < 2 or self._job.config.experts.cluster is not None:
            return
        if self._num_steps > _UNMEASURED_STEPS:
            self._attention_ns.append(min(each.attention_ns for each in reports))
            # over all ranks together: one that owns none of the hot experts has hardly a row to be timed by
            rows = sum(int(each.computed_rows.sum()) for each in reports)
            self._row_ns.append(sum(each.experts_ns for each in reports) / max(rows, 1))
        if len(self._attention_ns) < _MEASURED_STEPS:
            return
        job = self._job
        attention_ns, row_ns = int(np.median(self._attention_ns)), float(np.median(self._row_ns))
        cluster = measured_cluster(self._facts[0], int(job.workload.row_flops * 1e9 / max(row_ns, 1e-3)))
        workload = replace(first.workload, attention_ns=attention_ns)
        self._publication = replace(first, version=1, cluster=cluster, workload=workload, extra_slots=job.extra_slots)
        logger.info("measured: attention %.1f ms, a routed row %.1f us, %.0f MB/s and %.0f us between workers, overlap %d %%",
                    attention_ns / 1e6, row_ns / 1e3, cluster.inter_bytes_s / 1e6, cluster.latency_ns / 1e3,
                    cluster.overlap_percent)  # fmt: skip
        for worker in self._workers:
            worker.publish.remote(self._publication)


def measured_cluster(facts: WorkerFacts, flops_s: int) -> ClusterSpec:
    """The ranks' nodes, and their links as all of them measured them together."""
    links = facts.links
    near = links.intra_bytes_s or links.inter_bytes_s
    assert near is not None, "a single worker has no links and is not asked"
    return ClusterSpec(
        facts.nodes,
        near,
        links.inter_bytes_s or near,
        latency_ns=links.latency_ns or links.inter_latency_ns or 0,
        inter_latency_ns=links.inter_latency_ns or 0,
        flops_s=max(flops_s, 1),
        nic_shared=links.is_nic_shared,
        full_duplex=links.is_full_duplex,
        overlap_percent=links.overlap_percent,
    )


def summarise(reports: list[StepReport], owners: np.ndarray) -> StepSummary:
    """One step's reports of all ranks as one. owners int64 [L, E]."""
    first = reports[0]
    loads_LE = np.sum([report.loads for report in reports], axis=0)
    owned_DL = np.stack([(loads_LE * (owners == rank)).sum(1) for rank in range(len(reports))])
    computed_DL = np.stack([report.computed_rows for report in reports])
    return StepSummary(
        step=first.step,
        loss=first.loss,
        balance_loss=first.balance_loss,
        z_loss=first.z_loss,
        grad_norm=first.grad_norm,
        learning_rate=first.learning_rate,
        tokens=first.tokens,
        step_s=max(report.step_s for report in reports),
        expert_imbalance=_imbalance(loads_LE.T),
        owner_imbalance=_imbalance(owned_DL),
        worker_imbalance=_imbalance(computed_DL),
        loads=loads_LE,
        copies=first.copies,
        resharded=first.resharded,
        moved_bytes=_summed([report.moved_bytes for report in reports]),
        link_bytes=_summed([report.link_bytes for report in reports]),
        planning_s=max(report.planning_ns for report in reports) / 1e9,
        exposed_s=max(report.exposed_ns for report in reports) / 1e9,
        experts_s=max(report.experts_ns + report.experts_backward_ns for report in reports) / 1e9,
    )


def _summed(bytes_by_rank: list[dict[str, int]]) -> dict[str, int]:
    kinds = sorted({kind for each in bytes_by_rank for kind in each})
    return {kind: sum(each.get(kind, 0) for each in bytes_by_rank) for kind in kinds}


def _imbalance(rows_NL: np.ndarray) -> float:
    """Max over mean along the first axis, averaged over layers."""
    return float((rows_NL.max(0) / rows_NL.mean(0)).mean())
