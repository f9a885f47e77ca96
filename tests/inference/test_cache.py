"""The cache against a source whose experts say who they are."""

import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.inference import ExpertCache
from raymoe.inference.slots import slots_for

LAYERS, EXPERTS, NUMEL = 3, 6, 16
ALL = LAYERS * EXPERTS


class NumberedExperts:
    """Expert e of layer l is full of 100 l + e; keeps count of what was read."""

    def __init__(self, delay_s: float = 0.0):
        self.reads: list[tuple[int, int]] = []
        self.delay_s = delay_s

    def read(self, layer, expert, out):
        self.reads.append((layer, expert))
        # a slot that is read while it is written would show it
        out.fill_(-1)
        time.sleep(self.delay_s)
        out.fill_(100 * layer + expert)
        return out.nbytes


def make_cache(slots: int, source=None, **options) -> ExpertCache:
    return ExpertCache(
        source or NumberedExperts(),
        numel=[NUMEL] * LAYERS,
        num_experts=[EXPERTS] * LAYERS,
        budget=slots * NUMEL * 4,
        dtype=torch.float32,
        **options,
    )


def use(cache: ExpertCache, layer: int, experts: list[int]) -> list[int]:
    """Acquires and checks what every slot holds; returns the experts in the order they came."""
    seen = []
    for group, slots in cache.acquire(layer, experts):
        assert len(set(slots)) == len(group)
        for expert, slot in zip(group, slots, strict=True):
            assert (cache.pool[slot] == 100 * layer + expert).all(), (layer, expert)
        seen += group
    return seen


def run_threads(count: int, work) -> None:
    """`work(random.Random)` on so many threads; what fails there fails here."""
    with ThreadPoolExecutor(count) as threads:
        for done in [threads.submit(work, random.Random(seed)) for seed in range(count)]:
            done.result(timeout=60)


requests = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1)).map(sorted)), max_size=40
)


@given(slots=st.integers(1, ALL), calls=requests)
@settings(deadline=None, max_examples=60)
def test_every_call_gets_exactly_what_it_asked_for(slots, calls):
    cache = make_cache(slots)
    for layer, experts in calls:
        assert sorted(use(cache, layer, experts)) == experts
    wanted = sum(len(experts) for _, experts in calls)
    assert cache.total.hits + cache.total.misses == wanted
    assert cache.total.fetched_bytes == cache.total.misses * NUMEL * 4
    assert cache.resident <= slots


def test_residents_come_first_and_are_not_read_again():
    source = NumberedExperts()
    cache = make_cache(EXPERTS, source)
    use(cache, 0, [3, 4])
    assert use(cache, 0, [1, 3, 4]) == [3, 4, 1]
    assert source.reads == [(0, 3), (0, 4), (0, 1)]


def test_with_room_for_all_everything_becomes_resident():
    source = NumberedExperts()
    cache = make_cache(ALL, source)
    for _ in range(3):
        for layer in range(LAYERS):
            use(cache, layer, list(range(EXPERTS)))
    assert len(source.reads) == cache.resident == ALL
    assert cache.total.hit_rate == pytest.approx(2 / 3)


def test_half_the_slots_give_half_the_hits_even_when_every_step_wants_everything():
    """A plain global LRU would have none: it evicts just what the next layers want."""
    cache = make_cache(ALL // 2)

    def step() -> int:
        before = cache.total.hits
        for layer in range(LAYERS):
            use(cache, layer, list(range(EXPERTS)))
        return cache.total.hits - before

    # the first two find the layers' shares
    assert [step() for _ in range(10)][2:] == [ALL // 2] * 8


def test_a_group_in_use_is_not_overwritten():
    cache = make_cache(2)
    holding = cache.acquire(0, [0])
    (slot,) = next(holding)[1]
    for layer in range(1, LAYERS):
        use(cache, layer, list(range(EXPERTS)))
    assert (cache.pool[slot] == 0).all()
    holding.close()


def test_a_closed_iterator_gives_its_slots_back():
    cache = make_cache(1)
    groups = cache.acquire(0, [0, 1])
    next(groups)
    groups.close()
    assert use(cache, 1, [5]) == [5]


def test_a_failed_read_leaves_the_cache_usable():
    class FailsOnce(NumberedExperts):
        def read(self, layer, expert, out):
            if (layer, expert) == (0, 2) and (0, 2) not in self.reads:
                self.reads.append((0, 2))
                raise OSError("disk gone")
            return super().read(layer, expert, out)

    cache = make_cache(3, FailsOnce())
    with pytest.raises(OSError, match="disk gone"):
        use(cache, 0, [1, 2, 3])
    assert not cache.residents()[0, 2]
    assert sorted(use(cache, 0, [1, 2, 3])) == [1, 2, 3]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_threads_never_see_a_slot_change_under_them(slots):
    cache = make_cache(slots, NumberedExperts(delay_s=0.0002))

    def work(rng):
        for _ in range(30):
            layer = rng.randrange(LAYERS)
            experts = rng.sample(range(EXPERTS), rng.randrange(1, 4))
            assert sorted(use(cache, layer, experts)) == sorted(experts)

    run_threads(4, work)


def test_two_threads_that_want_the_same_expert_read_it_once():
    source = NumberedExperts(delay_s=0.05)
    cache = make_cache(4, source)
    threads = [threading.Thread(target=use, args=(cache, 0, [1])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert source.reads == [(0, 1)]


def test_layers_of_different_size_share_the_slots_of_the_largest():
    cache = ExpertCache(NumberedExperts(), numel=[8, 16], num_experts=[2, 2], budget="50%", dtype=torch.float32)
    assert (cache.num_slots, cache.slot_bytes, cache.pool.shape) == (2, 64, (4, 16))
    for group, slots in cache.acquire(0, [0, 1]):
        for expert, slot in zip(group, slots, strict=True):
            assert (cache.pool[slot, :8] == expert).all()


def test_history_keeps_one_point_a_window():
    cache = make_cache(ALL, window_s=0.05)
    use(cache, 0, [0, 1])
    time.sleep(0.06)
    use(cache, 0, [0, 1, 2])
    first, second = cache.history()
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 2, 2, 1)
    assert first.fetched_bytes == 2 * NUMEL * 4
    assert second.start_s >= 0.05


@pytest.mark.parametrize(
    ("budget", "slots"), [("100%", 10), ("50%", 5), ("49%", 4), (300, 3), ("1KB", 10), ("1GiB", 10)]
)
def test_budgets(budget, slots):
    assert slots_for(budget, num_experts=10, expert_bytes=100, total_bytes=1000) == slots


@given(num_experts=st.integers(1, 20_000), expert_bytes=st.integers(2, 10**9))
def test_a_budget_below_one_expert_names_the_smallest_that_works(num_experts, expert_bytes):
    with pytest.raises(ValueError, match="less than one expert") as error:
        slots_for(expert_bytes - 1, num_experts, expert_bytes, num_experts * expert_bytes)
    smallest, share = re.search(r"works is (\d+) bytes, or ([\d.]+%)", str(error.value)).groups()
    assert slots_for(smallest, num_experts, expert_bytes, num_experts * expert_bytes) == 1
    assert slots_for(share, num_experts, expert_bytes, num_experts * expert_bytes) >= 1


# what is read beside the computation


@pytest.fixture
def busy_cache():
    caches = []

    def make(slots, source=None, **options):
        caches.append(make_cache(slots, source, readers=2, **options))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
        assert not any(thread.is_alive() for thread in cache._threads)


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_hits_are_handed_out_while_misses_are_read(busy_cache):
    source = NumberedExperts()
    cache = busy_cache(ALL, source)
    use(cache, 0, [1, 2])
    source.delay_s = 0.2
    groups = cache.acquire(0, [0, 1, 2])
    began = time.monotonic()
    assert next(groups)[0] == [1, 2]
    assert time.monotonic() - began < 0.1
    # nobody asks for the next group, and it comes all the same
    wait_for(lambda: cache.resident == 3)
    assert [experts for experts, _ in groups] == [[0]]


def test_a_wish_is_there_when_it_is_wanted(busy_cache):
    cache = busy_cache(4)
    cache.expect(1, {3: 0.9, 4: 0.8})
    cache.wish([(1, 3), (1, 4)])
    wait_for(lambda: cache.resident == 2)
    use(cache, 1, [3, 5])
    assert (cache.total.hits, cache.total.misses, cache.total.prefetched, cache.total.wasted) == (1, 1, 2, 0)


def test_a_wish_evicts_only_what_is_worth_less(busy_cache):
    cache = busy_cache(2)
    use(cache, 0, [0, 1])
    cache.expect(0, {0: 0.9, 1: 0.2})
    cache.expect(1, {3: 0.5, 4: 0.1})
    cache.wish([(1, 4)])
    time.sleep(0.05)
    assert np.argwhere(cache.residents()).tolist() == [[0, 0], [0, 1]]
    cache.expect(0, {0: 0.3, 1: 0.2})
    cache.wish([(1, 3)])
    wait_for(lambda: cache.residents()[1, 3])
    assert cache.resident == 2


def test_what_is_wanted_now_goes_first(busy_cache):
    source = NumberedExperts(delay_s=0.02)
    cache = busy_cache(ALL, source)
    cache.wish([(2, expert) for expert in range(EXPERTS)])
    wait_for(lambda: source.reads)
    use(cache, 0, [0])
    # two readers had begun two wishes, and this thread was free
    assert (0, 0) in source.reads[:4]


def test_a_withdrawn_wish_leaves_no_trace(busy_cache):
    source = NumberedExperts(delay_s=0.05)
    cache = busy_cache(ALL, source)
    cache.wish([(0, expert) for expert in range(EXPERTS)])
    wait_for(lambda: source.reads)
    cache.wish([])
    time.sleep(0.2)
    assert 1 <= len(source.reads) <= 2
    assert cache.resident == len(source.reads)


def test_fetched_in_vain_is_counted(busy_cache):
    cache = busy_cache(2)
    cache.wish([(0, 0), (0, 1)])
    wait_for(lambda: cache.resident == 2)
    use(cache, 0, [1])
    use(cache, 1, [0, 1])
    assert (cache.total.prefetched, cache.total.wasted) == (2, 1)
    assert cache.total.wasted_bytes == NUMEL * 4


def test_the_budget_changes_while_experts_are_in_use(busy_cache):
    cache = busy_cache(6)
    use(cache, 0, list(range(EXPERTS)))
    holding = cache.acquire(0, [0, 1])
    _, slots = next(holding)
    cache.set_budget(1 * NUMEL * 4)
    assert cache.resident == 2
    assert [cache.pool[slot, 0].item() for slot in slots] == [0, 1]
    holding.close()
    assert cache.resident == 1
    assert sorted(use(cache, 1, [0, 1, 2])) == [0, 1, 2]
    cache.set_budget("100%")
    for layer in range(LAYERS):
        use(cache, layer, list(range(EXPERTS)))
    assert cache.resident == ALL


def test_memory_that_the_budget_loses_is_given_back():
    numel = 1 << 18
    cache = ExpertCache(NumberedExperts(), numel=[numel], num_experts=[64], budget="100%", dtype=torch.float32)
    process = psutil.Process()
    before = process.memory_info().rss
    use(cache, 0, list(range(64)))
    held = process.memory_info().rss
    assert held - before > 60 << 20
    cache.set_budget(f"{8 * 4 * numel}")
    assert process.memory_info().rss < held - (50 << 20)


@pytest.mark.parametrize("slots", [1, 3, 7])
def test_threads_readers_wishes_and_budgets_at_once(busy_cache, slots):
    cache = busy_cache(slots, NumberedExperts(delay_s=0.0002))

    def work(rng):
        for _ in range(40):
            layer = rng.randrange(LAYERS)
            keys = [(rng.randrange(LAYERS), rng.randrange(EXPERTS)) for _ in range(4)]
            cache.expect(layer, {rng.randrange(EXPERTS): rng.random()})
            cache.wish(keys)
            if rng.random() < 0.2:
                cache.set_budget(rng.randrange(1, ALL) * NUMEL * 4)
            experts = rng.sample(range(EXPERTS), rng.randrange(1, 5))
            assert sorted(use(cache, layer, experts)) == sorted(experts)

    run_threads(3, work)
    total = cache.total
    assert total.fetched_bytes % (NUMEL * 4) == 0
    assert not cache._pins
    assert not cache._demanded


def test_a_wish_that_cannot_be_read_harms_nobody(busy_cache):
    class Broken(NumberedExperts):
        def read(self, layer, expert, out):
            self.reads.append((layer, expert))
            if (layer, expert) == (0, 2):
                raise OSError("disk gone")
            return super().read(layer, expert, out)

    source = Broken()
    cache = busy_cache(4, source)
    cache.wish([(0, 2)])
    wait_for(lambda: source.reads)
    assert use(cache, 0, [1]) == [1]
    with pytest.raises(OSError, match="disk gone"):
        use(cache, 0, [2])
    assert use(cache, 0, [1]) == [1]
