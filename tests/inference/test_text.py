import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from raymoe.inference.text import StopStrings, StopWatch, TextStream, decoder

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
RARE = "\u9b31"
"""Three bytes, three tokens."""


def stream(tokenizer, tokens, sizes=(1,)) -> list[str]:
    text, parts, at, turn = TextStream(decoder(tokenizer)), [], 0, 0
    while at < len(tokens):
        size = sizes[turn % len(sizes)]
        parts.append(text.push(tokens[at : at + size]))
        at, turn = at + size, turn + 1
    return [*parts, text.finish()]


FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
"""Three emoji and two joiners."""


@pytest.mark.parametrize(
    "text", ["na\u00efve caf\u00e9", "\u4f60\u597d\uff0c\u4e16", f"{FAMILY} fin", "a b  c\n\td", "\u00df"]
)
def test_characters_of_several_tokens_come_out_whole(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    parts = stream(tokenizer, tokens)
    assert "".join(parts) == text
    assert not any(INCOMPLETE in part for part in parts)


@given(text=st.text(max_size=30), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_any_text_survives(tokenizer, text, sizes):
    tokens = tokenizer(text)["input_ids"]
    assert "".join(stream(tokenizer, tokens, sizes)) == tokenizer.decode(tokens)


@given(tokens=st.lists(st.integers(3, 279), max_size=20))
def test_any_tokens_add_up_to_what_they_decode_to(tokenizer, tokens):
    """Also those that spell no text, as a random model writes."""
    assert "".join(stream(tokenizer, tokens)) == decoder(tokenizer)(tokens)


def test_what_is_whole_does_not_wait_for_what_is_not(tokenizer):
    one, half = tokenizer("ab")["input_ids"], tokenizer(RARE)["input_ids"][:1]
    text = TextStream(decoder(tokenizer))
    assert text.push(one + half) == "ab"
    assert text.push(tokenizer(RARE)["input_ids"][1:]) == RARE


def test_bytes_that_never_become_a_character_come_out_at_the_end(tokenizer):
    text = TextStream(decoder(tokenizer))
    assert text.push(tokenizer(RARE)["input_ids"][:1]) == ""
    assert text.finish() == INCOMPLETE


def test_special_tokens_are_not_text(tokenizer):
    assert "".join(stream(tokenizer, [*tokenizer("hi")["input_ids"], tokenizer.eos_token_id])) == "hi"


def test_byte_fallback_tokenizers_keep_blanks_and_characters():
    """A Llama-style vocabulary: words begin with a blank, unknown characters are spelled byte by byte."""
    vocab = {"<unk>": 0, "\u2581Hello": 1, "\u2581world": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = [1, 2, *(3 + byte for byte in "\u4f60\u597d\u00e9".encode()), 2]
    parts = stream(tokenizer, tokens)
    assert "".join(parts) == "Hello world\u4f60\u597d\u00e9 world"
    assert not any(INCOMPLETE in part for part in parts)
    # a completion goes on after its prompt: the blank between them is part of it
    after_prompt = TextStream(decoder(tokenizer), context=[1])
    assert after_prompt.push([2]) == " world"


def feed(stops, parts) -> tuple[list[str], bool]:
    strings, sent = StopStrings(stops), []
    for part in parts:
        ready, is_stopped = strings.push(part)
        sent.append(ready)
        if is_stopped:
            return sent, True
    return [*sent, strings.finish()], False


def test_a_stop_string_across_pieces_is_cut_and_never_begun():
    assert feed(["END"], ["abE", "N", "Dxy"]) == (["ab", "", ""], True)


def test_a_beginning_that_goes_on_otherwise_is_sent():
    assert feed(["END"], ["abEN", "O"]) == (["ab", "ENO", ""], False)


def test_a_beginning_at_the_end_is_sent():
    assert feed(["END"], ["abEN"]) == (["ab", "EN"], False)


def test_the_first_stop_string_in_the_text_wins():
    assert feed(["yz", "b"], ["abyz"]) == (["a"], True)


def test_of_stop_strings_that_end_together_the_longest_is_cut():
    strings = StopStrings(["b", "ab", "xab"])
    assert (strings.push("cabz"), strings.found) == (("c", True), "ab")


@given(
    text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=3), max_size=4), cuts=st.data()
)
def test_pieces_make_no_difference(text, stops, cuts):
    at = sorted(cuts.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    sent, is_stopped = feed(stops, parts)
    ends = [(end, -len(stop)) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
    assert is_stopped == bool(ends)
    assert "".join(sent) == (text[: sum(min(ends))] if ends else text)


@given(text=st.text("ab\u00fc\u9b31", max_size=12), stop=st.text("ab\u00fc\u9b31", min_size=1, max_size=3))
def test_the_watch_ends_at_the_token_that_completes_the_stop_string(tokenizer, text, stop):
    tokens = tokenizer(text)["input_ids"]
    decode = decoder(tokenizer)
    first = next((n for n in range(1, len(tokens) + 1) if stop in decode(tokens[:n])), None)
    watch = StopWatch(decode, [stop, "zzz"])
    assert watch.take(tokens) == first
    assert watch.found == (stop if first else None)
