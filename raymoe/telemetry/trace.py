"""Routing traces: how many rows each expert got, step by step, as Parquet.

Schema of version 1, kind "counts": one row a (step, layer, rank), in the order it was written.

| column | type | meaning |
|---|---|---|
| step | int64 | training step, from 0 |
| layer | int32 | MoE layer, 0..L-1 |
| rank | int32 | the rank whose rows are counted, from 0 |
| counts | fixed_size_list<int64>[E] | rows of that rank that the gate gave to expert 0..E-1 |

The file's metadata says ``raymoe.trace.kind``, ``raymoe.trace.version``, ``raymoe.trace.num_layers`` and
``raymoe.trace.num_experts``. L = MoE layers, E = experts a layer, N = rows of the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

TRACE_VERSION = 1
_PREFIX = "raymoe.trace."
_INDEX_FIELDS = {"step": pa.int64(), "layer": pa.int32(), "rank": pa.int32()}


def trace_schema(num_layers: int, num_experts: int) -> pa.Schema:
    """The Arrow schema of a trace of that size, with the metadata that ``read_trace`` asks for."""
    fields = [pa.field(name, kind, nullable=False) for name, kind in _INDEX_FIELDS.items()]
    item = pa.field("item", pa.int64(), nullable=False)
    fields.append(pa.field("counts", pa.list_(item, num_experts), nullable=False))
    said = {"kind": "counts", "version": TRACE_VERSION, "num_layers": num_layers, "num_experts": num_experts}
    return pa.schema(fields, metadata={_PREFIX + key: str(value) for key, value in said.items()})


class TraceWriter:
    """Writes a trace as it happens. The file gets its name when it is closed: until then it is ``<name>.partial``.

    Used as a context manager it closes at the end; if the block raises, what was written stays as a readable
    ``<name>.partial``, and no file looks whole that is not.

    Args:
        path: file to write; its folder is made.
        num_layers, num_experts: L and E.
        buffer_rows: rows kept in memory before they are written as one Parquet row group.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, path: str | os.PathLike[str], num_layers: int, num_experts: int, *, buffer_rows: int = 16_384
    ) -> None:
        if min(num_layers, num_experts, buffer_rows) < 1:
            raise ValueError(
                f"num_layers = {num_layers}, num_experts = {num_experts}, buffer_rows = {buffer_rows}: need at least 1 each"
            )
        self.path = Path(path)
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._schema = trace_schema(num_layers, num_experts)
        self._buffer_steps = -(-buffer_rows // num_layers)
        self._index: list[tuple[int, int]] = []
        self._counts: list[np.ndarray] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer: pq.ParquetWriter | None = pq.ParquetWriter(self._partial, self._schema, compression="zstd")

    def append(self, step: int, counts: np.ndarray, *, rank: int = 0) -> None:
        """Adds what one rank routed in one step.

        Args:
            counts: integers [L, E], not negative; copied.

        Raises:
            ValueError: the writer is closed, a negative step or rank, or counts of another shape, dtype or sign.
        """
        if self._writer is None:
            raise ValueError(f"{self.path}: the trace is closed, nothing can be added")
        counts = np.asarray(counts)
        if counts.shape != (self.num_layers, self.num_experts) or not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(
                f"counts must be integers [{self.num_layers}, {self.num_experts}], got {counts.dtype} {counts.shape}"
            )
        if step < 0 or rank < 0 or counts.min() < 0:
            raise ValueError(f"step {step}, rank {rank}, lowest count {counts.min()}: none may be negative")
        self._index.append((step, rank))
        self._counts.append(counts.astype(np.int64))
        if len(self._index) >= self._buffer_steps:
            self._flush()

    def close(self) -> None:
        """Writes what is buffered and gives the file its name. Closing twice does nothing."""
        if self._finish():
            os.replace(self._partial, self.path)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._finish()

    def _finish(self) -> bool:
        if self._writer is None:
            return False
        try:
            self._flush()
        finally:
            writer, self._writer = self._writer, None
            writer.close()
        return True

    def _flush(self) -> None:
        if not self._index:
            return
        step, rank = np.repeat(np.array(self._index, dtype=np.int64), self.num_layers, axis=0).T
        layer = np.tile(np.arange(self.num_layers), len(self._index))
        counts = pa.FixedSizeListArray.from_arrays(
            pa.array(np.concatenate(self._counts).ravel()), type=self._schema.field("counts").type
        )
        columns = [pa.array(step), pa.array(layer, pa.int32()), pa.array(rank, pa.int32()), counts]
        assert self._writer is not None
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._index.clear()
        self._counts.clear()


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
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such trace")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file, perhaps cut off while it was written ({error})") from None
    num_layers, num_experts = _sizes(path, table.schema)
    for name in (*_INDEX_FIELDS, "counts"):
        if name not in table.column_names:
            raise ValueError(f"{path}: column {name!r} is missing; there are {table.column_names}")
    columns = {name: _integers(path, name, table[name]) for name in _INDEX_FIELDS}
    columns["counts"] = _counts(path, table["counts"], num_experts)
    _check_values(path, columns, num_layers)
    return columns


def _sizes(path: Path, schema: pa.Schema) -> tuple[int, int]:
    said = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    for key, wanted in (("kind", "counts"), ("version", str(TRACE_VERSION))):
        if said.get(_PREFIX + key) != wanted:
            raise ValueError(
                f"{path}: metadata {_PREFIX + key} is {said.get(_PREFIX + key)!r}, but this reads {wanted!r} only"
            )
    sizes = []
    for key in ("num_layers", "num_experts"):
        value = said.get(_PREFIX + key, "")
        if not value.isdigit() or int(value) < 1:
            raise ValueError(f"{path}: metadata {_PREFIX + key} is {value!r}; it must be a number of at least 1")
        sizes.append(int(value))
    return sizes[0], sizes[1]


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


def _check_values(path: Path, columns: dict[str, np.ndarray], num_layers: int) -> None:
    for name, values in columns.items():
        lowest = values if values.ndim == 1 else values.min(axis=1)
        bad = np.flatnonzero(lowest < 0)
        if bad.size:
            raise ValueError(
                f"{path}: column {name!r} holds {lowest[bad[0]]} in row {bad[0]}, but must not be negative"
            )
    bad = np.flatnonzero(columns["layer"] >= num_layers)
    if bad.size:
        layer = columns["layer"][bad[0]]
        raise ValueError(f"{path}: column 'layer' holds {layer} in row {bad[0]}, but there are {num_layers} layers")
    keys = np.stack([columns[name] for name in _INDEX_FIELDS])
    order = np.lexsort(keys)
    repeated = np.flatnonzero((keys[:, order[1:]] == keys[:, order[:-1]]).all(axis=0))
    if repeated.size:
        row = int(order[repeated[0] + 1])
        step, layer, rank = keys[:, row]
        raise ValueError(f"{path}: row {row} repeats step {step}, layer {layer}, rank {rank}")
