"""One step over all ranks, made of what each of them reported."""

import time
from dataclasses import dataclass

import numpy as np

from raymoe.training.report import StepReport


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
    workers: int
    """That took part."""
    at_s: float
    """Seconds since 1970 when all ranks had reported it."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


def summarise(reports: list[StepReport], owners: np.ndarray, size: int) -> StepSummary:
    """One step's reports as one: of all `size` ranks, or of those that lived to tell. owners int64 [L, E]."""
    first = reports[0]
    loads_LE = np.sum([report.loads for report in reports], axis=0)
    owned_DL = np.stack([(loads_LE * (owners == rank)).sum(1) for rank in range(size)])
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
        workers=size,
        at_s=time.time(),
    )


def _summed(bytes_by_rank: list[dict[str, int]]) -> dict[str, int]:
    kinds = sorted({kind for each in bytes_by_rank for kind in each})
    return {kind: sum(each.get(kind, 0) for each in bytes_by_rank) for kind in kinds}


def _imbalance(rows_NL: np.ndarray) -> float:
    """Max over mean along the first axis, averaged over layers."""
    return float((rows_NL.max(0) / rows_NL.mean(0)).mean())
