"""A Ray Data dataset as a source of training data."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from raymoe.training.data.files import Row

if TYPE_CHECKING:
    # it needs pandas, which nothing else here does
    from ray.data import Dataset

_BATCH_ROWS = 1024


def dataset_rows(dataset: "Dataset", fields: Sequence[str], *, name: str = "ray_data") -> Iterator[Row]:
    """Streams a dataset's rows to the driver, in the dataset's order, for `prepare_data(rows=...)`.

    The order is asked of Ray (`preserve_order`), as the training order must not depend on which task ends first. Reading and
    `map_batches` stay distributed and bounded in memory; a dataset that shuffles without a seed differs from run to run.

    Args:
        fields: columns to read, e.g. ``row_options(config.data).values()``.
        name: what rows are called in errors and in the split: ``name:n``, counting from 1.

    Raises:
        ValueError: a column is missing; names the columns there are.
    """
    names = dataset.columns() or []
    for field in fields:
        if field not in names:
            raise ValueError(f"{name}: no column {field!r}, there are {sorted(names)}")
    return _rows(dataset, list(fields), name)


def _rows(dataset: "Dataset", fields: list[str], name: str) -> Iterator[Row]:
    dataset = dataset.select_columns(fields)
    dataset.context.execution_options.preserve_order = True
    number = 0
    for batch in dataset.iter_batches(batch_size=_BATCH_ROWS, batch_format="pyarrow"):
        table: Any = batch
        for values in table.to_pylist():
            number += 1
            yield Row(f"{name}:{number}", f"{name} row {number}", "column", values)
