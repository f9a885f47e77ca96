import os
import subprocess
import sys

import pytest
import torch

from raymoe.kernels import ExpertSpec, calls
from raymoe.kernels.backend import choose_backend
from tests.kernels.oracle import make_case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def choose(backend="auto", spec=None, dtype=torch.float32, device=CPU):
    return choose_backend(backend, spec or ExpertSpec(), dtype, device)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("RAYMOE_KERNELS", raising=False)


def test_auto_goes_by_device():
    assert (choose(device=CPU), choose(device=CUDA)) == ("torch", "triton")


@pytest.mark.parametrize(
    "refused", [{"dtype": torch.float64}, {"spec": ExpertSpec(post_norm=torch.relu)}], ids=["dtype", "function"]
)
def test_auto_avoids_triton_where_it_cannot(refused):
    assert choose(device=CUDA, **refused) == "torch"


@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
def test_environment_overrides_auto_only(monkeypatch, name):
    monkeypatch.setenv("RAYMOE_KERNELS", name)
    assert choose() == name
    assert choose("reference") == "reference"


def test_environment_reaches_the_op(monkeypatch):
    monkeypatch.setenv("RAYMOE_KERNELS", "triton")
    before = calls().get("triton", 0)
    make_case().run("auto")
    assert calls()["triton"] == before + 1


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'; use one of auto"):
        choose("cuda")
    monkeypatch.setenv("RAYMOE_KERNELS", "fast")
    with pytest.raises(ValueError, match="RAYMOE_KERNELS is 'fast'"):
        choose()


def test_triton_is_not_silently_replaced(monkeypatch):
    with pytest.raises(ValueError, match=r"backend='triton' cannot run this: spec\.gate_fn"):
        choose("triton", ExpertSpec(gate_fn=torch.relu))
    monkeypatch.setenv("RAYMOE_KERNELS", "triton")
    with pytest.raises(ValueError, match="RAYMOE_KERNELS=triton cannot run this: dtype"):
        choose(dtype=torch.float64)


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        choose("triton")


SCRIPT = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = sys.modules["ray"] = None  # importing them is an error
import torch
from raymoe.kernels import calls, moe_mlp
def run(backend):
    weights = torch.ones(2, 6, 4), torch.ones(2, 4, 3)
    return moe_mlp(torch.ones(5, 4), *weights, torch.zeros(5, 1).long(), torch.ones(5, 1), backend=backend)
run("auto")
assert calls() == {"torch": 1}
try:
    run("triton")
except ValueError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("no error without triton")
"""


def test_works_without_triton():
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=env, timeout=120)
