import bz2
import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.config import DataConfig
from raymoe.training.data import files
from raymoe.training.data.examples import Conversation, Pair
from raymoe.training.data.files import Row
from raymoe.training.data.source import Source
from raymoe.training.text import Document, read_documents

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def memory():
    """A filesystem that pyarrow does not know by itself."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/raymoe", recursive=True)


def test_fsspec_filesystem_reads_as_local_files_do(memory, tmp_path):
    table = pa.table({"text": ["three", "four"]})
    with memory.open("/raymoe/b/rows.parquet", "wb") as file:
        pq.write_table(table, file)
    pq.write_table(table, tmp_path / "rows.parquet")
    memory.pipe("/raymoe/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    found = list(read_documents("memory://raymoe"))
    assert [document.name for document in found] == ["a.jsonl:1", "a.jsonl:2", "b/rows.parquet:1", "b/rows.parquet:2"]
    assert found[2:] == [Document(f"b/{d.name}", d.text) for d in read_documents(tmp_path / "rows.parquet")]
    assert list(read_documents("memory://raymoe/a.jsonl")) == found[:2]


def test_missing_file_on_fsspec_is_refused(memory):
    memory.pipe("/raymoe/a.txt", b"text")
    with pytest.raises(ValueError, match=r"memory://raymoe/b\.txt' does not exist"):
        read_documents("memory://raymoe/b.txt")


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".zst", lambda data: bytes(pa.compress(data, "zstd", asbytes=True))),
    ],
)
def test_compressed_text_and_rows(tmp_path, suffix, compress):
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"some text"))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(b'{"text": "one"}\n{"text": "two"}\n'))
    names = [(document.name, document.text) for document in read_documents(tmp_path)]
    assert names == [(f"a.txt{suffix}", "some text"), (f"b.jsonl{suffix}:1", "one"), (f"b.jsonl{suffix}:2", "two")]


@given(
    text=st.text(alphabet="ab\n\u00e9\U0001f600", min_size=30, max_size=300),
    part_bytes=st.integers(4, 40),
    read_bytes=st.integers(1, 50),
)
@settings(deadline=None, max_examples=50)
def test_parts_of_a_large_text_join_to_it(tmp_path_factory, text, part_bytes, read_bytes):
    path = tmp_path_factory.mktemp("large") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "LARGE_TEXT_BYTES", 20)
        patch.setattr(files, "_LARGE_PART_BYTES", part_bytes)
        patch.setattr(files, "_READ_BYTES", read_bytes)
        parts = list(read_documents(path))
    assert "".join(part.text for part in parts) == text
    assert [part.name for part in parts] == [f"a.txt#{k}" for k in range(len(parts))]
    assert all(part_bytes - 4 <= part.num_bytes <= 2 * part_bytes for part in parts[:-1])


def test_large_text_is_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE_TEXT_BYTES", 10)
    monkeypatch.setattr(files, "_LARGE_PART_BYTES", 8)
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree\nfour\n\nfive")
    assert [part.text for part in read_documents(path)] == ["one\ntwo\n\n", "three\nfour\n\n", "five"]


def test_invalid_utf8_in_a_late_part_counts_bytes_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE_TEXT_BYTES", 10)
    monkeypatch.setattr(files, "_LARGE_PART_BYTES", 8)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 7 + b"\n" + b"y" * 7 + b"\n" + b"ab\xffcd")
    with pytest.raises(ValueError, match=r"a\.txt: invalid UTF-8 at byte 18 \(0xff\)"):
        list(read_documents(path))


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations_and_pairs_of_both_kinds_of_files(tmp_path, suffix):
    tool = [{"role": "user", "content": "q", "name": "me"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": TURNS, "question": "x", "answer": "y"}, {"messages": tool, "question": "", "answer": "z"}]
    path = write_rows(tmp_path / f"r{suffix}", rows)
    config = DataConfig(source=str(path), format="chat")
    names = [f"r{suffix}:1", f"r{suffix}:2"]
    expected = list(map(Conversation, names, [TURNS, tool]))
    assert list(Source(config).examples()) == expected
    config = DataConfig(source=str(path), format="pairs", prompt_field="question", completion_field="answer")
    assert list(Source(config).examples()) == [Pair(names[0], "x", "y"), Pair(names[1], "", "z")]


def test_conversations_pass_over_plain_text(tmp_path):
    write_rows(tmp_path / "r.jsonl", [{"messages": TURNS}])
    (tmp_path / "README.md").write_text("about the data")
    assert [e.name for e in Source(DataConfig(source=str(tmp_path), format="chat")).examples()] == ["r.jsonl:1"]


@pytest.mark.parametrize("source", ["stdlib", "a.txt"])
def test_conversations_need_rows(tmp_path, source):
    (tmp_path / "a.txt").write_text("text")
    source = source if source == "stdlib" else str(tmp_path / source)
    with pytest.raises(
        ValueError, match=r"needs JSONL or Parquet|unknown suffix; known are \.jsonl \.ndjson \.parquet"
    ):
        Source(DataConfig(source=source, format="chat"))


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("chat", {"text": "a"}, r"r\.jsonl line 2: no field 'messages', there are \['text'\]\. Set messages_field"),
        ("pairs", {"prompt": "a"}, r"line 2: no field 'completion', there are \['prompt'\]\. Set completion_field"),
        (
            "pairs",
            {"prompt": "a", "completion": ""},
            r"line 2, field 'completion': empty, so there is nothing to learn",
        ),
        ("pairs", {"prompt": 1, "completion": "a"}, r"line 2, field 'prompt': expected a string, got int"),
    ],
)
def test_bad_rows_name_file_line_and_field(tmp_path, format, row, message):
    good = {"messages": TURNS, "prompt": "p", "completion": "c"}
    path = write_rows(tmp_path / "r.jsonl", [good, row])
    with pytest.raises(ValueError, match=message):
        list(Source(DataConfig(source=str(path), format=format)).examples())


def test_probe_looks_into_many_files(tmp_path):
    for number in range(10):
        write_rows(tmp_path / f"{number}.jsonl", [{"text": f"{number}" * 10}] * 20)
    source = Source(DataConfig(source=str(tmp_path)))
    probe = source.probe(300)
    assert not probe.is_everything
    assert {example.name[0] for example in probe.examples} == set("0123456789")
    assert sum(example.num_bytes for example in probe.examples) == 300  # three of ten bytes from each of ten files
    assert source.probe(2001).is_everything
    assert source.probe(2001).examples == list(source.examples())


def test_probing_given_rows_loses_none():
    rows = [Row(f"d:{i}", f"d row {i}", "column", {"text": "x" * 10}) for i in range(20)]
    source = Source(DataConfig(), iter(rows))
    assert len(source.probe(45).examples) == 5
    assert [example.name for example in source.examples()] == [row.name for row in rows]
    assert source.identity() is None


def test_identity_changes_when_a_file_is_written(tmp_path):
    path = write_rows(tmp_path / "r.jsonl", [{"text": "a"}])
    config = DataConfig(source=str(path))
    before = Source(config).identity()
    assert Source(config).identity() == before
    write_rows(path, [{"text": "bc"}])
    assert Source(config).identity() != before
