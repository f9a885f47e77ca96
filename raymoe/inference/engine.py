"""The engine: a model whose experts come through the cache, under continuous batching. A plain class, no Ray."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from raymoe import kernels
from raymoe.inference.batching import Batcher
from raymoe.inference.cache import ExpertCache
from raymoe.inference.deliveries import Deliveries, Request
from raymoe.inference.experts import CachedExperts
from raymoe.inference.foresight import Foresight
from raymoe.inference.meter import Meter
from raymoe.inference.node_arena import shared_arena
from raymoe.inference.opening import open_model
from raymoe.inference.policies import DEFAULT_POLICY, policy_by_name
from raymoe.inference.predictors import predictors_by_name
from raymoe.inference.remote import HostTier, NodeTier, RemoteExperts
from raymoe.inference.requests import Delta, EngineError, SamplingParams
from raymoe.inference.route_watch import RouteWatch
from raymoe.inference.routes import LastPaths
from raymoe.inference.scheduler import GroupingOptions
from raymoe.inference.sending import Sending
from raymoe.inference.servable import end_tokens, refuse_unservable
from raymoe.inference.standing_in import StandingIn, refuse_untrained
from raymoe.inference.step_threads import StepThreads
from raymoe.inference.text import StopWatch
from raymoe.inference.tiers import ExpertSource, Tiers
from raymoe.models import attach_runtime, warm_up_layers

_log = logging.getLogger(__name__)

DEFAULT_PREDICTORS = ("look_ahead", "token_table", "path")


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
        prefix_sharing: bool = True,
        decode: Callable[[list[int]], str] | None = None,
        expert_readers: int = 1,
        direct_io: bool = True,
        eviction: str = DEFAULT_POLICY,
        predictors: Sequence[str] = DEFAULT_PREDICTORS,
        grouping: GroupingOptions | None = None,
        remote: RemoteExperts | None = None,
        on_miss: str = "wait",
        expert_precision: str = "native",
        arena: bool = False,
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
            prefix_sharing: prompts that begin alike share the KV cache's pages, and are read once.
            decode: tokens to the text a client sees (`raymoe.inference.text.decoder`), for requests with stop strings.
            expert_readers: threads that fetch experts while others compute; without any, nothing is fetched ahead.
            direct_io: read the checkpoint's files past the page cache, which otherwise serves experts from memory that no budget
                knows of.
            eviction: name of the expert cache's policy, one of `raymoe.inference.policies.POLICIES`.
            predictors: names of `raymoe.inference.predictors.NAMES`; each judges itself, and rests where it does not pay.
            grouping: how batches are formed by routes when more requests are active than a step holds; it judges itself, and
                stops where it does not pay.
            remote: hosts that hold experts; they are asked before the files. Closed together with the engine.
            on_miss: "wait", or "send": a host computes the rows of an expert that is missing, where that is cheaper; or, lossy,
                "compressed": the trained vectors of an expert act in its place, but for a token's strongest.
            expert_precision: "native", or lossy: "bf16", "int8" or "int4", whose file `raymoe experts` has put beside the
                checkpoint. Hosts must hold the same.
            arena: compute with one copy of all experts in the node's shared memory, which the first engine on the node makes, in
                place of slots of its own; `expert_memory` then says nothing. On a CPU, and without hosts.

        Raises:
            ValueError: a family that cannot be served, an incomplete checkpoint, a precision whose file is missing or another
                checkpoint's, or a budget below one expert.
        """
        self._started_s = time.monotonic()
        refuse_unservable(AutoConfig.from_pretrained(model, local_files_only=True))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        opened = open_model(model, getattr(torch, dtype), device, direct_io=direct_io, precision=expert_precision)
        loaded, layers, form = opened.model, opened.layers, opened.form
        if on_miss == "compressed":
            refuse_untrained(loaded)
        if opened.warning is not None:
            _log.warning("%s", opened.warning)
        self._config = loaded.config.get_text_config()
        if arena and (remote is not None or device != "cpu"):
            raise ValueError("arena: it is for engines on CPUs, and without expert_hosts; leave one of the two out")
        self._remote, node = remote, None
        tiers: dict[str, ExpertSource] = {}
        if remote is not None:
            node = tiers["node"] = NodeTier(remote)
            tiers["hosts"] = HostTier(remote, form.numel, form.dtype)
        self._node = node
        self._tiers = Tiers(tiers | opened.tiers)
        self._eviction = eviction
        self._arena = None
        if arena:
            self._arena = shared_arena(opened.files.fingerprint(), opened.precision, form, self._tiers)
        rates = self._tiers.measure(form.numel, form.num_experts, form.dtype)
        self.cache = ExpertCache(
            self._tiers,
            numel=form.numel,
            num_experts=form.num_experts,
            budget=expert_memory,
            total_bytes=form.native_bytes,
            dtype=form.dtype,
            device=device,
            policy=policy_by_name(eviction),
            readers=expert_readers,
            arena=None if self._arena is None else self._arena.slots.view(form.dtype),
        )
        fastest_s = min((rate.read_s for rate in rates.values()), default=1e-3)
        self._foresight = Foresight(
            self.cache,
            predictors_by_name(predictors, Path(model), layers, vocab_size=self._config.vocab_size),
            num_experts=form.num_experts,
            expert_bytes=form.expert_bytes,
            policy=policy_by_name(eviction),
            fetch_s=fastest_s,
        )
        self._routes = LastPaths(len(layers), max(form.num_experts), residents=self.cache.residents)
        self._sending: Sending | None = None
        if on_miss == "send":
            if remote is None or node is None:
                raise ValueError("on_miss: 'send' needs hosts that hold experts; set expert_hosts, or on_miss: wait")
            self._sending = Sending(remote, node, self.cache, form.expert_bytes, len(layers))
        self._route_watch = RouteWatch(self.cache, len(layers))
        self._standing_in = StandingIn(loaded, self.cache, self._route_watch) if on_miss == "compressed" else None
        self._experts = CachedExperts(self.cache, form, self._note_routes, self._sending, self._route_watch)
        attach_runtime(loaded, self._experts)
        warm_up_layers(layers, getattr(torch, dtype), torch.device(device), is_training=False)
        self._stop_ids = end_tokens(loaded.generation_config.eos_token_id, self._config.eos_token_id)
        self._facts = {
            "model_type": loaded.config.model_type,
            "dtype": dtype,
            "device": device,
            "moe_layers": len(layers),
            "expert_precision": str(opened.precision),
            "expert_loss": opened.loss or None,
            "num_experts": self.cache.num_experts,
            "expert_bytes": self.cache.slot_bytes,
        }
        self._decode = decode
        self._ids = itertools.count()
        # between the look at the KV cache's size and the request that relies on it, the size must not change
        self._admitting = threading.Lock()
        self._meter = Meter(self.cache)
        self._deliveries = Deliveries(
            self._meter,
            cancel=lambda request_id: self._batcher.cancel(request_id),
            ended=self._ended,
            route=self._route_watch.route,
            stood_in=None if self._standing_in is None else self._standing_in.taken,
        )
        self._batcher = Batcher(
            loaded,
            max_batch_tokens=max_batch_tokens,
            kv_tokens=kv_tokens,
            max_requests=max_requests,
            prefix_sharing=prefix_sharing,
            on_outputs=self._deliveries.deliver,
            on_death=self._deliveries.fail_all,
        )
        self._threads = StepThreads(max(form.expert_bytes), device)
        loaded.register_forward_pre_hook(self._step_begins, with_kwargs=True)
        loaded.register_forward_hook(lambda *_: self._threads.end(), always_call=True)
        self._batcher.scheduler.group_by(self._routes, grouping, expert_bytes=self.cache.slot_bytes)
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
        limits = (self.max_positions, self._batcher.kv_budget.tokens)
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
        stop_ids = self._stop_ids if params.stop_token_ids is None else params.stop_token_ids
        request_id = f"request-{next(self._ids)}"
        num_tokens = len(prompt_ids) + params.max_tokens
        request = Request(on_delta, stop_ids, num_tokens, self._watch(prompt_ids, params))
        with self._admitting:
            self._check_length(prompt_ids, params)
            self._deliveries.add(request_id, request, len(prompt_ids))
            if params.routes:
                self._route_watch.add(request_id)
        if not self._batcher.add(request_id, prompt_ids, params, stop_ids):
            self._deliveries.finish(request_id, "error", "the engine is ending and takes no more requests")
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Ends a request at once, with a last delta "cancelled"; False if it is over already."""
        is_live = self._deliveries.finish(request_id, "cancelled")
        if is_live:
            self._batcher.cancel(request_id)
        return is_live

    def set_expert_memory(self, budget: str | int) -> None:
        """Changes the budget of the expert cache, while requests run; nobody's tokens change.

        Raises:
            ValueError: it holds not even one expert, or is more than a GPU has memory set aside for.
        """
        self.cache.set_budget(budget)

    def set_kv_tokens(self, tokens: int) -> None:
        """Changes how many tokens the KV cache holds over all requests, while they run. Not from within an `on_delta`.

        Requests that have more than is left are read again later; nobody's tokens change. On a CPU the memory goes back to the
        system as it becomes free.

        Raises:
            ValueError: more than the engine was made with, or less than a request that is not over may come to.
            EngineError: the engine has ended.
        """
        budget = self._batcher.kv_budget
        if not 1 <= tokens <= budget.most_tokens:
            most = budget.most_tokens
            raise ValueError(f"kv_tokens must be from 1 to {most}, which the engine was made with, got {tokens}")
        if not self.is_alive:
            raise EngineError(f"the engine has ended ({self._deliveries.death}); make a new one")
        with self._batcher.paused(), self._admitting:
            before = budget.tokens
            budget.set(tokens)
            largest = self._deliveries.largest()
            if not self._batcher.fits(largest):
                budget.set(before)
                raise ValueError(
                    f"kv_tokens: {tokens} is too few for a running request that may come to {largest} tokens; "
                    "wait for it, or cancel it"
                )

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
        return {
            **self._facts,
            "budget_bytes": self.cache.budget_bytes,
            "slots": self.cache.num_slots,
            "kv_tokens": self._batcher.kv_budget.tokens,
            "eviction": self._eviction,
            "kv_bytes": self._batcher.kv_budget.bytes,
            "kv_pages_held": self._batcher.pages_held,
            "is_alive": self.is_alive,
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            **self._deliveries.counters(),
            "shared_tokens": self._batcher.shared_tokens,
            "tokens_per_s": round(self._meter.tokens_per_s, 1),
            "steps": self._batcher.steps,
            "resident_experts": self.cache.resident,
            **asdict(total),
            "hit_rate": total.hit_rate,
            "tiers": [asdict(tier) | {"rate": tier.rate and tier.rate._asdict()} for tier in self._tiers.stats()],
            "tier_facts": self._tiers.facts(),
            "arena": self._arena.facts() if self._arena is not None else None,
            "stood_in": self._standing_in.facts() if self._standing_in is not None else None,
            "sent": self._sending.facts() if self._sending is not None else None,
            "prediction": self._foresight.report(),
            "grouping": self._batcher.scheduler.stats(),
            "kernels": kernels.calls(),
        }

    def history(self) -> list[dict[str, Any]]:
        """Hits, misses, fetched bytes and resident experts a second, oldest first, for a plot."""
        return [{**asdict(window), "hit_rate": window.hit_rate} for window in self.cache.history()]

    def expert_load(self) -> list[list[int]]:
        """Rows that the experts of each MoE layer have computed so far, prompts included."""
        return [layer.tolist() for layer in self._experts.load]

    @property
    def is_alive(self) -> bool:
        return self._deliveries.death is None and self._batcher.is_alive

    def close(self) -> None:
        """Ends the engine; requests that are not done get an "error" delta. Safe to call again."""
        self._batcher.close()
        self.cache.close()
        if self._remote is not None:
            self._remote.close()
        if self._node is not None:
            self._node.close()
        if self._arena is not None:
            self._arena.close()
        self._deliveries.fail_all("the engine was closed")

    def _step_begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = self._batcher.scheduler.rows
        self._threads.begin(len(rows))
        self._route_watch.step_begins(rows)
        if self._standing_in is not None:
            self._standing_in.names = rows
        self._foresight.step_begins(kwargs["input_ids"][0, : len(rows)], rows)

    def _ended(self, request_id: str) -> None:
        self._foresight.ended(request_id)
        self._route_watch.forget(request_id)

    def _note_routes(self, layer: int, hidden: Tensor, expert_index: Tensor, wanted: list[int]) -> None:
        scheduler = self._batcher.scheduler
        num_rows = len(scheduler.rows)
        self._foresight.routed(layer, hidden[:num_rows], expert_index[:num_rows], wanted)
        if scheduler.is_crowded:
            self._routes.saw(layer, scheduler.rows, expert_index.numpy(force=True))

    def _watch(self, prompt_ids: list[int], params: SamplingParams) -> StopWatch | None:
        if not params.stop:
            return None
        if self._decode is None:
            raise ValueError("stop: this engine knows no text; make it with decode=..., or leave 'stop' out")
        return StopWatch(self._decode, params.stop, prompt_ids)

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
                f"{asked}, but the KV cache holds {self._batcher.kv_budget.tokens} tokens; "
                "shorten the prompt, lower max_tokens, or raise kv_tokens"
            )
