"""`raymoe generate`: answers to a file of inputs, in static batches through the expert cache."""

from __future__ import annotations

import json as jsonlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from raymoe.commands.progress import counted, stage
from raymoe.inference.engine import DEFAULT_PREDICTORS
from raymoe.inference.static_engine import Answer, StaticEngine, StaticInput
from raymoe.inference.text import CONTEXT_TOKENS, TextStream, decoder
from raymoe.telemetry import write_json
from raymoe.training.data.files import JSONL_SUFFIXES, PARQUET_SUFFIXES, SourceFile, SourceFiles, find_files, read_rows
from raymoe.training.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn; None: as the model's own generation_config.json says."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    """0: greedy."""
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    """Of the first input; each further one has the next."""

    def config(self) -> GenerationConfig:
        """As transformers writes it.

        Raises:
            ValueError: a value out of range; names it.
        """
        for name, value, is_inside, bounds in (
            ("max_new_tokens", self.max_new_tokens, lambda n: n >= 1, "at least 1"),
            ("temperature", self.temperature, lambda t: 0.0 <= t < math.inf, "at least 0"),
            ("top_p", self.top_p, lambda p: 0.0 < p <= 1.0, "above 0, up to 1"),
            ("top_k", self.top_k, lambda k: k >= 0, "at least 0"),
        ):
            if value is not None and not is_inside(value):
                raise ValueError(f"{name} = {value}: must be {bounds}")
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "top_p": self.top_p, "top_k": self.top_k}
        limits = [name for name in ("top_p", "top_k") if chosen[name] is not None]
        if self.temperature == 0 and limits:
            raise ValueError(f"{limits[0]}: with temperature 0 nothing is drawn; leave one of the two out")
        if self.temperature is not None or limits:
            chosen |= {"do_sample": self.temperature != 0, "temperature": self.temperature or None}
        return GenerationConfig(**{name: value for name, value in chosen.items() if value is not None})


def generate(
    model: Path,
    data: str,
    out: Path,
    *,
    expert_memory: str,
    batch: int,
    unit: int,
    drawing: Drawing,
    text_field: str,
    dtype: str,
    predictors: Sequence[str] = DEFAULT_PREDICTORS,
    expert_precision: str = "native",
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Answers every input and prints what it cost.

    Answers are written as they end to OUT with `.partial` behind its name, a line each, which becomes OUT when all are there;
    after an error it stays, if it holds any.

    Args:
        model: a Hugging Face directory with its tokenizer; nothing is downloaded.
        data: a file, directory or URI: text with one input a line (empty lines are none), JSONL or Parquet with one a row.
        out: JSONL: {"input": file:line, "text", "num_tokens", "finish_reason"}.
        batch, unit: inputs a forward pass holds, and batches that decode side by side.
        predictors: names of `raymoe.inference.predictors.NAMES`.
        expert_precision: that experts are kept in, see `raymoe.config.precision`.
        command: the command line, for `json`.

    Raises:
        ValueError: no model or tokenizer, no inputs, a row that is not text, or cannot be answered; names the row.
    """
    for name, number in (("batch", batch), ("unit", unit)):
        if number < 1:
            raise ValueError(f"{name} = {number}: must be at least 1")
    if not model.is_dir():
        raise ValueError(f"model directory {str(model)!r} does not exist")
    config = drawing.config()
    transformers_logging.set_verbosity_error()
    tokenizer = load_tokenizer(model)
    with stage(console, "inputs") as say:
        inputs = read_inputs(data, text_field, tokenizer, drawing.seed)
        say(f"{len(inputs):,} with {sum(len(given.tokens) for given in inputs):,} tokens")
    with stage(console, "model") as say:
        engine = StaticEngine(
            model,
            expert_memory=expert_memory,
            dtype=dtype,
            predictors=predictors,
            expert_precision=expert_precision,
        )
        say(
            f"{engine.facts['model_type']}, {engine.cache.num_slots} of {engine.cache.num_experts} experts in memory, "
            f"on {engine.facts['device']}"
        )
    if engine.warning is not None:
        console.print(engine.warning, style="yellow", highlight=False)
    with engine:
        engine.check(inputs, config)
        write = _Lines(tokenizer, inputs, is_continued=not engine.is_encoder_decoder)
        began_s = time.perf_counter()
        answers = engine.run(inputs, batch_size=batch, num_batches=unit, config=config)
        with _written(out, console) as file, counted(console, "answers", len(inputs), "input") as advance:
            for answer in answers:
                write(file, answer)
                advance()
        row = _row(engine, time.perf_counter() - began_s)
    _print_report(row, console)
    if json is not None:
        meta = {"model": row.pop("model_type"), "data": data, "out": out, "batch": batch, "unit": unit, "dtype": dtype}
        write_json(json, command, [row], meta | {"expert_memory": expert_memory, "seed": drawing.seed})
    console.print(f"answers     {out}", highlight=False)


def read_inputs(data: str, text_field: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> list[StaticInput]:
    """Tokenised inputs in the order of the source, with the special tokens that the tokenizer puts around a text.

    Raises:
        ValueError: nothing there, or a row that is not text; names it.
    """
    files = find_files(data)
    inputs: list[StaticInput] = []
    for file in files.files:
        for place, text in _texts(files, file, text_field):
            tokens = tokenizer(text)["input_ids"]
            assert isinstance(tokens, list)
            inputs.append(StaticInput(tokens, seed + len(inputs), place))
    if not inputs:
        raise ValueError(f"text source {data!r} holds no input")
    return inputs


def _texts(files: SourceFiles, file: SourceFile, text_field: str) -> Iterator[tuple[str, str]]:
    rows = read_rows(files, file, {"text_field": text_field})
    if any(suffix in JSONL_SUFFIXES | PARQUET_SUFFIXES for suffix in Path(file.path.lower()).suffixes):
        yield from ((row.name, row.string(text_field)) for row in rows)
        return
    number = 0
    for part in rows:
        for line in part.string(text_field).split("\n"):
            number += 1
            if line.strip():
                yield f"{file.name}:{number}", line.removesuffix("\r")


class _Lines:
    """Writes an answer as a line."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, inputs: list[StaticInput], *, is_continued: bool):
        self._decode, self._inputs, self._is_continued = decoder(tokenizer), inputs, is_continued

    def __call__(self, file: TextIO, answer: Answer) -> None:
        given = self._inputs[answer.number]
        context = given.tokens[-CONTEXT_TOKENS:] if self._is_continued else ()
        stream = TextStream(self._decode, context)
        line = {
            "input": given.place,
            "text": stream.push(answer.tokens) + stream.finish(),
            "num_tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
        }
        file.write(jsonlib.dumps(line, ensure_ascii=False) + "\n")
        # whoever follows the file sees whole lines as they come
        file.flush()


@contextmanager
def _written(out: Path, console: Console) -> Iterator[TextIO]:
    partial = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
    except BaseException:
        if partial.stat().st_size:
            console.print(f"so far      {partial}", highlight=False)
        else:
            partial.unlink()
        raise
    os.replace(partial, out)


def _row(engine: StaticEngine, elapsed_s: float) -> dict[str, Any]:
    stats = engine.stats()
    grouping, prediction, cache = (stats.pop(name) for name in ("grouping", "prediction", "cache"))
    return {
        **stats,
        "elapsed_s": elapsed_s,
        "tokens_per_s": stats["generated_tokens"] / elapsed_s,
        "stall_s": cache["stall_s"],
        "grouping_state": grouping["state"],
        "grouping_reason": grouping["reason"],
        "prediction_state": prediction["state"],
        "prediction_reason": prediction["reason"],
        "predictors": prediction["predictors"],
    }


def _print_report(row: dict[str, Any], console: Console) -> None:
    table = Table(
        "tokens", "tokens/s", "hit rate", "experts a step", "MB a token", "of it prompts", "stall", "regroupings"
    )
    fetched = row["prompt_bytes"] + row["decode_bytes"]
    table.add_row(
        f"{row['generated_tokens']:,}",
        f"{row['tokens_per_s']:,.1f}",
        "-" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}",
        "-" if row["experts_per_step"] is None else f"{row['experts_per_step']:.1f}",
        f"{row['bytes_per_token'] / 1e6:.3f}",
        f"{row['prompt_bytes'] / fetched:.1%}" if fetched else "-",
        f"{row['stall_s']:.1f} s",
        f"{row['regroupings']:,}",
    )
    console.print(table)
    console.print(
        f"hit rate and experts a step are of decoding; regrouping is {row['grouping_state']}: {row['grouping_reason']}; prediction "
        f"is {row['prediction_state']}: {row['prediction_reason']}",
        style="dim",
    )
