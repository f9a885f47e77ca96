"""Where experts come from when they are not in the cache: the tiers below it, the fastest first."""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from statistics import median_low
from typing import Any, Protocol

import torch
from torch import Tensor

from raymoe.inference.tier_rate import TierRate, measure
from raymoe.models import ExpertFiles

_log = logging.getLogger(__name__)

_PATIENCE = 3
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 60.0
_RECENT_READS, _FEWEST_READS = 9, 3
"""Reads that a tier is judged by; with fewer than the second number it is not judged slow."""
_CLEARLY, _NOISE_S = 0.6, 2e-4
"""What a tier takes of another's time, but for this much, when it is asked before it: less is no reason to change the order."""
_FRESH_S = 60.0
"""After so long without a read nobody knows how fast a tier is, and it is tried again."""


class ExpertSource(Protocol):
    """A tier that holds experts of the model. Called from several threads at once."""

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """Fills the flat `out` [numel of that layer's experts] with one expert, cast to its dtype.

        Returns:
            Bytes that the tier delivered.

        Raises:
            NotHeld: it does not have this expert (now); the next tier is asked, and nothing is wrong.
            Exception: anything else is a failure; `out` then holds anything.
        """
        ...


class NotHeld(LookupError):
    """The tier does not have that expert."""


class TierError(ValueError):
    """No tier could deliver an expert; says what each of them answered."""


class CheckpointTier:
    """The checkpoint's own files: the last tier, always there."""

    def __init__(self, files: ExpertFiles):
        self._files = files

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        return self._files.read(layer, expert, out)

    def probe(self, layer: int, expert: int, num_bytes: int) -> None:
        """A request of a few bytes of an expert, so that `measure` can tell latency from bandwidth."""
        self._files.probe(layer, expert, num_bytes)

    def facts(self) -> dict[str, Any]:
        """How the files are read (direct | dropped | cached, see `RangeReader`), and what the device was asked for."""
        return self._files.reader.facts()


@dataclass
class TierStats:
    """What a tier has done so far."""

    name: str
    rate: TierRate | None = None
    """As measured at the start; None: it was not."""
    reads: int = 0
    """Experts delivered."""
    bytes: int = 0
    seconds: float = 0.0
    """Spent on what it delivered, summed over threads."""
    absent: int = 0
    """Experts that it did not have."""
    failures: int = 0
    passed_over: int = 0
    """Experts it was not asked for because it failed several times in a row, and rests."""
    last_error: str | None = None


@dataclass
class _Tier:
    source: ExpertSource
    stats: TierStats
    failed_in_a_row: int = 0
    """Reads that had begun before an earlier one of them failed are not counted: they met the same fault."""
    failed_s: float = -inf
    """When the last one counted failed."""
    rests_until_s: float = 0.0
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_READS))
    """Of the last reads that delivered."""
    last_s: float = 0.0
    """When that was."""

    def is_clearly_faster(self, other: "_Tier", now_s: float) -> bool:
        """By their last reads, of which one that was held up does not count; never than one that is to be tried."""
        if not self.recent_s or len(other.recent_s) < _FEWEST_READS or now_s - other.last_s >= _FRESH_S:
            return False
        return median_low(self.recent_s) + _NOISE_S < _CLEARLY * median_low(other.recent_s)


class Tiers:
    """Several tiers as one, the fastest first. Safe to use from several threads.

    They are asked in the order given, but one whose last reads took clearly less time, from `measure` on, comes before those that
    took more. A tier that was not measured, because it held nothing yet, or has not been read for a minute, keeps its place:
    that measures it.

    A tier that fails is answered for by the next one; each kind of failure is logged once. One that fails 3 times in a row (reads
    that were under way at once count as one) is left alone for a second, then two, up to a minute, so that a dead host does not
    cost its timeout at every expert. The last one given is never left alone.
    """

    def __init__(self, tiers: Mapping[str, ExpertSource]):
        """`tiers`: by the name that logs and statistics use, the one that is expected to be fastest first."""
        if not tiers:
            raise ValueError("tiers: there must be at least one, the checkpoint's files")
        self._tiers = [_Tier(source, TierStats(name)) for name, source in tiers.items()]
        self._lock = threading.Lock()
        self._logged: set[tuple[str, type]] = set()

    def read(self, layer: int, expert: int, out: Tensor) -> int:
        """Fills `out` from the fastest tier that can; see `ExpertSource.read`.

        Raises:
            TierError: none of them can.
        """
        answers = []
        for tier in self._order():
            if tier is not self._tiers[-1] and time.monotonic() < tier.rests_until_s:
                with self._lock:
                    tier.stats.passed_over += 1
                answers.append(f"{tier.stats.name}: rests after {tier.stats.last_error}")
                continue
            begin_s = time.monotonic()
            try:
                moved_bytes = tier.source.read(layer, expert, out)
            except NotHeld:
                with self._lock:
                    tier.stats.absent += 1
                answers.append(f"{tier.stats.name}: does not have it")
            except AssertionError:
                raise
            except Exception as error:
                self._failed(tier, layer, expert, error, begin_s)
                answers.append(f"{tier.stats.name}: {error}")
            else:
                took_s = time.monotonic() - begin_s
                with self._lock:
                    tier.failed_in_a_row = 0
                    tier.stats.reads += 1
                    tier.stats.bytes += moved_bytes
                    tier.stats.seconds += took_s
                    self._took(tier, took_s)
                return moved_bytes
        raise TierError(f"expert {expert} of MoE layer {layer}: no tier could deliver it ({'; '.join(answers)})")

    def measure(
        self, numel: Sequence[int], num_experts: Sequence[int], dtype: torch.dtype, *, limit_s: float = 0.3
    ) -> dict[str, TierRate]:
        """Measures every tier, `limit_s` seconds for all together, and keeps the rates in their statistics.

        A tier that fails or holds nothing has no rate; the failure is logged.
        """
        rates = {}
        for tier in self._tiers:
            begin_s = time.monotonic()
            try:
                rate = measure(tier.source, numel, num_experts, dtype, limit_s=limit_s / len(self._tiers))
            except LookupError:
                continue
            except Exception as error:
                self._failed(tier, -1, -1, error, begin_s)
                continue
            with self._lock:
                tier.stats.rate = rates[tier.stats.name] = rate
                tier.recent_s.clear()
                for _ in range(min(rate.reads, _FEWEST_READS)):
                    self._took(tier, rate.read_s)
        return rates

    def stats(self) -> list[TierStats]:
        """Of every tier, in the order given."""
        with self._lock:
            return [replace(tier.stats) for tier in self._tiers]

    def facts(self) -> dict[str, dict[str, Any]]:
        """What tiers say of themselves, by name."""
        return {t.stats.name: facts() for t in self._tiers if (facts := getattr(t.source, "facts", None)) is not None}

    def _order(self) -> list[_Tier]:
        if len(self._tiers) == 1:
            return self._tiers
        now_s = time.monotonic()
        found: list[_Tier] = []
        with self._lock:
            for tier in self._tiers:
                place = len(found)
                while place and tier.is_clearly_faster(found[place - 1], now_s):
                    place -= 1
                found.insert(place, tier)
        return found

    def _took(self, tier: _Tier, seconds: float) -> None:
        if time.monotonic() - tier.last_s >= _FRESH_S:
            tier.recent_s.clear()
        tier.recent_s.append(seconds)
        tier.last_s = time.monotonic()

    def _failed(self, tier: _Tier, layer: int, expert: int, error: Exception, began_s: float) -> None:
        cause = (tier.stats.name, type(error))
        with self._lock:
            tier.stats.failures += 1
            tier.stats.last_error = f"{type(error).__name__}: {error}"
            if began_s >= tier.failed_s:
                tier.failed_s = time.monotonic()
                tier.failed_in_a_row += 1
                if tier.failed_in_a_row >= _PATIENCE:
                    rest_s = min(_FIRST_REST_S * 2.0 ** (tier.failed_in_a_row - _PATIENCE), _LONGEST_REST_S)
                    tier.rests_until_s = tier.failed_s + rest_s
            is_new = cause not in self._logged
            self._logged.add(cause)
        if is_new:
            where = f"expert {expert} of MoE layer {layer}" if layer >= 0 else "measuring it"
            _log.warning(
                "tier '%s' failed (%s): %s; the next tier answers, and more failures of this kind are only counted",
                tier.stats.name, where, tier.stats.last_error,
            )  # fmt: skip
