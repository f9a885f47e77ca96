"""The Triton layer as ops that autograd, torch.compile and CUDA graphs know.

T tokens, K choices per token, S = T*K routed rows, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raymoe.kernels.operands import Experts, Gradients, Needs
from raymoe.kernels.plan import Plan, plan
from raymoe.kernels.spec import ExpertSpec


def moe_mlp_fused(
    hidden: Tensor,
    experts: Experts,
    expert_index: Tensor,
    expert_weight: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
    grad_into: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`moe_mlp` in Triton kernels; it keeps the input and the pre-activations for backward, and nothing else of size."""
    operands = (hidden, *experts, expert_weight, hidden_scale)
    keep_pre = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    into = grad_into if grad_into is not None else (None, None)
    return _forward(hidden, *experts, expert_index, expert_weight, hidden_scale, *into, *_fields(spec), keep_pre)[0]


def _fields(spec: ExpertSpec) -> tuple[str, list[bool], list[float]]:
    """A spec as what an op's schema can carry: its activation, flags and numbers; Python functions never come here.

    Numbers stay numbers: torch.compile takes those that differ between layers for symbols, and cannot make a string of one.
    """
    limit = math.inf if spec.gate_limit is None else spec.gate_limit
    flags = [spec.is_gated, spec.is_transposed, spec.is_interleaved]
    return spec.activation, flags, [limit, spec.gate_alpha, spec.up_offset]


def _spec(activation: str, flags: list[bool], numbers: list[float]) -> ExpertSpec:
    is_gated, is_transposed, is_interleaved = flags
    limit, alpha, offset = numbers
    return ExpertSpec(
        activation, is_gated, is_transposed, is_interleaved, None if limit == math.inf else limit, alpha, offset
    )


@torch.library.custom_op("raymoe::moe_mlp", mutates_args=())
def _forward(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    expert_index: Tensor,
    expert_weight: Tensor,
    hidden_scale: Tensor | None,
    gate_up_into: Tensor | None,
    down_into: Tensor | None,
    activation: str,
    flags: list[bool],
    numbers: list[float],
    keep_pre: bool,
) -> list[Tensor]:
    """[output, pre-activations or an empty tensor, *plan]"""
    from raymoe.kernels.triton_backend import forward_triton

    experts = Experts(gate_up, down, gate_up_bias, down_bias, gate_up_scale, down_scale)
    routing, spec = plan(expert_index, gate_up.shape[0]), _spec(activation, flags, numbers)
    out, pre = forward_triton(hidden, experts, routing, expert_weight, spec, hidden_scale, keep_pre=keep_pre)
    return [out, hidden.new_empty(0) if pre is None else pre, *routing]


@_forward.register_fake
def _(
    hidden,
    gate_up,
    down,
    gate_up_bias,
    down_bias,
    gate_up_scale,
    down_scale,
    expert_index,
    expert_weight,
    hidden_scale,
    gate_up_into,
    down_into,
    activation,
    flags,
    numbers,
    keep_pre,
):
    num_experts, rows = gate_up.shape[0], expert_index.numel()
    up_size = gate_up.shape[2 if flags[1] else 1]
    wide = expert_index.new_empty(rows, dtype=torch.int64)
    return [
        hidden.new_empty(hidden.shape),
        hidden.new_empty(rows, up_size) if keep_pre else hidden.new_empty(0),
        wide,
        torch.empty_like(wide),
        torch.empty_like(wide),
        expert_index.new_empty(expert_index.shape, dtype=torch.int64),
        expert_index.new_empty(num_experts + 1, dtype=torch.int32),
    ]


@torch.library.custom_op("raymoe::moe_mlp_backward", mutates_args=("gate_up_into", "down_into"))
def _gradients(
    grad_out: Tensor,
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    expert_weight: Tensor,
    hidden_scale: Tensor | None,
    pre: Tensor,
    routing: list[Tensor],
    gate_up_into: Tensor | None,
    down_into: Tensor | None,
    activation: str,
    flags: list[bool],
    numbers: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A gradient for each of `Needs`, an empty tensor where none is wanted."""
    from raymoe.kernels.triton_backend import backward_triton

    grads = backward_triton(
        grad_out.contiguous(),
        hidden,
        Experts(gate_up, down, gate_up_bias, down_bias),
        Plan(*routing),
        expert_weight,
        _spec(activation, flags, numbers),
        hidden_scale,
        pre,
        Needs(*needs),
        into=(gate_up_into, down_into) if gate_up_into is not None and down_into is not None else None,
    )
    found = [hidden.new_empty(0) if grad is None else grad for grad in grads]
    return found[0], found[1], found[2], found[3], found[4], found[5], found[6]


@_gradients.register_fake
def _(
    grad_out,
    hidden,
    gate_up,
    down,
    gate_up_bias,
    down_bias,
    expert_weight,
    hidden_scale,
    pre,
    routing,
    gate_up_into,
    down_into,
    activation,
    flags,
    numbers,
    needs,
):
    wanted = Needs(*needs)
    if gate_up_into is not None:
        wanted = wanted._replace(gate_up=False, down=False)
    like = (hidden, gate_up, down, expert_weight, gate_up_bias, down_bias, hidden_scale)
    return [
        hidden.new_empty(0) if not is_wanted else x.new_empty(x.shape)
        for x, is_wanted in zip(like, wanted, strict=True)
    ]


def _setup_context(ctx, inputs, output):
    hidden, gate_up, down, up_bias, down_bias, _, _, _, expert_weight, hidden_scale, *rest = inputs
    _, pre, *routing = output
    ctx.save_for_backward(hidden, gate_up, down, up_bias, down_bias, expert_weight, hidden_scale, pre, *routing)
    # backward writes these: autograd would refuse the new version of a saved tensor
    ctx.into, ctx.spec = rest[:2], rest[2:5]
    # only the output has a gradient: zeros for the pre-activations would cost their whole size
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    hidden, gate_up, down, up_bias, down_bias, expert_weight, hidden_scale, pre, *routing = ctx.saved_tensors
    inputs = ctx.needs_input_grad
    is_into = ctx.into[0] is not None
    needs = Needs(
        hidden=inputs[0],
        gate_up=inputs[1] or is_into,
        down=inputs[2] or is_into,
        expert_weight=inputs[8],
        gate_up_bias=inputs[3],
        down_bias=inputs[4],
        hidden_scale=inputs[9],
    )
    found = _gradients(
        grads[0],
        hidden,
        gate_up,
        down,
        up_bias,
        down_bias,
        expert_weight,
        hidden_scale,
        pre,
        routing,
        *ctx.into,
        *ctx.spec,
        list(needs),
    )
    if is_into:
        needs = needs._replace(gate_up=False, down=False)
    got = Gradients(*(grad if is_wanted else None for grad, is_wanted in zip(found, needs, strict=True)))
    return (
        got.hidden,
        got.gate_up,
        got.down,
        got.gate_up_bias,
        got.down_bias,
        None,
        None,
        None,
        got.expert_weight,
        got.hidden_scale,
        None,
        None,
        None,
        None,
        None,
        None,
    )


_forward.register_autograd(_backward, setup_context=_setup_context)
