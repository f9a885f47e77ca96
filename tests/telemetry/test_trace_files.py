"""Reading counts in both layouts: raymoe's own, and the one without metadata."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.telemetry import TraceWriter, load_counts, read_trace, trace_schema

L, E = 2, 4
_TYPES = {
    "iteration": pa.uint16(),
    "rank": pa.uint8(),
    "layer": pa.uint8(),
    "counts": pa.list_(pa.uint16(), E),
}


def smartmoe(**columns) -> pa.Table:
    """Two iterations, two ranks, two layers in that layout; columns replaced, None leaves one out."""
    iteration, rank, layer = (index.ravel() for index in np.indices((2, 2, L)))
    counts = np.arange(8 * E).reshape(8, E)
    plain = {"iteration": 1 + 10 * iteration, "rank": rank, "layer": layer, "counts": counts.tolist()}
    good = {name: pa.array(values, _TYPES[name]) for name, values in plain.items()}
    return pa.table({name: column for name, column in (good | columns).items() if column is not None})


def test_choices_are_written_and_given_back(tmp_path):
    with TraceWriter(tmp_path / "t.parquet", L, E, choices=2) as trace:
        trace.append(3, np.ones((L, E), dtype=np.int64), rank=1)
    found = load_counts(tmp_path / "t.parquet")
    columns = read_trace(tmp_path / "t.parquet")
    assert found.pop("choices") == 2
    assert found.keys() == columns.keys()
    assert all((found[name] == columns[name]).all() for name in columns)
    assert columns["step"].tolist() == [3, 3]


def test_a_trace_need_not_say_its_choices(tmp_path):
    TraceWriter(tmp_path / "t.parquet", L, E).close()
    assert load_counts(tmp_path / "t.parquet")["choices"] is None
    assert b"raymoe.trace.choices" not in pq.read_schema(tmp_path / "t.parquet").metadata


@pytest.mark.parametrize("choices", [0, E + 1])
def test_impossible_choices_are_refused_when_written(tmp_path, choices):
    with pytest.raises(ValueError, match=f"choices = {choices}: must be from 1 to num_experts = 4, or None"):
        TraceWriter(tmp_path / "t.parquet", L, E, choices=choices)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"two", r"raymoe\.trace\.choices is 'two'; it must be a number"),
        (b"5", "choices is 5, but there are 4 experts"),
    ],
)
def test_impossible_choices_are_refused_when_read(tmp_path, value, said):
    schema = trace_schema(L, E)
    table = schema.empty_table().replace_schema_metadata(schema.metadata | {b"raymoe.trace.choices": value})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=said):
        load_counts(tmp_path / "t.parquet")
    # who does not ask for them reads on
    assert read_trace(tmp_path / "t.parquet")["step"].size == 0


@given(
    st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=3, unique=True),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
)
@settings(max_examples=20, deadline=None)
def test_the_layout_without_metadata_keeps_every_value(tmp_path_factory, iterations, ranks, layers, experts):
    path = tmp_path_factory.mktemp("counts") / "t.parquet"
    counts = np.random.default_rng(0).integers(0, 2**16, size=(len(iterations), ranks, layers, experts))
    step, rank, layer = (index.ravel() for index in np.indices(counts.shape[:3]))
    table = {
        "iteration": pa.array(np.array(iterations)[step], pa.uint16()),
        "rank": pa.array(rank, pa.uint8()),
        "layer": pa.array(layer, pa.uint8()),
        "counts": pa.array(counts.reshape(-1, experts).tolist(), pa.list_(pa.uint16(), experts)),
    }
    pq.write_table(pa.table(table), path)
    found = load_counts(path)
    assert found["step"].tolist() == np.array(iterations)[step].tolist()
    assert (found["rank"].tolist(), found["layer"].tolist()) == (rank.tolist(), layer.tolist())
    assert (found["counts"] == counts.reshape(-1, experts)).all()
    assert {found[name].dtype for name in ("step", "rank", "layer", "counts")} == {np.dtype(np.int64)}
    assert found["choices"] is None


def test_wider_integers_are_taken(tmp_path):
    counts = pa.array([[1, 2, 3, 4]] * 8, pa.list_(pa.int64(), E))
    pq.write_table(smartmoe(counts=counts, iteration=pa.array([1] * 4 + [2] * 4)), tmp_path / "t.parquet")
    assert load_counts(tmp_path / "t.parquet")["counts"].tolist() == [[1, 2, 3, 4]] * 8


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"iteration": None},
            r"t\.parquet: no routing counts that raymoe knows.*iteration, layer, rank, counts.*there are \['rank'",
        ),
        ({"rank": None}, r"t\.parquet: column 'rank' is missing; there are \['iteration', 'layer', 'counts'\]"),
        ({"iteration": pa.array(["a"] * 8)}, "column 'iteration' holds string"),
        ({"layer": pa.array([0, None] * 4, pa.uint8())}, "column 'layer' is null in row 1"),
        ({"rank": pa.array([0, 0, 1, 1, 0, 0, -1, 1])}, "column 'rank' holds -1 in row 6"),
        ({"iteration": pa.array([1, 1, 1, 1, -4, 11, 11, 11])}, "column 'iteration' holds -4 in row 4"),
        ({"iteration": pa.array([1] * 8, pa.uint16())}, "row 4 repeats iteration 1, layer 0, rank 0"),
        ({"counts": pa.array([[1] * E] * 8)}, "column 'counts' holds list.*must hold lists of one fixed size"),
        ({"counts": pa.array([[1.0] * E] * 8, pa.list_(pa.float32(), E))}, "must hold lists of integers"),
        ({"counts": pa.array([[1] * E] * 7 + [None], _TYPES["counts"])}, "'counts' is null in row 7"),
        ({"counts": pa.array([[1] * E] * 7 + [[1, None, 1, 1]], _TYPES["counts"])}, "'counts' holds a null in row 7"),
        ({"counts": pa.array([[1] * E] * 7 + [[1, -1, 1, 1]], pa.list_(pa.int8(), E))}, "'counts' holds -1 in row 7"),
    ],
)
def test_a_bad_file_names_file_field_and_row(tmp_path, columns, said):
    pq.write_table(smartmoe(**columns), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=said):
        load_counts(tmp_path / "t.parquet")


def test_a_damaged_trace_of_ours_is_not_taken_for_the_other_layout(tmp_path):
    metadata = trace_schema(L, E).metadata | {b"raymoe.trace.version": b"7"}
    pq.write_table(smartmoe().replace_schema_metadata(metadata), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"raymoe\.trace\.version is '7', but this reads '1' only"):
        load_counts(tmp_path / "t.parquet")


def test_missing_and_cut_off_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"t\.parquet: no such trace"):
        load_counts(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"t\.parquet: not a whole Parquet file"):
        load_counts(tmp_path / "t.parquet")
