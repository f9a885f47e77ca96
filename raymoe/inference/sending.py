"""On a miss: bring the expert, or send its rows to a host that has it, whichever is expected to take less time.

T tokens, K choices per token, S = T*K routed rows, H hidden size.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raymoe.inference.cache import ExpertCache
from raymoe.inference.eviction import LeastRecentlyUsed
from raymoe.inference.ghost import GhostCache
from raymoe.inference.remote import HostSpeed, NodeTier, RemoteExperts, Sent
from raymoe.kernels import Plan

_log = logging.getLogger(__name__)

_FADE = 0.99
"""Of a layer's visit, when the next one's hits are counted."""


@dataclass
class SendStats:
    """What has been decided so far, and how it went."""

    experts: int = 0
    """Whose rows were sent; once a layer and step."""
    rows: int = 0
    bytes: int = 0
    """Of rows, there and back."""
    kept_experts: int = 0
    """That a host could have computed with, but bringing them was expected to be cheaper."""
    failures: int = 0
    """Experts that had to be brought after all, because the host did not answer."""


class _Call(NamedTuple):
    experts: list[int]
    spans: list[tuple[int, int]]
    sent: Sent


class Sending:
    """Decides for each expert that is missing, and sends. Used on the thread that generates.

    An expert that is brought serves later steps too, one that is sent for does not: so bringing costs only the share of a fetch
    that is expected for one use, 1 - h, where h is how often an expert would be found in a cache that always fetches (counted
    on expert ids beside the real cache). Rows go if latency + rows / bandwidth + the host's computation is less than that.
    """

    def __init__(
        self, remote: RemoteExperts, near: NodeTier, cache: ExpertCache, expert_bytes: Sequence[int], num_layers: int
    ):
        """`near`: what is there is never sent for; `expert_bytes`: of one expert, for each MoE layer."""
        self._remote, self._near, self._cache = remote, near, cache
        self._expert_bytes = list(expert_bytes)
        self._num_slots = cache.num_slots
        self._ghost = GhostCache(LeastRecentlyUsed(num_layers, self._num_slots), self._num_slots)
        self._asked, self._missed = 0.0, 0.0
        self.stats = SendStats()

    @property
    def fetch_share(self) -> float:
        """Fetches for each use of an expert, if all that is missing were fetched: 1 - h."""
        return self._missed / self._asked if self._asked else 1.0

    def begin(self, layer: int, hidden: Tensor, routed: Plan, wanted: Sequence[int]) -> list[_Call]:
        """Sends what is cheaper to send of `wanted`, all experts of the layer that have rows. Does not wait."""
        self._note(layer, wanted)
        by_host: dict[int, list[int]] = defaultdict(list)
        for expert in self._cache.absent(layer, wanted):
            if not self._near.holds(layer, expert) and (host := self._remote.holder(layer, expert)) is not None:
                by_host[host].append(expert)
        if not by_host:
            return []
        ends = routed.offsets.tolist()
        calls = []
        for host, experts in by_host.items():
            speed = self._remote.speed(host)
            spans = [(ends[expert], ends[expert + 1]) for expert in experts]
            num_rows = sum(end - start for start, end in spans)
            row_bytes = 2 * num_rows * hidden.shape[1] * hidden.element_size()
            if speed is None or not self._pays(layer, speed, len(experts), num_rows, row_bytes):
                self.stats.kept_experts += len(experts)
                continue
            rows = hidden[_tokens_of(routed, spans)]
            try:
                sent = self._remote.send(host, layer, rows, experts, [end - start for start, end in spans])
            except Exception as error:
                self._failed(experts, error)
                continue
            calls.append(_Call(experts, spans, sent))
            self.stats.experts += len(experts)
            self.stats.rows += num_rows
            self.stats.bytes += row_bytes
        return calls

    def finish(self, calls: Sequence[_Call], out: Tensor) -> list[int]:
        """Waits for what was sent and puts the rows into `out` [S, H] where the plan has them; returns the experts that failed."""
        failed = []
        for experts, spans, sent in calls:
            try:
                rows = sent.wait()
            except Exception as error:
                self._failed(experts, error)
                failed += experts
                continue
            position = 0
            for start, end in spans:
                out[start:end] = rows[position : position + end - start]
                position += end - start
        return sorted(failed)

    def facts(self) -> dict[str, Any]:
        """Plain values for statistics."""
        return {**vars(self.stats), "fetch_share": round(self.fetch_share, 4)}

    def _pays(self, layer: int, speed: HostSpeed, num_experts: int, num_rows: int, row_bytes: int) -> bool:
        compute_s = num_experts * speed.expert_s + num_rows * speed.row_s
        send_s = speed.way.seconds(row_bytes) + compute_s
        # whoever brings an expert computes with it, at about the same speed
        fetch_s = num_experts * speed.way.seconds(self._expert_bytes[layer]) * self.fetch_share + compute_s
        return send_s < fetch_s

    def _note(self, layer: int, wanted: Sequence[int]) -> None:
        if self._cache.num_slots != self._num_slots:
            self._num_slots = self._cache.num_slots
            self._ghost.resize(self._num_slots)
        self._missed = _FADE * self._missed + len(self._ghost.visit(layer, wanted))
        self._asked = _FADE * self._asked + len(wanted)

    def _failed(self, experts: Sequence[int], error: Exception) -> None:
        if not self.stats.failures:
            _log.warning(
                "rows were sent in vain (%s); their experts are brought instead, and more of it only counted", error
            )
        self.stats.failures += len(experts)


def _tokens_of(routed: Plan, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Tokens of these sorted rows."""
    return torch.cat([routed.token[start:end] for start, end in spans])
