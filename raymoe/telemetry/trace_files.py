"""Reading routing counts back, raymoe's own and those of another project, with errors that name file, field and row.

N = rows of the file, L = MoE layers, E = experts a layer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raymoe.telemetry.trace import INDEX_FIELDS, METADATA_PREFIX, TRACE_VERSION

_SMARTMOE_FIELDS = {"step": "iteration", "layer": "layer", "rank": "rank", "counts": "counts"}


def read_trace(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads and checks a trace of kind "counts".

    Any integer type, and lists of variable length, are taken for the columns, so that other tools can write them.

    Returns:
        ``step`` [N], ``layer`` [N], ``rank`` [N] and ``counts`` [N, E], all int64, in the file's order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole Parquet file, or not a trace of this version; names the field, and the row if it is one.
    """
    path = Path(path)
    return _own_columns(path, _read_table(path))


def load_counts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks routing counts in either layout that raymoe knows, told apart by what the file itself says.

    raymoe's own, as ``read_trace`` has it, is known by its metadata. The SmartMoE layout holds the counts that the artifact of
    SmartMoE (USENIX ATC'23) logs, without metadata: ``iteration`` uint16, ``rank`` uint8, ``layer`` uint8 and ``counts``
    fixed_size_list<uint16>[E], a row an (iteration, rank, layer); other integer types are taken as well. Its iterations need
    not follow each other, and are given as they are.

    Returns:
        ``step`` [N], ``layer`` [N], ``rank`` [N] and ``counts`` [N, E], all int64, in the file's order, and ``choices``: K
        where the file says it, else None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole Parquet file, neither layout, or a bad value; names the field, and the row if it is one.
    """
    path = Path(path)
    table = _read_table(path)
    if _said(table.schema, "kind") is not None:
        return _own_columns(path, table) | {"choices": _choices(path, table.schema)}
    if "iteration" in table.column_names:
        return _smartmoe_columns(path, table) | {"choices": None}
    raise ValueError(
        f"{path}: no routing counts that raymoe knows: neither metadata {METADATA_PREFIX}kind, as in raymoe's own traces, nor "
        f"the columns {', '.join(_SMARTMOE_FIELDS.values())} of the SmartMoE layout; there are {table.column_names}"
    )


def _read_table(path: Path) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such trace")
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file, perhaps cut off while it was written ({error})") from None


def _own_columns(path: Path, table: pa.Table) -> dict[str, np.ndarray]:
    for key, wanted in (("kind", "counts"), ("version", str(TRACE_VERSION))):
        found = _said(table.schema, key)
        if found != wanted:
            raise ValueError(f"{path}: metadata {METADATA_PREFIX + key} is {found!r}, but this reads {wanted!r} only")
    num_layers, num_experts = (_size(path, table.schema, key) for key in ("num_layers", "num_experts"))
    _check_fields(path, table, (*INDEX_FIELDS, "counts"))
    columns = {name: _integers(path, name, table[name]) for name in INDEX_FIELDS}
    columns["counts"] = _counts(path, table["counts"], num_experts)
    _check_values(path, columns)
    bad = np.flatnonzero(columns["layer"] >= num_layers)
    if bad.size:
        layer = columns["layer"][bad[0]]
        raise ValueError(f"{path}: column 'layer' holds {layer} in row {bad[0]}, but there are {num_layers} layers")
    return columns


def _smartmoe_columns(path: Path, table: pa.Table) -> dict[str, np.ndarray]:
    _check_fields(path, table, tuple(_SMARTMOE_FIELDS.values()))
    kind = table.schema.field("counts").type
    if not pa.types.is_fixed_size_list(kind) or kind.list_size < 1:
        raise ValueError(
            f"{path}: column 'counts' holds {kind}, but must hold lists of one fixed size, a count an expert"
        )
    columns = {
        ours: _integers(path, theirs, table[theirs]) for ours, theirs in _SMARTMOE_FIELDS.items() if ours != "counts"
    }
    columns["counts"] = _counts(path, table["counts"], kind.list_size)
    _check_values(path, columns, _SMARTMOE_FIELDS)
    return columns


def _said(schema: pa.Schema, key: str) -> str | None:
    value = (schema.metadata or {}).get((METADATA_PREFIX + key).encode())
    return None if value is None else value.decode()


def _size(path: Path, schema: pa.Schema, key: str) -> int:
    value = _said(schema, key) or ""
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{path}: metadata {METADATA_PREFIX + key} is {value!r}; it must be a number of at least 1")
    return int(value)


def _choices(path: Path, schema: pa.Schema) -> int | None:
    if _said(schema, "choices") is None:
        return None
    choices, num_experts = _size(path, schema, "choices"), _size(path, schema, "num_experts")
    if choices > num_experts:
        raise ValueError(f"{path}: metadata {METADATA_PREFIX}choices is {choices}, but there are {num_experts} experts")
    return choices


def _check_fields(path: Path, table: pa.Table, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in table.column_names:
            raise ValueError(f"{path}: column {name!r} is missing; there are {table.column_names}")


def _integers(path: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    if not pa.types.is_integer(column.type):
        raise ValueError(f"{path}: column {name!r} holds {column.type}, but must hold integers")
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise ValueError(f"{path}: column {name!r} is null in row {row}")
    return column.to_numpy().astype(np.int64)


def _counts(path: Path, column: pa.ChunkedArray, num_experts: int) -> np.ndarray:
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"{path}: column 'counts' holds {kind}, but must hold lists of integers")
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy()
    wrong = np.flatnonzero(lengths != num_experts)
    if wrong.size:
        row = int(wrong[0])
        found = "null" if lengths[row] < 0 else f"a list of {lengths[row]}"
        raise ValueError(f"{path}: column 'counts' is {found} in row {row}, but there are {num_experts} experts")
    flat = pc.list_flatten(column)
    if flat.null_count:
        row = pc.index(pc.is_null(flat), True).as_py() // num_experts
        raise ValueError(f"{path}: column 'counts' holds a null in row {row}")
    return flat.to_numpy().astype(np.int64).reshape(-1, num_experts)


def _check_values(path: Path, columns: dict[str, np.ndarray], names: dict[str, str] | None = None) -> None:
    """No negative value, and no (step, layer, rank) twice; ``names``: what the file calls the columns, where it differs."""
    called = {name: name for name in columns} | (names or {})
    for name, values in columns.items():
        lowest = values if values.ndim == 1 else values.min(axis=1)
        bad = np.flatnonzero(lowest < 0)
        if bad.size:
            raise ValueError(
                f"{path}: column {called[name]!r} holds {lowest[bad[0]]} in row {bad[0]}, but must not be negative"
            )
    keys = np.stack([columns[name] for name in INDEX_FIELDS])
    order = np.lexsort(keys)
    repeated = np.flatnonzero((keys[:, order[1:]] == keys[:, order[:-1]]).all(axis=0))
    if repeated.size:
        row = int(order[repeated[0] + 1])
        step, layer, rank = keys[:, row]
        raise ValueError(f"{path}: row {row} repeats {called['step']} {step}, layer {layer}, rank {rank}")
