"""The expert layer in Triton kernels: four GEMMs back for two forth, from the input and the pre-activations only.

T tokens, K choices per token, S = T*K routed rows, E experts, H hidden size, I expert width. No host sync, no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raymoe.kernels.gather_sum import triton_gather_sum
from raymoe.kernels.gmm import gmm
from raymoe.kernels.gmm_gate import gmm_gate
from raymoe.kernels.gmm_gate_grad import gmm_gate_grad
from raymoe.kernels.gmm_k import gmm_k
from raymoe.kernels.group_sum import group_sum
from raymoe.kernels.plan import Plan, plan
from raymoe.kernels.spec import ExpertSpec
from raymoe.kernels.tiles import gmm_config, gmm_k_config, tile_table


def moe_mlp_triton(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    spec: ExpertSpec,
    biases: tuple[Tensor, Tensor] | None,
    hidden_scale: Tensor | None,
) -> Tensor:
    """`moe_mlp` in Triton kernels."""
    routing = plan(expert_index, gate_up.shape[0])
    gate_up_bias, down_bias = biases if biases is not None else (None, None)
    operands = (hidden, gate_up, down, expert_weight, gate_up_bias, down_bias, hidden_scale)
    with_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    return _MoeMlp.apply(*operands, spec, with_grad, *routing)


class _MoeMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, gate_up, down, expert_weight, gate_up_bias, down_bias, scale, spec, with_grad, *routing):
        plan = Plan(*routing)
        hidden = hidden.contiguous()
        scale = scale.contiguous() if scale is not None else None
        up_weight, down_weight = _out_in(gate_up, spec), _out_in(down, spec)
        num_rows, inner_size = plan.order.numel(), down_weight.shape[2]
        config = gmm_config(plan, hidden.dtype)
        tiles = tile_table(plan, config.rows)
        pre = hidden.new_empty(num_rows, up_weight.shape[1]) if with_grad else None
        inner = hidden.new_empty(num_rows, inner_size)
        gate_config = gmm_config(plan, hidden.dtype, has_gate=True)
        gmm_gate(
            hidden,
            up_weight,
            plan.token,
            tiles,
            gate_config,
            spec,
            inner,
            pre=pre,
            bias=_dense(gate_up_bias),
            scale=scale,
        )
        rows = gmm(
            inner, down_weight, tiles, config, hidden.new_empty(num_rows, hidden.shape[1]), bias=_dense(down_bias)
        )
        ctx.save_for_backward(hidden, gate_up, down, expert_weight, down_bias, scale, pre, *plan)
        ctx.spec, ctx.has_gate_up_bias = spec, gate_up_bias is not None
        return triton_gather_sum(rows, plan, expert_weight, hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        hidden, gate_up, down, expert_weight, down_bias, scale, pre, *routing = ctx.saved_tensors
        plan, spec = Plan(*routing), ctx.spec
        need_hidden, need_gate_up, need_down, need_weight, need_up_bias, need_down_bias, need_scale = (
            ctx.needs_input_grad[:7]
        )
        grad_out = grad_out.contiguous()
        up_weight, down_weight = _out_in(gate_up, spec), _out_in(down, spec)
        config = gmm_config(plan, hidden.dtype)
        config_k = gmm_k_config(hidden.dtype)
        tiles = tile_table(plan, config.rows)
        # sorted rows without an expert carry whatever weight stands there; no kernel reads behind an expert's last row
        row_weight = expert_weight.reshape(-1)[plan.order]
        gate = gmm_gate_grad(
            grad_out,
            down_weight.transpose(1, 2),
            plan.token,
            pre,
            row_weight,
            tiles,
            gmm_config(plan, hidden.dtype, has_gate=True),
            spec,
            bias=_dense(down_bias),
            scale=scale,
        )
        grad_hidden = grad_gate_up = grad_down = grad_weight = grad_up_bias = grad_down_bias = grad_scale = None
        if need_hidden:
            rows = hidden.new_empty(plan.order.numel(), hidden.shape[1])
            gmm(gate.pre, up_weight.transpose(1, 2), tiles, config, rows)
            grad_hidden = triton_gather_sum(rows, plan, None, hidden.dtype)
        if need_gate_up:
            grad_gate_up = gate_up.new_empty(gate_up.shape)
            gmm_k(gate.pre, hidden, plan.offsets, config_k, _out_in(grad_gate_up, spec), token_b=plan.token)
        if need_down:
            grad_down = down.new_empty(down.shape)
            gmm_k(grad_out, gate.scaled_inner, plan.offsets, config_k, _out_in(grad_down, spec), token_a=plan.token)
        if need_weight:
            slots = gate.row_weight[plan.inverse]
            grad_weight = torch.where(plan.inverse < plan.offsets[-1], slots, 0).to(expert_weight.dtype)
        if need_up_bias:
            grad_up_bias = group_sum(gate.pre, plan.offsets)
        if need_down_bias:
            grad_down_bias = group_sum(grad_out, plan.offsets, row_weight=row_weight, token=plan.token)
        if need_scale:
            assert gate.scale is not None, "the gate kernel writes it where there is a scale"
            grad_scale = triton_gather_sum(gate.scale, plan, None, scale.dtype)
        grads = (grad_hidden, grad_gate_up, grad_down, grad_weight, grad_up_bias, grad_down_bias, grad_scale)
        return *grads, None, None, *[None] * len(plan)


def expert_rows_triton(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    plan: Plan,
    experts: Sequence[int],
    slots: Sequence[int],
    out: Tensor,
    spec: ExpertSpec,
    biases: tuple[Tensor, Tensor] | None,
    hidden_scale: Tensor | None,
) -> None:
    """`expert_rows` in Triton kernels: the slots ride in the tile table, so weights are read where they stand."""
    gate_up_bias, down_bias = biases if biases is not None else (None, None)
    config = gmm_config(plan, hidden.dtype)
    tiles = tile_table(plan, config.rows, experts, slots)
    down_weight = _out_in(down, spec)
    inner = hidden.new_empty(plan.order.numel(), down_weight.shape[2])
    gmm_gate(
        hidden.contiguous(),
        _out_in(gate_up, spec),
        plan.token,
        tiles,
        gmm_config(plan, hidden.dtype, has_gate=True),
        spec,
        inner,
        bias=_dense(gate_up_bias),
        scale=hidden_scale.contiguous() if hidden_scale is not None else None,
    )
    gmm(inner, down_weight, tiles, config, out, bias=_dense(down_bias))


def _out_in(weight: Tensor, spec: ExpertSpec) -> Tensor:
    """Expert weights as [E, out, in], a view."""
    return weight.transpose(1, 2) if spec.is_transposed else weight


def _dense(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.stride(1) == 1 else bias.contiguous()
