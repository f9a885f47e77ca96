"""What `raymoe plan --trace` found, for the screen and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raymoe.cluster_file import ClusterFile
from raymoe.commands.model_shape import ModelShape
from raymoe.placement import LoadTrace, Policy, Simulation, Workload
from raymoe.placement.advice import Advice


@dataclass(frozen=True)
class Comparison:
    """All that one run of the command found; times are simulated."""

    trace: LoadTrace
    """As seen from the cluster's ranks."""
    facts: dict[str, Any]
    """Of the trace."""
    cluster: ClusterFile
    shape: ModelShape
    sequence_length: int
    workload: Workload
    policies: list[Policy]
    simulations: list[Simulation]
    rows: list[dict[str, Any]]
    """Fastest first."""
    skip: int
    advice: Advice

    @property
    def lines(self) -> dict[str, str]:
        """Cluster, workload and trace, a line each."""
        shape, workload, trace = self.shape, self.workload, self.trace
        return {
            "cluster": f"{self.cluster.name}: {self.cluster.config.describe()}",
            "workload": (
                f"{shape.name}: {shape.num_layers} MoE layers of {shape.num_experts} experts, top-{shape.choices}, hidden size "
                f"{shape.hidden_size}, expert width {shape.expert_width} ({workload.expert_bytes / 1e6:.3g} MB), "
                f"{trace.tokens_per_rank} tokens a device, sequences of {self.sequence_length}"
            ),
            "trace": "; ".join(
                [f"{trace.name}: {trace.num_steps} steps, the first {self.skip} not counted", *self._facts()]
            ),
        }

    def _facts(self) -> Iterator[str]:
        facts = self.facts
        # none of them is known of a trace without rows, nor how one step goes on
        if "device_max_mean" in facts:
            yield f"busiest expert {facts['expert_max_mean']:.2f}x the mean"
            yield f"busiest device under ep {facts['device_max_mean']:.2f}x"
        if "drift" in facts:
            yield f"{100 * facts['drift']:.1f} % of the load moves from step to step"


def named(row: dict[str, Any]) -> str:
    """The row's policy, and whether it is one that cannot be run."""
    return row["policy"] + (" (bound)" if row["is_bound"] else "")


def shortly(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
