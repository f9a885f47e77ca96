"""Nobody waits too long: which of more requests than a step holds must run now, so that all the others still can in time."""

from collections.abc import Callable, Sequence

Prefer = Callable[[Sequence[int], list[int], int], list[int]]
"""(candidates, chosen, size) -> chosen, grown to min(size, all) requests by some of the candidates that it does not hold yet."""


def first_come(candidates: Sequence[int], chosen: list[int], size: int) -> list[int]:
    """The `Prefer` of first come, first served: candidates are numbered in order of arrival."""
    rest = sorted(set(candidates) - set(chosen))
    return chosen + rest[: max(size - len(chosen), 0)]


def must_run(waited: Sequence[int], size: int, max_wait: int, prefer: Prefer) -> list[int]:
    """The fewest requests that have to run in this step so that no request ever waits longer than `max_wait` steps.

    Deadlines are feasible if, for every s, at most (s + 1) * size requests have to run within s + 1 steps: what is too much
    for the steps that follow has to run now. With at most (max_wait + 1) * size requests that holds for good, whatever else
    runs; with more, those that are late are served as they can be.

    Args:
        waited: steps that each request has waited since it ran last.
        size: requests a step holds.
        max_wait: at least 0.
        prefer: picks among requests that are equally fit.

    Returns:
        Indices into `waited`, at most `size`.
    """
    slack = [max(max_wait - steps, 0) for steps in waited]
    chosen: list[int] = []
    for steps in sorted(set(slack)):
        due = [request for request, left in enumerate(slack) if left <= steps]
        served = sum(slack[request] <= steps for request in chosen)
        need = len(due) - served - steps * size
        if need > 0:
            chosen = prefer(due, chosen, min(len(chosen) + need, size))
    return chosen
