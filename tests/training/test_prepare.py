import json
import multiprocessing
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymoe.config import DataConfig, TokenizerConfig
from raymoe.training.batches import open_batches, pack
from raymoe.training.data import prepare, store, tokenise
from raymoe.training.data.files import Row
from raymoe.training.data.prepare import PreparedData, prepare_data
from raymoe.training.data.store import StoreError
from raymoe.training.data.tokenise import TokeniserDied
from raymoe.training.text import read_documents, split_documents
from raymoe.training.tokenizer import load_tokenizer, train_tokenizer

N, B = 16, 6


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [document.text for document in read_documents() if document.name.startswith("pydoc_data/topics/a")]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory, documents) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(documents, 400).save_pretrained(path)
    return path


@pytest.fixture
def corpus(tmp_path, documents) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def small_pieces(monkeypatch):
    """As if the corpus were far larger than what is looked at beforehand, a chunk and a shard."""
    monkeypatch.setattr(prepare, "_PROBE_BYTES", 20_000)
    monkeypatch.setattr(tokenise, "_CHUNK_BYTES", 5_000)
    monkeypatch.setattr(store, "_PUBLISH_S", 0)
    monkeypatch.setattr(store.Index, "__init__", _with_small_shards(store.Index.__init__))


def _with_small_shards(make):
    def made(self, *args, **values):
        make(self, *args, **({"shard_tokens": 1000} | values))

    return made


def config_of(corpus: Path, **options) -> DataConfig:
    options = {"tokenizer_processes": 0, "sequence_length": N, "held_out": 0.1} | options
    return DataConfig(source=str(corpus), **options)


def prepared(config: DataConfig, folder: Path, tokenizer_path: Path | None, **options) -> PreparedData:
    values: dict[str, Any] = {"seed": 3, "global_batch": B} | options
    return prepare_data(config, TokenizerConfig(path=tokenizer_path, vocab_size=300), None, folder, **values)


def stored_tokens(data: PreparedData) -> list[int]:
    data.join()
    return data.store.read(np.array([0]), data.train_tokens)[0][0].tolist()


def rows_of(folder: Path, steps: range) -> torch.Tensor:
    batches = open_batches(folder, sequence_length=N, global_batch=B, seed=3)
    return torch.cat([batches.batch(step).tokens for step in steps])


def test_store_holds_what_pack_makes_of_the_training_side(corpus, tmp_path, tokenizer_path):
    data = prepared(config_of(corpus), tmp_path / "run", tokenizer_path)
    train, held_out = split_documents(read_documents(corpus), 0.1, 3)
    tokenizer = load_tokenizer(tokenizer_path)
    expected = pack(train, tokenizer, N)
    assert stored_tokens(data) == expected.tokens.tolist()
    assert data.train_bytes == expected.num_bytes
    assert data.held_out_documents == held_out
    assert data.held_out.tokens.tolist() == pack(held_out, tokenizer, N).tokens.tolist()
    assert data.train_frequencies().tolist() == np.bincount(expected.tokens, minlength=len(tokenizer)).tolist()
    assert load_tokenizer(tmp_path / "run" / "tokenizer").get_vocab() == tokenizer.get_vocab()


@pytest.mark.usefixtures("small_pieces")
def test_tokens_do_not_depend_on_processes(corpus, tmp_path, tokenizer_path):
    alone = prepared(config_of(corpus), tmp_path / "alone", tokenizer_path)
    together = prepared(config_of(corpus, tokenizer_processes=2), tmp_path / "together", tokenizer_path)
    assert stored_tokens(alone) == stored_tokens(together)
    assert len(list((tmp_path / "together" / "tokens").glob("*.tokens"))) > 5
    together.store.verify()


@pytest.mark.usefixtures("small_pieces")
def test_streamed_source_leaves_out_what_is_held_out(corpus, tmp_path, tokenizer_path, documents):
    data = prepared(config_of(corpus), tmp_path / "run", tokenizer_path)
    held_out = {document.text for document in data.held_out_documents}
    assert 0 < sum(map(len, held_out)) < 10_000
    eos, tokens = data.tokenizer.eos_token_id, np.array(stored_tokens(data))
    ends = np.flatnonzero(tokens == eos)
    texts = [data.tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(ends)]
    assert texts == [text for text in documents if text not in held_out]


def test_held_out_text_is_capped(corpus, tmp_path, tokenizer_path):
    data = prepared(config_of(corpus, held_out=0.4, held_out_bytes=4000), tmp_path / "run", tokenizer_path)
    assert data.held_out.num_bytes == pytest.approx(4000, abs=4000)


@pytest.mark.usefixtures("small_pieces")
def test_training_starts_before_all_is_tokenised_and_in_the_same_order(tmp_path, tokenizer_path, documents):
    """The source stands still after a few rows until the first batches have been read."""
    may_go_on = threading.Event()

    def rows(is_held_up: bool):
        for number, text in enumerate(documents * 4):
            if number == 30 and is_held_up:
                assert may_go_on.wait(60)
            yield Row(f"d:{number}", f"row {number}", "column", {"text": text})

    config = DataConfig(sequence_length=N, shuffle=2 * B, tokenizer_processes=0, held_out=0.1)
    slow = prepared(config, tmp_path / "slow", tokenizer_path, rows=rows(is_held_up=True))
    first = rows_of(tmp_path / "slow", range(2))
    assert not slow.is_complete
    tokens_then = slow.train_tokens
    may_go_on.set()
    slow.join()
    assert slow.is_complete
    assert slow.train_tokens > tokens_then

    fast = prepared(config, tmp_path / "fast", tokenizer_path, rows=rows(is_held_up=False))
    fast.join()
    steps = range(2 * fast.train_tokens // (N * B))
    expected = rows_of(tmp_path / "fast", steps)
    assert torch.equal(expected[: 2 * B], first)
    assert torch.equal(expected, rows_of(tmp_path / "slow", steps))


def test_store_is_used_again_and_follows_the_order_asked_for(corpus, tmp_path, tokenizer_path):
    folder = tmp_path / "run"
    first = prepared(config_of(corpus), folder, tokenizer_path)
    again = prepared(config_of(corpus, shuffle=10, tokenizer_processes=5), folder, tokenizer_path)
    assert again.tokenising is None
    assert stored_tokens(again) == stored_tokens(first)
    assert again.held_out_documents == first.held_out_documents
    assert again.held_out.tokens.tolist() == first.held_out.tokens.tolist()
    first_window = torch.tensor(stored_tokens(first)[: 10 * N + 1]).unfold(0, N + 1, N)
    assert all(row in first_window.tolist() for row in rows_of(folder, range(1)).tolist())
    assert prepared(config_of(corpus), folder, tokenizer_path).store.index.shuffle is None


@pytest.mark.parametrize("change", ["source", "seed", "held_out", "format", "tokenizer"])
def test_store_of_something_else_is_replaced(corpus, tmp_path, tokenizer_path, change):
    folder = tmp_path / "run"
    prepared(config_of(corpus), folder, tokenizer_path)
    config, options, path = config_of(corpus), {}, tokenizer_path
    if change == "source":
        corpus.write_text(corpus.read_text() * 2)
    elif change == "seed":
        options = {"seed": 4}
    elif change == "held_out":
        config = config_of(corpus, held_out=0.2)
    elif change == "format":
        rows = [{"prompt": "p" * 10, "completion": "c" * 50}] * 200
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = config_of(corpus, format="pairs")
    else:
        path = None
    assert prepared(config, folder, path, **options).tokenising is not None


def test_unfinished_store_is_made_anew(corpus, tmp_path, tokenizer_path):
    folder = tmp_path / "run"
    data = prepared(config_of(corpus), folder, tokenizer_path)
    whole = stored_tokens(data)
    index = json.loads((folder / "tokens" / "index.json").read_text())
    (folder / "tokens" / "index.json").write_text(json.dumps(index | {"is_complete": False}))
    assert stored_tokens(prepared(config_of(corpus), folder, tokenizer_path)) == whole


@pytest.mark.parametrize("name", ["00000.tokens", "held_out.json"])
def test_damaged_store_is_refused_by_name(corpus, tmp_path, tokenizer_path, name):
    folder = tmp_path / "run"
    prepared(config_of(corpus), folder, tokenizer_path)
    path = folder / "tokens" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StoreError, match=rf"{name} .*damaged; remove"):
        prepared(config_of(corpus), folder, tokenizer_path)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("processes", [0, 1])
def test_bad_row_in_the_middle_of_a_stream_is_named(corpus, tmp_path, tokenizer_path, processes):
    lines = corpus.read_text().splitlines(keepends=True)
    number = len(lines) - 2
    lines[number] = '{"text": 7}\n'
    corpus.write_text("".join(lines))
    with pytest.raises(ValueError, match=rf"corpus\.jsonl line {number + 1}, field 'text': expected a string, got int"):
        prepared(config_of(corpus, tokenizer_processes=processes), tmp_path / "run", tokenizer_path)


@pytest.mark.usefixtures("small_pieces")
def test_bad_row_after_the_start_reaches_driver_and_ranks(tmp_path, tokenizer_path, documents):
    has_started = threading.Event()

    def rows():
        for number in range(30):
            yield Row(f"d:{number}", f"row {number}", "column", {"text": documents[number % len(documents)]})
        assert has_started.wait(60)
        yield Row("d:30", "rows.parquet row 31", "column", {"text": 7})

    config = DataConfig(sequence_length=N, shuffle=2 * B, tokenizer_processes=0, held_out=0.1)
    data = prepared(config, tmp_path / "run", tokenizer_path, rows=rows())
    data.check()
    has_started.set()
    message = r"rows\.parquet row 31, column 'text': expected a string, got int"
    with pytest.raises(ValueError, match=message):
        data.join()
    with pytest.raises(ValueError, match=message):
        data.check()
    batches = open_batches(tmp_path / "run", sequence_length=N, global_batch=B, seed=3)
    with pytest.raises(StoreError, match=f"could not be tokenised: {message}"):
        batches.batch(10**6)


@pytest.mark.usefixtures("small_pieces")
def test_closing_stops_the_tokenising(tmp_path, tokenizer_path, documents):
    def endless():
        number = 0
        while True:
            number += 1
            yield Row(f"d:{number}", f"row {number}", "column", {"text": documents[number % len(documents)]})

    config = DataConfig(sequence_length=N, shuffle=2 * B, tokenizer_processes=1, held_out=0.1)
    data = prepared(config, tmp_path / "run", tokenizer_path, rows=endless())
    assert data.tokenising is not None
    assert data.tokenising.is_running
    data.close()
    assert not data.tokenising.is_running
    batches = open_batches(tmp_path / "run", sequence_length=N, global_batch=B, seed=3)
    with pytest.raises(StoreError, match="stopped before its end"):
        batches.batch(10**6)


@pytest.mark.usefixtures("small_pieces")
def test_a_killed_process_ends_the_tokenising_with_its_place(tmp_path, tokenizer_path, documents):
    others = set(multiprocessing.active_children())

    def rows():
        for number in range(400):
            if number == 200:
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
                    process.join()
            yield Row(f"d:{number}", f"row {number}", "column", {"text": documents[number % len(documents)]})

    config = DataConfig(sequence_length=N, tokenizer_processes=1, held_out=0.1)
    with pytest.raises(TokeniserDied, match=r"a process that tokenises died, at d:\d+ or soon after"):
        prepared(config, tmp_path / "run", tokenizer_path, rows=rows())


def test_too_little_text_is_refused(corpus, tmp_path, tokenizer_path):
    with pytest.raises(ValueError, match=r"too little text: .* a global batch has 1000000"):
        prepared(config_of(corpus), tmp_path / "run", tokenizer_path, global_batch=10**6)


def test_a_tokenizer_is_trained_on_the_training_side(corpus, tmp_path):
    data = prepared(config_of(corpus), tmp_path / "run", None)
    train, _ = split_documents(read_documents(corpus), 0.1, 3)
    expected = train_tokenizer((document.text for document in train), 300)
    assert data.tokenizer.get_vocab() == expected.get_vocab()


def test_conversations_end_to_end(tmp_path, tokenizer_path):
    path = tmp_path / "chat.jsonl"
    conversations = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i * i}"}]
        for i in range(60)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    config = config_of(path, format="chat")
    data = prepared(config, tmp_path / "run", tokenizer_path)
    batches = open_batches(tmp_path / "run", sequence_length=N, global_batch=B, seed=3)
    learnt = []
    for step in range(batches.num_sequences // B):
        batch = batches.batch(step)
        assert batch.tokens[:, 1:].shape == batch.counts.shape
        learnt += batch.tokens[:, 1:][batch.counts].tolist()
    assert 0.2 < len(learnt) / (batches.num_sequences * N) < 0.8
    spelt = data.tokenizer.decode(learnt)
    assert "question" not in spelt
    assert spelt.count("answer") > 30  # the others are cut by the ends of sequences
    assert data.held_out.counts is not None
    answers = "".join(document.text for document in data.held_out_documents)
    assert data.held_out.num_bytes == len(answers.encode())
    held_out = data.held_out.tokens[data.held_out.counts]
    assert data.tokenizer.decode(held_out[held_out != data.tokenizer.eos_token_id].tolist()) == answers


def test_conversations_need_a_template_before_anything_is_tokenised(tmp_path, tokenizer_path):
    bare = tmp_path / "bare"
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer " * 9}]
    path.write_text((json.dumps({"messages": messages}) + "\n") * 30)
    config = config_of(path, format="chat")
    with pytest.raises(ValueError, match=r"the tokenizer has none.*tokenizer\.chat_template: plain"):
        prepared(config, tmp_path / "run", bare)
    options = TokenizerConfig(path=bare, chat_template="plain")
    data = prepare_data(config, options, None, tmp_path / "run", seed=3, global_batch=B)
    assert "Assistant:\nanswer answer" in data.tokenizer.decode(stored_tokens(data))
    assert load_tokenizer(tmp_path / "run" / "tokenizer").chat_template == data.tokenizer.chat_template
