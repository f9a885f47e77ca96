"""A served model's `ExpertHost`s: made, watched, replaced, and told who holds what.

D hosts, L MoE layers, E experts of the layer with the most.
"""

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from raymoe.actors.expert_host import ExpertHost
from raymoe.actors.host_directory import Directory, HostEntry, HostState
from raymoe.actors.ray_private import draining_nodes
from raymoe.config import ExpertHostsConfig
from raymoe.placement.hosting import Key, holdings, host_owners

logger = logging.getLogger("raymoe")

_BEAT_S = 0.2
_SILENT_S = 15.0
"""A host that has said nothing for so long is taken for dead, and killed."""
_LONGEST_WAIT_S = 30.0
_ARRIVAL_S = 120.0
"""The others wait no longer for a new host to hold its share."""
_COOLING_S = 30.0
"""So often what was asked for counts half, and copies are looked at anew."""
_BETTER = 1.1


@dataclass
class _Member:
    number: int
    actor: ActorHandle
    asked: ray.ObjectRef | None = None
    heard_s: float = field(default_factory=time.monotonic)
    state: HostState | None = None
    held: np.ndarray | None = None
    wanted: list[Key] | None = None
    """What it is to hold."""
    told: list[Key] | None = None
    told_s: float = 0.0
    has_arrived: bool = False
    """It has held all that it was told to, once."""
    is_leaving: bool = False
    """It gives as long as it can, owns nothing more, and goes as soon as the others hold what it had."""


class HostFleet:
    """Keeps as many hosts as are wanted, and the directory of them. Owned by one process: the hosts end with it."""

    def __init__(self, model: Path, config: ExpertHostsConfig, dtype: str, precision: str, variables: dict[str, str]):
        """Starts a thread that does it all; `directory` has no hosts before the first is there."""
        self._model, self._config, self._variables = model, config, variables
        self._dtype, self._precision = dtype, precision
        self._lock = threading.Lock()
        self._count = config.count
        self._members: dict[int, _Member] = {}
        self._next = 0
        self._owners: np.ndarray | None = None
        self._owner_members: list[int] = []
        self._heat: np.ndarray | None = None
        self._cooled_s = time.monotonic()
        self._failures = 0
        self._hire_at_s = 0.0
        self._drained: tuple[float, set[str]] = (0.0, set())
        self._deaths = 0
        self.failure: str | None = None
        """Why the last host that did not even start failed; None once one has."""
        # one that comes after us must not be taken for us
        self._directory = Directory(time.time_ns(), ())
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-fleet", daemon=True)
        self._thread.start()

    @property
    def directory(self) -> Directory:
        """As of now."""
        return self._directory

    def asked_for(self, usage: np.ndarray) -> None:
        """An engine has asked for experts so many times, int64 [L, E], since it last said so."""
        with self._lock:
            if self._heat is None or self._heat.shape != usage.shape:
                self._heat = np.zeros(usage.shape)
            self._heat += usage

    def scale(self, count: int) -> None:
        """Has so many hosts from now on.

        Raises:
            ValueError: less than one.
        """
        if count < 1:
            raise ValueError(f"expert_hosts.count: must be at least 1, got {count}")
        with self._lock:
            self._count = count

    def facts(self) -> dict[str, Any]:
        """Plain values: the directory's version, and each host's own facts."""
        with self._lock:
            members = list(self._members.values())
            return {
                "version": self._directory.version,
                "wanted_hosts": self._count,
                "deaths": self._deaths,
                "is_settled": len(members) == self._count and all(map(_is_settled, members)),
                "hosts": {
                    m.number: {
                        "node": m.state.node,
                        "pid": m.state.pid,
                        "is_settled": m.state.is_settled,
                        **m.state.facts,
                    }
                    for m in members
                    if m.state is not None
                },
            }

    def close(self) -> None:
        """Ends all hosts."""
        self._ends.set()
        self._thread.join()
        for member in self._members.values():
            ray.kill(member.actor)
        self._members = {}

    def _run(self) -> None:
        while not self._ends.wait(_BEAT_S):
            try:
                self._beat()
            except Exception:
                # the hosts go on serving by the last directory
                logger.exception("the directory of expert hosts could not be renewed")

    def _beat(self) -> None:
        self._hire()
        is_changed = self._listen()
        if self._share() or is_changed:
            self._publish()
        self._tell()
        self._ask()

    def _hire(self) -> None:
        with self._lock:
            count = self._count
        leaving_nodes = self._leaving_nodes()
        for member in self._members.values():
            member.is_leaving |= member.state is not None and member.state.node in leaving_nodes
        staying = [member for member in self._members.values() if not member.is_leaving]
        # the youngest go: there are fewest who know them
        for member in sorted(staying, key=lambda m: m.number)[count:]:
            member.is_leaving = True
        self._dismiss()
        if len(staying) < count and time.monotonic() >= self._hire_at_s:
            config = self._config
            for _ in range(count - len(staying)):
                actor = ExpertHost.options(
                    num_cpus=config.num_cpus,
                    num_gpus=config.num_gpus,
                    scheduling_strategy="SPREAD",
                    runtime_env={"env_vars": self._variables},
                ).remote(self._next, self._model, config.memory_each, self._dtype, self._precision)
                with self._lock:
                    self._members[self._next] = _Member(self._next, actor)
                self._next += 1

    def _dismiss(self) -> None:
        """Ends those that leave, once nobody needs them."""
        staying = [member for member in self._members.values() if not member.is_leaving]
        is_ready = all(map(_is_settled, staying))
        for member in list(self._members.values()):
            if member.is_leaving and (is_ready or member.state is None) and member.number not in self._owner_members:
                self._remove(member.number)
                self._publish()

    def _listen(self) -> bool:
        """Takes in what hosts have said; True if who is there, or what they hold, has changed."""
        is_changed = False
        for member in list(self._members.values()):
            if member.asked is None or not ray.wait([member.asked], timeout=0)[0]:
                is_silent = member.state is not None and time.monotonic() - member.heard_s > _SILENT_S
                if is_silent:
                    self._died(member, f"has not answered for {_SILENT_S:g} s")
                    is_changed = True
                continue
            ref, member.asked = member.asked, None
            try:
                state: Any = ray.get(ref)
            except ActorUnavailableError:
                continue
            except RayActorError as error:
                self._died(member, f"died: {_one_line(error)}")
                is_changed = True
                continue
            except RayError as error:
                logger.warning("expert host %d cannot say how it is: %s", member.number, _one_line(error))
                continue
            is_new = member.state is None or state.held is not None or state.speed != member.state.speed
            with self._lock:
                member.state, member.heard_s = state, time.monotonic()
                if state.held is not None:
                    member.held = state.held
            self._failures, self.failure = 0, None
            is_changed |= is_new
        return is_changed

    def _ask(self) -> None:
        for member in self._members.values():
            if member.asked is None:
                known = member.state.changes if member.state is not None else -1
                member.asked = member.actor.state.remote(known)

    def _died(self, member: _Member, why: str) -> None:
        logger.warning("expert host %d %s; what it held comes from others or from the files", member.number, why)
        if member.state is None:
            self._failures += 1
            self.failure = why
            self._hire_at_s = time.monotonic() + min(_BEAT_S * 2.0**self._failures, _LONGEST_WAIT_S)
        self._deaths += 1
        self._remove(member.number)

    def _remove(self, number: int) -> None:
        with self._lock:
            member = self._members.pop(number)
        with suppress(RayError):
            ray.kill(member.actor)

    # who holds what

    def _share(self) -> bool:
        """Says what each host is to hold, if it is time to; True if who owns what has changed."""
        there = {m.number: m.state for m in self._members.values() if m.state is not None and not m.is_leaving}
        staying = sorted(there)
        if not staying:
            return False
        num_experts = there[staying[0]].num_experts
        is_regrouped = staying != self._owner_members
        is_time = time.monotonic() - self._cooled_s > _COOLING_S
        if not is_regrouped and not is_time:
            return False
        heat = self._cooled(num_experts, is_time)
        capacity = [there[number].num_slots for number in staying]
        if is_regrouped:
            before = [self._owner_members.index(n) if n in self._owner_members else None for n in staying]
            self._owners = host_owners(self._owners, before, num_experts)
            self._owner_members = staying
        assert self._owners is not None, "set when they were first grouped"
        wanted = holdings(self._owners, capacity, heat, num_experts)
        if not is_regrouped and not self._is_better(wanted, staying, heat):
            return False
        for number, keys in zip(staying, wanted, strict=True):
            self._members[number].wanted = keys
        return is_regrouped

    def _tell(self) -> None:
        """Those that are new first: the others must not give up what is to move there before it is there."""
        members = [member for member in self._members.values() if member.wanted is not None]
        for member in members:
            is_late = member.told is not None and time.monotonic() - member.told_s > _ARRIVAL_S
            member.has_arrived |= _has_all(member) or is_late
        all_have_arrived = all(member.has_arrived for member in members)
        for member in members:
            if member.wanted != member.told and (all_have_arrived or not member.has_arrived):
                member.told, member.told_s = member.wanted, time.monotonic()
                member.actor.hold.remote(member.wanted)

    def _cooled(self, num_experts: list[int], is_time: bool) -> np.ndarray:
        with self._lock:
            if self._heat is None:
                self._heat = np.zeros((len(num_experts), max(num_experts)))
            if is_time:
                self._cooled_s = time.monotonic()
                self._heat *= 0.5
            return self._heat.copy()

    def _is_better(self, wanted: list[list[Key]], staying: list[int], heat: np.ndarray) -> bool:
        """Whether enough more of what is asked for would be held, copies counted: to move experts for less is a waste."""

        def held(keys: list[Key]) -> float:
            return sum(heat[key] for key in keys)

        now = sum(held(self._members[number].wanted or []) for number in staying)
        return sum(map(held, wanted)) > _BETTER * now

    def _leaving_nodes(self) -> set[str]:
        """Nodes that are about to be taken away."""
        asked_s, nodes = self._drained
        if time.monotonic() - asked_s > 5 * _BEAT_S:
            nodes = draining_nodes()
            self._drained = time.monotonic(), nodes
        return nodes

    def _publish(self) -> None:
        entries = [
            HostEntry(m.number, m.state.node, m.actor, m.state.handle, m.held, m.state.speed, m.state.call_bytes)
            for m in self._members.values()
            if m.state is not None and m.held is not None
        ]
        self._directory = Directory(self._directory.version + 1, tuple(entries))


def _has_all(member: _Member) -> bool:
    """Whether it holds all that it was told to."""
    return member.told is not None and member.held is not None and all(member.held[key] for key in member.told)


def _is_settled(member: _Member) -> bool:
    """Whether it holds what it is to hold, and there is nothing more to tell it."""
    return member.wanted is not None and member.told == member.wanted and _has_all(member)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
