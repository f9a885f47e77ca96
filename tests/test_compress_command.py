"""`raymoe compress` from a pretrained directory to one that engines serve."""

import argparse
import json
import shutil
from io import StringIO

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from raymoe import compression
from raymoe.commands.compress import compress_model
from raymoe.inference import InferenceEngine
from raymoe.training.text import read_documents
from raymoe.training.tokenizer import train_tokenizer
from tests.inference.test_engine import greedy
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compress")
    shutil.copy(argparse.__file__, folder / "text.py")
    model = tiny_model("olmoe", vocab_size=300, num_experts_per_tok=4)
    model.save_pretrained(folder / "model")
    texts = [document.text for document in read_documents(folder / "text.py")]
    train_tokenizer(texts, 300).save_pretrained(folder / "model")
    return folder


def run(folder, out, **changes) -> str:
    console = Console(file=StringIO(), width=300)
    options = {
        "tie_input": False, "train": "theta", "loss": "lm", "steps": 12, "batch": 4, "sequence_length": 24, "held_out": 8,
        "learning_rate": 0.02, "seed": 0, "console": console, "command": "raymoe compress", "json": folder / "out.json",
    }  # fmt: skip
    named = {"keep": "0.5", "method": "compressed_experts", "data": str(folder / "text.py")} | changes
    first = [named.pop(key) for key in ("keep", "method", "data")]
    compress_model(folder / "model", *first, out, **options | named)
    return console.file.getvalue()


def test_it_writes_a_model_that_engines_serve(folder):
    said = run(folder, folder / "small", loss="distill")
    assert "fit on" in said
    assert "all experts stay in memory" in said
    rows = {row["arm"]: row for row in json.loads((folder / "out.json").read_text())["rows"]}
    assert set(rows) == {"full", "drop", "compressed"}
    assert rows["compressed"]["loss"] != rows["drop"]["loss"]
    assert rows["compressed"]["active_parameters"] < rows["full"]["active_parameters"]
    assert rows["full"]["total_bytes"] < rows["compressed"]["total_bytes"]
    assert rows["full"]["latency_ms_batch_1"] > 0
    opened = AutoModelForCausalLM.from_pretrained(folder / "small")
    assert compression.settings_of(opened).keep == (0.5, 0.5)
    engine = InferenceEngine(folder / "small", max_batch_tokens=64, kv_tokens=256, device="cpu")
    try:
        assert len(engine.generate([[5, 6, 7]], greedy(3))[0]) == 3
    finally:
        engine.close()
    with pytest.raises(ValueError, match="compressed already"):
        compression.compress(opened)


def test_a_method_without_vectors_is_not_fitted(folder):
    run(folder, folder / "reap", method="reap", keep="2,3")
    meta = json.loads((folder / "out.json").read_text())["meta"]
    assert (meta["method"], meta["keep"]) == ("reap", [2, 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "0"}, "keep: got 0"),
        ({"keep": "half"}, "keep: 'half' is no number"),
        ({"keep": "1,2,3"}, "keep: got 3 values for 2 MoE layers"),
        ({"method": "fold"}, "method: 'fold' is not known"),
        ({"train": "some"}, "train: 'some' is not known"),
        ({"loss": "mse"}, "loss: 'mse' is not known"),
        ({"held_out": 10**6}, "too little text"),
    ],
)
def test_bad_settings_are_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        run(folder, folder / "never", **changes)
    assert not (folder / "never").exists()


def test_the_model_itself_is_not_overwritten(folder):
    with pytest.raises(ValueError, match=r"out: .* is the model itself"):
        run(folder, folder / "model")
