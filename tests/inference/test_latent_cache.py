"""Multi-head latent attention under continuous batching against transformers' own `generate`."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from raymoe.inference import InferenceEngine, SamplingParams
from raymoe.inference.latent_cache import _is_absorbing_cheaper
from tests.inference.conftest import generate_alone, random_prompts
from tests.tiny_models import tiny_model

FAMILIES = ["deepseek_v2", "deepseek_v3"]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=())


@pytest.mark.parametrize("budget", ["100%", "50%"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_requests_get_the_tokens_of_generate(saved_model, make_engine, family, budget):
    model, _ = saved_model(family)
    prompts = random_prompts([3, 17, 90, 5, 1, 64])
    engine = make_engine(family, expert_memory=budget)
    # twice: prompts all at once, then with pages to share and behind each other
    assert engine.generate(prompts, greedy(10)) == [generate_alone(model, prompt, 10) for prompt in prompts]
    assert engine.generate(prompts[2:3], greedy(10)) == [generate_alone(model, prompts[2], 10)]
    assert engine.stats()["shared_tokens"] == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_kv_cache_changes_no_token(saved_model, make_engine, family):
    model, _ = saved_model(family)
    prompts = random_prompts([40, 50, 33, 60, 20, 45])
    engine = make_engine(family, kv_tokens=96, max_batch_tokens=48)
    assert engine.generate(prompts, greedy(20)) == [generate_alone(model, prompt, 20) for prompt in prompts]


def test_other_shapes_of_heads_change_no_token(tmp_path):
    """More value than key channels, queries through their own latent, three layers."""
    model = tiny_model("deepseek_v3", v_head_dim=20, qk_nope_head_dim=12, q_lora_rank=24, num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    prompts = random_prompts([50, 7, 33])
    with InferenceEngine(tmp_path, max_batch_tokens=32, kv_tokens=512) as engine:
        assert engine.generate(prompts, greedy(12)) == [generate_alone(model, prompt, 12) for prompt in prompts]


def test_a_token_takes_its_latent_and_one_rotary_key(make_engine):
    stats = make_engine("deepseek_v2", kv_tokens=320).stats()
    # two layers of 16 + 8 elements, in whole pages of 32 tokens; transformers counts in blocks that are larger
    assert 320 <= stats["kv_bytes"] / (2 * 24 * 4) <= 320 + 3 * 32


def test_latent_attention_that_nobody_checked_is_refused_by_name(tmp_path):
    AutoConfig.for_model("glm4_moe_lite", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'glm4_moe_lite' uses multi-head latent .* for deepseek_v2 and deepseek_v3 only"
    ):
        InferenceEngine(tmp_path)


def test_bfloat16_generates(make_engine):
    engine = make_engine("deepseek_v2", dtype="bfloat16")
    assert [len(answer) for answer in engine.generate(random_prompts([5, 40]), greedy(4))] == [4, 4]
    assert engine._batcher._kv_cache.dtype == torch.bfloat16


@pytest.mark.parametrize("is_cheaper", [True, False])
def test_absorbed_and_expanded_attention_give_the_same_tokens(saved_model, make_engine, monkeypatch, is_cheaper):
    model, _ = saved_model("deepseek_v3")
    prompts = random_prompts([70, 9, 33])
    monkeypatch.setattr("raymoe.inference.latent_cache._is_absorbing_cheaper", lambda *_: is_cheaper)
    engine = make_engine("deepseek_v3", max_batch_tokens=32)
    assert engine.generate(prompts, greedy(12)) == [generate_alone(model, prompt, 12) for prompt in prompts]


def test_absorbing_pays_for_few_new_tokens_over_many_old_ones():
    shape = SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    assert _is_absorbing_cheaper(shape, 1, 1000)
    assert _is_absorbing_cheaper(shape, 16, 16_000)
    assert not _is_absorbing_cheaper(shape, 512, 512)
    assert not _is_absorbing_cheaper(shape, 1, 1)
