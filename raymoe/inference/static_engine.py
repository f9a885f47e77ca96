"""Static batches through the expert cache: for encoder-decoders, which continuous batching cannot run, and for whole files of
inputs. A plain class, no Ray.

ExpertFlow's own setting (arXiv 2410.17954): the same cache, predictors and grouping as in `InferenceEngine`.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import GenerationConfig

from raymoe.inference.cache import ExpertCache
from raymoe.inference.engine import DEFAULT_PREDICTORS
from raymoe.inference.foresight import Foresight
from raymoe.inference.opening import open_model
from raymoe.inference.policies import DEFAULT_POLICY, policy_by_name
from raymoe.inference.predictors import predictors_by_name
from raymoe.inference.predictors.path_predictor import PathPredictor
from raymoe.inference.static_forward import DecoderForward, EncoderDecoderForward, RoutedRows
from raymoe.inference.static_grouping import UnitOptions, UnitRoutes, UnitScheduler
from raymoe.inference.static_sampling import Choosing, StaticSequence
from raymoe.inference.static_unit import Unit, UnitCounters
from raymoe.inference.tiers import Tiers
from raymoe.models import attach_runtime, warm_up_layers


@dataclass(frozen=True)
class StaticInput:
    """What is answered."""

    tokens: Sequence[int]
    """An encoder's input, or the prompt of a decoder alone."""
    seed: int = 0
    """Where tokens are drawn: equal inputs with equal seeds get equal answers, whatever shares their batch."""
    place: str = ""
    """How an error names it; default "input N", from 0."""


@dataclass(frozen=True)
class Answer:
    """A sequence that is over."""

    number: int
    """Of its input, from 0."""
    tokens: list[int] = field(default_factory=list)
    """New ones; an end token is the last of them."""
    finish_reason: Literal["stop", "length"] = "length"


class StaticEngine:
    """Generates for lists of inputs in static batches, with at most a budget of experts in memory. For one thread at a time."""

    def __init__(
        self,
        model: Path | str,
        *,
        expert_memory: str | int = "50%",
        dtype: str = "float32",
        device: str | None = None,
        expert_readers: int = 1,
        direct_io: bool = True,
        eviction: str = DEFAULT_POLICY,
        predictors: Sequence[str] = DEFAULT_PREDICTORS,
        expert_precision: str = "native",
    ):
        """Loads the dense part of the model.

        Args:
            model: a Hugging Face directory of a MoE model, decoder-only or switch_transformers.
            expert_memory: budget of the expert cache: "50%" of all experts, "512MiB", or a number of bytes.
            dtype: of the weights and the computation, a name of torch's.
            device: "cpu" or "cuda"; default CUDA where there is one.
            expert_readers: threads that fetch experts while others compute; without any, nothing is fetched ahead.
            direct_io: read the checkpoint's files past the page cache, which otherwise serves experts from memory that no budget
                knows of.
            eviction: name of the expert cache's policy, one of `raymoe.inference.policies.POLICIES`.
            predictors: names of `raymoe.inference.predictors.NAMES`, for the decoder; each judges itself, and rests where it does
                not pay.
            expert_precision: see `InferenceEngine`.

        Raises:
            ValueError: a family without experts that raymoe can reach, an incomplete checkpoint, a predictor that is unknown or
                damaged, a precision whose file is missing or another checkpoint's, or a budget below one expert.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        torch_dtype = getattr(torch, dtype)
        opened = open_model(model, torch_dtype, device, direct_io=direct_io, precision=expert_precision)
        self._model, layers, form = opened.model, opened.layers, opened.form
        self.warning = opened.warning
        """What a lossy precision costs, in a line."""
        first = sum(layer.name.startswith("encoder.") for layer in layers)
        self._decoder_layers = layers[first:]
        self._path = Path(model)
        config = self._model.config.get_text_config()
        self._vocab_size: int = config.vocab_size
        self._positions: int | None = getattr(config, "max_position_embeddings", None)
        self.is_encoder_decoder = bool(self._model.config.is_encoder_decoder)
        """Answers do not continue their inputs."""
        tiers = Tiers(opened.tiers)
        rates = tiers.measure(form.numel, form.num_experts, form.dtype)
        self.cache = ExpertCache(
            tiers,
            numel=form.numel,
            num_experts=form.num_experts,
            budget=expert_memory,
            total_bytes=form.native_bytes,
            dtype=form.dtype,
            device=device,
            policy=policy_by_name(eviction),
            readers=expert_readers,
        )
        self._expert_bytes = form.expert_bytes[first:]
        self._rows = RoutedRows(self.cache, form, first)
        try:
            self._rows.foresight = Foresight(
                cast(ExpertCache, self._rows.decoder_cache),
                predictors_by_name(predictors, self._path, self._decoder_layers, vocab_size=self._vocab_size),
                num_experts=form.num_experts[first:],
                expert_bytes=self._expert_bytes,
                policy=policy_by_name(eviction),
                fetch_s=min((rate.read_s for rate in rates.values()), default=1e-3),
            )
        except BaseException:
            self.cache.close()
            raise
        attach_runtime(self._model, self._rows)
        warm_up_layers(layers, torch_dtype, torch.device(device), is_training=False)
        forward = EncoderDecoderForward if self.is_encoder_decoder else DecoderForward
        self._forward = forward(self._model, self._rows)
        self._names = itertools.count()
        self.counters = UnitCounters()
        self._grouping: dict[str, Any] = {"state": "off", "reason": "nothing was run yet"}
        self.facts = {
            "model_type": self._model.config.model_type,
            "dtype": dtype,
            "device": device,
            "moe_layers": len(layers),
            "expert_precision": str(opened.precision),
            "decoder_moe_layers": len(self._decoder_layers),
            "num_experts": self.cache.num_experts,
            "expert_bytes": self.cache.slot_bytes,
        }
        """What the engine was made with, as plain values."""

    def __enter__(self) -> "StaticEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        inputs: Iterable[StaticInput],
        *,
        batch_size: int = 8,
        num_batches: int = 1,
        config: GenerationConfig | None = None,
        grouping: UnitOptions | None = None,
    ) -> Iterator[Answer]:
        """Answers inputs, a unit of `num_batches` batches after the other; an answer comes as soon as it is whole.

        Args:
            inputs: taken as units begin.
            batch_size: sequences that a forward pass may hold.
            num_batches: of a unit. The batches of a unit decode side by side and exchange sequences that want the same experts,
                as far as that pays; with 1 there is nothing to exchange.
            config: transformers' generation configuration, greedy or sampling; what it leaves open, the model's own says.
            grouping: how batches exchange sequences.

        Raises:
            ValueError: a size below 1, a configuration that static batches cannot follow, an input that is empty, has unknown
                tokens or is too long (before its unit begins; answers of earlier units have come by then), or an expert that no
                tier could deliver.
        """
        for name, value in (("batch_size", batch_size), ("num_batches", num_batches)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        choosing = Choosing(self._model, config)
        is_tight = self.cache.num_slots < self.cache.num_experts
        scheduler = self._scheduler(batch_size, grouping or UnitOptions()) if num_batches > 1 and is_tight else None
        self._grouping = {"state": "off", "reason": "one batch at a time" if is_tight else "all is resident"}
        numbered = enumerate(inputs)
        while taken := list(itertools.islice(numbered, batch_size * num_batches)):
            sequences = [self._sequence(choosing, number, given) for number, given in taken]
            unit = Unit(
                sequences,
                batch_size,
                forward=self._forward,
                choosing=choosing,
                experts=self.cache,
                counters=self.counters,
                ended=self._rows.ended,
                scheduler=scheduler,
            )
            try:
                while unit.is_live:
                    self._rows.saw = scheduler.routes.saw if scheduler is not None else None
                    ended = unit.step()
                    if scheduler is not None:
                        self._grouping = scheduler.stats()
                    for sequence in ended:
                        yield Answer(sequence.number, sequence.tokens, sequence.reason or "length")
            finally:
                unit.close()

    def check(self, inputs: Iterable[StaticInput], config: GenerationConfig | None = None) -> None:
        """Refuses what `run` would refuse, before anything is computed.

        Raises:
            ValueError: as `run`, of the first input that it is about.
        """
        choosing = Choosing(self._model, config)
        for number, given in enumerate(inputs):
            self._check(choosing, given, given.place or f"input {number}")

    def generate(self, inputs: Sequence[Sequence[int]], *, seed: int = 0, **options: Any) -> list[list[int]]:
        """New tokens of all inputs, in their order; for scripts and tests.

        Args:
            inputs: tokens of each.
            seed: of the first one; each further one has the next.
            options: of `run`.

        Raises:
            ValueError: as `run`.
        """
        answers: list[list[int]] = [[] for _ in inputs]
        for answer in self.run([StaticInput(tokens, seed + n) for n, tokens in enumerate(inputs)], **options):
            answers[answer.number] = answer.tokens
        return answers

    def stats(self) -> dict[str, Any]:
        """What the engine is and has done so far, as plain values."""
        return {
            **self.facts,
            "budget_bytes": self.cache.budget_bytes,
            "slots": self.cache.num_slots,
            "cache": asdict(self.cache.totals()),
            **self.counters.as_row(),
            "grouping": self._grouping,
            "prediction": self._rows.foresight.report() if self._rows.foresight is not None else {},
        }

    def close(self) -> None:
        """Ends the threads that fetch experts. Safe to call again."""
        self.cache.close()

    def _scheduler(self, batch_size: int, options: UnitOptions) -> UnitScheduler:
        num_experts = max(layer.num_experts for layer in self._decoder_layers)
        top_k = max(layer.top_k for layer in self._decoder_layers)
        predictor = None
        if options.stride == 1:
            # a path is one token's; of several steps the last tokens say more
            predictor = PathPredictor.beside(
                self._path,
                num_layers=len(self._decoder_layers),
                num_experts=num_experts,
                top_k=top_k,
                vocab_size=self._vocab_size,
            )
        routes = UnitRoutes(
            len(self._decoder_layers),
            num_experts,
            top_k,
            residents=lambda: self._rows.decoder_cache.residents()[:, :num_experts],
            predictor=predictor,
        )
        return UnitScheduler(routes, batch_size, options, expert_bytes=self._expert_bytes)

    def _check(self, choosing: Choosing, given: StaticInput, place: str) -> None:
        if not given.tokens:
            raise ValueError(f"{place}: it is empty; generation needs at least one token")
        unknown = next((token for token in given.tokens if not 0 <= token < self._vocab_size), None)
        if unknown is not None:
            raise ValueError(f"{place}: token {unknown} is not in the model's vocabulary of {self._vocab_size}")
        num_new = choosing.most_tokens(given.tokens, place)
        wanted = len(given.tokens) + num_new
        if self._positions is not None and not self.is_encoder_decoder and wanted > self._positions:
            raise ValueError(
                f"{place}: {len(given.tokens)} tokens and an answer of up to {num_new} are {wanted}, but the model has "
                f"{self._positions} positions; shorten the input or lower max_new_tokens"
            )

    def _sequence(self, choosing: Choosing, number: int, given: StaticInput) -> StaticSequence:
        place = given.place or f"input {number}"
        self._check(choosing, given, place)
        return choosing.begin(number, f"sequence-{next(self._names)}", given.tokens, given.seed, place)
