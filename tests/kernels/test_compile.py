"""The interpreter takes code that the compiler refuses, so the kernels are compiled too: for Hopper, on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MAX_SHARED_BYTES = 232448  # of one block on sm_90
REGISTERS = 65536


@pytest.fixture(scope="module", params=["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def compiled(request):
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_sm90.py")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(script), request.param], check=True, env=env, stdout=subprocess.PIPE, timeout=250
    )
    return request.param, json.loads(done.stdout)


def test_uses_the_right_units(compiled):
    dtype, kernels = compiled
    for name in (n for n in kernels if n.startswith("gmm")):
        tensor_core = kernels[name]["HMMA" if "decode" in name else "HGMMA"]
        # float32 must stay exact: tensor cores would make it TF32
        assert (tensor_core > 0) == (dtype == "bf16"), name
        assert kernels[name]["LDGSTS"] > 0, name


def test_fits_the_chip(compiled):
    _, kernels = compiled
    for name, found in kernels.items():
        assert found["shared_bytes"] <= MAX_SHARED_BYTES, name
        assert found["REG"] * found["threads"] <= REGISTERS, name


def test_does_not_spill(compiled):
    _, kernels = compiled
    # with clamp, scale and interleaved columns all at once the backward epilogue still spills a little
    spills = {name: found["STACK"] for name, found in kernels.items() if found["STACK"] > 0}
    assert spills.keys() <= {"gmm_gate_grad full"}
    assert all(size <= 128 for size in spills.values()), spills
