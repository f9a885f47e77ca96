"""`raymoe trace` from end to end: tiny models of several families over the text of a standard library module."""

import argparse
import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from raymoe.commands.trace import trace
from raymoe.placement.statistics import trace_statistics
from raymoe.placement.trace import LoadTrace
from raymoe.telemetry import load_counts
from raymoe.training.batches import Batches, pack
from raymoe.training.text import read_documents
from raymoe.training.tokenizer import load_tokenizer, train_tokenizer
from tests.tiny_models import tiny_model

SIZES: dict[str, Any] = {"ranks": 3, "batch": 7, "sequence_length": 24, "steps": 3, "seed": 1}
VOCABULARY = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds `text.py` and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("trace")
    shutil.copy(argparse.__file__, folder / "text.py")
    texts = [document.text for document in read_documents(folder / "text.py")]
    train_tokenizer(texts, VOCABULARY).save_pretrained(folder / "tokenizer")
    return folder


def model_of(folder: Path, family: str, **changes: Any) -> Path:
    path = folder / "-".join([family, *map(str, changes.values())])
    if not path.exists():
        shutil.copytree(folder / "tokenizer", path)
        options: dict[str, Any] = {"vocab_size": VOCABULARY} | changes
        tiny_model(family, **options).save_pretrained(path)
    return path


def run(model: Path, data: Path | str, output: Path, **changes: Any) -> str:
    """What the command prints."""
    shown = StringIO()
    options: dict[str, Any] = SIZES | {"json": None} | changes
    trace(model, str(data), output, console=Console(file=shown, width=200), command="raymoe trace", **options)
    return shown.getvalue()


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "gpt_oss"])
def test_counts_are_those_of_the_router_logits(folder, family, tmp_path):
    model = model_of(folder, family)
    run(model, folder / "text.py", tmp_path / "t.parquet")
    counts = load_counts(tmp_path / "t.parquet")
    assert counts["choices"] == 2

    plain = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager").eval()
    stream = pack(read_documents(folder / "text.py"), load_tokenizer(model), 24)
    batches = Batches(stream, 24, 7, seed=1)
    found = {}
    for step in range(3):
        inputs = batches.batch(step).tokens[:, :-1]
        with torch.no_grad():
            logits = plain(inputs, output_router_logits=True).router_logits
        for layer, scores in enumerate(logits):
            chosen = scores.reshape(7, 24, -1).topk(2).indices
            # 7 sequences on 3 ranks: 2, 2 and 3
            for rank, sequences in enumerate((chosen[:2], chosen[2:4], chosen[4:])):
                found[step, layer, rank] = np.bincount(sequences.flatten(), minlength=scores.shape[-1]).tolist()
    keys = zip(*(counts[name].tolist() for name in ("step", "layer", "rank")), strict=True)
    assert dict(zip(keys, counts["counts"].tolist(), strict=True)) == found


def test_every_row_sums_to_its_tokens_times_choices(folder, tmp_path):
    # one dense layer, then two with group-limited routing
    model = model_of(folder, "deepseek_v3", num_hidden_layers=3)
    run(model, folder / "text.py", tmp_path / "t.parquet")
    counts = load_counts(tmp_path / "t.parquet")
    assert len(counts["step"]) == 3 * 3 * 2
    assert counts["counts"].shape[1] == 8
    tokens = np.where(counts["rank"] == 2, 3 * 24, 2 * 24)
    assert (counts["counts"].sum(axis=1) == tokens * 2).all()
    # distinct experts: none is taken twice by a token
    assert (counts["counts"] <= tokens[:, None]).all()


def test_json_and_table_say_what_the_trace_holds(folder, tmp_path):
    model = model_of(folder, "olmoe")
    shown = run(model, folder / "text.py", tmp_path / "t.parquet", json=tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    expected = trace_statistics(LoadTrace.of_columns(load_counts(tmp_path / "t.parquet")))
    assert [row["layer"] for row in content["rows"]] == [0, 1, "all"]
    assert content["rows"][2] == pytest.approx(expected | {"layer": "all"})
    meta = content["meta"]
    assert (meta["command"], meta["model"], meta["choices"]) == ("raymoe trace", "olmoe", 2)
    assert {name: meta[name] for name in SIZES} == SIZES
    assert "step     3/3" in shown
    assert f"{expected['expert_max_mean']:.2f}" in shown
    assert str(tmp_path / "t.parquet") in shown.replace("\n", "")


def test_same_seed_same_trace(folder, tmp_path):
    model = model_of(folder, "olmoe")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(model, folder / "text.py", tmp_path / name, seed=seed)
    a, b, c = (load_counts(tmp_path / name)["counts"] for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_one_step_has_no_drift_to_show(folder, tmp_path):
    shown = run(
        model_of(folder, "olmoe"),
        folder / "text.py",
        tmp_path / "t.parquet",
        steps=1,
        ranks=1,
        json=tmp_path / "t.json",
    )
    assert json.loads((tmp_path / "t.json").read_text())["rows"][-1]["drift"] is None
    assert "nan" not in shown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranks": 0}, "ranks = 0: must be at least 1"),
        ({"ranks": 8}, "batch = 7: 8 ranks need at least a sequence each"),
        ({"sequence_length": 257}, "sequence_length = 257: the model takes at most 256 tokens"),
        ({"steps": 10**6}, "too little text: .* sequences of 24 tokens, but 1000000 steps of 7 take 7000000"),
        ({"batch": 10**6}, "too little text: .* a global batch has 1000000"),
    ],
)
def test_bad_numbers_are_one_clear_line(folder, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        run(model_of(folder, "olmoe"), folder / "text.py", tmp_path / "t.parquet", **changes)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def refused(model: Path, data: Path, tmp_path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers look at what it says)
        run(model, data, tmp_path / "t.parquet")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t.parquet").exists()
    return str(caught.value)


def test_what_cannot_be_traced_is_named(folder, tmp_path):
    text = folder / "text.py"
    assert "does not exist" in refused(tmp_path / "nowhere", text, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "transformers does not open it" in refused(tmp_path / "empty", text, tmp_path)
    dense = tmp_path / "dense"
    LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1).save_pretrained(dense)
    assert "model family 'llama' (LlamaForCausalLM) has no MoE layer" in refused(dense, text, tmp_path)
    assert "its tokenizer gives token" in refused(model_of(folder, "olmoe", vocab_size=96), text, tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    assert "too little text" in refused(model_of(folder, "olmoe"), tmp_path / "short.txt", tmp_path)


# transformers makes up an empty tokenizer for one of them, and fails on pages of advice for the other
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_missing_tokenizer_is_named(family, folder, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / family)
    assert "no tokenizer in" in refused(tmp_path / family, folder / "text.py", tmp_path)


def test_weights_that_are_missing_are_not_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(model_of(folder, "olmoe"), model)
    weights = load_file(model / "model.safetensors")
    for lost, said in (
        (
            "model.layers.1.mlp.gate.weight",
            "1 tensors are missing from its files, the first is 'model.layers.1.mlp.gate.weight'",
        ),
        ("model.layers.1.mlp.experts.3.gate_proj.weight", "cannot read its weights"),
    ):
        save_file({name: tensor for name, tensor in weights.items() if name != lost}, model / "model.safetensors")
        assert said in refused(model, folder / "text.py", tmp_path)
    (model / "model.safetensors").write_bytes(b"cut")
    assert "cannot read its weights" in refused(model, folder / "text.py", tmp_path)
    (model / "model.safetensors").unlink()
    assert "cannot read its weights" in refused(model, folder / "text.py", tmp_path)
