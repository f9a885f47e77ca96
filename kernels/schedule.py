"""Which tile a program computes, and how many programs there are."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.configs import GemmConfig

_INTERPRETED_PROGRAMS = 3  # of a persistent kernel, so that tests see one walk over several tiles


@triton.jit
def tile_at(index, num_row_tiles, num_col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a tile's number.

    GROUP row tiles, mostly of one expert as these stand side by side, take a column tile of weights one after another, then the
    next: both the weights and the rows of a group stay in L2.
    """
    group_tiles = GROUP * num_col_tiles
    first = index // group_tiles * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    within = index % group_tiles
    return first + within % height, within // height


@triton.jit
def walk(num_tiles, IS_PERSISTENT: tl.constexpr):
    """(start, stop, step) of a program's loop over its turns; of a program with one tile the compiler drops the loop."""
    if IS_PERSISTENT:
        return tl.program_id(0), num_tiles, tl.num_programs(0)
    else:
        return 0, 1, 1


@triton.jit
def turn_tile(turn, IS_PERSISTENT: tl.constexpr):
    """Number of the tile to compute in a turn."""
    return turn if IS_PERSISTENT else tl.program_id(0)


class Launch(NamedTuple):
    """How the kernels over ragged rows are launched."""

    grid: tuple[int]
    options: dict[str, Any]


def launch_options(config: GemmConfig, num_tiles: int, device: torch.device) -> Launch:
    """Grid for at most `num_tiles` tiles, and the switches that all these kernels take from their config."""
    programs = num_tiles
    if config.is_persistent:
        programs = min(num_tiles, _INTERPRETED_PROGRAMS if is_interpreted() else _multiprocessors(device))
    options = {
        "IS_SWAPPED": config.is_swapped,
        "IS_PERSISTENT": config.is_persistent,
        "IS_FLATTENED": config.is_flattened,
        "GROUP": config.group,
        "SLICES": config.slices,
        "UPCAST": is_interpreted(),
        "BM": config.rows,
        "BK": config.inner,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Launch((programs,), options)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
