"""`raymoe train`: text in, a trained Hugging Face directory and a report out."""

import logging
import math
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from raymoe.actors import CHECKPOINT_FOLDER, StepSummary, WorkerGroup, ray_session
from raymoe.commands.progress import TrainingProgress, stage
from raymoe.commands.train_opening import memory_rows, opening_lines, print_opening
from raymoe.commands.train_report import TrainingOutcome, result_meta, step_rows, training_report
from raymoe.commands.train_watch import RunWatch
from raymoe.config import ConfigError, TrainConfig
from raymoe.telemetry import run_meta, write_json, write_report
from raymoe.telemetry.loggers import RunLog, open_loggers
from raymoe.training.checkpoint import latest
from raymoe.training.data.prepare import PreparedData
from raymoe.training.evaluate import EvalResult, baselines, evaluate
from raymoe.training.job import DTYPES, prepare_job, prepare_text
from raymoe.training.profile import trace_path

_EVALUATION_BATCH = 16


def train(
    config: TrainConfig, console: Console, command: str, json_path: Path | None = None, *, must_resume: bool = False
) -> TrainingOutcome:
    """The whole command: trains in a Ray session, evaluates, writes checkpoint, trace and report, prints what came.

    Args:
        must_resume: there is to be a checkpoint to go on from.

    Raises:
        as `run_training`.
    """
    if must_resume:
        _check_resumable(config)
    outcome = run_training(config, console, ray_session(math.ceil(config.workers.max * config.worker_cpus)), command)
    report = training_report(outcome, command)
    path = config.output / "report.html"
    write_report(path, report)
    if json_path is not None:
        write_json(json_path, command, step_rows(outcome.steps), meta=result_meta(outcome))
    for rank in outcome.profiled_ranks:
        console.print(f"profile     {trace_path(outcome.job.folder, rank)}", highlight=False)
    console.print(f"checkpoint  {outcome.checkpoint}\nreport      {path}", highlight=False)
    return outcome


def _check_resumable(config: TrainConfig) -> None:
    folder = config.checkpoint.folder
    if folder is None:
        raise ConfigError("--resume: give 'checkpoint.folder', where the run's checkpoints lie")
    if latest(folder) is None:
        raise ConfigError(f"--resume: no complete checkpoint lies in {folder}")


def run_training(
    config: TrainConfig,
    console: Console,
    session: AbstractContextManager[str],
    command: str = "raymoe train",
) -> TrainingOutcome:
    """Trains and evaluates.

    Args:
        session: a connection to Ray, entered when text and model are ready, so that what is wrong with them is said at once;
            gives the dashboard's URL, or "".

    Raises:
        ValueError: text, model, logger or configuration that cannot be used; names the key, file or row.
        WorkersFailed: the run broke.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("ray").setLevel(logging.ERROR)
    folder = config.output.resolve()
    with open_loggers(config.logs, folder) as log:
        return _run(config, console, session, command, folder, log)


def _run(
    config: TrainConfig, console: Console, session: AbstractContextManager[str], command: str, folder: Path, log: RunLog
) -> TrainingOutcome:
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
    checkpoint = folder / CHECKPOINT_FOLDER
    steps: list[StepSummary] = []
    started_s = time.time()
    with session as dashboard_url, WorkerGroup(job) as group:
        with stage(console, "workers") as say:
            group.start()
            say(f"{len(group.facts)} ExpertWorker actors" + (f"; dashboard {dashboard_url}" if dashboard_url else ""))
        first = group.facts[0].next_step
        if first >= config.steps:
            raise ConfigError(
                f"steps: {job.resumes} has {first} steps done, the run asks for {config.steps}; raise 'steps' to go on, or give "
                "another 'checkpoint.folder' to begin anew"
            )
        chosen = opening_lines(job, text.train_tokens, text.is_complete, group.facts)
        print_opening(console, chosen, memory_rows(job, group.facts))
        # environment variables and options of loggers may hold keys of services
        settings = config.model_dump(mode="json", exclude={"env", "logs"})
        log.start(run_meta(command) | {"config": settings, "next_step": first, "chosen": dict(chosen)})
        with TrainingProgress(console, config.steps, first) as progress:
            watch = RunWatch(job, group, log, progress.say)
            for step in group.train():
                steps.append(step)
                progress.update(step)
                watch.step(step)
                text.check()
            watch.finish(steps[-1].step)
        with stage(console, "saving") as say:
            group.save(checkpoint)
            say(f"Hugging Face directory {checkpoint}")
        memory = memory_rows(job, group.facts, held=[state.state_bytes for state in group.states()])
    with stage(console, "evaluating") as say:
        result = _evaluate(config, checkpoint, text)
        others = baselines(text.train_frequencies(), text.held_out, text.held_out_documents)
        say(f"{result.bits_per_byte:.3f} bits per byte on {result.bytes / 1e3:.0f} kB of held-out text")
    outcome = TrainingOutcome(
        job,
        steps,
        result,
        others,
        checkpoint,
        dashboard_url,
        chosen=chosen,
        memory=memory,
        events=watch.events,
        num_workers=len(group.facts),
        profiled_ranks=[rank for rank in range(len(group.facts)) if _is_fresh(trace_path(folder, rank), started_s)],
    )
    log.end({"loss": steps[-1].loss, "steps": config.steps} | result_meta(outcome))
    return outcome


def _evaluate(config: TrainConfig, checkpoint: Path, text: PreparedData) -> EvalResult:
    """Held-out loss of the checkpoint as plain transformers opens it: what was saved is what is measured."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=DTYPES[config.model.dtype], local_files_only=True)
    if config.model.dtype == "float64":
        # torch's grouped product, which is the default, knows no float64
        model.set_experts_implementation("eager")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # pyright: ignore[reportArgumentType]  (transformers wraps nn.Module.to)
    return evaluate(model, text.held_out, config.data.sequence_length, _EVALUATION_BATCH, torch.device(device))


def _is_fresh(path: Path, since_s: float) -> bool:
    """Whether a file is of this run, not of one before in the same folder."""
    # file systems keep whole seconds at the worst
    return path.is_file() and path.stat().st_mtime >= since_s - 1
