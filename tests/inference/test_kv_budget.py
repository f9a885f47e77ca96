"""The KV cache's size, changed while requests run."""

import random
import threading

import pytest
import torch

from raymoe.inference import EngineError, SamplingParams
from raymoe.inference.pages import give_back
from tests.inference.conftest import generate_alone, random_prompts
from tests.inference.test_engine import Inbox

TOKEN_BYTES = 2 * 2 * 2 * 8 * 4
"""Keys and values of two layers, two heads of 8 elements in float32."""


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=())


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_sizes_that_change_under_running_requests_change_no_token(saved_model, make_engine, family):
    model, _ = saved_model(family)
    prompts = random_prompts([40, 50, 33, 60, 20, 7])
    engine = make_engine(family, kv_tokens=640, max_batch_tokens=48)
    truth = [generate_alone(model, prompt, 14) for prompt in prompts]
    is_over = threading.Event()
    draw = random.Random(0)

    def resize():
        while not is_over.wait(0.01):
            engine.set_kv_tokens(draw.choice([96, 128, 200, 400, 640]))

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        for _ in range(2):
            assert engine.generate(prompts, greedy(14)) == truth
    finally:
        is_over.set()
        thread.join()
    stats = engine.stats()
    assert (stats["is_alive"], stats["requests_running"]) == (True, 0)
    # nothing is lost: the whole of it is there again
    engine.set_kv_tokens(640)
    pool = engine._batcher._kv_cache.pool
    pool.try_to_free_sectors()
    engine._batcher._kv_cache.evict_cached_blocks()
    pool.try_to_free_sectors()
    assert sorted(pool.free_sectors) == list(range(2, 2 + pool.num_sectors))


def test_stats_and_limits_follow(make_engine):
    engine = make_engine(kv_tokens=512)
    assert (engine.stats()["kv_tokens"], engine.stats()["kv_bytes"]) == (512, 512 * TOKEN_BYTES)
    engine.set_kv_tokens(64)
    assert (engine.stats()["kv_tokens"], engine.stats()["kv_bytes"]) == (64, 64 * TOKEN_BYTES)
    assert engine.room(10) == 54
    with pytest.raises(ValueError, match="= 70 tokens, but the KV cache holds 64 tokens"):
        engine.submit([5] * 60, greedy(10), Inbox())
    engine.set_kv_tokens(512)
    assert len(engine.generate([[5] * 60], greedy(10))[0]) == 10


def test_what_running_requests_need_is_not_taken(saved_model, make_engine):
    model, _ = saved_model("olmoe")
    (prompt,) = random_prompts([40])
    engine = make_engine(kv_tokens=512)
    inbox = Inbox()
    engine.submit(prompt, greedy(80), inbox)
    with pytest.raises(ValueError, match="kv_tokens: 64 is too few for a running request that may come to 120 tokens"):
        engine.set_kv_tokens(64)
    assert engine.stats()["kv_tokens"] == 512
    assert inbox.wait().tokens == generate_alone(model, prompt, 80)


@pytest.mark.parametrize("tokens", [0, 513])
def test_sizes_out_of_range_are_refused(make_engine, tokens):
    with pytest.raises(
        ValueError, match=f"kv_tokens must be from 1 to 512, which the engine was made with, got {tokens}"
    ):
        make_engine(kv_tokens=512).set_kv_tokens(tokens)


def test_an_engine_that_has_ended_has_no_size(make_engine):
    engine = make_engine()
    engine.close()
    with pytest.raises(EngineError, match="the engine was closed"):
        engine.set_kv_tokens(64)


def test_memory_that_is_given_back_reads_as_zeros_and_nothing_else_changes():
    memory = torch.ones(8 << 20, dtype=torch.uint8)
    give_back(memory.data_ptr() + (1 << 20), 2 << 20)
    pages = memory.view(-1, 1 << 20)
    # whole pages only: the two ends may keep theirs
    assert pages[1, 4096:-4096].sum() == pages[2, 4096:-4096].sum() == 0
    assert pages[0].min() == pages[3:].min() == 1
