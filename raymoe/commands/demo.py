"""`raymoe demo`: the whole way in one command, on real text and real actors."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raymoe.actors import ray_session
from raymoe.commands.client import Completion, complete, get_json
from raymoe.commands.progress import stage
from raymoe.commands.serve import describe_engine
from raymoe.commands.train import run_training
from raymoe.commands.train_report import TrainingOutcome, result_meta, scores, step_rows, training_report
from raymoe.config import ServeConfig, TrainConfig, parse_config
from raymoe.serving.run import serving
from raymoe.telemetry import Answer, Number, Serving, write_json, write_report

_MODEL = {
    "model_type": "olmoe",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 24,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "router_aux_loss_coef": 0.02,
    "initializer_range": 0.05,
}
_EXPERT_MEMORY = "50%"
_ANSWER_TOKENS = 48
_PROMPTS = (
    "def __init__(self",
    "import os\nimport sys\n",
    "class Error(Exception):\n",
    "    Return the ",
    "    def close(self):\n",
    "for key, value in ",
    "The value of ",
    "    if not isinstance(",
)


@dataclass(frozen=True)
class ServingOutcome:
    answers: list[Completion]
    wall_s: float
    engine: dict
    """The engine's status after the answers, with the history of its cache."""

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.num_tokens for answer in self.answers) / self.wall_s


def demo_config(data: str, steps: int, output: Path) -> TrainConfig:
    """The demo's training configuration: minutes on two cores."""
    return parse_config(
        TrainConfig,
        {
            "model": {"config": _MODEL},
            "data": {"source": data, "sequence_length": 128, "held_out": 0.05},
            "tokenizer": {"vocab_size": 4096},
            "workers": 2,
            "batch": 8,
            "steps": steps,
            "optimizer": {"lr": 3e-3, "betas": (0.9, 0.98), "warmup_steps": min(20, steps)},
            "output": output,
        },
    )


def run_demo(data: str, steps: int, output: Path, console: Console, command: str, json_path: Path | None) -> None:
    """Trains, evaluates, saves, serves, asks, reports; one Ray cluster of its own for all of it."""
    config = demo_config(data, steps, output)
    # Serve's proxy, gateway and engine share the cores once the workers are gone
    with ray_session(min_cpus=4, own=True) as dashboard_url:
        training = run_training(config, console, nullcontext(dashboard_url), command)
        served = _serve_and_ask(training.checkpoint, console)
    _print_evaluation(training, console)
    report_path = output / "report.html"
    report = training_report(training, command, "raymoe demo")
    write_report(
        report_path,
        replace(report, serving=_serving_part(served), summary=[*report.summary, *_serving_numbers(served)]),
    )
    if json_path is not None:
        write_json(
            json_path, command, step_rows(training.steps), result_meta(training) | {"serving": serving_row(served)}
        )
    console.print(f"checkpoint  {training.checkpoint}\nreport      {report_path.resolve()}", highlight=False)


def _serve_and_ask(checkpoint: Path, console: Console) -> ServingOutcome:
    config = ServeConfig(model=checkpoint, name="demo", expert_memory=_EXPERT_MEMORY, port=0)
    with ExitStack() as stack:
        with stage(console, "serving") as say:
            url = stack.enter_context(serving(config))
            say(f"{url}/v1/completions")
        console.print(describe_engine(get_json(f"{url}/v1/raymoe/status")["engines"][0]), highlight=False)
        return _ask(url, console)


def _ask(url: str, console: Console) -> ServingOutcome:
    """All prompts at once, each a client of its own; the first one's answer is shown as it streams."""

    def ask(number: int) -> Completion:
        show = (lambda text: console.print(Text(text), end="")) if number == 0 else None
        return complete(
            url, "demo", _PROMPTS[number], _ANSWER_TOKENS, on_text=show, temperature=0.7, top_p=0.9, seed=number
        )

    console.print(
        f"\n[bold]asking[/bold]      {len(_PROMPTS)} clients at once; the first one's answer as it streams:\n"
    )
    console.print(Text(_PROMPTS[0], style="bold"), end="")
    started = time.perf_counter()
    with ThreadPoolExecutor(len(_PROMPTS)) as clients:
        answers = list(clients.map(ask, range(len(_PROMPTS))))
    wall_s = time.perf_counter() - started
    console.print("\n")
    engine = get_json(f"{url}/v1/raymoe/status?history=true")["engines"][0]
    outcome = ServingOutcome(answers, wall_s, engine)
    table = Table("prompt", "answer", "tokens", "first token", "tokens/s")
    for answer in answers:
        table.add_row(
            Text(_one_line(answer.prompt, 24)),
            Text(_one_line(answer.text, 44)),
            str(answer.num_tokens),
            f"{answer.ttft_s * 1e3:.0f} ms",
            f"{answer.tokens_per_s:.0f}",
        )
    console.print(table)
    row = serving_row(outcome)
    console.print(
        f"all together {row['tokens_per_s']:.0f} tokens/s; median first token {row['ttft_ms']:.0f} ms; "
        f"expert cache hit rate {row['hit_rate']:.1%} with {_EXPERT_MEMORY} of the experts in memory",
        highlight=False,
    )
    return outcome


def serving_row(outcome: ServingOutcome) -> dict:
    """What `--json` says of the serving part; times in ms."""
    ttft_ms = sorted(answer.ttft_s * 1e3 for answer in outcome.answers)
    return {
        "clients": len(outcome.answers),
        "tokens_per_s": outcome.tokens_per_s,
        "ttft_ms": ttft_ms[len(ttft_ms) // 2],
        "hit_rate": outcome.engine["hit_rate"],
        "fetched_bytes": outcome.engine["fetched_bytes"],
        "budget": _EXPERT_MEMORY,
    }


def _serving_numbers(outcome: ServingOutcome) -> list[Number]:
    row = serving_row(outcome)
    return [
        Number("serving", f"{row['tokens_per_s']:.0f} tokens/s", f"{row['clients']} clients at once"),
        Number("first token", f"{row['ttft_ms']:.0f} ms", "median"),
        Number("cache hits", f"{row['hit_rate']:.1%}", f"{_EXPERT_MEMORY} of the experts in memory"),
    ]


def _serving_part(outcome: ServingOutcome) -> Serving:
    history = outcome.engine["history"]
    return Serving(
        answers=[
            Answer(answer.prompt, answer.text, answer.ttft_s, answer.tokens_per_s, answer.num_tokens)
            for answer in outcome.answers
        ],
        step=[window["start_s"] for window in history],
        hits=[window["hits"] for window in history],
        misses=[window["misses"] for window in history],
        unit="second",
    )


def _print_evaluation(training: TrainingOutcome, console: Console) -> None:
    table = Table("held-out text", "bits per byte", "")
    for score in scores(training):
        table.add_row(score.name, f"{score.bits_per_byte:.3f}", score.note)
    console.print(table)


def _one_line(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."
