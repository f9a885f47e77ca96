"""Compressed experts after equal fine-tuning, against every cheaper explanation: is it the vectors, or only the scale?

A small OLMoE is trained on text of the standard library and its documentation, then each arm is fine-tuned as long on code alone.
Source: arXiv 2503.00634; the controls are ours. Losses are held-out nats a byte.
"""

from __future__ import annotations

import copy
import hashlib
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from raymoe import compression
from raymoe.compression.attach import detach
from raymoe.compression.compare import NOT_MEASURABLE, gap_closed, sequence_losses, standard_error
from raymoe.models.layers import moe_layers

_LENGTH, _BATCH = 128, 16
_HELD_OUT = 128
_SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 4, "max_position_embeddings": 256,
    "router_aux_loss_coef": 0.01,
}  # fmt: skip
_PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "phimoe": ({"hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "num_local_experts": 16,
                "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32064}, -33.8),
    "olmoe": ({"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64,
               "num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304}, -31.4),
}  # fmt: skip
_FITTED: dict[str, dict[str, Any]] = {
    "full": {"keep": 1.0, "method": "drop"},
    "drop": {"method": "drop"},
    "compressed_experts": {},
    "compressed_experts, tied": {"tie_input": True},
    "one shared vector": {"method": "shared_vector"},
    "drop, renormalised": {"method": "drop_renormalised"},
    "mean vector": {"method": "mean_vector"},
    "reap": {"method": "reap"},
}
"""Fine-tuned alike. Dropping is compressed experts with vectors frozen at one."""
_UNTRAINED = ("drop", "drop, renormalised", "mean vector", "reap")


def experiments(steps: int = 500, fine_steps: int = 200) -> dict[str, Callable[..., list[dict[str, Any]]]]:
    """Each takes (seeds, say) and returns rows of `raymoe bench quality`.

    Args:
        steps, fine_steps: of pretraining, and of each arm's fine-tuning.
    """
    return {
        "compression": lambda seeds, say=print: recovery(seeds, say, steps, fine_steps),
        "active parameters": lambda seeds, say=print: published_shapes(say),
        "compression latency": lambda seeds, say=print: latency(say),
    }


def recovery(seeds: Sequence[int], say: Callable[[str], None], steps: int, fine_steps: int) -> list[dict[str, Any]]:
    """Loss, recovery and the share of the gap between drop and full that each arm closes, for each seed and over all."""
    code, prose = texts()
    say(
        f"text: {len(code):,} bytes of code, {len(prose):,} of prose, sha256 {hashlib.sha256(code + prose).hexdigest()[:12]}"
    )
    rows: list[dict[str, Any]] = []
    pooled: dict[str, list[Tensor]] = {}
    for seed in seeds:
        # what is held out stands at the end of the text, so nothing of it was seen
        fit_code, held = sequences(code)[:-_HELD_OUT], sequences(code)[-_HELD_OUT:]
        mixed = torch.cat([fit_code, sequences(prose)])
        base = pretrained(mixed, steps, seed)
        losses = {f"{arm}, untrained": _untrained(base, arm, fit_code, held) for arm in _UNTRAINED}
        actives = {}
        for arm, options in _FITTED.items():
            model = copy.deepcopy(base)
            compression.compress(model, **({"keep": 0.5, "calibration": fit_code[:32]} | options))
            compression.fit(
                model, fit_code, train="all", steps=fine_steps, batch=_BATCH, weight_learning_rate=3e-4, seed=seed
            )
            losses[arm] = sequence_losses(model, held)
            actives[arm] = compression.active_counts(model, compression.settings_of(model)).active_parameters
            say(f"seed {seed}  {arm:<26} {losses[arm].mean():.4f}")
        for arm, found in losses.items():
            pooled.setdefault(arm, []).append(found)
            active = actives[arm.removesuffix(", untrained")]
            rows.append(_row(arm, seed, losses["full"], losses["drop"], found, active))
    over = {arm: torch.cat(found) for arm, found in pooled.items()}
    rows += [_row(arm, None, over["full"], over["drop"], found, None) for arm, found in over.items()]
    for row in rows[-len(over) :]:
        share = "not measurable here" if row["gap_closed"] is None else f"{row['gap_closed']:.1%} of the gap closed"
        say(f"{row['arm']:<28} loss {row['loss']:.4f}  recovery {row['recovery']:.1%}  {share}")
    gap = over["drop"] - over["full"]
    say(f"gap {gap.mean():.4f} nats, standard error {standard_error(gap):.4f}; noise below {NOT_MEASURABLE} of these")
    return rows


def published_shapes(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Active parameters of Phi-3.5-MoE's and OLMoE's shapes, counted, beside what the paper says."""
    rows = []
    for family, (shape, published) in _PUBLISHED.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**shape))
        full = compression.active_counts(model)
        settings = compression.CompressionSettings("compressed_experts", (0.5,) * len(moe_layers(model)))
        half = compression.active_counts(model, settings)
        change = 100 * (half.active_parameters / full.active_parameters - 1)
        say(
            f"{family}: {full.active_parameters:,} -> {half.active_parameters:,} active, {change:.1f} % (paper {published} %)"
        )
        for arm, counts in (("full", full), ("compressed_experts", half)):
            rows.append(
                _empty("active parameters", f"{family}, {arm}") | {"active_parameters": counts.active_parameters}
            )
    return rows


def latency(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A decode step's forward pass at batch 1 and 16, arms taking turns: OLMoE's layer, two of them, in float32."""
    shape = dict(_PUBLISHED["olmoe"][0], num_hidden_layers=2, vocab_size=256)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["olmoe"](**shape)).eval()
    rows = []
    for tied in (False, True):
        compression.compress(model, keep=0.5, tie_input=tied)
        tokens = torch.randint(0, 256, (16, 2), generator=torch.Generator().manual_seed(0))
        found = compression.compare(model, tokens, batches=(1, 16), rounds=15)
        for batch, times in found.latency_ms.items():
            for arm, ms in zip(("full", "drop", "compressed_experts"), times, strict=True):
                name = f"{arm}{', tied' if tied and arm == 'compressed_experts' else ''}, batch {batch}"
                say(f"{name:<36} {ms:.2f} ms ({100 * (ms / times[0] - 1):+.1f} %)")
                rows.append(_empty("compression latency", name) | {"latency_ms": ms})
        compression.restore(model)
    return rows


def texts() -> tuple[bytes, bytes]:
    """(code, prose) that come with Python."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    code = b"\n".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    prose = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode()
    return code, prose


def sequences(text: bytes) -> Tensor:
    """int64 [N, L + 1] of bytes."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens[: len(tokens) // (_LENGTH + 1) * (_LENGTH + 1)].view(-1, _LENGTH + 1)


def pretrained(tokens: Tensor, steps: int, seed: int) -> PreTrainedModel:
    """A small OLMoE trained from random weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["olmoe"](**_SHAPE))
    compression.compress(model, keep=1.0, method="drop")
    compression.fit(model, tokens, train="all", steps=steps, batch=_BATCH, weight_learning_rate=3e-3, seed=seed)
    detach(model)
    return model


def _untrained(base: PreTrainedModel, arm: str, calibration: Tensor, held: Tensor) -> Tensor:
    model = copy.deepcopy(base)
    compression.compress(model, **({"keep": 0.5, "calibration": calibration[:32]} | _FITTED[arm]))
    return sequence_losses(model, held)


def _row(arm: str, seed: int | None, full: Tensor, drop: Tensor, found: Tensor, active: int | None) -> dict[str, Any]:
    share, low, high = gap_closed(full, drop, found, seed=seed or 0)
    return _empty("compression", arm) | {
        "seed": seed,
        "active_parameters": active,
        "loss": found.mean().item(),
        "recovery": (full.mean() / found.mean()).item(),
        "gap_closed": share,
        "ci_low": low,
        "ci_high": high,
    }


def _empty(experiment: str, arm: str) -> dict[str, Any]:
    columns: Iterable[str] = (
        "seed", "mean_k", "active_parameters", "loss", "recovery", "gap_closed", "ci_low", "ci_high", "latency_ms",
    )  # fmt: skip
    return {"experiment": experiment, "arm": arm} | dict.fromkeys(columns)
