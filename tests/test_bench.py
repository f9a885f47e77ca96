import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from raymoe.benchmarks import kernels_cpu
from raymoe.cli import app
from raymoe.commands.bench import bench_kernels

CONTRACT = {"shape", "tokens", "kind", "backend", "us", "tflops", "floor_share", "error"}


@pytest.fixture
def small(monkeypatch):
    # caches do not matter at toy size
    monkeypatch.setattr(kernels_cpu, "_COLD_BYTES", 1 << 20)
    monkeypatch.setattr(kernels_cpu, "CONTENDERS", [c for c in kernels_cpu.CONTENDERS if c.name != "oneDNN packed"])


def test_cpu_table_has_every_contender_with_its_error(small, tmp_path):
    kernels_cpu.run(
        [kernels_cpu.shape_of("toy")], [1, 20], [4], 5, Console(), json=tmp_path / "r.json", markdown=tmp_path / "r.md"
    )
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    inference = [row for row in rows if row["kind"] != "step"]
    assert [row["kind"] for row in rows if row["backend"] == "raymoe"] == ["decode", "forward", "step"]
    assert all(set(row) >= CONTRACT for row in inference)
    # a bf16 layer, and one whose rows and weights were rounded to 8 bits
    assert all(row["error"] < (5e-2 if "int8" in row["backend"] else 1e-2) for row in rows)
    assert all(row["us"] > 0 for row in rows)
    steps = {row["backend"] for row in rows if row["kind"] == "step"}
    assert steps == {"transformers grouped_mm", "raymoe", "raymoe grad_into"}
    assert (tmp_path / "r.md").read_text().count("\n| toy |") == len(rows)


def test_command_prints_and_writes(small, tmp_path):
    path = tmp_path / "kernels.json"
    result = CliRunner().invoke(
        app, ["bench", "kernels", "--shapes", "toy", "--tokens", "2", "--json", str(path)], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "toy, 2 tokens" in result.output
    assert {row["tokens"] for row in json.loads(path.read_text())["rows"]} == {2}


def test_quality_counts_the_published_shapes(tmp_path):
    path = tmp_path / "quality.json"
    found = CliRunner().invoke(app, ["bench", "quality", "--experiments", "active parameters", "--json", str(path)])
    assert found.exit_code == 0, found.output
    rows = {row["arm"]: row["active_parameters"] for row in json.loads(path.read_text())["rows"]}
    # the paper's -31.4 %
    assert rows["olmoe, compressed_experts"] / rows["olmoe, full"] == pytest.approx(1 - 0.314, abs=5e-4)
    refused = CliRunner().invoke(app, ["bench", "quality", "--experiments", "routing"])
    assert refused.exit_code != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": "llama"}, "'llama' is not known"),
        ({"tokens": "1,x"}, "whole numbers"),
        ({"tune": True}, "needs a CUDA device"),
    ],
)
def test_bad_options_are_named(arguments, message, tmp_path):
    options = {"shapes": "toy", "tokens": "1", "tune": False} | arguments
    with pytest.raises(ValueError, match=message):
        bench_kernels(**options, output=tmp_path, console=Console(), json=None)
