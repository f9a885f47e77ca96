"""Follows a training run from the driver: what each step says, and what happens besides steps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raymoe.actors import StepSummary, WorkerGroup
from raymoe.commands.train_opening import waits_for_costs
from raymoe.telemetry import Event
from raymoe.telemetry.loggers import RunLog
from raymoe.training.checkpoint_folder import complete
from raymoe.training.job import TrainJob
from raymoe.training.publication import Publication

_POLL_S = 1.0
_SETTLED_STEPS = 5
"""Steps whose mean number of copies is told after costs were published."""


def step_values(step: StepSummary) -> dict[str, float]:
    """A step as loggers take it."""
    named = {
        "train/loss": step.loss,
        "train/balance_loss": step.balance_loss,
        "train/z_loss": step.z_loss,
        "train/grad_norm": step.grad_norm,
        "train/lr": step.learning_rate,
        "perf/tokens_per_s": step.tokens_per_s,
        "perf/step_ms": step.step_s * 1e3,
        "perf/experts_ms": step.experts_s * 1e3,
        "perf/exposed_ms": step.exposed_s * 1e3,
        "perf/planning_ms": step.planning_s * 1e3,
        "experts/expert_imbalance": step.expert_imbalance,
        "experts/owner_imbalance": step.owner_imbalance,
        "experts/worker_imbalance": step.worker_imbalance,
        "experts/copies": step.copies,
        "experts/resharded": step.resharded,
    }
    named |= {f"bytes/{kind}": amount for kind, amount in step.moved_bytes.items()}
    named |= {f"bytes_by_link/{link}": amount for link, amount in step.link_bytes.items()}
    return {name: float(value) for name, value in named.items()}


class RunWatch:
    """Told of every step, it finds what happened besides, says it, logs it, and keeps it for the report.

    Args:
        say: takes a line for the person who watches.
    """

    def __init__(self, job: TrainJob, group: WorkerGroup, log: RunLog, say: Callable[[str], None]):
        self._job, self._group, self._log, self._say = job, group, log, say
        self.events: list[Event] = []
        """In the order in which they were seen."""
        self.saved_steps: list[int] = []
        """Steps done at each checkpoint that was seen complete."""
        first = group.facts[0]
        self._asks_for_costs = waits_for_costs(job, first.publication)
        self._copies: list[int] | None = None
        self._known_events = 0
        self._next_poll_s = 0.0
        folder = job.config.checkpoint.folder
        self._checkpoints = folder
        self._seen = set(complete(folder)) if folder is not None else set()
        if job.resumes is not None:
            self._happened(first.next_step, "resumed", f"from {job.resumes.name}", {"checkpoint": str(job.resumes)}, "")

    def step(self, step: StepSummary) -> None:
        """A step is done."""
        self._log.step(step.step, step_values(step))
        if step.resharded:
            text = f"{step.resharded} experts changed their workers"
            self._happened(step.step, "re-sharded", text, {"experts": step.resharded}, f"re-sharding {text}")
        self._count_copies(step)
        for event in self._group.events[self._known_events :]:
            self._known_events += 1
            fields = {"at_s": event.time_s, **event.values}
            self._happened(event.step, event.kind, event.text, fields, f"{event.kind:<11} {event.text}")
        if time.monotonic() >= self._next_poll_s:
            self._next_poll_s = time.monotonic() + _POLL_S
            self._look(step.step)

    def finish(self, last_step: int) -> None:
        """All steps are done and all checkpoints written."""
        self._look(last_step)

    def _look(self, step: int) -> None:
        if self._asks_for_costs:
            published = self._group.publication()
            if published is not None and published.is_measured:
                self._asks_for_costs, self._copies = False, []
                self._measured(step, published)
        if self._checkpoints is not None:
            found = complete(self._checkpoints)
            for done in sorted(found.keys() - self._seen):
                self._saved(done, found[done])
            self._seen |= found.keys()

    def _measured(self, step: int, published: Publication) -> None:
        cluster, workload = published.cluster, published.workload
        row_us = workload.row_flops / cluster.flops_s * 1e6
        latency_us = max(cluster.latency_ns, cluster.inter_latency_ns) / 1e3
        between = "" if cluster.num_nodes == 1 else f", {cluster.inter_bytes_s / 1e6:,.0f} MB/s between nodes"
        text = (
            f"{cluster.intra_bytes_s / 1e6:,.0f} MB/s within a node{between}, {latency_us:,.0f} us a message, "
            f"{cluster.overlap_percent} % of a transfer beside computation; attention {workload.attention_ns / 1e6:.2f} ms a "
            f"layer, a routed row {row_us:.2f} us"
        )
        fields = {
            "intra_bytes_s": cluster.intra_bytes_s,
            "inter_bytes_s": cluster.inter_bytes_s,
            "latency_ns": cluster.latency_ns,
            "overlap_percent": cluster.overlap_percent,
            "attention_ns": workload.attention_ns,
            "row_us": row_us,
        }
        self._happened(step, "measured", text, fields, f"measured    {text}")

    def _count_copies(self, step: StepSummary) -> None:
        """Says once what the published costs come to."""
        if self._copies is None:
            return
        self._copies.append(step.copies)
        if len(self._copies) == _SETTLED_STEPS or step.step == self._job.config.steps - 1:
            others = len(self._group.facts) - 1
            a_layer = float(np.mean(self._copies)) / self._job.num_layers
            text = (
                f"t = {a_layer / others:.1f} of {self._job.num_experts} experts a layer on all workers "
                f"({a_layer:.1f} copies; mean of {len(self._copies)} steps)"
            )
            self._happened(step.step, "settled", text, {"copies_a_layer": a_layer}, f"settled     {text}")
            self._copies = None

    def _saved(self, done: int, path: Path) -> None:
        self.saved_steps.append(done)
        text = f"checkpoint after {done} steps: {path}"
        self._happened(done - 1, "checkpoint", path.name, {"steps": done, "path": str(path)}, f"saved       {text}")

    def _happened(self, step: int, name: str, text: str, fields: dict[str, Any], line: str) -> None:
        self.events.append(Event(step, name, text))
        self._log.event(step, name, fields)
        if line:
            self._say(line)
