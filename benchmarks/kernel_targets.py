"""What the GPU run is held against, read off its rows; and how its tables look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.table import Table

from raymoe.benchmarks.kernel_jobs import Row
from raymoe.benchmarks.kernel_rivals import OURS
from raymoe.benchmarks.kernel_shapes import SHAPES, floor_bytes

# of the H200's memory, read plus written, as device copies show it
_BYTES_PER_S = 4.3e12
_DECODE_SHARE = 0.85
_MODELS = ("olmoe", "qwen3-30b", "mixtral-8x7b")
# microseconds on an H200 by tokens: vLLM's fused MoE, pull request 44818, as published there
_VLLM_US = {1: 185, 16: 264, 64: 384, 512: 442, 1024: 528, 2048: 728, 4096: 1190}


def summary(checks: Sequence[Row], times: Sequence[Row]) -> list[Row]:
    """Rows of {target, wanted, found, reached}; found is None where the run has no answer."""
    found = {(row["shape"], row["tokens"], row["kind"], row["backend"]): row for row in times if "us" in row}

    def ours(shape: str, tokens: int, kind: str) -> Row | None:
        return found.get((shape, tokens, kind, OURS))

    def result(target: str, wanted: float, value: float | None) -> Row:
        reached = "not measured" if value is None else "reached" if value >= wanted else "not reached"
        return {"target": target, "wanted": wanted, "found": value, "reached": reached}

    failed = [row["check"] for row in checks if row.get("failed") or row.get("ok") is False]
    right = sum(row.get("ok") is True for row in checks)
    rows = [result(f"checks that hold, of {right + len(failed)}", right + len(failed), right if checks else None)]
    for shape, kind, wanted in (
        ("qwen3-30b", "forward", 520),
        ("qwen3-30b", "step", 430),
        ("mixtral-8x7b", "forward", 620),
    ):
        row = ours(shape, 32768, kind)
        rows.append(result(f"{shape} 32768 {kind}, TFLOP/s", wanted, row["tflops"] if row else None))
    for shape in _MODELS:
        for tokens in (16, 64, 256):
            row = ours(shape, tokens, "decode")
            share = _share_of_bandwidth(row) if row else None
            rows.append(result(f"{shape} {tokens} decode, share of 4.3 TB/s", _DECODE_SHARE, share))
    for backend, wanted in (("grouped_mm layer", 2.0), ("liger", 1.2), ("moe-ops", 1.2)):
        for shape in _MODELS:
            for kind in ("forward", "step"):
                mine, theirs = ours(shape, 32768, kind), found.get((shape, 32768, kind, backend))
                ratio = theirs["us"] / mine["us"] if mine and theirs else None
                rows.append(result(f"{shape} 32768 {kind}, times {backend}", wanted, ratio))
    for tokens, published in _VLLM_US.items():
        row = ours("vllm-44818", tokens, "decode")
        ratio = published / row["us"] if row else None
        rows.append(result(f"vllm-44818 {tokens}, times vLLM as published", 1.0, ratio))
    return rows


def _share_of_bandwidth(row: Row) -> float:
    shape = SHAPES[row["shape"]]
    num_bytes = floor_bytes(
        shape, row["tokens"], "decode", rows=row["tokens"] * shape.top_k, experts=round(row["active_experts"])
    )
    return num_bytes / _BYTES_PER_S / (row["us"] * 1e-6)


def noise(times: Sequence[Row]) -> float | None:
    """The largest difference between the two identical contenders, as a share: smaller gains are none."""
    pairs: dict[tuple, list[float]] = {}
    for row in times:
        if "us" in row and row["backend"] in (OURS, f"{OURS} again"):
            pairs.setdefault((row["shape"], row["tokens"], row["kind"]), []).append(row["us"])
    shares = [abs(a - b) / min(a, b) for a, b in (pair for pair in pairs.values() if len(pair) == 2)]
    return max(shares, default=None)


_FORMATS: dict[str, Callable[[float], str]] = {
    "us": lambda x: f"{x:,.1f}",
    "tflops": lambda x: f"{x:.4g}",
    "floor_share": lambda x: f"{100 * x:.1f} %",
    "spread": lambda x: f"{100 * x:.1f} %",
    "error": lambda x: f"{x:.1e}",
    "limit": lambda x: f"{x:.1e}",
    "peak_mib": lambda x: f"{x:,.0f}",
    "wanted": lambda x: f"{x:,.4g}",
    "found": lambda x: f"{x:,.4g}",
}


def tables(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Iterator[Table]:
    """One table, or none without rows."""
    if rows:
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*(_cell(name, row.get(name)) for name in columns))
        yield table


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    return _FORMATS[name](value) if isinstance(value, (int, float)) and name in _FORMATS else str(value)
