"""`raymoe plan --trace` in process: from counts and a cluster to table, JSON and page."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from raymoe.commands.model_shape import shape_of_model
from raymoe.commands.plan import plan_trace
from raymoe.telemetry import TraceWriter
from tests.tiny_models import tiny_model

CLUSTER = """
nodes: 2
devices_per_node: 2
device: T1000
flops: 1 GFLOP/s
memory: 64 MB
intra_bandwidth: 1 GB/s
inter_bandwidth: 100 MB/s
latency: 1us
"""
SMALL = {"hidden_size": 32, "expert_width": 64, "sequence_length": 128, "steps": 8, "policies": "ep,fssdp,fssdp-known"}
TINY = {"layers": 2, "experts": 8, "tokens": 64, "choices": 2}


@pytest.fixture
def cluster(tmp_path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(CLUSTER)
    return str(path)


@pytest.fixture
def trace(tmp_path) -> str:
    """Eight steps, two layers, six experts, four ranks of 50 tokens that take two each; the first expert is hot."""
    path = tmp_path / "counts.parquet"
    rng = np.random.default_rng(0)
    with TraceWriter(path, 2, 6, choices=2) as writer:
        for step in range(8):
            for rank in range(4):
                writer.append(step, rng.multinomial(100, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], size=2), rank=rank)
    return str(path)


def planned(trace: str, cluster: str, **options) -> str:
    """What the command prints."""
    console = Console(width=250, record=True, force_terminal=False, file=io.StringIO())
    plan_trace(trace, cluster, console=console, command="raymoe plan", **(SMALL | options))
    return console.export_text()


def test_table_json_and_page(trace, cluster, tmp_path):
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    shown = planned(trace, cluster, json=out, report=page)
    assert "mine: 2 x 2 T1000 (1 GFLOP/s, 64 MB), 1 GB/s within a node, 100 MB/s a node between nodes" in shown
    assert "2 MoE layers of 6 experts, top-2, hidden size 32, expert width 64" in shown
    assert "counts: 8 steps, the first 2 not counted; busiest expert " in shown
    assert "All times are simulated" in shown
    assert "Use fssdp: steps" in shown

    result = json.loads(out.read_text())
    rows = {row["policy"]: row for row in result["rows"]}
    assert set(rows) == {"ep", "fssdp", "fssdp-known"}
    assert [row["step_ms"] for row in result["rows"]] == sorted(row["step_ms"] for row in result["rows"])
    columns = ["policy", "moe_ms", "step_ms", "speedup_over_ep", "ideal_share", "imbalance", "bytes", "memory_bytes"]
    assert set(columns) <= set(rows["fssdp"])
    assert rows["ep"]["speedup_over_ep"] == 1
    assert rows["ep"]["imbalance"] > rows["fssdp"]["imbalance"]
    meta = result["meta"]
    assert meta["simulated"] is True
    assert meta["command"] == "raymoe plan"
    assert meta["cluster"]["inter_bandwidth"] == "100 MB/s"
    assert meta["model"]["choices"] == 2
    assert meta["trace"]["num_steps"] == 6
    assert meta["advice"]["policy"] == "fssdp"
    assert meta["advice"]["headline"] in " ".join(shown.split())

    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert text.count("<figure") == 2
    assert text.count('media="(prefers-color-scheme: dark)"') == 2
    assert "<script" not in text
    assert not re.findall(r'(?:src|href|srcset)="(?!data:)', text)
    assert meta["advice"]["headline"] in text
    for words in ("simulated", "GShard (arXiv 2006.16668)", "fssdp-known (bound)", "2 x 2 T1000"):
        assert words in text


def test_names_from_the_user_are_escaped_in_the_page(trace, cluster, tmp_path):
    renamed = Path(cluster).rename(tmp_path / "<b>mine.yaml")
    planned(trace, str(renamed), report=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;mine" in text
    assert "<b>mine" not in text


@pytest.mark.parametrize("name", ["smartmoe", "W3", "W4_ragged_source"])
def test_generated_traces(name, cluster):
    shown = planned(name, cluster, **TINY)
    assert "sizes as given: 2 MoE layers of 8 experts, top-2" in shown
    assert re.search(r"trace +(smartmoe|W3_spread_experts|W4_ragged_source): 8 steps", shown)


def test_the_same_seed_gives_the_same_numbers(cluster, tmp_path):
    outs = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for out, seed in zip(outs, (1, 1, 2), strict=True):
        planned("smartmoe", cluster, **TINY, seed=seed, json=out)
    one, same, other = ([row["step_ms"] for row in json.loads(out.read_text())["rows"]] for out in outs)
    assert one == same != other


def test_sizes_of_a_model(cluster, tmp_path):
    tiny_model("qwen3_moe").config.save_pretrained(tmp_path)
    shown = planned(
        "modern", cluster, tokens=64, model_config=tmp_path / "config.json", hidden_size=None, expert_width=None
    )
    assert "qwen3_moe: 2 MoE layers of 8 experts, top-2, hidden size 32, expert width 16" in shown


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mixtral", (32, 48, 3, 2, 6, 2)),
        ("olmoe", (32, 16, 3, 2, 8, 2)),
        ("qwen2_moe", (32, 16, 3, 2, 7, 2)),
        ("deepseek_v3", (32, 16, 3, 1, 8, 2)),
        ("gpt_oss", (32, 32, 3, 2, 6, 2)),
    ],
)
def test_sizes_whatever_the_family_calls_them(family, sizes, tmp_path):
    tiny_model(family).config.save_pretrained(tmp_path)
    shape = shape_of_model(tmp_path)
    found = (shape.hidden_size, shape.expert_width, shape.matrices, shape.num_layers, shape.num_experts, shape.choices)
    assert (shape.name, found) == (family, sizes)


def test_options_go_before_the_model(cluster, tmp_path):
    tiny_model("olmoe").config.save_pretrained(tmp_path)
    shown = planned("modern", cluster, tokens=64, model_config=tmp_path, hidden_size=None, expert_width=64, choices=3)
    assert "sizes as given: 2 MoE layers of 8 experts, top-3, hidden size 32, expert width 64" in shown


def test_a_trace_of_another_model(trace, cluster, tmp_path):
    tiny_model("olmoe").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"counts 6 experts a layer, the model of --model-config has 8"):
        planned(trace, cluster, model_config=tmp_path)


def test_a_trace_without_choices_asks_for_them(cluster, tmp_path):
    path = tmp_path / "counts.parquet"
    with TraceWriter(path, 1, 2) as writer:
        for step in range(8):
            writer.append(step, np.array([[30, 10]]))
    with pytest.raises(ValueError, match="does not say how many experts a token took: give --choices"):
        planned(str(path), cluster)
    assert "top-1" in planned(str(path), cluster, choices=1)


def test_expert_parallelism_is_there_unasked(trace, cluster, tmp_path):
    planned(trace, cluster, policies="fssdp-paper", json=tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["policy"] for row in rows} == {"ep", "fssdp-paper"}


def test_an_idle_trace_is_no_crash(cluster, tmp_path):
    path = tmp_path / "idle.parquet"
    with TraceWriter(path, 1, 4, choices=1) as writer:
        for step in range(4):
            writer.append(step, np.zeros((1, 4), dtype=np.int64))
    assert "Not worth it" in planned(str(path), cluster, report=tmp_path / "page.html")


def test_experts_that_do_not_fit(trace, cluster):
    Path(cluster).write_text(CLUSTER.replace("64 MB", "100 kB"))
    shown = planned(trace, cluster)
    assert "too much" in shown
    assert "Nothing fits: even with ep" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trace": "modren"},
            r"--trace modren: no such file, and no generated trace of that name; there are: smartmoe, .*W7_burst",
        ),
        ({"cluster": "h1000"}, r"h1000: neither a preset nor a file. Did you mean 'h100'\?"),
        ({"policies": "ep,best"}, r"no placement policy 'best'; there are: ep, "),
        ({"fan_out": "star"}, r"fan_out = 'star': choose one of p2p, "),
        ({"devices_per_node": 3}, r"counts has 4 ranks, which cannot be split over 6: .*--devices-per-node"),
        ({"experts": 8}, r"--layers, --experts and --tokens are for generated traces"),
        ({"steps": 0}, r"--steps is 0; it must be at least 1"),
        ({"hidden_size": -1}, r"--hidden-size is -1; it must be at least 1"),
        ({"extra_slots": -1}, r"extra_slots = -1: must be at least 0"),
        ({"model_config": Path("nowhere")}, r"--model-config: nowhere: no such file"),
    ],
)
def test_bad_input(changes, message, trace, cluster):
    with pytest.raises(ValueError, match=message):
        planned(**({"trace": trace, "cluster": cluster} | changes))


def test_a_file_that_is_no_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ValueError, match=r"--model-config: .*config.json: no 'model_type' in it"):
        shape_of_model(tmp_path)


def test_steps_bound_a_file(trace, cluster):
    assert "counts: 5 steps, the first 1 not counted" in planned(trace, cluster, steps=5)
