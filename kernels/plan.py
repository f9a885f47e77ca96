"""Group the routed rows of a batch by expert.  T = tokens, K = choices per token, S = T*K routed rows, E = experts."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raymoe.kernels.backend import has_triton


class Plan(NamedTuple):
    """Where each routed row stands once rows are sorted by expert. A slot is a (token, choice) pair, counted t*K + k.

    Rows from ``offsets[-1]`` on have no expert: they are never computed, and what stands there is never read.
    """

    order: Tensor
    """int64 [S]: slot of each sorted row; within an expert in slot order."""
    token: Tensor
    """int64 [S]: token of each sorted row."""
    expert: Tensor
    """int64 [S]: expert of each sorted row, ascending; E on the rows without an expert, which come last."""
    inverse: Tensor
    """int64 [T, K]: sorted row of each slot."""
    offsets: Tensor
    """int32 [E + 1]: rows of expert e are offsets[e] .. offsets[e+1]; offsets[E] rows have an expert."""

    @property
    def num_experts(self) -> int:
        return self.offsets.numel() - 1


def plan(expert_index: Tensor, num_experts: int) -> Plan:
    """Stable counting sort of the routed rows by expert, without a host sync.

    Args:
        expert_index: [T, K], an integer type; ``num_experts`` means "no expert here". Other values out of range are an
            error on CPU and not checked on a device, where the check would stop the stream.

    Raises:
        ValueError: not [T, K], not of an integer type, or (on CPU) an index out of range.

    Source: sort-by-expert as in ScatterMoE (arXiv 2403.08245).
    """
    if expert_index.ndim != 2 or expert_index.is_floating_point() or expert_index.dtype == torch.bool:
        raise ValueError(
            f"expert_index must be an integer tensor [T, K], got {expert_index.dtype} {tuple(expert_index.shape)}"
        )
    device = expert_index.device
    is_compiling = torch.compiler.is_compiling()
    if device.type == "cuda" and has_triton() and not is_compiling:
        from raymoe.kernels.plan_triton import plan_triton

        return plan_triton(expert_index, num_experts)
    if device.type == "cpu" and not is_compiling:
        return _plan_cpu(expert_index, num_experts)
    num_tokens, top_k = expert_index.shape
    expert, order = expert_index.reshape(-1).to(torch.int64).sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=device)
    offsets = torch.searchsorted(expert, bounds, out_int32=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
    token = torch.div(order, max(top_k, 1), rounding_mode="trunc")
    return Plan(order, token, expert, inverse.view(num_tokens, top_k), offsets)


def _plan_cpu(expert_index: Tensor, num_experts: int) -> Plan:
    """In NumPy, whose calls take a third of torch's time for a few rows, and whose radix sort half of it for many."""
    num_tokens, top_k = expert_index.shape
    given = expert_index.reshape(-1).numpy()
    if given.size and not 0 <= given.min() <= given.max() <= num_experts:
        raise ValueError(
            f"expert_index holds values from {given.min()} to {given.max()}, "
            f"but there are {num_experts} experts; use 0 to {num_experts - 1}, or {num_experts} for no expert"
        )
    order = given.astype(np.uint16 if num_experts < 1 << 16 else np.uint32).argsort(kind="stable")
    expert = given[order].astype(np.int64, copy=False)
    offsets = expert.searchsorted(_numbers(num_experts + 1)).astype(np.int32)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    sorted_rows = (order, order // max(top_k, 1), expert, inverse.reshape(num_tokens, top_k), offsets)
    return Plan(*map(torch.from_numpy, sorted_rows))


@lru_cache
def _numbers(count: int) -> np.ndarray:
    return np.arange(count)


def real_rows(plan: Plan) -> int | None:
    """How many rows have an expert, where the host may read it for nothing: not on a device, not in a compiled graph."""
    if plan.offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return int(plan.offsets[-1])


def has_expert(plan: Plan) -> Tensor:
    """bool [S]: whether a sorted row has an expert."""
    return plan.expert < plan.num_experts


def row_places(ends: list[int], experts: list[int]) -> slice | Tensor:
    """Sorted rows of these experts, in their order: a slice where they follow one another. `ends` is a plan's offsets."""
    if all(ends[a + 1] == ends[b] for a, b in pairwise(experts)):
        return slice(ends[experts[0]], ends[experts[-1] + 1])
    return torch.tensor([row for e in experts for row in range(ends[e], ends[e + 1])])
