"""`raymoe predictor train`: a routing-path predictor for a model, from what its routers do with real text."""

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
from raymoe.inference.predictors.path_model import (
    FACTS_FILE,
    WEIGHTS_FILE,
    PathShape,
    save_path_network,
    vocabulary_hash,
)
from raymoe.inference.predictors.path_training import (
    RecordedRoutes,
    evaluate_most_frequent,
    evaluate_path_network,
    train_path_network,
)
from raymoe.models.record import RoutingRecorder
from raymoe.telemetry import write_json
from raymoe.training.batches import Batches

_RECORDED_AT_ONCE = 8
_COLUMNS = ("recall@k", "recall@1.5k", "recall@2k", "precision@k", "precision@1.5k", "precision@2k", "byte_recall@k")


def train_predictor(
    model: Path,
    data: str,
    *,
    sequences: int,
    sequence_length: int,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Runs a model over text, trains a path predictor on the routes, prints its quality on held-out sequences, and stores it in the
    model's directory, where serving finds it.

    Args:
        model: a Hugging Face directory with its tokenizer; nothing is downloaded.
        data: as `raymoe.training.text.read_documents` takes it.
        sequences: run through the model; one in ten is held out.
        sequence_length: tokens a sequence.
        steps, batch: of the training, in sequences.
        learning_rate: of the head; the rest has a tenth of it.
        command: the command line, for `json`.

    Raises:
        ValueError: no directory, not an MoE model, no tokenizer or weights, text that does not suffice, or a bad number.
    """
    for name, number, least in (
        ("sequences", sequences, 2),
        ("sequence_length", sequence_length, 2),
        ("steps", steps, 1),
        ("batch", batch, 1),
    ):
        if number < least:
            raise ValueError(f"{name} = {number}: must be at least {least}")
    if not 0.0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate = {learning_rate}: must be above 0")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config, layers = look_at(model)
    with stage(console, "text") as say:
        batches = text_batches(model, config, data, 1, sequence_length, sequences, seed)
        say(f"{batches.num_sequences:,} sequences of {sequence_length} tokens, of which {sequences:,} are used")
    text_config = config.get_text_config()
    shape = PathShape(
        num_layers=len(layers),
        num_experts=layers[0].num_experts,
        top_k=layers[0].top_k,
        vocab_size=text_config.vocab_size,
        vocabulary=vocabulary_hash(model),
        **PathShape.scaled(text_config.hidden_size),
    )
    with stage(console, "routes") as say:
        routes = record_routes(load_routed(model), batches, sequences)
        say(
            f"{routes.tokens.numel():,} tokens x {shape.num_layers} layers x {shape.top_k} of {shape.num_experts} experts"
        )
    train, held = routes.split()
    with counted(console, "training", steps) as advance:
        network = train_path_network(
            train,
            shape,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            seed=seed,
            on_step=lambda _, loss: advance(f"loss {loss:.3f}"),
        )
    itemsize = torch.empty((), dtype=getattr(text_config, "dtype", None) or torch.float32).element_size()
    expert_bytes = [layer.layout.numel * itemsize for layer in layers]
    found = evaluate_path_network(network, held, expert_bytes=expert_bytes)
    frequent = evaluate_most_frequent(train, held, shape, expert_bytes=expert_bytes)
    rows = [{"predictor": "path", **row} for row in found]
    rows += [{"predictor": "most frequent", **row} for row in frequent]
    facts = {"sequences": sequences, "sequence_length": sequence_length, "steps": steps, "batch": batch, "seed": seed}
    facts |= {"learning_rate": learning_rate, "parameters": network.num_parameters()}
    save_path_network(network, model, {**facts, "held_out": found})
    _print_table(rows, console)
    if json is not None:
        write_json(json, command, rows, {"model": config.model_type, "data": data, **facts})
    console.print(f"predictor   {model / WEIGHTS_FILE}\n            {model / FACTS_FILE}", highlight=False)


@torch.inference_mode()
def record_routes(network: PreTrainedModel, batches: Batches, sequences: int) -> RecordedRoutes:
    """Runs the first so many sequences, and keeps which experts their tokens took.

    Args:
        batches: with one sequence a batch.
    """
    tokens = torch.cat([batches.batch(number).tokens[:, :-1] for number in range(sequences)])
    experts = []
    with RoutingRecorder(network) as recorder:
        for part in tokens.split(_RECORDED_AT_ONCE):
            # without the head: its logits are far larger than what is recorded
            network.base_model(input_ids=part.to(network.device), use_cache=False)
            chosen = torch.stack(recorder.take(), dim=1)
            experts.append(chosen.unflatten(0, part.shape).to("cpu", torch.int16))
    return RecordedRoutes(tokens.clone(), torch.cat(experts).clone())


def _print_table(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("held-out text", "tokens", "wanted", *_COLUMNS)
    for row in rows:
        table.add_row(
            row["predictor"], str(row["tokens"]), f"{row['wanted']:.1f}", *(f"{row[name]:.1%}" for name in _COLUMNS)
        )
    console.print(table)
    console.print(
        "k: as many experts as are wanted, by a token or by the union of several; byte_recall weighs layers by an expert's bytes",
        style="dim",
    )
