"""Whether a model can be served by a device, and how fast at most: arithmetic on sizes and bandwidths.

Rates are bounds: what bandwidths allow if nothing else took time. Bytes are whole, times float64 nanoseconds.
H hidden size, K choices per token, L MoE layers, E experts a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raymoe.placement.fit import RESERVE, ModelNumbers


@dataclass(frozen=True)
class ServingMachine:
    """What serving needs to know of the machines; None: not known. Bandwidths in bytes per second."""

    memory_bytes: int
    """Of a device."""
    devices: int = 1
    memory_bytes_s: int | None = None
    """At which a device reads its own memory."""
    flops_s: int | None = None
    has_host: bool = True
    """Whether host memory is a tier of its own, below the device's; not on CPUs, which compute from it."""
    host_bytes: int | None = None
    """Host memory of a node."""
    host_bytes_s: int | None = None
    """From host memory to a device."""
    file_bytes_s: int | None = None
    """From the checkpoint's files."""
    link_bytes_s: int | None = None
    """Between devices, over the slowest link between any two."""
    link_latency_ns: int = 0


@dataclass(frozen=True)
class DecodeStep:
    """One decode step of a batch, a token a request: a bound on its time by what must be read, computed and fetched."""

    batch: int
    wanted: float
    """Different experts that the step's tokens want, over all layers."""
    misses: float
    """Those of them that are not resident."""
    near_ns: float | None
    """Reading dense weights, wanted experts and KV cache from device memory, or computing, whichever is longer."""
    fetch_ns: float | None
    """Bringing the missing experts; 0 without misses. If tokens are sent instead: their ways, and all else before and after."""
    near_bound: str
    """Which of the two it is."""
    far_bound: str
    """What sets `fetch_ns`."""

    @property
    def step_ns(self) -> float | None:
        """Fetches that overlap perfectly with all else: the longer of the two; None if a bandwidth is not known."""
        if self.near_ns is None or self.fetch_ns is None:
            return None
        return max(self.near_ns, self.fetch_ns)

    @property
    def tokens_per_s(self) -> float | None:
        return None if self.step_ns is None else self.batch * 1e9 / self.step_ns

    @property
    def bound(self) -> str:
        """What sets the rate, or what is not known of it."""
        if self.near_ns is None or self.fetch_ns is None:
            return self.near_bound if self.near_ns is None else self.far_bound
        return self.far_bound if self.fetch_ns > self.near_ns else self.near_bound


@dataclass(frozen=True)
class ServingFit:
    """Where a model's bytes go when it is served by one engine on one device."""

    usable_bytes: int
    """Of the device, without the reserve."""
    dense_bytes: int
    kv_bytes: int
    expert_bytes: int
    """Of all experts."""
    budget_bytes: int
    """For experts on the device: whole experts, at most all of them; 0: dense part and KV cache leave no room for one."""
    host_bytes: int
    """Experts that host memory must hold."""
    file_bytes: int
    """Experts that neither device nor host holds, read from the checkpoint."""
    requests_most: int
    """Of that context, that leave room for one expert at least."""
    requests_whole: int
    """That leave room for all experts."""
    devices_whole: int | None
    """Smallest number of such devices whose budgets together hold all experts; None: no number does."""
    uniform: tuple[DecodeStep, ...]
    """By batch, if all experts are wanted equally often: then any cache misses what it does not hold. Real routing is
    skewed, and does better."""
    worst: tuple[DecodeStep, ...]
    """By batch, if every wanted expert misses: what holds whatever the routing."""
    spread: tuple[DecodeStep, ...]
    """By batch, with the experts spread over all devices, missing ones reached by the cheaper of `move_expert_ns` and
    `move_token_ns`; empty if they do not hold all experts together, or if one device does."""
    move_expert_ns: float | None
    """Bringing one expert from another device."""
    move_token_ns: float | None
    """Sending one token to another device and its result back."""

    @property
    def fits(self) -> bool:
        return self.budget_bytes > 0

    @property
    def is_whole(self) -> bool:
        return self.budget_bytes == self.expert_bytes

    @property
    def share(self) -> float:
        """Of the experts that are resident."""
        return self.budget_bytes / self.expert_bytes


def fit_serving(
    model: ModelNumbers,
    machine: ServingMachine,
    *,
    context: int,
    batches: Sequence[int],
    budget_bytes: int | None = None,
) -> ServingFit:
    """What serving takes of a device's memory, which experts stay on it, and what bandwidths allow.

    The KV cache is for the largest of `batches` requests of `context` tokens each.

    Args:
        context: tokens a request holds.
        batches: requests that decode at once; a rate for each.
        budget_bytes: for experts; None: all that is left.

    Raises:
        ValueError: a count below 1, a budget below one expert, or one that does not fit beside dense part and KV cache.
    """
    if context < 1 or not batches or min(batches) < 1:
        raise ValueError(f"context = {context}, batches = {list(batches)}: must be at least 1")
    usable = int(machine.memory_bytes * (1 - RESERVE))
    dense_bytes = model.dense_parameters * model.parameter_bytes
    request_bytes = context * model.kv_bytes
    kv_bytes = max(batches) * request_bytes
    total = model.layers * model.experts * model.expert_bytes
    room = min(max((usable - dense_bytes - kv_bytes) // model.expert_bytes, 0) * model.expert_bytes, total)
    budget = room
    if budget_bytes is not None:
        budget = min(budget_bytes // model.expert_bytes * model.expert_bytes, total)
        if not 0 < budget <= room:
            raise ValueError(
                f"expert_memory is {budget_bytes} bytes; it must hold one expert ({model.expert_bytes} bytes) and leave room "
                f"for dense weights ({dense_bytes} bytes) and KV cache ({kv_bytes} bytes): at most {room} bytes"
            )
    rest = total - budget
    host = 0
    if machine.has_host:
        host = rest if machine.host_bytes is None else min(rest, int(machine.host_bytes * (1 - RESERVE)))
    steps = [_DecodeModel(model, machine, context, batch) for batch in batches] if budget else []
    missing = rest / total
    file_share = (rest - host) / rest if rest else 0.0
    spread: tuple[DecodeStep, ...] = ()
    if missing and machine.devices * budget >= total:
        spread = tuple(step.over_link(missing) for step in steps)
    return ServingFit(
        usable_bytes=usable,
        dense_bytes=dense_bytes,
        kv_bytes=kv_bytes,
        expert_bytes=total,
        budget_bytes=budget,
        host_bytes=host,
        file_bytes=rest - host,
        requests_most=max(usable - dense_bytes - model.expert_bytes, 0) // request_bytes,
        requests_whole=max(usable - dense_bytes - total, 0) // request_bytes,
        devices_whole=-(-total // room) if room else None,
        uniform=tuple(step.from_tiers(missing, file_share) for step in steps),
        worst=tuple(step.from_tiers(1.0 if missing else 0.0, file_share) for step in steps),
        spread=spread,
        move_expert_ns=_over_link(machine, model.expert_bytes),
        move_token_ns=_both_ways(machine, 2 * model.hidden_size * model.parameter_bytes),
    )


def distinct_experts(experts: int, choices: int, batch: int) -> float:
    """Different experts that a layer is asked for by `batch` tokens, each taking K of E at random: E (1 - (1 - K / E)^B)."""
    return experts * (1 - (1 - choices / experts) ** batch)


class _DecodeModel:
    """One step of one batch: reads (dense - lookup) + wanted experts + KV, computes 2 FLOPs an active parameter."""

    def __init__(self, model: ModelNumbers, machine: ServingMachine, context: int, batch: int):
        self._model, self._machine, self._batch = model, machine, batch
        self._wanted = model.layers * distinct_experts(model.experts, model.choices, batch)
        self._always_bytes = (model.dense_parameters - model.lookup_parameters) * model.parameter_bytes
        self._always_bytes += batch * context * model.kv_bytes

    def near(self, experts: float) -> tuple[float | None, str]:
        """Time to read so many experts and all else, or to compute, whichever is longer, and its name."""
        model, machine = self._model, self._machine
        read_ns = _time_ns(self._always_bytes + experts * model.expert_bytes, machine.memory_bytes_s)
        compute_ns = _time_ns(2 * self._batch * (model.active_parameters - model.lookup_parameters), machine.flops_s)
        # without known FLOP/s memory alone is the bound
        return _longest([(read_ns, "memory bandwidth"), (compute_ns or 0.0, "computation")])

    def from_tiers(self, missing: float, file_share: float) -> DecodeStep:
        """With `missing` of the wanted experts fetched, `file_share` of these from files, which work beside the host."""
        misses = missing * self._wanted
        missed_bytes = misses * self._model.expert_bytes
        machine = self._machine
        times: list[tuple[float | None, str]] = [(0.0, "")]
        if missed_bytes * file_share:
            times.append((_time_ns(missed_bytes * file_share, machine.file_bytes_s), "reading experts from files"))
        if machine.has_host and missed_bytes:
            # what comes from a file comes through the host
            times.append((_time_ns(missed_bytes, machine.host_bytes_s), "fetching experts from host memory"))
        return self._step(misses, self.near(self._wanted), _longest(times))

    def over_link(self, missing: float) -> DecodeStep:
        """With `missing` of them on other devices: the experts come, or each layer's rows go there and back, whichever is
        faster. Tokens wait for each layer's answer, so their way hides behind nothing, but the devices read side by side.
        """
        model, machine = self._model, self._machine
        misses = missing * self._wanted
        expert_ns = _time_ns(misses * model.expert_bytes, machine.link_bytes_s)
        fetched = self._step(misses, self.near(self._wanted), (expert_ns, "links: experts move"))
        rows_bytes = missing * self._batch * model.choices * model.hidden_size * model.parameter_bytes
        way_ns = _both_ways(machine, 2 * rows_bytes)
        near = self.near(max(self._wanted / machine.devices, model.layers))
        if fetched.step_ns is None or way_ns is None or near[0] is None:
            return fetched
        sent = self._step(misses, near, (near[0] + model.layers * way_ns, "links: tokens move"))
        return min(fetched, sent, key=lambda step: step.step_ns or 0.0)

    def _step(self, misses: float, near: tuple[float | None, str], fetch: tuple[float | None, str]) -> DecodeStep:
        return DecodeStep(self._batch, self._wanted, misses, near[0], fetch[0], near[1], fetch[1])


def _longest(times: Sequence[tuple[float | None, str]]) -> tuple[float | None, str]:
    """The longest of some times; one that is not known makes the whole not known."""
    unknown = [name for time_ns, name in times if time_ns is None]
    return (None, unknown[0]) if unknown else max((time_ns or 0.0, name) for time_ns, name in times)


def _time_ns(amount: float, per_s: int | None) -> float | None:
    return None if per_s is None else amount * 1e9 / per_s


def _over_link(machine: ServingMachine, amount: float) -> float | None:
    time_ns = _time_ns(amount, machine.link_bytes_s)
    return None if time_ns is None else machine.link_latency_ns + time_ns


def _both_ways(machine: ServingMachine, amount: float) -> float | None:
    one_ns = _over_link(machine, amount / 2)
    return None if one_ns is None else 2 * one_ns
