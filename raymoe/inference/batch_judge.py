"""Whether forming batches by routes pays, judged by the experts that were really used.

A request's tokens, and so its routes, do not depend on the batches it is in. So the work of a window of steps can be dealt
out anew in order of arrival, and what that would have cost is known, not estimated.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_LEAST_SAVED = 0.5
"""Experts a step: less is a share of a handful, and chance."""


class BatchJudge:
    """Starts on probation; on while windows show a gain; off after two without one, for twice as long each time.

    The cost of a step is the experts it uses that a ghost cache, the least recently used per layer with as many slots as the
    real one, does not hold. Ids only: no weights are touched.
    """

    def __init__(self, *, margin: float, window_steps: int, busy_share: float):
        """Nothing is compared yet.

        Args:
            margin: share of the cost that a window must save, and at least half an expert a step: less is chance.
            window_steps: chosen batches that are compared at once; the first rest lasts as long.
            busy_share: if batches in order of arrival use that share of all experts, there is nothing to choose.
        """
        self._margin = margin
        self._window_steps = window_steps
        self._busy_share = busy_share
        self.reset()

    def reset(self) -> None:
        """Back on probation."""
        self.state: Literal["probing", "on", "off"] = "probing"
        self.reason = "not measured yet"
        self._steps: list[tuple[NDArray[np.intp], NDArray[np.bool_]]] = []
        self._slots = 0
        self._failures = 0
        self._rests = 0
        self._rest_steps = 0
        self._ghosts: tuple[_GhostCache, _GhostCache] | None = None
        self._facts: dict[str, float] = {}

    @property
    def is_on(self) -> bool:
        """Whether batches are to be formed by routes."""
        return self.state != "off"

    def rest(self) -> None:
        """A step while it is off."""
        self._rest_steps -= 1
        if self._rest_steps <= 0:
            self.state, self.reason = "probing", "trying again"
            self._failures = 1

    def record(self, arrivals: NDArray[np.intp], taken: NDArray[np.bool_], residents: int) -> None:
        """A step whose batch was chosen.

        Args:
            arrivals: [R], smaller for requests that came earlier.
            taken: bool [R, L, E], the experts that each request's token used.
            residents: experts of all layers that are resident.
        """
        self._steps.append((arrivals, taken))
        self._slots = residents // max(taken.shape[1], 1)
        if len(self._steps) == self._window_steps:
            self._decide()
            self._steps = []

    def stats(self) -> dict[str, Any]:
        """State, its reason, and of the last window: experts a step and the share of the cost saved."""
        return {"state": self.state, "reason": self.reason, **self._facts}

    def _decide(self) -> None:
        live = np.array([taken.any(axis=0) for _, taken in self._steps])
        dealt = _deal(self._steps)
        if self._ghosts is None:
            self._ghosts = _GhostCache(live.shape[1:]), _GhostCache(live.shape[1:])
        cost, plain = (
            sum(ghost.use(union, self._slots) for union in unions)
            for ghost, unions in zip(self._ghosts, (live, dealt), strict=True)
        )
        saved = 1.0 - cost / plain if plain else 0.0
        self._facts = {
            "experts_per_step": float(live.sum() / len(live)),
            "experts_per_step_in_order_of_arrival": float(dealt.sum() / len(dealt)),
            "saved_share": saved,
        }
        if dealt.mean() >= self._busy_share:
            self._turn_off(f"a batch uses {dealt.mean():.0%} of all experts in any order")
        elif saved < self._margin:
            self._fail(f"saved {saved:.1%} of the experts to fetch, less than {self._margin:.1%}")
        elif plain - cost < _LEAST_SAVED * len(self._steps):
            self._fail(f"saved {(plain - cost) / len(self._steps):.2f} experts a step, less than {_LEAST_SAVED:g}")
        else:
            self.state, self.reason = "on", f"saves {saved:.1%} of the experts to fetch"
            self._failures = self._rests = 0

    def _fail(self, reason: str) -> None:
        self._failures += 1
        self.reason = reason
        if self._failures >= 2:
            self._turn_off(reason)

    def _turn_off(self, reason: str) -> None:
        self.state, self.reason = "off", reason
        self._rest_steps = self._window_steps << min(self._rests, 10)
        self._rests += 1


def _deal(steps: list[tuple[NDArray[np.intp], NDArray[np.bool_]]]) -> NDArray[np.bool_]:
    """Unions bool [steps, L, E] of the same work in order of arrival.

    Each place of a batch works through request after request; n steps deal the n-th part of the work each, and no request
    meets itself, as it has at most one token a step (McNaughton's wrap-around rule, Management Science 6(1), 1959).
    """
    arrivals = np.concatenate([numbers for numbers, _ in steps])
    work = np.concatenate([taken for _, taken in steps])[np.argsort(arrivals, kind="stable")]
    return np.array([work[step :: len(steps)].any(axis=0) for step in range(len(steps))])


class _GhostCache:
    def __init__(self, shape: tuple[int, ...]):
        self._last_use = np.zeros(shape, dtype=np.int64)
        self._step = 0

    def use(self, union: NDArray[np.bool_], slots: int) -> int:
        """The experts of `union` [L, E] that are not among the `slots` last used ones of their layer."""
        num_experts = union.shape[1]
        missing = union
        if slots >= num_experts:
            missing = union & (self._last_use == 0)
        elif slots > 0:
            oldest = np.partition(self._last_use, num_experts - slots, axis=1)[:, num_experts - slots, None]
            missing = union & ((self._last_use < oldest) | (self._last_use == 0))
        self._step += 1
        # told apart by expert, as a cache holds `slots` of them and no more
        ticks = self._step * num_experts + np.arange(num_experts)
        np.copyto(self._last_use, np.broadcast_to(ticks, union.shape), where=union)
        return int(missing.sum())
