"""The `Gateway` deployment: HTTP and gRPC on one side, handles of `Engine` replicas on the other."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, cast

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ApplicationStatus

from raymoe import env
from raymoe.config import ServeConfig, parse_config
from raymoe.serving.answers import Answering
from raymoe.serving.events import Event
from raymoe.serving.failover import EngineLost, OnDeath, surviving
from raymoe.serving.grpc_service import GenerationMethods
from raymoe.serving.openai_api import ApiError, overloaded, unavailable
from raymoe.serving.routes import create_api

_STATUS_TIMEOUT_S = 5.0
_LOOK_UP_S = 1.0


@serve.deployment(name="Gateway")
@serve.ingress()
class Gateway(GenerationMethods):
    """Tokenises, applies the chat template, and turns tokens back into text; holds the client's stream."""

    def __init__(self, config: ServeConfig, engine: DeploymentHandle):
        # not at the top: whoever builds the application (`serve run`) must not wait for it
        from transformers import AutoTokenizer

        logging.getLogger("raymoe").setLevel(env.log_level())
        tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
        self._config = config
        client = HandleClient(engine, lambda: self._answering.config.on_engine_death)
        self._answering = Answering(config, tokenizer, client)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Changes limits and keys while requests run; Serve calls it with the deployment's `user_config`.

        Raises:
            ValueError: a key that cannot change live, or a value out of range.
        """
        self._answering.config = reconfigured(self._config, user_config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._answering)


LIVE_KEYS = frozenset(
    {
        "admin_keys",
        "api_keys",
        "deadline_s",
        "max_body_bytes",
        "max_choices",
        "max_prompt_tokens",
        "max_tokens",
        "on_engine_death",
    }
)
"""What a `user_config` of the gateway may change; the budgets are the engines'."""


def reconfigured(config: ServeConfig, changes: dict[str, Any]) -> ServeConfig:
    """Raises: ValueError, naming the key."""
    if unknown := sorted(changes.keys() - LIVE_KEYS):
        raise ValueError(f"user_config: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(LIVE_KEYS))}")
    return parse_config(ServeConfig, config.model_dump(exclude_unset=True) | changes, where="user_config")


class HandleClient:
    """The `EngineClient` over a Serve handle."""

    def __init__(self, handle: DeploymentHandle, on_engine_death: Callable[[], OnDeath]):
        self.on_engine_death = on_engine_death
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)
        self._has_started = False
        self._looked_up_s = 0.0
        self._is_ending = False

    async def generate(
        self, prompt_ids: list[int], params: dict[str, Any], in_steps: bool, up_to: bool
    ) -> AsyncGenerator[Event, None]:
        await self._wait_not_for_the_first()
        on_death = self.on_engine_death()

        def attempt(ids: list[int], asked: dict[str, Any], is_bound: bool) -> AsyncGenerator[Event, None]:
            return self._at_one_engine(ids, asked, in_steps, is_bound)

        async with aclosing(surviving(attempt, prompt_ids, params, up_to, on_death)) as events:
            async for event in events:
                yield event

    async def _at_one_engine(
        self, prompt_ids: list[int], params: dict[str, Any], in_steps: bool, up_to: bool
    ) -> AsyncGenerator[Event, None]:
        response = cast(DeploymentResponseGenerator, self._generate.remote(prompt_ids, params, in_steps, up_to))
        try:
            yield await self._first(response)
            async for event in response:
                if event.is_engine_dead:
                    raise EngineLost(event.error)
                yield event
        except BackPressureError:
            raise overloaded() from None
        except (RayActorError, ReplicaUnavailableError) as error:
            raise EngineLost(str(error)) from None
        except DeploymentUnavailableError:
            raise unavailable("no engine can be started; the server's log says why") from None
        except BaseException:
            # of one that no engine has, `cancel` would raise the error that is handled above
            response.cancel()
            raise

    async def _first(self, response: DeploymentResponseGenerator) -> Event:
        """Waits for an engine, unless none will come: Serve assigns nothing more while it takes an application down."""
        first = asyncio.ensure_future(anext(response))
        try:
            while not (await asyncio.wait([first], timeout=_LOOK_UP_S))[0]:
                if await self._is_taken_down():
                    raise unavailable("the server is being taken down")
            event: Event = first.result()
        finally:
            first.cancel()
        if event.is_engine_dead:
            raise EngineLost(event.error)
        return event

    async def _is_taken_down(self) -> bool:
        # those that wait share the answer
        if time.monotonic() > self._looked_up_s + _LOOK_UP_S:
            self._looked_up_s = time.monotonic()
            applications = (await asyncio.to_thread(serve.status)).applications
            found = applications.get(serve.get_replica_context().app_name)
            self._is_ending = found is None or found.status == ApplicationStatus.DELETING
        return self._is_ending

    async def _wait_not_for_the_first(self) -> None:
        """An engine that died will be replaced soon; one that never was may take as long as its model is large."""
        self._has_started = self._has_started or bool(await self.status())
        if not self._has_started:
            raise unavailable("the engines are not ready yet; /health says when one is")

    async def status(self, history: bool = False) -> list[dict[str, Any]]:
        try:
            # asks every replica, and is not queued behind requests
            response = self._handle.broadcast("status", history)
            answers = await response.results_async(timeout_s=_STATUS_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            return []
        return [answer for answer in answers if isinstance(answer, dict)]

    async def set_budgets(self, budgets: dict[str, Any]) -> None:
        response = self._handle.broadcast("set_budgets", budgets)
        for refusal in await response.results_async(timeout_s=_STATUS_TIMEOUT_S):
            if refusal is not None:
                raise ApiError(refusal)

    def metrics_endpoints(self) -> list[str]:
        """Ray exports every process's metrics at one port of its node."""
        alive = (node for node in ray.nodes() if node["Alive"])
        return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in alive]
