"""`raymoe bench engines` on a model of a few thousand parameters."""

import json

import pytest
from typer.testing import CliRunner

from raymoe.benchmarks import inference_engines
from raymoe.cli import app
from tests.tiny_models import tiny_model

SYSTEMS = ["raymoe", "generate", "continuous batching"]


@pytest.fixture
def tiny(monkeypatch):
    def saved(folder):
        tiny_model("olmoe", vocab_size=inference_engines._VOCABULARY).save_pretrained(folder / "model")
        return folder / "model"

    monkeypatch.setattr(inference_engines, "random_model", saved)
    monkeypatch.setattr(inference_engines, "_CHOICES", 1)


def test_every_system_generates_the_same_tokens(tiny, tmp_path):
    command = [
        "bench",
        "engines",
        "--batches",
        "3",
        "--rounds",
        "2",
        "--tokens",
        "4",
        "--json",
        str(tmp_path / "r.json"),
    ]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["system"] for row in rows] == SYSTEMS
    for row in rows:
        assert row["identical_share"] == 1.0
        assert row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"]
        assert row["raymoe_over_min"] <= row["raymoe_over"] <= row["raymoe_over_max"]
        assert row["experts"] in ("raymoe", *inference_engines.EXPERTS)
        assert row["threads"] in (1, 2)
    assert rows[0]["raymoe_over"] == 1.0


def test_prompts_differ_in_length_and_by_round():
    one, other = (inference_engines.random_prompts(8, seed) for seed in (0, 1))
    assert len({len(prompt) for prompt in one}) == 8
    assert [len(prompt) for prompt in one] == [len(prompt) for prompt in other]
    assert one != other
