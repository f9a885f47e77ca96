"""Eviction policies on a model's own routes: the experts that each would fetch beside the fewest that anybody could.

    raymoe bench cache MODEL --data F [--sequences 32] [--sequence-length 192] [--batches 1,4,16] [--budgets 5,10,25,50]

Sequences are run through the model once, and replayed as decode steps: token t of B sequences is step t. Every policy runs as in
the expert cache on one thread that fetches on demand only. With "+ token table" it is told, before every step, what
`raymoe.inference.predictors.TokenTable` says of it, learnt from the same replay up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from raymoe.benchmarks.placement import table
from raymoe.commands.predictor import record_routes
from raymoe.commands.traced_model import load_routed, look_at, text_batches
from raymoe.inference.eviction_oracle import Belady, Trace
from raymoe.inference.policies import DEFAULT_POLICY, POLICIES, PolicyFactory
from raymoe.inference.predictors import TokenTable
from raymoe.inference.replay import belady, replay
from raymoe.telemetry import write_json

COLUMNS = ("policy", "batch", "budget", "hit_rate", "fetched_per_token", "over_belady", "beside_global_lru")
Row = dict[str, Any]
Prediction = Callable[[int, int], dict[int, dict[int, float]]]
_LEAST = 0.02


def decode_steps(experts: np.ndarray, batch: int, num_experts: int) -> tuple[Trace, np.ndarray]:
    """Batches of sequences one after another, token by token.

    Args:
        experts: integers [sequences, layers, tokens, choices]; `num_experts` is no expert.
        batch: sequences at once; those left over are not used.

    Returns:
        The trace, and int64 [steps, batch, 2]: sequence and token that each step's rows are.

    Raises:
        ValueError: fewer sequences than the batch.
    """
    sequences, layers, tokens, _ = experts.shape
    if not 1 <= batch <= sequences:
        raise ValueError(f"batch = {batch}: there are {sequences} sequences; give at least 1, at most that many")
    trace, rows = [], []
    for first in range(0, sequences - batch + 1, batch):
        for token in range(tokens):
            chosen = experts[first : first + batch, :, token]
            distinct = [np.unique(chosen[:, layer]) for layer in range(layers)]
            trace.append([found[found < num_experts].tolist() for found in distinct])
            rows.append([(first + row, token) for row in range(batch)])
    return trace, np.array(rows)


def token_table(experts: np.ndarray, ids: np.ndarray, rows: np.ndarray, num_experts: int) -> Prediction:
    """What a token table says before each step, for `replay`: ids [sequences, tokens], the others as in `decode_steps`."""
    _, layers, _, _ = experts.shape
    predictor = TokenTable(layers, num_experts)
    said: list[dict[int, dict[int, float]]] = []
    for step in rows:
        sequence, token = step.T
        answer = predictor.step_begins(
            torch.from_numpy(ids[sequence, token].astype(np.int64)), [str(s) for s in sequence]
        )
        said.append({})
        for layer, probability in answer.items():
            likely = (probability > _LEAST).nonzero().flatten()
            said[-1][layer] = dict(zip(likely.tolist(), probability[likely].tolist(), strict=True))
        hidden = torch.empty(len(step), 0)
        for layer in range(layers):
            predictor.routed(layer, hidden, torch.from_numpy(experts[sequence, layer, token].astype(np.int64)))
    return lambda step, layer: said[step] if layer == 0 else {}


def measure(
    experts: np.ndarray, ids: np.ndarray, num_experts: int, batches: Sequence[int], budgets: Sequence[int], tokens: int
) -> list[Row]:
    """A row for each policy, batch and budget (percent of all experts), of steps with at most `tokens` tokens together.

    Raises:
        ValueError: a batch that there are too few sequences for, or a budget below one expert.
    """
    rows: list[Row] = []
    for batch in batches:
        trace, where = decode_steps(experts, batch, num_experts)
        trace, where = trace[: tokens // batch], where[: tokens // batch]
        predict = token_table(experts, ids, where, num_experts)
        arms: dict[str, tuple[PolicyFactory, Prediction | None]] = {
            name: (make, None) for name, make in POLICIES.items()
        }
        arms |= {f"{name} + token table": (POLICIES[name], predict) for name in (DEFAULT_POLICY, "plec")}
        arms["belady, no bypass"] = (lambda *_, trace=trace: Belady(trace)), None
        for budget in budgets:
            slots = experts.shape[1] * num_experts * budget // 100
            least = belady(trace, slots)
            found = {name: replay(trace, make, slots, told) for name, (make, told) in arms.items()} | {"bound": least}
            for name, counts in found.items():
                rows.append(
                    {
                        "policy": name,
                        "batch": batch,
                        "budget": budget,
                        "hit_rate": counts.hit_rate,
                        "fetched_per_token": counts.misses / (counts.steps * batch),
                        "over_belady": counts.misses / max(1, least.misses),
                        "beside_global_lru": counts.misses / max(1, found["global_lru"].misses),
                    }
                )
    return rows


def run(
    model: Path,
    data: str,
    sequences: int,
    sequence_length: int,
    batches: Sequence[int],
    budgets: Sequence[int],
    tokens: int,
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Records routes, replays them, prints the table, and writes it where asked.

    Raises:
        ValueError: as `raymoe trace` and `measure`.
    """
    config, layers = look_at(model)
    text = text_batches(model, config, data, 1, sequence_length, sequences, seed=0)
    routes = record_routes(load_routed(model), text, sequences)
    num_experts = layers[0].num_experts
    rows = measure(
        routes.experts.permute(0, 2, 1, 3).numpy(), routes.tokens.numpy(), num_experts, batches, budgets, tokens
    )
    console.print(table(f"{len(layers)} layers x {num_experts} experts, {layers[0].top_k} a token", rows, COLUMNS))
    if json is not None:
        meta = {"model": config.model_type, "data": data, "sequences": sequences, "sequence_length": sequence_length}
        write_json(json, command, rows, meta | {"tokens": tokens})
