"""The engine against transformers' own `generate`, whatever the budget, the batch and the accidents."""

import contextlib
import json
import queue
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from raymoe.inference import EngineError, InferenceEngine, SamplingParams
from raymoe.telemetry import metrics
from tests.inference.conftest import generate_alone, random_prompts
from tests.tiny_models import tiny_model

LENGTHS = [3, 17, 40, 5, 9, 1, 64, 23]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=())


@pytest.mark.parametrize("budget", ["100%", "50%", "smallest"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "gpt_oss"])
def test_eight_ragged_requests_get_the_tokens_of_generate(saved_model, make_engine, family, budget):
    model, _ = saved_model(family)
    prompts = random_prompts(LENGTHS)
    if budget == "smallest":
        budget = make_engine(family).cache.slot_bytes
    engine = make_engine(family, expert_memory=budget)
    answers = engine.generate(prompts, greedy(10))
    assert answers == [generate_alone(model, prompt, 10) for prompt in prompts]
    assert engine.stats()["resident_experts"] <= engine.cache.num_slots


def test_with_room_for_all_no_expert_is_fetched_twice(make_engine):
    engine = make_engine(expert_memory="100%")
    engine.generate(random_prompts([40] * 8), greedy(4))
    before = engine.stats()
    assert before["resident_experts"] == before["num_experts"]
    engine.generate(random_prompts([40] * 8), greedy(4))
    assert engine.stats()["misses"] == before["misses"] == before["num_experts"]


def test_a_budget_below_one_expert_is_refused(saved_model):
    with pytest.raises(ValueError, match=r"expert_memory: 1% .* smallest budget that works is \d+ bytes, or 6\.25%"):
        InferenceEngine(saved_model("olmoe")[1], expert_memory="1%")


def test_encoder_decoders_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "switch_transformers", "is_encoder_decoder": true}')
    with pytest.raises(ValueError, match="'switch_transformers' is an encoder-decoder"):
        InferenceEngine(tmp_path)


def test_bfloat16_generates(make_engine):
    engine = make_engine(dtype="bfloat16")
    assert [len(answer) for answer in engine.generate(random_prompts([5, 9]), greedy(4))] == [4, 4]


def test_a_full_kv_cache_changes_no_token(saved_model, make_engine):
    """Four pages for requests that need two or three each: they are taken out and come back."""
    model, _ = saved_model("olmoe")
    prompts = random_prompts([40, 50, 33, 60, 20, 45])
    engine = make_engine(kv_tokens=128, max_batch_tokens=48)
    assert engine.generate(prompts, greedy(20)) == [generate_alone(model, prompt, 20) for prompt in prompts]


def test_sliding_windows_change_no_token(tmp_path):
    model = tiny_model("gpt_oss", layer_types=["full_attention", "sliding_attention"], sliding_window=24)
    model.save_pretrained(tmp_path)
    prompts = random_prompts([50, 7, 30])
    with InferenceEngine(tmp_path, max_batch_tokens=32, kv_tokens=512) as engine:
        assert engine.generate(prompts, greedy(12)) == [generate_alone(model, prompt, 12) for prompt in prompts]


def test_a_seed_gives_the_same_tokens_whatever_the_batch(make_engine):
    engine = make_engine()
    prompts = random_prompts(LENGTHS)
    params = [SamplingParams(max_tokens=12, seed=seed, top_p=0.9, stop_token_ids=()) for seed in range(len(prompts))]
    together = engine.generate(prompts, params)
    alone = [engine.generate([prompt], asked)[0] for prompt, asked in zip(prompts, params, strict=True)]
    assert together == alone
    assert engine.generate(prompts, [SamplingParams(max_tokens=12, seed=99, stop_token_ids=())] * 8) != together


def test_greedy_rows_are_not_touched_by_sampled_ones(saved_model, make_engine):
    model, _ = saved_model("olmoe")
    prompts = random_prompts([8, 12, 20])
    params = [greedy(8), SamplingParams(max_tokens=8, seed=5, stop_token_ids=()), greedy(8)]
    answers = make_engine().generate(prompts, params)
    assert answers[0] == generate_alone(model, prompts[0], 8)
    assert answers[2] == generate_alone(model, prompts[2], 8)


class Inbox:
    """A request's deltas, for the test's thread."""

    def __init__(self):
        self._deltas = queue.Queue()
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.error: str | None = None

    def __call__(self, delta):
        self._deltas.put(delta)

    def next(self):
        delta = self._deltas.get(timeout=20)
        assert self.reason is None, "a delta after the last one"
        self.tokens += delta.tokens
        self.reason, self.error = delta.finish_reason, delta.error
        return delta

    def wait(self) -> "Inbox":
        while self.reason is None:
            self.next()
        return self


def test_tokens_arrive_one_by_one(make_engine):
    inbox = Inbox()
    make_engine().submit([5, 6, 7], greedy(5), inbox)
    sizes = []
    while inbox.reason is None:
        sizes.append(len(inbox.next().tokens))
    assert (sizes, inbox.reason) == ([1] * 5, "length")


def test_a_stop_token_ends_the_request_and_is_its_last(saved_model, make_engine):
    model, _ = saved_model("olmoe")
    (prompt,) = random_prompts([6])
    tokens = generate_alone(model, prompt, 10)
    stop = tokens[4]
    inbox = Inbox()
    make_engine().submit(prompt, SamplingParams(max_tokens=10, temperature=0.0, stop_token_ids=(stop,)), inbox)
    assert inbox.wait().tokens == tokens[: tokens.index(stop) + 1]
    assert inbox.reason == "stop"


def test_the_models_own_end_token_is_the_default(saved_model, tmp_path):
    model, path = saved_model("olmoe")
    (prompt,) = random_prompts([6])
    tokens = generate_alone(model, prompt, 10)
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [95, tokens[3]]}))
    inbox = Inbox()
    with InferenceEngine(tmp_path, max_batch_tokens=64, kv_tokens=128) as engine:
        engine.submit(prompt, SamplingParams(max_tokens=10, temperature=0.0), inbox)
        assert inbox.wait().reason == "stop"
    end = next(i for i, token in enumerate(tokens) if token in (95, tokens[3]))
    assert inbox.tokens == tokens[: end + 1]


def test_a_cancelled_request_ends_at_once_and_the_others_stay_right(saved_model, make_engine):
    model, _ = saved_model("olmoe")
    prompts = random_prompts([30, 10, 20, 5])
    engine = make_engine()
    inboxes = [Inbox() for _ in prompts]
    ids = [engine.submit(prompt, greedy(60 if row == 1 else 20), inboxes[row]) for row, prompt in enumerate(prompts)]
    inboxes[1].next()
    assert engine.cancel(ids[1])
    assert not engine.cancel(ids[1])
    assert inboxes[1].wait().reason == "cancelled"
    assert inboxes[1].tokens == generate_alone(model, prompts[1], 60)[: len(inboxes[1].tokens)]
    for row in (0, 2, 3):
        assert inboxes[row].wait().tokens == generate_alone(model, prompts[row], 20)
    stats = engine.stats()
    assert (stats["requests_running"], stats["requests_cancelled"], stats["requests_length"]) == (0, 1, 3)


def test_cancelling_all_running_requests_of_a_full_kv_cache_lets_the_waiting_ones_in(saved_model, make_engine):
    model, _ = saved_model("olmoe")
    prompts = random_prompts([60, 60, 60])
    engine = make_engine(kv_tokens=96, max_batch_tokens=64)
    inboxes = [Inbox() for _ in prompts]
    ids = [engine.submit(prompt, greedy(30), inbox) for prompt, inbox in zip(prompts, inboxes, strict=True)]
    inboxes[0].next()
    engine.cancel(ids[0])
    engine.cancel(ids[1])
    assert inboxes[2].wait().tokens == generate_alone(model, prompts[2], 30)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "prompt is empty"),
        ([3, 96], 4, "token 96 is not in the model's vocabulary of 96"),
        ([3] * 200, 100, "prompt of 200 tokens [+] max_tokens 100 = 300 tokens, but the model has 256 positions"),
        ([3] * 100, 100, "= 200 tokens, but the KV cache holds 128 tokens"),
    ],
)
def test_requests_that_cannot_fit_are_refused(make_engine, prompt, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        make_engine(kv_tokens=128).submit(prompt, greedy(max_tokens), Inbox())


def test_when_the_generation_thread_dies_everyone_is_told(make_engine, monkeypatch):
    engine = make_engine(expert_memory=6144)
    inboxes = [Inbox() for _ in range(3)]

    def broken(layer, expert, out):
        raise OSError("the disk is gone")

    for inbox in inboxes[:2]:
        engine.submit([4, 5, 6], greedy(100), inbox)
    inboxes[0].next()
    monkeypatch.setattr(engine.cache._source, "read", broken)
    for inbox in inboxes[:2]:
        assert "the disk is gone" in inbox.wait().error
    # a moment later the watch has seen it, too; until then a request is taken and told right away
    time.sleep(0.5)
    assert not engine.is_alive
    with pytest.raises(EngineError, match="the disk is gone"):
        engine.submit([4, 5, 6], greedy(100), Inbox())


def test_a_request_that_comes_just_after_the_death_is_told(make_engine, monkeypatch):
    engine = make_engine(expert_memory=6144)
    monkeypatch.setattr(engine.cache._source, "read", lambda *_: 1 / 0)
    first, late = Inbox(), Inbox()
    engine.submit([4, 5, 6], greedy(100), first)
    first.wait()
    with contextlib.suppress(EngineError):
        engine.submit([4, 5, 6], greedy(100), late)
        assert late.wait().reason == "error"


def test_closing_the_engine_ends_its_requests(make_engine):
    engine = make_engine()
    inbox = Inbox()
    engine.submit([4, 5, 6], greedy(200), inbox)
    inbox.next()
    engine.close()
    assert inbox.wait().reason == "error"
    with pytest.raises(EngineError, match="closed"):
        engine.submit([4], greedy(1), Inbox())
    engine.close()


def test_a_callback_that_fails_harms_only_its_own_request(saved_model, make_engine):
    model, _ = saved_model("olmoe")
    prompts = random_prompts([5, 6])
    engine = make_engine()

    def broken(delta):
        raise RuntimeError("client gone")

    engine.submit(prompts[0], greedy(10), broken)
    assert engine.generate([prompts[1]], greedy(10)) == [generate_alone(model, prompts[1], 10)]
    assert engine.stats()["requests_running"] == 0


def test_threads_may_submit_at_the_same_time(saved_model, make_engine):
    model, _ = saved_model("olmoe")
    prompts = random_prompts([4, 9, 14, 19])
    engine = make_engine()
    answers: dict[int, list[int]] = {}

    def ask(row: int) -> None:
        answers[row] = engine.generate([prompts[row]], greedy(8))[0]

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [answers[row] for row in range(4)] == [generate_alone(model, prompt, 8) for prompt in prompts]


def test_stats_add_up(make_engine):
    engine = make_engine(expert_memory="50%")
    engine.generate(random_prompts([10, 20]), greedy(6))
    stats = engine.stats()
    assert stats["prompt_tokens"] == 30
    assert stats["shared_tokens"] == 0
    # two layers of keys and values, two heads of 8 elements
    assert stats["kv_bytes"] == stats["kv_tokens"] * 2 * 2 * 2 * 8 * 4
    assert stats["generated_tokens"] == 12
    assert stats["requests_length"] == 2
    assert stats["budget_bytes"] == stats["slots"] * stats["expert_bytes"] == 8 * 6144
    assert stats["fetched_bytes"] == stats["misses"] * stats["expert_bytes"]
    assert stats["hit_rate"] == stats["hits"] / (stats["hits"] + stats["misses"])
    assert sum(stats["kernels"].values()) > 0
    history = engine.history()
    assert sum(window["misses"] for window in history) == stats["misses"]


def test_metrics_say_what_stats_say(make_engine):
    engine = make_engine(expert_memory="50%")
    metrics.reset()
    engine.generate(random_prompts([10, 20]), greedy(6))
    stats, found = engine.stats(), metrics.snapshot()
    assert found['raymoe_serve_requests_total{status="length"}'] == 2
    assert found['raymoe_serve_tokens_total{kind="prompt"}'] == 30
    assert found['raymoe_serve_tokens_total{kind="generated"}'] == 12
    assert found["raymoe_serve_ttft_s_count"] == 2
    assert found["raymoe_serve_expert_hits_total"] == stats["hits"]
    assert found["raymoe_serve_expert_misses_total"] == stats["misses"]
    assert found["raymoe_serve_expert_fetched_bytes_total"] == stats["fetched_bytes"]
    assert found["raymoe_serve_resident_experts"] == stats["resident_experts"]


def test_an_engine_that_nobody_closed_does_not_keep_python_from_ending(saved_model):
    program = (
        "import sys\n"
        "from raymoe.inference import InferenceEngine, SamplingParams\n"
        "engine = InferenceEngine(sys.argv[1], max_batch_tokens=64, kv_tokens=256)\n"
        "engine.generate([[3, 4]], SamplingParams(max_tokens=2))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, saved_model("olmoe")[1]], timeout=60, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_dense_part_is_all_that_is_loaded(make_engine):
    engine = make_engine()
    model = engine._batcher._manager.model
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert experts
    assert all(p.is_meta for p in experts)
    assert not any(p.is_meta for name, p in model.named_parameters() if ".experts." not in name)
    assert all(p.dtype == torch.float32 for p in model.parameters())
