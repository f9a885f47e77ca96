"""What a training run leaves behind, and what its report and its JSON say of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raymoe.actors import StepSummary
from raymoe.telemetry import Event, Number, Report, Score, Table, Timeline, Training, run_meta
from raymoe.telemetry.spans import read_spans
from raymoe.training.evaluate import Baselines, EvalResult
from raymoe.training.job import TrainJob
from raymoe.training.profile import timeline_path, trace_path


@dataclass(frozen=True)
class TrainingOutcome:
    """What a run leaves behind."""

    job: TrainJob
    steps: list[StepSummary]
    """Those of this run: of one that goes on, not those before."""
    evaluation: EvalResult
    baselines: Baselines
    checkpoint: Path
    dashboard_url: str
    chosen: list[tuple[str, str]]
    """What was printed before the first step."""
    memory: list[dict[str, str | float]]
    """MB by worker and part, at the end."""
    events: list[Event]
    num_workers: int
    """At the start."""
    profiled_ranks: list[int]
    """Ranks of which there are traces."""

    @property
    def tokens_per_s(self) -> float:
        """Median over the steps."""
        return float(np.median([step.tokens_per_s for step in self.steps]))

    @property
    def planning_share(self) -> float:
        """Of a step, planning and bookkeeping of the slowest rank: the median over the steps."""
        return float(np.median([step.planning_s / step.step_s for step in self.steps]))

    @property
    def exposed_share(self) -> float:
        """Of a step, waiting for expert parameters and gradients: the median over the steps."""
        return float(np.median([step.exposed_s / step.step_s for step in self.steps]))

    @property
    def below_unigram(self) -> float:
        """How far the model's bits per byte lie below the unigram model's, as a share of them."""
        return 1 - self.evaluation.bits_per_byte / self.baselines.unigram


def scores(outcome: TrainingOutcome) -> list[Score]:
    """Bits per byte on the held-out text, the model first."""
    return [
        Score("raymoe model", outcome.evaluation.bits_per_byte, f"{outcome.below_unigram:.0%} below the unigram model"),
        Score("unigram", outcome.baselines.unigram, "token frequencies of the training text"),
        Score("gzip -9", outcome.baselines.gzip, "on the held-out text alone"),
        Score("xz -9e", outcome.baselines.xz, "on the held-out text alone"),
    ]


def training_report(outcome: TrainingOutcome, command: str, title: str = "raymoe train") -> Report:
    """The report of a training run; serving may be laid on top with `dataclasses.replace`."""
    steps, job = outcome.steps, outcome.job
    config = job.config
    return Report(
        title=title,
        subtitle=f"{job.total_parameters / 1e6:.1f} M parameters, {job.num_layers} layers x {job.num_experts} experts, "
        f"{outcome.num_workers} workers, {config.experts.policy}",
        summary=_summary(outcome),
        training=Training(
            step=[step.step for step in steps],
            loss=[step.loss for step in steps],
            tokens_per_s=[step.tokens_per_s for step in steps],
            step_s=[step.step_s for step in steps],
            expert_imbalance=[step.expert_imbalance for step in steps],
            owner_imbalance=[step.owner_imbalance for step in steps],
            device_imbalance=[step.worker_imbalance for step in steps],
            exposed_s=[step.exposed_s for step in steps],
            planning_s=[step.planning_s for step in steps],
        ),
        events=outcome.events,
        timeline=_timeline(outcome),
        loads=np.sum([step.loads for step in steps], axis=0),
        evaluation=scores(outcome),
        tables=[
            Table("What was chosen", [{"": name, "and why": said} for name, said in outcome.chosen]),
            Table("Bytes moved between workers", _bytes("kind", [step.moved_bytes for step in steps])),
            Table("The same by link", _bytes("link", [step.link_bytes for step in steps])),
            Table("Memory, MB", outcome.memory, "Parameters, gradients, optimizer and copies of experts, at the end."),
        ],
        meta=run_meta(command) | {"text": config.data.source, "seed": config.seed},
    )


def step_rows(steps: Sequence[StepSummary]) -> list[dict]:
    """A row a step, as `--json` writes them; times in ms."""
    return [
        {
            "step": step.step,
            "loss": step.loss,
            "tokens_per_s": step.tokens_per_s,
            "step_ms": step.step_s * 1e3,
            "expert_imbalance": step.expert_imbalance,
            "owner_imbalance": step.owner_imbalance,
            "imbalance": step.worker_imbalance,
            "copies": step.copies,
            "resharded": step.resharded,
            "bytes": sum(step.moved_bytes.values()),
            "experts_ms": step.experts_s * 1e3,
            "exposed_ms": step.exposed_s * 1e3,
            "plan_ms": step.planning_s * 1e3,
            "grad_norm": step.grad_norm,
            "lr": step.learning_rate,
        }
        for step in steps
    ]


def result_meta(outcome: TrainingOutcome) -> dict:
    """What `--json` says of the run as a whole."""
    return {
        "parameters": outcome.job.total_parameters,
        "expert_parameters": outcome.job.expert_parameters,
        "workers": outcome.num_workers,
        "policy": outcome.job.config.experts.policy,
        "seed": outcome.job.config.seed,
        "tokens_per_s": outcome.tokens_per_s,
        "plan_share": outcome.planning_share,
        "exposed_share": outcome.exposed_share,
        "memory_mb": outcome.memory,
        "events": [{"step": event.step, "name": event.name, "text": event.text} for event in outcome.events],
        "bits_per_byte": {score.name: score.bits_per_byte for score in scores(outcome)},
        "below_unigram": outcome.below_unigram,
    }


def _summary(outcome: TrainingOutcome) -> list[Number]:
    steps, evaluation = outcome.steps, outcome.evaluation
    most = max(float(row["total"]) for row in outcome.memory)
    return [
        Number("bits per byte", f"{evaluation.bits_per_byte:.3f}", f"unigram {outcome.baselines.unigram:.3f}"),
        Number("loss", f"{steps[-1].loss:.3f}", "nats a token, last step"),
        Number("training", f"{outcome.tokens_per_s:,.0f} tokens/s", "median over steps"),
        Number("expert imbalance", f"{_mean(steps, 'expert_imbalance'):.2f}", "busiest expert / mean, mean over steps"),
        Number(
            "worker imbalance",
            f"{_mean(steps, 'worker_imbalance'):.2f}",
            f"busiest / mean; {_mean(steps, 'owner_imbalance'):.2f} had every row gone to its owner",
        ),
        Number("waiting for experts", f"{outcome.exposed_share:.1%}", "of a step, on the rank that waits longest"),
        Number("planning", f"{outcome.planning_share:.2%}", "of a step, on the slowest rank"),
        Number("memory", f"{most:,.1f} MB", "parameters, gradients, optimizer and copies of the fullest worker"),
    ]


def _timeline(outcome: TrainingOutcome) -> Timeline | None:
    if not outcome.profiled_ranks:
        return None
    rank, folder = outcome.profiled_ranks[0], outcome.job.folder
    traces = ", ".join(trace_path(folder, each).name for each in outcome.profiled_ranks)
    path = timeline_path(folder, rank)
    spans = read_spans(path) if path.is_file() else []
    note = (
        f"Rank {rank}, its last traced step; numbers are MoE layers, a transfer's bar reaches to where it was waited for, and gaps "
        f"are what has no experts: embedding, loss, optimizer. "
        f"Traces for Perfetto or chrome://tracing, in the folder {path.parent.name} of the run: {traces}."
    )
    return Timeline(spans, note)


def _bytes(name: str, by_step: list[dict[str, int]]) -> list[dict]:
    """Sent by all workers: a row a kind or link."""
    total = {
        key: sum(each.get(key, 0) for each in by_step) for key in sorted({key for each in by_step for key in each})
    }
    return [
        {name: key, "MB a step": amount / len(by_step) / 1e6, "MB in all": amount / 1e6}
        for key, amount in total.items()
    ]


def _mean(steps: Sequence[StepSummary], name: str) -> float:
    return float(np.mean([getattr(step, name) for step in steps]))
