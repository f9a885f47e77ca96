import pytest
import torch

from raymoe.kernels import ACTIVATIONS, ExpertSpec
from raymoe.kernels.spec import apply_gate, triton_refusal


def test_unknown_activation():
    with pytest.raises(ValueError, match="'swish' is not known; use one of silu"):
        ExpertSpec(activation="swish")


@pytest.mark.parametrize(
    "fields",
    [{"is_interleaved": True}, {"gate_limit": 7.0}, {"gate_alpha": 2.0}, {"up_offset": 1.0}, {"gate_fn": torch.relu}],
    ids=lambda fields: next(iter(fields)),
)
def test_gate_fields_need_a_gate(fields):
    with pytest.raises(ValueError, match="need is_gated=True"):
        ExpertSpec(is_gated=False, **fields)


def test_alpha_belongs_to_silu():
    with pytest.raises(ValueError, match="only belongs to silu"):
        ExpertSpec(activation="gelu", gate_alpha=1.702)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_takes_every_activation(activation):
    assert triton_refusal(ExpertSpec(activation=activation), torch.bfloat16, torch.bfloat16) is None


@pytest.mark.parametrize("weight", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_triton_takes_quantised_weights_for_bfloat16(weight):
    assert triton_refusal(ExpertSpec(), torch.bfloat16, weight) is None
    assert str(weight) in triton_refusal(ExpertSpec(), torch.float16, weight)


@pytest.mark.parametrize(
    ("spec", "dtype", "reason"),
    [
        (ExpertSpec(gate_fn=torch.relu), torch.float32, "gate_fn"),
        (ExpertSpec(post_norm=torch.relu), torch.float32, "post_norm"),
        (ExpertSpec(), torch.float64, "float64"),
    ],
)
def test_triton_refuses(spec, dtype, reason):
    assert reason in triton_refusal(spec, dtype, dtype)


def test_gate_along_another_dimension():
    # the cpu backend keeps rows as columns
    pre = torch.randn(3, 8, 5)
    for spec in (
        ExpertSpec(),
        ExpertSpec(is_gated=False),
        ExpertSpec(is_interleaved=True, gate_limit=0.3, gate_alpha=1.7, up_offset=1.0),
        ExpertSpec(gate_fn=lambda x: x[..., :4] * x[..., 4:].square()),
    ):
        want = torch.stack([apply_gate(columns.T, spec).T for columns in pre])
        # the default tolerance: whole vectors and their tails round exp differently
        torch.testing.assert_close(apply_gate(pre, spec, dim=1), want)
        torch.testing.assert_close(apply_gate(pre, spec, dim=-2), want)
