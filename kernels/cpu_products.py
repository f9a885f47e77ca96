"""Matrix products on a CPU with the operands swapped.  n rows, K columns in, N columns out.

oneDNN copies the right operand of a product into the layout of the matrix unit on every call. Written as x W^T that is the
expert's matrix, megabytes for a few rows; written as W x^T it is the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# measured by benchmarks/kernels_cpu.py on a 2-core Sapphire Rapids
LARGE_BYTES = 4 << 20
"""From this size on a matrix, read at full bandwidth, is worth a product of its own from Python."""
CACHED_BYTES = 512 << 10
"""Half of a core's second-level cache, as of Zen 4 and not more than of its peers; measured on a 2-core AMD EPYC."""


def is_large(weight: Tensor) -> bool:
    """Whether each of the matrices [E, ...] is."""
    return weight[:1].nbytes >= LARGE_BYTES


def fits_cache(weight: Tensor) -> bool:
    """Whether each of the matrices [E, ...] on a CPU stays in a core's second-level cache once it has been read."""
    return not weight.is_cuda and weight[:1].nbytes <= CACHED_BYTES


def swapped_product(matrix: Tensor, rows: Tensor, out: Tensor) -> None:
    """out [n, N] = rows [n, K] times `matrix` [N, K] transposed; all of them contiguous."""
    # a single column has a product of its own that reads the matrix at full bandwidth
    if rows.shape[0] == 1:
        torch.mv(matrix, rows[0], out=out[0])
    else:
        out.copy_(torch.mm(matrix, rows.T).T)
