"""`raymoe compress`: a model whose tokens run fewer experts, fitted on text, compared on held-out text, and written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from raymoe import compression
from raymoe.commands.progress import counted, stage
from raymoe.commands.traced_model import load_routed, look_at, text_batches
from raymoe.compression.compare import Comparison
from raymoe.compression.fit import LOSSES, TRAIN
from raymoe.compression.settings import CALIBRATED, LEARNT, METHODS, keep_by_layer, parse_keep
from raymoe.telemetry import write_json
from raymoe.training.tokenizer import load_tokenizer

_CALIBRATION = 32
"""Sequences that experts' outputs are measured on, where a method wants that."""


def compress_model(
    model: Path,
    keep: str,
    method: str,
    data: str,
    out: Path,
    *,
    tie_input: bool,
    train: str,
    loss: str,
    steps: int,
    batch: int,
    sequence_length: int,
    held_out: int,
    learning_rate: float,
    seed: int,
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Compresses, fits, compares and writes.

    Args:
        keep: see `raymoe.compression.settings.parse_keep`.
        data: text, as `raymoe.training.text.read_documents` takes it.
        steps: of fitting, a batch each; 0 leaves vectors at ones.
        held_out: sequences of the text that nothing is fitted on, for the comparison.
        command: the command line, for `json`.

    Raises:
        ValueError: settings that name their key, a model that cannot be compressed, too little text, or an `out` that is `model`.
    """
    transformers_logging.set_verbosity_error()
    _check(model, out, method, train, loss)
    wanted = parse_keep(keep)
    config, layers = look_at(model)
    keep_by_layer(wanted, [layer.top_k for layer in layers])
    num_fitted = max(steps, -(-_CALIBRATION // batch) if method in CALIBRATED else 0)
    with stage(console, "text") as say:
        num_held = -(-held_out // batch)
        batches = text_batches(model, config, data, batch, sequence_length, num_fitted + num_held, seed)
        tokens = torch.cat([batches.batch(number).tokens for number in range(num_fitted + num_held)])
        fitted, held = tokens[: num_fitted * batch], tokens[num_fitted * batch :][:held_out]
        say(f"{len(fitted):,} sequences of {sequence_length} tokens to fit on, {len(held):,} held out")
    with stage(console, "model") as say:
        network = load_routed(model)
        say(
            f"{config.model_type}, {len(layers)} MoE layers x {layers[0].num_experts} experts, {layers[0].top_k} a token"
        )
    calibration = fitted[:_CALIBRATION] if method in CALIBRATED else None
    compression.compress(network, keep=wanted, method=method, tie_input=tie_input, calibration=calibration)
    _fit(network, fitted, train, loss, steps, batch, learning_rate, seed, console)
    with stage(console, "compare") as say:
        found = compression.compare(network, held, seed=seed)
        say(f"{len(held):,} sequences")
    compression.save(network, out, load_tokenizer(model))
    _print(found, console)
    if json is not None:
        settings = compression.settings_of(network).to_dict()
        meta = {
            "model": config.model_type,
            "data": data,
            "out": out,
            "train": train,
            "loss": loss,
            "steps": steps,
            "seed": seed,
        }
        write_json(json, command, _rows(found), meta | settings)
    console.print(f"compressed  {out}; serve it with: raymoe serve {out}", highlight=False)


def _check(model: Path, out: Path, method: str, train: str, loss: str) -> None:
    for key, value, known in (("method", method, METHODS), ("train", train, TRAIN), ("loss", loss, LOSSES)):
        if value not in known:
            raise ValueError(f"{key}: {value!r} is not known; use one of {', '.join(known)}")
    if out.resolve() == model.resolve():
        raise ValueError(f"out: {out} is the model itself; give another directory")


def _fit(
    network: Any,
    fitted: Tensor,
    train: str,
    loss: str,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    console: Console,
) -> None:
    settings = compression.settings_of(network)
    if steps == 0 or (settings.method not in LEARNT and train == "theta"):
        return
    with counted(console, "fitting", steps) as advance:
        compression.fit(network, fitted, train=train, loss=loss, steps=steps, batch=batch, learning_rate=rate, seed=seed,
            progress=lambda value: advance(f"loss {value:.4f}"))  # fmt: skip


def _rows(found: Comparison) -> list[dict[str, Any]]:
    """Full, dropped, compressed: a row each."""
    rows = []
    for number, (arm, loss, counts) in enumerate(
        (
            ("full", found.full_loss, found.full_counts),
            ("drop", found.dropped_loss, found.counts),
            ("compressed", found.loss, found.counts),
        )
    ):
        rows.append(
            {
                "arm": arm,
                "loss": loss,
                "recovery": found.full_loss / loss,
                "gap_closed": found.gap_closed if arm == "compressed" else None,
                "ci_low": found.ci_low if arm == "compressed" else None,
                "ci_high": found.ci_high if arm == "compressed" else None,
                **asdict(counts),
                **{f"latency_ms_batch_{size}": times[number] for size, times in found.latency_ms.items()},
            }
        )
    return rows


def _print(found: Comparison, console: Console) -> None:
    sizes = list(found.latency_ms)
    table = Table("", "loss", "active parameters", "FLOPs a token", "bytes", *(f"ms at batch {size}" for size in sizes))
    for row in _rows(found):
        table.add_row(
            row["arm"],
            f"{row['loss']:.4f}",
            f"{row['active_parameters']:,}",
            f"{row['flops_per_token']:,}",
            f"{row['total_bytes']:,}",
            *(f"{row[f'latency_ms_batch_{size}']:.2f}" for size in sizes),
        )
    console.print(table)
    if found.gap_closed is None:
        closed = (
            f"gap between full and drop: {found.gap:.4f} nats with a standard error of {found.gap_standard_error:.4f}: "
            "what share of it is closed is not measurable here; hold out more text"
        )
    else:
        closed = (
            f"{found.gap_closed:.1%} of the gap is closed (95 % interval {found.ci_low:.1%} to {found.ci_high:.1%})"
        )
    console.print(closed, highlight=False)
    console.print("all experts stay in memory: any of them may be some token's strongest", style="dim")
