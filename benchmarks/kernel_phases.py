"""What a worker of the GPU run does in each phase: named pieces that write rows to a journal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from raymoe.benchmarks.kernel_checks import layer_checks
from raymoe.benchmarks.kernel_gemm_checks import gemm_checks
from raymoe.benchmarks.kernel_jobs import Journal, Row, run_pieces
from raymoe.benchmarks.kernel_rivals import RIVALS, SEARCHED_SHAPES
from raymoe.benchmarks.kernel_shapes import SHAPES
from raymoe.benchmarks.kernel_times import Cell, planned_cells, time_cell, toy_cells
from raymoe.kernels.configs import KINDS, GemmConfig, table_of, table_path, write_table
from raymoe.kernels.gemm_cases import label
from raymoe.kernels.stopwatch import copy_ceiling, matmul_ceiling
from raymoe.kernels.tuner import BUCKETS, tune

Pieces = dict[str, Callable[[Journal], None]]

_TUNED_FOR = SEARCHED_SHAPES
# training has more rows than that: what decoding needs is up and down
_FEWEST_TRAINING_ROWS = 16


def journal_of(out: Path, phase: str, shard: int = 0) -> Journal:
    return Journal(out / f"{phase}-{shard}.jsonl")


def rows_of(out: Path, phase: str) -> list[Row]:
    """What all workers of a phase have written."""
    return [row for path in sorted(out.glob(f"{phase}-*.jsonl")) for row in Journal(path).rows()]


def work(phase: str, out: Path, deadline: float, *, is_quick: bool, shard: int = 0, num_shards: int = 1) -> None:
    """Do this worker's share of a phase, behind what an earlier process of it has done."""
    device = torch.device("cuda" if torch.cuda.is_available() and not is_quick else "cpu")
    if device.type == "cuda":
        # the references are exact
        torch.backends.cuda.matmul.allow_tf32 = False
        # an index, as what tensors say of themselves has one
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        # toy sizes only wait for a second thread
        torch.set_num_threads(1)
    pieces = _pieces(phase, out, device, is_quick=is_quick)
    names = list(pieces)[shard::num_shards]
    journal = journal_of(out, phase, shard)
    run_pieces(journal, names, lambda name: pieces[name](journal), error_row, deadline)


def _pieces(phase: str, out: Path, device: torch.device, *, is_quick: bool) -> Pieces:
    if phase == "device":
        return {"device": partial(_describe_device, device)}
    if phase == "checks":
        return {**layer_checks(device), **gemm_checks(device)}
    if phase == "tune":
        return _tune_pieces(device, is_quick=is_quick)
    cells = toy_cells() if is_quick else planned_cells()
    return {cell.name: partial(_time, cell, out, device, 3 if is_quick else 20) for cell in cells}


def error_row(name: str) -> Row:
    """The row of a piece that failed."""
    parts = name.split("/")
    if parts[0] == "tune":
        return {"kind": parts[1], "bucket": int(parts[2])}
    if parts[0] == "trial":
        return {"kind": parts[1], "config": parts[2]}
    if len(parts) > 2 and parts[2] in ("forward", "step", "decode"):
        shape, tokens, kind, *backend = parts
        return {"shape": shape, "tokens": int(tokens), "kind": kind, "backend": backend[0] if backend else "all"}
    return {"check": name}


def _describe_device(device: torch.device, journal: Journal) -> None:
    import triton

    row: Row = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        row |= {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    size, num_bytes = (8192, 4 << 30) if device.type == "cuda" else (256, 1 << 20)
    row |= {"flops_per_s": matmul_ceiling(device, size), "bytes_per_s": copy_ceiling(device, num_bytes)}
    journal.add(row)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _tune_pieces(device: torch.device, *, is_quick: bool) -> Pieces:
    if is_quick:
        return {"tune/down/4": partial(_tune, "down", 4, ("toy",), torch.float32, device)}
    # what decoding and long batches need comes first
    order = sorted(BUCKETS, key=lambda bucket: -abs(bucket.bit_length() - 5))
    return {
        f"tune/{kind}/{bucket}": partial(_tune, kind, bucket, _TUNED_FOR, torch.bfloat16, device)
        for bucket in order
        for kind in KINDS
        if kind in ("up", "down") or bucket >= _FEWEST_TRAINING_ROWS
    }


def _tune(
    kind: str, bucket: int, names: tuple[str, ...], dtype: torch.dtype, device: torch.device, journal: Journal
) -> None:
    fatal = journal.fatal()

    @contextmanager
    def trial(kind: str, config: GemmConfig) -> Iterator[bool]:
        name = f"trial/{kind}/{label(config)}"
        if name in fatal:
            yield False
            return
        with journal.piece(name, error_row(name)):
            yield True

    shapes = [SHAPES[name] for name in names]
    tune(shapes, dtype, device, float("inf"), kinds=[kind], buckets=[bucket], report=journal.add, trial=trial)


def store_table(out: Path, *, is_quick: bool) -> str:
    """Write the winners over the table that was in force, to `out` and to where this device looks; says where that is.

    float16 takes bfloat16's winners: the same tiles, the same units.
    """
    winners = [row for row in rows_of(out, "tune") if row.get("note") == "wins"]
    about = next(iter(rows_of(out, "device")), {})
    device = about.get("device", "")
    table = {kind: {dtype: dict(b) for dtype, b in by.items()} for kind, by in table_of(device).items()}
    for row in winners:
        for dtype in ("bfloat16", "float16") if row["dtype"] == "bfloat16" else (row["dtype"],):
            table[row["kind"]].setdefault(dtype, {})[row["bucket"]] = GemmConfig(**row["fields"])
    meta = {**about, "date": datetime.now(UTC).date().isoformat(), "tuned_for": list(_TUNED_FOR)}
    meta["how"] = (
        "benchmarks/kernels_gpu.py --tune: random routing, checked against float32, medians of interleaved rounds"
    )
    write_table(out / "table.json", table, meta)
    if is_quick or not device:
        return f"{len(winners)} winners in table.json"
    write_table(table_path(device), table, meta)
    return f"{len(winners)} winners in table.json, which belongs at kernels/tables/{table_path(device).name}"


def _time(cell: Cell, out: Path, device: torch.device, rounds: int, journal: Journal) -> None:
    about = next(iter(rows_of(out, "device")), None) or {}
    ceilings = about.get("flops_per_s", 790e12), about.get("bytes_per_s", 4.3e12)
    time_cell(cell, journal, device, ceilings, rivals=tuple(RIVALS), rounds=rounds)
