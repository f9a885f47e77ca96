"""The token scheduler: its choices on a bare KV cache, and that no request's tokens depend on them."""

import itertools
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from raymoe.inference import SamplingParams
from raymoe.inference.experts import CachedExperts
from raymoe.inference.routes import LastPaths
from raymoe.inference.scheduler import GroupingOptions, TokenScheduler
from tests.inference.conftest import generate_alone, random_prompts
from tests.inference.topics import EXPERTS, LAYERS, topic_of, topic_paths


class Pages:
    """A KV cache with a page a sector, as far as the scheduler asks."""

    blocks_per_sector = 1
    max_blocks_per_request = max_decode_fast_path_length = 0
    read_cache_limit = None
    use_prefix_sharing = False

    def __init__(self, num_sectors):
        self.num_sectors = num_sectors
        self.cache_allocators = {"full": self}
        self.pool = self
        self.held = {}

    def try_to_free_sectors(self):
        pass

    def evict_cached_blocks(self):
        return False

    def needs_new_blocks(self, request_id, past_length, query_length):
        return -(-(past_length + query_length) // 4) - self.held.get(request_id, 0)

    def compute_free_capacity(self):
        return 1 - sum(self.held.values()) / self.num_sectors

    def can_store_request_tokens(self, state, request_len):
        needed = self.needs_new_blocks(state.request_id, state.current_len(), request_len)
        if needed > self.num_sectors - sum(self.held.values()):
            return False
        self.held[state.request_id] = self.held.get(state.request_id, 0) + needed
        return True

    def count_new_complete_blocks(self, state, request_len):
        return {}

    def free_blocks(self, request_id):
        self.held.pop(request_id, None)


class Topics:
    """Routes that are known: request r<n> uses the experts of its topic, and nothing is resident."""

    def paths(self, request_ids):
        return topic_paths([topic_of(int(request_id[1:])) for request_id in request_ids])

    taken = paths

    def residents(self):
        return np.zeros((LAYERS, EXPERTS), dtype=bool)


@dataclass(frozen=True)
class Asked:
    priority: int = 0


class Loop:
    """What transformers' loop does around the scheduler, without a model: every request takes `steps` tokens."""

    def __init__(self, size, *, num_sectors=10_000, token_budget=64, steps=1000):
        self.pages = Pages(num_sectors)
        self.scheduler = TokenScheduler(cast(Any, self.pages), 0.0, size)
        self.token_budget, self.steps = token_budget, steps
        self.numbers = itertools.count()

    def add(self, count=1, prompt=3, priority=0):
        for _ in range(count):
            state = RequestState(
                f"r{next(self.numbers)}",
                [1] * prompt,
                max_new_tokens=self.steps,
                logit_processor_kwargs={"sampling": Asked(priority)},
            )
            self.scheduler.add_waiting_request(state)

    def step(self):
        """One step; the numbers of the requests in it."""
        scheduled, _, num_tokens, _ = self.scheduler.schedule_batch(self.token_budget, 10_000)
        assert scheduled
        assert num_tokens == len(self.scheduler.rows) <= self.token_budget
        for future in scheduled:
            state = future.state
            state.position_offset += future.query_length
            if future.has_new_token and state.update_and_check_completion(7, None):
                self.scheduler.finish_request(state.request_id)
        return sorted(int(future.state.request_id[1:]) for future in scheduled)

    @property
    def active(self):
        return len(self.scheduler.active_requests)


def test_without_routes_it_is_first_come_first_served():
    loop = Loop(4, steps=3)
    loop.add(10)
    ran = [loop.step() for _ in range(7)]
    assert ran[:6] == [[0, 1, 2, 3]] * 3 + [[4, 5, 6, 7]] * 3
    assert ran[6] == [8, 9]
    assert loop.scheduler.stats()["reason"] == "no routes are known"


def test_requests_of_one_topic_run_together():
    loop = Loop(4)
    loop.scheduler.group_by(Topics(), GroupingOptions(max_wait_steps=8))
    loop.add(16)
    ran = [loop.step() for _ in range(60)]
    assert loop.active == 16
    chosen = ran[12:]
    assert all(len(batch) == 4 and len({topic_of(r) for r in batch}) == 1 for batch in chosen)
    counts = [sum(r in batch for batch in chosen) for r in range(16)]
    assert max(counts) - min(counts) <= 8
    stats = loop.scheduler.stats()
    assert stats["state"] == "on"
    assert stats["experts_per_step"] < 0.5 * stats["experts_per_step_in_order_of_arrival"]


class Everything(Topics):
    """Every request uses every expert."""

    def paths(self, request_ids):
        return np.ones((len(request_ids), LAYERS, EXPERTS), dtype=bool)

    taken = paths


class Alike(Topics):
    """Topics are expected, but there is only one."""

    def taken(self, request_ids):
        return topic_paths([0] * len(request_ids))


@pytest.mark.parametrize(
    ("routes", "reason"),
    [(Everything(), "uses 100% of all"), (Alike(), "saved 0.0% of the experts to fetch, less than 2.0%")],
)
def test_where_it_does_not_pay_it_becomes_first_come_first_served_again(routes, reason):
    loop = Loop(4, steps=30)
    loop.scheduler.group_by(routes, GroupingOptions(window_steps=8, max_wait_steps=8))
    loop.add(60)
    while loop.scheduler.stats()["state"] != "off":
        loop.step()
    assert reason in loop.scheduler.stats()["reason"]
    before = loop.scheduler.stats()["chosen_steps"]
    active = loop.active
    assert active > 4
    for _ in range(8):
        loop.step()
        assert loop.active <= active
        active = loop.active
    assert loop.scheduler.stats()["chosen_steps"] <= before + 1
    assert loop.scheduler.stats()["longest_wait_steps"] <= 8


@pytest.mark.parametrize("method", ["greedy", "kmedoids"])
@pytest.mark.parametrize(("size", "max_wait", "count"), [(4, 3, 16), (3, 6, 20), (1, 4, 9), (5, 1, 30)])
def test_no_request_waits_longer_than_the_bound(method, size, max_wait, count):
    loop = Loop(size, steps=17)
    loop.scheduler.group_by(Topics(), GroupingOptions(method=method, max_wait_steps=max_wait, max_active=100))
    loop.add(count)
    last, step = {}, 0
    while loop.scheduler.has_pending_requests():
        step += 1
        for request in loop.step():
            assert step - last.get(request, step - 1) - 1 <= max_wait
            last[request] = step
        assert loop.active <= size * (max_wait + 1)
        if step == 25:
            loop.add(3, prompt=70)
    assert len(last) == count + 3
    assert loop.scheduler.stats()["longest_wait_steps"] <= max_wait


def test_all_that_fit_one_batch_are_never_split():
    loop = Loop(8)
    loop.scheduler.group_by(Topics())
    loop.add(8)
    assert [loop.step() for _ in range(20)] == [list(range(8))] * 20
    assert loop.scheduler.stats()["chosen_steps"] == 0


def test_prompts_are_read_in_pieces_while_others_decode():
    loop = Loop(4, token_budget=16)
    loop.scheduler.group_by(Topics(), GroupingOptions(max_active=9))
    loop.add(8)
    while loop.active < 8:
        loop.step()
    loop.add(1, prompt=50)
    steps = [loop.step() for _ in range(5)]
    assert [8 in batch for batch in steps][:4] == [True] * 4
    assert all(len(batch) >= 3 for batch in steps)
    assert loop.scheduler.active_requests["r8"].status == RequestStatus.DECODING


def test_more_requests_are_let_in_only_as_far_as_their_whole_length_fits():
    """Each takes 3 + 13 tokens, four pages, at its longest: ten of them fit 40 pages."""
    loop = Loop(4, num_sectors=40, steps=13)
    loop.scheduler.group_by(Topics(), GroupingOptions(max_active=30))
    loop.add(30)
    most = 0
    while loop.scheduler.has_pending_requests():
        loop.step()
        most = max(most, loop.active)
        assert loop.scheduler.starved_requests == []
    assert 8 <= most <= 10


@pytest.mark.parametrize("routes", [None, Topics()])
def test_a_higher_priority_goes_first_and_the_others_still_run(routes):
    loop = Loop(4, steps=40)
    loop.scheduler.group_by(routes, GroupingOptions(max_wait_steps=5))
    loop.add(4)
    loop.step()
    loop.add(3, priority=1)
    loop.step()
    ran = [loop.step() for _ in range(30)]
    counts = {request: sum(request in batch for batch in ran) for request in range(7)}
    assert all(counts[request] >= 25 for request in (4, 5, 6))
    assert all(counts[request] >= 5 for request in range(4))


def test_waiting_requests_of_one_priority_come_in_order_of_arrival():
    loop = Loop(2, steps=2)
    loop.add(2)
    loop.add(2, priority=-1)
    loop.add(2)
    assert [loop.step() for _ in range(6)] == [[0, 1]] * 2 + [[4, 5]] * 2 + [[2, 3]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random"}, "method must be 'greedy' or 'kmedoids', got 'random'"),
        ({"max_wait_steps": 0}, "max_wait_steps must be at least 1, got 0"),
        ({"margin": 1.5}, "margin must be from 0 to 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GroupingOptions(**options)


@pytest.mark.parametrize("kv_tokens", [2048, 160])
@pytest.mark.parametrize("method", ["greedy", "kmedoids"])
def test_tokens_do_not_depend_on_the_grouping(saved_model, make_engine, monkeypatch, method, kv_tokens):
    model, _ = saved_model("olmoe")
    prompts = random_prompts([5, 9, 3, 20, 7, 33, 4, 12, 6, 2, 18, 8])
    engine = make_engine(max_requests=3, max_batch_tokens=24, kv_tokens=kv_tokens)
    scheduler = engine._batcher._manager.batch_processor.scheduler
    routes = LastPaths(2, 8, residents=lambda: np.zeros((2, 8), dtype=bool))
    compute = CachedExperts.__call__

    def observed(self, layer, hidden, expert_index, expert_weight):
        routes.saw(layer.index, scheduler.rows, expert_index.numpy())
        return compute(self, layer, hidden, expert_index, expert_weight)

    monkeypatch.setattr(CachedExperts, "__call__", observed)
    scheduler.group_by(routes, GroupingOptions(method=method, margin=0.0, busy_share=1.0, max_wait_steps=4))
    params = SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=())
    assert engine.generate(prompts, params) == [generate_alone(model, prompt, 12) for prompt in prompts]
    stats = scheduler.stats()
    assert stats["chosen_steps"] > 5
    assert stats["longest_wait_steps"] <= 4
