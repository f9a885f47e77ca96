"""What the kernels around the GEMMs become on Hopper; see compile_around.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REGISTERS = 65536  # of one multiprocessor


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_around.py")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(script)], check=True, env=env, stdout=subprocess.PIPE, timeout=250)
    return json.loads(done.stdout)


def test_few_launches(compiled):
    assert {name: len(launches) for name, launches in compiled.items()} == {
        "plan of 2048 slots": 1,
        "plan of 5120 slots": 3,
        "tile table": 1,
        "tile table of 1024": 1,
        "combine": 1,
        "combine in float32": 1,
        "gather rows": 1,
        "spread rows": 1,
        "group sum": 3,
    }


def test_no_spills_and_no_atomics(compiled):
    for name, launches in compiled.items():
        for found in launches:
            assert all(found[op] == 0 for op in ("STACK", "LDL", "STL", "ATOM", "ATOMG", "RED")), (name, found)
            assert found["REG"] * found["threads"] <= REGISTERS, name


@pytest.mark.parametrize("name", ["combine", "combine in float32"])
def test_combine_asks_for_all_rows_before_it_sums(compiled, name):
    (found,) = compiled[name]
    assert found["LDG.E.128"] == found["wide loads before the first sum"] == 8
    assert found["STG.E.128"] == found["STG"] == 1


def test_copies_are_16_bytes_wide(compiled):
    (gather,), (spread,) = compiled["gather rows"], compiled["spread rows"]
    assert gather["LDG.E.128"] == gather["STG.E.128"] == gather["STG"] == 8
    assert spread["LDG.E.128"] == 1
    assert spread["STG.E.128"] == spread["STG"] == 8


def test_group_sum_loads_16_bytes(compiled):
    assert compiled["group sum"][1]["LDG.E.128"] == 8
