"""`raymoe experts`: a model's experts in fewer bits, in a file beside the checkpoint, and what that loses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from raymoe.commands.progress import counted, stage
from raymoe.commands.traced_model import text_batches
from raymoe.config.precision import Precision
from raymoe.inference.cache import ExpertCache
from raymoe.inference.expert_form import ExpertForm
from raymoe.inference.expert_precision import measure_loss
from raymoe.inference.experts import CachedExperts
from raymoe.inference.lossy import lossy_line
from raymoe.inference.precision_file import PrecisionTier, PrecisionWriter
from raymoe.inference.tiers import CheckpointTier, ExpertSource
from raymoe.models import attach_runtime, detach_runtime, load_without_experts, warm_up_layers
from raymoe.telemetry import write_json
from raymoe.training.batches import Batches

_DTYPE = torch.float32
_EXPERTS_A_LAYER = 4
_AT_ONCE = 4


def make_experts(
    model: Path,
    precision: str,
    data: str | None,
    *,
    sequences: int,
    sequence_length: int,
    expert_memory: str,
    seed: int,
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Writes the file, measures on what is written, and says what it found; the file keeps it for whoever serves it.

    Args:
        model: a Hugging Face directory.
        precision: see `Precision.parse`.
        data: text to measure the model's loss on, as `raymoe.training.text.read_documents` takes it; None: only the experts'
            own outputs are compared, as they always are.
        expert_memory: budget of the experts' cache while the loss is measured.
        command: the command line, for `json`.

    Raises:
        ValueError: no MoE model, an incomplete checkpoint, `native`, text that does not suffice, or a budget below one expert.
    """
    wanted = Precision.parse(precision)
    transformers_logging.set_verbosity_error()
    if not (model / "config.json").is_file():
        raise ValueError(f"no config.json in {model}; give a Hugging Face model directory")
    network, files = load_without_experts(model, _DTYPE, direct_io=True)
    batches, steps = None, -(-sequences // _AT_ONCE)
    if data is not None:
        if network.config.is_encoder_decoder:
            raise ValueError("data: the loss is measured of decoders alone; leave it out")
        with stage(console, "text") as say:
            config = AutoConfig.from_pretrained(model, local_files_only=True)
            batches = text_batches(model, config, data, _AT_ONCE, sequence_length, steps, seed)
            say(f"{steps * _AT_ONCE:,} sequences of {sequence_length} tokens")
    with PrecisionWriter(model, files, wanted) as writer:
        total = sum(layer.num_experts for layer in files.layers)
        with counted(console, "experts", total, "expert") as advance:
            writer.write(advance)
        errors = [
            measure_loss([layer], files.read, wanted, _DTYPE, num_experts=_EXPERTS_A_LAYER) for layer in files.layers
        ]
        held_out = None
        if batches is not None:
            forms = {
                "native": (ExpertForm(files.layers, Precision(), _DTYPE), CheckpointTier(files)),
                str(wanted): (
                    ExpertForm(files.layers, wanted, _DTYPE),
                    PrecisionTier(writer.partial, files, wanted, direct_io=True),
                ),
            }
            found = {}
            for name, (form, source) in forms.items():
                with stage(console, name) as say:
                    found[name] = _loss_of(network, form, source, batches, steps, expert_memory)
                    say(f"loss {found[name]:.4f}, perplexity {math.exp(found[name]):.2f}")
            held_out = {
                "data": data,
                "tokens": steps * _AT_ONCE * sequence_length,
                "native_loss": found["native"],
                "native_perplexity": math.exp(found["native"]),
                "loss": found[str(wanted)],
                "perplexity": math.exp(found[str(wanted)]),
            }
        loss = {"relative_error": [error.mean_error for error in errors], "held_out": held_out}
        path = writer.finish(loss)
    rows: list[dict[str, Any]] = [
        {
            "layer": layer.name,
            "mean_error": error.mean_error,
            "max_error": error.max_error,
            "expert_bytes": error.held_bytes,
            "native_bytes": error.exact_bytes,
        }
        for layer, error in zip(files.layers, errors, strict=True)
    ]
    _print_table(rows, console)
    if json is not None:
        meta = {"model": network.config.model_type, "precision": str(wanted), "held_out": held_out, "seed": seed}
        write_json(json, command, rows, meta)
    console.print(lossy_line(str(wanted), loss), style="yellow", highlight=False)
    console.print(f"experts     {path} ({path.stat().st_size / 1e6:,.1f} MB)", highlight=False)


@torch.inference_mode()
def _loss_of(
    network: PreTrainedModel, form: ExpertForm, source: ExpertSource, batches: Batches, steps: int, expert_memory: str
) -> float:
    """Cross entropy a token, in nats, with the kernels that serving uses."""
    cache = ExpertCache(
        source,
        numel=form.numel,
        num_experts=form.num_experts,
        budget=expert_memory,
        total_bytes=form.native_bytes,
        dtype=form.dtype,
    )
    attach_runtime(network, CachedExperts(cache, form))
    warm_up_layers(form.layers, _DTYPE, torch.device("cpu"), is_training=False)
    total = 0.0
    count = 0
    try:
        for number in range(steps):
            tokens = batches.batch(number).tokens
            logits = network(input_ids=tokens[:, :-1], use_cache=False).logits
            targets = tokens[:, 1:]
            total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
            count += targets.numel()
    finally:
        detach_runtime(network)
        cache.close()
    return total / count


def _print_table(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("layer", "mean error", "most", "bytes", "of native")
    for row in rows:
        table.add_row(
            row["layer"],
            f"{row['mean_error']:.3%}",
            f"{row['max_error']:.3%}",
            f"{row['expert_bytes']:,}",
            f"{row['expert_bytes'] / row['native_bytes']:.1%}",
        )
    console.print(table)
    console.print(
        "error: of an expert's output for random rows, |y - y native| / |y native|; bytes of an expert, in float32 if native",
        style="dim",
    )
