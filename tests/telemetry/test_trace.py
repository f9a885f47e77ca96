import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymoe.telemetry import TraceWriter, read_trace, trace_schema

L, E = 3, 5


def written(path, steps=4, ranks=2, **options) -> np.ndarray:
    """Writes a trace; its counts as [steps, ranks, L, E]."""
    counts = np.random.default_rng(0).integers(0, 2**40, size=(steps, ranks, L, E))
    with TraceWriter(path, L, E, **options) as trace:
        for step in range(steps):
            for rank in range(ranks):
                trace.append(step, counts[step, rank], rank=rank)
    return counts


def table_with(**columns) -> pa.Table:
    """A good trace of two rows, columns replaced."""
    good = {
        "step": pa.array([0, 0], pa.int64()),
        "layer": pa.array([0, 1], pa.int32()),
        "rank": pa.array([0, 0], pa.int32()),
        "counts": pa.array([[1] * E] * 2, pa.list_(pa.int64())),
    }
    return pa.table(good | columns).replace_schema_metadata(trace_schema(L, E).metadata)


@pytest.mark.parametrize("buffer_rows", [1, 4, 10_000])
def test_round_trip(tmp_path, buffer_rows):
    counts = written(tmp_path / "sub" / "trace.parquet", buffer_rows=buffer_rows)
    trace = read_trace(tmp_path / "sub" / "trace.parquet")
    step, rank, layer = (index.ravel() for index in np.indices((4, 2, L)))
    assert trace["step"].tolist() == step.tolist()
    assert trace["rank"].tolist() == rank.tolist()
    assert trace["layer"].tolist() == layer.tolist()
    assert (trace["counts"] == counts.reshape(-1, E)).all()


def test_an_empty_trace_reads_as_no_rows(tmp_path):
    written(tmp_path / "t.parquet", steps=0)
    trace = read_trace(tmp_path / "t.parquet")
    assert (trace["step"].shape, trace["counts"].shape) == ((0,), (0, E))


def test_counts_are_copied_when_added(tmp_path):
    counts = np.ones((L, E), dtype=np.int64)
    with TraceWriter(tmp_path / "t.parquet", L, E) as trace:
        trace.append(0, counts)
        counts[:] = 9
    assert (read_trace(tmp_path / "t.parquet")["counts"] == 1).all()


def test_the_file_has_no_name_before_it_is_closed(tmp_path):
    trace = TraceWriter(tmp_path / "t.parquet", L, E, buffer_rows=1)
    trace.append(0, np.zeros((L, E), dtype=np.int64))
    assert not (tmp_path / "t.parquet").exists()
    trace.close()
    trace.close()
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_a_run_that_fails_leaves_a_readable_partial(tmp_path):
    def failing_run():
        with TraceWriter(tmp_path / "t.parquet", L, E) as trace:
            trace.append(0, np.ones((L, E), dtype=np.int64))
            raise RuntimeError("lost a worker")

    with pytest.raises(RuntimeError, match="lost a worker"):
        failing_run()
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet.partial"]
    assert read_trace(tmp_path / "t.parquet.partial")["step"].tolist() == [0] * L


def test_nothing_is_added_after_closing(tmp_path):
    trace = TraceWriter(tmp_path / "t.parquet", L, E)
    trace.close()
    with pytest.raises(ValueError, match="closed"):
        trace.append(0, np.zeros((L, E), dtype=np.int64))


@pytest.mark.parametrize(
    ("step", "counts", "said"),
    [
        (0, np.zeros((L, E + 1), dtype=np.int64), r"must be integers \[3, 5\], got int64 \(3, 6\)"),
        (0, np.zeros((L, E)), "float64"),
        (0, np.full((L, E), -1), "lowest count -1"),
        (-1, np.zeros((L, E), dtype=np.int64), "step -1"),
    ],
)
def test_bad_counts_are_refused_when_added(tmp_path, step, counts, said):
    with TraceWriter(tmp_path / "t.parquet", L, E) as trace, pytest.raises(ValueError, match=said):
        trace.append(step, counts)


def test_a_trace_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_experts = 0"):
        TraceWriter(tmp_path / "t.parquet", 1, 0)


def test_a_cut_off_file_says_so(tmp_path):
    path = tmp_path / "t.parquet"
    written(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        read_trace(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"t.parquet: no such trace"):
        read_trace(tmp_path / "t.parquet")


def test_any_parquet_is_not_a_trace(tmp_path):
    pq.write_table(pa.table({"step": [1]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"raymoe\.trace\.kind is None"):
        read_trace(tmp_path / "t.parquet")


def test_another_version_is_refused(tmp_path):
    said = trace_schema(L, E).metadata | {b"raymoe.trace.version": b"2"}
    pq.write_table(table_with().replace_schema_metadata(said), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"raymoe.trace.version is '2', but this reads '1' only"):
        read_trace(tmp_path / "t.parquet")


def test_a_missing_size_is_named(tmp_path):
    said = trace_schema(L, E).metadata | {b"raymoe.trace.num_experts": b"many"}
    pq.write_table(table_with().replace_schema_metadata(said), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"raymoe\.trace\.num_experts is 'many'"):
        read_trace(tmp_path / "t.parquet")


def test_a_missing_column_is_named(tmp_path):
    pq.write_table(table_with().drop_columns("rank"), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="column 'rank' is missing"):
        read_trace(tmp_path / "t.parquet")


def test_lists_of_another_writer_are_taken(tmp_path):
    counts = pa.array([[1] * E, [2] * E], pa.large_list(pa.uint16()))
    pq.write_table(table_with(counts=counts, rank=pa.array([0, 0], pa.uint8())), tmp_path / "t.parquet")
    assert read_trace(tmp_path / "t.parquet")["counts"].tolist() == [[1] * E, [2] * E]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"step": pa.array(["a", "b"])}, "column 'step' holds string"),
        ({"layer": pa.array([0, None], pa.int32())}, "column 'layer' is null in row 1"),
        ({"layer": pa.array([0, L])}, "column 'layer' holds 3 in row 1, but there are 3 layers"),
        ({"rank": pa.array([0, -1])}, "column 'rank' holds -1 in row 1"),
        ({"layer": pa.array([1, 1])}, "row 1 repeats step 0, layer 1, rank 0"),
        ({"counts": pa.array([1, 2])}, "column 'counts' holds int64"),
        ({"counts": pa.array([[1.0] * E] * 2)}, "must hold lists of integers"),
        ({"counts": pa.array([[1] * E, [1]])}, "'counts' is a list of 1 in row 1, but there are 5 experts"),
        ({"counts": pa.array([[1] * E, None])}, "'counts' is null in row 1"),
        ({"counts": pa.array([[1] * E, None], pa.list_(pa.int64(), E))}, "'counts' is null in row 1"),
        ({"counts": pa.array([[1] * E, [1] * 4 + [None]])}, "'counts' holds a null in row 1"),
        ({"counts": pa.array([[1] * E, [1] * 4 + [-2]])}, "'counts' holds -2 in row 1"),
    ],
)
def test_a_bad_file_names_field_and_row(tmp_path, column, said):
    pq.write_table(table_with(**column), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=said):
        read_trace(tmp_path / "t.parquet")
