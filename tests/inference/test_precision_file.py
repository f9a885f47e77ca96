"""Experts in fewer bits beside a checkpoint: what engines read from them, and which files they refuse."""

import argparse
import copy
import json
import logging
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import GenerationConfig

from raymoe.commands.experts import make_experts
from raymoe.config import ServeConfig
from raymoe.config.precision import Precision
from raymoe.inference import InferenceEngine, SamplingParams
from raymoe.inference.expert_form import ExpertForm
from raymoe.inference.expert_precision import ExpertCodec
from raymoe.inference.holding import Holding
from raymoe.inference.opening import open_model
from raymoe.inference.precision_file import EncodedTier, PrecisionTier, PrecisionWriter, precision_path
from raymoe.inference.static_engine import StaticEngine
from raymoe.inference.tiers import Tiers
from raymoe.models import expert_parameters, load_without_experts, moe_layers
from raymoe.training.text import read_documents
from raymoe.training.tokenizer import train_tokenizer
from tests.inference.conftest import random_prompts
from tests.inference.local_hosts import LocalHosts, until
from tests.tiny_models import tiny_model

BF16, INT8, INT4 = Precision("bf16"), Precision("int8"), Precision("int4", 32)
LOSSY = pytest.mark.parametrize("precision", [BF16, INT8, INT4], ids=str)
LOSS = {"relative_error": [0.02, 0.04], "held_out": None}
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=())
PROMPTS = random_prompts([5, 9, 3])


def make(folder: Path, precision: Precision, loss=LOSS) -> Path:
    _, files = load_without_experts(folder, torch.float32)
    with PrecisionWriter(folder, files, precision) as writer:
        writer.write()
        return writer.finish(loss)


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss"])
def folder(request, saved_model, tmp_path_factory) -> Path:
    """A model with its experts in each precision beside it; gpt_oss has biases, and matrices the other way round."""
    path = tmp_path_factory.mktemp("precision") / request.param
    shutil.copytree(saved_model(request.param)[1], path)
    for precision in (BF16, INT8, INT4):
        make(path, precision)
    return path


@pytest.fixture
def own(saved_model, tmp_path) -> Path:
    """A copy of a model that a test may spoil."""
    return shutil.copytree(saved_model("olmoe")[1], tmp_path / "model")


@pytest.fixture
def hold_in(request):
    """Makes hosts of all experts of a model in a precision, which are closed at the end of the test."""

    def make_host(folder: Path, precision: Precision) -> Holding:
        opened = open_model(folder, torch.float32, direct_io=True, precision=str(precision))
        holding = Holding(
            opened.layers, Tiers(opened.tiers), memory="100%", dtype=torch.float32, precision=opened.precision
        )
        request.addfinalizer(holding.close)
        holding.hold([(layer.index, expert) for layer in opened.layers for expert in range(layer.num_experts)])
        return holding

    return make_host


def generate(folder: Path, **options) -> tuple[list[list[int]], dict]:
    with InferenceEngine(folder, max_batch_tokens=64, kv_tokens=1024, device="cpu", **options) as engine:
        return engine.generate(PROMPTS, GREEDY), engine.stats()


@LOSSY
@pytest.mark.parametrize("direct_io", [True, False])
def test_experts_come_as_the_codec_has_stored_them(folder, precision, direct_io):
    _, files = load_without_experts(folder, torch.float32)
    held = PrecisionTier(precision_path(folder, precision), files, precision, direct_io=direct_io)
    assert held.facts()["mode"] in (("direct", "dropped") if direct_io else ("cached",))
    for layer in files.layers:
        codec = ExpertCodec(layer.layout, layer.spec, precision, torch.float32)
        exact = torch.zeros(layer.layout.numel)
        wanted = torch.zeros(codec.num_bytes, dtype=torch.uint8)
        for expert in range(layer.num_experts):
            files.read(layer.index, expert, exact)
            codec.encode(exact, wanted)
            flat = torch.zeros(layer.layout.numel)
            codec.decode(wanted, flat)
            for source in (held, EncodedTier(files, precision)):
                stored, found = torch.full_like(wanted, 255), torch.zeros_like(flat)
                source.read(layer.index, expert, stored)
                source.read(layer.index, expert, found)
                assert torch.equal(stored, wanted)
                assert torch.equal(found, flat)
            assert held.read(layer.index, expert, stored) == codec.num_bytes


@pytest.mark.parametrize("precision", [BF16, INT4], ids=str)
@pytest.mark.parametrize("direct_io", [True, False])
def test_an_engine_computes_with_what_the_file_holds(
    saved_model, folder, precision, direct_io, tmp_path, tiers_in_order
):
    model = copy.deepcopy(saved_model(folder.name)[0])
    for layer in moe_layers(model):
        codec = ExpertCodec(layer.layout, layer.spec, precision, torch.float32)
        flat = torch.zeros(layer.num_experts, layer.layout.numel)
        layer.layout.pack(expert_parameters(layer), flat)
        stored = torch.zeros(codec.num_bytes, dtype=torch.uint8)
        for expert in flat:
            codec.encode(expert, stored)
            codec.decode(stored, expert)
        for name, parameter in expert_parameters(layer).items():
            parameter.data.copy_(layer.layout.views(flat)[name])
    model.save_pretrained(tmp_path)
    wanted, plain = generate(tmp_path, expert_memory="30%", predictors=())
    found, stats = generate(
        folder, expert_memory="30%", expert_precision=str(precision), direct_io=direct_io, predictors=()
    )
    assert found == wanted
    assert stats["expert_loss"] == LOSS
    assert stats["expert_precision"] == str(precision)
    # who shares a step with whom, and so how much is missed, is not the same in every run
    moved, native = (each["fetched_bytes"] / each["misses"] for each in (stats, plain))
    assert moved * (1.9 if precision == BF16 else 3) < native


def test_int8_stays_in_the_slots_and_four_times_as_many_fit(folder):
    wanted, all_of_them = generate(folder, expert_memory="100%", expert_precision="int8")
    found, few = generate(folder, expert_memory="5%", expert_precision="int8", dtype="float32")
    _, native = generate(folder, expert_memory="40%")
    _, int8 = generate(folder, expert_memory="40%", expert_precision="int8")
    assert found == wanted
    assert few["misses"] > 0
    assert int8["budget_bytes"] <= native["budget_bytes"]
    assert int8["slots"] > 2 * native["slots"]
    assert all_of_them["budget_bytes"] < 0.5 * native["num_experts"] * native["expert_bytes"]


def test_int8_computes_near_what_it_stands_for(folder, saved_model):
    model = saved_model(folder.name)[0]
    _, files = load_without_experts(folder, torch.float32)
    assert ExpertForm(files.layers, INT8, torch.float32).is_stored
    assert ExpertForm(files.layers, INT8, torch.bfloat16).is_stored == (folder.name == "olmoe")
    prompt = random_prompts([9])
    params = SamplingParams(max_tokens=1, temperature=0.0, stop_token_ids=(), logprobs=0)
    told = []
    with InferenceEngine(folder, max_batch_tokens=64, kv_tokens=1024, device="cpu", expert_precision="int8") as engine:
        engine.submit(prompt[0], params, told.append)
        until(lambda: told and told[-1].finish_reason is not None)
    (token,) = [token for delta in told for token in delta.tokens]
    (logprob,) = [each.logprob for delta in told for each in delta.logprobs or []]
    exact = model(torch.tensor(prompt)).logits[0, -1].log_softmax(0)[token].item()
    assert logprob != exact
    assert abs(logprob - exact) < 0.1


@pytest.mark.parametrize("spoiled", ["data", "header", "short", "other model", "version", "absent"])
def test_a_file_that_is_not_this_checkpoints_is_refused(own, spoiled):
    path = make(own, INT4)
    content = path.read_bytes()
    if spoiled == "absent":
        path.unlink()
    elif spoiled == "short":
        path.write_bytes(content[:-4096])
    elif spoiled == "header":
        path.write_bytes(content[:100] + b"#" + content[101:])
    elif spoiled == "version":
        path.write_bytes(b"\0" * 8 + content[8:])
    elif spoiled == "other model":
        torch.manual_seed(5)
        other = tiny_model("olmoe")
        with torch.no_grad():
            for parameter in expert_parameters(moe_layers(other)[1]).values():
                parameter.mul_(1.5)
        other.save_pretrained(own)
    if spoiled != "data":
        says = {"absent": "there is no", "short": "was cut short", "other model": "made from other experts"}.get(
            spoiled, "not experts that this version"
        )
        with pytest.raises(ValueError, match=f"{says}.*raymoe experts .* --precision int4:32"):
            InferenceEngine(own, expert_precision="int4:32", device="cpu")
        return
    wanted, _ = generate(own, expert_precision="int4:32", expert_memory="20%")
    # the second layer's eight experts, a block each
    path.write_bytes(content[: -8 * 4096] + bytes(byte ^ 1 for byte in content[-8 * 4096 :]))
    found, stats = generate(own, expert_precision="int4:32", expert_memory="20%")
    tiers = {tier["name"]: tier for tier in stats["tiers"]}
    assert found == wanted
    assert "is corrupt" in tiers["int4"]["last_error"]
    assert tiers["file"]["reads"] > 0


def test_what_is_not_finished_leaves_nothing(own):
    before = sorted(path.name for path in own.iterdir())
    _, files = load_without_experts(own, torch.float32)

    def stop():
        assert list(own.glob("experts.int8.raymoe.*.partial"))
        raise KeyboardInterrupt

    with PrecisionWriter(own, files, INT8) as writer, pytest.raises(KeyboardInterrupt):
        writer.write(stop)
    assert sorted(path.name for path in own.iterdir()) == before
    with pytest.raises(ValueError, match="native is what the checkpoint holds itself"):
        PrecisionWriter(own, files, Precision())


@LOSSY
@pytest.mark.usefixtures("tiers_in_order")
def test_hosts_hold_the_same(own, hold_in, precision):
    make(own, precision)
    wanted, _ = generate(own, expert_memory="30%", expert_precision=str(precision))
    for is_near in (True, False):
        holding = hold_in(own, precision)
        until(lambda holding=holding: holding.is_settled)
        found, stats = generate(
            own, expert_memory="30%", expert_precision=str(precision), remote=LocalHosts(holding, is_near=is_near)
        )
        reads = {tier["name"]: tier["reads"] for tier in stats["tiers"]}
        assert found == wanted
        assert reads["node" if is_near else "hosts"] > 0
    hosts = LocalHosts(hold_in(own, precision))
    until(lambda: hosts.holdings[0].is_settled)
    found, stats = generate(own, expert_memory="10%", expert_precision=str(precision), remote=hosts, on_miss="send")
    assert found == wanted
    assert stats["sent"]["failures"] == 0


def test_static_batches_too(folder):
    wanted, _ = generate(folder, expert_memory="30%", expert_precision="int4:32")
    with StaticEngine(folder, expert_memory="30%", device="cpu", expert_precision="int4:32") as engine:
        assert engine.warning is not None
        config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert engine.generate(PROMPTS, batch_size=3, config=config) == wanted


def test_an_engine_says_what_it_loses(folder, caplog):
    with caplog.at_level(logging.WARNING):
        generate(folder, expert_precision="int4:32")
    (line,) = [record.message for record in caplog.records if "not those of the checkpoint" in record.message]
    assert "in int4:32" in line
    assert "differ by 3.00% (at most 4.00% in a layer)" in line


def test_the_command_measures_and_keeps_what_it_found(tmp_path, caplog):
    shutil.copy(argparse.__file__, tmp_path / "text.py")
    texts = [document.text for document in read_documents(tmp_path / "text.py")]
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "model")
    tiny_model("olmoe", vocab_size=300).save_pretrained(tmp_path / "model")
    found = {}
    for precision in ("int8", "int4:128"):
        shown = StringIO()
        make_experts(
            tmp_path / "model",
            precision,
            str(tmp_path / "text.py"),
            sequences=6,
            sequence_length=24,
            expert_memory="50%",
            seed=1,
            console=Console(file=shown, width=200),
            command="raymoe experts",
            json=tmp_path / "x.json",
        )
        assert "native" in shown.getvalue()
        assert f"experts in {precision} are not those of the checkpoint" in shown.getvalue()
        written = json.loads((tmp_path / "x.json").read_text())
        held_out = found[precision] = written["meta"]["held_out"]
        assert held_out["tokens"] == 8 * 24
        assert 0 < abs(held_out["loss"] - held_out["native_loss"]) < 0.1
        assert [row["layer"] for row in written["rows"]] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
        _, files = load_without_experts(tmp_path / "model", torch.float32)
        parsed = Precision.parse(precision)
        tier = PrecisionTier(precision_path(tmp_path / "model", parsed), files, parsed)
        assert tier.loss["held_out"] == held_out
        assert tier.loss["relative_error"] == [row["mean_error"] for row in written["rows"]]
        assert all(0 < row["mean_error"] < min(row["max_error"], 0.3) for row in written["rows"])
    assert found["int8"]["native_loss"] == found["int4:128"]["native_loss"]
    assert not list((tmp_path / "model").glob("*.partial"))


def test_a_configuration_names_the_precisions(folder):
    assert ServeConfig(model=folder, expert_precision="int4").expert_precision == "int4:64"
    with pytest.raises(ValueError, match="'int3' is no precision of experts; use native, bf16, int8, int4"):
        ServeConfig(model=folder, expert_precision="int3")
