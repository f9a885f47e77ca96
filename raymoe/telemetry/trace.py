"""Routing traces: how many rows each expert got, step by step, as Parquet.

Schema of version 1, kind "counts": one row a (step, layer, rank), in the order it was written.

| column | type | meaning |
|---|---|---|
| step | int64 | training step, from 0 |
| layer | int32 | MoE layer, 0..L-1 |
| rank | int32 | the rank whose rows are counted, from 0 |
| counts | fixed_size_list<int64>[E] | rows of that rank that the gate gave to expert 0..E-1 |

The file's metadata says ``raymoe.trace.kind``, ``raymoe.trace.version``, ``raymoe.trace.num_layers`` and
``raymoe.trace.num_experts``, and, where every token took equally many experts, ``raymoe.trace.choices``. ``trace_files`` reads
them back. L = MoE layers, E = experts a layer.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TRACE_VERSION = 1
METADATA_PREFIX = "raymoe.trace."
INDEX_FIELDS = {"step": pa.int64(), "layer": pa.int32(), "rank": pa.int32()}


def trace_schema(num_layers: int, num_experts: int, choices: int | None = None) -> pa.Schema:
    """The Arrow schema of a trace of that size, with the metadata that ``read_trace`` asks for."""
    fields = [pa.field(name, kind, nullable=False) for name, kind in INDEX_FIELDS.items()]
    item = pa.field("item", pa.int64(), nullable=False)
    fields.append(pa.field("counts", pa.list_(item, num_experts), nullable=False))
    said = {"kind": "counts", "version": TRACE_VERSION, "num_layers": num_layers, "num_experts": num_experts}
    if choices is not None:
        said["choices"] = choices
    return pa.schema(fields, metadata={METADATA_PREFIX + key: str(value) for key, value in said.items()})


class TraceWriter:
    """Writes a trace as it happens. The file gets its name when it is closed: until then it is ``<name>.partial``.

    Used as a context manager it closes at the end; if the block raises, what was written stays as a readable
    ``<name>.partial``, and no file looks whole that is not.

    Args:
        path: file to write; its folder is made.
        num_layers, num_experts: L and E.
        buffer_rows: rows kept in memory before they are written as one Parquet row group.
        choices: K, experts that every token took; None: not the same for all, or not known.

    Raises:
        ValueError: a size below 1, or choices that are more than the experts.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_layers: int,
        num_experts: int,
        *,
        buffer_rows: int = 16_384,
        choices: int | None = None,
    ) -> None:
        if min(num_layers, num_experts, buffer_rows) < 1:
            raise ValueError(
                f"num_layers = {num_layers}, num_experts = {num_experts}, buffer_rows = {buffer_rows}: need at least 1 each"
            )
        if choices is not None and not 1 <= choices <= num_experts:
            raise ValueError(f"choices = {choices}: must be from 1 to num_experts = {num_experts}, or None")
        self.path = Path(path)
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._schema = trace_schema(num_layers, num_experts, choices)
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
