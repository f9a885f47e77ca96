"""Predictions at work: told what each layer wants, ahead of it to the cache, and only for as long as that pays.

L MoE layers, E experts, T tokens of a step, K choices per token, H hidden size.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymoe.inference.cache import ExpertCache
from raymoe.inference.eviction import EvictionPolicy, Key
from raymoe.inference.ghost import GhostCache
from raymoe.inference.predictors import Judge, Predictor, Quality, WindowCost, combine
from raymoe.telemetry import metrics

_THRESHOLD = 0.5
_LEAST = 0.02


@dataclass
class _Arm:
    """A predictor, what it says of the visits to come, and what that was worth."""

    predictor: Predictor
    quality: Quality
    judge: Judge = field(default_factory=Judge)
    said: dict[int, Tensor] = field(default_factory=dict)
    spent_s: float = 0.0
    useful: int = 0
    """Experts of the window that it named, that were wanted, and that demand-only caching had not."""
    useless: int = 0
    """That it named and nobody wanted, and that demand-only caching had not either."""

    def ask(self, call: Callable[..., dict[int, Tensor]], *args: Any) -> Iterable[int]:
        """Hears the predictor's answer; returns the layers it is about."""
        began_s = time.perf_counter()
        answer = call(*args)
        self.spent_s += time.perf_counter() - began_s
        self.quality.predicted(answer)
        self.said |= answer
        return answer


class Foresight:
    """Asks predictors, merges what they say, and passes it on as expectations and wishes. Everything on the generation thread,
    except `ended`.

    Nothing is believed unseen. Each predictor is judged by window against demand-only caching on the same ids: by the seconds
    of fetching that heeding it would have saved, less those that it would have wasted and those that it took to answer. All
    together are judged by what the cache did: bytes and stall a token, against a ghost of the same slots and policy that fetches
    on demand only. Who does not pay is not asked for 4, 8, 16.. windows, and then tried again.
    """

    def __init__(
        self,
        cache: ExpertCache,
        predictors: Sequence[Predictor],
        *,
        num_experts: Sequence[int],
        expert_bytes: Sequence[int],
        policy: Callable[[int, int], EvictionPolicy],
        fetch_s: float,
        window_steps: int = 32,
    ):
        """Nothing is predicted in the first window: there is nothing to compare with yet.

        Args:
            num_experts: of each MoE layer.
            expert_bytes: of an expert of each layer, as tiers deliver them.
            policy: makes the ghost's eviction policy from (layers, slots): that of the cache.
            fetch_s: seconds that fetching an expert takes, until it is seen.
            window_steps: steps after which everyone is judged.
        """
        self._cache = cache
        self._num_experts, self._expert_bytes = list(num_experts), list(expert_bytes)
        self._arms = [_Arm(predictor, Quality(expert_bytes)) for predictor in predictors]
        self._judge = Judge()
        self._ghost = GhostCache(policy(len(num_experts), cache.num_slots), cache.num_slots)
        self._ghost_slots = cache.num_slots
        self._window_steps, self._fetch_s = window_steps, fetch_s
        self._ended: deque[str] = deque()
        self._merged: dict[int, np.ndarray] = {}
        self._heard: list[_Arm] = []
        self._steps = self._tokens = self._ghost_misses = 0
        self._ghost_bytes = 0
        self._stall_share = 1.0
        self._before = cache.totals()

    def step_begins(self, token_ids: Tensor, requests: Sequence[str]) -> None:
        """As `Predictor.step_begins`: token_ids int64 [T], and whose each of them is."""
        while self._ended:
            request = self._ended.popleft()
            for arm in self._arms:
                arm.predictor.forget(request)
        if self._steps == self._window_steps:
            self._judge_window()
        self._steps += 1
        self._tokens += len(requests)
        is_asking = self._is_tight and self._judge.is_on
        self._heard = [arm for arm in self._arms if arm.judge.is_on] if is_asking else []
        self._publish(
            {layer for arm in self._heard for layer in arm.ask(arm.predictor.step_begins, token_ids, requests)}
        )

    def routed(self, layer: int, hidden: Tensor, expert_index: Tensor, wanted: Sequence[int]) -> None:
        """A layer's router has decided: hidden [T, H] that entered the MoE layer, expert_index int64 [T, K], and the distinct
        experts in it."""
        if not self._is_tight or self._judge.is_resting:
            return
        resident = {expert for expert in range(self._num_experts[layer]) if (layer, expert) in self._ghost.resident}
        missing = self._ghost.visit(layer, wanted)
        self._ghost_misses += len(missing)
        self._ghost_bytes += len(missing) * self._expert_bytes[layer]
        if not self._heard:
            return
        self._settle(layer, resident, wanted)
        self._merged.pop(layer, None)
        self._publish({about for arm in self._heard for about in arm.ask(arm.predictor.routed, layer, hidden, expert_index)},
                      after=layer)  # fmt: skip

    def ended(self, request: str) -> None:
        """A request is over. From any thread."""
        self._ended.append(request)

    def report(self) -> dict[str, Any]:
        """Whether predictions move anything, why, and the quality of each predictor, as plain values."""
        return {
            **(
                self._judge.report()
                if self._is_tight
                else {"state": "off", "is_on": False, "reason": "all is resident"}
            ),
            "predictors": [
                {
                    "predictor": arm.predictor.name,
                    "state": arm.judge.report()["state"],
                    "reason": arm.judge.report()["reason"],
                    "precision": arm.quality.total.precision,
                    "recall": arm.quality.total.recall,
                    "byte_recall": arm.quality.total.byte_recall,
                    "wasted_bytes": arm.quality.total.wasted_bytes,
                }
                for arm in self._arms
            ],
        }

    @property
    def _is_tight(self) -> bool:
        return self._cache.num_slots < self._cache.num_experts

    def _settle(self, layer: int, resident: set[int], wanted: Sequence[int]) -> None:
        truth = torch.zeros(self._num_experts[layer], dtype=torch.bool)
        truth[list(wanted)] = True
        for arm in self._heard:
            arm.quality.settled(layer, truth)
            said = arm.said.pop(layer, None)
            if said is None:
                continue
            named = set((said >= _THRESHOLD).nonzero().flatten().tolist()) - resident
            right = named.intersection(wanted)
            arm.useful += len(right)
            arm.useless += len(named) - len(right)

    def _publish(self, layers: set[int], after: int = -1) -> None:
        """Merges anew what is said of these layers, and tells the cache."""
        if layers:
            merged = combine(
                [{layer: arm.said[layer] for layer in layers if layer in arm.said} for arm in self._heard],
                [arm.quality.weight for arm in self._heard],
            )
            self._merged |= {layer: probability.numpy(force=True) for layer, probability in merged.items()}
        for layer in layers:
            probability = self._merged[layer]
            likely = np.flatnonzero(probability > _LEAST)
            self._cache.expect(layer, dict(zip(likely.tolist(), probability[likely].tolist(), strict=True)))
        if self._cache.reads_ahead:
            self._cache.wish(self._wishes(after))

    def _wishes(self, after: int) -> list[Key]:
        """What is likely wanted, in the order in which layers are visited from now on."""
        num_layers = len(self._num_experts)
        keys: list[Key] = []
        for layer in sorted(self._merged, key=lambda layer: (layer - after - 1) % num_layers):
            probability = self._merged[layer]
            order = np.argsort(-probability, kind="stable")
            keys += [(layer, expert) for expert in order[: int((probability >= _THRESHOLD).sum())].tolist()]
        return keys

    def _judge_window(self) -> None:
        now = self._cache.totals()
        done = now - self._before
        self._before = now
        tokens = max(self._tokens, 1)
        spent_s = sum(arm.spent_s for arm in self._arms)
        if done.demand_reads:
            self._fetch_s = done.demand_read_s / done.demand_reads
        if not self._judge.is_on and done.demand_read_s:
            # several readers work at once: what a read costs the computation is less than it takes
            self._stall_share = min(1.0, done.stall_s / done.demand_read_s)
        miss_s = self._fetch_s * self._stall_share
        ghost = WindowCost(self._ghost_bytes / tokens, self._ghost_misses * miss_s / tokens)
        # a window in which nobody was asked only brings the next one nearer
        if self._heard or not self._judge.is_on:
            self._judge.window(WindowCost(done.fetched_bytes / tokens, (done.stall_s + spent_s) / tokens), ghost)
        for arm in self._arms:
            if arm.judge.is_on and arm not in self._heard:
                continue
            heeded_s = (self._ghost_misses - arm.useful + arm.useless) * miss_s + arm.spent_s
            arm.judge.window(WindowCost(0.0, heeded_s / tokens), WindowCost(0.0, ghost.stall_s_per_token))
            arm.spent_s, arm.useful, arm.useless = 0.0, 0, 0
            arm.said.clear()
            _tell(arm)
        metrics.SERVE_PREDICTOR_HEEDED_RATIO.set(float(self._judge.is_on), predictor="all")
        if not (self._judge.is_on and any(arm.judge.is_on for arm in self._arms)):
            self._merged.clear()
            self._cache.wish([])
        self._steps = self._tokens = self._ghost_misses = self._ghost_bytes = 0
        if self._ghost_slots != self._cache.num_slots:
            self._ghost_slots = self._cache.num_slots
            self._ghost.resize(self._ghost_slots)


def _tell(arm: _Arm) -> None:
    name, window = arm.predictor.name, arm.quality.window
    metrics.SERVE_PREDICTOR_HEEDED_RATIO.set(float(arm.judge.is_on), predictor=name)
    metrics.SERVE_PREDICTOR_PRECISION_RATIO.set(window.precision, predictor=name)
    metrics.SERVE_PREDICTOR_RECALL_RATIO.set(window.recall, predictor=name)
