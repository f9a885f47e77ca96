"""`raymoe plan --trace`: what placement policies would bring on a cluster, simulated on routing counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from raymoe.cluster_file import ClusterFile, load_cluster
from raymoe.commands.model_shape import ModelShape
from raymoe.commands.plan_found import Comparison, named, shortly
from raymoe.commands.plan_inputs import routing
from raymoe.placement import LoadTrace, Policy, Workload, policy, policy_names
from raymoe.placement.advice import advise
from raymoe.placement.compare import DEFAULT_SKIP, simulate_all, summarise, with_baseline
from raymoe.placement.loads import Forecast
from raymoe.placement.statistics import trace_statistics
from raymoe.telemetry import write_json


def plan_trace(
    trace: str,
    cluster: str,
    policies: str = "all",
    *,
    nodes: int | None = None,
    devices_per_node: int | None = None,
    hidden_size: int | None = None,
    expert_width: int | None = None,
    sequence_length: int = 4096,
    matrices: int | None = None,
    choices: int | None = None,
    layers: int | None = None,
    experts: int | None = None,
    tokens: int | None = None,
    model_config: Path | None = None,
    extra_slots: int | None = None,
    fan_out: str | None = None,
    forecast: Forecast = "mean",
    steps: int | None = None,
    seed: int = 0,
    console: Console,
    command: str,
    json: Path | None = None,
    report: Path | None = None,
) -> None:
    """Simulates the policies, prints a table and a recommendation, and writes them where asked.

    Args:
        trace: a Parquet file of routing counts, or the name of a generated workload.
        cluster: a preset or a YAML file; `nodes` and `devices_per_node` replace what it says.
        policies: names, comma-separated, or `all`.
        hidden_size, expert_width, matrices, choices: of the model; default: those of `model_config`, else of OLMoE-1B-7B,
            except that a file's own choices are believed before these.
        layers, experts, tokens: of a generated trace (tokens a device and step); a file has its own.
        extra_slots: copies a layer that a device may hold; default: what its memory has room for.
        fan_out: how copies travel; see `raymoe.placement.Workload`.
        forecast: what policies expect of the last steps; see `raymoe.placement.predict`.
        steps: of a file at most these; of a generated trace this many.

    Raises:
        ValueError: names what was given and what would be right.
    """
    chosen = [policy(name) for name in _names(policies)]
    machines = load_cluster(cluster, nodes=nodes, devices_per_node=devices_per_node)
    sizes = {"hidden_size": hidden_size, "expert_width": expert_width, "matrices": matrices, "choices": choices}
    counts, shape = routing(
        trace,
        machines,
        model_config,
        sizes | {"num_layers": layers, "num_experts": experts},
        tokens=tokens,
        steps=steps,
        seed=seed,
    )
    workload = Workload.of_transformer(
        hidden_size=shape.hidden_size,
        expert_width=shape.expert_width,
        tokens=counts.tokens_per_rank,
        sequence_length=sequence_length,
        flops_s=machines.spec.flops_s,
        choices=shape.choices,
        matrices=shape.matrices,
    )
    if fan_out is not None:
        workload = replace(workload, fan_out=fan_out)  # pyright: ignore[reportArgumentType]  (checked there)
    found = _compare(counts, machines, shape, sequence_length, workload, chosen, extra_slots, forecast, console)
    _print(found, console)
    if json is not None:
        write_json(json, command, found.rows, _meta(found, seed))
    if report is not None:
        # after the work: it imports matplotlib
        from raymoe.commands.plan_report import write_plan_report

        write_plan_report(report, found, command, seed)
        console.print(f"report: {report}", highlight=False)


def _names(policies: str) -> tuple[str, ...]:
    if policies == "all":
        # the exhaustive bound takes as long as all the others together
        return tuple(name for name in policy_names() if name != "fssdp-exhaustive")
    return tuple(dict.fromkeys(name.strip() for name in policies.split(",")))


def _compare(
    trace: LoadTrace,
    cluster: ClusterFile,
    shape: ModelShape,
    sequence_length: int,
    workload: Workload,
    chosen: Sequence[Policy],
    extra_slots: int | None,
    forecast: Forecast,
    console: Console,
) -> Comparison:
    policies = with_baseline(chosen)
    skip = min(DEFAULT_SKIP, trace.num_steps // 4)
    with _progress(console, [each.name for each in policies], trace.num_steps) as on_step:
        simulations = simulate_all(
            trace, policies, cluster.spec, workload, extra_slots=extra_slots, forecast=forecast, on_step=on_step
        )
    rows = summarise(simulations, trace, policies, cluster.spec, workload, extra_slots=extra_slots, skip=skip)
    sizes = {"num_steps": trace.num_steps - skip, "num_devices": trace.num_ranks, "num_experts": trace.num_experts}
    known = {fact: value for fact, value in trace_statistics(trace).items() if math.isfinite(value)}
    facts = known | sizes
    return Comparison(
        trace=trace,
        facts=facts,
        cluster=cluster,
        shape=shape,
        sequence_length=sequence_length,
        workload=workload,
        policies=policies,
        simulations=simulations,
        rows=sorted(rows, key=lambda row: row["step_ms"]),
        skip=skip,
        advice=advise(rows, facts),
    )


@contextmanager
def _progress(console: Console, names: Sequence[str], steps: int) -> Iterator[Callable[[], None]]:
    """A bar over all policies' steps that names the present one; on a console that is no terminal, a line a policy."""
    bar = Progress(
        TextColumn("[bold]simulating[/bold] {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(names[0], total=len(names) * steps)
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        number = done // steps
        bar.update(task, completed=done, description=names[min(number, len(names) - 1)])
        if done % steps == 0 and not console.is_terminal:
            console.print(f"simulated {number:>2}/{len(names)}  {names[number - 1]}", highlight=False)

    with bar:
        yield on_step


def _print(found: Comparison, console: Console) -> None:
    for name, line in found.lines.items():
        console.print(f"[bold]{name:<9}[/bold] {line}", highlight=False)
    console.print("All times are simulated: a cost model's, not measured.\n", highlight=False)
    table = Table()
    for column in (
        "policy",
        "step",
        "vs ep",
        "MoE layer",
        "vs ep",
        "of ideal",
        "imbalance",
        "moved a step",
        "experts take",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in found.rows:
        is_advised = row["policy"] == found.advice.policy
        table.add_row(*map(Text, _cells(row)), style="bold" if is_advised else "dim" if row["is_bound"] else None)
    console.print(table)
    if any(row["is_bound"] for row in found.rows):
        console.print("(bound): told the loads before the step; not a policy one can run.", highlight=False)
    console.print(Text(f"\n{found.advice.headline}", style="bold"))
    for reason in found.advice.reasons:
        console.print(Text(f"- {reason}"))


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        named(row),
        f"{shortly(row['step_ms'])} ms",
        f"{row['step_speedup_over_ep']:.2f}x",
        f"{shortly(row['moe_ms'])} ms",
        f"{row['speedup_over_ep']:.2f}x",
        f"{100 * row['ideal_share']:.0f} %",
        f"{row['imbalance']:.2f}",
        f"{shortly(row['bytes'] / 1e9)} GB",
        f"{shortly(row['memory_bytes'] / 1e9)} GB" + (", too much" if row["fits"] is False else ""),
    ]


def _meta(found: Comparison, seed: int) -> dict[str, Any]:
    return {
        "simulated": True,
        "seed": seed,
        "cluster": {"name": found.cluster.name, **found.cluster.config.model_dump(exclude_none=True)},
        "model": asdict(found.shape) | {"sequence_length": found.sequence_length},
        "workload": asdict(found.workload),
        "trace": {"name": found.trace.name, "skip": found.skip, **found.facts},
        "advice": asdict(found.advice),
    }
