"""The expert layer on a CPU: raymoe beside transformers' grouped_mm experts and oneDNN's packed weights, errors beside times.

    raymoe bench kernels [--json FILE]           (on a machine without CUDA)
    python -m raymoe.benchmarks.kernels_cpu [--shapes olmoe,mixtral-8x7b*0.5] [--tokens 1,16,512] [--json FILE] [--markdown FILE]

Inference: bf16, weights cold (together more than any cache, as in a model), every contender on the same operands, rounds
interleaved. `speedup` is the median over rounds of transformers' time over the contender's, with its quartiles; `floor_share` is
the rate at which the active experts' weights were read, over what one-row `F.linear` reaches on cold weights in the same rounds
(int8 counts its own, smaller weights). Training: forward and backward, with gradients allocated once; with `grad_into` the
kernels add to them, without it autograd does. Errors are relative to float64; of a step, the largest over output and gradients.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from raymoe.benchmarks.kernel_rivals import RIVALS, Batch, make_batch, reference, relative_error, transformers_layer
from raymoe.benchmarks.kernel_shapes import SHAPES, Shape, flops, layer_weights, scaled
from raymoe.kernels import moe_mlp, quantize_experts
from raymoe.kernels.stopwatch import interleaved
from raymoe.telemetry import run_meta, write_json

COLUMNS = ("shape", "tokens", "kind", "backend", "us", "tflops", "floor_share", "speedup", "spread", "error")
DEFAULT_SHAPES = ("olmoe", "mixtral-8x7b*0.5", "qwen3-30b*0.5")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STEP_TOKENS = (8, 64, 512)
RIVAL = "transformers grouped_mm"
_COLD_BYTES = 1 << 30
_BATCHES = 6
_PROBE_MATRICES = 32
Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer: `run(batch)` after `prepare` has seen every weight of the cell."""

    name: str
    prepare: Callable[[list[tuple[Tensor, Tensor]]], Callable[[Batch, int], Tensor]]
    """Weights of each copy -> (batch, index of its copy) -> [T, H]."""
    bytes_per_weight: float = 2


def _plain(name: str) -> Callable[..., Callable[[Batch, int], Tensor]]:
    def prepare(_copies: list[tuple[Tensor, Tensor]]) -> Callable[[Batch, int], Tensor]:
        run = RIVALS[name].load()
        return lambda batch, _copy: run(batch, False)[0]

    return prepare


def _int8(copies: list[tuple[Tensor, Tensor]]) -> Callable[[Batch, int], Tensor]:
    quantized = [quantize_experts(*copy, torch.int8) for copy in copies]

    def run(batch: Batch, copy: int) -> Tensor:
        gate_up, down, scales = quantized[copy]
        with torch.no_grad():
            return moe_mlp(batch.hidden, gate_up, down, batch.expert_index, batch.expert_weight, scales=scales)

    return run


def _packed(copies: list[tuple[Tensor, Tensor]]) -> Callable[[Batch, int], Tensor]:
    """A loop over active experts whose weights oneDNN has re-ordered once: twice the memory, or no dense weights."""
    ops = torch.ops.mkldnn
    packed = [[[ops._reorder_linear_weight(m, 16) for m in weight] for weight in copy] for copy in copies]

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return ops._linear_pointwise(x, weight, None, "none", [], "")

    @torch.no_grad()
    def run(batch: Batch, copy: int) -> Tensor:
        num_experts, top_k = batch.gate_up.shape[0], batch.expert_index.shape[1]
        order = batch.expert_index.flatten().argsort(stable=True)
        counts = batch.expert_index.flatten().bincount(minlength=num_experts).tolist()
        rows = []
        for e, x in enumerate(batch.hidden[order // top_k].split(counts)):
            if len(x):
                gate, up = linear(x, packed[copy][0][e]).chunk(2, dim=-1)
                rows.append(linear(F.silu(gate) * up, packed[copy][1][e]))
        weighted = torch.cat(rows).float() * batch.expert_weight.flatten()[order, None]
        out = torch.zeros(batch.hidden.shape).index_add_(0, order // top_k, weighted)
        return out.to(batch.hidden.dtype)

    return run


CONTENDERS = (
    Contender(RIVAL, _plain(RIVAL)),
    Contender("raymoe", _plain("raymoe")),
    Contender("raymoe again", _plain("raymoe")),
    Contender("raymoe torch", _plain("raymoe torch")),
    Contender("oneDNN packed", _packed),
    Contender("raymoe int8", _int8, bytes_per_weight=1),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(DEFAULT_SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--step-tokens", default=",".join(map(str, STEP_TOKENS)))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args(argv)
    run(
        [shape_of(name) for name in arguments.shapes.split(",")],
        [int(n) for n in arguments.tokens.split(",") if n],
        [int(n) for n in arguments.step_tokens.split(",") if n],
        arguments.rounds,
        Console(width=140),
        json=arguments.json,
        markdown=arguments.markdown,
    )


def shape_of(name: str) -> Shape:
    """A shape by its name, `olmoe` or, with H and I scaled, `mixtral-8x7b*0.5`.

    Raises:
        ValueError: an unknown name.
    """
    base, _, width = name.partition("*")
    if base not in SHAPES:
        raise ValueError(
            f"shape {base!r} is not known; use one of {', '.join(SHAPES)}, or one of them times a width: olmoe*0.5"
        )
    return scaled(SHAPES[base], float(width)) if width else SHAPES[base]


def run(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    step_tokens: Sequence[int],
    rounds: int,
    console: Console,
    *,
    json: Path | None = None,
    markdown: Path | None = None,
) -> list[Row]:
    """Times every cell, prints a table for each as it comes, and writes all of them."""
    command = "python -m raymoe.benchmarks.kernels_cpu " + " ".join(
        f"--{name} {','.join(map(str, values))}"
        for name, values in (("shapes", [s.name for s in shapes]), ("tokens", tokens), ("step-tokens", step_tokens))
    )
    rows: list[Row] = []
    with console.status("kernels on this CPU"):
        for shape in shapes:
            for found in _cells(shape, tokens, step_tokens, rounds):
                console.print(_table(found))
                rows += found
    meta = {"threads": torch.get_num_threads(), "rounds": rounds}
    if json:
        write_json(json, command, rows, meta)
    if markdown:
        markdown.write_text(_markdown(command, rows, meta), encoding="utf-8")
    return rows


def _cells(shape: Shape, tokens: Sequence[int], step_tokens: Sequence[int], rounds: int) -> Iterator[list[Row]]:
    generator = torch.Generator().manual_seed(0)
    num_copies = -(-_COLD_BYTES // (shape.num_experts * shape.expert_numel * 2))
    copies = [layer_weights(shape, torch.bfloat16, generator) for _ in range(num_copies)]
    prepared = {contender.name: contender.prepare(copies) for contender in CONTENDERS}
    for count in tokens:
        batches = [
            make_batch(shape, count, torch.bfloat16, generator, weights=copies[i % num_copies]) for i in range(_BATCHES)
        ]
        yield time_inference(shape, count, batches, num_copies, prepared, rounds)
    for count in step_tokens:
        yield time_step(shape, count, copies[0], generator, max(rounds // 3, 5))


def time_inference(
    shape: Shape,
    tokens: int,
    batches: list[Batch],
    num_copies: int,
    prepared: dict[str, Callable[[Batch, int], Tensor]],
    rounds: int,
) -> list[Row]:
    """A row for each contender, at one size."""
    truth = reference(batches[0], False)
    errors = {name: relative_error((call(batches[0], 0),), truth) for name, call in prepared.items()}

    def all_batches(call: Callable[[Batch, int], Tensor]) -> Callable[[], object]:
        return lambda: [call(batch, i % num_copies) for i, batch in enumerate(batches)]

    works = {name: all_batches(call) for name, call in prepared.items()}
    # a new routing is a new set of sizes, and each size is compiled at its first call
    for work in works.values():
        work()
    works["probe"] = _probe(shape.hidden_size)
    found = interleaved(works, torch.device("cpu"), rounds=rounds)
    probe_rate = _PROBE_MATRICES * shape.hidden_size**2 * 2 / statistics.median(found.pop("probe"))
    active = statistics.mean(batch.expert_index.unique().numel() for batch in batches)
    rows = []
    for contender in CONTENDERS:
        times = [t / len(batches) for t in found[contender.name]]
        read = active * shape.expert_numel * contender.bytes_per_weight / statistics.median(times)
        rows.append(
            {
                **_row(
                    shape,
                    tokens,
                    "decode" if tokens <= 16 else "forward",
                    contender.name,
                    times,
                    errors[contender.name],
                ),
                **_ratios([a / len(batches) for a in found[RIVAL]], times),
                "floor_share": read / probe_rate,
                "probe_gb_per_s": probe_rate / 1e9,
                "active_experts": active,
            }
        )
    return rows


def _probe(size: int) -> Callable[[], object]:
    """One row through square matrices that are cold: more than 1 GB of them in turn."""
    matrices = torch.randn(-(-_COLD_BYTES // (size * size * 2)), size, size, dtype=torch.bfloat16)
    row = torch.randn(1, size, dtype=torch.bfloat16)
    turn = itertools.count()

    @torch.no_grad()
    def run() -> None:
        for _ in range(_PROBE_MATRICES):
            F.linear(row, matrices[next(turn) % len(matrices)])

    return run


def time_step(
    shape: Shape, tokens: int, weights: tuple[Tensor, Tensor], generator: torch.Generator, rounds: int
) -> list[Row]:
    """Forward and backward: a row for each way to the same gradients."""
    batch = make_batch(shape, tokens, torch.bfloat16, generator, weights=weights)
    truth = reference(batch, True)
    into = (torch.zeros_like(batch.gate_up), torch.zeros_like(batch.down))
    batch.gate_up.grad, batch.down.grad = into
    transformers = transformers_layer("grouped_mm")
    operands = (batch.hidden, batch.gate_up, batch.down, batch.expert_index, batch.expert_weight)
    layers: dict[str, Callable[[], Tensor]] = {
        RIVAL: lambda: transformers(batch),
        "raymoe": lambda: moe_mlp(*operands),
        "raymoe grad_into": lambda: moe_mlp(*operands, grad_into=into),
    }

    def step(layer: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            batch.hidden.grad = batch.expert_weight.grad = None
            out = layer()
            out.backward(batch.grad_out)
            return out.detach(), *(x.grad for x in batch[:4] if x.grad is not None)

        return run

    works = {name: step(layer) for name, layer in layers.items()}
    errors = {}
    for name, work in works.items():
        for buffer in into:
            buffer.zero_()
        errors[name] = relative_error(work(), truth)
    found = interleaved(works, torch.device("cpu"), rounds=rounds)
    batch.gate_up.grad = batch.down.grad = None
    return [
        {**_row(shape, tokens, "step", name, times, errors[name]), **_ratios(found[RIVAL], times)}
        for name, times in found.items()
    ]


def _row(shape: Shape, tokens: int, kind: str, backend: str, times: list[float], error: float) -> Row:
    median = statistics.median(times)
    return {
        "shape": shape.name,
        "tokens": tokens,
        "kind": kind,
        "backend": backend,
        "us": median * 1e6,
        "tflops": flops(shape, tokens * shape.top_k, "step" if kind == "step" else "forward") / median / 1e12,
        "error": error,
    }


def _ratios(theirs: list[float], ours: list[float]) -> Row:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(theirs, ours, strict=True)], n=4)
    return {"speedup": middle, "spread": f"{low:.2f}-{high:.2f}"}


def _cell_text(row: Row, column: str) -> str:
    value = row.get(column)
    match column:
        case "us":
            return f"{value:,.0f}"
        case "tflops":
            return f"{value:.3f}"
        case "floor_share":
            return "" if value is None else f"{value:.0%}"
        case "speedup":
            return f"{value:.2f}"
        case "error":
            return f"{value:.1e}"
        case _:
            return str(value)


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"{rows[0]['shape']}, {rows[0]['tokens']} tokens")
    for column in COLUMNS[2:]:
        table.add_column(column, justify="left" if column in ("kind", "backend") else "right")
    for row in rows:
        table.add_row(*(_cell_text(row, column) for column in COLUMNS[2:]))
    return table


def _markdown(command: str, rows: list[Row], more: Row) -> str:
    meta = run_meta(command)
    lines = [
        "# Expert kernels on a CPU",
        "",
        f"`{command}`, {meta['date'][:10]}",
        "",
        f"{meta['host']['cpu']}, {meta['host']['cores']} cores, {more['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version)
        + f". Medians of {more['rounds']} interleaved rounds. What the columns mean stands in `benchmarks/kernels_cpu.py`.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(_cell_text(row, column) for column in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
