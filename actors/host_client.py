"""An engine's way to the expert hosts: implements `raymoe.inference.remote.RemoteExperts` with Ray."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch import Tensor

from raymoe.actors.host_directory import Directory, HostEntry
from raymoe.actors.session import NAMESPACE
from raymoe.inference.remote import HostSpeed, Parcel, bytes_of
from raymoe.inference.slots_handle import SlotsHandle
from raymoe.inference.tier_rate import TierRate, fit
from raymoe.inference.tiers import NotHeld

logger = logging.getLogger("raymoe")

_LOOK_S = 0.25
_ANSWER_S = 5.0
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 30.0
_ECHOES = 4


class HostUnreachable(ConnectionError):
    """A host is gone, or does not answer in time."""


class HostClient:
    """The hosts behind the directory `name`, wherever they are. Safe to use from several threads.

    A thread asks the directory for news. A host that failed is not asked again before there is some, one that did not answer in
    time not for a second, then two, up to half a minute.
    """

    def __init__(self, name: str, *, timeout_s: float = 5.0):
        """`timeout_s`: a call that has not been answered for so long has failed."""
        self._name, self._timeout_s = name, timeout_s
        self._node = ray.get_runtime_context().get_node_id()
        self._lock = threading.Lock()
        self._directory = Directory(-1, ())
        self._on_node: tuple[SlotsHandle, ...] = ()
        self._gone: set[int] = set()
        self._rests: dict[int, tuple[float, float]] = {}
        self._ways: dict[int, TierRate] = {}
        self._usage: np.ndarray | None = None
        self._turn = 0
        self._counts = {"given": 0, "sent_calls": 0, "failed_calls": 0, "slow_calls": 0}
        self._ends = threading.Event()
        self._has_hosts = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="expert-directory", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Waits until a host is known; whether one is."""
        return self._has_hosts.wait(timeout_s)

    def on_node(self) -> Sequence[SlotsHandle]:
        """See `RemoteExperts`."""
        return self._on_node

    def give(self, layer: int, expert: int) -> Parcel:
        """See `RemoteExperts`."""
        last: Exception | None = None
        for host in self._holders(layer, expert):
            try:
                (parcel,) = self._get(host, host.actor.give.remote([(layer, expert)]))
            except HostUnreachable as error:
                last = error
                continue
            if parcel is not None:
                with self._lock:
                    self._counts["given"] += 1
                    self._used(layer, [expert])
                return parcel
        if last is not None:
            raise last
        raise NotHeld(f"no host holds expert {expert} of MoE layer {layer}")

    def holder(self, layer: int, expert: int) -> int | None:
        """See `RemoteExperts`."""
        holders = self._holders(layer, expert)
        return holders[0].number if holders else None

    def send(self, host: int, layer: int, rows: Tensor, experts: Sequence[int], counts: Sequence[int]) -> "_Sent":
        """See `RemoteExperts`."""
        entry = next((each for each in self._directory.hosts if each.number == host), None)
        if entry is None:
            raise HostUnreachable(f"expert host {host} is not in the directory any more")
        with self._lock:
            self._counts["sent_calls"] += 1
            self._used(layer, experts)
        dtype = str(rows.dtype).removeprefix("torch.")
        ref = entry.actor.compute.remote(layer, bytes_of(rows), dtype, list(experts), list(counts))
        return _Sent(lambda: self._get(entry, ref), rows)

    def speed(self, host: int) -> HostSpeed | None:
        """See `RemoteExperts`."""
        entry = next((each for each in self._directory.hosts if each.number == host), None)
        way = self._ways.get(host)
        if entry is None or entry.speed is None or way is None:
            return None
        return HostSpeed(way, *entry.speed)

    def facts(self) -> dict[str, Any]:
        """Directory's version, hosts by number with what they hold and how fast they are, and what they were asked."""
        with self._lock:
            counts, gone = dict(self._counts), set(self._gone)
        directory = self._directory
        return {
            "version": directory.version,
            "hosts": {
                host.number: {
                    "node": host.node,
                    "is_here": host.node == self._node,
                    "is_gone": host.number in gone,
                    "held": int(host.held.sum()),
                    "way": way._asdict() if (way := self._ways.get(host.number)) else None,
                }
                for host in directory.hosts
            },
            **counts,
        }

    def close(self) -> None:
        """See `RemoteExperts`. Safe to call again."""
        self._ends.set()
        self._thread.join()

    def _holders(self, layer: int, expert: int) -> list[HostEntry]:
        """Those that have it and are not known to be away, another one first each time."""
        now_s = time.monotonic()
        found = [
            host
            for host in self._directory.hosts
            if host.held[layer, expert] and host.number not in self._gone and not self._is_resting(host.number, now_s)
        ]
        if len(found) > 1:
            self._turn += 1
            first = self._turn % len(found)
            found = found[first:] + found[:first]
        return found

    def _is_resting(self, number: int, now_s: float) -> bool:
        rest = self._rests.get(number)
        return rest is not None and now_s < rest[0]

    def _used(self, layer: int, experts: Sequence[int]) -> None:
        if self._usage is None and self._directory.hosts:
            self._usage = np.zeros(self._directory.hosts[0].held.shape, dtype=np.int64)
        if self._usage is not None:
            self._usage[layer, list(experts)] += 1

    def _get(self, host: HostEntry, ref: ray.ObjectRef) -> Any:
        """What a host answers.

        Raises:
            HostUnreachable: it does not.
            NotHeld: it says so.
        """
        try:
            answer = ray.get(ref, timeout=self._timeout_s)
        except GetTimeoutError:
            with self._lock:
                _, before_s = self._rests.get(host.number, (0.0, 0.0))
                rest_s = min(max(_FIRST_REST_S, 2 * before_s), _LONGEST_REST_S)
                self._rests[host.number] = time.monotonic() + rest_s, rest_s
                self._counts["slow_calls"] += 1
            raise HostUnreachable(f"expert host {host.number} has not answered for {self._timeout_s:g} s") from None
        except RayTaskError as error:
            if isinstance(error.cause, NotHeld):
                raise NotHeld(str(error.cause)) from None
            raise
        except RayError as error:
            with self._lock:
                self._gone.add(host.number)
                self._counts["failed_calls"] += 1
            raise HostUnreachable(f"expert host {host.number} is gone: {' '.join(str(error).split())[:200]}") from None
        if host.number in self._rests:
            with self._lock:
                self._rests.pop(host.number, None)
        return answer

    # news from the directory

    def _follow(self) -> None:
        owner: ActorHandle | None = None
        while not self._ends.wait(_LOOK_S if self._has_hosts.is_set() else _LOOK_S / 5):
            if not ray.is_initialized():
                # any further call would start a cluster
                return
            try:
                # never kept after an error: it may have been started anew
                owner = owner or ray.get_actor(self._name, NAMESPACE)
                with self._lock:
                    usage, self._usage = self._usage, None
                found: Any = ray.get(owner.look.remote(self._directory.version, usage), timeout=_ANSWER_S)
                if found is not None:
                    self._take(found)
                self._measure()
            except (ValueError, RayError, GetTimeoutError) as error:
                owner = None
                logger.debug("no news of the expert hosts: %s", error)
            except Exception:
                logger.exception("the directory of expert hosts cannot be followed")

    def _take(self, directory: Directory) -> None:
        with self._lock:
            self._directory = directory
            numbers = {host.number for host in directory.hosts}
            # numbers are not used again, so one that is gone stays so
            self._gone &= numbers
            self._rests = {number: rest for number, rest in self._rests.items() if number in numbers}
            self._ways = {number: way for number, way in self._ways.items() if number in numbers}
        handles = [host.handle for host in directory.hosts if host.node == self._node]
        self._on_node = tuple(handle for handle in handles if handle is not None)
        if directory.hosts:
            self._has_hosts.set()

    def _measure(self) -> None:
        """How long a call takes, of hosts that are new."""
        for host in self._directory.hosts:
            if host.number in self._ways or host.number in self._gone:
                continue
            times: dict[int, list[float]] = {}
            # large and small answers travel differently: what counts is how those do that there will be
            for num_bytes in host.call_bytes:
                payload = np.zeros(num_bytes // 2, dtype=np.uint8)
                for _ in range(_ECHOES):
                    began_s = time.perf_counter()
                    try:
                        self._get(host, host.actor.echo.remote(payload, num_bytes // 2))
                    except HostUnreachable:
                        return
                    times.setdefault(num_bytes, []).append(time.perf_counter() - began_s)
            self._ways[host.number] = fit({size: [median(found[1:])] for size, found in times.items()})


class _Sent:
    """See `raymoe.inference.remote.Sent`."""

    def __init__(self, answer: Callable[[], Any], rows: Tensor):
        self._answer, self._dtype, self._device, self._shape = answer, rows.dtype, rows.device, rows.shape

    def wait(self) -> Tensor:
        data, _ = self._answer()
        # torch knows no memory that must not be written
        return torch.from_numpy(data.copy()).view(self._dtype).view(self._shape).to(self._device)
