"""The engine with everything resident beside what transformers offers for the same model on the same machine.

    raymoe bench engines [--batches 1,4,16,32] [--rounds 7] [--tokens 48] [--json F]

Rivals are `generate` on a left-padded static batch, and transformers' own continuous batching with the engine's KV cache: as
many blocks of as many tokens, and as many tokens and requests a step. Each runs with whichever of transformers' experts
implementations, on one thread or on two, is the fastest on this machine for this batch. Every round has prompts of its own,
because a prompt that came before would be read from the KV cache; all prompts are there at once and get equally many tokens,
which is what a static batch is best at. One process, systems in turns; ratios are of rounds that follow each other.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from raymoe.benchmarks.inference import Round, generate
from raymoe.benchmarks.inference_model import training_config
from raymoe.inference import InferenceEngine
from raymoe.inference.batching import PAGE_TOKENS
from raymoe.telemetry import write_json

Row = dict[str, Any]
Prompts = list[list[int]]

EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""transformers' experts implementations that run on a CPU."""
_SHORTEST, _LONGEST = 16, 80
_VOCABULARY = 4096
_MAX_BATCH_TOKENS = 512
_THREADS = 2
"""Of raymoe, which takes fewer where that pays; rivals have what suits them best up to as many."""
_CHOICES, _CHOICE_TOKENS = 2, 12
"""Rounds of each experts implementation before the fastest is taken, and how long they are."""


class _Setting(NamedTuple):
    """What a system runs with."""

    experts: str
    threads: int

    def apply(self, model: PreTrainedModel) -> None:
        torch.set_num_threads(self.threads)
        if self.experts in EXPERTS:
            model.set_experts_implementation(self.experts)


@dataclass
class _System:
    run: Callable[[Prompts, int], Round]
    setting: _Setting = field(default_factory=lambda: _Setting("raymoe", _THREADS))
    rounds: list[Round] = field(default_factory=list)


def run(
    batches: Sequence[int], rounds: int, tokens: int, console: Console, command: str, json: Path | None = None
) -> list[Row]:
    """Measures, prints and writes.

    Args:
        batches: requests at once.
        rounds: timed ones; one more goes before them.
        tokens: generated for each request.
    """
    torch.set_num_threads(_THREADS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder))
        for batch in batches:
            found = _cell(model, batch, rounds, tokens)
            console.print(_table(found, batch))
            rows += found
    if json is not None:
        write_json(json, command, rows)
    return rows


def random_model(folder: Path) -> Path:
    """Saves the model of `bench inference` untrained: what a step takes does not depend on what it says."""
    shape = dict(training_config(folder).model.config or {})
    config = AutoConfig.for_model(shape.pop("model_type"), vocab_size=_VOCABULARY, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    return folder / "model"


def random_prompts(count: int, seed: int) -> Prompts:
    """`count` prompts of 16 to 79 tokens, all of different lengths for up to 64 of them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [_SHORTEST + (number * 37) % (_LONGEST - _SHORTEST) for number in range(count)]
    return [torch.randint(2, _VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def _cell(path: Path, batch: int, rounds: int, tokens: int) -> list[Row]:
    kv_tokens = max(4, batch) * PAGE_TOKENS * ceil((_LONGEST + tokens) / PAGE_TOKENS)
    with ExitStack() as stack:
        engine = stack.enter_context(
            InferenceEngine(
                path,
                expert_memory="100%",
                max_batch_tokens=_MAX_BATCH_TOKENS,
                max_requests=batch,
                kv_tokens=kv_tokens,
            )
        )
        _fetch_all(engine)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
        manager = _continuous_batching(model, batch, kv_tokens, tokens)
        stack.callback(manager.stop, block=True, hard_stop=True)
        systems = {
            "raymoe": _System(lambda asked, tokens: generate(engine, asked, tokens)),
            "generate": _System(lambda asked, tokens: _static(model, asked, tokens)),
            "continuous batching": _System(lambda asked, tokens: _continuous(manager, asked, tokens)),
        }
        seeds = itertools.count()
        for name in ("generate", "continuous batching"):
            systems[name].setting = _fastest(model, systems[name].run, batch, seeds)
        for _ in range(rounds + 1):
            asked = random_prompts(batch, next(seeds))
            for system in systems.values():
                system.setting.apply(model)
                system.rounds.append(system.run(asked, tokens))
        return [_row(name, batch, system, systems["raymoe"]) for name, system in systems.items()]


def _fetch_all(engine: InferenceEngine) -> None:
    cache = engine.cache
    layers, experts = cache.residents().shape
    for layer in range(layers):
        with closing(cache.acquire(layer, range(experts))) as groups:
            for _ in groups:
                pass
    assert cache.resident == cache.num_experts


def _fastest(
    model: PreTrainedModel, run: Callable[[Prompts, int], Round], batch: int, seeds: itertools.count
) -> _Setting:
    """The setting with the highest rate in one of a few rounds."""
    rates: dict[_Setting, float] = {}
    for setting in itertools.starmap(_Setting, itertools.product(EXPERTS, range(1, _THREADS + 1))):
        setting.apply(model)
        rates[setting] = max(
            run(random_prompts(batch, next(seeds)), _CHOICE_TOKENS).tokens_per_s for _ in range(_CHOICES)
        )
    return max(rates, key=lambda setting: rates[setting])


def _continuous_batching(model: PreTrainedModel, batch: int, kv_tokens: int, tokens: int) -> Any:
    """transformers' manager, started, with the KV cache and the limits of the engine beside it."""
    manager = cast(Any, model).init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=tokens),
        ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=ceil(kv_tokens / PAGE_TOKENS),
            max_batch_tokens=_MAX_BATCH_TOKENS,
            max_requests_per_batch=batch,
            auto_switch_to_flash=False,
        ),
    )
    manager.start()
    return manager


def _continuous(manager: Any, asked: Prompts, tokens: int) -> Round:
    began_s = time.perf_counter()
    ids = [manager.add_request(prompt, max_new_tokens=tokens, record_timestamps=True) for prompt in asked]
    outputs = {}
    while len(outputs) < len(ids):
        output = manager.get_result(timeout=60)
        assert output is not None
        assert output.error is None, output.error
        outputs[output.request_id] = output
    wall_s = time.perf_counter() - began_s
    # its clock is the one of perf_counter
    times = [outputs[one].timestamps for one in ids]
    return _round_of(wall_s, [outputs[one].generated_tokens for one in ids], times, began_s)


class _Stamps(BaseStreamer):
    """When each step of `generate` had its tokens; the prompt counts as one."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _static(model: PreTrainedModel, asked: Prompts, tokens: int) -> Round:
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
    stamps = _Stamps()
    began_s = time.perf_counter()
    out = cast(Any, model).generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=stamps,
    )
    wall_s = time.perf_counter() - began_s
    return _round_of(wall_s, out[:, longest:].tolist(), [stamps.times[1:]] * len(asked), began_s)


def _round_of(wall_s: float, tokens: list[list[int]], times: list[list[float]], began_s: float) -> Round:
    gaps = [after - before for each in times for before, after in itertools.pairwise(each)]
    return Round(wall_s, tokens, [each[0] - began_s for each in times], gaps)


def _row(name: str, batch: int, system: _System, ours: _System) -> Row:
    timed, reference = system.rounds[1:], ours.rounds[1:]
    rates = [each.tokens_per_s for each in timed]
    over = [mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in zip(reference, timed, strict=True)]
    same = [mine == theirs for a, b in zip(reference, timed, strict=True)
            for mine, theirs in zip(a.tokens, b.tokens, strict=True)]  # fmt: skip
    return {
        "system": name,
        "batch": batch,
        "experts": system.setting.experts,
        "threads": system.setting.threads,
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_min": min(rates),
        "tokens_per_s_max": max(rates),
        "raymoe_over": statistics.median(over),
        "raymoe_over_min": min(over),
        "raymoe_over_max": max(over),
        "ttft_ms": 1e3 * statistics.median(value for each in timed for value in each.ttft_s),
        "itl_p50_ms": 1e3 * statistics.median(value for each in timed for value in each.itl_s),
        "identical_share": sum(same) / len(same),
    }


def _table(rows: Sequence[Row], batch: int) -> Table:
    table = Table("system", "experts", "threads", "tok/s", "min-max", "raymoe over it", "min-max", "first ms", "p50 ms", "same",
                  title=f"{batch} requests at once, everything resident")  # fmt: skip
    for row in rows:
        table.add_row(
            row["system"], row["experts"], str(row["threads"]), f"{row['tokens_per_s']:.0f}",
            f"{row['tokens_per_s_min']:.0f}-{row['tokens_per_s_max']:.0f}", f"{row['raymoe_over']:.2f}x",
            f"{row['raymoe_over_min']:.2f}-{row['raymoe_over_max']:.2f}", f"{row['ttft_ms']:.0f}",
            f"{row['itl_p50_ms']:.1f}", f"{row['identical_share']:.0%}",
        )  # fmt: skip
    return table
