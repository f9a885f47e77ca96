"""The GEMM kernels one by one, in each of their variants, against float64 products; outputs start as NaN."""

import mmap
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import plan
from raymoe.kernels.configs import GemmConfig
from raymoe.kernels.gmm import gmm
from raymoe.kernels.gmm_k import gmm_k
from raymoe.kernels.tiles import tile_table

EXPERTS = 5
MAP_NORESERVE = 0x4000  # Linux; mmap names it only from Python 3.13 on
# multiples of 16 bytes, so that TMA takes them, and of no tile
IN, OUT = 24, 36
ROWS_CONFIG = GemmConfig(16, 32, 16, group=2)
SUMS_CONFIG = GemmConfig(32, 32, 16, group=2)
VARIANTS = {
    "pointers": {},
    "weights": {"weights": "descriptor"},
    "both": {"weights": "descriptor", "inputs": "descriptor"},
    "inputs": {"inputs": "descriptor"},
    "swapped": {"is_swapped": True, "slices": 2},
    "swapped_weights": {"is_swapped": True, "weights": "descriptor"},
    "persistent": {"is_persistent": True, "slices": 4},
    "flattened": {"is_persistent": True, "is_flattened": True, "weights": "descriptor", "inputs": "descriptor"},
    "slices": {"slices": 8, "group": 1},
}
SUM_VARIANTS = ("pointers", "inputs", "persistent", "flattened")
# float32 sums of some 100 products of size 1
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROUTINGS = {
    "mixed": [0, 1, 5, 4, 2, 0, 0, 5, 1, 4] * 4,
    "no_rows": [],
    "none_has_an_expert": [5] * 9,
    "all_on_one": [2] * 35,
    "tile_edges": [0] * 15 + [1] * 16 + [2] * 17 + [4],
}


def routed(experts):
    return plan(torch.tensor(experts, dtype=torch.int64).view(-1, 1), EXPERTS)


def rows_of(routing, is_gathered, cols, dtype=torch.float32):
    """Rows as the kernels take them; those that no expert reads hold NaN."""
    x = torch.randn(routing.order.numel(), cols).to(dtype)
    behind = routing.offsets[-1]
    x[routing.token[behind:] if is_gathered else slice(behind, None)] = float("nan")
    return x


def products(x, weight, routing, is_gathered):
    """float64 [real rows, out], one by one."""
    rows = [
        weight[e].double() @ x[routing.token[r] if is_gathered else r].double()
        for r, e in enumerate(routing.expert.tolist())
        if e < EXPERTS
    ]
    return torch.stack(rows) if rows else torch.zeros(0, weight.shape[1], dtype=torch.float64)


def check_rows(out, want, routing, **tolerance):
    real = int(routing.offsets[-1])
    torch.testing.assert_close(out[:real].double(), want, **(tolerance or CLOSE))
    assert out[real:].isnan().all()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", ["pointers", "swapped", "flattened"])
def test_gmm(name, routing):
    config = replace(ROWS_CONFIG, **VARIANTS[name])
    routing = routed(ROUTINGS[routing])
    x, weight = rows_of(routing, False, IN), torch.randn(EXPERTS, OUT, IN)
    out = torch.empty(x.shape[0], OUT)
    gmm(x, weight, tile_table(routing, config.rows), config, out)
    check_rows(out, products(x, weight, routing, False), routing)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_gmm_with_bias(name, is_transposed):
    config = replace(ROWS_CONFIG, **VARIANTS[name])
    # TMA gathers no rows
    is_gathered = config.inputs == "pointers"
    routing = routed(ROUTINGS["mixed"])
    x, bias = rows_of(routing, is_gathered, IN), torch.randn(EXPERTS, OUT)
    weight = torch.randn(EXPERTS, IN, OUT).mT if is_transposed else torch.randn(EXPERTS, OUT, IN)
    out = torch.empty(x.shape[0], OUT)
    token = routing.token if is_gathered else None
    gmm(x, weight, tile_table(routing, config.rows), config, out, token=token, bias=bias)
    want = products(x, weight, routing, is_gathered) + bias.double()[routing.expert[: routing.offsets[-1]]]
    check_rows(out, want, routing)


@settings(max_examples=20, deadline=None)
@given(
    experts=st.lists(st.integers(0, EXPERTS), max_size=40),
    name=st.sampled_from(sorted(VARIANTS)),
    in_size=st.integers(1, 36),
    out_size=st.integers(1, 70),
    is_transposed=st.booleans(),
)
def test_gmm_of_any_size(experts, name, in_size, out_size, is_transposed):
    config = replace(ROWS_CONFIG, **VARIANTS[name])
    routing = routed(experts)
    shape = (EXPERTS, in_size, out_size) if is_transposed else (EXPERTS, out_size, in_size)
    weight = torch.randn(shape)
    weight = weight.mT if is_transposed else weight
    x = rows_of(routing, False, in_size)
    out = torch.empty(x.shape[0], out_size)
    gmm(x, weight, tile_table(routing, config.rows), config, out)
    check_rows(out, products(x, weight, routing, False), routing)


@pytest.mark.parametrize("name", ["pointers", "weights"])
def test_experts_far_apart(name):
    # experts stand 2**29 elements apart, so that the last begins at 2**31, which no int32 holds; only both ends are touched
    stride = 2**29
    config = replace(ROWS_CONFIG, **VARIANTS[name])
    routing = routed([0, 4, 4] * 3)
    with mmap.mmap(
        -1, 4 * (4 * stride + 24 * 16), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    ) as memory:
        weight = torch.frombuffer(memory, dtype=torch.float32).as_strided((EXPERTS, 24, 16), (stride, 16, 1))
        for e in (0, 4):
            weight[e] = torch.randn(24, 16)
        x = rows_of(routing, False, 16)
        out = torch.empty(x.shape[0], 24)
        gmm(x, weight, tile_table(routing, config.rows), config, out)
        check_rows(out, products(x, weight, routing, False), routing)
        del weight


QUANTISED = {"float8": torch.float8_e4m3fn, "int8": torch.int8}


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("name", ["pointers", "swapped", "swapped_weights", "flattened"])
def test_quantised_weights(name, dtype):
    config = replace(ROWS_CONFIG, **VARIANTS[name])
    routing = routed(ROUTINGS["mixed"])
    # whole numbers up to 15 are exact in both types, and in the sums
    weight = torch.randint(-15, 16, (EXPERTS, 48, 32)).to(QUANTISED[dtype])
    scale, bias = torch.rand(EXPERTS, 48) + 0.5, torch.randn(EXPERTS, 48)
    x = rows_of(routing, False, 32)
    out = torch.empty(x.shape[0], 48)
    gmm(x, weight, tile_table(routing, config.rows), config, out, bias=bias, weight_scale=scale)
    expert = routing.expert[: routing.offsets[-1]]
    want = products(x, weight, routing, False) * scale.double()[expert] + bias.double()[expert]
    check_rows(out, want, routing, rtol=1e-5, atol=1e-4)


def sums(a, b, routing, gathered):
    want = torch.zeros(EXPERTS, a.shape[1], b.shape[1], dtype=torch.float64)
    for e in range(EXPERTS):
        rows = (routing.expert == e).nonzero().flatten()
        token = routing.token[rows]
        want[e] = a[token if gathered == "a" else rows].double().T @ b[token if gathered == "b" else rows].double()
    return want


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("name", "gathered"), [("pointers", "a"), ("pointers", "b"), ("inputs", "none"), ("flattened", "b")]
)
def test_gmm_k(name, gathered, routing):
    config = replace(SUMS_CONFIG, **VARIANTS[name])
    routing = routed(ROUTINGS[routing])
    a, b = rows_of(routing, gathered == "a", OUT), rows_of(routing, gathered == "b", IN)
    out = torch.empty(EXPERTS, OUT, IN)
    token = {} if gathered == "none" else {f"token_{gathered}": routing.token}
    gmm_k(a, b, routing.offsets, config, out, **token)
    # NaN rows behind the last expert's have not come in, and experts without rows have zeros
    torch.testing.assert_close(out.double(), sums(a, b, routing, gathered), **CLOSE)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("name", SUM_VARIANTS)
def test_gmm_k_adds(name, is_transposed):
    config = replace(SUMS_CONFIG, **VARIANTS[name])
    routing = routed(ROUTINGS["mixed"])
    a, b = rows_of(routing, False, OUT), rows_of(routing, False, IN)
    before = torch.randn(EXPERTS, IN, OUT).mT if is_transposed else torch.randn(EXPERTS, OUT, IN)
    before[3] = float("nan")
    out = before.clone(memory_format=torch.preserve_format)
    heavy_first = routing.offsets.diff().argsort(descending=True)
    gmm_k(a, b, routing.offsets, config, out, order=heavy_first, accumulate=True)
    busy = [0, 1, 2, 4]
    want = before.double() + sums(a, b, routing, "none")
    torch.testing.assert_close(out[busy].double(), want[busy], **CLOSE)
    # expert 3 has no rows: what stands there is not even read
    assert out[3].isnan().all()


@settings(max_examples=10, deadline=None)
@given(
    experts=st.lists(st.integers(0, EXPERTS), max_size=40),
    name=st.sampled_from(SUM_VARIANTS),
    a_cols=st.integers(1, 40),
    b_cols=st.integers(1, 40),
)
def test_gmm_k_of_any_size(experts, name, a_cols, b_cols):
    config = replace(SUMS_CONFIG, **VARIANTS[name])
    routing = routed(experts)
    a, b = rows_of(routing, False, a_cols), rows_of(routing, True, b_cols)
    out = torch.empty(EXPERTS, a_cols, b_cols)
    gmm_k(a, b, routing.offsets, config, out, token_b=routing.token)
    torch.testing.assert_close(out.double(), sums(a, b, routing, "b"), **CLOSE)
