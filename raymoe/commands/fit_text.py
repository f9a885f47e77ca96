"""What `raymoe plan --model` says, in words."""

from __future__ import annotations

from collections.abc import Iterator

from raymoe.models.size import ModelSize
from raymoe.placement import ClusterSpec
from raymoe.placement.fit import RESERVE, TrainingFit
from raymoe.placement.serving import ServingFit, ServingMachine


def describe(size: ModelSize) -> str:
    """A model's size in one line."""
    return (
        f"{size.name} ({size.model_type}): {_count(size.parameters)} parameters, {_count(size.expert_parameters)} in "
        f"{size.layers} x {size.experts} experts of {bytes_text(size.expert_bytes)}, {_count(size.active_parameters)} active a "
        f"token; {size.dtype}: {bytes_text(size.parameters * size.parameter_bytes)}"
    )


def serving_lines(size: ModelSize, fit: ServingFit, machine: ServingMachine, context: int, batch: int) -> Iterator[str]:
    """The answer in words."""
    memory = f"{bytes_text(fit.usable_bytes)} usable of {bytes_text(machine.memory_bytes)} ({RESERVE:.0%} kept free)"
    dense = f"{bytes_text(fit.dense_bytes)} dense weights"
    kv = f"{bytes_text(fit.kv_bytes)} KV cache for {batch} x {context:,} tokens"
    if size.has_latent_attention:
        yield "raymoe does not serve multi-head latent attention yet; this is what it would take."
    if not fit.fits:
        yield f"does not fit: {dense} and {kv} leave no room for an expert of {bytes_text(size.expert_bytes)} in {memory}."
        if fit.requests_most:
            yield f"Up to {fit.requests_most} requests of {context:,} tokens fit: lower --batch or --context."
        else:
            yield "Not even one request fits: take a device with more memory, or lower --context."
        return
    if fit.is_whole:
        yield (
            f"fits whole on 1 device: {dense}, {bytes_text(fit.expert_bytes)} experts and {kv} in {memory}; up to "
            f"{fit.requests_whole:,} such requests."
        )
        if machine.devices > 1:
            yield f"{machine.devices} devices serve as {machine.devices} engines, {machine.devices} times the rates below."
        return
    rest = [f"{bytes_text(fit.host_bytes)} in host memory" if fit.host_bytes else ""]
    rest.append(f"{bytes_text(fit.file_bytes)} in the checkpoint's files" if fit.file_bytes else "")
    parts = f"{dense}, {bytes_text(fit.expert_bytes)} experts and {kv}"
    verdict = f"would fit whole: {parts} in" if fit.requests_whole >= batch else f"does not fit whole: {parts}, but"
    yield (
        f"{verdict} {memory}. Keep {fit.share:.0%} of the experts on the device (expert_memory={_budget(fit.budget_bytes)}), the "
        f"rest, {' and '.join(filter(None, rest))}."
    )
    if fit.host_bytes and machine.host_bytes is None:
        yield f"That takes at least {bytes_text(int(fit.host_bytes / (1 - RESERVE)))} of host memory."
    if fit.devices_whole is not None and fit.devices_whole > 1:
        yield f"{fit.devices_whole} such devices hold all experts together."
    if fit.spread and fit.move_expert_ns is not None and fit.move_token_ns is not None:
        better = "move the token" if fit.move_token_ns < fit.move_expert_ns else "move the expert"
        yield (
            f"An expert on another device: fetching it takes {fit.move_expert_ns / 1e6:.3g} ms, sending one token there and "
            f"back {fit.move_token_ns / 1e6:.3g} ms: {better}."
        )
    unknown = {step.bound for step in (*fit.uniform, *fit.worst, *fit.spread) if step.tokens_per_s is None}
    if unknown:
        yield f"No rate where a bandwidth is not known: {', '.join(sorted(unknown))}."


def training_lines(fit: TrainingFit, spec: ClusterSpec, tokens: int) -> Iterator[str]:
    """The answer in words."""
    recompute = ", computed again in backward" if fit.recompute else ""
    parts = (
        f"{bytes_text(fit.dense_bytes)} dense and {bytes_text(fit.owned_bytes)} experts with gradients and Adam's state (16 "
        f"bytes a parameter), about {bytes_text(fit.activation_bytes)} activations of {tokens:,} tokens{recompute}"
    )
    usable = f"{bytes_text(fit.usable_bytes)} usable of {bytes_text(spec.memory_bytes or 0)} a device"
    if not fit.fits:
        yield f"does not fit on {devices_text(fit.devices)}: {parts}, but {usable}."
        if fit.devices_needed is None:
            yield (
                "No number of such devices is enough: dense part and activations are on every one. Take fewer --tokens, or "
                "devices with more memory."
            )
        else:
            yield f"It takes at least {devices_text(fit.devices_needed)} like that."
        return
    yield f"fits on {devices_text(fit.devices)}: {parts}, in {usable}. It takes at least {devices_text(fit.devices_needed or 1)}."
    if fit.devices > 1:
        again = ": copies fit only re-materialised" if fit.rematerialise else ""
        yield (
            f"Room for copies of {fit.extra_slots} experts a layer on each device, {fit.extra_slots_rematerialised} if "
            f"re-materialised{again}."
        )


def bytes_text(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def rate_text(tokens_per_s: float) -> str:
    """Tokens per second to three digits."""
    return f"{float(f'{tokens_per_s:.3g}'):,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.2g}"


def devices_text(count: int) -> str:
    """A number of devices, in the singular for one."""
    return f"{count} device{'s' if count > 1 else ''}"


def _count(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _budget(count: int) -> str:
    """As `expert_memory` takes it, not more than that."""
    unit, size = ("GB", 10**9) if count >= 10**10 else ("MB", 10**6)
    return f"{count * 10 // size / 10:g}{unit}" if count >= 10**6 else str(count)
