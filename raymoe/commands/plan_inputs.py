"""What `raymoe plan --trace` simulates: routing counts from a file or made up, and the model they are taken to be of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from raymoe.cluster_file import ClusterFile
from raymoe.commands.model_shape import ModelShape, shape_of_model
from raymoe.placement import LoadTrace
from raymoe.placement.generate import PRESETS, generate
from raymoe.placement.imbalance import WORKLOADS, imbalance_trace
from raymoe.telemetry import load_counts

DEFAULT_SHAPE = ModelShape("experts as in OLMoE-1B-7B", 2048, 1024, 3, num_layers=16, num_experts=64, choices=8)
"""Of experts, and of generated traces, where neither options nor a model configuration say otherwise."""

DEFAULT_TOKENS = 8192
"""Tokens a device takes in a step of a generated trace."""

_STEPS = 120
_LAYERS = 4
"""Of generated traces without a model: layers are alike, so more of them say little more and take longer."""


def routing(
    trace: str,
    cluster: ClusterFile,
    model_config: Path | None,
    sizes: Mapping[str, int | None],
    *,
    tokens: int | None,
    steps: int | None,
    seed: int,
) -> tuple[LoadTrace, ModelShape]:
    """The counts, as seen from the cluster's ranks, and the sizes of the model, with the counts' own layers and experts.

    Args:
        trace: a Parquet file, or the name of a generated trace.
        sizes: fields of ``ModelShape`` that the user gave; they go before ``model_config``, and that before what a file
            says of its choices and before ``DEFAULT_SHAPE``.
        tokens: a device and step, of a generated trace.
        steps: at most, of a file; exactly, of a generated trace.

    Raises:
        ValueError: an unknown name, sizes that contradict the file, or ranks that cannot be split over the cluster.
    """
    given = {field: value for field, value in sizes.items() if value is not None}
    for option, value in (given | {"tokens": tokens or 1, "steps": 1 if steps is None else steps}).items():
        if value < 1:
            raise ValueError(f"--{option.removeprefix('num_').replace('_', '-')} is {value}; it must be at least 1")
    model = None if model_config is None else shape_of_model(model_config)
    shape = replace(model or replace(DEFAULT_SHAPE, num_layers=_LAYERS), **given)
    if {"hidden_size", "expert_width", "matrices"} & set(given):
        shape = replace(shape, name="sizes as given")
    if Path(trace).is_file():
        if tokens is not None or {"num_layers", "num_experts"} & set(given):
            raise ValueError("--layers, --experts and --tokens are for generated traces; a file has its own")
        counts, shape = _read(Path(trace), shape, steps, is_chosen=model is not None or "choices" in given)
        if model is not None and model.num_experts != counts.num_experts:
            raise ValueError(
                f"{trace} counts {counts.num_experts} experts a layer, the model of --model-config has "
                f"{model.num_experts}: give the configuration of the model that was traced"
            )
    else:
        num_ranks = cluster.spec.num_devices
        counts = _generated(trace, shape, num_ranks, tokens or DEFAULT_TOKENS, steps or _STEPS, seed)
    try:
        return counts.for_ranks(cluster.spec.num_devices), shape
    except ValueError as error:
        raise ValueError(f"{error}; --nodes and --devices-per-node change the cluster's") from None


def _read(path: Path, shape: ModelShape, steps: int | None, *, is_chosen: bool) -> tuple[LoadTrace, ModelShape]:
    columns = load_counts(path)
    said = columns.pop("choices")
    choices = shape.choices if is_chosen else said
    if choices is None:
        raise ValueError(f"{path} does not say how many experts a token took: give --choices, or --model-config")
    trace = LoadTrace.of_columns(columns, name=path.stem, choices=choices).steps(slice(steps))
    return trace, replace(shape, choices=choices, num_layers=trace.num_layers, num_experts=trace.num_experts)


def _generated(name: str, shape: ModelShape, ranks: int, tokens: int, steps: int, seed: int) -> LoadTrace:
    if name not in PRESETS and name not in {*WORKLOADS, *(each.partition("_")[0] for each in WORKLOADS)}:
        raise ValueError(
            f"--trace {name}: no such file, and no generated trace of that name; "
            f"there are: {', '.join((*PRESETS, *WORKLOADS))}"
        )
    return (generate if name in PRESETS else imbalance_trace)(
        name,
        steps=steps,
        ranks=ranks,
        layers=shape.num_layers,
        experts=shape.num_experts,
        tokens_per_rank=tokens,
        choices=shape.choices,
        seed=seed,
    )
