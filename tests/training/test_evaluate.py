import gzip
import lzma
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from raymoe.training.batches import TokenStream, pack
from raymoe.training.evaluate import (
    baselines,
    bits_per_byte,
    evaluate,
    gzip_bits_per_byte,
    unigram_bits_per_byte,
    xz_bits_per_byte,
)
from raymoe.training.text import Document, read_documents, split_documents
from raymoe.training.tokenizer import train_tokenizer

V = 37


class Uniform(nn.Module):
    """All logits zero, so every token costs log2(V) bits; remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.inputs: list[torch.Tensor] = []
        self.modes: list[bool] = []

    def forward(self, input_ids, use_cache):
        self.inputs.append(input_ids)
        self.modes.append(self.training or torch.is_grad_enabled())
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, V))


def random_stream(num_tokens: int, num_bytes: int = 100) -> TokenStream:
    return TokenStream(np.random.default_rng(0).integers(0, V, num_tokens, dtype=np.int32), num_bytes)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=1.0,  # far from uniform
        attention_dropout=0.5,  # would show if the model were not in eval mode
    )
    return LlamaForCausalLM(config)


def test_bits_per_byte_of_one_byte_a_choice_of_256():
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8, rel=1e-15)


def test_bits_per_byte_need_bytes():
    with pytest.raises(ValueError, match="got 0 bytes"):
        bits_per_byte(1.0, 0)


@pytest.mark.parametrize("num_tokens", [2, 5, 8, 9, 10, 57, 64, 65])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_uniform_model_costs_log2_of_the_vocabulary_a_token(num_tokens, batch_size):
    result = evaluate(Uniform(), random_stream(num_tokens, num_bytes=10), 8, batch_size, "cpu")
    assert (result.tokens, result.bytes) == (num_tokens - 1, 10)
    assert result.bits_per_byte == pytest.approx(math.log2(V) * (num_tokens - 1) / 10, rel=1e-6)  # float32 losses
    assert result.loss == pytest.approx(math.log(V), rel=1e-6)


@pytest.mark.parametrize("num_tokens", [2, 8, 9, 10, 57])
def test_every_token_but_the_last_is_read_once_in_order(num_tokens):
    model = Uniform()
    stream = random_stream(num_tokens)
    evaluate(model, stream, 8, 3, "cpu")
    read = torch.cat([inputs.flatten() for inputs in model.inputs])
    assert read.tolist() == stream.tokens[:-1].tolist()
    assert all(inputs.shape[1] <= 8 and inputs.shape[0] <= 3 for inputs in model.inputs)


def test_matches_a_loop_over_windows_with_the_loss_of_transformers(llama):
    stream = random_stream(50)
    result = evaluate(llama, stream, 8, 4, "cpu")
    nats = 0.0
    with torch.no_grad():
        llama.eval()
        for start in range(0, 49, 8):
            window = torch.tensor(stream.tokens[start : start + 9], dtype=torch.int64)[None]
            nats += llama(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
    assert result.nats == pytest.approx(nats, rel=1e-5)  # float32, other batch shapes


def test_batch_size_does_not_change_the_result(llama):
    stream = random_stream(130)
    results = [evaluate(llama, stream, 8, batch_size, "cpu").nats for batch_size in (1, 5, 64)]
    assert results == pytest.approx([results[0]] * 3, rel=1e-5)  # float32, other batch shapes


def test_model_is_evaluated_without_gradients_and_left_as_it_was():
    model = nn.ModuleDict({"inner": Uniform(), "frozen": nn.Dropout()})
    model.forward = model["inner"].forward
    model.train()
    model["frozen"].eval()
    evaluate(model, random_stream(20), 8, 2, "cpu")
    assert not any(model["inner"].modes)
    assert (model.training, model["inner"].training, model["frozen"].training) == (True, True, False)
    assert torch.is_grad_enabled()


def test_mode_is_restored_when_the_model_fails():
    model = Uniform()
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, random_stream(20), 8, 2, "cpu")
    assert model.training


def test_read_only_stream_is_evaluated_without_a_warning(recwarn):
    stream = random_stream(20)
    stream.tokens.flags.writeable = False
    evaluate(Uniform(), stream, 8, 2, "cpu")
    assert not recwarn.list


def test_one_token_has_nothing_to_predict():
    with pytest.raises(ValueError, match=r"1 token\(s\) has nothing to predict"):
        evaluate(Uniform(), random_stream(1), 8, 2, "cpu")


def test_unigram_by_hand():
    train_V = np.array([1, 2, 1, 0])
    held_out = TokenStream(np.array([0, 1, 3, 0], dtype=np.int32), 2)
    # counts + 1 of tokens 0..3 are 2, 3, 2, 1 of 8; predicted are 1, 3, 0
    expected = -(math.log2(3 / 8) + math.log2(1 / 8) + math.log2(2 / 8)) / 2
    assert unigram_bits_per_byte(train_V, held_out) == pytest.approx(expected, rel=1e-12)


def test_unigram_refuses_tokens_outside_the_vocabulary():
    with pytest.raises(ValueError, match="token 36 in the held-out stream, but the vocabulary has 36"):
        unigram_bits_per_byte(np.ones(V - 1), random_stream(1000))


def test_compressors_are_the_command_line_ones():
    text = "".join(document.text for document in read_documents() if document.name.startswith("json/")).encode()
    assert gzip_bits_per_byte(text) == pytest.approx(len(gzip.compress(text, 9)) * 8 / len(text), rel=1e-12)
    best = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_byte(text) == pytest.approx(best * 8 / len(text), rel=1e-12)


def test_compressors_find_repetition_and_not_noise():
    noise = np.random.default_rng(0).bytes(1 << 16)
    for compressor in (gzip_bits_per_byte, xz_bits_per_byte):
        assert 8 <= compressor(noise) < 8.1  # headers only
        assert compressor(b"a" * (1 << 16)) < 0.1


def test_baselines_on_real_text_lie_between_xz_and_eight_bits():
    train, held_out = split_documents([d for d in read_documents() if d.name.startswith("pydoc_data/")], 0.1)
    tokenizer = train_tokenizer((document.text for document in train), 1024)
    train_V = np.bincount(pack(train, tokenizer, 64).tokens, minlength=len(tokenizer))
    found = baselines(train_V, pack(held_out, tokenizer, 64), held_out)
    assert 1 < found.xz <= found.gzip < found.unigram < 8


def test_baselines_refuse_other_documents_than_the_stream():
    with pytest.raises(ValueError, match="held-out documents have 1 bytes, the stream packed from them 100"):
        baselines(np.ones(V), random_stream(10), [Document("a", "a")])


def test_only_tokens_that_count_are_summed(llama):
    stream = random_stream(50)
    counts = np.random.default_rng(1).random(50) < 0.3
    counts[0] = True  # never predicted, so it cannot count
    result = evaluate(llama, TokenStream(stream.tokens, 100, counts), 8, 4, "cpu")
    nats = 0.0
    with torch.no_grad():
        llama.eval()
        for start in range(0, 49, 8):
            window = torch.tensor(stream.tokens[start : start + 9], dtype=torch.int64)
            logits = llama(input_ids=window[None, :-1]).logits[0].log_softmax(-1)
            for place, token in enumerate(window[1:].tolist()):
                nats -= logits[place, token].item() * counts[start + place + 1]
    assert result.tokens == counts[1:].sum()
    assert result.nats == pytest.approx(nats, rel=1e-5)  # float32, other batch shapes


def test_unigram_counts_what_evaluate_counts():
    counts = np.array([True, False, True, True])
    held_out = TokenStream(np.array([0, 1, 3, 0], dtype=np.int32), 2, counts)
    expected = -(math.log2(1 / 8) + math.log2(2 / 8)) / 2
    assert unigram_bits_per_byte(np.array([1, 2, 1, 0]), held_out) == pytest.approx(expected, rel=1e-12)
