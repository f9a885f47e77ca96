"""Engines with compressed models: main experts alone go through the cache."""

import queue

import pytest
import torch

from raymoe import compression
from raymoe.compression.split import demoted, split
from raymoe.config import TrainConfig
from raymoe.inference import Delta, InferenceEngine
from raymoe.serving.openai_answers import Usage
from raymoe.training.job import job_fields
from tests.compression.test_compress import stir
from tests.inference.conftest import generate_alone, random_prompts
from tests.inference.test_engine import greedy
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    def make(family: str = "olmoe", is_trained: bool = True, **options):
        model = compression.compress(tiny_model(family, num_experts_per_tok=4), **({"keep": 2} | options))
        if is_trained:
            stir(model)
        path = tmp_path_factory.mktemp(family)
        compression.save(model, path / "small")
        return model, path / "small"

    return make


@pytest.mark.parametrize("options", [{}, {"tie_input": True}, {"keep": 0.5}, {"method": "drop"}])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_engines_give_the_tokens_of_generate(compressed, family, options):
    model, path = compressed(family, **options)
    prompts = random_prompts([3, 17, 9])
    engine = InferenceEngine(path, expert_memory="40%", max_batch_tokens=64, kv_tokens=1024, device="cpu")
    try:
        assert engine.generate(prompts, greedy(8)) == [generate_alone(model, prompt, 8) for prompt in prompts]
    finally:
        engine.close()


def test_the_cache_sees_main_experts_alone(compressed):
    _, path = compressed(keep=1)
    engine = InferenceEngine(
        path, expert_memory="100%", max_batch_tokens=64, kv_tokens=1024, device="cpu", predictors=()
    )
    try:
        engine.generate([[5]], greedy(1))
        # one token: one main expert in each of two layers
        assert engine.stats()["misses"] == 2
    finally:
        engine.close()


def test_vectors_stand_in_for_what_is_missing(compressed):
    _, path = compressed(keep=3)
    options = {"max_batch_tokens": 64, "kv_tokens": 1024, "device": "cpu", "predictors": (), "on_miss": "compressed"}
    prompts = random_prompts([12, 9])
    engine = InferenceEngine(path, expert_memory="20%", **options)
    inbox: queue.Queue[Delta] = queue.Queue()
    try:
        answers = engine.generate(prompts, greedy(6))
        stats = engine.stats()
        engine.submit(prompts[0], greedy(6), inbox.put)
        while (last := inbox.get(timeout=30)).finish_reason is None:
            assert last.stood_in is None
        after = engine.stats()
    finally:
        engine.close()
    assert [len(answer) for answer in answers] == [6, 6]
    assert stats["stood_in"]["rows"] == sum(stats["stood_in"]["by_rank"].values()) > 0
    assert set(stats["stood_in"]["by_rank"]) <= {1, 2}
    assert last.stood_in == after["stood_in"]["rows"] - stats["stood_in"]["rows"]
    usage = Usage(12, 6, last.stood_in)
    assert usage.as_json()["stood_in_rows"] == last.stood_in
    assert "stood_in_rows" not in Usage(12, 6).as_json()


def test_training_refuses_a_compressed_model_by_name(compressed, tmp_path):
    _, path = compressed()
    with pytest.raises(ValueError, match="has compressed experts, which raymoe train does not fit"):
        job_fields(TrainConfig.model_validate({"model": {"path": path}}), tmp_path, path)


def test_with_everything_resident_nothing_is_replaced(compressed):
    model, path = compressed(keep=3)
    engine = InferenceEngine(
        path, expert_memory="100%", max_batch_tokens=64, kv_tokens=1024, device="cpu", on_miss="compressed"
    )
    prompts = random_prompts([40] * 6)
    try:
        engine.generate(prompts, greedy(4))
        everyone = range(8)
        for layer in range(2):
            for _ in engine.cache.acquire(layer, list(everyone)):
                pass
        before = engine.stats()["stood_in"]["rows"]
        prompt = random_prompts([7])[0]
        assert engine.generate([prompt], greedy(5)) == [generate_alone(model, prompt, 5)]
        assert engine.stats()["stood_in"]["rows"] == before
    finally:
        engine.close()


def test_on_miss_compressed_needs_trained_vectors(compressed, saved_model):
    for path in (saved_model("olmoe")[1], compressed(method="drop")[1]):
        with pytest.raises(ValueError, match="on_miss: 'compressed' needs a model with compressed experts"):
            InferenceEngine(path, on_miss="compressed", device="cpu")
    with pytest.raises(ValueError, match="needs trained vectors"):
        InferenceEngine(compressed(is_trained=False)[1], on_miss="compressed", device="cpu")


def test_only_weaker_experts_are_demoted():
    index = torch.tensor([[0, 1, 2, 3], [1, 4, 5, 5]])
    weight = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.6, 0.2, 0.0, 0.0]])
    parts, is_gone = demoted(split(index, weight, 5, 3), torch.tensor([True, True, False, False, True]), 5)
    assert is_gone.tolist() == [[False, True, False], [False, True, False]]
    assert parts.main_index.tolist() == [[0, 5, 2], [1, 5, 5]]
    assert parts.other_index.tolist() == [[3, 5, 1, 5], [5, 5, 4, 5]]
    torch.testing.assert_close(parts.other_shares, torch.tensor([[0.25, 0, 0.75, 0], [0, 0, 1, 0]]))
