import re
import threading

import pytest

from raymoe.telemetry import METRICS, Metric, metrics, set_exporter, snapshot

UNITS = ("_s", "_ms", "_bytes", "_total", "_ratio", "_per_s", "_loss", "_experts", "_workers")


@pytest.fixture(autouse=True)
def clean_store():
    metrics.reset()
    yield
    set_exporter(None)
    metrics.reset()


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_are_legal_and_carry_room_and_unit(metric):
    assert re.fullmatch(r"raymoe_(train|serve)_[a-z0-9_]+", metric.name)
    assert metric.name.endswith(UNITS)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.help.endswith(".")


def test_names_are_unique():
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_a_counter_adds_up_and_a_gauge_keeps_the_last():
    metrics.TRAIN_TOKENS_TOTAL.inc(10)
    metrics.TRAIN_TOKENS_TOTAL.inc(5)
    metrics.TRAIN_LOSS.set(3.0)
    metrics.TRAIN_LOSS.set(2.0)
    assert snapshot() == {"raymoe_train_tokens_total": 15.0, "raymoe_train_loss": 2.0}


def test_a_histogram_counts_and_sums():
    metrics.TRAIN_STEP_S.observe(0.5)
    metrics.TRAIN_STEP_S.observe(1.5)
    assert snapshot() == {"raymoe_train_step_s_count": 2.0, "raymoe_train_step_s_sum": 2.0}


def test_tags_make_series():
    metrics.SERVE_TOKENS_TOTAL.inc(7, kind="prompt")
    metrics.SERVE_TOKENS_TOTAL.inc(2, kind="generated")
    assert snapshot() == {
        'raymoe_serve_tokens_total{kind="prompt"}': 7.0,
        'raymoe_serve_tokens_total{kind="generated"}': 2.0,
    }


def test_the_exporter_gets_what_was_recorded():
    seen = []
    set_exporter(lambda metric, value, tags: seen.append((metric.name, value, tags)))
    metrics.SERVE_REQUESTS_TOTAL.inc(status="ok")
    metrics.SERVE_REQUESTS_TOTAL.inc(2, status="ok")
    set_exporter(None)
    metrics.SERVE_REQUESTS_TOTAL.inc(status="ok")
    assert seen == [("raymoe_serve_requests_total", value, {"status": "ok"}) for value in (1.0, 2.0)]


def test_no_increment_is_lost_between_threads():
    def count():
        for _ in range(1000):
            metrics.SERVE_EXPERT_HITS_TOTAL.inc()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert snapshot()["raymoe_serve_expert_hits_total"] == 4000


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (lambda: metrics.TRAIN_LOSS.inc(1), "is a gauge: use set"),
        (lambda: metrics.TRAIN_STEP_S.set(1), "is a histogram: use observe"),
        (lambda: metrics.TRAIN_TOKENS_TOTAL.inc(-1), "only grows"),
        (lambda: metrics.SERVE_REQUESTS_TOTAL.inc(), r"takes the tags \['status'\], got \[\]"),
        (lambda: metrics.TRAIN_LOSS.set(1, layer="3"), r"takes the tags \[\], got \['layer'\]"),
    ],
)
def test_wrong_use_says_what_is_right(record, said):
    with pytest.raises(ValueError, match=said):
        record()


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "raymoe-loss", "kind": "gauge"},
        {"name": "9_lives", "kind": "gauge"},
        {"name": "fine", "kind": "gauge", "tags": ("a b",)},
        {"name": "fine", "kind": "summary"},
        {"name": "fine", "kind": "histogram"},
        {"name": "fine", "kind": "histogram", "buckets": (2.0, 1.0)},
        {"name": "fine", "kind": "gauge", "buckets": (1.0,)},
    ],
)
def test_what_prometheus_would_not_take_is_refused(fields):
    with pytest.raises(ValueError, match="metric"):
        Metric(help="A test.", **fields)
