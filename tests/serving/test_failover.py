"""Requests whose engine dies, without Ray: what the next engine is asked, and what the client sees."""

import asyncio

import pytest

from raymoe.serving import failover
from raymoe.serving.events import Event
from raymoe.serving.failover import MOST_DEATHS, EngineLost, surviving
from raymoe.serving.openai_api import ApiError, overloaded

TOKENS = list(range(100, 112))


class Engines:
    """Each continues TOKENS from its prompt, and dies after as many tokens as its entry in `lives`."""

    def __init__(self, lives: list[int], room: int = len(TOKENS)):
        self.lives = list(lives)
        self.room = room
        self.asked: list[tuple[list[int], int, bool]] = []
        self.num_open = 0

    async def attempt(self, prompt_ids, params, up_to):
        self.asked.append((prompt_ids, params["max_tokens"], up_to))
        life = self.lives.pop(0) if self.lives else 1 << 30
        done = len([token for token in prompt_ids if token >= 100])
        most = min(params["max_tokens"], self.room) if up_to else params["max_tokens"]
        self.num_open += 1
        try:
            if life < 0:
                raise EngineLost
            yield Event([], max_tokens=most)
            for at in range(most):
                if at == life:
                    raise EngineLost
                await asyncio.sleep(0)
                yield Event([TOKENS[done + at]], "length" if at + 1 == most else None)
        finally:
            self.num_open -= 1


def run(engines: Engines, on_death="continue", up_to=False, max_tokens=12) -> list[Event]:
    async def gather():
        params = {"max_tokens": max_tokens, "seed": 3}
        return [event async for event in surviving(engines.attempt, [1, 2], params, up_to, on_death)]

    return asyncio.run(gather())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(failover, "_FIRST_WAIT_S", 0.0)


@pytest.mark.parametrize("lives", [[], [-1], [0], [5], [1, 1, 1], [11], [3, -1, 4]])
@pytest.mark.parametrize("up_to", [False, True])
def test_the_tokens_are_those_of_an_engine_that_lives(lives, up_to):
    engines = Engines(lives)
    first, *events = run(engines, up_to=up_to, max_tokens=50 if up_to else len(TOKENS))
    assert (first.tokens, first.max_tokens) == ([], len(TOKENS))
    assert [token for event in events for token in event.tokens] == TOKENS
    assert [event.finish_reason for event in events] == [None] * (len(TOKENS) - 1) + ["length"]
    sent = 0
    for life, (prompt_ids, max_tokens, _) in zip([*lives, 0], engines.asked, strict=True):
        assert prompt_ids == [1, 2, *TOKENS[:sent]]
        assert max_tokens == len(TOKENS) - sent or (up_to and not sent)
        sent += max(life, 0)
    assert engines.num_open == 0


def test_who_wants_it_so_gets_an_error_instead():
    with pytest.raises(ApiError, match="has died"):
        run(Engines([5]), on_death="fail")
    # of these nothing was sent
    assert len(run(Engines([0, -1]), on_death="fail")) == 1 + len(TOKENS)


def test_a_request_that_kills_its_engines_is_given_up():
    engines = Engines([1] * 50)
    with pytest.raises(ApiError, match=f"{MOST_DEATHS} engines have died"):
        run(engines)
    assert len(engines.asked) == MOST_DEATHS


def test_a_full_queue_turns_away_only_who_comes(monkeypatch):
    class Full(Engines):
        refusals = 2

        async def attempt(self, prompt_ids, params, up_to):
            if self.asked and self.refusals:
                self.refusals -= 1
                raise overloaded()
            async for event in super().attempt(prompt_ids, params, up_to):
                yield event

    monkeypatch.setattr(failover, "_QUEUE_WAIT_S", 0.0)
    engines = Full([3])
    assert [token for event in run(engines) for token in event.tokens] == TOKENS
    assert engines.refusals == 0

    class AlwaysFull(Engines):
        async def attempt(self, prompt_ids, params, up_to):
            raise overloaded()
            yield

    with pytest.raises(ApiError, match="too many requests"):
        run(AlwaysFull([]))


def test_what_cannot_go_on_says_so():
    class Smaller(Engines):
        async def attempt(self, prompt_ids, params, up_to):
            if self.asked:
                yield Event([], refusal="the KV cache holds 8 tokens")
                return
            async for event in super().attempt(prompt_ids, params, up_to):
                yield event

    with pytest.raises(ApiError, match="no other could go on: the KV cache holds 8 tokens") as error:
        run(Smaller([4]))
    assert error.value.status == 503
