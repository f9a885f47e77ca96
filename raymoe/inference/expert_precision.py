"""Experts in fewer bits, for a tier that is slow or small: int8 with a scale a row, or int4 with a scale a group of a row.

Lossy, and so for who asks for it. `measure_loss` says what it costs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raymoe.config.precision import Precision
from raymoe.kernels import ExpertSpec, expert_rows, plan, quantize_experts
from raymoe.models import ExpertField, ExpertLayout, MoELayer, weights_of

_ALIGN = 64
_CACHED_ELEMENTS = 2**16


class _Stored(NamedTuple):
    field: ExpertField
    is_weight: bool
    codes: slice
    """Bytes in the stored expert; of a field that is not a weight, its elements in the codec's dtype."""
    scales: slice


class ExpertCodec:
    """One layer's experts between their flat form and the bytes that a tier holds. Stateless; safe from several threads.

    int8 codes keep the weight's own shape, so that a pool of stored experts can be computed with as it is (`int8_views`).

    Source of int4: blocks whose scale is the value of largest magnitude / -8, so that all 16 codes are used, as in GGML's Q4_0.
    """

    def __init__(self, layout: ExpertLayout, spec: ExpertSpec, precision: Precision, dtype: torch.dtype):
        """`dtype`: that biases are held in, and native experts as a whole."""
        self.layout, self.spec, self.precision = layout, spec, precision
        self.dtype = torch.bfloat16 if precision.kind == "bf16" else dtype
        self.is_plain = precision.kind in ("native", "bf16")
        """A stored expert is the flat one in `dtype`."""
        self._fields: list[_Stored] = []
        position = 0
        for field in layout.fields if not self.is_plain else ():
            is_weight = len(field.shape) == 2
            rows, columns = self._rows_of(field) if is_weight else (0, 0)
            groups = -(-columns // precision.group)
            if not is_weight:
                sizes = field.numel * dtype.itemsize, 0
            elif precision.kind == "int8":
                sizes = field.numel, rows * 4
            else:
                sizes = rows * groups * precision.group // 2, rows * groups * 2
            spans = []
            for size in sizes:
                spans.append(slice(position, position + size))
                position += -(-size // _ALIGN) * _ALIGN
            self._fields.append(_Stored(field, is_weight, *spans))
        self.num_bytes = layout.numel * self.dtype.itemsize if self.is_plain else position
        """Of a stored expert."""

    def encode(self, flat: Tensor, out: Tensor) -> None:
        """Stores `flat` [numel], a floating-point dtype, in `out` [num_bytes] uint8, both contiguous and on the CPU."""
        if self.is_plain:
            out.view(self.dtype).copy_(flat)
            return
        out.zero_()
        views = self.layout.views(flat[None])
        for stored in self._fields:
            value = views[stored.field.name][0]
            if not stored.is_weight:
                out[stored.codes].view(self.dtype).copy_(value)
            elif self.precision.kind == "int4":
                codes, scales = _to_int4(value.T if self.spec.is_transposed else value, self.precision.group)
                out[stored.codes].copy_(codes.flatten())
                out[stored.scales].view(torch.bfloat16).copy_(scales.flatten())
        if self.precision.kind == "int8":
            gate_up, down = (views[field.name] for field in self._weights())
            *codes, scales = quantize_experts(gate_up, down, torch.int8, self.spec)
            for stored, code, scale in zip(self._stored_weights(), codes, scales, strict=True):
                out[stored.codes].view(torch.int8).copy_(code.flatten())
                out[stored.scales].view(torch.float32).copy_(scale.flatten())

    def decode(self, stored: Tensor, flat: Tensor) -> None:
        """Fills `flat` [numel], of any floating-point dtype and device, from [num_bytes] uint8; padding is left alone."""
        if self.is_plain:
            flat.copy_(stored.view(self.dtype))
            return
        stored = stored.to(flat.device)
        views = self.layout.views(flat[None])
        for part in self._fields:
            target = views[part.field.name][0]
            if not part.is_weight:
                target.copy_(stored[part.codes].view(self.dtype).view(part.field.shape))
                continue
            if self.precision.kind == "int8":
                codes = stored[part.codes].view(torch.int8).view(part.field.shape)
                scales = stored[part.scales].view(torch.float32)
                scales = scales[None] if self.spec.is_transposed else scales[:, None]
                for block in _blocks(target):
                    target[block] = codes[block].float().mul_(scales.expand_as(codes)[block])
                continue
            rows, columns = self._rows_of(part.field)
            scales = stored[part.scales].view(torch.bfloat16).view(rows, -1)
            _from_int4(stored[part.codes], scales, columns, target.T if self.spec.is_transposed else target)

    def int8_views(self, pool: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """What `raymoe.kernels.expert_rows` takes of `pool` [slots, num_bytes] uint8: gate_up, down, scales, biases or None.

        Raises:
            ValueError: another precision.
        """
        if self.precision.kind != "int8":
            raise ValueError(
                f"experts held as {self.precision} cannot be computed with as they are; use int8, or decode them"
            )
        weights, scales = [], []
        for stored in self._stored_weights():
            weights.append(pool[:, stored.codes].view(torch.int8).unflatten(1, stored.field.shape))
            scales.append(pool[:, stored.scales].view(torch.float32))
        biases = [pool[:, s.codes].view(self.dtype) for s in self._fields if not s.is_weight]
        return weights[0], weights[1], (scales[0], scales[1]), (biases[0], biases[1]) if biases else None

    def _weights(self) -> list[ExpertField]:
        """gate_up before down, as the kernels take them."""
        return sorted((s.field for s in self._fields if s.is_weight), key=lambda field: field.name == "down_proj")

    def _stored_weights(self) -> list[_Stored]:
        return sorted((s for s in self._fields if s.is_weight), key=lambda stored: stored.field.name == "down_proj")

    def _rows_of(self, field: ExpertField) -> tuple[int, int]:
        """(outputs, inputs) of a weight."""
        return (field.shape[1], field.shape[0]) if self.spec.is_transposed else (field.shape[0], field.shape[1])


def _to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """uint8 [rows, groups, group / 2] and bf16 scales [rows, groups] of [rows, columns]; the last group is filled with zeros."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    largest = padded.gather(2, padded.abs().argmax(2, keepdim=True))
    scales = (largest / -8).to(torch.bfloat16)
    # codes for the scale as it is stored; a group of zeros has none
    divisor = scales.float().masked_fill(scales == 0, 1.0)
    codes = (padded / divisor).round().clamp(-8, 7).to(torch.int8) + 8
    low, high = codes.view(torch.uint8).unflatten(2, (2, group // 2)).unbind(2)
    return low | high << 4, scales.squeeze(2)


def _from_int4(packed: Tensor, scales: Tensor, columns: int, out: Tensor) -> None:
    """Fills `out` [rows, columns] from packed codes and scales [rows, groups]; the first half of a group is in the low bits."""
    packed = packed.view(*scales.shape, -1)
    for block in _blocks(out):
        part = packed[block]
        codes = torch.cat(((part & 0xF).view(torch.int8), (part >> 4).view(torch.int8)), dim=2).sub_(8)
        out[block] = codes.float().mul_(scales[block].float()[..., None]).flatten(1)[:, :columns]


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of `weight` [rows, columns] that stay in a core's cache while several operations go over them."""
    step = max(1, _CACHED_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


class PrecisionLoss(NamedTuple):
    """What a precision does to the outputs of experts: |y - y_exact| / |y_exact| of a row, in Euclidean norms."""

    precision: Precision
    mean_error: float
    max_error: float
    exact_bytes: int
    """Of an expert in the dtype it is held in otherwise, averaged over the layers."""
    held_bytes: int
    experts: int
    """That were looked at."""

    @property
    def saved_share(self) -> float:
        """Share of the bytes that need not be moved or held."""
        return 1 - self.held_bytes / self.exact_bytes


def measure_loss(
    layers: Sequence[MoELayer],
    read: Callable[[int, int, Tensor], object],
    precision: Precision,
    dtype: torch.dtype,
    *,
    num_experts: int = 8,
    num_rows: int = 64,
    seed: int = 0,
) -> PrecisionLoss:
    """Compares experts in fp32 with what is left of them, on rows of normal random numbers.

    Args:
        read: fills the flat fp32 tensor of (layer, expert), as `ExpertFiles.read` does.
        dtype: that experts are held in otherwise.
        num_experts: at most so many are looked at, spread evenly over layers and experts.
    """
    everyone = [(layer, expert) for layer in layers for expert in range(layer.num_experts)]
    chosen = everyone[:: max(1, len(everyone) // num_experts)][:num_experts]
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for layer, expert in chosen:
        codec = ExpertCodec(layer.layout, layer.spec, precision, dtype)
        exact = torch.zeros(layer.layout.numel)
        read(layer.index, expert, exact)
        held, lossy = torch.zeros(codec.num_bytes, dtype=torch.uint8), torch.zeros_like(exact)
        codec.encode(exact, held)
        codec.decode(held, lossy)
        _, down, _ = weights_of(layer, layer.layout.views(exact[None]))
        hidden = torch.randn(num_rows, down.shape[2 if layer.spec.is_transposed else 1], generator=generator)
        wanted, found = (_outputs(layer, flat, hidden) for flat in (exact, lossy))
        errors.append((found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny))
    of_all = torch.cat(errors)
    codecs = [ExpertCodec(layer.layout, layer.spec, precision, dtype) for layer in layers]
    exact_bytes = sum(layer.layout.numel * dtype.itemsize for layer in layers) // len(layers)
    held_bytes = sum(codec.num_bytes for codec in codecs) // len(layers)
    return PrecisionLoss(precision, of_all.mean().item(), of_all.max().item(), exact_bytes, held_bytes, len(chosen))


def _outputs(layer: MoELayer, flat: Tensor, hidden: Tensor) -> Tensor:
    gate_up, down, biases = weights_of(layer, layer.layout.views(flat[None]))
    rows = torch.empty_like(hidden)
    routed = plan(torch.zeros(len(hidden), 1, dtype=torch.int64), 1)
    expert_rows(hidden, gate_up, down, routed, [0], out=rows, spec=layer.spec, biases=biases)
    return rows
