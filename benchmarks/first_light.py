"""What the first light costs and brings: FSSDP beside expert parallelism, and the expert cache beside all experts resident.

    python -m raymoe.benchmarks.first_light [--steps 40] [--rounds 2] [--json FILE] [--markdown FILE]

Training: the demo's model and text, two workers, one run an arm and round, arms interleaved, the first quarter of the steps left
out. Serving: the checkpoint that the last training run wrote, one engine an arm and round, the same greedy requests. Tokens are
compared over the serving arms: a budget must not change them.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from raymoe.actors import StepSummary, WorkerGroup, ray_session
from raymoe.commands.demo import demo_config
from raymoe.config import parse_config
from raymoe.inference import Delta, InferenceEngine, SamplingParams
from raymoe.telemetry import run_meta, write_json
from raymoe.training.job import prepare_job, prepare_text

_POLICIES = ("ep", "fssdp", "fssdp-paper")
_BUDGETS = ("100%", "50%", "25%", "one expert")
# gate, up and down of the demo's model in float32
_ONE_EXPERT_BYTES = 3 * 256 * 256 * 4
_REQUESTS, _PROMPT_TOKENS, _ANSWER_TOKENS = 16, 32, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        training, prompts = bench_training(Path(folder), arguments.steps, arguments.rounds)
        serving = bench_serving(Path(folder) / "checkpoint", prompts, arguments.rounds)
    console = Console(width=140)
    for title, rows in (("training", training), ("serving", serving)):
        console.print(_table(title, rows))
    command = f"python -m raymoe.benchmarks.first_light --steps {arguments.steps} --rounds {arguments.rounds}"
    if arguments.json:
        write_json(arguments.json, command, [*training, *serving])
    if arguments.markdown:
        arguments.markdown.write_text(_markdown(command, training, serving), encoding="utf-8")


def bench_training(folder: Path, steps: int, rounds: int) -> tuple[list[dict], list[list[int]]]:
    """A row a policy; the last run's checkpoint is left in `folder`."""
    config = demo_config("stdlib", steps, folder)
    text = prepare_text(config, folder)
    runs: dict[str, list[list[StepSummary]]] = defaultdict(list)
    with ray_session(min_cpus=config.workers, own=True, dashboard=False):
        for _ in range(rounds):
            for policy in _POLICIES:
                arm = parse_config(type(config), config.model_dump(), [f"experts.policy={policy}"])
                with WorkerGroup(prepare_job(arm, folder, text)) as group:
                    group.start()
                    runs[policy].append(list(group.train())[steps // 4 :])
                    group.save(folder / "checkpoint")
    rows = [_training_row(policy, runs[policy], runs["ep"]) for policy in _POLICIES]
    starts = np.linspace(0, len(text.held_out.tokens) - _PROMPT_TOKENS, _REQUESTS).astype(int)
    return rows, [text.held_out.tokens[start : start + _PROMPT_TOKENS].tolist() for start in starts]


def _training_row(policy: str, runs: list[list[StepSummary]], ep: list[list[StepSummary]]) -> dict:
    medians = [statistics.median(step.step_s for step in run) for run in runs]
    speedups = [
        statistics.median(step.step_s for step in theirs) / ours for ours, theirs in zip(medians, ep, strict=True)
    ]
    steps = [step for run in runs for step in run]
    return {
        "policy": policy,
        "workers": 2,
        "step_ms": statistics.median(medians) * 1e3,
        "spread_ms": (max(medians) - min(medians)) * 1e3,
        "tokens_per_s": steps[0].tokens / statistics.median(medians),
        "speedup_over_ep": statistics.median(speedups),
        "imbalance": statistics.mean(step.worker_imbalance for step in steps),
        "expert_imbalance": statistics.mean(step.expert_imbalance for step in steps),
        "expert_bytes_a_step": statistics.mean(
            _moved(step, "sparse_all_gather", "sparse_reduce_scatter") for step in steps
        ),
        "token_bytes_a_step": statistics.mean(_moved(step, "all_to_all") for step in steps),
    }


def _moved(step: StepSummary, *kinds: str) -> int:
    return sum(step.moved_bytes.get(kind, 0) for kind in kinds)


def bench_serving(checkpoint: Path, prompts: list[list[int]], rounds: int) -> list[dict]:
    """A row a budget: all prompts at once, greedy."""
    torch.set_num_threads(1)
    runs: dict[str, list[dict]] = defaultdict(list)
    for _ in range(rounds):
        for budget in _BUDGETS:
            runs[budget].append(_serve_once(checkpoint, budget, prompts))
    reference = runs["100%"][0]["answers"]
    return [
        {
            "arm": "lru",
            "budget": budget,
            "batch": len(prompts),
            "tokens_per_s": statistics.median(run["tokens_per_s"] for run in runs[budget]),
            "share_of_resident": statistics.median(
                run["tokens_per_s"] / full["tokens_per_s"] for run, full in zip(runs[budget], runs["100%"], strict=True)
            ),
            "ttft_ms": statistics.median(run["ttft_ms"] for run in runs[budget]),
            "hit_rate": runs[budget][0]["hit_rate"],
            "bytes_per_token": runs[budget][0]["bytes_per_token"],
            "identical": all(run["answers"] == reference for run in runs[budget]),
        }
        for budget in _BUDGETS
    ]


def _serve_once(checkpoint: Path, budget: str, prompts: list[list[int]]) -> dict:
    with InferenceEngine(checkpoint, expert_memory=_ONE_EXPERT_BYTES if budget == "one expert" else budget) as engine:
        _ask(engine, prompts[:2], 4)
        before = engine.stats()
        started = time.perf_counter()
        answers, first_s = _ask(engine, prompts, _ANSWER_TOKENS)
        wall_s = time.perf_counter() - started
        after = engine.stats()
    tokens = sum(map(len, answers))
    hits, misses = after["hits"] - before["hits"], after["misses"] - before["misses"]
    return {
        "answers": answers,
        "tokens_per_s": tokens / wall_s,
        "ttft_ms": statistics.median(first_s) * 1e3,
        "hit_rate": hits / (hits + misses),
        "bytes_per_token": (after["fetched_bytes"] - before["fetched_bytes"]) / tokens,
    }


def _ask(engine: InferenceEngine, prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], list[float]]:
    """Submits all prompts at once; returns their tokens and their times to the first one."""
    answers: list[list[int]] = [[] for _ in prompts]
    first_s: dict[int, float] = {}
    left = threading.Semaphore(0)
    started = time.perf_counter()

    def receive(number: int, delta: Delta) -> None:
        if delta.tokens:
            first_s.setdefault(number, time.perf_counter() - started)
        answers[number].extend(delta.tokens)
        if delta.finish_reason is not None:
            left.release()

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=())
    for number, prompt in enumerate(prompts):
        engine.submit(prompt, params, lambda delta, number=number: receive(number, delta))
    for _ in prompts:
        left.acquire()
    return answers, list(first_s.values())


def _cell(value: object) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def _table(title: str, rows: list[dict]) -> Table:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def _markdown(command: str, training: list[dict], serving: list[dict]) -> str:
    meta = run_meta(command)
    lines = ["# First light", "", f"`{command}`, {meta['date'][:10]}", ""]
    lines += [
        f"{', '.join(f'{k} {v}' for k, v in meta['host'].items())}; {', '.join(f'{k} {v}' for k, v in meta['versions'].items())}"
    ]
    for title, rows in (("Training", training), ("Serving", serving)):
        lines += ["", f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
        lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
