"""The layer under torch.compile, and what its ops promise to autograd and the compiler."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from raymoe.kernels import combine, expert_rows, grouped_mm, moe_mlp, plan, quantize_experts
from tests.kernels.oracle import SPECS, Case, make_case, relative_error, truth

# the same float32 products; a compiled graph may not count rows and sums a token's in another order
TOLERANCE = 1e-6
# bfloat16 against the oracle
BF16 = 2e-2


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("RAYMOE_KERNELS", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled():
    def layer(hidden, gate_up, down, index, weight, up_bias, down_bias, scale, spec, backend):
        biases = (up_bias, down_bias) if up_bias is not None else None
        return moe_mlp(
            hidden, gate_up, down, index, weight, spec=spec, biases=biases, hidden_scale=scale, backend=backend
        )

    graph = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)

    def run(case: Case, backend: str) -> torch.Tensor:
        extras = case.gate_up_bias, case.down_bias, case.scale
        return graph(
            case.hidden, case.gate_up, case.down, case.index, case.weight, *extras, spec=case.spec, backend=backend
        )

    return run


def gradients(out: torch.Tensor, case: Case) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out, list(case.leaves.values()), case.grad_out))


@pytest.mark.parametrize("with_extras", [False, True], ids=["plain", "extras"])
@pytest.mark.parametrize("name", ["silu", "gpt_oss"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_training(backend, name, with_extras):
    case = make_case(SPECS[name], tokens=7, experts=3, hidden=16, inner=8, with_extras=with_extras)
    out = compiled()(case, backend)
    want = case.run(backend)
    assert relative_error(out, want) <= TOLERANCE
    for got, grad in zip(gradients(out, case), gradients(want, case), strict=True):
        assert relative_error(got, grad) <= TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "triton"])
@torch.no_grad()
def test_inference(backend):
    case = make_case(tokens=7, experts=3, hidden=16, inner=8, with_extras=True)
    assert relative_error(compiled()(case, backend), case.run(backend)) <= TOLERANCE


@torch.no_grad()
def test_auto_leaves_the_cpu_backend_to_eager_calls(monkeypatch):
    # it goes by how many rows each expert has, which a graph cannot ask
    monkeypatch.setattr("raymoe.kernels.backend.has_fast_half", lambda dtype: True)
    case = make_case(tokens=7, hidden=16, inner=8, dtype=torch.bfloat16)
    assert relative_error(compiled()(case, "auto"), truth(case)[0]) <= BF16
    with pytest.raises(Exception, match=r"backend='cpu' cannot run this: torch\.compile is tracing"):
        compiled()(case, "cpu")


@torch.no_grad()
def test_quantised_weights():
    case = make_case(tokens=7, hidden=16, inner=8)
    gate_up, down, scales = quantize_experts(case.gate_up, case.down, torch.int8)
    case = replace(case, gate_up=gate_up, down=down)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(hidden, gate_up, down, index, weight, up_scale, down_scale):
        return moe_mlp(hidden, gate_up, down, index, weight, scales=(up_scale, down_scale))

    got = layer(case.hidden, gate_up, down, case.index, case.weight, *scales)
    assert relative_error(got, case.run("torch", scales=scales)) <= TOLERANCE


def test_pieces_compile():
    case = make_case(tokens=7, experts=3, hidden=16, inner=8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def by_hand(hidden, gate_up, down, index, weight):
        routing = plan(index, 3)
        rows = grouped_mm(hidden[routing.token], gate_up.mT, routing.offsets)
        gate, up = rows.chunk(2, -1)
        rows = grouped_mm(torch.nn.functional.silu(gate) * up, down.mT, routing.offsets)
        return combine(rows, routing, weight)

    out = by_hand(case.hidden, case.gate_up, case.down, case.index, case.weight)
    want = case.run("torch")
    assert relative_error(out, want) <= TOLERANCE
    for got, grad in zip(gradients(out, case), gradients(want, case), strict=True):
        assert relative_error(got, grad) <= TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_grad_into(backend):
    case = make_case(tokens=7, experts=3, hidden=16, inner=8)
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


def forward_arguments(case: Case, *, keep_pre: bool, into: tuple = (None, None)) -> tuple:
    from raymoe.kernels.fused import _text

    weights = case.gate_up, case.down, case.gate_up_bias, case.down_bias, None, None
    return (case.hidden, *weights, case.index, case.weight, case.scale, *into, _text(case.spec), keep_pre)


def backward_arguments(case: Case, pre: torch.Tensor, routing: list[torch.Tensor], into: tuple = (None, None)) -> tuple:
    from raymoe.kernels.fused import _text

    weights = case.gate_up, case.down, case.gate_up_bias, case.down_bias
    # as autograd calls it: outside of any graph
    tensors = [
        None if x is None else x.detach() for x in (case.grad_out, case.hidden, *weights, case.weight, case.scale)
    ]
    return (*tensors, pre.detach(), routing, *into, _text(case.spec), [True] * 7)


@pytest.mark.parametrize("name", ["silu", "gpt_oss", "ungated_relu2"])
@pytest.mark.parametrize("with_extras", [False, True], ids=["plain", "extras"])
def test_fake_results_are_like_real_ones(name, with_extras):
    ops = torch.ops.raymoe
    case = make_case(SPECS[name], tokens=5, experts=3, hidden=12, inner=8, with_extras=with_extras, dtype=torch.float16)
    pre, routing = None, None
    for keep_pre in (False, True):
        arguments = forward_arguments(case, keep_pre=keep_pre)
        real = ops.moe_mlp(*arguments)
        assert_like(ops.moe_mlp, arguments, real)
        _, pre, *routing = real
    for into in ((None, None), (torch.zeros_like(case.gate_up), torch.zeros_like(case.down))):
        arguments = backward_arguments(case, pre, routing, into)
        needs = [x is not None for x in (*arguments[1:4], case.weight, case.gate_up_bias, case.down_bias, case.scale)]
        arguments = (*arguments[:-1], needs)
        assert_like(ops.moe_mlp_backward, arguments, ops.moe_mlp_backward(*arguments))


def assert_like(op, arguments: tuple, real: list[torch.Tensor]) -> None:
    """A call with fake tensors gives as many, of the same shapes, types and strides."""
    with FakeTensorMode() as mode:

        def fake(x):
            if isinstance(x, list) and x and isinstance(x[0], torch.Tensor):
                return [mode.from_tensor(y) for y in x]
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

        found = op(*map(fake, arguments))
    assert [(x.shape, x.dtype, x.stride()) for x in found] == [(x.shape, x.dtype, x.stride()) for x in real]


@pytest.mark.parametrize("with_extras", [False, True], ids=["plain", "extras"])
def test_ops_keep_their_promises(with_extras):
    ops = torch.ops.raymoe
    case = make_case(tokens=3, top_k=2, experts=2, hidden=12, inner=8, with_extras=with_extras)
    # opcheck compares what it gets, and a NaN weight is no promise of an op
    with torch.no_grad():
        case.weight.nan_to_num_(0.5)
    torch.library.opcheck(ops.moe_mlp.default, forward_arguments(case, keep_pre=True))
    with torch.no_grad():
        _, pre, *routing = ops.moe_mlp(*forward_arguments(case, keep_pre=True))
    into = torch.zeros_like(case.gate_up), torch.zeros_like(case.down)
    for given in ((None, None), into):
        arguments = backward_arguments(case, pre, routing, given)
        needs = [True] * 4 + [with_extras] * 3
        torch.library.opcheck(ops.moe_mlp_backward.default, (*arguments[:-1], needs))


def test_expert_rows_is_no_part_of_a_graph():
    # it runs as experts arrive; a compiled caller breaks there rather than give something else
    case = make_case(tokens=5, hidden=16, inner=8)
    routing = plan(case.index, 5)

    @torch.compile(backend="aot_eager")
    def rows(hidden, gate_up, down, out):
        expert_rows(hidden, gate_up, down, routing, range(5), out=out, backend="torch")
        return combine(out, routing, case.weight.detach())

    out = torch.empty(case.index.numel(), 16)
    with torch.no_grad():
        assert relative_error(rows(case.hidden, case.gate_up, case.down, out), case.run("torch")) <= TOLERANCE
