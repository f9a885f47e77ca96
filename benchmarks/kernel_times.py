"""Time one layer at one size: every rival on the same operands, rounds interleaved, each time beside its error.

T tokens, S = T*K routed rows, E experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raymoe.benchmarks.kernel_jobs import Journal, Row, describe
from raymoe.benchmarks.kernel_rivals import (
    AUTOTUNED,
    RIVALS,
    SEARCHED_SHAPES,
    Batch,
    Rival,
    Run,
    make_batch,
    reference,
    relative_error,
)
from raymoe.benchmarks.kernel_shapes import SHAPES, Shape, floor_bytes, floor_s, flops, layer_weights
from raymoe.kernels.stopwatch import interleaved, seconds

COLUMNS = ("shape", "tokens", "kind", "backend", "us", "tflops", "floor_share", "error", "spread", "peak_mib", "note")
# inputs and routings in turn; the active weights alone are larger than any cache
_SETS = 4
_ROUND_S, _SLOW_S = (0.01, 1.5)


@dataclass(frozen=True)
class Cell:
    """One line of the plan: a layer, a size, a kind of run."""

    shape: Shape
    tokens: int
    kind: str
    """forward | step | decode, as in `kernel_shapes.KINDS`."""
    distribution: str = "uniform"

    @property
    def name(self) -> str:
        return f"{self.label}/{self.tokens}/{self.kind}"

    @property
    def label(self) -> str:
        return self.shape.name + (f" {self.distribution}" if self.distribution != "uniform" else "")

    def row(self, backend: str) -> Row:
        return {"shape": self.label, "tokens": self.tokens, "kind": self.kind, "backend": backend}


def time_cell(
    cell: Cell,
    journal: Journal,
    device: torch.device,
    ceilings: tuple[float, float],
    *,
    dtype: torch.dtype = torch.bfloat16,
    rivals: Sequence[str] = tuple(RIVALS),
    rounds: int = 20,
) -> None:
    """Write a row for each rival to the journal; one that cannot run gives a row that says why."""
    generator = torch.Generator(device).manual_seed(cell.tokens)
    weights = layer_weights(cell.shape, dtype, generator)
    sets = [make_batch(cell.shape, cell.tokens, dtype, generator, cell.distribution, weights) for _ in range(_SETS)]
    is_step = cell.kind == "step"
    truth = reference(sets[0], is_step)
    works: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    fatal = journal.fatal()
    for rival in _entrants(cell, rivals, device):
        name = f"{cell.name}/{rival.name}"
        if name in fatal:
            continue
        with journal.piece(name, cell.row(rival.name)):
            prepared = _prepare(rival, cell, sets, truth, device)
            if prepared is not None:
                works[rival.name], rows[rival.name] = prepared
            else:
                journal.add({**cell.row(rival.name), "note": "not installed", "skipped": True})
    del truth
    is_replayed = {name for name, row in rows.items() if row["is_graph"]}
    # enough calls in a row that the first one's launch does not show; a replay runs every set once
    calls = {name: max(1, min(10, round(_ROUND_S / seconds(work, device)))) for name, work in works.items()}
    found = interleaved(works, device, rounds=rounds, calls=calls, budget_s=_SLOW_S)
    for name, times in found.items():
        per_run = [t / (_SETS if name in is_replayed else 1) for t in times]
        journal.add({**rows[name], **_measured(cell, sets, per_run, ceilings)})
    if device.type == "cuda":
        works.clear()
        torch.cuda.empty_cache()


def _entrants(cell: Cell, rivals: Sequence[str], device: torch.device) -> Iterator[Rival]:
    for name in rivals:
        rival = RIVALS[name]
        if rival.needs_cuda and device.type != "cuda":
            continue
        if cell.kind == "decode" and not rival.is_for_decode:
            continue
        if name in AUTOTUNED and cell.shape.name not in SEARCHED_SHAPES:
            continue
        yield rival


def _prepare(
    rival: Rival, cell: Cell, sets: list[Batch], truth: tuple[Tensor, ...], device: torch.device
) -> tuple[Callable[[], object], Row] | None:
    """What a round calls, and the row so far: error and peak memory; None where the rival is not installed."""
    try:
        run = rival.load()
    except ImportError:
        return None
    is_step = cell.kind == "step"
    # twice: what is tuned at its first call has its operands back
    run(sets[0], is_step)
    base = _reset_peak(device)
    got = run(sets[0], is_step)
    row = {**cell.row(rival.name), "peak_mib": _peak_mib(device, base), "is_graph": False, "note": ""}
    if rival.is_layer:
        row["error"] = relative_error(got, truth)
    del got
    if cell.kind == "decode" and rival.waits_for_host:
        row["note"] = "waits for the host: not capturable"
    elif cell.kind == "decode" and device.type == "cuda":
        try:
            replay, out = _captured(run, sets)
        except Exception as error:
            row["note"] = f"not capturable: {describe(error)[:80]}"
        else:
            replay()
            torch.cuda.synchronize()
            if rival.is_layer:
                row["error"] = relative_error(out, truth)
            return replay, {**row, "is_graph": True}
    turn = iter(range(10**9))
    return lambda: run(sets[next(turn) % len(sets)], is_step), row


def _captured(run: Run, sets: list[Batch]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """(replay of a CUDA graph that runs every set once, what it writes for the first)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in sets:
            run(batch, False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [run(batch, False) for batch in sets]
    return graph.replay, results[0]


def _measured(cell: Cell, sets: list[Batch], times: list[float], ceilings: tuple[float, float]) -> Row:
    rows = cell.tokens * cell.shape.top_k
    active = statistics.mean(batch.expert_index.unique().numel() for batch in sets)
    work = flops(cell.shape, rows, cell.kind)
    num_bytes = floor_bytes(cell.shape, cell.tokens, cell.kind, rows=rows, experts=round(active))
    median = statistics.median(times)
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    return {
        "us": median * 1e6,
        "tflops": work / median / 1e12,
        "floor_share": floor_s(work, num_bytes, *ceilings) / median,
        "spread": (quarters[2] - quarters[0]) / median,
        "rounds": len(times),
        "active_experts": active,
        "floor_bytes": num_bytes,
    }


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_mib(device: torch.device, base: int) -> float | None:
    """Of what a run allocates itself, results included, operands not."""
    return (torch.cuda.max_memory_allocated() - base) / 2**20 if device.type == "cuda" else None


def planned_cells() -> list[Cell]:
    """What a GPU run times, the targets' sizes first: where time runs out, what matters less is missing."""
    cells = [Cell(SHAPES["qwen3-30b"], 32768, "forward"), Cell(SHAPES["qwen3-30b"], 32768, "step")]
    cells += [Cell(SHAPES[name], tokens, "decode") for name in SEARCHED_SHAPES for tokens in (16, 64, 256)]
    cells += [Cell(SHAPES["mixtral-8x7b"], 32768, "forward")]
    cells += [Cell(SHAPES["olmoe"], 32768, kind) for kind in ("forward", "step")]
    cells += [Cell(SHAPES["mixtral-8x7b"], 32768, "step")]
    cells += [Cell(SHAPES["qwen3-30b"], 32768, kind, "zipf") for kind in ("forward", "step")]
    cells += [Cell(SHAPES[name], 4096, kind) for name in SEARCHED_SHAPES for kind in ("forward", "step")]
    cells += [Cell(SHAPES["vllm-44818"], tokens, "decode") for tokens in (1, 16, 64, 512, 1024, 2048, 4096)]
    cells += [Cell(SHAPES[name], tokens, "decode") for name in SEARCHED_SHAPES for tokens in (1, 4)]
    cells += [Cell(SHAPES[name], 8192, kind) for name in SEARCHED_SHAPES for kind in ("forward", "step")]
    cells += [Cell(SHAPES["qwen3-30b"], 32768, kind, "balanced") for kind in ("forward", "step")]
    cells += [Cell(SHAPES["deepseek-v3"], tokens, "decode") for tokens in (16, 256)]
    return [*cells, Cell(SHAPES["deepseek-v3"], 8192, "forward")]


def toy_cells() -> list[Cell]:
    """The same code at a size that a CPU does in a second."""
    toy = SHAPES["toy"]
    return [Cell(toy, 16, "forward"), Cell(toy, 16, "step", "zipf"), Cell(toy, 4, "decode")]
