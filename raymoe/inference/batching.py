"""The seam with transformers' continuous batching: our sampler and our deliveries inside its loop.

Everything of ours that leans on its less public names is in this file; tests/inference/test_batching.py holds them to what is
assumed here (transformers 5.17 to 5.23).
"""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput

from raymoe.inference.kv_budget import KvBudget
from raymoe.inference.latent_cache import attach_latents, expanded_blocks
from raymoe.inference.paged_attention import attach_paged_attention
from raymoe.inference.requests import SamplingParams, TokenLogprobs
from raymoe.inference.sampling import log_probabilities, sample, uniform
from raymoe.inference.scheduler import SCHEDULER, TokenScheduler
from raymoe.inference.servable import is_latent

PAGE_TOKENS = 32
"""Tokens a page of the KV cache holds: what a request's last page may waste."""

_WATCH_S = 0.2

OnOutputs = Callable[[list[GenerationOutput], dict[str, list[TokenLogprobs]]], None]
"""(all tokens so far of the requests that moved, this step's log-probabilities of the requests that asked)"""

logger = logging.getLogger("raymoe.inference")
# a thread that dies is reported by us, with what it means for the requests; its own report is a stack trace on stderr
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)


class Batcher:
    """One model under continuous batching, with its generation thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_batch_tokens: int,
        kv_tokens: int,
        max_requests: int,
        prefix_sharing: bool,
        on_outputs: OnOutputs,
        on_death: Callable[[str], None],
    ):
        """Allocates the KV cache; nothing runs before `start`.

        Args:
            max_batch_tokens: tokens a forward pass may hold.
            kv_tokens: tokens the KV cache holds over all requests, rounded up to whole pages.
            max_requests: requests a forward pass may hold.
            prefix_sharing: prompts that begin alike share whole pages of the KV cache, if all layers attend to everything.
            on_outputs: called on the generation thread after every step.
            on_death: called once, on a thread of its own, when the generation thread has ended, with the reason.
        """
        text_config = model.config.get_text_config()
        num_pages = ceil(kv_tokens / PAGE_TOKENS)
        if is_latent(text_config):
            num_pages = expanded_blocks(text_config, num_pages)
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=num_pages,
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=min(max_requests, max_batch_tokens),
            scheduler_type=SCHEDULER,
            allow_block_sharing=prefix_sharing,
            # the host decides in every layer which experts are fetched, so a step can neither be captured nor run ahead
            use_cuda_graph=False,
            use_async_batching=False,
            # would look for a kernel on the model hub
            auto_switch_to_flash=False,
        )
        # -1 is how transformers spells "no end token"; every request brings its own
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        self._manager = ContinuousBatchingManager(cast(Any, model), generation, config)
        sampler = _Sampler()

        def after_step(outputs: list[GenerationOutput]) -> None:
            self.kv_budget.settle()
            on_outputs(outputs, sampler.take_logprobs())

        self._manager.output_router = _Router(after_step)
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        # transformers counts only processors that it converted itself
        processors.tensors_required = 1
        self._manager.logit_processor = processors
        if model.device.type == "cpu":
            attach_paged_attention(model)
        # makes the KV cache here, where an error reaches the caller
        self._manager.warmup()
        if is_latent(text_config):
            attach_latents(model)
        processor = self._manager.batch_processor
        # an unknown name would have become another scheduler, with only a warning
        assert processor is not None
        assert isinstance(processor.scheduler, TokenScheduler)
        self.scheduler = processor.scheduler
        self._kv_cache = processor.cache
        self.kv_budget = KvBudget(processor.cache, kv_tokens)
        self.shared_tokens = 0
        """Tokens that were not computed, because the KV cache had them from another request that begins alike."""
        self._count_shared(processor.cache)
        self._on_death = on_death
        self._is_closed = threading.Event()

    @property
    def is_alive(self) -> bool:
        return self._manager.is_running()

    @property
    def steps(self) -> int:
        """Forward passes so far."""
        return getattr(self._manager, "current_batch", 0)

    @property
    def pages_held(self) -> int:
        """Pages of the KV cache in the tables of requests; one that is shared counts for each. 0 when nobody holds any."""
        tables = (allocator.block_table for allocator in self._kv_cache.cache_allocators.values())
        # the copy: the generation thread adds and removes requests
        return sum(len(pages) for table in tables for pages in list(table.values()))

    def paused(self) -> AbstractContextManager[None]:
        """No step is computed in its body. Not for the generation thread itself."""
        return self._manager.pause()

    def start(self) -> None:
        """Starts the generation thread and the one that watches it."""
        self._manager.start()
        threading.Thread(target=self._watch, name="raymoe-watch", daemon=True).start()

    def fits(self, num_tokens: int) -> bool:
        """Whether one request of that many tokens, prompt and answer, can be in the KV cache when it is alone there."""
        sectors = sum(
            ceil(allocator.needs_new_blocks("", 0, num_tokens) / allocator.blocks_per_sector)
            for allocator in self._kv_cache.cache_allocators.values()
        )
        return sectors <= self._kv_cache.num_sectors

    def add(self, request_id: str, prompt_ids: list[int], params: SamplingParams, stop_ids: tuple[int, ...]) -> bool:
        """Queues a request; False if the generation thread takes none any more."""
        accepted = self._manager.add_request(
            list(prompt_ids),
            request_id=request_id,
            max_new_tokens=params.max_tokens,
            eos_token_id=list(stop_ids),
            streaming=True,
            sampling=params,
        )
        return accepted is not None

    def cancel(self, request_id: str) -> None:
        """Drops a request before the next step; nothing is delivered for it any more (transformers sends no last output)."""
        self._manager.cancel_request(request_id)

    def close(self) -> None:
        """Ends the generation thread after its current step. Outputs of unfinished requests arrive as failed."""
        self._is_closed.set()
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)
        self._manager.destroy()

    def _count_shared(self, kv_cache: PagedAttentionCache) -> None:
        search = kv_cache.search_prefix_match

        def counted(request_id: str, prompt_ids: list[int]) -> int:
            num_shared = search(request_id, prompt_ids)
            self.shared_tokens += num_shared
            return num_shared

        kv_cache.search_prefix_match = counted

    def _watch(self) -> None:
        while self._manager.is_running():
            if not threading.main_thread().is_alive():
                # transformers' thread is no daemon and would keep the interpreter from ending
                self._manager.stop(block=False, hard_stop=True)
                return
            self._is_closed.wait(_WATCH_S)
        error = self._manager.background_thread_status.fatal_error
        if error is not None:
            logger.error("generation thread ended: %s", error, exc_info=error)
        self._on_death(f"{type(error).__name__}: {error}" if error is not None else "the engine was closed")


class _Router(OutputRouter):
    """Hands a whole step's outputs to one function, on the generation thread."""

    def __init__(self, on_outputs: Callable[[list[GenerationOutput]], None]):
        super().__init__()
        self._on_outputs = on_outputs

    def deliver(self, output: GenerationOutput) -> None:
        self._on_outputs([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._on_outputs(outputs)


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Draws the tokens itself and leaves the argmax that follows no choice.

    `prepare_tensor_args` and `__call__` of one step come in that order on one thread, as long as batching is not asynchronous.
    """

    supported_kwargs = {"sampling": SamplingParams}  # noqa: RUF012 (transformers declares it so)
    ignored_kwargs = ()

    def __init__(self):
        self._ids: list[str] = []
        self._params: list[SamplingParams] = []
        self._draws: list[float] = []
        self._logprobs: dict[str, list[TokenLogprobs]] = {}

    def take_logprobs(self) -> dict[str, list[TokenLogprobs]]:
        """Of the last step's tokens, for the requests that asked."""
        taken, self._logprobs = self._logprobs, {}
        return taken

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        states = [future.state for future in requests_with_new_token]
        self._ids = [state.request_id for state in states]
        self._params = [state.logit_processor_kwargs["sampling"] for state in states]
        # position_offset already counts this step's tokens: it is the position of the token to draw, also after the request
        # was taken out of a full KV cache and came back
        self._draws = [
            0.0 if params.is_greedy else uniform(params.seed, state.position_offset)
            for state, params in zip(states, self._params, strict=True)
        ]
        return torch.zeros(len(states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        # rows after these belong to prompts that are not read to their end yet
        num_rows = len(self._params)
        asking = [row for row, params in enumerate(self._params) if params.logprobs is not None]
        is_greedy = all(params.is_greedy for params in self._params)
        if is_greedy and not asking:
            return scores
        tokens = sample(scores[:num_rows], self._params, self._draws)
        if asking:
            told = log_probabilities(
                scores[asking], tokens[asking], [self._params[row].logprobs or 0 for row in asking]
            )
            self._logprobs = {self._ids[row]: [one] for row, one in zip(asking, told, strict=True)}
        if not is_greedy:
            scores[torch.arange(num_rows, device=scores.device), tokens] = torch.inf
        return scores
