"""Published results of placement systems beside what the simulator says of them.

    python -m raymoe.benchmarks.placement_published [--steps 220] [--json FILE] [--markdown FILE]

Routing is generated (presets of `raymoe.placement.generate`): what the papers routed is not public, nor are their batches. So
trends are compared, not digits; docs/placement.md says why each pair differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from raymoe.benchmarks.placement import gpt_layer, markdown, table, where
from raymoe.cluster_file import load_cluster
from raymoe.placement import ClusterSpec, LoadTrace, Plan, Policy, Simulation, Workload, policy, simulate
from raymoe.placement.fssdp import FssdpPaper
from raymoe.placement.generate import generate
from raymoe.placement.rivals import Eplb
from raymoe.telemetry import run_meta, write_json

COLUMNS = ("what", "source", "published", "simulated")
SKIP = 10
Row = dict[str, Any]


class MaterialisationOnly(FssdpPaper):
    """Algorithm 1 on even owners."""

    name = "fssdp-paper without re-sharding"
    interval: int | None = None


class EvenReplicas(Eplb):
    """Expert parallelism within every node, replicated over the nodes, as Megatron and FSDP+EP lay out few large experts."""

    name = "ep in every node"
    interval: int | None = None

    def prepare(self, history: np.ndarray, state: Any) -> Plan:
        """The start's replicas, whatever the loads; a row goes to its own node's."""
        return replace(super().prepare(history, state), dispatch="node")


def run(
    trace: LoadTrace, policies: Sequence[Policy], cluster: ClusterSpec, workload: Workload, slots: int
) -> list[Simulation]:
    return [simulate(trace, each, cluster, workload, extra_slots=slots) for each in policies]


def layer_ratio(slow: Simulation, fast: Simulation) -> np.ndarray:
    """By step and layer, flat."""
    return (slow.of("moe_ns") / fast.of("moe_ns"))[SKIP:].ravel()


def step_ns(simulation: Simulation, workload: Workload) -> float:
    """Mean over steps: layers with their attention, and re-sharding."""
    attention = workload.attention_ns * (1 + workload.backward_window)
    return float(((simulation.of("moe_ns") + attention).sum(axis=1) + simulation.reshard_ns)[SKIP:].mean())


def hecate(steps: int) -> list[Row]:
    """Cluster B, GPT-MoE-S: 32 GPUs, 64 experts, 12 layers."""
    cluster = load_cluster("hecate-b").spec
    trace = generate(
        "smartmoe",
        steps=steps,
        ranks=cluster.num_devices,
        layers=12,
        experts=64,
        tokens_per_rank=8192,
        choices=2,
        seed=0,
    )
    workload = gpt_layer(trace, cluster)
    ep, full, kept, remat = run(
        trace,
        [policy("ep"), policy("fssdp-paper"), MaterialisationOnly(), policy("fssdp-paper-rm")],
        cluster,
        workload,
        64,
    )
    (sharded,) = run(trace, [policy("fssdp-paper")], cluster, workload, 0)
    rivals = run(trace, [policy(name) for name in ("fastermoe", "smartmoe", "flexmoe")], cluster, workload, 4)
    best = min(step_ns(each, workload) for each in (ep, *rivals))
    ratios = layer_ratio(ep, full)
    low, high = np.percentile(ratios, [5, 95])
    mean = float(np.exp(np.log(ratios).mean()))
    total = {
        name: step_ns(each, workload)
        for name, each in (("full", full), ("kept", kept), ("sharded", sharded), ("rm", remat))
    }
    return [
        _row("MoE layer over EP, 32 GPUs, cluster B", "Hecate v1", "2.8-18.8x, geo-mean 11.9x",
             f"{low:.1f}-{high:.1f}x (p5-p95), geo-mean {mean:.1f}x"),
        _row("step over the best of EP, FasterMoE, SmartMoE, FlexMoE", "Hecate v1", "1.26-1.70x", f"{best / total['full']:.2f}x"),
        _row("full over sharding alone", "Hecate v1", "3.32x", f"{total['sharded'] / total['full']:.2f}x"),
        _row("full over materialisation alone", "Hecate v1", "1.27x", f"{total['kept'] / total['full']:.2f}x"),
        _row("re-materialisation slower than without", "Hecate v1", "7.5-16.9 %",
             f"{100 * (total['rm'] / total['full'] - 1):.1f} %"),
        _row("expert memory over EP", "Hecate v1", "+64 %", _more(full, ep)),
        _row("expert memory over EP, re-materialised", "Hecate v1", "+11.6 %", _more(remat, ep)),
    ]  # fmt: skip


def laer(steps: int) -> list[Row]:
    """32 A100s, two of the artifact's shapes, mildly skewed routing."""
    cluster = load_cluster("laer").spec
    over: dict[str, list[float]] = {"static": [], "flexmoe": []}
    for experts, choices, width, tokens in ((8, 2, 14_336, 8192), (16, 4, 7168, 8192)):
        trace = generate("modern", steps=steps, ranks=cluster.num_devices, layers=4, experts=experts,
                         tokens_per_rank=tokens, choices=choices, seed=0)  # fmt: skip
        workload = Workload.of_transformer(hidden_size=4096, expert_width=width, tokens=tokens, sequence_length=4096,
                                           flops_s=cluster.flops_s, choices=choices)  # fmt: skip
        static, flexmoe, ours = run(trace, [EvenReplicas(), policy("flexmoe"), policy("laer")], cluster, workload, 1)
        over["static"].append(step_ns(static, workload) / step_ns(ours, workload))
        over["flexmoe"].append(step_ns(flexmoe, workload) / step_ns(ours, workload))
    said = {
        name: " and ".join(f"{each:.2f}x" for each in ratios) + " (8 and 16 experts)" for name, ratios in over.items()
    }
    return [
        _row("LAER's step over static EP", "LAER artifact", "1.47x over Megatron (1.11-1.69), 1.42x over FSDP+EP", said["static"]),
        _row("LAER's step over FlexMoE", "LAER artifact", "1.20x (1.03-1.39)", said["flexmoe"]),
    ]  # fmt: skip


def fastermoe(steps: int) -> list[Row]:
    """Systems that name FasterMoE as their rival, on Hecate's cluster A with two nodes."""
    cluster = load_cluster("hecate-a", nodes=2).spec
    trace = generate("smartmoe", steps=steps, ranks=16, layers=4, experts=16, tokens_per_rank=8192, choices=2, seed=0)
    workload = gpt_layer(trace, cluster)
    ep, faster, prophet, smart = run(
        trace, [policy(name) for name in ("ep", "fastermoe", "pro-prophet", "smartmoe")], cluster, workload, 16
    )
    total = [step_ns(each, workload) for each in (ep, faster, prophet, smart)]
    return [
        _row("FasterMoE over EP, step", "FasterMoE-like", "not on public traces", f"{total[0] / total[1]:.2f}x"),
        _row("Pro-Prophet over FasterMoE, step", "Pro-Prophet", "1.01-1.48x", f"{total[1] / total[2]:.2f}x"),
        _row("SmartMoE over FasterMoE, step", "SmartMoE", "up to 1.88x", f"{total[1] / total[3]:.2f}x"),
    ]


def _row(what: str, source: str, published: str, simulated: str) -> Row:
    return dict(zip(COLUMNS, (what, source, published, simulated), strict=True))


def _more(one: Simulation, other: Simulation) -> str:
    return f"+{100 * (one.memory_bytes / other.memory_bytes - 1):.1f} %"


def main(arguments: list[str] | None = None) -> None:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=220, help="of each trace; re-sharding needs more than 100")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    rows = [*hecate(options.steps), *laer(options.steps), *fastermoe(options.steps)]
    title = "Published results beside simulated ones"
    Console(width=180).print(table(title, rows, COLUMNS))
    command = "python -m raymoe.benchmarks.placement_published"
    if options.json is not None:
        write_json(options.json, command, rows)
    if options.markdown is not None:
        head = where(run_meta(f"{command} --steps {options.steps}")) + "\n\n"
        options.markdown.write_text(f"# {title}\n\n{head}" + markdown(title, rows, COLUMNS))


if __name__ == "__main__":
    main()
