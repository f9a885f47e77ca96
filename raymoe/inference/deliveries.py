"""Who waits for an engine's tokens, and what each was told."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from raymoe.inference.meter import Meter
from raymoe.inference.requests import Delta, EngineError, FinishReason, TokenLogprobs, TokenRoute
from raymoe.inference.text import StopWatch

logger = logging.getLogger("raymoe.inference")


@dataclass
class Request:
    """One that is not over."""

    on_delta: Callable[[Delta], None]
    stop_ids: tuple[int, ...]
    num_tokens: int
    """Most that it may come to, prompt and answer."""
    watch: StopWatch | None = None
    """Looks for stop strings, where there are any."""
    submitted_s: float = field(default_factory=time.monotonic)
    num_sent: int = 0
    is_over: bool = False
    telling: threading.RLock = field(default_factory=threading.RLock)


class Deliveries:
    """Turns the steps' outputs into each request's deltas. Safe to use from several threads."""

    def __init__(
        self,
        meter: Meter,
        cancel: Callable[[str], None],
        ended: Callable[[str], None],
        stood_in: Callable[[str], int] | None = None,
        route: Callable[[str, int], TokenRoute | None] = lambda *_: None,
    ):
        """`cancel`: makes the generation thread drop a request before its next step; `ended`: told of each that is over, from any
        thread; `stood_in`: what the last delta of a request says, see `Delta`; `route`: of the token that a step gave a request.
        """
        self._meter = meter
        self._cancel = cancel
        self._ended = ended
        self._stood_in = stood_in
        self._route = route
        self._lock = threading.Lock()
        self._requests: dict[str, Request] = {}
        self._finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self.death: str | None = None
        """Why there will be no more tokens for anyone."""

    def add(self, request_id: str, request: Request, prompt_tokens: int) -> None:
        """Raises: EngineError: the engine has ended."""
        with self._lock:
            if self.death is not None:
                raise EngineError(f"the engine has ended ({self.death}); make a new one")
            self._requests[request_id] = request
            self._prompt_tokens += prompt_tokens
        self._meter.submitted(prompt_tokens)

    def largest(self) -> int:
        """Most tokens, prompt and answer, that one of the requests that are not over may come to."""
        with self._lock:
            return max((request.num_tokens for request in self._requests.values()), default=0)

    def counters(self) -> dict[str, int]:
        with self._lock:
            return {
                "requests_running": len(self._requests),
                **{f"requests_{reason}": count for reason, count in self._finished.items()},
                "prompt_tokens": self._prompt_tokens,
                "generated_tokens": self._generated_tokens,
            }

    def deliver(self, outputs: list[GenerationOutput], logprobs: dict[str, list[TokenLogprobs]]) -> None:
        """Called on the generation thread after every step.

        Args:
            outputs: of the requests that moved, each with all its tokens so far.
            logprobs: of this step's tokens, for the requests that asked for them.
        """
        num_new = 0
        told: list[tuple[str, Request, Delta]] = []
        for output in outputs:
            with self._lock:
                request = self._requests.get(output.request_id)
            if request is None:
                continue
            delta = self._next(request, output, logprobs.get(output.request_id))
            num_new += len(delta.tokens)
            # a request that was cancelled meanwhile has had its last delta
            if delta.finish_reason is None or self._close(output.request_id, delta.finish_reason):
                told.append((output.request_id, request, delta))
        with self._lock:
            self._generated_tokens += num_new
        # before the callbacks: whoever has its last token may ask for the counters
        self._meter.stepped(num_new, is_idle=not self._requests)
        for request_id, request, delta in told:
            self._call(request_id, request, delta)

    def finish(self, request_id: str, reason: FinishReason, error: str | None = None) -> bool:
        """Ends a request with a last delta; False if it is over already."""
        request = self._close(request_id, reason)
        if request is not None:
            self._call(request_id, request, Delta([], reason, error))
        return request is not None

    def fail_all(self, reason: str) -> None:
        """Nothing more will come: everyone is told why."""
        with self._lock:
            self.death = self.death or reason
            waiting = list(self._requests)
        for request_id in waiting:
            self.finish(request_id, "error", f"the engine has ended: {self.death}")

    def _next(self, request: Request, output: GenerationOutput, logprobs: list[TokenLogprobs] | None) -> Delta:
        new = output.generated_tokens[request.num_sent :]
        if new and not request.num_sent:
            self._meter.first_token(time.monotonic() - request.submitted_s)
        reason: FinishReason | None = None
        if output.status == RequestStatus.FAILED:
            reason = "error"
        elif output.status == RequestStatus.FINISHED:
            reason = "stop" if new and new[-1] in request.stop_ids else "length"
        stop_string = None
        # a stop token is no text
        taken = request.watch and request.watch.take(new[:-1] if reason == "stop" else new)
        if request.watch is not None and taken is not None:
            new, stop_string = new[:taken], request.watch.found
            if reason is None:
                self._cancel(output.request_id)
            reason = "stop"
        request.num_sent += len(new)
        # a step gives one token
        route = self._route(output.request_id, new[-1]) if new else None
        return Delta(
            new,
            reason,
            output.error,
            stop_string,
            logprobs=logprobs[: len(new)] if logprobs is not None else None,
            routes=None if route is None else [route],
        )

    def _close(self, request_id: str, reason: FinishReason) -> Request | None:
        with self._lock:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._finished[reason] += 1
        if request is not None:
            self._meter.ended(reason)
            self._ended(request_id)
        return request

    def _call(self, request_id: str, request: Request, delta: Delta) -> None:
        # a cancellation comes from another thread, and nothing may follow a last delta
        with request.telling:
            if request.is_over:
                return
            request.is_over = delta.finish_reason is not None
            if request.is_over and self._stood_in is not None:
                delta = replace(delta, stood_in=self._stood_in(request_id))
            try:
                request.on_delta(delta)
            except Exception:
                # one client's callback must not take the thread, and with it all other requests, down
                logger.exception("on_delta of %s failed; the request is dropped", request_id)
                if self.finish(request_id, "cancelled"):
                    self._cancel(request_id)
