"""`raymoe generate` from end to end: tiny models over lines of text."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from raymoe.cli import app
from raymoe.commands.generate import Drawing, generate
from raymoe.inference import opening
from raymoe.inference.text import decoder
from raymoe.inference.tiers import CheckpointTier
from raymoe.training.tokenizer import load_tokenizer
from tests.tiny_models import tiny_model, tiny_switch
from tests.tiny_tokenizer import tiny_tokenizer

TEXTS = ["def double(x):", "return x", "Gr\u00fc\u00dfe, caf\u00e9", "x + x + x", "def"]
OPTIONS: dict[str, Any] = {"expert_memory": "40%", "batch": 2, "unit": 2, "text_field": "text", "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models with their tokenizers, and the inputs in two forms."""
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = tiny_tokenizer()
    for name, model in {
        "switch": tiny_switch(vocab_size=280, num_layers=2, num_decoder_layers=2, tie_word_embeddings=False),
        "olmoe": tiny_model("olmoe", vocab_size=280),
    }.items():
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    # empty lines are no inputs, but lines all the same
    (folder / "in.txt").write_text("\n".join([TEXTS[0], "", *TEXTS[1:]]) + "\r\n", encoding="utf-8")
    (folder / "in.jsonl").write_text("".join(json.dumps({"say": text}) + "\n" for text in TEXTS))
    return folder


def run(
    folder: Path, model: str, out: Path, data: str = "in.txt", drawing: Drawing | None = None, **changes: Any
) -> str:
    """What the command prints."""
    shown = StringIO()
    options: dict[str, Any] = OPTIONS | {"json": None} | changes
    drawing = drawing or Drawing(max_new_tokens=6, temperature=0.0)
    console = Console(file=shown, width=200)
    generate(folder / model, str(folder / data), out, drawing=drawing, console=console, command="c", **options)
    return shown.getvalue()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("family", ["switch", "olmoe"])
def test_answers_are_those_of_transformers(folder, family, tmp_path):
    shown = run(folder, family, tmp_path / "deep" / "out.jsonl", json=tmp_path / "r.json")
    found = {line["input"]: line for line in lines(tmp_path / "deep" / "out.jsonl")}
    assert set(found) == {f"in.txt:{n}" for n in (1, 3, 4, 5, 6)}
    tokenizer = load_tokenizer(folder / family)
    model = tiny_switch() if family == "switch" else tiny_model("olmoe")
    whole: Any = type(model).from_pretrained(folder / family)
    num_tokens = 0
    for number, text in zip((1, 3, 4, 5, 6), TEXTS, strict=True):
        ids = tokenizer(text)["input_ids"]
        out = whole.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0].tolist()
        new = out[1:] if family == "switch" else out[len(ids) :]
        before = "" if family == "switch" else decoder(tokenizer)(ids)
        line = found[f"in.txt:{number}"]
        assert line["text"] == decoder(tokenizer)(([] if family == "switch" else ids) + new)[len(before) :]
        assert line["num_tokens"] == len(new)
        assert line["finish_reason"] == ("stop" if new[-1] == tokenizer.eos_token_id else "length")
        num_tokens += len(new)
    content = json.loads((tmp_path / "r.json").read_text())
    (row,) = content["rows"]
    assert row["generated_tokens"] == num_tokens
    assert content["meta"]["model"] == whole.config.model_type
    assert content["meta"]["unit"] == 2
    assert row["bytes_per_token"] == pytest.approx((row["prompt_bytes"] + row["decode_bytes"]) / num_tokens)
    assert row["experts_per_step"] * row["steps"] == pytest.approx(row["wanted_experts"])
    assert f"{row['hit_rate']:.1%}" in shown
    assert "input     5/5" in shown
    assert not list(tmp_path.rglob("*.partial"))


def test_rows_are_read_by_field_and_seeds_are_their_own(folder, tmp_path):
    drawing = Drawing(max_new_tokens=6, temperature=1.0, top_k=50, top_p=0.9, seed=3)
    options: dict[str, Any] = {"data": "in.jsonl", "drawing": drawing, "text_field": "say"}
    run(folder, "switch", tmp_path / "a", **options)
    run(folder, "switch", tmp_path / "b", batch=5, unit=1, expert_memory="100%", **options)
    a, b = ({line["input"]: line["text"] for line in lines(tmp_path / name)} for name in "ab")
    assert a == b
    assert set(a) == {f"in.jsonl:{n}" for n in range(1, 6)}
    options["drawing"] = Drawing(max_new_tokens=6, temperature=1.0, seed=4)
    run(folder, "switch", tmp_path / "c", **options)
    assert {line["input"]: line["text"] for line in lines(tmp_path / "c")} != a


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 0}, "batch = 0: must be at least 1"),
        ({"unit": 0}, "unit = 0: must be at least 1"),
        ({"drawing": Drawing(max_new_tokens=0)}, "max_new_tokens = 0: must be at least 1"),
        ({"drawing": Drawing(temperature=-1.0)}, "temperature = -1.0: must be at least 0"),
        ({"drawing": Drawing(temperature=float("nan"))}, "temperature = nan: must be at least 0"),
        ({"drawing": Drawing(top_p=0.0)}, "top_p = 0.0: must be above 0, up to 1"),
        ({"drawing": Drawing(temperature=0.0, top_p=0.5)}, "top_p: with temperature 0 nothing is drawn"),
        ({"drawing": Drawing(top_k=-1)}, "top_k = -1: must be at least 0"),
        ({"data": "in.jsonl"}, r"in.jsonl line 1: no field 'text', there are \['say'\]. Set text_field."),
        ({"data": "nothing.txt"}, "nothing.txt' does not exist"),
        ({"model": "nowhere"}, "nowhere' does not exist"),
        ({"drawing": Drawing(max_new_tokens=250)}, r"in.txt:1: \d+ tokens and an answer of up to 250 are \d+, but"),
        ({"expert_memory": "0.1%"}, "expert_memory: 0.1% is .* less than one expert"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(folder, tmp_path, changes, said):
    options: dict[str, Any] = {"model": "olmoe", "out": tmp_path / "out"} | changes
    with pytest.raises(ValueError, match=said) as caught:
        run(folder, **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_when_an_expert_cannot_be_read(folder, tmp_path, monkeypatch):
    """The last read of all fails: the answers of earlier units are kept, and nothing passes for whole."""

    class Failing(CheckpointTier):
        reads, most = 0, 10**9

        def read(self, layer, expert, out):
            Failing.reads += 1
            if Failing.reads > Failing.most:
                raise ValueError(f"expert {expert} of layer {layer}: cannot be read")
            return super().read(layer, expert, out)

    monkeypatch.setattr(opening, "CheckpointTier", Failing)
    run(folder, "olmoe", tmp_path / "whole", expert_memory="10%", unit=1)
    Failing.reads, Failing.most = 0, Failing.reads - 1
    with pytest.raises(ValueError, match=r"expert \d of layer 1: cannot be read"):
        run(folder, "olmoe", tmp_path / "out", expert_memory="10%", unit=1)
    assert not (tmp_path / "out").exists()
    kept = lines(tmp_path / "out.partial")
    assert kept == lines(tmp_path / "whole")[: len(kept)]
    assert [line["input"] for line in kept] == ["in.txt:1", "in.txt:3", "in.txt:4", "in.txt:5"]


def test_limits_of_drawing_mean_that_tokens_are_drawn():
    drawn = [Drawing(top_p=0.5), Drawing(top_k=3), Drawing(temperature=1.0)]
    assert [drawing.config().do_sample for drawing in drawn] == [True] * 3
    assert Drawing(temperature=0.0).config().do_sample is False
    # as the model's own configuration says
    assert Drawing(max_new_tokens=3).config().do_sample is None


def test_a_folder_without_inputs_is_refused(folder, tmp_path):
    (tmp_path / "in.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"in\.txt' holds no input"):
        run(folder, "olmoe", tmp_path / "out", data=str(tmp_path / "in.txt"))


def test_the_command_takes_these_options(folder, tmp_path):
    arguments = ["generate", folder / "switch", "--data", folder / "in.txt", "--out", tmp_path / "out", "--batch", 3]
    arguments += ["--unit", 2, "--expert-memory", "1MiB", "--max-new-tokens", 2, "--temperature", 0, "--seed", 1]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert [line["num_tokens"] <= 2 for line in lines(tmp_path / "out")] == [True] * 5
