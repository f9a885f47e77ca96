import os
import subprocess
import sys

import pytest
import torch

from raymoe.kernels import Choice, ExpertSpec, calls, expert_rows, explain, plan
from raymoe.kernels import backend as backend_module
from raymoe.kernels.backend import choose_backend, sums_in_triton
from tests.kernels.oracle import make_case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Rows:
    """What `choose_backend` looks at in a tensor: no CUDA is needed to ask about one."""

    def __init__(self, dtype=torch.float32, device=CPU):
        self.dtype, self.device = dtype, device


def choose(backend="auto", spec=None, dtype=torch.float32, device=CPU, weight=None, needs_grad=False):
    weight = Rows(weight, device) if weight is not None else None
    return choose_backend(backend, spec or ExpertSpec(), Rows(dtype, device), weight, needs_grad=needs_grad)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("RAYMOE_KERNELS", raising=False)


@pytest.fixture(params=[True, False], ids=["matrix_unit", "no_matrix_unit"])
def is_fast(monkeypatch, request):
    """Whether the CPU multiplies bfloat16 in hardware, whatever this one does; never float32."""
    monkeypatch.setattr(backend_module, "has_fast_half", lambda dtype: request.param and dtype == torch.bfloat16)
    return request.param


def test_hardware_is_asked_about():
    assert not backend_module.has_fast_half(torch.float32)
    answers = [backend_module.has_exact_int8(), *map(backend_module.has_fast_half, (torch.float16, torch.bfloat16))]
    assert all(isinstance(answer, bool) for answer in answers)


def test_auto_goes_by_device(is_fast):
    assert (choose(device=CPU).backend, choose(device=CUDA).backend) == ("torch", "triton")


@pytest.mark.parametrize(
    "refused", [{"dtype": torch.float64}, {"spec": ExpertSpec(post_norm=torch.relu)}], ids=["dtype", "function"]
)
def test_auto_avoids_triton_where_it_cannot(refused):
    assert choose(device=CUDA, **refused).backend == "torch"


def test_auto_takes_cpu_for_inference_where_the_cpu_is_fast(monkeypatch, is_fast):
    assert choose(dtype=torch.bfloat16).backend == ("cpu" if is_fast else "torch")
    for is_exact in (True, False):
        monkeypatch.setattr(backend_module, "has_exact_int8", lambda is_exact=is_exact: is_exact)
        assert choose(weight=torch.int8).backend == ("cpu" if is_exact else "torch")


CPU_REFUSES = {
    "gradient": ({"needs_grad": True}, "a gradient is wanted"),
    "transposed": ({"spec": ExpertSpec(is_transposed=True)}, r"spec\.is_transposed has \[E, in, out\]"),
    "float8": ({"weight": torch.float8_e4m3fn}, "float8 have no CPU products; quantise to int8"),
    "int8": ({"weight": torch.int8}, "no exact products of int8"),
    "float32": ({"dtype": torch.float32}, "no matrix unit for torch.float32"),
    "device": ({"device": CUDA}, "the tensors are on cuda"),
}


@pytest.mark.parametrize("name", CPU_REFUSES)
def test_cpu_says_what_it_cannot(monkeypatch, name):
    monkeypatch.setattr(backend_module, "has_fast_half", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(backend_module, "has_exact_int8", lambda: False)
    changes, message = CPU_REFUSES[name]
    given = {"dtype": torch.bfloat16} | changes
    with pytest.raises(ValueError, match=f"backend='cpu' cannot run this: .*{message}.*Use 'torch' or 'auto'"):
        choose("cpu", **given)
    if name != "device":
        choice = choose(**given)
        assert choice.backend == "torch"
        with pytest.raises(ValueError, match=message):
            raise ValueError(choice.why)


def test_cpu_takes_every_other_spec(monkeypatch):
    monkeypatch.setattr(backend_module, "has_fast_half", lambda dtype: True)
    spec = ExpertSpec(is_interleaved=True, gate_limit=7.0, post_norm=torch.relu, gate_fn=torch.relu)
    assert choose("cpu", spec).backend == choose("auto", spec).backend == "cpu"


@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
def test_environment_overrides_auto_only(monkeypatch, name):
    monkeypatch.setenv("RAYMOE_KERNELS", name)
    assert choose() == Choice(name, f"RAYMOE_KERNELS={name}")
    assert choose("reference") == Choice("reference", "backend='reference'")


def test_environment_auto_is_auto(monkeypatch):
    monkeypatch.setenv("RAYMOE_KERNELS", "auto")
    assert (choose(device=CPU).backend, choose(device=CUDA).backend) == ("torch", "triton")


def test_environment_reaches_the_op(monkeypatch):
    monkeypatch.setenv("RAYMOE_KERNELS", "triton")
    before = calls().get("triton", 0)
    make_case(tokens=2).run("auto")
    assert calls()["triton"] == before + 1


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'; use one of auto, triton, cpu, torch, reference"):
        choose("cuda")
    monkeypatch.setenv("RAYMOE_KERNELS", "fast")
    with pytest.raises(ValueError, match="RAYMOE_KERNELS is 'fast'; use one of auto"):
        choose()


def test_triton_is_not_silently_replaced(monkeypatch):
    with pytest.raises(ValueError, match=r"backend='triton' cannot run this: spec\.gate_fn"):
        choose("triton", ExpertSpec(gate_fn=torch.relu))
    monkeypatch.setenv("RAYMOE_KERNELS", "triton")
    with pytest.raises(ValueError, match="RAYMOE_KERNELS=triton cannot run this: dtype"):
        choose(dtype=torch.float64)


def test_cpu_is_not_silently_replaced(monkeypatch):
    monkeypatch.setenv("RAYMOE_KERNELS", "cpu")
    with pytest.raises(ValueError, match="RAYMOE_KERNELS=cpu cannot run this: a gradient"):
        choose(needs_grad=True)


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        choose("triton")


def test_explain_says_what_runs(monkeypatch):
    monkeypatch.setattr(backend_module, "has_fast_half", lambda dtype: dtype == torch.bfloat16)
    case = make_case(dtype=torch.bfloat16)
    assert explain(case.hidden, case.gate_up) == Choice("cpu", "on a CPU, no gradient wanted")
    assert explain(case.hidden, case.gate_up, needs_grad=True) == Choice(
        "torch", "cpu cannot run this: a gradient is wanted"
    )
    assert explain(case.hidden, case.gate_up, backend="reference").backend == "reference"
    with pytest.raises(ValueError, match="a gradient is wanted"):
        explain(case.hidden, case.gate_up, needs_grad=True, backend="cpu")

    def ran(run):
        before = calls()
        run()
        return {name for name, n in calls().items() if n > before.get(name, 0)}

    assert ran(lambda: case.run("auto")) == {"torch"}
    with torch.no_grad():
        assert ran(lambda: case.run("auto")) == {"cpu"}
    # serving wants no gradient, whatever its weights say
    routing = plan(case.index, 5)
    out = torch.empty(case.index.numel(), 37, dtype=torch.bfloat16)
    assert ran(lambda: expert_rows(case.hidden, case.gate_up, case.down, routing, [0, 3], out=out)) == {"cpu"}


@pytest.mark.parametrize(
    ("requested", "on_cpu", "on_cuda"),
    [("auto", False, True), ("triton", True, True), ("cpu", False, False), ("torch", False, False)],
)
def test_where_combine_runs(monkeypatch, requested, on_cpu, on_cuda):
    monkeypatch.setenv("RAYMOE_KERNELS", requested)
    assert (sums_in_triton(CPU), sums_in_triton(CUDA)) == (on_cpu, on_cuda)


SCRIPT = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = sys.modules["ray"] = None  # importing them is an error
import torch
from raymoe.kernels import calls, combine, expert_rows, moe_mlp, plan
def run(backend):
    weights = torch.ones(2, 6, 4), torch.ones(2, 4, 3)
    return moe_mlp(torch.ones(5, 4), *weights, torch.zeros(5, 1).long(), torch.ones(5, 1), backend=backend)
run("auto")
assert calls() == {"torch": 1}
routing = plan(torch.zeros(5, 1).long(), 2)
rows = torch.empty(5, 4)
expert_rows(torch.ones(5, 4), torch.ones(2, 6, 4), torch.ones(2, 4, 3), routing, [0], out=rows)
assert torch.equal(combine(rows, routing, torch.ones(5, 1)), run("torch"))
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
