"""`raymoe train`: text in, a trained Hugging Face directory and a report out."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from raymoe.actors import StepSummary, WorkerGroup, ray_session
from raymoe.commands.progress import TrainingProgress, stage
from raymoe.config import TrainConfig
from raymoe.telemetry import Number, Report, Score, Table, Training, run_meta, write_json, write_report
from raymoe.training.evaluate import Baselines, EvalResult, baselines, evaluate
from raymoe.training.data.prepare import PreparedData
from raymoe.training.job import DTYPES, TrainJob, prepare_job, prepare_text

_EVALUATION_BATCH = 16


@dataclass(frozen=True)
class TrainingOutcome:
    """What a run leaves behind."""

    job: TrainJob
    steps: list[StepSummary]
    evaluation: EvalResult
    baselines: Baselines
    checkpoint: Path
    dashboard_url: str

    @property
    def tokens_per_s(self) -> float:
        """Median over the steps."""
        return float(np.median([step.tokens_per_s for step in self.steps]))

    @property
    def below_unigram(self) -> float:
        """How far the model's bits per byte lie below the unigram model's, as a share of them."""
        return 1 - self.evaluation.bits_per_byte / self.baselines.unigram


def train(config: TrainConfig, console: Console, command: str, json_path: Path | None = None) -> TrainingOutcome:
    """The whole command: trains in a Ray session, evaluates, writes checkpoint, trace and report, prints what came."""
    with ray_session(math.ceil(config.workers * config.worker_cpus)) as dashboard_url:
        outcome = run_training(config, console, dashboard_url)
    report = training_report(outcome, command)
    path = config.output / "report.html"
    write_report(path, report)
    if json_path is not None:
        write_json(json_path, command, step_rows(outcome.steps), meta=result_meta(outcome))
    console.print(f"checkpoint  {outcome.checkpoint}\nreport      {path}")
    return outcome


def run_training(config: TrainConfig, console: Console, dashboard_url: str = "") -> TrainingOutcome:
    """Trains and evaluates inside a Ray session that is up already.

    Raises:
        ValueError: text, model or configuration that cannot be used; names the key, file or row.
        WorkersFailed: the run broke.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("ray").setLevel(logging.ERROR)
    folder = config.output.resolve()
    with stage(console, "text") as say:
        text = prepare_text(config, folder)
        so_far = "" if text.is_complete else " so far"
        say(
            f"{text.train_bytes / 1e6:.1f} MB to train on{so_far}, {text.held_out.num_bytes / 1e6:.2f} MB held out; "
            f"{text.train_tokens / 1e6:.2f} M tokens of {len(text.tokenizer)} kinds"
        )
    with stage(console, "model") as say:
        job = prepare_job(config, folder, text)
        say(
            f"{job.total_parameters / 1e6:.1f} M parameters, {job.expert_parameters / 1e6:.1f} M of them in "
            f"{job.num_layers} x {job.num_experts} experts"
        )
    checkpoint = folder / "checkpoint"
    steps: list[StepSummary] = []
    with WorkerGroup(job) as group:
        with stage(console, "workers") as say:
            group.start()
            say(f"{config.workers} ExpertWorker actors" + (f"; dashboard {dashboard_url}" if dashboard_url else ""))
        with TrainingProgress(console, config.steps) as progress:
            for step in group.train():
                steps.append(step)
                progress.update(step)
                text.check()
        with stage(console, "saving") as say:
            group.save(checkpoint)
            say(f"Hugging Face directory {checkpoint}")
    with stage(console, "evaluating") as say:
        result = _evaluate(config, checkpoint, text)
        others = baselines(text.train_frequencies(), text.held_out, text.held_out_documents)
        say(f"{result.bits_per_byte:.3f} bits per byte on {result.bytes / 1e3:.0f} kB of held-out text")
    return TrainingOutcome(job, steps, result, others, checkpoint, dashboard_url)


def _evaluate(config: TrainConfig, checkpoint: Path, text: PreparedData) -> EvalResult:
    """Held-out loss of the checkpoint as plain transformers opens it: what was saved is what is measured."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=DTYPES[config.model.dtype], local_files_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # pyright: ignore[reportArgumentType]  (transformers wraps nn.Module.to)
    return evaluate(model, text.held_out, config.data.sequence_length, _EVALUATION_BATCH, torch.device(device))


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
    last = steps[-1]
    moved = {kind: sum(step.moved_bytes.get(kind, 0) for step in steps) for kind in sorted(last.moved_bytes)}
    return Report(
        title=title,
        subtitle=f"{job.total_parameters / 1e6:.1f} M parameters, {job.num_layers} layers x {job.num_experts} experts, "
        f"{config.workers} workers, {config.experts.policy}",
        summary=[
            Number(
                "bits per byte", f"{outcome.evaluation.bits_per_byte:.3f}", f"unigram {outcome.baselines.unigram:.3f}"
            ),
            Number("loss", f"{last.loss:.3f}", "nats a token, last step"),
            Number("training", f"{outcome.tokens_per_s:,.0f} tokens/s", "median over steps"),
            Number(
                "expert imbalance", f"{_mean(steps, 'expert_imbalance'):.2f}", "busiest expert / mean, mean over steps"
            ),
            Number(
                "worker imbalance",
                f"{_mean(steps, 'worker_imbalance'):.2f}",
                f"busiest / mean; {_mean(steps, 'owner_imbalance'):.2f} had every row gone to its owner",
            ),
        ],
        training=Training(
            step=[step.step for step in steps],
            loss=[step.loss for step in steps],
            tokens_per_s=[step.tokens_per_s for step in steps],
            step_s=[step.step_s for step in steps],
            expert_imbalance=[step.expert_imbalance for step in steps],
            owner_imbalance=[step.owner_imbalance for step in steps],
            device_imbalance=[step.worker_imbalance for step in steps],
        ),
        loads=np.sum([step.loads for step in steps], axis=0),
        evaluation=scores(outcome),
        tables=[
            Table(
                "Bytes moved between workers",
                [
                    {"kind": kind, "MB a step": amount / len(steps) / 1e6, "MB in all": amount / 1e6}
                    for kind, amount in moved.items()
                ],
            )
        ],
        meta=run_meta(command) | {"text": config.data.source, "seed": config.seed},
    )


def step_rows(steps: list[StepSummary]) -> list[dict]:
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
            "bytes": sum(step.moved_bytes.values()),
        }
        for step in steps
    ]


def result_meta(outcome: TrainingOutcome) -> dict:
    """What `--json` says of the run as a whole."""
    return {
        "parameters": outcome.job.total_parameters,
        "expert_parameters": outcome.job.expert_parameters,
        "workers": outcome.job.config.workers,
        "policy": outcome.job.config.experts.policy,
        "seed": outcome.job.config.seed,
        "tokens_per_s": outcome.tokens_per_s,
        "bits_per_byte": {score.name: score.bits_per_byte for score in scores(outcome)},
        "below_unigram": outcome.below_unigram,
    }


def _mean(steps: list[StepSummary], name: str) -> float:
    return float(np.mean([getattr(step, name) for step in steps]))
