"""Which tile each Triton GEMM takes. Tuned tables are data, found offline; nothing is timed in the path of an actor.

S routed rows, E experts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from raymoe.kernels.backend import is_interpreted

KINDS = ("up", "up_train", "down", "gate_grad", "input_grad", "weight_grad")
"""The GEMMs of a layer: up-projection with its gate (up_train also keeps the pre-activations), down-projection, and the
four of the backward pass (weight_grad runs once for each projection)."""

TABLES = Path(__file__).with_name("tables")
DEFAULT_TABLE = TABLES / "default.json"
MAX_BUCKET = 4096


@dataclass(frozen=True)
class GemmConfig:
    """Sizes of one kernel's tile, rows x cols of the result and `inner` along the sum, and how it is launched."""

    rows: int
    cols: int
    inner: int
    num_warps: int = 4
    num_stages: int = 3
    weights: str = "pointers"
    """How weight tiles arrive: pointers (cp.async) | descriptor (TMA, where strides and alignment allow it)."""
    inputs: str = "pointers"
    """How row tiles arrive: likewise. TMA does not gather: rows that are not in sorted order yet are first brought into it."""
    is_persistent: bool = False
    """One program a multiprocessor walks over the tiles."""
    is_flattened: bool = False
    """Of a persistent kernel: the next tile's first loads start under the epilogue of the last."""
    group: int = 8
    """Row tiles that take a weight tile one after another, while it is in L2."""
    is_swapped: bool = False
    """The weight tile is the tensor core's M operand: for the few rows an expert has in decoding."""
    slices: int = 1
    """Column slices that the epilogue works through one after another, to save registers."""


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """Power of two, 1 to 4096, at or above the mean rows per expert; a table has one entry for each kind and bucket."""
    mean = -(-num_rows // max(num_experts, 1))
    return min(1 << max(mean - 1, 0).bit_length(), MAX_BUCKET)


def gemm_config(kind: str, dtype: torch.dtype, num_rows: int, num_experts: int, device: torch.device) -> GemmConfig:
    """The tile for `kind`; it depends on the whole batch only, so that a subset of its experts rounds the same way.

    Taken from the table of this device and Triton version if there is one, else from the untimed default table: the entry
    of the nearest bucket.
    """
    if is_interpreted():
        return INTERPRETED[kind]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return _entry(kind, dtype, rows_bucket(num_rows, num_experts), name)


@cache
def _entry(kind: str, dtype: torch.dtype, bucket: int, device_name: str) -> GemmConfig:
    by_bucket = table_of(device_name)[kind][str(dtype).removeprefix("torch.")]
    # of two equally near the smaller, which wastes fewer rows
    return by_bucket[min(by_bucket, key=lambda at: (abs(at.bit_length() - bucket.bit_length()), at))]


@cache
def table_of(device_name: str) -> dict[str, dict[str, dict[int, GemmConfig]]]:
    """{kind: {dtype: {bucket: config}}} for a device by its CUDA name; the default table's where a type was not tuned."""
    table = read_table(DEFAULT_TABLE)
    if device_name and (path := table_path(device_name)).exists():
        for kind, by_dtype in read_table(path).items():
            table[kind] |= by_dtype
    return table


def table_path(device_name: str) -> Path:
    """Where the table for a device and this Triton version (its first two numbers) stands."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    return TABLES / f"{device_name.lower().replace(' ', '-')}_triton-{version}.json"


def read_table(path: Path) -> dict[str, dict[str, dict[int, GemmConfig]]]:
    """A table from its JSON: {"meta": {...}, "configs": {kind: {dtype: {bucket: {field: value}}}}}.

    Raises:
        ValueError: an unknown kind or field, or a kind that is missing.
    """
    configs: dict[str, Any] = json.loads(path.read_text())["configs"]
    if set(configs) != set(KINDS):
        raise ValueError(f"{path} has the kinds {sorted(configs)}; it must have exactly {sorted(KINDS)}")
    known = {field.name for field in fields(GemmConfig)}
    for kind, by_dtype in configs.items():
        for entry in (e for by_bucket in by_dtype.values() for e in by_bucket.values()):
            if unknown := set(entry) - known:
                raise ValueError(f"{path}: {kind} has unknown fields {sorted(unknown)}; use {sorted(known)}")
    return {
        kind: {
            dtype: {int(bucket): GemmConfig(**entry) for bucket, entry in by_bucket.items()}
            for dtype, by_bucket in by_dtype.items()
        }
        for kind, by_dtype in configs.items()
    }


def write_table(path: Path, table: dict[str, dict[str, dict[int, GemmConfig]]], meta: dict[str, Any]) -> None:
    """Write what `read_table` reads; `meta` says device, versions, date and how the entries were found."""
    configs = {
        kind: {
            dtype: {str(at): asdict(by_bucket[at]) for at in sorted(by_bucket)} for dtype, by_bucket in by_dtype.items()
        }
        for kind, by_dtype in table.items()
    }
    path.write_text(json.dumps({"meta": meta, "configs": configs}, indent=1) + "\n")


_SMALL = GemmConfig(16, 64, 64)
INTERPRETED = {**dict.fromkeys(KINDS, _SMALL), "weight_grad": GemmConfig(32, 32, 16)}
"""Small tiles under Triton's CPU interpreter, so that tests cross several of them."""
