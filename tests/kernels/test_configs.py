"""The tables of tiles: every kind finds one, in every type and bucket."""

import json

import pytest
import torch

from raymoe.kernels import configs
from raymoe.kernels.configs import KINDS, GemmConfig, gemm_config, read_table, rows_bucket, table_of, write_table

CPU = torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """As on a device, with an empty folder for tuned tables."""
    monkeypatch.setattr(configs, "is_interpreted", lambda: False)
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    for cached in (configs._entry, table_of):
        cached.cache_clear()
    yield
    for cached in (configs._entry, table_of):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "bucket"),
    [(0, 8, 1), (8, 8, 1), (9, 8, 2), (128, 8, 16), (129, 8, 32), (10**7, 8, 4096), (5, 0, 8)],
)
def test_bucket(num_rows, num_experts, bucket):
    assert rows_bucket(num_rows, num_experts) == bucket


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bucket_has_a_tile(compiled, kind, dtype):
    for bucket in (1 << n for n in range(13)):
        config = gemm_config(kind, dtype, bucket * 8, 8, CPU)
        # tall tiles for few rows would be mostly padding
        assert kind == "weight_grad" or config.rows <= max(16, bucket)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("kind", ["up", "down"])
def test_quantised_weights_are_the_left_operand(compiled, kind, dtype):
    for bucket in (1, 64, 4096):
        # converted in registers, which the tensor core takes on that side only
        assert gemm_config(kind, dtype, bucket, 1, CPU).is_swapped


def test_a_tuned_table_comes_first_and_lacks_nothing(compiled):
    tuned = GemmConfig(128, 64, 64)
    path = configs.table_path("NVIDIA H200")
    write_table(path, {kind: {"bfloat16": {64: tuned}} for kind in KINDS}, {"device": "NVIDIA H200"})
    table = table_of("NVIDIA H200")
    assert table["down"]["bfloat16"] == {64: tuned}
    assert table["down"]["float32"] == table_of("")["down"]["float32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("down"), "it must have exactly"),
        (lambda found: found["up"]["float32"]["16"].update(block_m=64), r"up has unknown fields \['block_m'\]"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, change, message):
    table = json.loads(configs.DEFAULT_TABLE.read_text())
    change(table["configs"])
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message):
        read_table(path)
