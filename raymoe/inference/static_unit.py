"""A unit: sequences that decode side by side in one static batch or several, and leave as they end.

B sequences of a batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import Cache

from raymoe.inference.cache import ExpertCache
from raymoe.inference.counters import CacheCounters
from raymoe.inference.grouping import Groups
from raymoe.inference.static_cache import (
    Place,
    bytes_per_sequence,
    can_exchange,
    exchange,
    keep_rows,
    num_moved,
    settle,
)
from raymoe.inference.static_forward import Forward
from raymoe.inference.static_grouping import UnitScheduler
from raymoe.inference.static_sampling import Choosing, StaticSequence


@dataclass
class UnitCounters:
    """What units have done."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    """Forward passes of a batch that decode; those that read prompts are not counted."""
    regroupings: int = 0
    """Times that batches exchanged sequences, or became fewer."""
    moved_sequences: int = 0
    """Whose keys and values went to another batch."""
    moved_bytes: int = 0
    wanted_experts: int = 0
    """Distinct experts of each decoding pass and layer, summed: / steps is what a step wants."""
    hits: int = 0
    """Of those, the ones that were resident."""
    prompt_bytes: int = 0
    """Fetched from slower tiers while prompts were read."""
    decode_bytes: int = 0
    """While tokens were decoded."""

    def as_row(self) -> dict[str, Any]:
        """Plain values, with the rates that follow from them; None where nothing was decoded."""
        decoded = self.generated_tokens
        return {
            **vars(self),
            "experts_per_step": self.wanted_experts / self.steps if self.steps else None,
            "hit_rate": self.hits / self.wanted_experts if self.wanted_experts else None,
            "bytes_per_token": (self.prompt_bytes + self.decode_bytes) / decoded if decoded else None,
            "decode_bytes_per_token": self.decode_bytes / decoded if decoded else None,
        }


@dataclass
class _Batch:
    sequences: list[StaticSequence]
    width: int
    """Places for a prompt, padding included."""
    cache: Cache | None = None

    @property
    def names(self) -> list[str]:
        return [sequence.name for sequence in self.sequences]


class Unit:
    """Several batches: side by side, exchanging sequences between turns, or one after the other."""

    def __init__(
        self,
        sequences: Sequence[StaticSequence],
        batch_size: int,
        *,
        forward: Forward,
        choosing: Choosing,
        experts: ExpertCache,
        counters: UnitCounters,
        ended: Callable[[Sequence[StaticSequence]], object],
        scheduler: UnitScheduler | None = None,
    ):
        """Nothing is computed yet.

        Args:
            sequences: without new tokens.
            counters: are added to.
            ended: told of sequences that are over.
            scheduler: None, or one that is off: one batch after the other.
        """
        self._forward, self._choosing, self._experts = forward, choosing, experts
        self._counters, self._ended = counters, ended
        starts = range(0, len(sequences), batch_size)
        batches = [list(sequences[start : start + batch_size]) for start in starts]
        # only batches that do the same steps at the same positions can exchange anything
        self._scheduler = scheduler if len(batches) > 1 else None
        self._side_by_side = self._scheduler is not None and self._scheduler.is_on
        widths = [max(len(sequence.prompt) for sequence in batch) for batch in batches]
        if self._side_by_side:
            widths = [max(widths)] * len(widths)
        self._batches = [_Batch(batch, width) for batch, width in zip(batches, widths, strict=True)]

    @property
    def is_live(self) -> bool:
        """Whether a sequence is not over."""
        return bool(self._batches)

    def step(self) -> list[StaticSequence]:
        """Gives every batch its turn, or the first one if they go one after the other; returns the sequences that have ended, in
        the order of the inputs."""
        ended: list[StaticSequence] = []
        if not self._side_by_side:
            ended += self._advance(self._batches[0])
            if self._scheduler is not None:
                self._scheduler.rested()
        elif self._scheduler is not None:
            for batch in self._in_order(self._scheduler):
                for _ in range(self._scheduler.stride if batch.cache is not None else 1):
                    ended += self._advance(batch)
                    if not batch.sequences:
                        break
        self._batches = [batch for batch in self._batches if batch.sequences]
        if self._side_by_side and self._scheduler is not None and len(self._batches) > 1:
            # once off it stays so to the end of the unit: batches would not be at the same positions any more
            self._side_by_side = self._scheduler.is_on
            if self._side_by_side:
                self._regroup(self._scheduler)
        return sorted(ended, key=lambda sequence: sequence.number)

    def close(self) -> None:
        """Lets go of what is not over."""
        self._let_go([sequence for batch in self._batches for sequence in batch.sequences])
        self._batches = []

    def _in_order(self, scheduler: UnitScheduler) -> list[_Batch]:
        if self._batches[0].cache is None or len(self._batches) < 2:
            return self._batches
        return [self._batches[number] for number in scheduler.order([batch.names for batch in self._batches])]

    def _advance(self, batch: _Batch) -> list[StaticSequence]:
        """A token for each sequence of a batch; returns those that have ended, which are no longer in it."""
        before = self._experts.totals()
        if batch.cache is None:
            if self._side_by_side and self._scheduler is not None:
                self._scheduler.routes.prompts([s.prompt for s in batch.sequences], batch.names)
            batch.cache, logits = self._forward.begin(batch.sequences, batch.width)
            if not can_exchange(batch.cache):
                self._side_by_side, self._scheduler = False, None
            self._counters.prompt_tokens += sum(len(sequence.prompt) for sequence in batch.sequences)
            self._counters.prompt_bytes += self._experts.totals().fetched_bytes - before.fetched_bytes
        else:
            logits = self._forward.step(batch.cache, batch.sequences, batch.width)
            self._count(self._experts.totals() - before)
            if self._side_by_side and self._scheduler is not None and len(self._batches) > 1:
                self._scheduler.ran(batch.names, [sequence.number for sequence in batch.sequences])
        self._counters.generated_tokens += len(batch.sequences)
        self._choosing.choose(batch.sequences, logits)
        ended = [sequence for sequence in batch.sequences if sequence.reason is not None]
        if ended:
            self._drop_ended(batch)
            self._let_go(ended)
        if self._side_by_side and self._scheduler is not None and batch.sequences:
            self._scheduler.routes.step_begins([sequence.tokens[-1] for sequence in batch.sequences], batch.names)
        return ended

    def _count(self, done: CacheCounters) -> None:
        counters = self._counters
        counters.steps += 1
        counters.hits += done.hits
        counters.wanted_experts += done.hits + done.late + done.misses
        counters.decode_bytes += done.fetched_bytes

    def _drop_ended(self, batch: _Batch) -> None:
        live = [row for row, sequence in enumerate(batch.sequences) if sequence.reason is None]
        if live:
            assert batch.cache is not None
            keep_rows(batch.cache, live)
        batch.sequences = [batch.sequences[row] for row in live]

    def _let_go(self, sequences: Sequence[StaticSequence]) -> None:
        self._ended(sequences)
        if self._scheduler is not None:
            self._scheduler.routes.ended([sequence.name for sequence in sequences])

    def _regroup(self, scheduler: UnitScheduler) -> None:
        caches = [batch.cache for batch in self._batches if batch.cache is not None]
        places: list[Place] = [(b, row) for b, batch in enumerate(self._batches) for row in range(len(batch.sequences))]
        sizes = [len(batch.sequences) for batch in self._batches]
        each_bytes = bytes_per_sequence(caches[0])

        def moved_bytes(groups: Groups) -> int:
            return num_moved(*settle(sizes, _at(places, groups))) * each_bytes

        groups = scheduler.deal([batch.names for batch in self._batches], moved_bytes)
        if groups is None:
            return
        settled, homes = settle(sizes, _at(places, groups))
        moved = num_moved(settled, homes)
        if not moved:
            return
        dealt = exchange(caches, settled, homes)
        width = self._batches[0].width
        self._batches = [
            _Batch([self._batches[b].sequences[row] for b, row in group], width, cache)
            for group, cache in zip(settled, dealt, strict=True)
        ]
        self._counters.regroupings += 1
        self._counters.moved_sequences += moved
        self._counters.moved_bytes += moved * each_bytes


def _at(places: Sequence[Place], groups: Groups) -> list[list[Place]]:
    return [[places[index] for index in np.asarray(group).tolist()] for group in groups]
