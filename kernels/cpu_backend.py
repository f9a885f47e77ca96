"""Experts on a CPU, forward only, with the operands of their products swapped (see `cpu_products`).

Where an expert has many rows its activations stand as columns, [H, n] and [I, n], from its first product to its last, and
neighbouring experts of dense weights go into one batched product, which gives each thread experts of its own.

T tokens, K choices per token, S = T*K routed rows, E experts, H hidden size, I expert width, B experts of a run, N its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.kernels.cpu_int8 import expert_rows_int8
from raymoe.kernels.cpu_products import is_large, swapped_product
from raymoe.kernels.grouped_mm import takes_grouped_mm
from raymoe.kernels.operands import Experts
from raymoe.kernels.plan import Plan, row_places
from raymoe.kernels.spec import ExpertSpec, apply_gate

WIDE = 16
"""Columns of one tile of the matrix unit."""
WIDE_ROWS = 12
"""Rows from which a single expert pays for keeping its activations as columns."""

# what products cost, in microseconds, as benchmarks/kernels_cpu.py found it on a 2-core Sapphire Rapids; ratios decide
_SINGLE_US, _BATCH_US, _BATCHED_US = 185.0, 500.0, 80.0
"""Both projections of an expert on its own, of a batch, and of each expert in a batch, before the first byte."""
_READ_US = 1.4e-4
"""Reading one weight."""
_SINGLE_MULTIPLY_US, _BATCH_MULTIPLY_US = 3e-6, 2.1e-6
"""One weight times one column, where that takes longer than reading it."""
_ELEMENT_US = 1.2e-3
"""One activation of a column: gather, gate, transpose, store."""


class _Run(NamedTuple):
    """Experts `start` to `stop` of the plan, side by side in the weights from `slot` on."""

    start: int
    stop: int
    slot: int
    width: int
    """Columns of each expert; those behind its rows are padding."""

    @property
    def length(self) -> int:
        return self.stop - self.start


def expert_rows_cpu(
    hidden: Tensor,
    experts: Experts,
    plan: Plan,
    expert_ids: Sequence[int],
    slots: Sequence[int],
    out: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
) -> None:
    """`expert_rows` on a CPU."""
    if experts.gate_up_scale is not None:
        expert_rows_int8(hidden, experts, plan, expert_ids, slots, out, spec, hidden_scale)
        return
    ends = plan.offsets.tolist()
    active = [(slot, e) for e, slot in zip(expert_ids, slots, strict=True) if ends[e] < ends[e + 1]]
    narrow: list[tuple[int, int]] = []
    for run in _runs(ends, experts, active):
        if run.length == 1 and run.width < WIDE_ROWS:
            narrow.append((run.slot, run.start))
        else:
            _write_columns(hidden, experts, plan, run, ends, out, spec, hidden_scale)
    if narrow:
        _write_rows(hidden, experts, plan, narrow, ends, out, spec, hidden_scale)


def _runs(ends: list[int], experts: Experts, active: list[tuple[int, int]]) -> Iterator[_Run]:
    """Active (slot, expert), neighbours in dense weights together where that costs less than one product for each.

    A run may hold experts without rows: reading them once can be cheaper than a second run.
    """
    cost = _Cost.of(experts)
    run = None
    for slot, e in sorted(active):
        n = ends[e + 1] - ends[e]
        # another expert's rows in between are not this call's
        if run is not None and cost.is_dense and run.slot - run.start == slot - e and ends[run.stop] == ends[e]:
            joined = _Run(run.start, e + 1, run.slot, _padded(max(run.width, n)))
            if cost.of_batch(joined) <= cost.of_batch(run) + cost.of_single(n):
                run = joined
                continue
        if run is not None:
            yield from _pieces(run, ends, cost)
        run = _Run(e, e + 1, slot, n)
    if run is not None:
        yield from _pieces(run, ends, cost)


def _pieces(run: _Run, ends: list[int], cost: _Cost) -> Iterator[_Run]:
    """The run in batches of 2^i experts, or in single experts where a batch does not pay.

    Odd batches take up to four times as long, and few shapes are soon all compiled.
    """
    while run.length:
        length = 1 << (run.length.bit_length() - 1)
        piece = run._replace(stop=run.start + length)
        singles = [
            _Run(e, e + 1, run.slot + e - run.start, n)
            for e in range(piece.start, piece.stop)
            if (n := ends[e + 1] - ends[e])
        ]
        if length > 1 and _BATCH_US + cost.of_batch(piece) < sum(cost.of_single(single.width) for single in singles):
            yield piece
        else:
            yield from singles
        run = run._replace(start=piece.stop, slot=run.slot + length)


class _Cost(NamedTuple):
    """Microseconds, by the model above."""

    weights: int
    """Of one expert."""
    elements: int
    """Of one column's activations."""
    is_dense: bool
    """Experts follow one another in memory, as a batched product needs them."""

    @staticmethod
    def of(experts: Experts) -> _Cost:
        gate_up, down = experts.gate_up, experts.down
        return _Cost(
            gate_up[:1].numel() + down[:1].numel(),
            gate_up.shape[1] + down.shape[1],
            gate_up.is_contiguous() and down.is_contiguous(),
        )

    def of_single(self, n: int) -> float:
        return _SINGLE_US + self.weights * max(_READ_US, n * _SINGLE_MULTIPLY_US) + n * self.elements * _ELEMENT_US

    def of_batch(self, run: _Run) -> float:
        """Without what it costs to prepare one."""
        columns = self.weights * max(_READ_US, run.width * _BATCH_MULTIPLY_US) + run.width * self.elements * _ELEMENT_US
        return run.length * (_BATCHED_US + columns)


def _padded(width: int) -> int:
    """The next width that oneDNN has a fast batched product for: other small ones take several times as long."""
    return next((w for w in (1, 2, 4) if width <= w), -(-width // WIDE) * WIDE)


def _write_columns(
    hidden: Tensor,
    experts: Experts,
    plan: Plan,
    run: _Run,
    ends: list[int],
    out: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
) -> None:
    """The rows of a run, with one batched product for each projection."""
    first, last = ends[run.start], ends[run.stop]
    token, cell = plan.token[first:last], None
    if run.length * run.width > last - first:
        expert = plan.expert[first:last]
        cell = torch.arange(first, last) - plan.offsets[expert] + (expert - run.start) * run.width
        # padding computes token 0 once more: what stands there is sound
        token = token.new_zeros(run.length * run.width).index_copy_(0, cell, token)
    here = slice(run.slot, run.slot + run.length)
    columns = hidden.index_select(0, token).view(run.length, run.width, -1).mT
    inner = apply_gate(_batched(experts.gate_up[here], columns, experts.gate_up_bias, here), spec, dim=1)
    if hidden_scale is not None:
        inner = (inner * hidden_scale.index_select(0, token).view(run.length, run.width, -1).mT).to(hidden.dtype)
    rows = _batched(experts.down[here], inner, experts.down_bias, here).mT
    if cell is not None:
        rows = rows.flatten(0, 1).index_select(0, cell)
    if spec.post_norm is not None:
        rows = spec.post_norm(rows)
    out[first:last].view_as(rows).copy_(rows)


def _batched(weight: Tensor, columns: Tensor, bias: Tensor | None, here: slice) -> Tensor:
    """[B, out, in] times columns [B, in, N], plus each expert's bias."""
    if weight.shape[0] == 1:
        # bmm would copy a weight that is a view of a wider buffer
        out = torch.mm(weight[0], columns[0])[None]
    else:
        out = torch.bmm(weight, columns if columns.shape[2] >= WIDE else columns.contiguous())
    return out if bias is None else out + bias[here, :, None]


def _write_rows(
    hidden: Tensor,
    experts: Experts,
    plan: Plan,
    narrow: list[tuple[int, int]],
    ends: list[int],
    out: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
) -> None:
    """The rows of experts that have few, with a product for each expert and everything else for all of them at once."""
    # by slot, as grouped_mm wants its groups
    count = {slot: ends[e + 1] - ends[e] for slot, e in sorted(narrow)}
    where = row_places(ends, [e for _, e in sorted(narrow)])
    token = plan.token[where]
    pre = _each(hidden.index_select(0, token), experts.gate_up, experts.gate_up_bias, count)
    inner = apply_gate(pre, spec)
    if hidden_scale is not None:
        inner = (inner * hidden_scale.index_select(0, token)).to(hidden.dtype)
    rows = _each(inner.contiguous(), experts.down, experts.down_bias, count)
    out[where] = spec.post_norm(rows) if spec.post_norm is not None else rows


def _each(x: Tensor, weight: Tensor, bias: Tensor | None, count: dict[int, int]) -> Tensor:
    """Rows [S, in] -> [S, out]: the matrix and bias at each slot times its `count` rows, which stand in slot order."""
    counts = list(count.values())
    if not is_large(weight) and len(x) >= 2 * len(count) and takes_grouped_mm(x, weight.mT):
        of_slot = torch.zeros(len(weight), dtype=torch.int32)
        of_slot[list(count)] = torch.tensor(counts, dtype=torch.int32)
        out = F.grouped_mm(x, weight.mT, offs=of_slot.cumsum(0, dtype=torch.int32))
    else:
        out = x.new_empty(len(x), weight.shape[1])
        for slot, rows, result in zip(count, x.split(counts), out.split(counts), strict=True):
            swapped_product(weight[slot], rows, result)
    if bias is not None:
        out += bias[list(count)].repeat_interleave(torch.tensor(counts), dim=0)
    return out
