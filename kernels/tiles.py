"""Cut the sorted rows of a plan into row tiles, each within one expert, and say how large tiles are.  S rows, E experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.plan import Plan


class TileConfig(NamedTuple):
    """Sizes of one kernel's tile: rows x cols of the result, `inner` along the sum; and its launch options."""

    rows: int
    cols: int
    inner: int
    num_warps: int = 4
    num_stages: int = 3


class Tiles(NamedTuple):
    """Row tiles for a grid whose size the host knows without asking the device: more programs than tiles, at most."""

    row: Tensor
    """int32 [programs]: first row of the program's tile."""
    end: Tensor
    """int32 [programs]: row behind the expert's last; 0 where the program has no tile."""
    slot: Tensor
    """int32 [programs]: where the expert stands in the weights."""


def gmm_config(plan: Plan, dtype: torch.dtype, *, has_gate: bool = False) -> TileConfig:
    """Tile of the ragged-row GEMMs; depends on the whole plan only, so that a subset of experts rounds the same way.

    All kinds share `rows`, and with it one tile table. A gate in the epilogue takes twice the warps: at four it spills.
    """
    if is_interpreted():
        return TileConfig(16, 64, 64)
    block_rows = 16 if plan.order.numel() // max(plan.num_experts, 1) <= 16 else 64
    num_warps = 8 if has_gate and block_rows == 64 else 4
    if dtype == torch.float32:
        return TileConfig(block_rows, 64, 32, num_warps)
    return TileConfig(block_rows, 128, 64, num_warps)


def gmm_k_config(dtype: torch.dtype) -> TileConfig:
    """Tile of the weight gradients; `inner` counts routed rows."""
    if is_interpreted():
        return TileConfig(32, 32, 16)
    return TileConfig(64, 64, 32) if dtype == torch.float32 else TileConfig(128, 128, 32, num_warps=8)


def tile_table(plan: Plan, block_rows: int, experts: Sequence[int] | None = None, slots: Sequence[int] = ()) -> Tiles:
    """Tiles of all experts, or of `experts` with weights at `slots`; no host sync."""
    device = plan.offsets.device
    if experts is None:
        expert = slot = torch.arange(plan.num_experts, device=device)
    else:
        expert, slot = torch.tensor([list(experts), list(slots)], dtype=torch.int64, device=device)
    start, end = plan.offsets[expert], plan.offsets[expert + 1]
    num_tiles = (end - start + block_rows - 1) // block_rows
    last = num_tiles.cumsum(0)
    num_rows = plan.order.numel()
    program = torch.arange(-(-num_rows // block_rows) + min(expert.numel(), num_rows), device=device)
    if program.numel() == 0 or expert.numel() == 0:
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return Tiles(empty, empty, empty)
    which = torch.searchsorted(last, program, right=True)
    has_tile = which < expert.numel()
    which = which.clamp(max=expert.numel() - 1)
    row = start[which] + (program - (last - num_tiles)[which]) * block_rows
    end = torch.where(has_tile, end[which], 0)
    return Tiles(row.to(torch.int32), end.to(torch.int32), slot[which].to(torch.int32))
