"""How sequences of a static batch get their next tokens: under transformers' generation configuration, each for itself.

R sequences, V vocabulary.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from raymoe.inference.requests import SamplingParams
from raymoe.inference.sampling import sample, uniform
from raymoe.inference.servable import end_tokens

_WITHOUT_HISTORY = (
    EpsilonLogitsWarper, EtaLogitsWarper, InfNanRemoveLogitsProcessor, LogitNormalization, MinPLogitsWarper,
    SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper,
)  # fmt: skip
"""Processors that look at a row's scores alone, so that all rows can be given to one of them at once."""
_DEFAULT_TOKENS = 20
_AS_THEY_ARE = SamplingParams(temperature=1.0, seed=0)
_UNSUPPORTED = {
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "stop_strings": (None,),
    "max_time": (None,),
    "watermarking_config": (None,),
    "cache_implementation": (None, "dynamic"),
    "return_dict_in_generate": (None, False),
}
"""What generation configurations may say elsewhere, and the values that are the only ones here."""


@dataclass(eq=False)
class StaticSequence:
    """One that decodes."""

    number: int
    """In the order of the inputs."""
    name: str
    """Its own among all that predictors and schedulers are told of."""
    prompt: list[int]
    """What an encoder reads, or what the answer continues."""
    past: list[int]
    """What the decoder had before the first new token: the prompt, or an encoder-decoder's start token."""
    seed: int
    limit: int
    """Most new tokens."""
    processors: Any
    """transformers' list of them, made for this sequence."""
    tokens: list[int] = field(default_factory=list)
    """New ones."""
    reason: Literal["stop", "length"] | None = None

    @property
    def position(self) -> int:
        """Of the next token to come."""
        return len(self.past) + len(self.tokens)


class Choosing:
    """Gives every sequence its next token: by the processors that transformers makes for it alone, from its true tokens without
    padding, and by a draw that depends on nothing but its seed and its position.

    So a sequence's tokens do not depend on its neighbours, and a seed gives the tokens that `InferenceEngine` gives.
    """

    def __init__(self, model: PreTrainedModel, config: GenerationConfig | None = None):
        """`config`: what it leaves open, the model's own `generation_config` says, then transformers' defaults.

        Raises:
            ValueError: it asks for what static batches do not do (beams, assistants, stop strings..); names the field.
        """
        given = (config.max_length if config is not None else None, generation_config_of(model).max_length)
        self._model: Any = model
        self._config, _ = self._model._prepare_generation_config(config)
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._max_length = next((length for length in given if length is not None), None)
        _refuse_unsupported(self._config)
        self._model._prepare_special_tokens(self._config, kwargs_has_attention_mask=True, device=model.device)
        self.end_ids = end_tokens(self._config.eos_token_id)
        self._is_greedy = not self._config.do_sample

    def most_tokens(self, prompt: Sequence[int], place: str) -> int:
        """New tokens that the answer to a prompt may have.

        Args:
            place: how an error names the input.

        Raises:
            ValueError: the prompt leaves no room for one.
        """
        num_past = 1 if self._is_encoder_decoder else len(prompt)
        if self._config.max_new_tokens is not None:
            return self._config.max_new_tokens
        limit = _DEFAULT_TOKENS if self._max_length is None else self._max_length - num_past
        if limit < 1:
            raise ValueError(
                f"{place}: {num_past} tokens leave no room for an answer, as max_length is {self._max_length}; give "
                "max_new_tokens instead"
            )
        return limit

    def begin(self, number: int, name: str, prompt: Sequence[int], seed: int, place: str) -> StaticSequence:
        """A sequence that has no new token yet; see `most_tokens`."""
        past = [int(self._config._decoder_start_token_tensor)] if self._is_encoder_decoder else list(prompt)
        limit = self.most_tokens(prompt, place)
        processors = self._processors(list(prompt), past, limit)
        return StaticSequence(number, name, list(prompt), past, seed, limit, processors)

    @torch.inference_mode()
    def choose(self, sequences: Sequence[StaticSequence], logits: Tensor) -> None:
        """Appends a token to each sequence and says which of them are over; logits [R, V] float32, one row each."""
        scores = self._processed(sequences, logits)
        if self._is_greedy:
            tokens = scores.argmax(dim=-1)
        else:
            draws = [uniform(sequence.seed, sequence.position) for sequence in sequences]
            tokens = sample(scores, [_AS_THEY_ARE] * len(draws), draws)
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.tokens.append(token)
            if token in self.end_ids:
                sequence.reason = "stop"
            elif len(sequence.tokens) >= sequence.limit:
                sequence.reason = "length"

    def _processors(self, prompt: list[int], past: list[int], limit: int) -> Any:
        config = copy.copy(self._config)
        config.max_length = len(past) + limit
        if config.min_new_tokens is not None:
            config.min_length = len(past) + config.min_new_tokens
        return self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(past),
            encoder_input_ids=torch.tensor([prompt], device=self._model.device),
            device=self._model.device,
            model_kwargs={},
        )

    def _processed(self, sequences: Sequence[StaticSequence], logits: Tensor) -> Tensor:
        first = sequences[0].processors
        if not first:
            return logits
        if all(isinstance(processor, _WITHOUT_HISTORY) for processor in first):
            return first(torch.empty(len(sequences), 0, dtype=torch.int64, device=logits.device), logits)
        ids = [torch.tensor([[*s.past, *s.tokens]], device=logits.device) for s in sequences]
        rows = zip(sequences, ids, logits.split(1), strict=True)
        return torch.cat([sequence.processors(own, row.clone()) for sequence, own, row in rows])


def generation_config_of(model: PreTrainedModel) -> GenerationConfig:
    """The model's own; every model that generates has one."""
    config = model.generation_config
    assert isinstance(config, GenerationConfig)
    return config


def _refuse_unsupported(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"generation config: it asks for {mode.value.replace('_', ' ')}; static batches are decoded greedily or sampled "
            "(num_beams 1, no assistant)"
        )
    for name, allowed in _UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value not in allowed:
            raise ValueError(f"generation config: {name} = {value!r} is not supported in static batches; leave it out")
