"""Which requests are in the next step. Importing it registers the scheduler "raymoe" with transformers.

First come, first served, decoding before reading prompts; requests of a higher priority first. Where a model has many
experts and more requests than a step holds, more of them are let in than one step holds, and those that want the same
experts run together. A request keeps its own pages of the KV cache, so nothing is copied, and its tokens do not depend on it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from raymoe.inference.batch_judge import BatchJudge
from raymoe.inference.fairness import Prefer, first_come, must_run
from raymoe.inference.grouping import cost, kmedoids, pick
from raymoe.inference.routes import Paths, Routes

SCHEDULER = "raymoe"


@dataclass(frozen=True)
class GroupingOptions:
    """How batches are formed by routes.

    Raises:
        ValueError: a value out of range; names it.
    """

    method: Literal["greedy", "kmedoids"] = "greedy"
    """The first is the quicker one; the second is ExpertFlow's."""
    max_wait_steps: int = 16
    """Steps that a request which has its prompt read may be left out in a row, as long as the KV cache has room for it."""
    max_active: int | None = None
    """Requests that may have their prompts read and wait for a step; None: four times what a step holds. Their whole length
    must fit the KV cache, so that none is thrown out for another."""
    max_requests: int | None = None
    """Requests a step holds, if fewer than the engine's."""
    margin: float = 0.02
    """Share of the bytes to fetch that a batch must be expected to save, and that must be seen to be saved."""
    window_steps: int = 32
    """Steps after which is judged whether it pays."""
    busy_share: float = 0.9
    """If batches use that share of all experts in any order, there is nothing to choose."""

    def __post_init__(self):
        if self.method not in ("greedy", "kmedoids"):
            raise ValueError(f"method must be 'greedy' or 'kmedoids', got {self.method!r}")
        for name in ("max_wait_steps", "max_active", "max_requests", "window_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("margin", "busy_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")


@dataclass
class _Seat:
    """A request whose prompt has been read."""

    number: int
    waited: int = 0


class TokenScheduler(FIFOScheduler):
    """First come, first served until `group_by` says what routes are known by. Used on the generation thread alone."""

    def __init__(self, cache: PagedAttentionCache, safety_margin: float | None, max_requests_per_batch: int):
        # before the rest: it ends with a reset
        self._routes: Routes | None = None
        self._options = GroupingOptions()
        self._expert_bytes: ArrayLike = 1
        super().__init__(cache, safety_margin, max_requests_per_batch)

    def reset(self) -> None:
        super().reset()
        self.rows: Sequence[str] = ()
        """Whose row each row of the step's batch is, in the order in which transformers packs them."""
        self._seats: dict[str, _Seat] = {}
        self._numbers = itertools.count()
        self._longest_wait = 0
        self._is_chosen = False
        self._chosen_steps = 0
        self._compared: list[str] = []
        self._judge = _judge_of(self._options)

    def group_by(
        self, routes: Routes | None, options: GroupingOptions | None = None, *, expert_bytes: ArrayLike = 1
    ) -> None:
        """Forms batches by routes from now on; before the first request, as transformers constructs the scheduler.

        Args:
            routes: None: first come, first served.
            expert_bytes: of one expert, or [L] of one expert of each layer.
        """
        self._routes = routes
        self._options = options or GroupingOptions()
        self._expert_bytes = expert_bytes
        self._judge = _judge_of(self._options)
        if self._options.max_requests is not None:
            self.max_requests_per_batch = min(self.max_requests_per_batch, self._options.max_requests)

    @property
    def is_crowded(self) -> bool:
        """Whether more requests are active than a step holds: only then do routes matter."""
        return len(self.active_requests) > self.max_requests_per_batch

    def stats(self) -> dict[str, Any]:
        """Whether batches are formed by routes and why, and what came of it, as plain values."""
        if self._routes is None:
            grouping: dict[str, Any] = {"state": "off", "reason": "no routes are known"}
        else:
            grouping = self._judge.stats()
        return {**grouping, "chosen_steps": self._chosen_steps, "longest_wait_steps": self._longest_wait}

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        # transformers 5.23: when the KV cache was full it lets no waiting request in before a running one has finished; if
        # they are all cancelled instead, it would wait for ever
        if not self.active_requests:
            self.block_new_requests = False
        return super().schedule_batch(token_budget, cache_budget)

    def _process_candidates(
        self,
        candidates: list[RequestState],
        token_budget: int,
        cache_budget: int,
        request_ids_to_remove_from_waiting: set[str],
    ) -> tuple[list[FutureRequestState], bool, bool, int, int]:
        self._learn()
        arranged = self._arrange(candidates)
        outcome = super()._process_candidates(arranged, token_budget, cache_budget, request_ids_to_remove_from_waiting)
        self._note([state for state in candidates if state.status == RequestStatus.DECODING], outcome[0])
        return outcome

    def _learn(self) -> None:
        """Tells the judge what the last chosen batch has used."""
        if self._routes is None:
            return
        if not self._judge.is_on:
            self._judge.rest()
        elif self._compared:
            numbers = np.array([self._seats[request_id].number for request_id in self._compared])
            residents = int(self._routes.residents().sum())
            self._judge.record(numbers, self._routes.taken(self._compared), residents)
        self._compared = []

    def _arrange(self, candidates: list[RequestState]) -> list[RequestState]:
        """Candidates in the order in which they are to get places, tokens and pages; some may be left out."""
        self._is_chosen = False
        decoding = [state for state in candidates if state.status == RequestStatus.DECODING]
        entering = [state for state in candidates if state.status != RequestStatus.DECODING]
        is_grouping = self._routes is not None and self._judge.is_on
        priorities = sorted({_priority(state) for state in candidates}, reverse=True)
        size = self.max_requests_per_batch
        if len(priorities) < 2 and not is_grouping and len(decoding) <= size:
            return candidates
        # outside the margin transformers stops at the first prompt, and drops who stands behind it
        if self.cache.compute_free_capacity() < self.safety_margin:
            entering = []
        entering = self._admissible(entering, self._active_limit(is_grouping))
        decoding.sort(key=self._number)
        waited = [self._waited(state) for state in decoding]
        prefer: Prefer = first_come
        if is_grouping and len(decoding) > size:
            # a prompt uses nearly all experts: the best step for those who suit no other batch
            prefer = _by_wait(waited) if entering else self._by_routes(decoding, waited)
        chosen = must_run(waited, size, self._options.max_wait_steps, prefer)
        reading: list[RequestState] = []
        for priority in priorities:
            left = size - len(chosen) - len(reading)
            mine = [i for i, state in enumerate(decoding) if _priority(state) == priority and i not in chosen]
            prompts = [state for state in entering if _priority(state) == priority]
            # half of the places at most are taken from those who decode, as FIFO would never let them be taken
            places = min(len(prompts), max(left - len(mine), (left + 1) // 2))
            reading += prompts[:places]
            chosen = prefer(mine, chosen, len(chosen) + min(len(mine), left - places))
        rest = [state for i, state in enumerate(decoding) if i not in set(chosen)]
        return [decoding[i] for i in chosen] + reading + rest

    def _active_limit(self, is_grouping: bool) -> int:
        size = self.max_requests_per_batch
        if not is_grouping:
            return size
        asked = self._options.max_active or 4 * size
        return max(size, min(asked, size * (self._options.max_wait_steps + 1)))

    def _admissible(self, entering: list[RequestState], limit: int) -> list[RequestState]:
        """Of those whose prompts are not read yet: the ones that may start or go on, the highest priority first.

        Lower priorities do not count against the limit: they wait.
        """
        if not entering:
            return []
        size = self.max_requests_per_batch
        active = list(self.active_requests.values())
        room = self.cache.num_sectors * (1.0 - self.safety_margin) - sum(self._sectors(state) for state in active)
        admitted: list[RequestState] = []
        num_new = 0
        for state in sorted(entering, key=_priority, reverse=True):
            if state.request_id not in self.active_requests:
                ahead = sum(_priority(other) >= _priority(state) for other in active) + num_new
                room -= self._sectors(state)
                # up to a full batch it is transformers that decides, as it does for first come, first served
                if ahead >= limit or (ahead >= size and room < 0):
                    break
                num_new += 1
            admitted.append(state)
        return admitted

    def _sectors(self, state: RequestState) -> float:
        """Sectors of the KV cache that a request takes at its longest."""
        length = len(state.initial_tokens) + (state.max_new_tokens or 0)
        return sum(
            allocator.needs_new_blocks("", 0, length) / allocator.blocks_per_sector
            for allocator in self.cache.cache_allocators.values()
        )

    def _by_routes(self, decoding: list[RequestState], waited: Sequence[int]) -> Prefer:
        assert self._routes is not None
        paths = self._routes.paths([state.request_id for state in decoding])
        if not paths.any():
            return first_come
        self._is_chosen = True
        return _ByRoutes(paths, self._routes.residents(), waited, self._options, self._expert_bytes).prefer

    def _note(self, decoding: list[RequestState], scheduled: list[FutureRequestState]) -> None:
        if not scheduled:
            return
        self.rows = [future.state.request_id for future in scheduled for _ in range(future.query_length)]
        running = {future.state.request_id for future in scheduled}
        seats: dict[str, _Seat] = {}
        for state in [future.state for future in scheduled] + decoding:
            if state.status != RequestStatus.DECODING or state.request_id in seats:
                continue
            seat = self._seats.get(state.request_id) or _Seat(next(self._numbers))
            seat.waited = 0 if state.request_id in running else seat.waited + 1
            self._longest_wait = max(self._longest_wait, seat.waited)
            seats[state.request_id] = seat
        self._seats = seats
        if self._is_chosen:
            self._chosen_steps += 1
            self._compared = [future.state.request_id for future in scheduled]

    def _waited(self, state: RequestState) -> int:
        seat = self._seats.get(state.request_id)
        return seat.waited if seat is not None else 0

    def _number(self, state: RequestState) -> float:
        seat = self._seats.get(state.request_id)
        return seat.number if seat is not None else float("inf")


def _longest_wait_first(candidates: Sequence[int], chosen: list[int], waited: Sequence[int]) -> list[int]:
    return sorted(set(candidates) - set(chosen), key=lambda i: (-waited[i], i))


def _by_wait(waited: Sequence[int]) -> Prefer:
    def prefer(candidates: Sequence[int], chosen: list[int], size: int) -> list[int]:
        return chosen + _longest_wait_first(candidates, chosen, waited)[: max(size - len(chosen), 0)]

    return prefer


class _ByRoutes:
    """The `Prefer` of routes: what the chosen want anyway is free, and so is what is resident.

    A batch stays with those who want what is resident until someone has waited half as long as allowed, and then gathers
    round that request: deadlines that come one by one would tear groups apart.
    """

    def __init__(
        self,
        paths: Paths,
        residents: np.ndarray,
        waited: Sequence[int],
        options: GroupingOptions,
        expert_bytes: ArrayLike,
    ):
        self._paths = paths
        self._residents = residents
        self._waited = waited
        self._options = options
        self._expert_bytes = expert_bytes

    def prefer(self, candidates: Sequence[int], chosen: list[int], size: int) -> list[int]:
        plain = first_come(candidates, chosen, size)
        rest = _longest_wait_first(candidates, chosen, self._waited)
        if len(chosen) + len(rest) <= size or len(chosen) >= size:
            return plain
        is_urgent = not chosen and 2 * self._waited[rest[0]] >= self._options.max_wait_steps
        found = self._search(chosen, rest, size, is_urgent)
        before, after = self._cost(plain), self._cost(found)
        return found if after < before * (1.0 - self._options.margin) else plain

    def _search(self, chosen: list[int], rest: list[int], size: int, is_urgent: bool) -> list[int]:
        if self._options.method == "kmedoids":
            known = self._residents | self._paths[chosen].any(axis=0)
            num_places = size - len(chosen)
            groups = kmedoids(self._paths[rest], num_places, residents=known, expert_bytes=self._expert_bytes)
            full = [chosen + [rest[i] for i in group] for group in groups if len(group) == num_places]
            # of equals the first, and that is the one with the longest wait
            full.sort(key=lambda group: rest.index(group[len(chosen)]))
            urgent = [group for group in full if rest[0] in group] if is_urgent else []
            return min(urgent or full, key=self._cost)
        index = np.array(chosen + rest)
        order = pick(
            self._paths[index],
            size,
            fixed=range(len(chosen) + is_urgent),
            residents=self._residents,
            expert_bytes=self._expert_bytes,
        )
        return index[order].tolist()

    def _cost(self, group: list[int]) -> int:
        return cost([group], self._paths, residents=self._residents, expert_bytes=self._expert_bytes)


def _judge_of(options: GroupingOptions) -> BatchJudge:
    return BatchJudge(margin=options.margin, window_steps=options.window_steps, busy_share=options.busy_share)


def _priority(state: RequestState) -> int:
    """Higher goes first; the sampling parameters carry it where there is one."""
    return state.logit_processor_kwargs["sampling"].priority


SCHEDULER_MAPPING[SCHEDULER] = TokenScheduler
