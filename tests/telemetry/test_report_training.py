"""What a training run adds to the report: events, overhead and the picture of a step."""

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.telemetry import Event, Report, Timeline, Training
from raymoe.telemetry.plots_timeline import _cross, _nested, _rows, timeline_height
from raymoe.telemetry.report import render
from raymoe.telemetry.spans import Span

MS = 1_000_000
SPANS = [
    Span("attention", 0, 5 * MS, 15 * MS, "computation"),
    Span("experts", 0, 15 * MS, 35 * MS, "computation"),
    Span("wait", 0, 15 * MS, 17 * MS, "computation"),
    Span("gather", 0, 6 * MS, 17 * MS, "gather"),
    Span("gather", 1, 12 * MS, 30 * MS, "gather"),
]


def figures(page: str) -> list[str]:
    found = re.findall(r'(?:src|srcset)="data:image/svg\+xml;base64,([^"]+)"', page)
    return [base64.b64decode(data).decode() for data in found]


def test_tells_what_happened_and_what_placement_costs():
    training = Training([4, 5, 6], step_s=[0.5, 0.5, 1.0], exposed_s=[0.05, 0.05, 0.4], planning_s=[0.005, None, 0.01])
    page = render(Report("run", training=training, events=[Event(5, "re-sharded", "3 experts <moved>")]))
    assert "medians: waiting for experts 10 %, planning 1 %" in page
    assert "re-sharded" in page
    assert "3 experts &lt;moved&gt;" in page


def test_many_events_are_cut_and_counted():
    page = render(Report("run", events=[Event(step, "re-sharded", f"the {step}th") for step in range(203)]))
    assert "the 199th" in page
    assert "the 200th" not in page
    assert "And 3 more." in page


def test_a_curve_of_another_length_is_named():
    with pytest.raises(ValueError, match=r"training\.exposed_s has 1 values for 2 steps"):
        Training([0, 1], exposed_s=[0.5])


def test_the_picture_of_a_step_is_in_the_page():
    page = render(Report("run", timeline=Timeline(SPANS, "Rank 0.")))
    assert "30 ms. Rank 0." in page
    light, dark = figures(page)
    assert light != dark
    assert "Within a step" not in render(Report("run", timeline=Timeline([])))


def test_transfers_under_way_at_once_have_rows_of_their_own():
    assert [(lane, [span.layer for span in members]) for lane, members in _rows(SPANS)] == [
        ("computation", [0, 0, 0]),
        ("gather", [0]),
        ("", [1]),
    ]
    assert timeline_height(SPANS) > timeline_height(SPANS[:2])
    assert [(depth, span.name) for depth, span in _nested(SPANS[:3])] == [(0, "attention"), (0, "experts"), (1, "wait")]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_no_two_spans_of_a_row_cross(bounds):
    spans = [Span("x", None, min(pair), max(pair), "gather") for pair in bounds]
    rows = _rows(spans)
    assert sorted(str(span) for _, members in rows for span in members) == sorted(map(str, spans))
    for _, members in rows:
        for i, one in enumerate(members):
            for other in members[:i]:
                apart = one.end_ns <= other.start_ns or other.end_ns <= one.start_ns
                first, second = (one.start_ns, one.end_ns), (other.start_ns, other.end_ns)
                inside = (first[0] <= second[0] and second[1] <= first[1]) or (
                    second[0] <= first[0] and first[1] <= second[1]
                )
                assert apart or inside
                assert not _cross(one, other)
