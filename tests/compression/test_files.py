"""Compressed models on disk: opened by transformers with raymoe, refused without."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raymoe import compression
from raymoe.compression.files import FILE
from tests.compression.test_compress import TOKENS, logits, stir
from tests.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_through_transformers(tmp_path, family):
    model = tiny_model(family)
    compression.compress(model, keep=1, method="compressed_experts")
    stir(model)
    want = logits(model)
    compression.save(model, tmp_path / "small")
    assert model.config.model_type == family
    assert "compressed" not in "".join(
        name for f in (tmp_path / "small").glob("model*.safetensors") for name in load_file(f)
    )
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert opened.config.model_type == f"raymoe_{family}"
    assert compression.settings_of(opened) == compression.settings_of(model)
    assert torch.equal(logits(opened), want)
    opened.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), want)


@pytest.mark.parametrize("method", ["shared_vector", "mean_vector", "reap", "drop"])
def test_every_method_is_kept(tmp_path, method):
    model = compression.compress(
        tiny_model("olmoe", num_experts_per_tok=4), keep=[2, 1], method=method, calibration=TOKENS
    )
    stir(model)
    compression.save(model, tmp_path / "small")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(opened), logits(model))


def test_plain_transformers_refuses(tmp_path):
    compression.save(compression.compress(tiny_model("olmoe"), keep=1), tmp_path / "small")
    script = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(tmp_path / 'small')!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "raymoe_olmoe" in done.stderr


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "small"
    compression.save(compression.compress(tiny_model("olmoe"), keep=1), path)
    tensors = load_file(path / FILE)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:3].contiguous()}, path / FILE)
    with pytest.raises(ValueError, match="the file is of another model"):
        AutoModelForCausalLM.from_pretrained(path)
    (path / FILE).unlink()
    with pytest.raises(ValueError, match="cannot read the vectors"):
        AutoModelForCausalLM.from_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"raymoe": {"folding": {}}}))
    with pytest.raises(ValueError, match=r"raymoe\.folding"):
        AutoModelForCausalLM.from_pretrained(path)
