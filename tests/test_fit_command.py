"""`raymoe plan --model`: what it says and writes, on described machines and on this one."""

import io
import json

import pytest
from rich.console import Console

from raymoe.commands import machines
from raymoe.commands.fit import plan_model
from raymoe.training.probe import DeviceMeasurement
from tests.tiny_models import tiny_model

CLUSTER = """
nodes: 1
devices_per_node: 4
device: test
flops: 1 TFLOP/s
memory: {memory}
intra_bandwidth: 10 GB/s
memory_bandwidth: 100 GB/s
host_bandwidth: 1 GB/s
"""


@pytest.fixture
def plan(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "tiny")

    def call(purpose: str, memory: str | None = None, model=tmp_path / "tiny", **changes) -> tuple[str, dict]:
        if memory is not None:
            (tmp_path / "cluster.yaml").write_text(CLUSTER.format(memory=memory))
        options = {
            "nodes": None, "devices_per_node": None, "tokens": 64, "sequence_length": 16, "context": 32, "batch": 4,
            "expert_memory": None, "command": "raymoe plan", "json": tmp_path / "out.json",
        }  # fmt: skip
        console = Console(file=io.StringIO(), width=400)
        cluster = None if memory is None else str(tmp_path / "cluster.yaml")
        plan_model(model, purpose, cluster, console=console, **options | changes)
        return console.file.getvalue(), json.loads((tmp_path / "out.json").read_text())

    return call


def test_serving_a_model_that_fits(plan):
    said, written = plan("serve", "1 GB")
    assert "tiny (olmoe): 37.6 k parameters, 24.6 k in 2 x 8 experts of 6.1 KB" in said
    assert "1 x 4 test" in said
    assert "fits whole on 1 device" in said
    assert [(row["arrangement"], row["batch"]) for row in written["rows"]] == [("whole", 1), ("whole", 4)]
    assert all(row["tokens_per_s"] > 0 and row["bound"] == "memory bandwidth" for row in written["rows"])
    assert written["meta"]["model"]["experts"] == 8
    assert written["meta"]["cluster"] == "cluster"
    assert not written["meta"]["is_measured"]


def test_serving_with_half_of_the_experts(plan):
    # 16 experts of 6144 bytes; dense part 52 KB and KV cache 4 x 32 x 256 bytes
    said, written = plan("serve", "150 KB")
    rows = {(row["arrangement"], row["batch"]): row for row in written["rows"]}
    assert set(rows) == {(kind, batch) for kind in ("uniform", "all miss", "spread") for batch in (1, 4)}
    share = rows["uniform", 1]["resident_share"]
    assert 0 < share < 1
    assert f"Keep {share:.0%} of the experts on the device (expert_memory=" in said
    assert "of host memory" in said
    assert "move the token" in said or "move the expert" in said
    assert rows["uniform", 1]["misses"] == pytest.approx(4 * (1 - share))
    assert rows["all miss", 1]["misses"] == 4
    # the budget it names is one that it takes
    named = said.split("expert_memory=")[1].split(")")[0]
    again, _ = plan("serve", "150 KB", expert_memory=named)
    assert "does not fit whole" in again
    with pytest.raises(ValueError, match="expert_memory is"):
        plan("serve", "150 KB", expert_memory="100%")


def test_serving_a_model_that_does_not_fit_at_all(plan):
    said, written = plan("serve", "100 KB")
    assert "does not fit" in said
    assert "requests of 32 tokens fit: lower --batch or --context" in said
    assert written["rows"][0]["arrangement"] == "does not fit"


def test_training_names_devices_policy_and_copies(plan):
    said, written = plan("train", "1 GB")
    assert "fits on 4 devices" in said
    assert "It takes at least 1 device" in said
    assert "simulated on 'modern' routing: policy " in said
    rows = {row["policy"]: row for row in written["rows"]}
    assert set(rows) == {"ep", "fssdp"}
    assert rows["ep"]["speedup_over_ep"] == 1
    assert rows["fssdp"]["step_ms"] <= rows["ep"]["step_ms"]
    assert rows["fssdp"]["extra_slots"] == 8
    assert all(
        row["simulated"] and row["tokens_per_s"] == pytest.approx(256e3 / row["step_ms"]) for row in rows.values()
    )


def test_training_that_needs_more_devices(plan):
    said, written = plan("train", "800 KB", devices_per_node=1)
    needed = written["rows"][0]["devices_needed"]
    assert needed > 1
    assert "does not fit on 1 device:" in said
    assert f"It takes at least {needed} devices like that." in said
    said, _ = plan("train", "800 KB", devices_per_node=needed)
    assert f"fits on {needed} devices" in said
    said, _ = plan("train", "300 KB")
    assert "No number of such devices is enough" in said


def test_latent_attention_is_not_promised(plan, tmp_path):
    tiny_model("deepseek_v3").config.save_pretrained(tmp_path / "latent")
    said, _ = plan("serve", "1 GB", model=tmp_path / "latent")
    assert "does not serve multi-head latent attention yet" in said


def test_this_machine_is_measured(plan, monkeypatch):
    measured = DeviceMeasurement("CPU", 10**11, 10**9, 10**10, 10**9, None)
    monkeypatch.setattr(machines, "measure_device", lambda device: measured)
    said, written = plan("serve")
    assert "1 x CPU with 1.0 GB, 10.0 GB/s, 0.1 TFLOP/s" in said
    assert "from the model's files; measured now" in said
    assert written["meta"]["is_measured"]
    assert written["meta"]["machine"]["file_bytes_s"] > 0
    said, written = plan("train", devices_per_node=2)
    assert "2 x CPU with 500.0 MB" in said
    assert "the links between devices are not known" in said
    with pytest.raises(ValueError, match="--nodes needs --cluster"):
        plan("train", nodes=2)


def test_bad_input(plan):
    with pytest.raises(ValueError, match="--for is 'sell'; choose one of train, serve"):
        plan("sell", "1 GB")
    with pytest.raises(ValueError, match="'memory' is missing"):
        plan("serve", "null")
