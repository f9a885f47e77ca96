"""`raymoe plan`: three questions, one command."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from raymoe.cli_shared import Json, shown_command, shown_console

PLAN_HELP = """Say what a placement policy would bring, or whether a model fits, before anyone rents the cluster.

--trace F --cluster C simulates policies on routing counts; --model M says whether a model fits and about how fast;
--measure writes down the live Ray cluster as a cluster file."""

_TRACE, _MODEL, _MEASURE = "With --trace", "With --model", "With --measure"


def _option(text: str, panel: str, *names: str):
    return typer.Option(*names, help=text, rich_help_panel=panel)


def plan_command(
    trace: Annotated[
        str | None,
        typer.Option(help="Parquet file of routing counts, or a generated one: smartmoe, modern, bursts, W3 ..."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory or config.json.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the live Ray cluster.")] = False,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster file, or a preset: hecate-a, h100, gb200-nvl72 ...")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes, instead of the cluster file's.")] = None,
    devices_per_node: Annotated[int | None, typer.Option(help="Devices a node, instead of the cluster file's.")] = None,
    json: Json = None,
    policies: Annotated[str, _option("Names, comma-separated, or all.", _TRACE)] = "all",
    report: Annotated[Path | None, _option("HTML page with pictures.", _TRACE)] = None,
    model_config: Annotated[Path | None, _option("config.json or directory to take the sizes from.", _TRACE)] = None,
    hidden_size: Annotated[int | None, _option("Of the model.", _TRACE)] = None,
    expert_width: Annotated[int | None, _option("Of an expert.", _TRACE)] = None,
    matrices: Annotated[int | None, _option("Of an expert: 3 gated, 2 not.", _TRACE)] = None,
    choices: Annotated[int | None, _option("Experts a token takes.", _TRACE)] = None,
    layers: Annotated[int | None, _option("Of a generated trace.", _TRACE)] = None,
    experts: Annotated[int | None, _option("Of a generated trace.", _TRACE)] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens a device takes in a step.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 4096,
    extra_slots: Annotated[int | None, _option("Copies a layer a device may hold; default: what fits.", _TRACE)] = None,
    fan_out: Annotated[str | None, _option("How copies travel: p2p, hierarchical, chain.", _TRACE)] = None,
    forecast: Annotated[
        Literal["mean", "last", "exponential"], _option("What policies make of the last steps.", _TRACE)
    ] = "mean",
    steps: Annotated[int | None, _option("Steps to simulate.", _TRACE)] = None,
    seed: Annotated[int, _option("Of a generated trace.", _TRACE)] = 0,
    purpose: Annotated[Literal["train", "serve"], _option("What for.", _MODEL, "--for")] = "serve",
    context: Annotated[int, _option("Tokens a request holds.", _MODEL)] = 4096,
    batch: Annotated[int, _option("Requests that decode at once.", _MODEL)] = 16,
    expert_memory: Annotated[str | None, _option("Of a device for experts: 40% of all, or 20GiB.", _MODEL)] = None,
    output: Annotated[Path, _option("Cluster file to write.", _MEASURE)] = Path("cluster.yaml"),
    workers: Annotated[int | None, _option("Probes; default: one a GPU, or two a node on CPUs.", _MEASURE)] = None,
    local: Annotated[bool, _option("Start a cluster on this machine for it.", _MEASURE, "--local")] = False,
) -> None:
    """One of the three; the help says which options go with which."""
    asked = [name for name, value in (("--trace", trace), ("--model", model), ("--measure", measure)) if value]
    if len(asked) != 1:
        raise ValueError(f"give exactly one of --trace, --model and --measure{f', not {len(asked)}' if asked else ''}")
    common = {"console": shown_console(), "command": shown_command(), "json": json}
    if measure:
        from raymoe.commands.measure import measure as measure_cluster

        measure_cluster(output, workers=workers, local=local, **common)
    elif model is not None:
        from raymoe.commands.fit import plan_model

        plan_model(model, purpose, cluster, nodes=nodes, devices_per_node=devices_per_node, tokens=tokens or 4096,
                   sequence_length=sequence_length, context=context, batch=batch, expert_memory=expert_memory,
                   **common)  # fmt: skip
    else:
        from raymoe.commands.plan import plan_trace

        if trace is None or cluster is None:
            raise ValueError("--trace needs --cluster: a cluster file, or a preset such as hecate-a or h100")
        plan_trace(trace, cluster, policies, nodes=nodes, devices_per_node=devices_per_node, hidden_size=hidden_size,
                   expert_width=expert_width, sequence_length=sequence_length, matrices=matrices, choices=choices,
                   layers=layers, experts=experts, tokens=tokens, model_config=model_config, extra_slots=extra_slots,
                   fan_out=fan_out, forecast=forecast, steps=steps, seed=seed, report=report, **common)  # fmt: skip
