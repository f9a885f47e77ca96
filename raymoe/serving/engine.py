"""The `Engine` deployment: an `InferenceEngine` behind a Serve handle."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from raymoe import env
from raymoe.config import ServeConfig
from raymoe.inference import Delta, EngineError, SamplingParams, TokenLogprobs
from raymoe.inference.requests import TokenRoute
from raymoe.inference.text import decoder
from raymoe.serving.events import Event
from raymoe.serving.hosts import directory_name


@serve.deployment(name="Engine")
class Engine:
    """One device's engine. Built by `raymoe.serving.build_app`, which sets its size."""

    def __init__(self, config: ServeConfig, hosts: DeploymentHandle | None = None):
        """`hosts`: there only so that Serve runs that deployment; the hosts' directory is found by its name."""
        # not at the top: whoever builds the application (`serve run`) must not wait for torch
        import torch
        from transformers import AutoTokenizer

        from raymoe.actors.metrics import export_metrics
        from raymoe.inference import InferenceEngine
        from raymoe.inference.scheduler import GroupingOptions

        logging.getLogger("raymoe").setLevel(env.log_level())
        torch.set_num_threads(max(1, int(config.num_cpus)))
        export_metrics()
        remote = None
        if config.expert_hosts is not None:
            from raymoe.actors.host_client import HostClient

            remote = HostClient(directory_name(), timeout_s=config.expert_hosts.timeout_s)
        self._engine = InferenceEngine(
            config.model,
            expert_memory=config.expert_memory,
            dtype=config.dtype,
            device="cuda" if config.num_gpus else "cpu",
            max_batch_tokens=config.max_batch_tokens,
            kv_tokens=config.kv_tokens,
            max_requests=config.max_batch_requests,
            expert_readers=config.expert_readers,
            eviction=config.eviction,
            direct_io=config.direct_io,
            predictors=config.predictors,
            grouping=GroupingOptions(max_wait_steps=config.max_wait_steps),
            prefix_sharing=config.prefix_sharing,
            remote=remote,
            on_miss=config.on_miss,
            expert_precision=config.expert_precision,
            arena=config.arena,
            decode=decoder(AutoTokenizer.from_pretrained(config.model, local_files_only=True)),
        )

    async def generate(
        self, prompt_ids: list[int], params: dict[str, Any], in_steps: bool = True, up_to: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Runs one request; closing the generator cancels it.

        Args:
            params: of `SamplingParams`.
            in_steps: tell of tokens as they come, not only at the end: each telling costs the handle a millisecond.
            up_to: take less than `max_tokens` where there is not the room for as many.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Delta] = asyncio.Queue()

        def on_delta(delta: Delta) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, delta)

        if up_to:
            room = self._engine.room(len(prompt_ids))
            params = params | {"max_tokens": max(1, min(params["max_tokens"], room))}
        try:
            request_id = self._engine.submit(prompt_ids, SamplingParams(**params), on_delta)
        except ValueError as error:
            yield Event([], refusal=str(error))
            return
        except EngineError as error:
            yield Event([], error=str(error), is_engine_dead=True)
            return
        try:
            yield Event([], max_tokens=params["max_tokens"])
            tokens: list[int] = []
            logprobs: list[TokenLogprobs] = []
            routes: list[TokenRoute] = []
            while True:
                delta = await inbox.get()
                tokens += delta.tokens
                logprobs += delta.logprobs or []
                routes += delta.routes or []
                is_last = delta.finish_reason is not None
                # a consumer that is slower than the steps gets several at once
                if is_last or (in_steps and inbox.empty()):
                    told = None if params.get("logprobs") is None else logprobs
                    is_dead = delta.finish_reason == "error" and not self._engine.is_alive
                    yield Event(
                        tokens,
                        delta.finish_reason,
                        error=delta.error,
                        stop_string=delta.stop_string,
                        logprobs=told,
                        stood_in=delta.stood_in,
                        routes=routes or None,
                        is_engine_dead=is_dead,
                    )
                    tokens, logprobs, routes = [], [], []
                if is_last:
                    return
        finally:
            self._engine.cancel(request_id)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Changes budgets while requests run; Serve calls it with the deployment's `user_config`.

        Args:
            user_config: `expert_memory` and `kv_tokens`, or one of them, as in `ServeConfig`; what shrinks does so first.

        Raises:
            ValueError: an unknown key, or a budget that cannot be had; what came before it stays changed.
        """
        known = {"expert_memory": self._engine.set_expert_memory, "kv_tokens": self._engine.set_kv_tokens}
        if unknown := sorted(user_config.keys() - known.keys()):
            raise ValueError(f"user_config: unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
        order = sorted(user_config, key=lambda key: key == "kv_tokens")
        if user_config.get("kv_tokens", self._engine.stats()["kv_tokens"]) < self._engine.stats()["kv_tokens"]:
            order.reverse()
        for key in order:
            known[key](user_config[key])

    def set_budgets(self, budgets: dict[str, Any]) -> str | None:
        """`reconfigure`, for whoever asks over HTTP: why not, or None."""
        try:
            self.reconfigure(budgets)
        except (ValueError, EngineError) as error:
            return str(error)
        return None

    def status(self, history: bool = False) -> dict[str, Any]:
        """`InferenceEngine.stats` and the engine's process, with its `history` and `load` if asked for."""
        stats = self._engine.stats() | {"pid": os.getpid()}
        return stats | {"history": self._engine.history(), "load": self._engine.expert_load()} if history else stats

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if not self._engine.is_alive:
            raise EngineError("the generation thread has ended")

    def __del__(self):
        # Serve calls this when it takes the replica down
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()
