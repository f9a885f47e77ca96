"""Everything that may change while requests run, at once: budgets, cancellations, more requests than a step holds."""

import random
import threading

import pytest

from raymoe.inference import SamplingParams
from raymoe.inference.scheduler import GroupingOptions
from tests.inference.conftest import generate_alone, random_prompts


def greedy(max_tokens: int, **more) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=(), **more)


def test_the_experts_budget_follows_at_once(saved_model, make_engine):
    model, _ = saved_model("olmoe")
    [prompt] = random_prompts([20])
    engine = make_engine("olmoe", expert_memory="100%")
    truth = generate_alone(model, prompt, 8)
    assert engine.generate([prompt], greedy(8)) == [truth]
    most = engine.stats()["slots"]
    engine.set_expert_memory("30%")
    stats = engine.stats()
    assert stats["slots"] == int(0.3 * most)
    assert stats["resident_experts"] <= stats["slots"]
    assert stats["budget_bytes"] == stats["slots"] * stats["expert_bytes"]
    assert engine.generate([prompt], greedy(8)) == [truth]
    engine.set_expert_memory("100%")
    assert engine.generate([prompt], greedy(8)) == [truth]
    with pytest.raises(ValueError, match="expert_memory: 1 is 1 bytes, less than one expert"):
        engine.set_expert_memory(1)


@pytest.mark.parametrize("method", ["greedy", "kmedoids"])
def test_nobodys_tokens_change(saved_model, make_engine, method):
    model, _ = saved_model("olmoe")
    prompts = random_prompts([12, 30, 7, 22, 15, 40, 9, 18, 25, 11])
    truth = [generate_alone(model, prompt, 12) for prompt in prompts]
    engine = make_engine(
        "olmoe", max_requests=3, expert_readers=2, grouping=GroupingOptions(method=method, window_steps=4)
    )
    is_over, draw = threading.Event(), random.Random(1)

    def disturb():
        while not is_over.wait(0.005):
            engine.set_expert_memory(f"{draw.randint(10, 100)}%")
            cancelled = engine.submit(
                draw.choice(prompts), greedy(50, priority=draw.randint(-1, 1)), lambda delta: None
            )
            is_over.wait(0.02)
            engine.cancel(cancelled)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(3):
            each = [greedy(12, priority=draw.randint(0, 2)) for _ in prompts]
            assert engine.generate(prompts, each) == truth
    finally:
        is_over.set()
        thread.join()
    stats = engine.stats()
    assert stats["is_alive"]
    assert stats["requests_error"] == 0
    assert stats["grouping"]["state"] in ("probing", "on", "off")


def test_a_deployments_user_config(make_engine):
    from raymoe.serving.engine import Engine

    replica = object.__new__(Engine.func_or_class)
    replica._engine = make_engine("olmoe", kv_tokens=512, expert_memory="50%")
    replica.reconfigure({"expert_memory": "100%", "kv_tokens": 256})
    stats = replica.status()
    assert (stats["kv_tokens"], stats["slots"]) == (256, stats["num_experts"])
    with pytest.raises(ValueError, match="user_config: unknown key 'kv_token'; known keys: expert_memory, kv_tokens"):
        replica.reconfigure({"kv_token": 1})
