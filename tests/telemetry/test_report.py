import base64
import re
import threading
from xml.etree import ElementTree

import numpy as np
import pytest

from raymoe.telemetry import Answer, Number, Report, Score, Serving, Table, Training, plots, run_meta, write_report
from raymoe.telemetry.report import render

STEPS = np.arange(40)


def full_report() -> Report:
    return Report(
        title="First light <1>",
        subtitle="two workers & one page",
        summary=[Number("tokens trained", 1638400, "all workers"), Number("rate", "5,210 tokens/s")],
        training=Training(
            STEPS,
            loss=8 * np.exp(-STEPS / 10) + 3,
            tokens_per_s=[None, *([5200.0] * 39)],
            step_s=np.full(40, 0.25),
            expert_imbalance=np.full(40, 3.0),
            owner_imbalance=np.full(40, 2.0),
            device_imbalance=np.full(40, 1.125),
        ),
        loads=np.array([[60, 20, 10, 10], [25, 25, 25, 25]]),
        evaluation=[Score("raymoe", 2.125, "held out"), Score("gzip", 2.5), Score("xz", 2.25), Score("unigram", 4.75)],
        serving=Serving(
            [Answer("say <b>hi</b>", "<script>alert('x')</script> http://example.org/a.js", 0.0215, 41.25, 64)],
            step=[0, 1],
            hits=[3, 4],
            misses=[1, 0],
        ),
        tables=[Table("Where a step goes", [{"phase": "experts", "ms": 390.12345}, {"phase": "idle", "ms": None}])],
        meta=run_meta("raymoe demo"),
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render(full_report())


def figures(page: str) -> list[str]:
    found = re.findall(r'(?:src|srcset)="data:image/svg\+xml;base64,([^"]+)"', page)
    return [base64.b64decode(data).decode() for data in found]


@pytest.mark.parametrize(
    "said",
    [
        "1,638,400",
        "5,210 tokens/s",
        "First 11, last 3.162",
        "Median 5,200",
        "Median 0.25",
        "ranks, as placed 1.125",
        "expert 0 of layer 0: 60 % of its layer&#x27;s rows, 2.4 times an even share",
        "2.125",
        "87.5 % of 8 wanted experts",
        "first token after 21.5 ms",
        "41.25 tokens/s",
        "390.1",
        "raymoe demo",
    ],
)
def test_holds_the_numbers(page, said):
    assert said in page


def test_fetches_nothing(page):
    sources = re.findall(r'(?:src|srcset|href)\s*=\s*"([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "@import" not in page
    assert "url(" not in page


def test_runs_nothing(page):
    assert "<script" not in page
    assert "default-src 'none'" in page


def test_escapes_what_a_model_wrote(page):
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page
    assert "say &lt;b&gt;hi&lt;/b&gt;" in page
    assert "<title>First light &lt;1&gt;</title>" in page


def test_every_figure_is_drawn_for_light_and_dark(page):
    drawn = figures(page)
    # loss, throughput, step time, imbalance, loads, evaluation, cache
    assert len(drawn) == 2 * 7
    assert len(set(drawn)) == 2 * 7
    for svg in drawn:
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_fits_a_phone_and_both_colour_schemes(page):
    assert 'name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("left_out", ["summary", "training", "loads", "evaluation", "serving", "tables", "meta"])
def test_any_part_may_be_missing(left_out, monkeypatch):
    # drawing takes most of the time, and is tested above
    monkeypatch.setattr(plots, "data_uri", lambda draw, theme, height_in: "data:,")
    empty = {"training": None, "loads": None, "serving": None, "meta": {}}
    parts = {name: value for name, value in vars(full_report()).items() if name != left_out}
    page = render(Report(**parts, **{left_out: empty.get(left_out, ())}))
    assert len(re.findall("<h2>", page)) == 6


def test_a_title_alone_is_a_page():
    page = render(Report("only a title"))
    assert "<h1>only a title</h1>" in page
    assert "<section" not in page


def test_one_step_is_enough():
    assert len(figures(render(Report("x", training=Training([0], loss=[3.0]))))) == 2


def test_values_that_are_missing_are_dashes_or_gaps():
    report = Report(
        "x",
        summary=[Number("loss", float("nan"))],
        training=Training([0, 1, 2], loss=[None, float("nan"), 2.0], step_s=[None] * 3),
        evaluation=[Score("raymoe", float("nan")), Score("gzip", 2.5)],
    )
    page = render(report)
    assert len(figures(page)) == 4
    assert ">nan<" not in page
    assert "&ndash;" in page


def test_a_layer_without_rows_has_no_share():
    page = render(Report("x", loads=np.array([[0, 0], [1, 3]])))
    assert "expert 1 of layer 1: 75 %" in page
    assert len(figures(page)) == 2


def test_no_rows_at_all_draw_nothing():
    page = render(Report("x", loads=np.zeros((2, 4), dtype=np.int64)))
    assert "No rows were routed." in page
    assert not figures(page)


def test_a_long_run_stays_a_light_page():
    steps = np.arange(100_000)
    noise = np.random.default_rng(0).random(steps.size)
    assert len(render(Report("x", training=Training(steps, loss=noise)))) < 300_000


def test_dollar_signs_are_text():
    assert len(figures(render(Report("x", evaluation=[Score("costs $1 and $x_{", 1.0)])))) == 2


def test_threads_may_write_at_once(tmp_path):
    threads = [
        threading.Thread(target=write_report, args=(tmp_path / f"{i}.html", Report("x", loads=np.ones((2, 3)))))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pages = {path.read_text() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 4
    assert all(len(figures(page)) == 2 for page in pages)


def test_a_curve_of_another_length_is_named():
    with pytest.raises(ValueError, match=r"training.step_s has 2 values for 3 steps"):
        Training([0, 1, 2], loss=[1.0, 1.0, 1.0], step_s=[1.0, 1.0])


def test_the_cache_needs_one_value_a_step():
    with pytest.raises(ValueError, match="2 steps, 2 hits and 1 misses"):
        Serving(step=[0, 1], hits=[1, 1], misses=[0])


def test_loads_are_a_matrix():
    with pytest.raises(ValueError, match=r"loads must be \[L, E\]"):
        Report("x", loads=np.ones(3))
