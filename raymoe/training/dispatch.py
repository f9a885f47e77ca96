"""Token dispatch and combine: each routed row goes to a rank that holds its expert, and the results come home.

A token that goes to one rank for several experts travels once, and comes back as one partial sum.
T tokens here, N (token, rank) pairs sent, M pairs received, K choices per token, H hidden size, D ranks.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.training.world import World


@dataclass(frozen=True)
class Routes:
    """Which tokens go to which rank, and how many come from each."""

    token_N: Tensor
    """int64: token of each pair, grouped by rank, tokens ascending within a rank."""
    is_there_NK: Tensor
    """bool: which of the token's choices are computed at the pair's rank."""
    position_TF: Tensor
    """int64: the pairs of each token, in the order of the ranks, F = most ranks a token goes to; N where it has fewer."""
    sends: list[int]
    """Pairs to each rank."""
    receives: list[int]
    """Pairs from each rank."""


def make_routes(rank_TK: Tensor, world: World) -> Routes:
    """Groups the tokens by rank and tells every rank how many will come.

    Args:
        rank_TK: int64 [T, K], the rank of each routed row; -1 where a row has no expert.
    """
    T, K = rank_TK.shape
    goes_TD = torch.zeros(T, world.size + 1, dtype=torch.bool, device=rank_TK.device)
    goes_TD.scatter_(1, rank_TK.where(rank_TK >= 0, world.size), True)
    goes_TD = goes_TD[:, : world.size]
    _, token_N = goes_TD.T.nonzero(as_tuple=True)
    count_D = goes_TD.sum(0)
    received_D = torch.empty_like(count_D)
    dist.all_to_all_single(received_D, count_D, group=world.tokens)
    position_TF = torch.full((T, min(K, world.size)), len(token_N), dtype=torch.int64, device=rank_TK.device)
    pair_TD = goes_TD.T.flatten().cumsum(0).view(world.size, T).T - 1
    turn_TD = goes_TD.cumsum(1) - 1
    token, rank = goes_TD.nonzero(as_tuple=True)
    position_TF[token, turn_TD[token, rank]] = pair_TD[token, rank]
    sends = count_D.tolist()
    to_N = torch.arange(world.size, device=rank_TK.device).repeat_interleave(count_D, output_size=len(token_N))
    return Routes(token_N, rank_TK[token_N] == to_N[:, None], position_TF, sends, received_D.tolist())


def exchange(rows_N: Tensor, sends: list[int], receives: list[int], world: World) -> Tensor:
    """One uneven all-to-all: rows grouped by destination in, rows grouped by source out. Differentiable."""
    return _Exchange.apply(rows_N, sends, receives, world)


def spread(rows_T: Tensor, routes: Routes) -> Tensor:
    """Copies each token's row to each of its pairs: [T, ...] -> [N, ...]. Adjoint of `gather_sum`."""
    return _Spread.apply(rows_T, routes)


def gather_sum(rows_N: Tensor, routes: Routes) -> Tensor:
    """Sums the rows of each token's pairs in the order of the ranks: [N, ...] -> [T, ...]. No atomics."""
    return _GatherSum.apply(rows_N, routes)


def _sum_pairs(rows_N: Tensor, routes: Routes) -> Tensor:
    padded = torch.cat([rows_N, rows_N.new_zeros(1, *rows_N.shape[1:])])
    total = padded[routes.position_TF[:, 0]]
    for position_T in routes.position_TF.unbind(1)[1:]:
        total += padded[position_T]
    return total


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sends: list[int], receives: list[int], world: World) -> Tensor:
        ctx.route = receives, sends, world
        out = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receives, sends, group=world.tokens)
        row_bytes = out.element_size() * math.prod(rows.shape[1:])
        for rank, num_rows in enumerate(sends):
            if rank != world.rank:
                world.sent("all_to_all", rank, num_rows * row_bytes)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Exchange.apply(gradient, *ctx.route), None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return rows[routes.token_N]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _sum_pairs(gradient, ctx.routes), None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return _sum_pairs(rows, routes)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient[ctx.routes.token_N], None
