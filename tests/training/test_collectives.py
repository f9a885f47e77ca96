"""Token exchange between real processes, against what it stands for written out."""

import torch

from raymoe.training.dispatch import exchange, gather_sum, make_routes, spread
from tests.training.ranks import run_ranks

SIZE = 3


def send_tokens(join, rank, cases):
    world = join()
    wrong = []
    for seed, num_tokens in cases:
        generator = torch.Generator().manual_seed(10 * seed + rank)
        # rank r has num_tokens[r] tokens; some rows have no expert
        ranks_TK = torch.randint(-1, world.size, (num_tokens[rank], 4), generator=generator)
        rows = torch.randn(num_tokens[rank], 5, generator=generator, dtype=torch.float64, requires_grad=True)
        routes = make_routes(ranks_TK, world)
        away = exchange(spread(rows, routes), routes.sends, routes.receives, world)
        home = gather_sum(exchange(away * (rank + 2), routes.receives, routes.sends, world), routes)
        factor = torch.zeros(num_tokens[rank], 1, dtype=torch.float64)
        for token in range(num_tokens[rank]):
            factor[token] = sum(there + 2 for there in set(ranks_TK[token].tolist()) - {-1})
        if not torch.allclose(home, rows * factor, rtol=1e-12, atol=0):
            wrong.append((seed, "value"))
        home.backward(torch.ones_like(home))
        assert rows.grad is not None
        if not torch.allclose(rows.grad, factor.expand_as(rows), rtol=1e-12, atol=0):
            wrong.append((seed, "gradient"))
    return wrong


def test_tokens_travel_once_a_rank_and_come_home_summed():
    cases = [(0, (7, 5, 6)), (1, (0, 9, 1)), (2, (1, 0, 0))]
    assert run_ranks(SIZE, send_tokens, cases) == [[]] * SIZE
