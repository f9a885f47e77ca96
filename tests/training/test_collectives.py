"""Sparse collectives and token exchange between real processes, against what they stand for written out."""

import numpy as np
import torch

from raymoe.models import moe_layers
from raymoe.placement import LayerPlan
from raymoe.training.dispatch import exchange, gather_sum, make_routes, spread
from raymoe.training.shard import ExpertShard
from raymoe.training.sparse import Transfers, sparse_all_gather, sparse_reduce_scatter
from tests.tiny_models import tiny_model
from tests.training.ranks import run_ranks

NUM_EXPERTS = 8
SIZE = 3


def random_plan(seed: int, density: float) -> LayerPlan:
    rng = np.random.default_rng(seed)
    owners = rng.integers(0, SIZE, NUM_EXPERTS)
    copies = (rng.random((NUM_EXPERTS, SIZE)) < density).astype(np.uint8)
    copies[np.arange(NUM_EXPERTS), owners] = 1
    return LayerPlan(owners, copies)


def expert_value(expert: int, numel: int) -> torch.Tensor:
    return torch.arange(numel, dtype=torch.float32) % 97 + 1000 * expert


def gather_and_scatter(join, rank, seeds):
    layer = moe_layers(tiny_model("olmoe"))[0]
    numel = layer.layout.numel
    world = join()
    wrong = []
    for seed, density in seeds:
        plan = random_plan(seed, density)
        shard = ExpertShard(layer, np.flatnonzero(plan.owners == rank).tolist(), torch.float32, torch.device("cpu"))
        for slot, expert in enumerate(shard.owned):
            shard.pool[slot] = expert_value(expert, numel)
        transfers = Transfers.of(plan, rank)
        sparse_all_gather(shard, transfers, world).wait()
        here = np.flatnonzero(plan.copies[:, rank]).tolist()
        if sorted(shard.slots) != here:
            wrong.append((seed, "held", sorted(shard.slots), here))
        for expert, slot in shard.slots.items():
            if not torch.equal(shard.pool[slot], expert_value(expert, numel)):
                wrong.append((seed, "gathered", expert))
            # integers: the sum at the owner is exact whatever its order
            shard.gradient[slot] = (rank + 1) * expert_value(expert, numel)
        sparse_reduce_scatter(shard, transfers, world).wait()
        for slot, expert in enumerate(shard.owned):
            factor = sum(holder + 1 for holder in np.flatnonzero(plan.copies[expert]))
            if not torch.equal(shard.gradient[slot], factor * expert_value(expert, numel)):
                wrong.append((seed, "summed", expert))
    return wrong, dict(world.moved_bytes)


def test_copies_arrive_and_gradients_sum_at_the_owner():
    seeds = [(seed, density) for seed in range(4) for density in (0.0, 0.3, 1.0)]
    results = run_ranks(SIZE, gather_and_scatter, seeds)
    assert [wrong for wrong, _ in results] == [[]] * SIZE
    layer = moe_layers(tiny_model("olmoe"))[0]
    num_copies = sum(int(random_plan(*seed).extra_copies().sum()) for seed in seeds)
    for kind in ("sparse_all_gather", "sparse_reduce_scatter"):
        assert sum(moved[kind] for _, moved in results) == num_copies * layer.layout.numel * 4


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
        if not torch.allclose(rows.grad, factor.expand_as(rows), rtol=1e-12, atol=0):
            wrong.append((seed, "gradient"))
    return wrong


def test_tokens_travel_once_a_rank_and_come_home_summed():
    cases = [(0, (7, 5, 6)), (1, (0, 9, 1)), (2, (1, 0, 0))]
    assert run_ranks(SIZE, send_tokens, cases) == [[]] * SIZE
