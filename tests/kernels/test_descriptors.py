"""What TMA takes, decided on the host: a wrong yes is a fault on the device, a wrong no only slow."""

import pytest
import torch

from raymoe.kernels.configs import GemmConfig
from raymoe.kernels.descriptors import in_order, ragged_operand, row_operand, weight_operand

BY_TMA = GemmConfig(64, 128, 32, weights="descriptor", inputs="descriptor")
BY_POINTERS = GemmConfig(64, 128, 32)


def weights(slots=3, out_size=48, in_size=40, gap=0, offset=0, dtype=torch.bfloat16):
    """A strided view of a flat expert buffer."""
    numel = out_size * in_size
    buffer = torch.zeros(slots * (numel + gap) + offset, dtype=dtype)
    return buffer[offset:].as_strided((slots, out_size, in_size), (numel + gap, in_size, 1))


@pytest.mark.parametrize(
    ("weight", "form"),
    [
        (weights(), "nk"),
        (weights().transpose(1, 2), "kn"),
        (weights(gap=8), "nk"),
        (weights(gap=8, offset=8), "nk"),
        (weights(gap=3), "pointers"),
        (weights(offset=3), "pointers"),
        (weights(in_size=44), "pointers"),
        (weights(in_size=44, dtype=torch.float32), "nk"),
        (weights(dtype=torch.int8), "pointers"),
        (weights(in_size=48, dtype=torch.int8), "nk"),
        (weights(in_size=80)[..., ::2], "pointers"),
        (weights(slots=0), "pointers"),
        (weights()[:1].expand(3, 48, 40), "pointers"),
    ],
)
def test_form_of_weights(weight, form):
    operand, found = weight_operand(weight, BY_TMA)
    assert found == form
    assert (operand is weight) == (form == "pointers")
    assert weight_operand(weight, BY_POINTERS) == (weight, "pointers")


def test_halves_share_a_tile():
    operand, form = weight_operand(weights(gap=8), BY_TMA, columns=2, is_pair=True)
    assert form == "nk_pair"
    assert operand.shape == [3, 2, 24, 40]
    assert operand.strides == [48 * 40 + 8, 24 * 40, 40, 1]
    assert operand.block_shape == [1, 2, 128, 32]


def test_neighbours_are_a_wider_tile():
    operand, _ = weight_operand(weights(), BY_TMA, columns=2)
    assert operand.block_shape == [1, 256, 32]
    operand, _ = weight_operand(weights().transpose(1, 2), BY_TMA, columns=2)
    assert (operand.shape, operand.block_shape) == ([3, 48, 40], [1, 32, 256])


def test_transposed_halves_go_by_pointers():
    assert weight_operand(weights().transpose(1, 2), BY_TMA, columns=2, is_pair=True)[1] == "pointers"


def test_a_box_has_at_most_256_columns():
    wide = GemmConfig(64, 256, 32, weights="descriptor")
    assert weight_operand(weights(out_size=512), wide)[1] == "nk"
    assert weight_operand(weights(out_size=512), wide, columns=2)[1] == "pointers"


@pytest.mark.parametrize("operand", [row_operand, lambda x, config: ragged_operand(x, 64, config)])
def test_rows(operand):
    x = torch.zeros(10, 40, dtype=torch.bfloat16)
    assert operand(x, BY_TMA)[1]
    assert operand(x, BY_POINTERS) == (x, False)
    for odd in (x[:, 3:], x[:, :36].contiguous(), x[:0], x.T):
        assert operand(odd, BY_TMA) == (odd, False)


def test_rows_are_brought_into_order_only_for_tma():
    x, token = torch.randn(4, 8), torch.tensor([3, 0, 0, 2, 1])
    ordered, is_sorted = in_order(x, token, BY_TMA, is_sorted=False)
    assert is_sorted
    assert torch.equal(ordered, x[token])
    assert in_order(x, token, BY_POINTERS, is_sorted=False) == (x, False)
    assert in_order(x, token, BY_TMA, is_sorted=True) == (x, True)
