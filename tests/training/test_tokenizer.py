import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from raymoe.training.text import read_documents
from raymoe.training.tokenizer import (
    ASSISTANT,
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    USER,
    _sample,
    load_tokenizer,
    plain_encoder,
    train_tokenizer,
)

VOCAB_SIZE = 512


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in read_documents() if document.name.startswith("pydoc_data/topics/")]


@pytest.fixture(scope="module")
def tokenizer(texts) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts, VOCAB_SIZE)


@given(text=st.text())
@settings(deadline=None)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(pieces=st.lists(st.sampled_from([END_OF_TEXT, USER, " ", "\n", "a", " .", "'s", "\u00e9"]), max_size=12))
@settings(deadline=None)
def test_text_that_spells_special_tokens_is_text(tokenizer, pieces):
    text = "".join(pieces)
    ids = plain_encoder(tokenizer).encode(text, add_special_tokens=False).ids
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text


@given(data=st.binary())
@settings(deadline=None)
def test_any_bytes_can_be_spelt_and_decoded(tokenizer, data):
    byte_tokens = sorted(token for token in tokenizer.get_vocab() if len(token) == 1)
    assert len(byte_tokens) == 256
    text = data.decode(errors="replace")  # what the bytes are as text, and what a decoder must make of them
    ids = [tokenizer.convert_tokens_to_ids(byte_token(byte)) for byte in data]
    assert tokenizer.decode(ids) == text


def byte_token(byte: int) -> str:
    """The printable stand-in of a byte: itself if printable in Latin-1, else the next free character from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def test_real_text_takes_fewer_tokens_than_bytes(tokenizer, texts):
    text = texts[0]
    assert len(tokenizer.encode(text)) < 0.6 * len(text.encode())


def test_vocabulary_has_the_size_asked_for(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert max(tokenizer.get_vocab().values()) == VOCAB_SIZE - 1


def test_small_text_gives_a_smaller_vocabulary():
    assert MIN_VOCAB_SIZE <= len(train_tokenizer(["abab abab"], 1000)) < 300


def test_special_tokens_have_their_roles(tokenizer):
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (END_OF_TEXT,) * 3
    assert tokenizer.eos_token_id == 0
    assert set(tokenizer.all_special_tokens) == {END_OF_TEXT, USER, ASSISTANT}


def test_encode_adds_no_special_token(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.encode(USER + "a")[0] == tokenizer.convert_tokens_to_ids(USER)


def test_too_small_vocabulary_names_the_minimum():
    with pytest.raises(ValueError, match=rf"vocab_size 258 is too small.*at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(["text"], MIN_VOCAB_SIZE - 1)


def test_smallest_vocabulary_is_bytes_alone():
    tokenizer = train_tokenizer(["abab abab"], MIN_VOCAB_SIZE)
    assert len(tokenizer.encode("caf\u00e9")) == 5


@pytest.mark.parametrize("texts", [[], ["", ""]], ids=["none", "empty"])
def test_no_text_is_refused(texts):
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(texts, VOCAB_SIZE)


def test_same_text_gives_the_same_tokenizer_in_another_process(tokenizer, texts):
    code = (
        "import os, sys; os.environ['TOKENIZERS_PARALLELISM'] = 'false'\n"
        "from raymoe.training.text import read_documents\n"
        "from raymoe.training.tokenizer import train_tokenizer\n"
        "texts = [d.text for d in read_documents() if d.name.startswith('pydoc_data/topics/')]\n"
        f"sys.stdout.write(train_tokenizer(texts, {VOCAB_SIZE}).backend_tokenizer.to_str())\n"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert other.stdout == tokenizer.backend_tokenizer.to_str()


def test_sample_is_spread_over_all_texts():
    # each text brings a word that no other has: a prefix of the texts would not know the last ones
    texts = [f"{'abcdefghij'[i] * 9}\n" * 2000 for i in range(10)]
    tokenizer = train_tokenizer(iter(texts), VOCAB_SIZE, max_bytes=100_000)
    assert all(len(tokenizer.encode(letter * 9)) == 1 for letter in "abcdefghij")


@given(
    lengths=st.lists(st.integers(0, 30_000), max_size=20),
    line=st.integers(1, 20_000),
    max_bytes=st.integers(20_000, 60_000),
)
@example(lengths=[1, 7502, 12498], line=7501, max_bytes=20_000)
@settings(deadline=None)
def test_sample_is_bounded_and_everything_if_that_fits(lengths, line, max_bytes):
    texts = [("x" * (line - 1) + "\n") * (length // line) + "x" * (length % line) for length in lengths]
    sample = _sample(iter(texts), max_bytes)
    size, total = sum(map(len, sample)), sum(lengths)
    assert size <= max_bytes
    assert size == total if total <= max_bytes else size > max_bytes / 4  # blocks differ up to twofold in length


def test_chat_template_marks_turns_and_asks_for_an_answer(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": " Who"}, {"type": "text", "text": " are you?"}]},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "Be brief.\n<|user|>\nHello\n<|assistant|>\nHi<|endoftext|>\n<|user|>\n Who are you?\n<|assistant|>\n"
    )


def test_chat_template_without_generation_prompt_ends_with_the_message(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert text == "<|user|>\nHello\n"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "wizard", "content": "a"}, "unknown role wizard"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "only text content is supported, got image_url"),
    ],
)
def test_chat_template_refuses_what_it_cannot_say(tokenizer, message, error):
    with pytest.raises(Exception, match=error):  # jinja2.TemplateError; jinja2 comes with transformers
        tokenizer.apply_chat_template([message], tokenize=False)


def test_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = f"{USER}\n don't , caf\u00e9 \U0001f600 .{END_OF_TEXT}"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 0)


def test_load_refuses_a_missing_directory(tmp_path):
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        load_tokenizer(tmp_path / "nowhere")


def test_load_refuses_a_directory_without_tokenizer(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"no tokenizer in .*which holds \['notes\.txt'\]"):
        load_tokenizer(tmp_path)


def test_load_refuses_a_tokenizer_without_eos(tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=plain_encoder(tokenizer)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no eos token"):
        load_tokenizer(tmp_path)


def test_plain_encoder_ignores_truncation_and_leaves_the_tokenizer_alone(tokenizer):
    shared = PreTrainedTokenizerFast(tokenizer_object=plain_encoder(tokenizer), eos_token=END_OF_TEXT)
    shared.backend_tokenizer.enable_truncation(2)
    shared.backend_tokenizer.enable_padding(length=8)
    text = "a longer text than two tokens"
    encoded = plain_encoder(shared).encode_batch_fast([text, ""], add_special_tokens=False)
    assert [encoding.ids for encoding in encoded] == [tokenizer.encode(text), []]
    assert shared.backend_tokenizer.truncation["max_length"] == 2
