"""Timelines and traces of real work."""

import gzip
import json
import threading
import time

import pytest
import torch

from raymoe.telemetry.spans import Span, read_spans, write_spans
from raymoe.training.profile import profiled_steps, timeline_path, trace_path
from raymoe.training.timeline import Timeline


def busy(milliseconds):
    until = time.perf_counter_ns() + milliseconds * 1_000_000
    while time.perf_counter_ns() < until:
        pass


def test_spans_have_names_layers_lanes_and_times():
    timeline = Timeline()
    timeline.start()
    timeline.begin("gather", 1, "gather")
    with timeline.span("attention", 0):
        busy(4)
        with timeline.span("wait", 0):
            busy(2)
    timeline.end("gather", 1)
    timeline.begin("reduce", 1, "reduce")  # never ends
    timeline.end("reduce", 0)  # never began
    gather, attention, wait = timeline.stop()
    assert (gather.name, gather.layer, gather.lane) == ("gather", 1, "gather")
    assert (attention.name, attention.layer, attention.lane) == ("attention", 0, "computation")
    assert gather.start_ns <= attention.start_ns <= wait.start_ns - 4_000_000
    assert 2_000_000 <= wait.end_ns - wait.start_ns <= attention.end_ns - attention.start_ns - 4_000_000
    assert attention.end_ns <= gather.end_ns


def test_a_transfer_may_be_ended_by_another_thread_and_an_error_ends_a_span():
    timeline = Timeline()
    timeline.start()
    timeline.begin("gather", 0, "gather")
    ender = threading.Thread(target=timeline.end, args=("gather", 0))
    ender.start()
    ender.join()
    with pytest.raises(RuntimeError, match="broke"), timeline.span("experts", 0):
        raise RuntimeError("broke")
    assert [span.name for span in timeline.stop()] == ["gather", "experts"]


def test_off_it_collects_nothing_and_starts_empty():
    timeline = Timeline()
    with timeline.span("attention", 0):
        timeline.begin("gather", 0)
        timeline.end("gather", 0)
    assert timeline.stop() == []
    timeline.start()
    with timeline.span("attention", 0):
        pass
    timeline.start()
    assert timeline.stop() == []


def train(timeline, before, steps):
    weight = torch.randn(64, 64, requires_grad=True)
    for step in steps:
        before(step)
        with timeline.span("experts", step):
            (weight @ weight).sum().backward()


@pytest.mark.parametrize(
    ("first", "last", "num_steps", "traced"),
    [(0, 30, 2, [10, 11]), (3, 9, 2, [7, 8]), (0, 2, 5, [0, 1]), (5, 20, 5, [15, 16, 17, 18, 19])],
)
def test_some_steps_are_traced(tmp_path, first, last, num_steps, traced):
    timeline = Timeline()
    with profiled_steps(timeline, tmp_path, 3, first, last, num_steps) as before:
        train(timeline, before, range(first, last))
    assert not timeline.is_on
    events = json.loads(gzip.decompress(trace_path(tmp_path, 3).read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {f"experts {step}" for step in range(first, last)} & names == {f"experts {step}" for step in traced}
    assert "aten::mm" in names
    assert [span.layer for span in read_spans(timeline_path(tmp_path, 3))] == [traced[-1]]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-3.json.gz", "timeline-3.jsonl"]


def test_none_are_traced_unless_asked(tmp_path):
    timeline = Timeline()
    with profiled_steps(timeline, tmp_path, 0, 0, 20, 0) as before:
        train(timeline, before, range(20))
    assert list(tmp_path.iterdir()) == []


def test_spans_come_back_from_a_file(tmp_path):
    spans = [Span("gather", None, 3, 9, "gather"), Span("experts", 1, 4, 5, "computation")]
    write_spans(tmp_path / "spans.jsonl", spans)
    assert read_spans(tmp_path / "spans.jsonl") == spans
    (tmp_path / "spans.jsonl").write_text('{"name": "gather"}\n')
    with pytest.raises(ValueError, match=r"spans\.jsonl, line 1: not a span of a timeline"):
        read_spans(tmp_path / "spans.jsonl")
