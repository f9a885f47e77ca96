import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.training.text import Document, cut_document, read_documents, split_documents


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return list(read_documents())


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_stdlib_has_megabytes_of_code_and_english(stdlib):
    reference = sum(document.num_bytes for document in stdlib if document.name.startswith("pydoc_data/topics/"))
    assert reference > 300_000
    assert sum(document.num_bytes for document in stdlib) - reference > 3_000_000


def test_stdlib_has_sources_but_no_tests_and_no_packages(stdlib):
    names = [document.name for document in stdlib]
    assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


def test_stdlib_names_are_unique_and_texts_whole(stdlib):
    assert len({document.name for document in stdlib}) == len(stdlib)
    source = next(document.text for document in stdlib if document.name == "json/decoder.py")
    assert source == Path(json.decoder.__file__).read_bytes().decode()


def test_stdlib_by_name_is_the_default(stdlib):
    assert list(read_documents("stdlib")) == stdlib


def test_text_file_keeps_every_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\n\n\u00e9\u4e2d\U0001f600 \r".encode())
    (document,) = read_documents(path)
    assert document == Document("a.txt", path.read_bytes().decode())
    assert document.num_bytes == path.stat().st_size


def test_directory_is_read_recursively_in_order_of_relative_paths(tmp_path):
    for name in ("b.md", "a/z.py", "a/b.TXT", "c.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    write_jsonl(tmp_path / "a/rows.jsonl", [{"text": "first"}, {"text": "second"}])
    names = [document.name for document in read_documents(tmp_path)]
    assert names == ["a/b.TXT", "a/rows.jsonl:1", "a/rows.jsonl:2", "a/z.py", "b.md", "c.txt"]


def test_directory_passes_over_hidden_empty_and_other_files(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "image.png").write_bytes(b"\xff")
    (tmp_path / "a.txt").write_text("text")
    assert list(read_documents(tmp_path)) == [Document("a.txt", "text")]


def test_uri_and_path_read_the_same(tmp_path):
    (tmp_path / "a b.txt").write_text("text")
    assert list(read_documents(tmp_path.as_uri() + "/")) == list(read_documents(str(tmp_path)))


def test_jsonl_documents_are_named_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "one\\ntwo"}\n\n{"body": "three", "text": 4}')
    documents = list(read_documents(path, text_field="body"))
    assert documents == [Document("rows.jsonl:1", "one\ntwo"), Document("rows.jsonl:3", "three")]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_documents_are_named_by_row_over_batches(tmp_path, kind):
    texts = [f"text {i % 7}" for i in range(2500)]  # more than two read batches
    path = parquet(tmp_path / "rows.parquet", text=pa.array(texts, pa.string()).cast(kind))
    assert list(read_documents(path)) == [Document(f"rows.parquet:{i + 1}", text) for i, text in enumerate(texts)]


def test_missing_source_is_refused_before_reading(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.txt' does not exist"):
        read_documents(tmp_path / "nowhere.txt")


def test_empty_string_is_not_the_working_directory():
    with pytest.raises(ValueError, match="empty string"):
        read_documents("")


def test_unknown_suffix_lists_the_known(tmp_path):
    path = tmp_path / "a.docx"
    path.write_text("text")
    with pytest.raises(ValueError, match=r"a\.docx' has an unknown suffix.*\.jsonl.*\.parquet.*\.txt"):
        read_documents(path)


def test_unknown_uri_scheme_is_refused():
    with pytest.raises(ValueError, match="nosuch://bucket/a"):
        read_documents("nosuch://bucket/a")


def test_directory_without_text_says_what_it_holds(tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no file to read among 1 with suffixes \[\.png\]"):
        read_documents(tmp_path)


def test_source_of_empty_files_is_empty(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        list(read_documents(tmp_path))


def test_invalid_utf8_names_file_and_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"abc\xe9def")
    with pytest.raises(ValueError, match=r"latin\.txt: invalid UTF-8 at byte 3 \(0xe9\)"):
        list(read_documents(path))


def test_invalid_utf8_in_jsonl_counts_bytes_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl line 2: invalid UTF-8 at byte 24 \(0xe9\)"):
        list(read_documents(path))


def test_invalid_utf8_in_parquet_names_row_and_byte(tmp_path):
    column = pa.array([b"fine", b"ab\xff"], pa.binary()).view(pa.string())
    path = parquet(tmp_path / "rows.parquet", text=column)
    with pytest.raises(ValueError, match=r"rows\.parquet row 2, column 'text': invalid UTF-8 at byte 2"):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "b", "id": 1}', r"line 2: no field 'text', there are \['body', 'id'\]"),
        ('{"text": null}', r"line 2, field 'text': expected a string, got NoneType"),
        ('{"text": "\\ud800"}', r"line 2, field 'text': lone surrogate at character 0"),
        ('["text"]', r"line 2: expected a JSON object, got list"),
        ('{"text": ', r"line 2: not JSON"),
    ],
    ids=["missing", "null", "surrogate", "list", "broken"],
)
def test_bad_jsonl_row_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl " + message):
        list(read_documents(path))


def test_parquet_without_the_column_lists_the_columns(tmp_path):
    path = parquet(tmp_path / "rows.parquet", id=pa.array([1]), body=pa.array(["b"]))
    with pytest.raises(ValueError, match=r"rows\.parquet row 1: no column 'text', there are \['body', 'id'\]"):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", None]), "row 2, column 'text': expected a string, got NoneType"),
        (pa.array([1, 2]), "row 1, column 'text': expected a string, got int"),
        (pa.array([b"a"]), "row 1, column 'text': expected a string, got bytes"),
    ],
    ids=["null", "int", "binary"],
)
def test_parquet_value_that_is_no_string_names_its_row(tmp_path, column, message):
    with pytest.raises(ValueError, match=r"rows\.parquet " + message):
        list(read_documents(parquet(tmp_path / "rows.parquet", text=column)))


def test_broken_parquet_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"rows\.parquet: not a Parquet file"):
        list(read_documents(path))


def test_split_holds_out_whole_documents_close_to_the_share(stdlib):
    train, held_out = split_documents(stdlib, 0.05, seed=0)
    assert sorted(train + held_out, key=lambda d: d.name) == sorted(stdlib, key=lambda d: d.name)
    target = 0.05 * sum(d.num_bytes for d in stdlib)
    half_a_document = max(d.num_bytes for d in stdlib) / 2  # more than that off, and one document would bring it closer
    assert sum(d.num_bytes for d in held_out) == pytest.approx(target, abs=half_a_document)


def test_split_does_not_depend_on_the_order_of_reading(stdlib):
    _, held_out = split_documents(stdlib, 0.1, seed=3)
    _, held_out_reversed = split_documents(reversed(stdlib), 0.1, seed=3)
    assert held_out == held_out_reversed[::-1]


def test_split_depends_on_the_seed(stdlib):
    assert split_documents(stdlib, 0.1, seed=0)[1] != split_documents(stdlib, 0.1, seed=1)[1]


@given(sizes=st.lists(st.integers(1, 1000), min_size=2, max_size=20), held_out=st.floats(0.01, 0.5))
def test_split_gives_two_sides_that_keep_their_order(sizes, held_out):
    documents = [Document(f"{i}.txt", "x" * size) for i, size in enumerate(sizes)]
    train, held = split_documents(documents, held_out)
    assert train
    assert held
    assert train == [document for document in documents if document not in held]


def test_split_holds_out_the_tail_of_a_single_text():
    text = "".join(f"paragraph {i}\nof two lines\n\n" for i in range(1000))
    train, held_out = split_documents([Document("book.txt", text)], 0.1)
    assert "".join(d.text for d in train + held_out) == text
    assert train[0].name == "book.txt#0"
    assert sum(d.num_bytes for d in held_out) == pytest.approx(0.1 * len(text), rel=0.3)  # parts of half the share


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(ValueError, match=r"cannot hold out 0\.1 of 1 document\(s\), 8 bytes.*break a single text"):
        split_documents([Document("a.txt", "one line")], 0.1)


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, float("nan")])
def test_split_refuses_a_share_out_of_range(held_out):
    with pytest.raises(ValueError, match=r"share in \(0, 1\)"):
        split_documents([Document("a", "a"), Document("b", "b")], held_out)


@given(text=st.text(alphabet="ab\n\r \u2028\u00e9", max_size=200), part_bytes=st.integers(1, 50))
def test_cut_parts_join_to_the_text(text, part_bytes):
    parts = cut_document(Document("a", text), part_bytes)
    assert "".join(part.text for part in parts) == text
    assert all(part.num_bytes >= part_bytes for part in parts[:-1])


def test_cut_prefers_blank_lines():
    parts = cut_document(Document("a", "one\ntwo\n\nthree\nfour\n"), part_bytes=6)
    assert [part.text for part in parts] == ["one\ntwo\n\n", "three\nfour\n"]
