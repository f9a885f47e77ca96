from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from raymoe.training.batches import Batch, Batches, TokenStream, num_sequences, pack, rank_slice
from raymoe.training.text import Document, read_documents
from raymoe.training.tokenizer import END_OF_TEXT, MIN_VOCAB_SIZE, train_tokenizer

N = 4


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [document for document in read_documents() if document.name.startswith(("json/", "pydoc_data/"))]


@pytest.fixture(scope="module")
def tokenizer(documents) -> PreTrainedTokenizerFast:
    return train_tokenizer((document.text for document in documents), MIN_VOCAB_SIZE + 100)


def counting_stream(num_tokens: int) -> TokenStream:
    return TokenStream(np.arange(num_tokens, dtype=np.int32), num_bytes=num_tokens)


def test_pack_puts_eos_around_every_document(documents, tokenizer):
    stream = pack(documents, tokenizer, N)
    eos = tokenizer.eos_token_id
    expected = [eos]
    for document in documents:
        expected += [*tokenizer.encode(document.text), eos]
    assert stream.tokens.tolist() == expected
    assert stream.tokens.dtype == np.int32
    assert stream.tokens.flags.c_contiguous


def test_pack_counts_the_bytes_of_the_texts(documents, tokenizer):
    stream = pack(iter(documents), tokenizer, N)
    assert stream.num_bytes == sum(len(document.text.encode()) for document in documents)


@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5))
@settings(deadline=None)
def test_packed_tokens_spell_exactly_the_texts(tokenizer, texts):
    stream = pack([Document(str(i), text) for i, text in enumerate(texts)], tokenizer, 1)
    ends = np.flatnonzero(stream.tokens == tokenizer.eos_token_id)
    spelt = [tokenizer.decode(stream.tokens[a + 1 : b].tolist()) for a, b in pairwise(ends)]
    assert (spelt, ends[0], ends[-1]) == (texts, 0, len(stream.tokens) - 1)
    assert stream.num_bytes == len("".join(texts).encode())


def test_separators_in_a_text_are_text(tokenizer):
    stream = pack([Document("a", f"a {END_OF_TEXT} b")], tokenizer, N)
    assert (stream.tokens == tokenizer.eos_token_id).sum() == 2


def test_pack_refuses_less_than_one_sequence(tokenizer):
    with pytest.raises(ValueError, match=r"1 document\(s\), 2 bytes, are 4 tokens, and one sequence of 8 needs 9"):
        pack([Document("a", "zq")], tokenizer, 8)


def test_pack_needs_eos(tokenizer):
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no eos token"):
        pack([Document("a", "text")], without, 1)


def test_digest_tells_streams_apart():
    stream = counting_stream(10)
    assert stream.digest == counting_stream(10).digest
    assert stream.digest != TokenStream(stream.tokens, 9).digest
    assert stream.digest != TokenStream(stream.tokens[::-1].copy(), 10).digest


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_neighbouring_sequences_share_one_token(num_tokens, expected):
    assert num_sequences(num_tokens, N) == expected


@given(
    num_tokens=st.integers(N + 1, 120),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    num_passes=st.integers(1, 4),
)
def test_every_pass_has_each_sequence_once(num_tokens, share, seed, num_passes):
    total = num_sequences(num_tokens, N)
    global_batch = 1 + int(share * (total - 1))
    batches = Batches(counting_stream(num_tokens), N, global_batch, seed)
    steps = -(-num_passes * total // global_batch)
    rows = torch.cat([batches.batch(step).tokens for step in range(steps)])
    assert torch.equal(rows, rows[:, :1] + torch.arange(N + 1))
    for k in range(num_passes):
        assert sorted((rows[k * total : (k + 1) * total, 0] // N).tolist()) == list(range(total))


def test_batch_is_int64_of_one_token_more():
    batch = Batches(counting_stream(100), N, 3, seed=0).batch(0)
    assert (batch.tokens.dtype, batch.tokens.shape) == (torch.int64, (3, N + 1))
    assert (batch.counts.dtype, batch.counts.shape, bool(batch.counts.all())) == (torch.bool, (3, N), True)


@given(steps=st.lists(st.integers(0, 200), min_size=1, max_size=10))
def test_batch_depends_on_the_step_alone(steps):
    asked_before = Batches(counting_stream(100), N, 7, seed=5)
    for step in steps:
        afresh = Batches(counting_stream(100), N, 7, seed=5)
        assert torch.equal(asked_before.batch(step).tokens, afresh.batch(step).tokens)


def test_order_is_the_same_in_every_release():
    # recorded once: a run that resumes after an upgrade must read on where it stopped
    first = Batches(counting_stream(10 * N + 1), N, 10, seed=7).batch(0).tokens[:, 0] // N
    assert first.tolist() == [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]


def test_passes_and_seeds_differ():
    batches = Batches(counting_stream(400), N, 99, seed=0)
    assert not torch.equal(batches.batch(0).tokens, batches.batch(1).tokens)
    assert not torch.equal(batches.batch(0).tokens, Batches(counting_stream(400), N, 99, seed=1).batch(0).tokens)


def test_batch_does_not_write_to_the_stream():
    stream = counting_stream(100)
    stream.tokens.flags.writeable = False
    Batches(stream, N, 3, seed=0).batch(0).tokens.zero_()
    assert stream.tokens.tolist() == list(range(100))


def test_too_little_text_for_one_batch_gives_the_numbers():
    with pytest.raises(ValueError, match=r"20 tokens make 4 sequence\(s\) of 4, a global batch has 5"):
        Batches(counting_stream(20), N, 5, seed=0)


@pytest.mark.parametrize(
    ("length", "global_batch", "seed", "message"),
    [(0, 1, 0, "positive, got 0 and 1"), (4, 0, 0, "positive, got 4 and 0"), (4, 1, -1, "seed must be in")],
)
def test_settings_out_of_range_are_refused(length, global_batch, seed, message):
    with pytest.raises(ValueError, match=message):
        Batches(counting_stream(20), length, global_batch, seed)


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match="step must not be negative"):
        Batches(counting_stream(20), N, 1, seed=0).batch(-1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_hold_the_global_batch(world):
    batch = Batches(counting_stream(100), N, 7, seed=0).batch(2)
    parts = [rank_slice(batch, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    assert torch.equal(torch.cat([part.counts for part in parts]), batch.counts)


@given(rows=st.integers(0, 40), world=st.integers(1, 12))
def test_rank_slices_are_contiguous_and_near_even(rows, world):
    batch = Batch(torch.arange(rows)[:, None], torch.ones(rows, 0, dtype=torch.bool))
    parts = [rank_slice(batch, rank, world) for rank in range(world)]
    assert torch.cat([part.tokens for part in parts])[:, 0].tolist() == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        rank_slice(Batches(counting_stream(100), N, 4, seed=0).batch(0), 2, 2)


def test_counts_follow_their_targets():
    counts = np.random.default_rng(0).random(100) < 0.5
    batch = Batches(TokenStream(np.arange(100, dtype=np.int32), 100, counts), N, 7, seed=0).batch(0)
    assert batch.counts.tolist() == [[bool(counts[token]) for token in row[1:]] for row in batch.tokens.tolist()]


@given(
    num_tokens=st.integers(N + 1, 200),
    window=st.integers(1, 60),
    global_batch=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_windows_hold_neighbours_and_every_pass_has_each_sequence_once(num_tokens, window, global_batch, seed):
    total = num_sequences(num_tokens, N)
    global_batch = min(global_batch, total)
    batches = Batches(counting_stream(num_tokens), N, global_batch, seed, window)
    rows = torch.cat([batches.batch(step).tokens for step in range(-(-2 * total // global_batch))])
    sequences = (rows[:, 0] // N).tolist()
    for first in (0, total):
        for start in range(0, total, window):
            end = min(start + window, total)
            assert sorted(sequences[first + start : first + end]) == list(range(start, end))


def test_a_window_as_long_as_the_stream_is_a_shuffle_of_all():
    everything = Batches(counting_stream(100), N, 7, seed=3)
    window = Batches(counting_stream(100), N, 7, seed=3, window=1000)
    assert torch.equal(everything.batch(5).tokens, window.batch(5).tokens)


def test_windows_are_shuffled_each_in_its_own_way():
    rows = Batches(counting_stream(20 * N + 1), N, 20, seed=0, window=10).batch(0).tokens[:, 0] // N
    assert (rows[:10] + 10).tolist() != rows[10:].tolist()


class GrowingStream:
    """Gives a few tokens more each time somebody waits."""

    def __init__(self, whole: TokenStream, num_tokens: int):
        self.whole, self.num_tokens = whole, num_tokens
        self.waits = 0

    @property
    def is_complete(self) -> bool:
        return self.num_tokens == self.whole.num_tokens

    def wait(self, num_tokens: int | None) -> None:
        wanted = self.whole.num_tokens if num_tokens is None else num_tokens
        self.waits += self.num_tokens < wanted
        self.num_tokens = max(self.num_tokens, min(wanted + 3, self.whole.num_tokens))

    def read(self, starts, length):
        assert starts.max() + length <= self.num_tokens
        return self.whole.read(starts, length)


@given(
    num_tokens=st.integers(N + 1, 200),
    start=st.integers(0, 200),
    window=st.none() | st.integers(1, 60),
    global_batch=st.integers(1, 20),
)
def test_order_does_not_depend_on_how_much_is_there(num_tokens, start, window, global_batch):
    whole = counting_stream(num_tokens)
    global_batch = min(global_batch, num_sequences(num_tokens, N))
    expected = Batches(whole, N, global_batch, 1, window)
    growing = Batches(GrowingStream(whole, min(start, num_tokens)), N, global_batch, 1, window)
    for step in range(2 * -(-num_tokens // (N * global_batch))):
        assert torch.equal(growing.batch(step).tokens, expected.batch(step).tokens)


def test_first_steps_need_the_first_windows_only():
    stream = GrowingStream(counting_stream(100 * N + 1), 0)
    batches = Batches(stream, N, 5, seed=0, window=10)
    batches.batch(0)
    assert stream.num_tokens == 10 * N + 1 + 3
    assert not stream.is_complete
