"""The experts of one MoE layer, as one differentiable op.

T tokens, K choices per token, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymoe.kernels.backend import Choice, choose_backend, count_call
from raymoe.kernels.checks import check_experts, check_grad_into, check_routing, given_experts
from raymoe.kernels.combine import combine
from raymoe.kernels.cpu_backend import expert_rows_cpu
from raymoe.kernels.fused import moe_mlp_fused
from raymoe.kernels.input_scale import InputScale, check_input_scale, scaled_inputs
from raymoe.kernels.operands import Experts
from raymoe.kernels.plan import plan
from raymoe.kernels.quantize import dequantized
from raymoe.kernels.reference import moe_mlp_reference
from raymoe.kernels.spec import ExpertSpec
from raymoe.kernels.torch_backend import moe_mlp_torch


def moe_mlp(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    *,
    activation: str = "silu",
    spec: ExpertSpec | None = None,
    biases: tuple[Tensor, Tensor] | None = None,
    hidden_scale: Tensor | None = None,
    input_scale: InputScale | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    grad_into: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Route each token through its experts and sum what they answer, weighted, in choice order.

    Differentiable in `hidden`, both weights, `expert_weight`, `biases`, `hidden_scale` and `input_scale`. Choices without an
    expert cost nothing, and whatever stands there (a NaN weight, say) reaches neither the result nor a gradient.

    Args:
        hidden: [T, H].
        gate_up: [E, 2I, H], or as `spec` says. May be a strided view, e.g. of a [slots, numel] buffer.
        down: [E, H, I], or as `spec` says; likewise.
        expert_index: integer [T, K]; E means "no expert here". An expert may appear twice in a token.
        expert_weight: [T, K], any float dtype; it multiplies in the wider type of the two, the sum is cast to `hidden`'s.
        activation: shorthand for ``spec=ExpertSpec(activation=...)``.
        spec: what the model's family differs in.
        biases: ([E, 2I] added before the gate, [E, H] added after down).
        hidden_scale: [T, I], multiplies the activated inner row of a token in each of its experts.
        input_scale: [T, H], multiplies what a token's experts read: the rows are scaled before they are spread. A pair of
            them is for gate and for up: these are then two products, in torch ops for every backend but the reference.
        scales: with weights in 8 bits, the pair that `quantize_experts` returned; forward only.
        grad_into: buffers like the two weights: backward adds the weights' gradients to them, touching only experts that had
            rows, and the weights themselves get none.
        backend: auto | triton | cpu | torch | reference. "auto" yields to RAYMOE_KERNELS, then to what `explain` says.

    Returns:
        [T, H] in the dtype of `hidden`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or a backend that cannot run this.
    """
    spec = _merge(activation, spec)
    experts = given_experts(gate_up, down, biases, scales)
    check_experts(hidden, experts, spec, hidden_scale)
    check_routing(hidden, expert_index, expert_weight)
    if input_scale is not None:
        check_input_scale(hidden, input_scale, spec)
    hidden, up_hidden = scaled_inputs(hidden, input_scale)
    if grad_into is not None:
        check_grad_into(experts, grad_into)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, up_hidden, *experts, expert_weight, hidden_scale)
    )
    if needs_grad and scales is not None:
        raise ValueError("quantised weights (scales) have no backward pass; call it under torch.no_grad()")
    backend = choose_backend(backend, spec, hidden, gate_up, needs_grad=needs_grad).backend
    count_call(backend)
    if up_hidden is None and backend == "triton":
        return moe_mlp_fused(hidden, experts, expert_index, expert_weight, spec, hidden_scale, grad_into)
    if up_hidden is None and backend == "cpu":
        return _on_cpu(hidden, experts, expert_index, expert_weight, spec, hidden_scale)
    experts = dequantized(experts, hidden.dtype, spec)
    if backend != "reference":
        return moe_mlp_torch(hidden, experts, expert_index, expert_weight, spec, hidden_scale, grad_into, up_hidden)
    if grad_into is not None:
        raise ValueError("backend='reference' leaves gradients to autograd and takes no grad_into")
    return moe_mlp_reference(hidden, experts, expert_index, expert_weight, spec, hidden_scale, up_hidden)


def explain(
    hidden: Tensor,
    gate_up: Tensor,
    *,
    spec: ExpertSpec | None = None,
    needs_grad: bool = False,
    backend: str = "auto",
) -> Choice:
    """Which backend `moe_mlp` and `expert_rows` take for rows and weights like these, and why.

    Args:
        hidden: [T, H]; only its dtype and device count.
        gate_up: the weights; only their dtype counts.
        needs_grad: whether a gradient of anything will be wanted.

    Raises:
        ValueError: as `moe_mlp` for the backend.
    """
    return choose_backend(backend, spec if spec is not None else ExpertSpec(), hidden, gate_up, needs_grad=needs_grad)


@torch.no_grad()
def _on_cpu(
    hidden: Tensor,
    experts: Experts,
    expert_index: Tensor,
    expert_weight: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
) -> Tensor:
    routing = plan(expert_index, experts.gate_up.shape[0])
    rows = hidden.new_empty(expert_index.numel(), hidden.shape[1])
    everyone = range(routing.num_experts)
    expert_rows_cpu(hidden, experts, routing, everyone, everyone, rows, spec, hidden_scale)
    return combine(rows, routing, expert_weight)


def _merge(activation: str, spec: ExpertSpec | None) -> ExpertSpec:
    if spec is None:
        return ExpertSpec(activation=activation)
    if activation not in ("silu", spec.activation):
        raise ValueError(
            f"activation={activation!r} contradicts spec.activation={spec.activation!r}; give only one of them"
        )
    return spec
