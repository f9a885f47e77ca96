"""`raymoe predictor train` from end to end: a tiny model over the text of a standard library module."""

import argparse
import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from raymoe.cli import app
from raymoe.commands.predictor import train_predictor
from raymoe.inference.predictors import PathPredictor
from raymoe.inference.predictors.path_model import FACTS_FILE, WEIGHTS_FILE
from raymoe.training.text import read_documents
from raymoe.training.tokenizer import train_tokenizer
from tests.tiny_models import tiny_model

SIZES: dict[str, Any] = {
    "sequences": 12,
    "sequence_length": 24,
    "steps": 3,
    "batch": 4,
    "learning_rate": 1e-2,
    "seed": 1,
}
MODEL: dict[str, Any] = {"num_layers": 2, "num_experts": 8, "top_k": 2, "vocab_size": 300}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model with its tokenizer, and `text.py` beside it."""
    folder = tmp_path_factory.mktemp("predictor")
    shutil.copy(argparse.__file__, folder / "text.py")
    texts = [document.text for document in read_documents(folder / "text.py")]
    train_tokenizer(texts, 300).save_pretrained(folder / "model")
    tiny_model("olmoe", vocab_size=300).save_pretrained(folder / "model")
    return folder


def run(folder: Path, **changes: Any) -> str:
    """What the command prints."""
    shown = StringIO()
    options: dict[str, Any] = SIZES | {"json": None} | changes
    train_predictor(
        folder / "model",
        str(folder / "text.py"),
        console=Console(file=shown, width=200),
        command="raymoe predictor train",
        **options,
    )
    return shown.getvalue()


def test_it_stores_a_predictor_that_serving_finds(trained, tmp_path):
    shown = run(trained, json=tmp_path / "p.json")
    predictor = PathPredictor.beside(trained / "model", **MODEL)
    assert predictor is not None
    predictor.step_begins(torch.tensor([5, 6]), ["a", "a"])
    said = predictor.step_begins(torch.tensor([7]), ["a"])
    assert [probability.shape for probability in said.values()] == [(8,), (8,)]
    content = json.loads((tmp_path / "p.json").read_text())
    # one held-out sequence: no union of four
    assert [(row["predictor"], row["tokens"]) for row in content["rows"]] == [("path", 1), ("most frequent", 1)]
    assert 0 < content["rows"][0]["recall@k"] <= content["rows"][0]["recall@2k"] <= 1
    assert {name: content["meta"][name] for name in SIZES} == SIZES
    facts = json.loads((trained / "model" / FACTS_FILE).read_text())
    assert facts["facts"]["held_out"] == [
        {name: value for name, value in row.items() if name != "predictor"} for row in content["rows"][:1]
    ]
    assert len(facts["shape"]["vocabulary"]) == 32
    assert "step     3/3" in shown
    assert f"{content['rows'][0]['recall@k']:.1%}" in shown


def test_another_tokenizer_is_refused_by_name(trained, tmp_path):
    run(trained)
    other = tmp_path / "other"
    texts = [document.text for document in read_documents(trained / "text.py")]
    train_tokenizer(texts[:1], 290).save_pretrained(other)
    for name in (WEIGHTS_FILE, FACTS_FILE):
        shutil.copy(trained / "model" / name, other / name)
    with pytest.raises(ValueError, match=r"vocabulary is '.*', but the model's is '.*': .* made for another model"):
        PathPredictor.beside(other, **MODEL)


def test_same_seed_same_predictor(trained):
    contents = []
    for seed in (1, 1, 2):
        run(trained, seed=seed)
        contents.append((trained / "model" / WEIGHTS_FILE).read_bytes())
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sequences": 1}, "sequences = 1: must be at least 2"),
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"learning_rate": 0.0}, r"learning_rate = 0\.0: must be above 0"),
        ({"sequence_length": 300}, "sequence_length = 300: the model takes at most 256 tokens"),
        ({"sequences": 10**6}, "too little text"),
    ],
)
def test_bad_numbers_are_one_clear_line(trained, changes, said):
    (trained / "model" / FACTS_FILE).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=said):
        run(trained, **changes)
    assert not (trained / "model" / FACTS_FILE).exists()


def test_the_command_line_names_its_options():
    shown = CliRunner().invoke(app, ["predictor", "train", "--help"], env={"COLUMNS": "200"}).output
    for name in SIZES:
        assert f"--{name.replace('_', '-')}" in shown
