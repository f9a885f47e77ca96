"""Stop strings and log-probabilities against a model that is run by hand."""

import pytest
import torch

from raymoe.inference import InferenceEngine, SamplingParams
from raymoe.inference.text import decoder
from tests.inference.conftest import generate_alone, random_prompts
from tests.inference.test_engine import Inbox
from tests.tiny_models import tiny_model

PROMPT = [40, 7, 93]


@pytest.fixture(scope="module")
def speaking(tokenizer, tmp_path_factory):
    """A model and an engine that know the same text."""
    path = tmp_path_factory.mktemp("speaking")
    model = tiny_model("olmoe", vocab_size=len(tokenizer))
    model.save_pretrained(path)
    with InferenceEngine(path, max_batch_tokens=64, kv_tokens=1024, decode=decoder(tokenizer)) as engine:
        yield model, engine


def ask(engine: InferenceEngine, prompt=PROMPT, **params) -> tuple[Inbox, list]:
    inbox, deltas = Inbox(), []
    engine.submit(prompt, SamplingParams(**({"temperature": 0.0, "stop_token_ids": ()} | params)), inbox)
    while inbox.reason is None:
        deltas.append(inbox.next())
    return inbox, deltas


def test_a_stop_string_ends_the_request_at_its_last_token(speaking, tokenizer):
    model, engine = speaking
    tokens = generate_alone(model, PROMPT, 30)
    decode = decoder(tokenizer)
    # over a token boundary: the last character of one token and the first of the next
    at = next(n for n in range(3, 29) if decode(tokens[: n + 1])[-2:].isascii() and len(decode(tokens[n : n + 1])) == 1)
    stop = decode(tokens[: at + 1])[-2:]
    first = next(n for n in range(1, 31) if stop in decode(tokens[:n]))
    steps = engine.stats()["steps"]
    inbox, deltas = ask(engine, max_tokens=30, stop=("never so", stop))
    assert inbox.tokens == tokens[:first]
    assert (inbox.reason, deltas[-1].stop_string) == ("stop", stop)
    # nothing is computed after it, and what comes next starts in a step of its own
    assert engine.stats()["steps"] - steps == first
    assert ask(engine, max_tokens=2)[0].tokens == tokens[:2]
    assert engine.stats()["steps"] - steps == first + 2
    assert engine.stats()["requests_running"] == 0


def test_a_stop_string_that_does_not_come_changes_nothing(speaking):
    model, engine = speaking
    inbox, deltas = ask(engine, max_tokens=12, stop=("never so",))
    assert (inbox.tokens, inbox.reason, deltas[-1].stop_string) == (generate_alone(model, PROMPT, 12), "length", None)


def test_a_stop_token_is_no_text_of_a_stop_string(speaking, tokenizer):
    model, engine = speaking
    tokens = generate_alone(model, PROMPT, 10)
    stop = tokens[3]
    inbox, deltas = ask(engine, max_tokens=10, stop_token_ids=(stop,), stop=(tokenizer.decode([stop]) + "?",))
    assert inbox.tokens == tokens[: tokens.index(stop) + 1]
    assert (inbox.reason, deltas[-1].stop_string) == ("stop", None)


def test_an_engine_without_text_refuses_stop_strings(make_engine):
    with pytest.raises(ValueError, match=r"^stop: this engine knows no text; make it with decode="):
        make_engine().submit(PROMPT, SamplingParams(stop=("x",)), Inbox())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop": "x"}, "stop must be a tuple of texts, none of them empty, got 'x'"),
        ({"stop": ("a", "")}, "stop must be a tuple of texts"),
        ({"logprobs": 21}, "logprobs must be an integer from 0 to 20, got 21"),
        ({"logprobs": True}, "logprobs must be an integer from 0 to 20"),
    ],
)
def test_bad_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


def by_hand(model, prompt, tokens) -> torch.Tensor:
    """log p(token | all before) of every token of the vocabulary at each place of the answer: one forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(dim=-1)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.7, "seed": 3, "top_k": 9}], ids=["greedy", "drawn"])
def test_log_probabilities_are_the_models_own(speaking, params):
    model, engine = speaking
    inbox, deltas = ask(engine, max_tokens=9, logprobs=4, **params)
    told = [one for delta in deltas for one in delta.logprobs]
    assert [len(delta.logprobs) for delta in deltas] == [len(delta.tokens) for delta in deltas]
    assert [one.token for one in told] == inbox.tokens
    expected = by_hand(model, PROMPT, inbox.tokens)
    for one, row in zip(told, expected, strict=True):
        assert one.logprob == pytest.approx(row[one.token].item(), abs=1e-4)
        values, tokens = row.topk(4)
        assert [token for token, _ in one.top] == tokens.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_each_request_gets_the_log_probabilities_it_asked_for(saved_model, make_engine):
    """Six requests that do not fit the KV cache together: some are taken out and come back."""
    model, _ = saved_model("olmoe")
    prompts = random_prompts([40, 50, 33, 60, 20, 45])
    engine = make_engine(kv_tokens=128, max_batch_tokens=48)
    wanted = [None, 0, 1, 2, None, 3]
    inboxes, told = [Inbox() for _ in prompts], [[] for _ in prompts]
    for prompt, inbox, num in zip(prompts, inboxes, wanted, strict=True):
        engine.submit(prompt, SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=(), logprobs=num), inbox)
    for inbox, found, num in zip(inboxes, told, wanted, strict=True):
        while inbox.reason is None:
            delta = inbox.next()
            assert (delta.logprobs is None) == (num is None)
            found += delta.logprobs or []
    for prompt, inbox, found, num in zip(prompts, inboxes, told, wanted, strict=True):
        assert inbox.tokens == generate_alone(model, prompt, 20)
        if num is not None:
            assert [(one.token, len(one.top)) for one in found] == [(token, num) for token in inbox.tokens]
            rows = by_hand(model, prompt, inbox.tokens)
            assert [one.logprob for one in found] == pytest.approx(rows.max(dim=-1).values.tolist(), abs=1e-4)
