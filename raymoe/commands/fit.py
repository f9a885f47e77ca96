"""`raymoe plan --model`: does a model fit, on how many devices, under which policy or budget, and about how fast."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from raymoe.commands.fit_text import describe, devices_text, rate_text, serving_lines, training_lines
from raymoe.commands.machines import Machines, described, this_machine
from raymoe.config import parse_memory
from raymoe.models.size import ModelSize, model_size
from raymoe.placement import ClusterSpec, LoadTrace, policy, simulate
from raymoe.placement.fit import TrainingFit, fit_training, training_step_ns, training_workload
from raymoe.placement.generate import generate
from raymoe.placement.serving import DecodeStep, ServingFit, ServingMachine, fit_serving
from raymoe.telemetry import write_json

PURPOSES = ("train", "serve")
_ROUTING = "modern"
_SIMULATED_STEPS = 6
_SIMULATED_LAYERS = 2
_SIMULATED_TOKENS = 1 << 15


def plan_model(
    model: Path,
    purpose: str,
    cluster: str | None,
    *,
    nodes: int | None,
    devices_per_node: int | None,
    tokens: int,
    sequence_length: int,
    context: int,
    batch: int,
    expert_memory: str | None,
    console: Console,
    command: str,
    json: Path | None,
) -> None:
    """Prints what becomes of `model` (a directory or a config.json) on a described cluster, or on this machine, measured.

    Args:
        purpose: train or serve.
        cluster: a preset or a cluster file; None: this machine.
        nodes, devices_per_node: instead of what the cluster file says.
        tokens: tokens a device takes in a training step, in sequences of `sequence_length`.
        context, batch: tokens a request holds, and requests that decode at once.
        expert_memory: of a device, for experts ("40%" of all, or bytes); None: all that is left.

    Raises:
        ValueError: an unknown purpose, a model or cluster that cannot be read, a budget that does not fit.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"--for is {purpose!r}; choose one of {', '.join(PURPOSES)}")
    transformers_logging.set_verbosity_error()
    size = model_size(model)
    _say(console, "model", describe(size))
    if cluster is None:
        with console.status("measuring this machine ..."):
            machines = this_machine(model, nodes, devices_per_node)
    else:
        machines = described(cluster, nodes, devices_per_node)
    source = "measured now" if machines.is_measured else f"as {machines.name} says"
    _say(console, "machines", f"{machines.description}; {source}")
    if purpose == "serve":
        rows = _serve(size, machines, context, batch, expert_memory, console)
    else:
        rows = _train(size, machines, tokens, sequence_length, console)
    if json is not None:
        facts = {"model": asdict(size), "cluster": machines.name, "is_measured": machines.is_measured}
        write_json(json, command, rows, meta=facts | {"machine": asdict(machines.serving)})


def _serve(
    size: ModelSize, machines: Machines, context: int, batch: int, expert_memory: str | None, console: Console
) -> list[dict[str, Any]]:
    machine = machines.serving
    total = size.layers * size.experts * size.expert_bytes
    budget = None if expert_memory is None else parse_memory(expert_memory, total)
    batches = sorted({1, batch})
    fit = fit_serving(size, machine, context=context, batches=batches, budget_bytes=budget)
    rows = [_decode_row(fit, step, "uniform" if not fit.is_whole else "whole", machine, 1) for step in fit.uniform]
    if not fit.is_whole:
        rows += [_decode_row(fit, step, "all miss", machine, 1) for step in fit.worst]
        rows += [_decode_row(fit, step, "spread", machine, machine.devices) for step in fit.spread]
    for line in serving_lines(size, fit, machine, context, max(batches)):
        _say(console, "serving", line)
    if not fit.fits:
        return [{"arrangement": "does not fit", "dense_bytes": fit.dense_bytes, "kv_bytes": fit.kv_bytes}]
    table = Table(box=None, pad_edge=False)
    for name in ("routing assumed", "devices", "batch", "misses a step", "tokens/s at most", "bound by"):
        table.add_column(name, justify="left" if name in ("routing assumed", "bound by") else "right")
    for row in rows:
        rate = row["tokens_per_s"]
        table.add_row(
            _ARRANGEMENTS[row["arrangement"]],
            str(row["devices"]),
            str(row["batch"]),
            f"{row['misses']:,.0f}",
            "not known" if rate is None else rate_text(rate),
            row["bound"],
        )
    console.print(table)
    return rows


_ARRANGEMENTS = {
    "whole": "any",
    "uniform": "all experts alike",
    "all miss": "worst: all miss",
    "spread": "all alike, experts spread over devices",
}


def _decode_row(
    fit: ServingFit, step: DecodeStep, arrangement: str, machine: ServingMachine, devices: int
) -> dict[str, Any]:
    return {
        "arrangement": arrangement,
        "devices": devices,
        "batch": step.batch,
        "expert_memory_bytes": fit.budget_bytes,
        "resident_share": fit.share,
        "dense_bytes": fit.dense_bytes,
        "kv_bytes": fit.kv_bytes,
        "host_bytes": fit.host_bytes,
        "file_bytes": fit.file_bytes,
        "devices_whole": fit.devices_whole,
        "wanted": step.wanted,
        "misses": step.misses,
        "step_ms": None if step.step_ns is None else step.step_ns / 1e6,
        "tokens_per_s": step.tokens_per_s,
        "bound": step.bound,
    }


def _train(
    size: ModelSize, machines: Machines, tokens: int, sequence_length: int, console: Console
) -> list[dict[str, Any]]:
    spec = machines.spec
    fit = fit_training(size, spec, tokens=tokens)
    for line in training_lines(fit, spec, tokens):
        _say(console, "training", line)
    facts = asdict(fit) | {"needed_bytes": fit.needed_bytes, "fits": fit.fits, "rematerialise": fit.rematerialise}
    if not fit.fits:
        return [facts]
    if not machines.knows_links:
        _say(
            console,
            "training",
            "no rate: the links between devices are not known; raymoe plan --measure measures them.",
        )
        return [facts]
    with console.status("simulating ..."):
        rows = simulated_rows(size, spec, fit, tokens, sequence_length)
    best = max(rows, key=lambda row: row["tokens_per_s"])
    slots = f" with extra_slots: {best['extra_slots']}" if best["extra_slots"] else ""
    _say(
        console,
        "training",
        f"simulated on '{_ROUTING}' routing: policy {best['policy']}{slots}, about {rate_text(best['tokens_per_s'])} tokens/s on "
        f"{devices_text(spec.num_devices)} (an upper estimate: the optimizer and launches are left out).",
    )
    table = Table(box=None, pad_edge=False)
    for name in ("policy", "copies a layer", "moe ms", "step ms", "over ep", "imbalance", "tokens/s (simulated)"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        table.add_row(
            row["policy"],
            str(row["extra_slots"]),
            f"{row['moe_ms']:,.1f}",
            f"{row['step_ms']:,.1f}",
            f"{row['speedup_over_ep']:.2f}x",
            f"{row['imbalance']:.2f}",
            rate_text(row["tokens_per_s"]),
        )
    console.print(table)
    return [row | facts | {"extra_slots": row["extra_slots"]} for row in rows]


def simulated_rows(
    size: ModelSize, spec: ClusterSpec, fit: TrainingFit, tokens: int, sequence_length: int
) -> list[dict[str, Any]]:
    """ep and fssdp on synthetic routing, a row each; fssdp-rm too where re-materialised copies make more room.

    A few steps of two layers stand for all; re-sharding comes later than that, and is not in it.
    """
    # fewer tokens drawn and then scaled, and split evenly over ranks: skew is what matters, and drawing takes time
    drawn = min(tokens * spec.num_devices, _SIMULATED_TOKENS)
    trace = generate(
        _ROUTING,
        steps=_SIMULATED_STEPS,
        ranks=1,
        layers=min(size.layers, _SIMULATED_LAYERS),
        experts=size.experts,
        tokens_per_rank=drawn,
        choices=size.choices,
        seed=0,
    )
    rows = np.rint(trace.rows * (tokens * spec.num_devices / drawn)).astype(np.int64)
    trace = LoadTrace(rows, _ROUTING, size.choices)
    wanted = {"ep": 0}
    if spec.num_devices > 1:
        wanted |= {"fssdp": fit.extra_slots} if fit.extra_slots else {}
        is_more = fit.extra_slots_rematerialised > fit.extra_slots
        wanted |= {"fssdp-rm": fit.extra_slots_rematerialised} if is_more else {}
    workload = training_workload(size, spec, tokens=tokens, sequence_length=sequence_length, recompute=fit.recompute)
    found: list[dict[str, Any]] = []
    for name, slots in wanted.items():
        result = simulate(trace, policy(name), spec, workload, extra_slots=slots)
        # the first step has no history to plan from
        moe_ns = float(result.of("moe_ns")[1:].mean())
        step_ns = training_step_ns(size, spec, workload, moe_ns=moe_ns, tokens=tokens, sequence_length=sequence_length)
        found.append(
            {
                "policy": name,
                "extra_slots": slots,
                "moe_ms": moe_ns * size.layers / 1e6,
                "step_ms": step_ns / 1e6,
                "tokens_per_s": tokens * spec.num_devices * 1e9 / step_ns,
                "speedup_over_ep": (found[0]["step_ms"] if found else step_ns / 1e6) * 1e6 / step_ns,
                "imbalance": float(result.of("imbalance")[1:].mean()),
                "simulated": True,
            }
        )
    return found


def _say(console: Console, what: str, text: str) -> None:
    console.print(f"[bold]{what:<9}[/bold] {text}", highlight=False)
