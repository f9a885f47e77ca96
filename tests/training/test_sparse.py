"""Every transport of the sparse collectives between real processes, against what it stands for written out."""

import dataclasses
import time
from collections import Counter
from functools import reduce
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from raymoe.training.sparse import TRANSPORTS, Moves, PointToPoint, transport, warm_up
from raymoe.training.sparse.point_to_point import P2P
from tests.training.ranks import run_ranks

NODES = {1: [(0,)], 2: [(0, 0), (0, 1)], 3: [(0, 0, 1), (0, 1, 0), (0, 1, 2)]}
NODES[4] = [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (0, 1, 1, 1), (0, 0, 0, 0), (0, 1, 2, 3)]


@dataclasses.dataclass(frozen=True)
class Case:
    nodes: tuple[int, ...]
    owners: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]
    """Of each expert, the ranks that get a copy, ascending."""
    numel: int
    dtype: torch.dtype
    is_integer: bool

    def moves(self, rank: int) -> Moves:
        extra = np.zeros((len(self.owners), len(self.nodes)), np.uint8)
        for expert, holders in enumerate(self.holders):
            extra[expert, list(holders)] = 1
        return Moves.of(np.array(self.owners, np.int64), extra, rank, self.nodes)

    def here(self, rank: int) -> list[int]:
        """Experts of which the rank has a row: its own and its copies."""
        return [e for e, owner in enumerate(self.owners) if owner == rank or rank in self.holders[e]]

    def row(self, expert: int, rank: int, kind: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * expert + 10 * rank + (kind == "gradient"))
        if self.is_integer:
            # five of these still add up exactly in bf16
            return torch.randint(-20, 21, (self.numel,), generator=generator).to(self.dtype)
        return torch.randn(self.numel, generator=generator, dtype=torch.float64).to(self.dtype)

    def leaders(self) -> dict[tuple[int, int], int]:
        """(expert, remote node) -> the holder there that has the fewest experts to lead so far, then the lowest."""
        led: Counter[int] = Counter()
        leaders = {}
        for expert, holders in enumerate(self.holders):
            for node in sorted({self.nodes[h] for h in holders} - {self.nodes[self.owners[expert]]}):
                there = [h for h in holders if self.nodes[h] == node]
                leaders[expert, node] = min(there, key=lambda h: (led[h], h))
                led[leaders[expert, node]] += 1
        return leaders

    def summed(self, expert: int, name: str) -> torch.Tensor:
        """The sum at the owner, addend by addend."""
        own = self.owners[expert]
        gradients = {rank: self.row(expert, rank, "gradient") for rank in (own, *self.holders[expert])}
        addends = [gradients[own]]
        if name == "hierarchical":
            near = [h for h in self.holders[expert] if self.nodes[h] == self.nodes[own]]
            addends += [gradients[h] for h in near]
            for (led, node), leader in sorted(self.leaders().items()):
                if led == expert:
                    others = [h for h in self.holders[expert] if self.nodes[h] == node and h != leader]
                    addends.append(reduce(torch.add, [gradients[h] for h in (leader, *others)]))
        else:
            addends += [gradients[h] for h in self.holders[expert]]
        return reduce(torch.add, addends)

    def crossings(self, name: str) -> tuple[int, int]:
        """Rows sent within nodes and between nodes, each way."""
        pairs = [(self.nodes[self.owners[e]], self.nodes[h]) for e, hs in enumerate(self.holders) for h in hs]
        far = sum(a != b for a, b in pairs)
        if name == "hierarchical":
            far = len(self.leaders())
        return len(pairs) - far, far


@st.composite
def cases(draw, size):
    num_experts = draw(st.integers(1, 9))
    owners = draw(st.lists(st.integers(0, size - 1), min_size=num_experts, max_size=num_experts))
    spread = draw(st.sampled_from(["some", "all", "none"]))
    holders = []
    for owner in owners:
        others = [rank for rank in range(size) if rank != owner]
        if spread == "some" and others:
            others = sorted(draw(st.sets(st.sampled_from(others))))
        holders.append(tuple(others if spread != "none" else []))
    return Case(
        nodes=draw(st.sampled_from(NODES[size])),
        owners=tuple(owners),
        holders=tuple(holders),
        numel=draw(st.sampled_from([1, 7, 64, 1001])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        is_integer=draw(st.booleans()),
    )


def arms() -> list:
    """All transports, and those that cut a reduction into batches with as little room as they take."""
    tight = [
        dataclasses.replace(each, max_temporary_rows=2)
        for each in TRANSPORTS.values()
        if isinstance(each, PointToPoint)
    ]
    return [*TRANSPORTS.values(), *tight]


def filled(case: Case, rank: int, kind: str) -> dict[int, torch.Tensor]:
    """The rank's rows in one pool; before a gather its copies hold rubbish."""
    here = case.here(rank)
    pool = torch.full((len(here), case.numel), torch.nan, dtype=case.dtype)
    for slot, expert in enumerate(here):
        if kind == "gradient" or case.owners[expert] == rank:
            pool[slot] = case.row(expert, rank, kind)
    return {expert: pool[slot] for slot, expert in enumerate(here)}


def dot(rows: dict[int, torch.Tensor], others: dict[int, torch.Tensor]) -> float:
    return sum(float(rows[expert].double() @ others[expert].double()) for expert in rows)


def all_under_way(join, rank, batch):
    """All cases at once, as layers of one model would be: gathers, then reductions backwards."""
    world = join()
    warm_up(world)
    wrong, products, sent = [], [], []
    for each in arms():
        gathered = [filled(case, rank, "parameters") for case in batch]
        gradients = [filled(case, rank, "gradient") for case in batch]
        pending, worlds = [], []
        for case, rows in zip(batch, gathered, strict=True):
            worlds.append(dataclasses.replace(world, nodes=case.nodes, moved_bytes=Counter(), link_bytes=Counter()))
            pending.append(each.gather(case.moves(rank), rows, worlds[-1]))
        for case, rows, place in reversed(list(zip(batch, gradients, worlds, strict=True))):
            pending.append(each.reduce(case.moves(rank), rows, place))
        for one in pending:
            one.wait()
            assert one.poll()
        for number, case in enumerate(batch):
            owned = [expert for expert in case.here(rank) if case.owners[expert] == rank]
            for expert, row in gathered[number].items():
                if not torch.equal(row, case.row(expert, case.owners[expert], "parameters")):
                    wrong.append((each.name, number, "gathered", expert))
            for expert in owned:
                if not torch.equal(gradients[number][expert], case.summed(expert, each.name)):
                    wrong.append((each.name, number, "summed", expert))
            here = dot(gathered[number], filled(case, rank, "gradient"))
            home = dot({expert: gathered[number][expert] for expert in owned}, gradients[number])
            products.append((here, home))
            sent.append((worlds[number].moved_bytes, worlds[number].link_bytes))
    return wrong, products, sent


def check_batch(size: int, batch: list[Case]) -> None:
    wrong, products, sent = zip(*run_ranks(size, all_under_way, batch), strict=True)
    assert list(wrong) == [[]] * size
    runs = [(each.name, case) for each in arms() for case in batch]
    for run, (name, case) in enumerate(runs):
        if case.is_integer:
            # <gather x, y> = <x, reduce y>, each over all ranks, and exact
            assert sum(rank[run][0] for rank in products) == sum(rank[run][1] for rank in products)
        moved, links = (sum((rank[run][part] for rank in sent), Counter()) for part in (0, 1))
        near, far = case.crossings(name)
        row_bytes = case.numel * case.dtype.itemsize
        for kind in ("sparse_all_gather", "sparse_reduce_scatter"):
            assert moved[kind] == (near + far) * row_bytes, (name, case)
        assert (links["near"], links["far"]) == (2 * near * row_bytes, 2 * far * row_bytes), (name, case)


@pytest.mark.parametrize(("size", "num_batches"), [(1, 1), (2, 3), (3, 5), (4, 5)])
def test_any_placement_by_any_transport(size, num_batches):
    # no shrinking: each try is a run of several processes
    @settings(
        max_examples=num_batches,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.lists(cases(size), min_size=4, max_size=8))
    def check(batch):
        check_batch(size, batch)

    check()


EVERYWHERE = Case((0, 0, 1, 1), (0,) * 9, ((1, 2, 3),) * 9, 33, torch.float32, False)


def test_one_owner_of_all_and_ranks_that_own_nothing():
    nobody = dataclasses.replace(EVERYWHERE, holders=((),) * 9)
    check_batch(4, [EVERYWHERE, nobody, dataclasses.replace(EVERYWHERE, dtype=torch.bfloat16), EVERYWHERE])


def test_an_expert_crosses_to_a_node_once():
    assert EVERYWHERE.crossings("p2p") == (9, 18)
    assert EVERYWHERE.crossings("hierarchical") == (18, 9)
    leaders = [EVERYWHERE.moves(rank).outward_by_node[0] for rank in (2, 3)]
    assert [[message.expert for message in phase] for phase in leaders] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]


def leader_is_busy(join, rank, case):
    world = dataclasses.replace(join(), nodes=case.nodes)
    rows, gradients = filled(case, rank, "parameters"), filled(case, rank, "gradient")
    hierarchical = transport("hierarchical")
    pending = [
        hierarchical.gather(case.moves(rank), rows, world),
        hierarchical.reduce(case.moves(rank), gradients, world),
    ]
    if rank == 1:
        # it leads, and does not come to wait before the others have done so
        dist.barrier(world.dense)
    for one in pending:
        one.wait()
    if rank != 1:
        dist.barrier(world.dense)
    return rows[0], gradients[0]


def test_leaders_pass_on_what_they_get_while_they_compute():
    case = Case((0, 1, 1), (0,), ((1, 2),), 5, torch.float64, True)
    results = run_ranks(3, leader_is_busy, case)
    assert all(torch.equal(row, case.row(0, 0, "parameters")) for row, _ in results)
    assert torch.equal(results[0][1], case.summed(0, "hierarchical"))


def poll_before_and_after(join, rank, case, name):
    world = join()
    rows = filled(case, rank, "parameters")
    if rank == 0:
        dist.barrier(world.dense)
        transport(name).gather(case.moves(rank), rows, world).wait()
        return []
    pending = transport(name).gather(case.moves(rank), rows, world)
    seen = [pending.poll(), pending.poll()]
    dist.barrier(world.dense)
    until = time.monotonic() + 20
    while not pending.poll() and time.monotonic() < until:
        time.sleep(0.001)
    return [*seen, pending.poll(), torch.equal(rows[0], case.row(0, 0, "parameters"))]


@pytest.mark.parametrize("name", TRANSPORTS)
def test_poll_says_when_rows_are_there(name):
    case = Case((0, 1), (0,), ((1,),), 5, torch.float32, False)
    assert run_ranks(2, poll_before_and_after, case, name)[1] == [False, False, True, True]


def only_one_asks(join, rank, case):
    world = join()
    polled = []
    if rank == 0:
        for each in TRANSPORTS.values():
            for call in (each.gather, each.reduce):
                pending = call(case.moves(rank), {}, world)
                polled.append(pending.poll())
                pending.wait()
    # the next transfer still finds its messages on both sides
    some = dataclasses.replace(case, holders=((1,),))
    rows = filled(some, rank, "parameters")
    transport("p2p").gather(some.moves(rank), rows, world).wait()
    return polled, dict(world.moved_bytes), rows[0]


def test_no_copies_no_communication():
    case = Case((0, 1), (0,), ((),), 5, torch.float32, False)
    (polled, moved, _), (_, _, row) = run_ranks(2, only_one_asks, case)
    assert polled == [True] * 6
    assert moved == {"sparse_all_gather": 20}
    assert torch.equal(row, case.row(0, 0, "parameters"))


def count_temporary_rows(join, rank, case):
    world = join()
    with mock.patch.object(torch, "empty_like", wraps=torch.empty_like) as empty:
        transport("p2p").reduce(case.moves(rank), filled(case, rank, "gradient"), world).wait()
    return empty.call_count


def test_an_owner_of_many_copies_keeps_few_rows():
    assert run_ranks(4, count_temporary_rows, EVERYWHERE) == [8, 0, 0, 0]


def peer_leaves(join, rank, case, name):
    world = join()
    if rank == 1:
        dist.barrier(world.dense)
        return ""
    pending = transport(name).gather(case.moves(rank), filled(case, rank, "parameters"), world)
    dist.barrier(world.dense)
    with pytest.raises(RuntimeError):
        pending.wait()
    with pytest.raises(RuntimeError) as error:
        pending.wait()
    assert pending.poll()
    return type(error.value).__name__


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_rank_that_leaves_is_an_error_to_who_waits(name):
    case = Case((0, 1, 1), (0, 2), ((1, 2), (0, 1)), 5, torch.float32, False)
    results = run_ranks(3, peer_leaves, case, name)
    assert all(results[rank] for rank in (0, 2))


def test_what_does_not_fit_is_refused():
    owners, extra = np.array([0, 1]), np.array([[0, 1], [0, 0]], np.uint8)
    nodes = (0, 1)
    with pytest.raises(ValueError, match=r"owners must be int64 \[E\], got float64 \[2\]"):
        Moves.of(owners * 1.0, extra, 0, nodes)
    with pytest.raises(ValueError, match=r"extra must be uint8 \[2, 3\] .* got uint8 \[2, 2\]"):
        Moves.of(owners, extra, 0, (0, 1, 1))
    with pytest.raises(ValueError, match=r"owners\[1\] is 2: there are 2 ranks"):
        Moves.of(np.array([0, 2]), extra, 0, nodes)
    with pytest.raises(ValueError, match=r"extra\[1, 1\] is the owner's entry"):
        Moves.of(owners, np.eye(2, dtype=np.uint8)[::-1] | np.array([[0, 0], [0, 1]], np.uint8), 0, nodes)
    with pytest.raises(ValueError, match="rank 2 is not one of the 2 ranks"):
        Moves.of(owners, extra, 2, nodes)
    with pytest.raises(ValueError, match="no transport 'tree'; there are p2p, a2a, hierarchical"):
        transport("tree")
    with pytest.raises(ValueError, match="max_temporary_rows is 1; it must be at least 2"):
        dataclasses.replace(P2P, max_temporary_rows=1)
    moves = Moves.of(owners, extra, 1, nodes)
    world = mock.Mock()
    for each in TRANSPORTS.values():
        with pytest.raises(ValueError, match=r"rows lacks expert 0, which rank 1 holds a copy of; it has \[1\]"):
            each.gather(moves, {1: torch.zeros(3)}, world)
