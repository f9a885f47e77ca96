"""`raymoe trace`: what a model's routers do with real text, as a trace that `raymoe plan` reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from raymoe.commands.progress import counted, stage
from raymoe.commands.traced_model import load_routed, look_at, text_batches
from raymoe.models.record import RoutingRecorder
from raymoe.placement.statistics import trace_statistics
from raymoe.placement.trace import LoadTrace
from raymoe.telemetry import TraceWriter, load_counts, write_json
from raymoe.training.batches import Batches, rank_slice

_COLUMNS = {
    "expert_max_mean": ("expert max", ".2f"),
    "device_max_mean": ("device max", ".2f"),
    "top1_share": ("top 1", ".1%"),
    "top2_share": ("top 2", ".1%"),
    "top4_share": ("top 4", ".1%"),
    "top8_share": ("top 8", ".1%"),
    "gini": ("Gini", ".2f"),
    "zero_share": ("empty", ".1%"),
    "drift": ("drift", ".3f"),
    "rank_distance": ("ranks", ".3f"),
}


def trace(
    model: Path,
    data: str,
    output: Path,
    *,
    ranks: int,
    batch: int,
    sequence_length: int,
    steps: int,
    seed: int,
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Runs a model over text without training it, writes which experts the tokens took, and prints how skewed that is.

    Args:
        model: a Hugging Face directory with its tokenizer; nothing is downloaded.
        data: as `raymoe.training.text.read_documents` takes it; its sequences are shuffled by `seed`, and none is used twice.
        output: Parquet file to write, a row a (step, layer, rank).
        ranks: how many ranks the sequences of a batch are dealt out to; the model runs in this process alone.
        batch: sequences a step, over all ranks.
        command: the command line, for `json`.

    Raises:
        ValueError: no directory, not an MoE model, no tokenizer or weights, text that does not suffice, or a bad number.
    """
    for name, number in (("ranks", ranks), ("batch", batch), ("sequence_length", sequence_length), ("steps", steps)):
        if number < 1:
            raise ValueError(f"{name} = {number}: must be at least 1")
    if batch < ranks:
        raise ValueError(f"batch = {batch}: {ranks} ranks need at least a sequence each")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config, layers = look_at(model)
    with stage(console, "text") as say:
        batches = text_batches(model, config, data, batch, sequence_length, steps, seed)
        say(f"{batches.num_sequences:,} sequences of {sequence_length} tokens, of which {steps * batch:,} are used")
    with stage(console, "model") as say:
        network = load_routed(model)
        say(
            f"{config.model_type}, {len(layers)} MoE layers x {layers[0].num_experts} experts, "
            f"{layers[0].top_k} a token, on {network.device.type}"
        )
    _record(network, batches, output, ranks, steps, console)
    counts = load_counts(output)
    rows = statistics_rows(LoadTrace.of_columns(counts, name=output.stem, choices=counts["choices"]))
    _print_table(rows, ranks, console)
    if json is not None:
        meta = {"model": config.model_type, "data": data, "trace": output, "ranks": ranks, "batch": batch}
        meta |= {"sequence_length": sequence_length, "steps": steps, "seed": seed, "choices": counts["choices"]}
        write_json(json, command, rows, meta)
    console.print(f"trace       {output}", highlight=False)


def statistics_rows(counts: LoadTrace) -> list[dict[str, Any]]:
    """`trace_statistics` of each layer, and of all in a row whose ``layer`` is "all"; as many devices as ranks."""
    layers = [LoadTrace(counts.rows[:, :, [layer]], counts.name, counts.choices) for layer in range(counts.num_layers)]
    return [
        *({"layer": index, **trace_statistics(layer)} for index, layer in enumerate(layers)),
        {"layer": "all", **trace_statistics(counts)},
    ]


@torch.inference_mode()
def _record(network: PreTrainedModel, batches: Batches, output: Path, ranks: int, steps: int, console: Console) -> None:
    with RoutingRecorder(network) as recorder, counted(console, "routing", steps) as advance:
        first = recorder.layers[0]
        with TraceWriter(output, len(recorder.layers), first.num_experts, choices=first.top_k) as writer:
            for step in range(steps):
                sequences = batches.batch(step)
                for rank in range(ranks):
                    # without the head: its logits are far larger than what is recorded
                    inputs = rank_slice(sequences, rank, ranks).tokens[:, :-1]
                    network.base_model(input_ids=inputs.to(network.device), use_cache=False)
                    writer.append(step, recorder.take_counts().numpy(), rank=rank)
                advance()


def _print_table(rows: list[dict[str, Any]], ranks: int, console: Console) -> None:
    table = Table("layer", *(title for title, _ in _COLUMNS.values()))
    for row in rows:
        values = ("-" if math.isnan(row[key]) else format(row[key], form) for key, (_, form) in _COLUMNS.items())
        table.add_row(str(row["layer"]), *values, style="bold" if row["layer"] == "all" else None)
    console.print(table)
    console.print(
        f"max: busiest / mean; device: plain expert parallelism on {ranks}; top n: rows of the n busiest experts; empty: experts "
        "that a rank's tokens left out; drift between steps, and ranks from their mean: total variation",
        style="dim",
    )
