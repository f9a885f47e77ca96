from dataclasses import replace

import pytest
import torch

from raymoe.kernels import ExpertSpec, expert_rows, explain, plan, quantize_experts
from raymoe.kernels.backend import has_exact_int8
from tests.kernels.oracle import SPECS, Case, make_case, relative_error, routed, truth

INT8, FP8 = torch.int8, torch.float8_e4m3fn
# refused where products of int8 saturate (x86 without VNNI), see test_backend.py
EXACT = pytest.mark.skipif(not has_exact_int8(), reason="this CPU has no exact products of int8")
TYPES = pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)
# float32 on both sides of the same weights
EXACT_WEIGHTS = 3e-6
# rows in bfloat16, and Triton's interpreter truncates to it
BF16, INTERPRETED_BF16 = 2e-2, 4e-2
# rows are rounded to int8 twice: a step of max/127 is noise of max/127/sqrt(12), and the largest of a row is 3 to 5 times
# its mean square, so 0.7 to 1.1 % each
INT8_ROWS = 2e-2
COUNTS = [5, 0, 1, 18, 3, 2]


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("RAYMOE_KERNELS", raising=False)


def weights(spec: ExpertSpec, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of very different sizes, one of them zeros."""
    case = make_case(spec, experts=4, dtype=dtype)
    for weight in (case.gate_up, case.down):
        by_channel = weight.detach().transpose(1, 2) if spec.is_transposed else weight.detach()
        by_channel.mul_(torch.logspace(-4, 3, by_channel.shape[1], dtype=dtype)[:, None])
        by_channel[1, 7] = 0
    return case.gate_up.detach(), case.down.detach()


@TYPES
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["silu", "gpt_oss", "ungated_relu2"])
def test_round_trip(name, source, dtype):
    spec = SPECS[name]
    given = weights(spec, source)
    *quantized, scales = quantize_experts(*given, dtype, spec)
    for weight, q, scale in zip(given, quantized, scales, strict=True):
        assert q.dtype == dtype
        assert q.shape == weight.shape
        assert scale.dtype == torch.float32
        by_channel, q = (x.double().transpose(1, 2) if spec.is_transposed else x.double() for x in (weight, q))
        assert scale.shape == by_channel.shape[:2]
        scale = scale.double()[..., None]
        error = (q * scale - by_channel).abs()
        if dtype == INT8:
            # to the nearest of 255 steps
            bound = scale / 2
            assert ((q.abs().amax(2) == 127) | ~by_channel.any(2)).all()
        else:
            # three bits behind the point, or below 2^-6 the spacing of 2^-9
            bound = torch.maximum(by_channel.abs() * 2**-4, scale * 2**-10)
            assert ((q.abs().amax(2) == 448) | ~by_channel.any(2)).all()
        # the scale itself is rounded to float32
        assert (error <= bound * (1 + 1e-5)).all()
        assert not q[1, 7].any()
        assert not scale[1, 7].any()


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"quantised to torch.int8 or torch.float8_e4m3fn"):
        quantize_experts(*weights(SPECS["silu"]), torch.uint8)


def quantized_case(spec: ExpertSpec, dtype: torch.dtype, rows: torch.dtype = torch.float32, **sizes) -> tuple:
    """A case with weights in 8 bits, its scales, and the float64 truth of those very weights."""
    case = make_case(
        spec, dtype=rows, with_extras=True, experts=len(COUNTS), index=routed(COUNTS, top_k=3, without=4), **sizes
    )
    gate_up, down, scales = quantize_experts(case.gate_up, case.down, dtype, spec)
    inner = 1 if spec.is_transposed else 2
    exact = [q.double() * scale.double().unsqueeze(inner) for q, scale in zip((gate_up, down), scales, strict=True)]
    want, _ = truth(replace(case, gate_up=exact[0], down=exact[1]))
    return replace(case, gate_up=gate_up, down=down), scales, want.detach()


@torch.no_grad()
def run(case: Case, scales: tuple, backend: str) -> torch.Tensor:
    out = case.run(backend, scales=scales)
    assert out.dtype == case.hidden.dtype
    return out


@TYPES
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", SPECS)
def test_dequantising_backends(name, backend, dtype):
    case, scales, want = quantized_case(SPECS[name], dtype)
    assert relative_error(run(case, scales, backend), want) <= EXACT_WEIGHTS
    rows = case.rows([[4, 1, 0], [5, 3], [2]], backend, scales=scales)
    assert relative_error(rows, want) <= EXACT_WEIGHTS


@pytest.mark.parametrize(("name", "dtype"), [("silu", FP8), ("gpt_oss", INT8), ("ungated_relu2", FP8)], ids=str)
def test_triton(name, dtype):
    case, scales, want = quantized_case(SPECS[name], dtype, torch.bfloat16)
    assert relative_error(run(case, scales, "triton"), want) <= INTERPRETED_BF16
    assert relative_error(case.rows([[4, 1, 0], [5, 3, 2]], "triton", scales=scales), want) <= INTERPRETED_BF16


@EXACT
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in SPECS if not SPECS[name].is_transposed])
def test_int8_on_a_cpu(name, rows):
    case, scales, want = quantized_case(SPECS[name], INT8, rows)
    assert relative_error(run(case, scales, "cpu"), want) <= INT8_ROWS
    assert relative_error(case.rows([[4, 1, 0], [5, 3], [2]], "cpu", scales=scales), want) <= INT8_ROWS


@EXACT
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
def test_int8_split_and_threads_do_not_matter(rows):
    # products are exact integers; rows of whole vectors keep the gate's exp the same wherever a row stands
    case, scales, _ = quantized_case(SPECS["silu"], INT8, rows, inner=64)
    got = run(case, scales, "cpu")
    everyone = list(range(len(COUNTS)))
    for parts in ([everyone], [[e] for e in reversed(everyone)], [everyone[::2], everyone[1::2]]):
        assert torch.equal(case.rows(parts, "cpu", scales=scales), got)
    torch.set_num_threads(2)
    assert torch.equal(run(case, scales, "cpu"), got)


@EXACT
def test_int8_on_a_cpu_from_slots():
    case, scales, want = quantized_case(SPECS["silu"], INT8)
    got = run(case, scales, "cpu")
    slots = {0: 6, 1: 2, 2: 0, 3: 5, 4: 3, 5: 1}

    def pool(x):
        # a slot has bytes of something else behind the weights
        buffer = torch.zeros(7, x[0].numel() + 16, dtype=x.dtype)
        view = buffer[:, : x[0].numel()].view(7, *x.shape[1:])
        for e, slot in slots.items():
            view[slot] = x[e]
        return view

    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    pooled = replace(case, **{name: pool(getattr(case, name).detach()) for name in names})
    pooled_scales = tuple(pool(scale) for scale in scales)
    for backend, tolerance in (("cpu", 0.0), ("torch", INT8_ROWS)):
        rows = pooled.rows([[4, 1, 0], [5, 3], [2]], backend, slots, scales=pooled_scales)
        assert relative_error(rows, got) <= tolerance
        assert relative_error(rows, want) <= INT8_ROWS


@EXACT
def test_int8_functions_on_a_cpu():
    functions = {"gate_fn": lambda pre: pre[..., :19].sigmoid() * pre[..., 19:], "post_norm": lambda rows: rows * 0.5}
    case, scales, want = quantized_case(ExpertSpec(**functions), INT8)
    assert relative_error(run(case, scales, "cpu"), want) <= INT8_ROWS


@EXACT
def test_rows_of_integers_are_exact_on_a_cpu():
    # each row's largest is 127 and the first matrix is the identity: both roundings of rows keep every value
    random = torch.Generator().manual_seed(0)
    hidden = torch.randint(0, 128, (6, 37), generator=random).float()
    hidden[:, 3] = 127
    case = make_case(
        ExpertSpec(activation="relu", is_gated=False), hidden=37, inner=37, index=torch.tensor([[0], [4], [1]] * 2)
    )
    case = replace(case, hidden=hidden, gate_up=torch.eye(37).repeat(5, 1, 1))
    gate_up, down, scales = quantize_experts(case.gate_up, case.down, INT8, case.spec)
    exact = down.double() * scales[1].double()[..., None]
    want, _ = truth(replace(case, down=exact))
    assert relative_error(run(replace(case, gate_up=gate_up, down=down), scales, "cpu"), want) <= EXACT_WEIGHTS


@EXACT
def test_row_of_zeros_on_a_cpu():
    case, scales, _ = quantized_case(SPECS["silu"], INT8)
    case = replace(case, gate_up_bias=None, down_bias=None)
    with torch.no_grad():
        case.hidden[2] = 0
    out = run(case, scales, "cpu")
    assert not out[2].any()
    assert not out.isnan().any()


def test_nothing_to_do():
    for index in (torch.empty(0, 2, dtype=torch.int64), torch.full((4, 2), 5)):
        case = make_case(index=index)
        gate_up, down, scales = quantize_experts(case.gate_up, case.down, INT8)
        case = replace(case, gate_up=gate_up, down=down)
        for backend in ("auto", "torch", "reference"):
            assert not run(case, scales, backend).any()


def test_who_takes_8_bits():
    case, _, _ = quantized_case(SPECS["silu"], INT8)
    assert explain(case.hidden, case.gate_up).backend == ("cpu" if has_exact_int8() else "torch")
    case, scales, want = quantized_case(SPECS["silu"], FP8)
    assert explain(case.hidden, case.gate_up).backend == "torch"
    assert relative_error(run(case, scales, "auto"), want) <= EXACT_WEIGHTS
    with pytest.raises(ValueError, match="float8 have no CPU products"):
        run(case, scales, "cpu")
    with pytest.raises(ValueError, match=r"torch.float8_e4m3fn it takes bfloat16 rows, not torch.float32"):
        run(case, scales, "triton")


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "reference", "triton"])
def test_no_gradients(backend):
    case, scales, _ = quantized_case(SPECS["silu"], INT8)
    with pytest.raises(ValueError, match=r"quantised weights \(scales\) have no backward pass"):
        case.run(backend, scales=scales)


WRONG = {
    "missing": ({"scales": None}, "gate_up is torch.int8; give the scales that quantize_experts returned"),
    "needless": (
        {"gate_up": torch.zeros(6, 38, 37), "down": torch.zeros(6, 37, 19)},
        "scales belong to weights in torch.int8 or torch.float8_e4m3fn, gate_up is torch.float32",
    ),
    "mixed": ({"down": torch.zeros(6, 37, 19).to(FP8)}, "down is torch.float8_e4m3fn.*down must be torch.int8"),
    "first_shape": (
        {"scales": (torch.ones(6, 37), torch.ones(6, 37))},
        r"scales\[0\] is \(6, 37\), expected \(6, 38\)",
    ),
    "second_shape": (
        {"scales": (torch.ones(6, 38), torch.ones(5, 37))},
        r"scales\[1\] is \(5, 37\), expected \(6, 37\)",
    ),
    "type": ({"scales": (torch.ones(6, 38).double(), torch.ones(6, 37))}, r"scales\[0\] is torch.float64.*float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name):
    changes, message = WRONG[name]
    case, scales, _ = quantized_case(SPECS["silu"], INT8)
    scales = changes.get("scales", scales)
    case = replace(case, **{field: value for field, value in changes.items() if field != "scales"})
    with pytest.raises(ValueError, match=message):
        run(case, scales, "torch")
    routing = plan(case.index, len(COUNTS))
    out = torch.empty(case.index.numel(), 37)
    with pytest.raises(ValueError, match=message):
        expert_rows(case.hidden, case.gate_up, case.down, routing, [0], out=out, scales=scales)
