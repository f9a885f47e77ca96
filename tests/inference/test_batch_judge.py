"""The judge of batches by routes: what it counts, and when it turns them on and off."""

import numpy as np

from raymoe.inference.batch_judge import BatchJudge
from tests.inference.topics import EXPERTS, LAYERS, TOPICS, topic_paths


def judge(**options):
    return BatchJudge(**({"margin": 0.02, "window_steps": 4, "busy_share": 0.9} | options))


def by_last_digit(batch):
    return topic_paths([number % TOPICS for number in batch])


def feed(judge, batches, taken=by_last_digit, residents=0):
    for batch in batches:
        judge.record(np.array(batch), taken(batch), residents)


SAME_TOPIC = [[0, 4], [0, 4], [5, 9], [5, 9]]
MIXED = [[0, 5], [0, 5], [4, 9], [4, 9]]


def test_the_judge_knows_what_the_order_of_arrival_would_have_cost():
    """The same work dealt out in order of arrival is 0 beside 5, then 4 beside 9."""
    judged = judge()
    feed(judged, SAME_TOPIC)
    stats = judged.stats()
    assert stats["experts_per_step"] == LAYERS * 3
    assert stats["experts_per_step_in_order_of_arrival"] == LAYERS * 6
    assert (stats["state"], stats["saved_share"]) == ("on", 0.5)
    assert stats["reason"] == "saves 50.0% of the experts to fetch"


def test_the_ghosts_remember_what_the_last_steps_brought():
    """With slots for what a mixed batch uses, the order of arrival fetches twelve once for two steps, as the topics do."""
    judged = judge()
    feed(judged, SAME_TOPIC, residents=LAYERS * 6)
    assert judged.stats()["saved_share"] == 0.0


def test_a_gain_turns_it_on_and_two_windows_without_one_turn_it_off():
    judged = judge()
    feed(judged, SAME_TOPIC)
    assert (judged.state, judged.is_on) == ("on", True)
    feed(judged, MIXED)
    assert judged.is_on
    feed(judged, MIXED)
    assert (judged.state, judged.is_on) == ("off", False)
    assert "less than 2.0%" in judged.reason
    rests = []
    for _ in range(3):
        rests.append(0)
        while not judged.is_on:
            judged.rest()
            rests[-1] += 1
        feed(judged, MIXED)
    assert rests == [4, 8, 16]


def test_batches_that_use_everything_turn_it_off():
    judged = judge()
    feed(judged, [[0, 1], [2, 3]] * 2, lambda batch: np.ones((len(batch), LAYERS, EXPERTS), dtype=bool))
    assert judged.state == "off"
    assert judged.reason == "a batch uses 100% of all experts in any order"


def test_what_is_resident_in_any_order_is_no_gain():
    judged = judge(window_steps=8)
    batches = [[0, 4], [1, 5], [2, 6], [3, 7]] * 2
    feed(judged, batches, residents=LAYERS * EXPERTS)
    feed(judged, batches, residents=LAYERS * EXPERTS)
    assert judged.state == "off"


def test_a_share_of_a_handful_is_no_gain():
    """One change of topics in forty steps: of the little that is fetched at all, it saves a large share."""
    judged = judge(window_steps=40)
    for state in ("probing", "off"):
        feed(judged, [[0, 4]] * 38 + [[5, 9]] * 2, residents=LAYERS * 3)
        assert judged.state == state
        assert judged.stats()["saved_share"] > 0.02
        assert "experts a step, less than 0.5" in judged.reason
