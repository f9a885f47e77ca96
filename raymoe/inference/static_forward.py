"""Forward passes of one static batch: a decoder alone, whose prompts are padded on the left, or an encoder and its decoder,
whose inputs are padded on the right.

Switch counts padding against an expert's capacity, in the order of positions (Fedus et al., arXiv 2101.03961, section 2.2, and
transformers' router): on the right it comes after everything real and takes nothing from it, on the left it would.

B sequences of the batch, T tokens of a forward pass, padding included, K choices per token, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import MoEModelOutput

from raymoe.inference.cache import ExpertCache
from raymoe.inference.decoder_cache import DecoderCache
from raymoe.inference.expert_form import ExpertForm
from raymoe.inference.experts import CachedExperts
from raymoe.inference.foresight import Foresight
from raymoe.inference.static_sampling import StaticSequence
from raymoe.models import MoELayer

Saw = Callable[[int, Sequence[str], Tensor], object]
"""(MoE layer of the decoder, whose row each row is, expert_index [T, K]): the rows of padding are left out."""


class RoutedRows:
    """The runtime behind the model's experts: the cached ones. Padding takes no expert, so that none is fetched for it. Who wants
    to know what the decoder's routers say is told."""

    def __init__(self, cache: ExpertCache, form: ExpertForm, num_encoder_layers: int):
        """`form`: of the experts in the cache's slots, those of an encoder's layers first."""
        self._experts = CachedExperts(cache, form, self._routed)
        self._first = num_encoder_layers
        self._names: list[str] = []
        self._is_real: Tensor | None = None
        num_experts = sum(form.num_experts[num_encoder_layers:])
        self.decoder_cache = DecoderCache(cache, num_encoder_layers, num_experts)
        self.foresight: Foresight | None = None
        """Made with `decoder_cache`."""
        self.saw: Saw | None = None
        """Told of every layer of the decoder, where set."""

    @contextmanager
    def encoding(self, mask: Tensor) -> Iterator[None]:
        """Around an encoder's forward pass; mask [B, S], 0 is padding."""
        self._is_real = _unless_all(mask)
        with self.decoder_cache.encoding():
            yield

    def decoding(self, ids: Tensor, sequences: Sequence[StaticSequence], mask: Tensor | None = None) -> None:
        """The next forward pass is a decoder's: ids int64 [B, S]; mask [B, S], 0 is padding; None: there is none."""
        self._is_real = None if mask is None else _unless_all(mask)
        lengths = [ids.shape[1]] * len(sequences) if mask is None else mask.sum(dim=1).tolist()
        # a list of its own for each pass: routes know a pass by it
        self._names = [s.name for s, length in zip(sequences, lengths, strict=True) for _ in range(int(length))]
        if self.foresight is not None:
            self.foresight.step_begins(self._real(ids.flatten()), self._names)

    def ended(self, sequences: Sequence[StaticSequence]) -> None:
        """They are over."""
        if self.foresight is not None:
            for sequence in sequences:
                self.foresight.ended(sequence.name)

    def __call__(
        self, layer: MoELayer, hidden: Tensor, expert_index: Tensor, expert_weight: Tensor, **scales: Any
    ) -> Tensor:
        """As an `ExpertsRuntime`."""
        if self._is_real is not None:
            expert_index = expert_index.masked_fill(~self._is_real[:, None], layer.num_experts)
        return self._experts(layer, hidden, expert_index, expert_weight, **scales)

    def _routed(self, layer: int, hidden: Tensor, expert_index: Tensor, wanted: list[int]) -> None:
        if layer < self._first:
            return
        expert_index = self._real(expert_index)
        if self.saw is not None:
            self.saw(layer - self._first, self._names, expert_index)
        if self.foresight is not None:
            self.foresight.routed(layer - self._first, self._real(hidden), expert_index, wanted)

    def _real(self, rows: Tensor) -> Tensor:
        return rows if self._is_real is None else rows[self._is_real]


class Forward(Protocol):
    """Runs batches of sequences that have `width` places for a prompt each."""

    def begin(self, sequences: Sequence[StaticSequence], width: int) -> tuple[Cache, Tensor]:
        """Reads the prompts: (their keys and values, logits float32 [B, V] of the first new tokens)."""
        ...

    def step(self, cache: Cache, sequences: Sequence[StaticSequence], width: int) -> Tensor:
        """Computes the last token of each sequence: logits float32 [B, V] of the next one."""
        ...


class DecoderForward:
    """A decoder alone. As in transformers' `generate`: padded on the left, so that all go on at the same place."""

    def __init__(self, model: PreTrainedModel, rows: RoutedRows):
        self._model: Any = model
        self._rows = rows

    @torch.inference_mode()
    def begin(self, sequences: Sequence[StaticSequence], width: int) -> tuple[Cache, Tensor]:
        pad = width - _lengths([s.past for s in sequences], self._model.device)
        mask = (torch.arange(width, device=pad.device) >= pad[:, None]).long()
        ids = _tensor([[0] * (width - len(s.past)) + s.past for s in sequences], self._model.device)
        cache = DynamicCache(config=self._model.config)
        self._rows.decoding(ids, sequences, mask)
        return cache, self._run(ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), cache)

    @torch.inference_mode()
    def step(self, cache: Cache, sequences: Sequence[StaticSequence], width: int) -> Tensor:
        ids = _tensor([[s.tokens[-1]] for s in sequences], self._model.device)
        pad = width - _lengths([s.past for s in sequences], self._model.device)
        num_new = len(sequences[0].tokens)
        mask = (torch.arange(width + num_new, device=pad.device) >= pad[:, None]).long()
        self._rows.decoding(ids, sequences)
        return self._run(ids, mask, (width - pad + num_new - 1)[:, None], cache)

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()


class EncoderDecoderForward:
    """An encoder and its decoder: sequences differ in what was encoded, and are equally far in what they decode."""

    def __init__(self, model: PreTrainedModel, rows: RoutedRows):
        self._model: Any = model
        self._rows = rows

    @torch.inference_mode()
    def begin(self, sequences: Sequence[StaticSequence], width: int) -> tuple[Cache, Tensor]:
        longest = max(len(s.prompt) for s in sequences)
        mask = self._mask(sequences, longest)
        ids = _tensor([s.prompt + [0] * (longest - len(s.prompt)) for s in sequences], self._model.device)
        with self._rows.encoding(mask):
            hidden = self._model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        # batches exchange sequences, so what is kept of them is equally long in all
        hidden = F.pad(hidden, (0, 0, 0, width - longest))
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return cache, self._decode(cache, sequences, hidden)

    @torch.inference_mode()
    def step(self, cache: Cache, sequences: Sequence[StaticSequence], width: int) -> Tensor:
        # its keys and values are in the cache, and only its shape is looked at any more
        stand_in = torch.zeros(1, 1, 1, device=self._model.device, dtype=self._model.dtype)
        return self._decode(cache, sequences, stand_in.expand(len(sequences), width, -1))

    def _decode(self, cache: Cache, sequences: Sequence[StaticSequence], hidden: Tensor) -> Tensor:
        ids = _tensor([[s.tokens[-1] if s.tokens else s.past[-1]] for s in sequences], self._model.device)
        self._rows.decoding(ids, sequences)
        out = self._model(
            encoder_outputs=MoEModelOutput(last_hidden_state=hidden),  # pyright: ignore[reportArgumentType]
            attention_mask=self._mask(sequences, hidden.shape[1]),
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits[:, -1].float()

    def _mask(self, sequences: Sequence[StaticSequence], width: int) -> Tensor:
        lengths = _lengths([s.prompt for s in sequences], self._model.device)
        return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()


def _lengths(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor([len(row) for row in rows], device=device)


def _tensor(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _unless_all(mask: Tensor) -> Tensor | None:
    """bool [T] of the real rows; None if all are."""
    is_real = mask.flatten().bool()
    return None if bool(is_real.all()) else is_real
