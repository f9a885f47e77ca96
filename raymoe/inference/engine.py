"""The engine: a model whose experts come through the cache, under continuous batching. A plain class, no Ray."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from raymoe import kernels
from raymoe.inference.batching import Batcher, logger
from raymoe.inference.cache import ExpertCache
from raymoe.inference.experts import CachedExperts
from raymoe.inference.meter import Meter
from raymoe.inference.requests import Delta, EngineError, FinishReason, SamplingParams
from raymoe.inference.tiers import CheckpointTier
from raymoe.models import attach_runtime, load_without_experts, warm_up_layers


@dataclass
class _Request:
    on_delta: Callable[[Delta], None]
    stop_ids: tuple[int, ...]
    submitted_s: float
    num_sent: int = 0
    is_over: bool = False
    telling: threading.RLock = field(default_factory=threading.RLock)


@dataclass
class _Counters:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "cancelled": 0, "error": 0})


class InferenceEngine:
    """Generates for many requests at once, with at most a budget of experts in memory. Safe to use from several threads."""

    def __init__(
        self,
        model: Path | str,
        *,
        expert_memory: str | int = "50%",
        dtype: str = "float32",
        device: str | None = None,
        max_batch_tokens: int = 512,
        kv_tokens: int = 16384,
        max_requests: int = 256,
    ):
        """Loads the dense part of the model, allocates both caches and starts the generation thread.

        Args:
            model: a Hugging Face directory of a decoder-only MoE model.
            expert_memory: budget of the expert cache: "50%" of all experts, "512MiB", or a number of bytes.
            dtype: of the weights and the computation, a name of torch's.
            device: "cpu" or "cuda"; default CUDA where there is one.
            max_batch_tokens: tokens a forward pass may hold, prompts included; longer prompts are read in pieces.
            kv_tokens: tokens the KV cache holds over all requests. When it is full, the youngest request waits.
            max_requests: requests a forward pass may hold; further ones wait.

        Raises:
            ValueError: a family that cannot be served, an incomplete checkpoint, or a budget below one expert.
        """
        self._started_s = time.monotonic()
        _refuse_unservable(AutoConfig.from_pretrained(model, local_files_only=True))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded, files = load_without_experts(model, getattr(torch, dtype), device)
        self._config = loaded.config.get_text_config()
        self.cache = ExpertCache(
            CheckpointTier(files),
            numel=[layer.layout.numel for layer in files.layers],
            num_experts=[layer.num_experts for layer in files.layers],
            budget=expert_memory,
            dtype=getattr(torch, dtype),
            device=device,
        )
        attach_runtime(loaded, CachedExperts(self.cache, files.layers))
        warm_up_layers(files.layers, getattr(torch, dtype), torch.device(device), is_training=False)
        self._stop_ids = _end_tokens(loaded.generation_config.eos_token_id, self._config.eos_token_id)
        self._facts = {
            "model_type": loaded.config.model_type,
            "dtype": dtype,
            "device": device,
            "moe_layers": len(files.layers),
            "num_experts": self.cache.num_experts,
            "expert_bytes": self.cache.slot_bytes,
            "budget_bytes": self.cache.budget_bytes,
            "slots": self.cache.num_slots,
            "kv_tokens": kv_tokens,
        }
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._requests: dict[str, _Request] = {}
        self._counters = _Counters()
        self._meter = Meter(self.cache)
        self._death: str | None = None
        self._batcher = Batcher(
            loaded,
            max_batch_tokens=max_batch_tokens,
            kv_tokens=kv_tokens,
            max_requests=max_requests,
            on_outputs=self._deliver,
            on_death=self._fail_all,
        )
        self._batcher.start()

    def __enter__(self) -> "InferenceEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def max_positions(self) -> int | None:
        """Tokens, prompt and answer together, that the model was made for; None if it does not say."""
        return getattr(self._config, "max_position_embeddings", None)

    def room(self, prompt_tokens: int) -> int:
        """Most tokens an answer to a prompt of that length may have; below 1 if the prompt itself is too long."""
        limits = (self.max_positions, self._facts["kv_tokens"])
        return min(limit for limit in limits if limit is not None) - prompt_tokens

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, on_delta: Callable[[Delta], None]) -> str:
        """Starts a request.

        Args:
            on_delta: called on the generation thread, so it must not block; its last call has a finish reason.

        Returns:
            The request's id, for `cancel`. Deltas may come before it.

        Raises:
            ValueError: a prompt that is empty, has unknown tokens, or is too long for the model or the KV cache.
            EngineError: the engine has ended.
        """
        prompt_ids = list(prompt_ids)
        self._check_length(prompt_ids, params)
        stop_ids = self._stop_ids if params.stop_token_ids is None else params.stop_token_ids
        request_id = f"request-{next(self._ids)}"
        with self._lock:
            if self._death is not None:
                raise EngineError(f"the engine has ended ({self._death}); make a new one")
            self._requests[request_id] = _Request(on_delta, stop_ids, time.monotonic())
            self._counters.prompt_tokens += len(prompt_ids)
        self._meter.submitted(len(prompt_ids))
        if not self._batcher.add(request_id, prompt_ids, params, stop_ids):
            self._finish(request_id, "error", "the engine is ending and takes no more requests")
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Ends a request at once, with a last delta "cancelled"; False if it is over already."""
        is_live = self._finish(request_id, "cancelled")
        if is_live:
            self._batcher.cancel(request_id)
        return is_live

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[int]]:
        """Runs `prompts` to their end together and returns their new tokens; for scripts and tests.

        Raises:
            ValueError: as `submit`; the other requests of the call are then cancelled.
            EngineError: a request failed.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        tokens: list[list[int]] = [[] for _ in prompts]
        errors: list[str] = []
        done = threading.Semaphore(0)

        def taker(row: int) -> Callable[[Delta], None]:
            def take(delta: Delta) -> None:
                tokens[row] += delta.tokens
                if delta.finish_reason in ("error", "cancelled"):
                    errors.append(delta.error or delta.finish_reason)
                if delta.finish_reason is not None:
                    done.release()

            return take

        ids: list[str] = []
        try:
            for row, (prompt, asked) in enumerate(zip(prompts, each, strict=True)):
                ids.append(self.submit(prompt, asked, taker(row)))
            for _ in ids:
                done.acquire()
        except BaseException:
            for request_id in ids:
                self.cancel(request_id)
            raise
        if errors:
            raise EngineError(errors[0])
        return tokens

    def stats(self) -> dict[str, Any]:
        """What the engine is and has done so far, as plain values: bytes, experts, tokens and requests by how they ended."""
        total = self.cache.total
        with self._lock:
            return {
                **self._facts,
                "is_alive": self.is_alive,
                "uptime_s": round(time.monotonic() - self._started_s, 3),
                "requests_running": len(self._requests),
                **{f"requests_{reason}": count for reason, count in self._counters.finished.items()},
                "prompt_tokens": self._counters.prompt_tokens,
                "generated_tokens": self._counters.generated_tokens,
                "tokens_per_s": round(self._meter.tokens_per_s, 1),
                "steps": self._batcher.steps,
                "resident_experts": self.cache.resident,
                "hits": total.hits,
                "misses": total.misses,
                "hit_rate": total.hit_rate,
                "fetched_bytes": total.fetched_bytes,
                "kernels": kernels.calls(),
            }

    def history(self) -> list[dict[str, Any]]:
        """Hits, misses, fetched bytes and resident experts a second, oldest first, for a plot."""
        return [{**asdict(window), "hit_rate": window.hit_rate} for window in self.cache.history()]

    @property
    def is_alive(self) -> bool:
        return self._death is None and self._batcher.is_alive

    def close(self) -> None:
        """Ends the engine; requests that are not done get an "error" delta. Safe to call again."""
        self._batcher.close()
        self._fail_all("the engine was closed")

    def _check_length(self, prompt_ids: list[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise ValueError("the prompt is empty; generation needs at least one token")
        unknown = next((token for token in prompt_ids if not 0 <= token < self._config.vocab_size), None)
        if unknown is not None:
            raise ValueError(f"token {unknown} is not in the model's vocabulary of {self._config.vocab_size}")
        wanted = len(prompt_ids) + params.max_tokens
        asked = f"prompt of {len(prompt_ids)} tokens + max_tokens {params.max_tokens} = {wanted} tokens"
        if self.max_positions is not None and wanted > self.max_positions:
            raise ValueError(
                f"{asked}, but the model has {self.max_positions} positions; shorten the prompt or lower max_tokens"
            )
        if not self._batcher.fits(wanted):
            raise ValueError(
                f"{asked}, but the KV cache holds {self._facts['kv_tokens']} tokens; "
                "shorten the prompt, lower max_tokens, or raise kv_tokens"
            )

    def _deliver(self, outputs: list[GenerationOutput]) -> None:
        num_new = 0
        told: list[tuple[str, _Request, Delta]] = []
        for output in outputs:
            with self._lock:
                request = self._requests.get(output.request_id)
            if request is None:
                continue
            # transformers delivers all tokens so far
            new = output.generated_tokens[request.num_sent :]
            if new and not request.num_sent:
                self._meter.first_token(time.monotonic() - request.submitted_s)
            request.num_sent += len(new)
            num_new += len(new)
            reason: FinishReason | None = None
            if output.status == RequestStatus.FAILED:
                reason = "error"
            elif output.status == RequestStatus.FINISHED:
                reason = "stop" if new and new[-1] in request.stop_ids else "length"
            # a request that was cancelled meanwhile has had its last delta
            if reason is None or self._close(output.request_id, reason):
                told.append((output.request_id, request, Delta(new, reason, output.error)))
        with self._lock:
            self._counters.generated_tokens += num_new
        # before the callbacks: whoever has its last token may ask for the counters
        self._meter.stepped(num_new, is_idle=not self._requests)
        for request_id, request, delta in told:
            self._call(request_id, request, delta)

    def _finish(self, request_id: str, reason: FinishReason, error: str | None = None) -> bool:
        request = self._close(request_id, reason)
        if request is not None:
            self._call(request_id, request, Delta([], reason, error))
        return request is not None

    def _close(self, request_id: str, reason: FinishReason) -> _Request | None:
        with self._lock:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._counters.finished[reason] += 1
        if request is not None:
            self._meter.ended(reason)
        return request

    def _call(self, request_id: str, request: _Request, delta: Delta) -> None:
        # a cancellation comes from another thread, and nothing may follow a last delta
        with request.telling:
            if request.is_over:
                return
            request.is_over = delta.finish_reason is not None
            try:
                request.on_delta(delta)
            except Exception:
                # one client's callback must not take the thread, and with it all other requests, down
                logger.exception("on_delta of %s failed; the request is dropped", request_id)
                self.cancel(request_id)

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            self._death = self._death or reason
            waiting = list(self._requests)
        for request_id in waiting:
            self._finish(request_id, "error", f"the engine has ended: {self._death}")


def _refuse_unservable(config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ValueError(
            f"model family '{config.model_type}' is an encoder-decoder; raymoe serves decoder-only MoE models, because "
            "transformers' continuous batching does"
        )
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"model family '{config.model_type}' uses multi-head latent attention (kv_lora_rank {text.kv_lora_rank}), for which "
            "transformers' continuous batching has no KV cache; families that work include mixtral, olmoe, qwen2_moe, "
            "qwen3_moe, phimoe and gpt_oss"
        )


def _end_tokens(*candidates: int | list[int] | None) -> tuple[int, ...]:
    for candidate in candidates:
        if candidate is not None:
            return tuple(candidate) if isinstance(candidate, list) else (candidate,)
    return ()
