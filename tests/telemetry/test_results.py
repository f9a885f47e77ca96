import json
import os
import socket
from datetime import datetime

import numpy as np
import pytest

from raymoe.telemetry import run_meta, write_json


def test_shape_of_the_file(tmp_path):
    path = tmp_path / "sub" / "out.json"
    write_json(path, "raymoe bench kernels", [{"shape": "tiny", "us": 1.5}], meta={"seed": 3})
    result = json.loads(path.read_text())
    assert list(result) == ["meta", "rows"]
    assert result["rows"] == [{"shape": "tiny", "us": 1.5}]
    assert result["meta"]["command"] == "raymoe bench kernels"
    assert result["meta"]["seed"] == 3
    assert set(result["meta"]["versions"]) == {"python", "raymoe", "torch", "ray", "transformers", "triton"}
    assert set(result["meta"]["host"]) == {"system", "cpu", "cores", "ram_gib"}
    assert datetime.fromisoformat(result["meta"]["date"]).tzinfo is not None


def test_the_machine_is_described_but_not_named():
    said = json.dumps(run_meta("raymoe demo"))
    assert socket.gethostname() not in said
    assert os.getcwd() not in said


def test_what_is_not_a_number_becomes_null(tmp_path):
    rows = [{"a": float("nan"), "b": np.float32("inf"), "c": [1.0, float("-inf")], "d": np.array([np.nan])}]
    write_json(tmp_path / "out.json", "x", rows)
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == [
        {"a": None, "b": None, "c": [1.0, None], "d": [None]}
    ]


def test_numpy_values_are_taken(tmp_path):
    write_json(tmp_path / "out.json", "x", [{"n": np.int64(3), "x": np.float64(0.5), "is_on": np.bool_(True)}])
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == [{"n": 3, "x": 0.5, "is_on": True}]


def test_a_value_that_json_cannot_say_is_placed(tmp_path):
    with pytest.raises(ValueError, match=r"result.rows\[1\].x is a set"):
        write_json(tmp_path / "out.json", "x", [{"x": 1}, {"x": {2}}])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, "first", [])
    with pytest.raises(ValueError, match="is a object"):
        write_json(path, "second", [{"x": object()}])
    assert json.loads(path.read_text())["meta"]["command"] == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
