"""The layer under torch.compile, and what its ops promise to autograd and the compiler."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from raymoe.kernels import ExpertSpec, combine, explain, grouped_mm, moe_mlp, plan, quantize_experts
from raymoe.kernels.fused import _fields
from tests.kernels.oracle import SPECS, Case, make_case, relative_error, truth

# the same float32 products; a compiled graph may not count rows and sums a token's in another order
TOLERANCE = 1e-6
# bfloat16 against the oracle
BF16 = 2e-2
SIZES = {"tokens": 7, "top_k": 2, "experts": 3, "hidden": 16, "inner": 8}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("RAYMOE_KERNELS", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(
    case: Case, backend: str, compiler="aot_eager", dynamic: bool | None = None
) -> Callable[[Case], torch.Tensor]:
    """The layer as one graph; like a model's, it holds the spec, and the case's tensors are its inputs."""
    spec = case.spec

    def layer(hidden, gate_up, down, index, weight, up_bias, down_bias, scale):
        biases = (up_bias, down_bias) if up_bias is not None else None
        return moe_mlp(
            hidden, gate_up, down, index, weight, spec=spec, biases=biases, hidden_scale=scale, backend=backend
        )

    graph = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=dynamic)

    def run(given: Case) -> torch.Tensor:
        extras = given.gate_up_bias, given.down_bias, given.scale
        return graph(given.hidden, given.gate_up, given.down, given.index, given.weight, *extras)

    return run


def gradients(out: torch.Tensor, case: Case) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out, list(case.leaves.values()), case.grad_out))


def assert_same(out: torch.Tensor, case: Case, backend: str) -> None:
    """Output and gradients as those of an eager call."""
    want = case.run(backend)
    assert relative_error(out, want) <= TOLERANCE
    for got, grad in zip(gradients(out, case), gradients(want, case), strict=True):
        assert relative_error(got, grad) <= TOLERANCE


@pytest.mark.parametrize(("name", "with_extras"), [("silu", False), ("gpt_oss", True)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_training(backend, name, with_extras):
    case = make_case(SPECS[name], **SIZES, with_extras=with_extras)
    assert_same(compiled(case, backend)(case), case, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@torch.no_grad()
def test_inference(backend):
    case = make_case(**SIZES, with_extras=True)
    assert relative_error(compiled(case, backend)(case), case.run(backend)) <= TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_number_of_tokens_does_not_recompile(backend):
    counter = CompileCounterWithBackend("aot_eager")
    run, frames = None, 0
    for tokens in (7, 5, 12):
        case = make_case(**SIZES | {"tokens": tokens})
        run = run or compiled(case, backend, counter, dynamic=True)
        assert_same(run(case), case, backend)
        frames = frames or counter.frame_count
    assert counter.frame_count == frames > 0


def test_layers_of_different_specs():
    # to the compiler numbers that differ between two frames of the same code are symbols
    def layer(module, case):
        return moe_mlp(case[0], *module.weights, *case[1:], spec=module.spec, backend="triton")

    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for spec in (ExpertSpec(gate_limit=0.3), ExpertSpec(gate_limit=0.5, gate_alpha=1.702, up_offset=1.0)):
        case = make_case(spec, **SIZES)
        module = SimpleNamespace(weights=(case.gate_up, case.down), spec=spec)
        assert_same(graph(module, (case.hidden, case.index, case.weight)), case, "triton")


@torch.no_grad()
def test_auto_leaves_the_cpu_backend_to_eager_calls(monkeypatch):
    # it goes by how many rows each expert has, which a graph cannot ask
    monkeypatch.setattr("raymoe.kernels.backend.has_fast_half", lambda dtype: True)
    case = make_case(**SIZES, dtype=torch.bfloat16)
    assert explain(case.hidden, case.gate_up).backend == "cpu"
    assert relative_error(compiled(case, "auto")(case), truth(case)[0]) <= BF16
    with pytest.raises(Unsupported, match=r"backend='cpu' cannot run this: torch\.compile is tracing"):
        compiled(case, "cpu")(case)


@torch.no_grad()
def test_quantised_weights():
    case = make_case(**SIZES)
    gate_up, down, scales = quantize_experts(case.gate_up, case.down, torch.int8)
    case = replace(case, gate_up=gate_up, down=down)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(hidden, gate_up, down, index, weight, up_scale, down_scale):
        return moe_mlp(hidden, gate_up, down, index, weight, scales=(up_scale, down_scale))

    got = layer(case.hidden, gate_up, down, case.index, case.weight, *scales)
    assert relative_error(got, case.run("torch", scales=scales)) <= TOLERANCE


def test_pieces_compile():
    case = make_case(**SIZES)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def by_hand(hidden, gate_up, down, index, weight):
        routing = plan(index, 3)
        rows = grouped_mm(hidden[routing.token], gate_up.mT, routing.offsets)
        gate, up = rows.chunk(2, -1)
        rows = grouped_mm(torch.nn.functional.silu(gate) * up, down.mT, routing.offsets)
        return combine(rows, routing, weight)

    out = by_hand(case.hidden, case.gate_up, case.down, case.index, case.weight)
    assert_same(out, case, "torch")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_grad_into(backend):
    case = make_case(**SIZES)
    want = gradients(case.run(backend), case)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(hidden, gate_up, down, index, weight, into):
        return moe_mlp(hidden, gate_up, down, index, weight, grad_into=into, backend=backend)

    into = torch.ones_like(case.gate_up), torch.ones_like(case.down)
    for _ in range(2):
        layer(case.hidden, case.gate_up, case.down, case.index, case.weight, into).backward(case.grad_out)
    assert case.gate_up.grad is None
    assert case.down.grad is None
    for got, grad in zip(into, want[1:3], strict=True):
        assert relative_error(got - 1, 2 * grad) <= TOLERANCE
    for leaf, grad in ((case.hidden, want[0]), (case.weight, want[3])):
        assert relative_error(leaf.grad, 2 * grad) <= TOLERANCE


def forward_arguments(case: Case, *, keep_pre: bool) -> tuple:
    weights = case.gate_up, case.down, case.gate_up_bias, case.down_bias, None, None
    return (case.hidden, *weights, case.index, case.weight, case.scale, None, None, *_fields(case.spec), keep_pre)


def backward_arguments(case: Case, found: list[torch.Tensor], into: tuple) -> tuple:
    """`found` is what forward gave."""
    weights = case.gate_up, case.down, case.gate_up_bias, case.down_bias
    tensors = case.grad_out, case.hidden, *weights, case.weight, case.scale
    _, pre, *routing = found
    # as autograd calls it: outside of any graph
    detached = [None if x is None else x.detach() for x in (*tensors, pre)]
    needs = [x is not None for x in (*tensors[1:4], case.weight, case.gate_up_bias, case.down_bias, case.scale)]
    return (*detached, routing, *into, *_fields(case.spec), needs)


def into_or_not(case: Case) -> list[tuple]:
    return [(None, None), (torch.zeros_like(case.gate_up), torch.zeros_like(case.down))]


@pytest.mark.parametrize(("name", "with_extras"), [("silu", False), ("gpt_oss", True), ("ungated_relu2", True)])
def test_fake_results_are_like_real_ones(name, with_extras):
    ops = torch.ops.raymoe
    case = make_case(SPECS[name], **SIZES, with_extras=with_extras, dtype=torch.float16)
    assert_like(ops.moe_mlp, forward_arguments(case, keep_pre=False))
    found = assert_like(ops.moe_mlp, forward_arguments(case, keep_pre=True))
    for into in into_or_not(case):
        assert_like(ops.moe_mlp_backward, backward_arguments(case, found, into))


def assert_like(op, arguments: tuple) -> list[torch.Tensor]:
    """A call with fake tensors gives as many, of the same shapes, types and strides."""
    real = op(*arguments)
    with FakeTensorMode() as mode:
        found = op(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    assert [(x.shape, x.dtype, x.stride()) for x in found] == [(x.shape, x.dtype, x.stride()) for x in real]
    return real


def test_ops_keep_their_promises():
    ops = torch.ops.raymoe
    # every choice has an expert: what stands on the other rows is nobody's promise
    index = torch.tensor([[0, 1], [1, 1], [0, 0]])
    case = make_case(experts=2, hidden=12, inner=8, index=index, with_extras=True)
    arguments = forward_arguments(case, keep_pre=True)
    torch.library.opcheck(ops.moe_mlp.default, arguments)
    found = ops.moe_mlp(*arguments)
    for into in into_or_not(case):
        torch.library.opcheck(ops.moe_mlp_backward.default, backward_arguments(case, found, into))


def test_backward_gets_no_zeros_for_what_forward_keeps():
    # the pre-activations are an output to autograd: their gradient, zeros, would be as large as they are
    case = make_case(**SIZES)
    filled = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "zero" in str(func):
                filled.append(tuple(out.shape))
            return out

    out = case.run("triton")
    with Watch():
        gradients(out, case)
    assert (case.index.numel(), case.gate_up.shape[1]) not in filled
