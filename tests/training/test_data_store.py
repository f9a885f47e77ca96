import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.training.data.store import INDEX, Index, StoreError, StoreWriter, TokenStore


def index(has_counts: bool = False, shard_tokens: int = 7) -> Index:
    return Index(digest="d", dtype="<u2", has_counts=has_counts, shuffle=None, shard_tokens=shard_tokens)


def write(folder, tokens: np.ndarray, counts: np.ndarray | None = None, shard_tokens: int = 7) -> TokenStore:
    writer = StoreWriter(folder, index(counts is not None, shard_tokens))
    writer.append(tokens, counts, num_bytes=len(tokens), num_examples=1)
    writer.finish()
    return TokenStore(folder)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    shard_tokens=st.integers(1, 40),
    has_counts=st.booleans(),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=40)
def test_reads_give_back_what_was_appended(tmp_path_factory, lengths, shard_tokens, has_counts, share):
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(sum(lengths))
    pieces = [rng.integers(0, 1 << 16, length) for length in lengths]
    masks = [rng.random(length) < 0.5 for length in lengths]
    writer = StoreWriter(folder, index(has_counts, shard_tokens))
    for piece, mask in zip(pieces, masks, strict=True):
        writer.append(piece, mask if has_counts else None, len(piece), 1)
    writer.finish()
    store = TokenStore(folder)
    store.verify()
    tokens, counts = np.concatenate(pieces), np.concatenate(masks)
    assert (store.num_tokens, store.index.bytes, store.index.examples) == (len(tokens), len(tokens), len(pieces))
    if not len(tokens):
        return
    length = 1 + int(share * (len(tokens) - 1))
    starts = np.arange(len(tokens) - length + 1)
    read, learnt = store.read(starts, length)
    assert read.tolist() == [tokens[start : start + length].tolist() for start in starts]
    assert (learnt is not None) == has_counts
    if learnt is not None:
        assert learnt.tolist() == [counts[start : start + length].tolist() for start in starts]
    assert store.frequencies(1 << 16).tolist() == np.bincount(tokens, minlength=1 << 16).tolist()


def test_reader_waits_for_tokens_that_are_being_written(tmp_path):
    writer = StoreWriter(tmp_path, index())
    store = TokenStore(tmp_path, timeout_s=30)
    assert (store.num_tokens, store.is_complete) == (0, False)

    def write_slowly():
        for start in range(0, 40, 4):
            writer.append(np.arange(start, start + 4), None, 4, 1)
        writer.finish()

    thread = threading.Timer(0.3, write_slowly)
    thread.start()
    store.wait(40)
    assert store.read(np.array([0]), 40)[0].tolist() == [list(range(40))]
    thread.join()


def test_waiting_ends_when_all_is_there(tmp_path):
    store = write(tmp_path, np.arange(5))
    store.wait(6)
    assert (store.num_tokens, store.is_complete) == (5, True)


def test_waiting_ends_with_the_error_of_the_writer(tmp_path):
    StoreWriter(tmp_path, index()).fail("rows.jsonl line 3: not JSON")
    with pytest.raises(StoreError, match=r"could not be tokenised: rows\.jsonl line 3: not JSON"):
        TokenStore(tmp_path).wait(1)


def test_waiting_ends_when_nothing_comes(tmp_path):
    StoreWriter(tmp_path, index())
    with pytest.raises(TimeoutError, match=r"waited 0 s for 9 tokens; still 0\. Is the process that tokenises alive"):
        TokenStore(tmp_path, timeout_s=0.2).wait(9)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"00001\.tokens is missing; remove"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"00001\.tokens is damaged; remove"),
        (lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:]), r"00001\.tokens is damaged; remove"),
    ],
    ids=["missing", "cut", "changed"],
)
def test_verify_names_the_damaged_file(tmp_path, damage, message):
    store = write(tmp_path, np.arange(100, 120))
    store.verify()
    damage(tmp_path / "00001.tokens")
    with pytest.raises(StoreError, match=message):
        store.verify()


def test_reading_a_cut_shard_names_it(tmp_path):
    store = write(tmp_path, np.arange(20), np.ones(20, dtype=bool))
    (tmp_path / "00001.counts").write_bytes(b"")
    with pytest.raises(StoreError, match=r"00001\.counts is missing or shorter than 7 tokens"):
        store.read(np.array([3]), 6)


@pytest.mark.parametrize("text", ["", "{}", '{"layout": 1}', "[]"])
def test_damaged_index_is_refused(tmp_path, text):
    write(tmp_path, np.arange(5))
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(StoreError, match=r"index\.json is damaged; remove"):
        TokenStore(tmp_path)


def test_index_of_another_layout_is_refused(tmp_path):
    write(tmp_path, np.arange(5))
    (tmp_path / INDEX).write_text('{"layout": 99}')
    with pytest.raises(StoreError, match="another version of raymoe"):
        TokenStore(tmp_path)


def test_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="nowhere holds no tokens"):
        TokenStore(tmp_path / "nowhere")


def test_a_new_store_replaces_the_old_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, np.arange(50))
    store = write(tmp_path, np.arange(5))
    assert store.num_tokens == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tokens", INDEX, "notes.txt"]


def test_token_outside_of_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"token 9 in .*, but vocab_size is 9"):
        write(tmp_path, np.arange(10)).frequencies(9)
