from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import cpu_products, expert_rows, plan
from tests.kernels.oracle import SPECS, make_case, relative_error

EXPERTS = 5
# both compute the same rows, but the torch backends multiply them in other batches
TOLERANCE = 2e-6
# the torch backend multiplies all rows at once only where every operand begins at a multiple of 16 bytes
ODD, ALIGNED = {}, {"hidden": 40, "inner": 24}
SIZES = pytest.mark.parametrize("sizes", [ODD, ALIGNED], ids=["odd", "aligned"])


@SIZES
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_equals_moe_mlp(backend, name, sizes):
    case = make_case(SPECS[name], with_extras=True, **sizes)
    assert relative_error(case.rows([[3, 1], [0], [4, 2]], backend), case.run("reference")) <= TOLERANCE


@pytest.mark.parametrize("tokens", [1, 5, 31])
@pytest.mark.parametrize("name", SPECS)
def test_matrices_that_no_cache_holds_give_the_same_rows(monkeypatch, name, tokens):
    case = make_case(SPECS[name], tokens=tokens, with_extras=True, hidden=ALIGNED["hidden"], inner=ALIGNED["inner"])
    want = case.run("reference")
    for cached_bytes in (cpu_products.CACHED_BYTES, 0):
        monkeypatch.setattr(cpu_products, "CACHED_BYTES", cached_bytes)
        assert relative_error(case.rows([[3, 1], [0], [4, 2]], "torch"), want) <= TOLERANCE


@pytest.mark.parametrize(("backend", "examples"), [("torch", 20), ("triton", 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@SIZES
def test_split_and_order_do_not_matter(backend, examples, dtype, sizes):
    case = make_case(tokens=31, dtype=dtype, with_extras=True, **sizes)
    whole = case.rows([list(range(EXPERTS))], backend)

    @settings(max_examples=examples, deadline=None)
    @given(order=st.permutations(range(EXPERTS)), cuts=st.sets(st.integers(1, EXPERTS - 1)))
    def check(order, cuts):
        bounds = [0, *sorted(cuts), EXPERTS]
        parts = [order[a:b] for a, b in pairwise(bounds)]
        assert torch.equal(case.rows(parts, backend), whole)

    check()


@SIZES
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_reads_weights_from_slots(backend, sizes):
    # seven slots in one flat buffer, experts in an order of their own, the unused slots hold NaN
    case = make_case(with_extras=True, **sizes)
    want = case.rows([list(range(EXPERTS))], backend)
    slots = {0: 6, 1: 2, 2: 0, 3: 5, 4: 3}
    assert torch.equal(case.pooled(slots, 7).rows([[4, 0], [1, 3, 2]], backend, slots), want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_leaves_other_rows_alone(backend):
    case = make_case()
    routing = plan(case.index, EXPERTS)
    out = torch.full((39, 37), 7.0)
    expert_rows(case.hidden, case.gate_up, case.down, routing, [1, 4], out=out, backend=backend)
    is_theirs = (routing.expert == 1) | (routing.expert == 4)
    assert (out[~is_theirs] == 7).all()
    assert not (out[is_theirs] == 7).any()
    assert not out.requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_do(backend, tokens):
    case = make_case(index=torch.full((tokens, 2), EXPERTS))
    assert not case.rows([[], [0, 1]], backend).any()


WRONG = {
    "out_shape": ({"out": torch.zeros(38, 37)}, r"out must be contiguous torch.float32 \(39, 37\)"),
    "out_dtype": ({"out": torch.zeros(39, 37).double()}, "got torch.float64"),
    "out_strides": ({"out": torch.zeros(37, 39).T}, "with strides"),
    "slots": ({"slots": [0]}, "slots has 1 entries for 2 experts"),
    "slot_range": ({"slots": [0, 5]}, r"slots holds \[5\]"),
    "expert_range": ({"experts": [-1, 5]}, r"experts holds \[-1, 5\]"),
    "plan": ({"plan": plan(torch.zeros(4, 3).long(), 5)}, "plan is for 4 tokens, hidden has 13"),
    "hidden": ({"hidden": torch.zeros(13, 36)}, "gate_up is"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name):
    changes, message = WRONG[name]
    case = make_case()
    arguments = {
        "hidden": case.hidden,
        "gate_up": case.gate_up,
        "down": case.down,
        "plan": plan(case.index, EXPERTS),
        "experts": [1, 2],
        "out": torch.zeros(39, 37),
    }
    with pytest.raises(ValueError, match=message):
        expert_rows(**{**arguments, **changes})
