"""What placement policies bring, simulated: our targets on measured and generated routing, and the time of planning itself.

    python -m raymoe.benchmarks.placement [--trace FILE] [--only trace,presets,planning]
                                          [--json FILE] [--markdown FILE] [--plot FILE]

`--trace` is a file of routing counts, e.g. the SmartMoE artifact's 16 ranks x 24 layers x 32 experts; without it that part is
left out and said to be. Times of layers and steps are the cost model's; times of planning are measured here, on one core.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from raymoe.cluster_file import load_cluster
from raymoe.placement import (
    Base,
    ClusterSpec,
    LoadTrace,
    PlacementState,
    Policy,
    Simulation,
    Workload,
    even_owners,
    policy,
    policy_names,
    simulate,
)
from raymoe.placement.compare import simulate_all, summarise
from raymoe.placement.generate import generate
from raymoe.placement.imbalance import WORKLOADS, imbalance_trace
from raymoe.telemetry import load_counts, run_meta, write_json

Row = dict[str, Any]
WINDOW = 5
BOUNDS = ("fssdp-known", "fssdp-exhaustive")
OURS = ("fssdp", "fssdp-rm")
COLUMNS = ("cell", "policy", "moe_ms", "step_ms", "speedup_over_ep", "step_speedup_over_ep", "ideal_share", "imbalance",
           "exposed_ms", "bytes", "memory_bytes", "copies", "plan_ms")  # fmt: skip
PRESETS = ("smartmoe", "modern", "bursts", "early", "zipf", "balanced", *WORKLOADS)
OURS_PLANNED = ("fssdp-paper", "fssdp")
PLANNERS = (*OURS_PLANNED, "laer")
_RIVALS_UP_TO = 256  # theirs take seconds beyond
PLANNED = ((8, 64), (16, 64), (64, 64), (256, 128), (1024, 256), (4096, 256))


def trace_cells(path: Path) -> Iterator[tuple[str, LoadTrace, ClusterSpec, Workload]]:
    """Routing of a file on Hecate's clusters, on as many devices as it has ranks and on twice as many."""
    columns = load_counts(path)
    trace = LoadTrace.of_columns(
        {key: columns[key] for key in ("step", "layer", "rank", "counts")},
        name=path.stem,
        choices=columns["choices"] or 2,
    )
    for cluster in ("hecate-a", "hecate-b"):
        for nodes in (2, 4):
            machines = load_cluster(cluster, nodes=nodes, devices_per_node=8).spec
            split = trace.for_ranks(machines.num_devices)
            yield f"{cluster} {nodes}x8", split, machines, gpt_layer(split, machines)


def gpt_layer(trace: LoadTrace, cluster: ClusterSpec) -> Workload:
    """Hecate's GPT-MoE-S: hidden size 768, two matrices of width 1536, sequences of 2,048, fp16."""
    return Workload.of_transformer(
        hidden_size=768,
        expert_width=1536,
        tokens=trace.tokens_per_rank,
        sequence_length=2048,
        flops_s=cluster.flops_s,
        choices=trace.choices,
        matrices=2,
    )


def preset_cells(steps: int) -> Iterator[tuple[str, LoadTrace, ClusterSpec, Workload]]:
    """Every generated workload on an old and on a modern cluster."""
    sizes = {"steps": steps, "layers": 2, "experts": 64, "tokens_per_rank": 4096, "seed": 0}
    for name in PRESETS:
        make = generate if name not in WORKLOADS else imbalance_trace
        for cluster, choices, layer in (("hecate-a", 2, gpt_layer), ("h100", 8, modern_layer)):
            machines = load_cluster(cluster, nodes=2, devices_per_node=8).spec
            trace = make(name, ranks=machines.num_devices, choices=choices, **sizes)
            yield f"{name} {cluster} 2x8", trace, machines, layer(trace, machines)


def modern_layer(trace: LoadTrace, cluster: ClusterSpec) -> Workload:
    """Sizes of Qwen3-30B-A3B: hidden size 2,048, gated experts of width 768, sequences of 4,096, bf16."""
    return Workload.of_transformer(
        hidden_size=2048,
        expert_width=768,
        tokens=trace.tokens_per_rank,
        sequence_length=4096,
        flops_s=cluster.flops_s,
        choices=trace.choices,
    )


def run_cell(
    name: str, trace: LoadTrace, cluster: ClusterSpec, workload: Workload, skip: int, exhaustive_every: int
) -> tuple[list[Row], dict[str, float]]:
    """All policies on one trace and cluster, as many copies as they like: rows, and how ours stands."""
    slots = trace.num_experts
    policies = [policy(each) for each in policy_names() if each != "fssdp-exhaustive"]
    simulations = simulate_all(trace, policies, cluster, workload, extra_slots=slots, window=WINDOW)
    rows = summarise(simulations, trace, policies, cluster, workload, extra_slots=slots, skip=skip)
    rows = [{"cell": name, **row} for row in rows]
    by_name = {each.policy: each for each in simulations}
    chosen = slice(skip, None, exhaustive_every)
    known = simulate(trace.steps(chosen), policy("fssdp-exhaustive"), cluster, workload, extra_slots=slots)
    ours = geometric_mean(by_name["fssdp"].of("moe_ns")[chosen])
    rivals = [row for row in rows if not row["is_bound"] and row["policy"] not in OURS]
    best = min(rivals, key=lambda row: row["moe_ms"])
    mine = next(row for row in rows if row["policy"] == "fssdp")
    paper = next(row for row in rows if row["policy"] == "fssdp-paper")
    return rows, {
        "over_paper": paper["moe_ms"] / mine["moe_ms"],
        "over_paper_with_attention": paper["step_ms"] / mine["step_ms"],
        "behind_known": ratio(by_name["fssdp"], by_name["fssdp-known"], skip) - 1,
        "behind_exhaustive": ours / geometric_mean(known.of("moe_ns")) - 1,
        "behind_best_rival": mine["moe_ms"] / best["moe_ms"] - 1,
        "best_rival": best["policy"],
    }


def geometric_mean(ns: np.ndarray) -> float:
    return float(np.exp(np.log(ns[ns > 0]).mean()))


def ratio(one: Simulation, other: Simulation, skip: int) -> float:
    return geometric_mean(one.of("moe_ns")[skip:]) / geometric_mean(other.of("moe_ns")[skip:])


def planning_rows(repeats: int) -> list[Row]:
    """Measured: planning a step of all layers, by a layer, and one layer's calibration; slots for all experts and for two."""
    rows = []
    for num_devices, num_experts in PLANNED:
        num_layers = 24 if num_devices < 256 else 4
        cluster = load_cluster("h100", nodes=num_devices // 8, devices_per_node=8).spec
        rng = np.random.default_rng(0)
        history = rng.zipf(1.3, size=(WINDOW, num_layers, num_experts)).clip(max=10**6)
        sudden = rng.multinomial(65_536, rng.dirichlet(np.ones(num_experts)), size=num_devices)
        workload = Workload.of_transformer(hidden_size=2048, expert_width=768, tokens=8192, sequence_length=4096,
                                           flops_s=cluster.flops_s, choices=8)  # fmt: skip
        base = Base.of_owners(even_owners(num_layers, num_experts, num_devices), num_devices)
        for slots in (num_experts, 2):
            state = PlacementState(base, cluster, workload, extra_slots=slots)
            for name in PLANNERS if num_devices <= _RIVALS_UP_TO else OURS_PLANNED:
                prepare, calibrate = planning_ms(policy(name), history, sudden, state, repeats)
                rows.append(
                    {
                        "devices": num_devices,
                        "experts": num_experts,
                        "slots": slots,
                        "policy": name,
                        "prepare_ms": prepare / num_layers,
                        "calibrate_ms": calibrate,
                    }
                )
    return rows


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time of planning a layer over devices, log-log, one line a policy and number of slots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name in PLANNERS:
        for few, style in ((False, "-"), (True, "--")):
            line = [row for row in rows if row["policy"] == name and (row["slots"] == 2) == few]
            label = f"{name}, {'2 slots' if few else 'slots for all'}"
            axes.plot(
                [row["devices"] for row in line], [row["prepare_ms"] for row in line], style, marker="o", label=label
            )
    axes.set(xscale="log", yscale="log", xlabel="devices (64, 128 and 256 experts)", ylabel="ms a layer, one core")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def planning_ms(
    planner: Policy, history: np.ndarray, sudden: np.ndarray, state: PlacementState, repeats: int
) -> tuple[float, float]:
    """Planning a step of all layers, and calibrating one."""
    plan = planner.prepare(history, state)
    prepare = timed(lambda: planner.prepare(history, state), repeats)
    return prepare, timed(lambda: planner.calibrate(0, sudden, plan, state), repeats)


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median of some runs, in milliseconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def table(title: str, rows: Sequence[Row], columns: Sequence[str]) -> Table:
    shown = Table(*columns, title=title)
    for row in rows:
        shown.add_row(*(_text(row[column]) for column in columns))
    return shown


def markdown(title: str, rows: Sequence[Row], columns: Sequence[str]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_text(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def where(meta: dict[str, Any]) -> str:
    """Command, date, machine and versions, a line each."""
    facts = ", ".join(f"{name} {value}" for name, value in (meta["host"] | meta["versions"]).items() if value)
    return f"`{meta['command']}`, {meta['date'][:10]}\n\n{facts}"


def _public(arguments: Sequence[str]) -> list[str]:
    """The arguments with files by their names alone."""
    return [Path(each).name if "/" in each else each for each in arguments]


def main(arguments: list[str] | None = None) -> None:
    """Runs what was asked for, prints it, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="routing counts, Parquet")
    parser.add_argument("--only", default="trace,presets,planning")
    parser.add_argument("--every", type=int, default=1, help="take each n-th step of the trace")
    parser.add_argument("--steps", type=int, default=60, help="of generated traces")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, help="picture of the planning times, .svg or .png")
    options = parser.parse_args(arguments)
    console, only = Console(width=200), options.only.split(",")
    parts: dict[str, tuple[list[Row], tuple[str, ...]]] = {}
    cells: list[tuple[str, LoadTrace, ClusterSpec, Workload]] = []
    if "trace" in only and options.trace is not None:
        cells += [
            (name, trace.steps(slice(None, None, options.every)), cluster, workload)
            for name, trace, cluster, workload in trace_cells(options.trace)
        ]
    elif "trace" in only:
        console.print("no --trace: the part on measured routing is left out")
    if "presets" in only:
        cells += list(preset_cells(options.steps))
    rows, standing = [], []
    for name, trace, cluster, workload in cells:
        policies, ours = run_cell(name, trace, cluster, workload, 10, max(1, trace.num_steps // 14))
        console.print(table(name, policies, COLUMNS[1:]))
        rows += policies
        standing.append({"cell": name, **ours})
    if rows:
        parts["How ours stands (simulated; shares behind: 0.02 is 2 % slower)"] = standing, tuple(standing[0])
        parts["Policies (simulated)"] = rows, COLUMNS
        console.print(table("standing", standing, tuple(standing[0])))
    if "planning" in only:
        planned = planning_rows(repeats=7)
        parts["Time of planning (measured, one core)"] = planned, tuple(planned[0])
        console.print(table("planning", planned, tuple(planned[0])))
        if options.plot is not None:
            plot(planned, options.plot)
    meta = run_meta(shlex.join(["python", "-m", "raymoe.benchmarks.placement", *_public(arguments or sys.argv[1:])]))
    if options.json is not None:
        everything = [{"part": title, **row} for title, (of_part, _) in parts.items() for row in of_part]
        write_json(options.json, meta["command"], everything)
    if options.markdown is not None:
        head = f"# Placement\n\n{where(meta)}\n\n"
        options.markdown.write_text(head + "\n".join(markdown(title, *part) for title, part in parts.items()))


if __name__ == "__main__":
    main()
