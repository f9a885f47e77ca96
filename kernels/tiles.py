"""Cut the sorted rows of a plan into row tiles, each within one expert.  S rows, E experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.plan import Plan


class Tiles(NamedTuple):
    """Row tiles for a grid whose size the host knows without asking the device: more programs than tiles, at most."""

    row: Tensor
    """int32 [programs]: first row of the program's tile; 0 where the program has no tile."""
    end: Tensor
    """int32 [programs]: row behind the expert's last; 0 where the program has no tile."""
    slot: Tensor
    """int32 [programs]: where the expert stands in the weights."""
    count: Tensor
    """int32 [1]: how many tiles there are; they come first, expert by expert in the order asked for."""


@triton.jit(do_not_specialize=["num_ids", "num_programs"])
def _tile_table_kernel(
    offsets,
    ids,
    row,
    end,
    slot,
    count,
    num_ids,
    num_programs,
    HAS_IDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BE: tl.constexpr,
    BP: tl.constexpr,
):
    which = tl.arange(0, BE)
    keep = which < num_ids
    expert = tl.load(ids + which, mask=keep, other=0) if HAS_IDS else which
    num_rows = tl.load(offsets + expert + 1, mask=keep, other=0) - tl.load(offsets + expert, mask=keep, other=0)
    num_tiles = (num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    last = tl.cumsum(num_tiles, axis=0)
    if tl.program_id(0) == 0:
        tl.store(count, tl.sum(num_tiles, axis=0))
    tile = tl.program_id(0) * BP + tl.arange(0, BP)
    # experts whose tiles all come before this one, and how many tiles those are
    is_before = keep[:, None] & (last[:, None] <= tile[None, :])
    at = tl.sum(is_before.to(tl.int32), axis=0)
    before = tl.sum(tl.where(is_before, num_tiles[:, None], 0), axis=0)
    has_tile = at < num_ids
    expert = tl.load(ids + at, mask=has_tile, other=0) if HAS_IDS else at
    first = tl.load(offsets + expert, mask=has_tile, other=0)
    inside = tile < num_programs
    tl.store(row + tile, tl.where(has_tile, first + (tile - before) * BLOCK_ROWS, 0), mask=inside)
    tl.store(end + tile, tl.load(offsets + expert + 1, mask=has_tile, other=0), mask=inside)
    place = tl.load(ids + num_ids + at, mask=has_tile, other=0) if HAS_IDS else tl.where(has_tile, at, 0)
    tl.store(slot + tile, place, mask=inside)


def tile_table(plan: Plan, block_rows: int, experts: Sequence[int] | None = None, slots: Sequence[int] = ()) -> Tiles:
    """Tiles of all experts, or of `experts` with weights at `slots`: one launch, no host sync.

    Args:
        block_rows: rows of a tile.
        experts: distinct expert ids as in the plan.
        slots: where the weights of each of `experts` stand.
    """
    ids = None if experts is None else _to_device([experts, slots], plan.offsets.device)
    return tile_table_of(plan.offsets, plan.order.numel(), block_rows, ids)


def tile_table_of(offsets: Tensor, num_rows: int, block_rows: int, ids: Tensor | None = None) -> Tiles:
    """`tile_table` from a plan's `offsets` for `num_rows` sorted rows; `ids`: int32 [2, n], experts and their slots."""
    num_ids = offsets.numel() - 1 if ids is None else ids.shape[1]
    num_programs = max_tiles(num_rows, num_ids, block_rows)
    row, end, slot = (offsets.new_empty(num_programs) for _ in range(3))
    if num_programs == 0:
        return Tiles(row, end, slot, offsets.new_zeros(1))
    tiles = Tiles(row, end, slot, offsets.new_empty(1))
    block = 512 if is_interpreted() else 32
    block_experts = max(triton.next_power_of_2(num_ids), 32)
    with torch.cuda.device_of(offsets):
        _tile_table_kernel[(triton.cdiv(num_programs, block),)](
            offsets,
            ids,
            *tiles,
            num_ids,
            num_programs,
            HAS_IDS=ids is not None,
            BLOCK_ROWS=block_rows,
            BE=block_experts,
            BP=block,
            num_warps=min(max(block_experts // 64, 4), 16),
        )
    return tiles


def max_tiles(num_rows: int, num_experts: int, block_rows: int) -> int:
    """The most tiles that `num_rows` rows can take however they are routed: a last, nearly empty one in each expert."""
    return (num_rows + min(num_experts, num_rows) * (block_rows - 1)) // block_rows


def _to_device(ids: list[Sequence[int]], device: torch.device) -> Tensor:
    """int32 [len(ids), n]; from pinned memory, since a copy from ordinary memory would wait for the stream."""
    on_host = torch.tensor(ids, dtype=torch.int32, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
