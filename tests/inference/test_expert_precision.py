"""Experts in fewer bits: near what they were, in every family's layout, and no more bytes than promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.config.precision import Precision
from raymoe.inference.expert_precision import ExpertCodec, measure_loss
from raymoe.kernels import ExpertSpec, expert_rows, plan
from raymoe.models import ExpertLayout, expert_parameters, moe_layers, weights_of
from tests.tiny_models import FAMILIES, tiny_model, tiny_switch

INT8, INT4 = Precision("int8"), [Precision("int4", group) for group in (32, 64, 128)]


def layer_of(family):
    return moe_layers(tiny_switch() if family == "switch_transformers" else tiny_model(family))[0]


def flat_experts(layer, dtype=torch.float32):
    flat = torch.zeros(layer.num_experts, layer.layout.numel, dtype=dtype)
    layer.layout.pack(expert_parameters(layer), flat)
    return flat


def round_trip(codec, flat, dtype=torch.float32):
    held = torch.full((codec.num_bytes,), 255, dtype=torch.uint8)
    codec.encode(flat, held)
    out = torch.full(flat.shape, torch.nan, dtype=dtype)
    codec.decode(held, out)
    return out


@pytest.mark.parametrize("precision", [INT8, *INT4], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "switch_transformers"])
def test_every_weight_is_within_half_a_step_of_its_row_or_group(family, precision):
    layer = layer_of(family)
    flat = flat_experts(layer)
    codec = ExpertCodec(layer.layout, layer.spec, precision, torch.float32)
    exact, found = layer.layout.views(flat[:1]), layer.layout.views(round_trip(codec, flat[0])[None])
    for field in layer.layout.fields:
        before, after = exact[field.name][0], found[field.name][0]
        if len(field.shape) == 1:
            assert torch.equal(before, after)
            continue
        if layer.spec.is_transposed:
            before, after = before.T, after.T
        size = precision.group if precision.kind == "int4" else before.shape[1]
        for row in range(before.shape[0]):
            for start in range(0, before.shape[1], size):
                part = before[row, start : start + size]
                largest = part.abs().max()
                # a bf16 scale is off by 1/256 at most, and the value opposite to the largest is cut off at 7 steps
                step = largest / 127 / 2 if precision.kind == "int8" else largest / 8 * 1.04
                assert (after[row, start : start + size] - part).abs().max() <= step * 1.001


@given(hidden=st.integers(1, 150), width=st.integers(1, 40), is_transposed=st.booleans(), has_bias=st.booleans(),
       precision=st.sampled_from([Precision(), Precision("bf16"), INT8, *INT4]), is_half=st.booleans())  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_odd_sizes(hidden, width, is_transposed, has_bias, precision, is_half):
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    if is_transposed:
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    if has_bias:
        shapes |= {"gate_up_proj_bias": (2 * width,), "down_proj_bias": (hidden,)}
    layout = ExpertLayout.of_shapes(shapes)
    codec = ExpertCodec(layout, ExpertSpec(is_transposed=is_transposed), precision, torch.float32)
    flat = torch.randn(layout.numel, generator=torch.Generator().manual_seed(hidden * width))
    dtype = torch.bfloat16 if is_half else torch.float32
    before, after = (layout.views(each[None]) for each in (flat, round_trip(codec, flat, dtype)))
    # one step of int4 is an eighth of the largest, of int8 a 127th; bf16 keeps 8 bits
    share = {"native": 0.0, "bf16": 2**-8, "int8": 0.5 / 127, "int4": 0.13}[precision.kind] + 2**-8 * is_half
    for name, wanted in before.items():
        assert (after[name].float() - wanted).abs().max() <= wanted.abs().max() * share * 1.001 + 1e-30


def test_zeros_stay_zeros():
    layer = layer_of("olmoe")
    for precision in (INT8, *INT4):
        codec = ExpertCodec(layer.layout, layer.spec, precision, torch.float32)
        assert (round_trip(codec, torch.zeros(layer.layout.numel)) == 0).all()


def test_the_bytes_of_an_expert():
    layout = ExpertLayout.of_shapes({"gate_up_proj": (256, 512), "down_proj": (512, 128)})
    weights = 256 * 512 + 512 * 128
    sizes = [ExpertCodec(layout, ExpertSpec(), p, torch.bfloat16).num_bytes for p in (Precision(), INT8, *INT4)]
    assert sizes == [weights * 2, weights + 4 * (256 + 512), *(weights // 2 + weights // g * 2 for g in (32, 64, 128))]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_pool_of_int8_experts_is_computed_with_as_it_is(family):
    layer = layer_of(family)
    flat = flat_experts(layer)
    codec = ExpertCodec(layer.layout, layer.spec, INT8, torch.float32)
    pool = torch.zeros(layer.num_experts, codec.num_bytes, dtype=torch.uint8)
    decoded = torch.zeros_like(flat)
    for expert in range(layer.num_experts):
        codec.encode(flat[expert], pool[expert])
        codec.decode(pool[expert], decoded[expert])
    hidden = torch.randn(9, 32)
    routed = plan(torch.randint(0, layer.num_experts, (9, 2)), layer.num_experts)
    everyone = list(range(layer.num_experts))
    found, wanted = torch.zeros(18, 32), torch.zeros(18, 32)
    gate_up, down, scales, biases = codec.int8_views(pool)
    expert_rows(hidden, gate_up, down, routed, everyone, out=found, spec=layer.spec, biases=biases, scales=scales,
                backend="reference")  # fmt: skip
    gate_up, down, biases = weights_of(layer, layer.layout.views(decoded))
    expert_rows(
        hidden, gate_up, down, routed, everyone, out=wanted, spec=layer.spec, biases=biases, backend="reference"
    )
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="held as int4:64 cannot be computed with"):
        ExpertCodec(layer.layout, layer.spec, Precision("int4"), torch.float32).int8_views(pool)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_the_loss_grows_as_bits_go(family):
    layers = moe_layers(tiny_model(family))
    flat = [flat_experts(layer) for layer in layers]

    def read(layer, expert, out):
        out.copy_(flat[layer][expert])

    losses = [measure_loss(layers, read, p, torch.bfloat16) for p in (Precision(), INT8, *INT4[:1])]
    # exact is exact but for bf16
    assert losses[0].max_error < 0.02
    assert losses[0].saved_share == 0
    assert losses[0].mean_error < losses[1].mean_error * 2
    assert 0.001 < losses[1].mean_error < 0.02
    assert losses[1].mean_error * 5 < losses[2].mean_error < 0.3
    assert losses[1].held_bytes > losses[2].held_bytes
    assert all(loss.mean_error <= loss.max_error for loss in losses)
    assert measure_loss(layers, read, INT8, torch.bfloat16) == losses[1]


@pytest.mark.parametrize("text", ["int4:", "int4:48", "int8:32", "fp8", ""])
def test_precisions_that_are_none(text):
    with pytest.raises(ValueError, match=f"'{text}' is no precision of experts; use native, bf16, int8"):
        Precision.parse(text)


@pytest.mark.parametrize("text", ["native", "bf16", "int8", "int4:32", "int4:128"])
def test_a_precision_is_written_as_it_is_read(text):
    assert str(Precision.parse(text)) == text
    assert Precision.parse("int4") == Precision("int4", 64)
