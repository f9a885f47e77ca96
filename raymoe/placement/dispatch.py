"""Which rank computes each routed row. R = sending ranks, S = routed rows, E = experts, D = ranks.

Where an expert has several copies, the plan's word says how its rows are shared:

- ``local``: a copy on the row's own rank takes it; else the copies on its node share; else all copies. Source: the dispatch
  rule of arXiv 2502.02581.
- ``node``: the copies on the row's node share; else all copies. Source: LAER-MoE (arXiv 2602.11686), lite routing.
- ``even``: all copies share, wherever they are.
- ``capacity``: every copy takes the same share of all ranks' rows, and each rank keeps its own first. Needs every rank's
  counts. Source: Lazarus (arXiv 2407.04656), Algorithm 1; rounding, and matching within nodes first, are ours.
- ``level``: the copies' shares even out what ranks compute in all, experts without copies included; each rank keeps its
  own rows first, as above. Our own: ``capacity`` evens out copies, so what a rank computes besides stays on top.

A share is whole rows: they differ by one at the most. Ranks and experts start at different copies, else every rank would
send its odd row to the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raymoe.placement.cluster import ClusterSpec
from raymoe.placement.plan import Dispatch, LayerPlan

_POURS = 8
"""Rounds of levelling, at the most."""

GLOBAL_DISPATCH: frozenset[Dispatch] = frozenset({"capacity", "level"})
"""The words that need every rank's counts."""


class DispatchTable:
    """How some ranks share their rows of each expert in one layer and step; not for ``GLOBAL_DISPATCH``.

    Args:
        ranks: the sending ranks, [R].

    Raises:
        ValueError: the plan is for another number of ranks than the cluster has, or a rank is not one of them.
    """

    def __init__(self, layer_plan: LayerPlan, ranks: list[int], cluster: ClusterSpec, dispatch: Dispatch = "local"):
        num_devices = cluster.num_devices
        if layer_plan.num_devices != num_devices or not all(0 <= rank < num_devices for rank in ranks):
            raise ValueError(
                f"ranks {ranks} of a cluster of {num_devices} cannot dispatch by a plan for {layer_plan.num_devices}"
            )
        if dispatch in GLOBAL_DISPATCH:
            raise ValueError(f"dispatch {dispatch!r} needs the counts of all ranks: use dispatch_counts")
        rank_R = np.asarray(ranks, dtype=np.int64)
        holds_ED = layer_plan.copies.astype(bool)
        shares_RED = np.broadcast_to(holds_ED, (len(ranks), *holds_ED.shape))
        if dispatch in ("local", "node"):
            near_RED = shares_RED & (cluster.nodes == cluster.nodes[rank_R][:, None])[:, None, :]
            shares_RED = np.where(near_RED.any(axis=2, keepdims=True), near_RED, shares_RED)
        if dispatch == "local":
            here_RED = holds_ED & (np.arange(num_devices) == rank_R[:, None])[:, None, :]
            shares_RED = np.where(here_RED.any(axis=2, keepdims=True), here_RED, shares_RED)
        self._num_RE = shares_RED.sum(axis=2, dtype=np.int64)
        start_RE = (rank_R[:, None] + np.arange(layer_plan.num_experts)) % self._num_RE
        turn_RED = (np.cumsum(shares_RED, axis=2, dtype=np.int64) - 1 - start_RE[..., None]) % self._num_RE[..., None]
        self._shares_RED = shares_RED
        self._turn_RED = turn_RED

    def counts(self, rows_RE: np.ndarray) -> np.ndarray:
        """Rows of each sender and expert that each rank gets: int64 [R, E] -> int64 [R, E, D]."""
        each_RE, odd_RE = np.divmod(rows_RE, self._num_RE)
        return self._shares_RED * (each_RE[..., None] + (self._turn_RED < odd_RE[..., None]))


def dispatch_counts(
    rows_DE: np.ndarray,
    layer_plan: LayerPlan,
    cluster: ClusterSpec,
    dispatch: Dispatch = "local",
    ranks: list[int] | None = None,
) -> np.ndarray:
    """Rows of each sender and expert that each rank gets.

    Args:
        rows_DE: int64 [D, E], rows that each rank routed.
        ranks: the senders that are asked for, [R]; None: all, R = D.

    Returns:
        int64 [R, E, D]: from, expert, to. Its sum over the last axis is those senders' ``rows_DE``.

    Raises:
        ValueError: rows of another shape than the plan's ranks and experts.
    """
    rows_DE = np.asarray(rows_DE, dtype=np.int64)
    if rows_DE.shape != (layer_plan.num_devices, layer_plan.num_experts):
        raise ValueError(
            f"rows are {list(rows_DE.shape)}, the plan is for {layer_plan.num_devices} ranks x "
            f"{layer_plan.num_experts} experts"
        )
    senders = list(range(cluster.num_devices)) if ranks is None else ranks
    if dispatch in GLOBAL_DISPATCH:
        room_DE = (_even_room if dispatch == "capacity" else level_room)(rows_DE.sum(axis=0), layer_plan.copies)
        return _matched(rows_DE, room_DE, cluster, np.asarray(senders, dtype=np.int64))
    return DispatchTable(layer_plan, senders, cluster, dispatch).counts(rows_DE[senders])


def assign(expert_index: np.ndarray, counts_ED: np.ndarray) -> np.ndarray:
    """The rank of each routed row of one sender, without a loop over rows or experts.

    Args:
        expert_index: integers [S], expert of each row in arrival order, in [0, E]; E means "no expert here".
        counts_ED: int64 [E, D], this sender's rows that each rank gets; the expert's first rows go to the lowest rank.

    Returns:
        int64 [S]: rank of each row, -1 for rows without an expert.

    Raises:
        ValueError: not 1-D integers, an index outside [0, E], or counts that are not those of ``expert_index``.
    """
    num_experts, num_devices = counts_ED.shape
    expert_S = np.asarray(expert_index)
    if expert_S.ndim != 1 or not np.issubdtype(expert_S.dtype, np.integer):
        raise ValueError(f"expert_index must be integers [S], got {expert_S.dtype} {expert_S.shape}")
    if expert_S.size and (expert_S.min() < 0 or expert_S.max() > num_experts):
        raise ValueError(
            f"expert_index goes from {expert_S.min()} to {expert_S.max()}, but there are {num_experts} experts "
            f"(and {num_experts} for rows without one)"
        )
    wanted_E = np.bincount(expert_S, minlength=num_experts + 1)[:-1]
    given_E = counts_ED.sum(axis=1)
    if (wanted_E != given_E).any():
        expert = int(np.flatnonzero(wanted_E != given_E)[0])
        raise ValueError(f"counts_ED gives expert {expert} {given_E[expert]} rows, expert_index {wanted_E[expert]}")
    # numpy sorts 16-bit integers by radix: several times faster than its stable sort of int64
    keys = expert_S.astype(np.uint16) if num_experts < 1 << 16 else expert_S
    order = np.argsort(keys, kind="stable")
    rank_S = np.full(expert_S.size, -1, dtype=np.int64)
    num_routed = int(wanted_E.sum())
    rank_S[order[:num_routed]] = np.repeat(np.tile(np.arange(num_devices), num_experts), counts_ED.ravel())
    return rank_S


def _even_room(rows_E: np.ndarray, copies_ED: np.ndarray) -> np.ndarray:
    """Rows that each copy takes if an expert's copies take equally many: int64 [D, E]."""
    holds_DE = copies_ED.T.astype(np.int64)
    num_E = holds_DE.sum(axis=0)
    each_E, odd_E = np.divmod(rows_E, num_E)
    turn_DE = (np.cumsum(holds_DE, axis=0) - 1 - np.arange(num_E.size) % num_E) % num_E
    return holds_DE * (each_E + (turn_DE < odd_E))


def level_room(rows_E: np.ndarray, copies_ED: np.ndarray) -> np.ndarray:
    """Rows that each copy takes if ranks are to compute equally many in all: int64 [D, E].

    Experts on some of the ranks are poured one by one on top of all the others, hottest first, again and again: what one
    of them leaves free another can take in the next round. Those that are everywhere fill up what is left together.
    """
    num_devices = copies_ED.shape[1]
    num_E = copies_ED.sum(axis=1, dtype=np.int64)
    room_DE = np.zeros((num_devices, rows_E.size), dtype=np.int64)
    single = np.flatnonzero(num_E == 1)
    room_DE[copies_ED[single].argmax(axis=1), single] = rows_E[single]
    load_D = room_DE.sum(axis=1)
    partial = np.flatnonzero((num_E > 1) & (num_E < num_devices) & (rows_E > 0))
    holders = {expert: np.flatnonzero(copies_ED[expert]) for expert in partial.tolist()}
    for _ in range(_POURS):
        most = int(load_D.max())
        for expert in partial[np.argsort(-rows_E[partial], kind="stable")].tolist():
            here = holders[expert]
            load_D[here] -= room_DE[here, expert]
            room_DE[here, expert] = _poured(load_D[here], int(rows_E[expert]))
            load_D[here] += room_DE[here, expert]
        if load_D.max() == most:
            break
    everywhere = np.flatnonzero(num_E == num_devices) if num_devices > 1 else np.empty(0, dtype=np.int64)
    amount = int(rows_E[everywhere].sum())
    if amount:
        # every expert in proportion, cut at whole rows: sums over ranks are exact, and what experts round off evens out
        end_D = np.cumsum(_poured(load_D, amount))
        odd_E = np.arange(everywhere.size) * amount // everywhere.size
        cut_DE = np.concatenate([np.zeros((1, everywhere.size), dtype=np.int64),
                                 (end_D[:, None] * rows_E[everywhere] + odd_E) // amount])  # fmt: skip
        room_DE[:, everywhere] = np.diff(cut_DE, axis=0)
    return room_DE


def _poured(load_D: np.ndarray, amount: int) -> np.ndarray:
    """What each gets of ``amount`` if it is poured on top of uneven loads like water: int64 [D], in whole rows."""
    order = np.argsort(load_D, kind="stable")
    load = load_D[order]
    # the first k take part if the amount lifts them to the level of the k-th
    wanted = load * np.arange(1, load.size + 1) - np.cumsum(load)
    taking = int(np.searchsorted(wanted, amount, side="right"))
    level, odd = divmod(amount + int(load[:taking].sum()), taking)
    poured = np.zeros_like(load_D)
    poured[order[:taking]] = level - load[:taking] + (np.arange(taking) < odd)
    return poured


def _matched(rows_DE: np.ndarray, room_DE: np.ndarray, cluster: ClusterSpec, sender_R: np.ndarray) -> np.ndarray:
    """What senders send whom to fill the room: own rows stay as far as they fit, the rest finds its place on the node first.

    What is over and what is free lie on one line each, per expert: where they overlap says who sends what. int64 [R, E, D]
    """
    kept_DE = np.minimum(rows_DE, room_DE)
    over_DE, free_DE = rows_DE - kept_DE, room_DE - kept_DE
    counts = np.zeros((len(sender_R), rows_DE.shape[1], rows_DE.shape[0]), dtype=np.int64)
    counts[np.arange(len(sender_R)), :, sender_R] = kept_DE[sender_R]
    for node in np.unique(cluster.nodes[sender_R]).tolist():
        on_node = np.flatnonzero(cluster.nodes == node)
        [here] = np.nonzero(cluster.nodes[sender_R] == node)
        over = _Line.of(over_DE[on_node]).pick(np.searchsorted(on_node, sender_R[here]))
        sends = over.overlap(_Line.of(free_DE[on_node]))
        counts[here[:, None], :, on_node[None, :]] += sends.transpose(0, 2, 1)
    sent_DE, taken_DE = within_nodes(over_DE, free_DE, cluster)
    return counts + _Line.of(over_DE - sent_DE).pick(sender_R).overlap(_Line.of(free_DE - taken_DE))


def within_nodes(over_DE: np.ndarray, free_DE: np.ndarray, cluster: ClusterSpec) -> tuple[np.ndarray, np.ndarray]:
    """What of it stays on the rank's node if that comes first: (sent, taken), int64 [D, E] each.

    Args:
        over_DE: int64 [D, E], rows that a rank cannot keep.
        free_DE: int64 [D, E], rows that its copy can take of others.
    """
    sent_DE, taken_DE = np.zeros_like(over_DE), np.zeros_like(free_DE)
    for node in range(cluster.num_nodes):
        on_node = np.flatnonzero(cluster.nodes == node)
        over, free = _Line.of(over_DE[on_node]), _Line.of(free_DE[on_node])
        sent_DE[on_node] = over.within(free.end[-1])
        taken_DE[on_node] = free.within(over.end[-1])
    return sent_DE, taken_DE


@dataclass(frozen=True)
class _Line:
    """Amounts of ranks end to end on a line, per expert: int64 [R, E]."""

    begin: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, amount_RE: np.ndarray) -> _Line:
        end = np.cumsum(amount_RE, axis=0)
        return cls(end - amount_RE, end)

    def pick(self, index: np.ndarray) -> _Line:
        return _Line(self.begin[index], self.end[index])

    def within(self, length_E: np.ndarray) -> np.ndarray:
        """What of each amount lies on the line's first part: [R, E]."""
        return np.minimum(self.end, length_E) - np.minimum(self.begin, length_E)

    def overlap(self, other: _Line) -> np.ndarray:
        """What of each amount lies beside each of another line's: [R, E, C]."""
        end = np.minimum(self.end[:, :, None], other.end.T[None])
        begin = np.maximum(self.begin[:, :, None], other.begin.T[None])
        return np.maximum(end - begin, 0)
