"""The reports of all ranks, step by step, and what the controller publishes because of them."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from raymoe.actors.orders import WorkerFacts
from raymoe.actors.step_summary import StepSummary, summarise
from raymoe.placement import ClusterSpec
from raymoe.telemetry import metrics
from raymoe.training.job import TrainJob
from raymoe.training.link_probe import LinkMeasurement
from raymoe.training.publication import Publication
from raymoe.training.report import StepReport
from raymoe.training.snapshot import snapshot_interval

logger = logging.getLogger("raymoe")

_MEASURED_STEPS = 4
_UNMEASURED_STEPS = 2  # the first steps allocate and warm up
_SNAPSHOTS = 2
_KEPT_STEPS = 4096  # a driver asks several times a second


class StepBook:
    """Takes reports and makes summaries of them; says what to publish when steps have shown it. Safe to use from several threads.

    Args:
        on_first_step: told of the first step that an epoch has done.
    """

    def __init__(self, job: TrainJob, on_first_step: Callable[[int], None]):
        self._job, self._on_first_step = job, on_first_step
        self.publication: Publication | None = None
        """The last one; the next has a higher version."""
        self.next_step = 0
        """The first step that not all ranks have reported."""
        self._summaries: deque[StepSummary] = deque(maxlen=_KEPT_STEPS)
        self._links: LinkMeasurement | None = None
        self._lock = threading.Lock()
        self._is_catching_up = False
        self._begin(0, [])

    def begin_epoch(self, epoch: int, facts: list[WorkerFacts], *, is_under_way: bool = False) -> None:
        """An epoch has been formed; reports of earlier ones no longer count.

        Steps that it does not repeat were done by all ranks, also where a rank died before it could say so: they are summed up
        from the reports of the others.

        Args:
            is_under_way: steps were done in it before; nothing is told of any until `catch_up`.
        """
        with self._lock:
            for step in range(self.next_step, facts[0].next_step):
                if reports := self._reports.get(step):
                    self._tell(reports)
            self.publication = facts[0].publication
            self._begin(epoch, facts)
            self._num_steps, self._is_catching_up = int(is_under_way), is_under_way
            self._links = facts[0].links or self._links
            # steps that are done again are not told again
            self.next_step = max(self.next_step, facts[0].next_step)

    def catch_up(self, told: dict[int, list[StepReport]]) -> None:
        """What the ranks of the epoch have to say of the steps that nobody here has seen, as far back as they keep it, before what
        they have said meanwhile.

        Args:
            told: by rank. Those who do not answer are dead; they were in every step that the others have done.
        """
        with self._lock:
            for rank, reports in told.items():
                for report in reports:
                    self._reports.setdefault(report.step, {})[rank] = report
            whole = [step for step in sorted(self._reports) if self._reports[step].keys() >= told.keys()]
            for step in whole:
                self._tell(self._reports[step])
            if whole:
                self._reports = {step: reports for step, reports in self._reports.items() if step > whole[-1]}
            self._is_catching_up = False

    def report(self, rank: int, epoch: int, report: StepReport) -> Publication | None:
        """One rank's account of one step. Returns what is to be published because of it."""
        with self._lock:
            return self._report(rank, epoch, report)

    def summaries(self, known: int) -> list[StepSummary]:
        """Of the steps from `known` on, as far back as they are kept."""
        return [summary for summary in list(self._summaries) if summary.step >= known]

    def next_publication(self, **changes: object) -> Publication:
        """The last publication with other fields, under the next version."""
        assert self.publication is not None, "an epoch comes first"
        self.publication = replace(self.publication, version=self.publication.version + 1, **changes)
        return self.publication

    def _report(self, rank: int, epoch: int, report: StepReport) -> Publication | None:
        if epoch != self._epoch:
            return None
        reports = self._reports.setdefault(report.step, {})
        reports[rank] = report
        if self._is_catching_up or len(reports) < len(self._facts):
            return None
        del self._reports[report.step]
        self._num_steps += 1
        if self._num_steps == 1:
            self._on_first_step(report.step)
        if report.step >= self.next_step:
            for step in range(self.next_step, report.step):
                # all ranks have done it; what one of them had to say got lost on the way
                if others := self._reports.pop(step, None):
                    self._tell(others)
            self._tell(reports)
        return self._settle(list(reports.values()))

    def _tell(self, reports: dict[int, StepReport]) -> None:
        summary = summarise(list(reports.values()), self._facts[0].owners, len(self._facts))
        self._summaries.append(summary)
        self.next_step = summary.step + 1
        metrics.TRAIN_EXPERT_IMBALANCE_RATIO.set(summary.worker_imbalance)

    def _begin(self, epoch: int, facts: list[WorkerFacts]) -> None:
        self._epoch, self._facts, self._num_steps = epoch, facts, 0
        self._reports: dict[int, dict[int, StepReport]] = {}
        self._attention_ns: list[int] = []
        self._row_ns: list[float] = []
        self._step_s: list[float] = []
        self._snapshots: list[tuple[float, int]] = []

    def _settle(self, reports: list[StepReport]) -> Publication | None:
        """What the cost model and the snapshots need, once steps have been seen working."""
        changes = self._costs(reports) | self._interval(reports)
        return self.next_publication(**changes) if changes else None

    def _costs(self, reports: list[StepReport]) -> dict[str, object]:
        last = self.publication
        assert last is not None, "an epoch comes first"
        if last.is_measured or self._links is None or len(reports) < 2 or self._job.config.experts.cluster is not None:
            return {}
        if self._num_steps > _UNMEASURED_STEPS:
            self._attention_ns.append(min(each.attention_ns for each in reports))
            # over all ranks together: one that owns none of the hot experts has hardly a row to be timed by
            rows = sum(int(each.computed_rows.sum()) for each in reports)
            self._row_ns.append(sum(each.experts_ns for each in reports) / max(rows, 1))
        if len(self._attention_ns) < _MEASURED_STEPS:
            return {}
        attention_ns, row_ns = int(np.median(self._attention_ns)), float(np.median(self._row_ns))
        flops_s = int(self._job.workload.row_flops * 1e9 / max(row_ns, 1e-3))
        cluster = measured_cluster(self._facts[0].nodes, self._links, flops_s)
        workload = replace(last.workload, attention_ns=attention_ns)
        logger.info("measured: attention %.1f ms, a routed row %.1f us, %.0f MB/s and %.0f us between workers, overlap %d %%",
                    attention_ns / 1e6, row_ns / 1e3, cluster.inter_bytes_s / 1e6, cluster.latency_ns / 1e3,
                    cluster.overlap_percent)  # fmt: skip
        slots = self._job.extra_slots(len(reports))
        return {"cluster": cluster, "workload": workload, "extra_slots": slots, "is_measured": True}

    def _interval(self, reports: list[StepReport]) -> dict[str, object]:
        """How often to take a snapshot, once two have been seen: the first allocates."""
        if self._job.config.snapshots.every != "auto" or len(self._snapshots) >= _SNAPSHOTS or self._links is None:
            return {}
        self._step_s.append(max(each.step_s for each in reports))
        taken = [each for each in reports if each.snapshot_s]
        if taken:
            self._snapshots.append(
                (max(each.snapshot_s for each in taken), max(each.snapshot_sent_bytes for each in taken))
            )
        if len(self._snapshots) < _SNAPSHOTS:
            return {}
        take_s, sent_bytes = self._snapshots[-1]
        links = self._links
        every = snapshot_interval(
            take_s, sent_bytes, links.inter_bytes_s or links.intra_bytes_s or 1, links.overlap_percent,
            float(np.median(self._step_s)), self._job.config.snapshots.share,
        )  # fmt: skip
        return {"snapshot_every": every}


def measured_cluster(nodes: tuple[int, ...], links: LinkMeasurement, flops_s: int) -> ClusterSpec:
    """The ranks' nodes, and their links as all of them measured them together."""
    near = links.intra_bytes_s or links.inter_bytes_s
    assert near is not None, "a single worker has no links and is not asked"
    return ClusterSpec(
        nodes,
        near,
        links.inter_bytes_s or near,
        latency_ns=links.latency_ns or links.inter_latency_ns or 0,
        inter_latency_ns=links.inter_latency_ns or 0,
        flops_s=max(flops_s, 1),
        nic_shared=links.is_nic_shared,
        full_duplex=links.is_full_duplex,
        overlap_percent=links.overlap_percent,
    )
