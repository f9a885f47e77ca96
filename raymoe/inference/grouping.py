"""Which requests share a step, so that the step wants few experts that are not resident. Pure numpy.

R requests, L MoE layers, E experts a layer. A request's path is the set of experts that its next token is expected to want;
`paths` holds them as bool or uint8 [R, L, E], in order of arrival. Groups are index arrays: every request is in exactly one
of them, and all groups hold `size` requests but one, which holds what is left.

After ExpertFlow's token scheduler (arXiv 2410.17954): balanced k-medoids on routing paths, and a greedy one of ours. Both
count what the residents already cover, and both return the order of arrival unless the predicted saving beats a margin.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Groups = list[NDArray[np.intp]]

_LEAST_SAVING = 1e-3
"""Of the largest expert's bytes: above the rounding of float32 sums, so that exchanges come to an end."""


def arrival(num_requests: int, size: int) -> Groups:
    """First come, first served."""
    order = np.arange(num_requests)
    return [order[start : start + size] for start in range(0, num_requests, size)]


def cost(
    groups: Sequence[ArrayLike], paths: NDArray, *, residents: NDArray | None = None, expert_bytes: ArrayLike = 1
) -> int:
    """Bytes to fetch when each group meets the same residents: over groups and layers, the wanted experts that are missing.

    Args:
        groups: index arrays into `paths`; they need not cover it.
        residents: bool [L, E]; None: nothing is resident.
        expert_bytes: of one expert, or [L] of one expert of each layer.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    words, weight = _pack(paths, residents, expert_bytes)
    return round(_cost([np.asarray(group, dtype=np.intp) for group in groups], words, weight))


def greedy(
    paths: NDArray,
    size: int,
    *,
    residents: NDArray | None = None,
    expert_bytes: ArrayLike = 1,
    waited: ArrayLike | None = None,
    margin: float = 0.0,
) -> Groups:
    """Each group starts with the request that has waited longest, and takes those that add the fewest missing bytes.

    Args:
        size: requests a group may hold, at least 1.
        residents, expert_bytes: as in `cost`.
        waited: [R], steps each request has waited; None: they have all waited equally. Ties go to the earlier arrival.
        margin: share of the bytes of the order of arrival that must be saved for it to be left.

    Returns:
        The groups, in the order in which they were made: the longest wait is in the first. At worst they cost as much as
        the order of arrival, and never more than `size` times the least possible.

    Raises:
        ValueError: shapes that do not fit each other, a size below 1.
    """
    _check_size(size)
    words, weight = _pack(paths, residents, expert_bytes)
    order = _longest_wait_first(len(words), waited)
    groups: Groups = []
    while len(order):
        chosen = _fill(words[order], weight, [0], size)
        groups.append(np.sort(order[chosen]))
        is_left = np.ones(len(order), dtype=bool)
        is_left[chosen] = False
        order = order[is_left]
    return _unless_arrival_is_as_good(groups, size, words, weight, margin)


def pick(
    paths: NDArray,
    size: int,
    *,
    fixed: Sequence[int] = (),
    residents: NDArray | None = None,
    expert_bytes: ArrayLike = 1,
) -> NDArray[np.intp]:
    """One group, around requests that belong to it anyway: the request that adds the fewest missing bytes comes next.

    Args:
        fixed: requests that are in the group, at most `size`; none: it starts with the one that misses the fewest bytes.

    Returns:
        int [min(size, R)], `fixed` first, then the others as they were added.
    """
    _check_size(size)
    words, weight = _pack(paths, residents, expert_bytes)
    return np.array(_fill(words, weight, list(fixed), size), dtype=np.intp)


def kmedoids(
    paths: NDArray,
    size: int,
    *,
    residents: NDArray | None = None,
    expert_bytes: ArrayLike = 1,
    margin: float = 0.0,
    seed: int = 0,
    max_rounds: int = 30,
) -> Groups:
    """ExpertFlow's balanced k-medoids on the Hamming distance of paths, then exchanges of two requests while one saves bytes.

    Requests that find their nearest group full go to the nearest medoid with room (the published code compares them with
    another sample instead of the medoid). The exchanges are ours: the distance is only a stand-in for the union.

    Args:
        residents, expert_bytes: as in `cost`; residents count for nothing in the distance either.
        margin: as in `greedy`.
        seed: of the first medoids; the same seed gives the same groups.
        max_rounds: of each of the two phases.

    Returns:
        The groups. If no phase ran into `max_rounds`, no exchange of two requests between two of them would cost less.

    Raises:
        ValueError: shapes that do not fit each other, a size below 1.
    """
    _check_size(size)
    words, weight = _pack(paths, residents, expert_bytes)
    plain = arrival(len(words), size)
    if len(plain) < 2:
        return plain
    bits, relative = _unpack(words, weight)
    label = _cluster(bits, relative, np.array([len(group) for group in plain]), seed, max_rounds)
    weighted = bits * relative
    for _ in range(max_rounds):
        if not _exchange(label, bits, weighted):
            break
    groups = [np.flatnonzero(label == group) for group in range(len(plain))]
    return _unless_arrival_is_as_good(groups, size, words, weight, margin)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")


def _pack(paths: NDArray, residents: NDArray | None, expert_bytes: ArrayLike) -> tuple[NDArray, NDArray]:
    """Missing experts as bits, uint64 [R, L * ceil(E / 64)], and the bytes that a bit of each word stands for, float64."""
    if paths.ndim != 3:
        raise ValueError(f"paths must be [requests, layers, experts], got shape {paths.shape}")
    num_requests, num_layers, num_experts = paths.shape
    if residents is not None and residents.shape != (num_layers, num_experts):
        raise ValueError(
            f"residents must be {(num_layers, num_experts)}, [layers, experts], got shape {residents.shape}"
        )
    each = np.asarray(expert_bytes, dtype=np.float64)
    if each.shape not in ((), (num_layers,)):
        raise ValueError(
            f"expert_bytes must be one number or one for each of {num_layers} layers, got shape {each.shape}"
        )
    num_words = -(-num_experts // 64)
    octets = np.zeros((num_requests, num_layers, num_words * 8), dtype=np.uint8)
    octets[..., : -(-num_experts // 8)] = np.packbits(paths.astype(bool, copy=False), axis=-1)
    if residents is not None:
        octets[..., : -(-num_experts // 8)] &= ~np.packbits(residents.astype(bool, copy=False), axis=-1)
    words = octets.view(np.uint64).reshape(num_requests, num_layers * num_words)
    return words, np.repeat(np.broadcast_to(each, num_layers), num_words)


def _unpack(words: NDArray, weight: NDArray) -> tuple[NDArray, NDArray]:
    """Missing experts as float32 [R, F] for matrix products, and their relative bytes, float32 [F].

    Left out are experts that fewer than two requests want: every grouping pays for them alike.
    """
    bits = np.unpackbits(words.view(np.uint8), axis=1)
    is_shared = bits.sum(axis=0, dtype=np.intp) > 1
    relative = np.repeat(weight / max(weight.max(initial=0.0), 1.0), 64)[is_shared]
    return bits[:, is_shared].astype(np.float32), relative.astype(np.float32)


def _bytes(words: NDArray, weight: NDArray) -> NDArray:
    """Bytes of the experts in [..., W] -> float64 [...]; exact, as whole numbers below 2^53 are."""
    return np.bitwise_count(words).astype(np.float64) @ weight


def _cost(groups: Groups, words: NDArray, weight: NDArray) -> float:
    unions = [np.bitwise_or.reduce(words[group], axis=0) for group in groups]
    return float(_bytes(np.array(unions), weight).sum()) if unions else 0.0


def _unless_arrival_is_as_good(groups: Groups, size: int, words: NDArray, weight: NDArray, margin: float) -> Groups:
    plain = arrival(len(words), size)
    before = _cost(plain, words, weight)
    return groups if _cost(groups, words, weight) < before * (1.0 - margin) else plain


def _longest_wait_first(num_requests: int, waited: ArrayLike | None) -> NDArray[np.intp]:
    if waited is None:
        return np.arange(num_requests)
    waits = np.asarray(waited)
    if waits.shape != (num_requests,):
        raise ValueError(f"waited must have one entry for each of {num_requests} requests, got shape {waits.shape}")
    return np.argsort(-waits, kind="stable")


def _fill(missing: NDArray, weight: NDArray, members: list[int], size: int) -> list[int]:
    """Rows of a group that starts with `members`; the first row wins a tie. Overwrites `missing` [R, W]."""
    if len(missing) <= size:
        return members + [row for row in range(len(missing)) if row not in members]
    closed = np.zeros(len(missing))
    closed[members] = np.inf
    covered = np.bitwise_or.reduce(missing[members], axis=0)
    # one buffer of each for all rounds: fresh ones would cost as much as the arithmetic
    count, added = np.empty(missing.shape, dtype=np.uint8), np.empty(missing.shape)
    while len(members) < size:
        missing &= ~covered
        np.bitwise_count(missing, out=count)
        np.copyto(added, count)
        chosen = int((added @ weight + closed).argmin())
        members.append(chosen)
        closed[chosen] = np.inf
        covered = missing[chosen]
    return members


def _cluster(bits: NDArray, weight: NDArray, capacity: NDArray, seed: int, max_rounds: int) -> NDArray[np.intp]:
    """Balanced k-medoids on wanted bits [R, F]: the group of each request, int [R]; group g holds exactly capacity[g]."""
    num_requests, num_groups = len(bits), len(capacity)
    common = (bits * weight) @ bits.T
    distance = common.diagonal()[:, None] + common.diagonal()[None] - 2 * common
    medoids = np.random.default_rng(seed).choice(num_requests, num_groups, replace=False)
    label = _assign(distance[:, medoids], capacity)
    for _ in range(max_rounds):
        is_member = label[:, None] == np.arange(num_groups)
        within = np.where(is_member, distance @ is_member.astype(np.float32), np.inf)
        better = within.argmin(axis=0)
        if (better == medoids).all():
            break
        medoids = better
        label = _assign(distance[:, medoids], capacity)
    return label


def _assign(distance: NDArray, capacity: NDArray) -> NDArray[np.intp]:
    """Every request to its nearest medoid with room; a full one keeps its nearest. distance [R, G] -> int [R]."""
    label = np.full(len(distance), -1)
    room = capacity.copy()
    homeless = np.arange(len(distance))
    while len(homeless):
        open_distance = np.where(room > 0, distance[homeless], np.inf)
        nearest = open_distance.argmin(axis=1)
        order = np.lexsort((open_distance.min(axis=1), nearest))
        group = nearest[order]
        rank = np.arange(len(group)) - np.searchsorted(group, group)
        is_kept = rank < room[group]
        label[homeless[order[is_kept]]] = group[is_kept]
        room -= np.bincount(group[is_kept], minlength=len(room))
        homeless = np.sort(homeless[order[~is_kept]])
    return label


def _exchange(label: NDArray, bits: NDArray, weighted: NDArray) -> bool:
    """Makes the best exchanges of two requests, at most one a group, that save bytes; False if there is none."""
    num_groups = int(label.max()) + 1
    wanted_by = (label[:, None] == np.arange(num_groups)).T.astype(np.float32) @ bits
    # what request j adds to group g, and what it adds again because the request i that leaves was the only one to want it
    adds = (weighted @ (wanted_by == 0).astype(np.float32).T)[:, label]
    alone = weighted * (wanted_by == 1)[label]
    adds_again = alone @ bits.T
    saved = adds_again.diagonal()
    change = adds + adds.T + adds_again + adds_again.T - saved[:, None] - saved[None]
    change[label[:, None] == label[None]] = np.inf
    is_changed = False
    while True:
        one, other = divmod(int(change.argmin()), len(bits))
        if change[one, other] > -_LEAST_SAVING:
            return is_changed
        touched = (label == label[one]) | (label == label[other])
        change[touched] = np.inf
        change[:, touched] = np.inf
        label[one], label[other] = label[other], label[one]
        is_changed = True
