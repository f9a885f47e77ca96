"""Who runs the same layer: raymoe and every rival, as functions of one signature.

T tokens, K choices per token, S = T*K routed rows, E experts, H hidden size, I expert width. A rival that cannot be imported or
run here says why; what is only GEMMs, without routing, gate and sum, is marked so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.benchmarks.kernel_shapes import Shape, layer_weights, routing


class Batch(NamedTuple):
    """Operands of one layer; a step differentiates the first four and `expert_weight`'s are float32."""

    hidden: Tensor
    gate_up: Tensor
    down: Tensor
    expert_weight: Tensor
    expert_index: Tensor
    grad_out: Tensor


Run = Callable[[Batch, bool], tuple[Tensor, ...]]
"""(batch, is_step) -> (out,), or with is_step (out, gradients of hidden, gate_up, down, expert_weight)."""


@dataclass(frozen=True)
class Rival:
    """One contender."""

    name: str
    load: Callable[[], Run]
    """Imports what it needs; raises ImportError where that is missing."""
    is_layer: bool = True
    """Computes the layer, so that its result has an error; else only GEMMs of the same size."""
    needs_cuda: bool = False
    is_for_decode: bool = True
    """Also for few tokens, where reading every active expert is the work."""
    waits_for_host: bool = False
    """The host reads sizes off the device, so that a CUDA graph cannot hold it."""


def make_batch(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    distribution: str = "uniform",
    weights: tuple[Tensor, Tensor] | None = None,
) -> Batch:
    """Random operands on the generator's device, the leaves of a step wanting gradients."""
    gate_up, down = weights if weights is not None else layer_weights(shape, dtype, generator)
    hidden, grad_out = (
        torch.randn(tokens, shape.hidden_size, generator=generator, device=generator.device).to(dtype) for _ in range(2)
    )
    index, weight = routing(shape, tokens, distribution, generator)
    for leaf in (hidden, gate_up, down, weight):
        leaf.requires_grad_()
    return Batch(hidden, gate_up, down, weight, index, grad_out)


def layer_run(layer: Callable[[Batch], Tensor]) -> Run:
    """A `Run` of a differentiable function."""

    def run(batch: Batch, is_step: bool) -> tuple[Tensor, ...]:
        if not is_step:
            with torch.no_grad():
                return (layer(batch),)
        out = layer(batch)
        return out.detach(), *torch.autograd.grad(out, batch[:4], batch.grad_out)

    return run


def _raymoe(backend: str) -> Callable[[], Run]:
    def load() -> Run:
        from raymoe.kernels import moe_mlp

        return layer_run(
            lambda b: moe_mlp(b.hidden, b.gate_up, b.down, b.expert_index, b.expert_weight, backend=backend)
        )

    return load


def _grouped_mm_layer(batch: Batch) -> Tensor:
    """What one writes around F.grouped_mm in an afternoon: sort, gather, GEMM, gate, GEMM, scatter back, weighted sum."""
    num_experts, top_k = batch.gate_up.shape[0], batch.expert_index.shape[1]
    expert, order = batch.expert_index.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(num_experts, device=expert.device), right=True, out_int32=True)
    pre = F.grouped_mm(batch.hidden[order // top_k], batch.gate_up.transpose(1, 2), offs=ends)
    gate, up = pre.chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, batch.down.transpose(1, 2), offs=ends)
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    chosen = rows[slots].view(*batch.expert_index.shape, -1)
    return torch.einsum("tkh,tk->th", chosen, batch.expert_weight.to(chosen.dtype))


def _expert_loop(batch: Batch) -> Tensor:
    """A cuBLAS call per expert and GEMM; the host reads the counts."""
    num_experts, top_k = batch.gate_up.shape[0], batch.expert_index.shape[1]
    flat = batch.expert_index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    rows = []
    # unbind: selecting one expert at a time would make backward fill a whole gradient for each
    for x, gate_up, down in zip(
        batch.hidden[order // top_k].split(counts), batch.gate_up.unbind(), batch.down.unbind(), strict=True
    ):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        rows.append(F.linear(F.silu(gate) * up, down))
    weighted = torch.cat(rows) * batch.expert_weight.flatten()[order, None].to(batch.hidden.dtype)
    return torch.zeros_like(batch.hidden).index_add(0, order // top_k, weighted)


def _gemms(mm: Callable[..., Tensor], split: Callable[[Batch], tuple[Tensor, Tensor, Tensor]]) -> Run:
    """The layer's GEMMs alone, two or six of them: `split` gives rows [.., S, H] and the two weights for `mm`."""

    def run(batch: Batch, is_step: bool) -> tuple[Tensor, ...]:
        with torch.no_grad():
            rows, gate_up, down = split(batch)
            inner_size = down.shape[-1]
            pre = mm(rows, gate_up.transpose(-1, -2))
            inner = pre[..., :inner_size]
            out = mm(inner, down.transpose(-1, -2))
            if not is_step:
                return (out,)
            # gradients of the inner rows, of down, of the rows, of gate_up; the rows stand for the incoming gradient
            grad_inner = mm(rows, down)
            grad_down = mm(rows.transpose(-1, -2), inner)
            grad_rows = mm(pre, gate_up)
            return out, grad_inner, grad_down, grad_rows, mm(pre.transpose(-1, -2), rows)

    return run


def _dense_gemms() -> Run:
    """One big cuBLAS product of equal FLOP for each GEMM of the layer: the upper bound."""

    def split(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return _routed_rows(batch), batch.gate_up[0], batch.down[0]

    return _gemms(torch.mm, split)


def _bmm_balanced() -> Run:
    """cuBLAS batched products as if every expert had S / E rows."""

    def split(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        num_experts = batch.gate_up.shape[0]
        rows = _routed_rows(batch)
        rows = rows[: rows.shape[0] // num_experts * num_experts].view(num_experts, -1, rows.shape[1])
        return rows, batch.gate_up, batch.down

    return _gemms(torch.bmm, split)


def _grouped_mm_gemms() -> Run:
    def run(batch: Batch, is_step: bool) -> tuple[Tensor, ...]:
        ends = torch.searchsorted(
            batch.expert_index.flatten().sort().values,
            torch.arange(batch.gate_up.shape[0], device=batch.hidden.device),
            right=True,
            out_int32=True,
        )
        return _gemms(
            lambda a, b: F.grouped_mm(a, b, offs=ends), lambda b: (_routed_rows(b), b.gate_up.detach(), b.down.detach())
        )(batch, is_step)

    return run


@lru_cache(maxsize=1)
def _rows_in_place(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, dtype=dtype, device=device)


def _routed_rows(batch: Batch) -> Tensor:
    """Rows [S, H] that need no gather, made once: what is only GEMMs pays for nothing else."""
    hidden = batch.hidden
    return _rows_in_place(batch.expert_index.numel(), hidden.shape[1], hidden.dtype, hidden.device)


def transformers_layer(implementation: str) -> Callable[[Batch], Tensor]:
    """transformers' experts module, differentiable, on the batch's own weights."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    @cache
    def experts(num_experts: int, hidden_size: int, inner_size: int) -> torch.nn.Module:
        config = OlmoeConfig(num_experts=num_experts, hidden_size=hidden_size, intermediate_size=inner_size)
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = OlmoeExperts(config)
        del module.gate_up_proj, module.down_proj
        return module

    def layer(batch: Batch) -> Tensor:
        num_experts, hidden_size, inner_size = batch.down.shape
        module = experts(num_experts, hidden_size, inner_size)
        module.gate_up_proj, module.down_proj = batch.gate_up, batch.down
        return module(batch.hidden, batch.expert_index, batch.expert_weight.to(batch.hidden.dtype))

    return layer


def _transformers(implementation: str) -> Callable[[], Run]:
    return lambda: layer_run(transformers_layer(implementation))


AUTOTUNED = {
    "liger": ("liger_kernel.ops.fused_moe_kernels",),
    "moe-ops": ("moe_ops.grouped_gemm_ops", "moe_ops.grouped_gemm_ops_sm90", "moe_ops.unpermute_ops"),
}
"""Rivals that search for their tiles at the first call, and where."""

SEARCHED_SHAPES = ("qwen3-30b", "olmoe", "mixtral-8x7b")
"""Where they take part: a search that was not compiled ahead takes minutes."""


def autotuners(name: str) -> list[Any]:
    """The searches of an imported rival. Each candidate is timed for 20 ms instead of 100: there are some 200 a shape."""
    import triton

    found = {
        id(item): item
        for module in AUTOTUNED[name]
        for item in vars(sys.modules[module]).values()
        if isinstance(item, triton.runtime.Autotuner)
    }
    for search in found.values():
        # its own property reads this
        search._do_bench = partial(triton.testing.do_bench, warmup=2, rep=20)
    return list(found.values())


def _liger() -> Run:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    autotuners("liger")
    return layer_run(
        lambda b: LigerFusedMoEFunction.apply(
            b.hidden, b.gate_up, b.down, b.expert_index.to(torch.int32), b.expert_weight
        )
    )


def _moe_ops() -> Run:
    from moe_ops import grouped_gemm, permute, unpermute  # pyright: ignore[reportMissingImports]

    autotuners("moe-ops")

    def layer(batch: Batch) -> Tensor:
        tokens, top_k = batch.expert_index.shape
        rows, row_id_map, ends = permute(batch.hidden, batch.expert_index.to(torch.int32), E=batch.gate_up.shape[0])
        gate, up = grouped_gemm(rows, batch.gate_up, ends).chunk(2, dim=-1)
        down = grouped_gemm(F.silu(gate) * up, batch.down, ends)
        return unpermute(down, row_id_map, batch.expert_weight, tokens, top_k)

    return layer_run(layer)


OURS = "raymoe"

RIVALS = {
    rival.name: rival
    for rival in (
        Rival(OURS, _raymoe("auto")),
        # the same again: what differs between the two is noise
        Rival(f"{OURS} again", _raymoe("auto")),
        Rival("raymoe torch", _raymoe("torch")),
        Rival("transformers grouped_mm", _transformers("grouped_mm")),
        Rival("transformers eager", _transformers("eager"), waits_for_host=True),
        Rival("grouped_mm layer", lambda: layer_run(_grouped_mm_layer)),
        Rival("expert loop", lambda: layer_run(_expert_loop), waits_for_host=True),
        Rival("liger", _liger, needs_cuda=True, waits_for_host=True),
        Rival("moe-ops", _moe_ops, needs_cuda=True),
        Rival("grouped_mm GEMMs", _grouped_mm_gemms, is_layer=False),
        Rival("bmm GEMMs, balanced", _bmm_balanced, is_layer=False, is_for_decode=False),
        Rival("dense GEMMs", _dense_gemms, is_layer=False, is_for_decode=False),
    )
}


@torch.no_grad()
def reference(batch: Batch, is_step: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """What a layer's `Run` should give, expert by expert in `dtype`, the gradients written out by hand."""
    hidden, gate_up, down, weight, index, grad_out = batch
    out = hidden.new_zeros(hidden.shape, dtype=dtype)
    grads = [x.new_zeros(x.shape, dtype=dtype) for x in (hidden, gate_up, down, weight)] if is_step else []
    for e in range(gate_up.shape[0]):
        token, choice = (index == e).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        x, w1, w2, s = hidden[token].to(dtype), gate_up[e].to(dtype), down[e].to(dtype), weight[token, choice].to(dtype)
        gate, up = (x @ w1.T).chunk(2, dim=-1)
        sigma = gate.sigmoid()
        inner = gate * sigma * up
        rows = inner @ w2.T
        out.index_add_(0, token, rows * s[:, None])
        if not is_step:
            continue
        grad = grad_out[token].to(dtype)
        grads[3][token, choice] = (rows * grad).sum(dim=-1)
        grad = grad * s[:, None]
        grads[2][e] = grad.T @ inner
        grad_inner = grad @ w2
        grad_gate = grad_inner * up * sigma * (1 + gate * (1 - sigma))
        grad_pre = torch.cat([grad_gate, grad_inner * gate * sigma], dim=-1)
        grads[1][e] = grad_pre.T @ x
        grads[0].index_add_(0, token, grad_pre @ w1)
    return (out, *grads)


def relative_error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest |got - want| / |want| of a run's results; NaN and infinity count as infinite error."""
    worst = 0.0
    for found, truth in zip(got, want, strict=True):
        scale = truth.norm().item()
        error = (found.to(truth.dtype) - truth).norm().item() / (scale or 1.0)
        worst = max(worst, error if error == error else float("inf"))
    return worst
