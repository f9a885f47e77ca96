"""Serving's half of the expert layer: the rows of some experts, as their weights arrive.

T tokens, K choices per token, S = T*K routed rows, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raymoe.kernels.backend import choose_backend, count_call
from raymoe.kernels.checks import check_experts, given_experts
from raymoe.kernels.cpu_backend import expert_rows_cpu
from raymoe.kernels.input_scale import InputScale, check_input_scale, scaled_inputs
from raymoe.kernels.operands import Experts
from raymoe.kernels.plan import Plan
from raymoe.kernels.quantize import dequantized
from raymoe.kernels.reference import expert_mlp
from raymoe.kernels.spec import ExpertSpec
from raymoe.kernels.torch_backend import NARROW, narrow_rows, takes_narrow


@torch.no_grad()
def expert_rows(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    plan: Plan,
    experts: Sequence[int],
    *,
    slots: Sequence[int] | None = None,
    out: Tensor,
    spec: ExpertSpec | None = None,
    biases: tuple[Tensor, Tensor] | None = None,
    hidden_scale: Tensor | None = None,
    input_scale: InputScale | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """Compute the rows routed to `experts` and write them to their places in `out`; forward only.

    Call it for disjoint subsets as experts arrive, then `combine` once: the result depends neither on the order of the
    calls nor on how the experts were split into them.

    Args:
        hidden: [T, H].
        gate_up: [slots, 2I, H], or as `spec` says; usually a strided view of a [slots, numel] buffer. Never copied.
        down: [slots, H, I], or as `spec` says; likewise.
        plan: the routing of these T tokens; its rows say where results go.
        experts: expert ids as in the plan.
        slots: where in the weights (and biases) each of `experts` stands; default: at its own id.
        out: [S, H], the dtype of `hidden`; rows of other experts are left alone.
        spec: what the model's family differs in; default: gated silu.
        biases: ([slots, 2I] added before the gate, [slots, H] added after down).
        hidden_scale: [T, I], multiplies the activated inner row of a token.
        input_scale: as `moe_mlp` takes it; [T, H] costs the same as scaling `hidden` before the first call.
        scales: with weights in 8 bits, the pair that `quantize_experts` returned.
        backend: auto | triton | cpu | torch | reference; keep to one within a step.

    Raises:
        ValueError: shapes, dtypes, expert ids or slots that do not fit, or a backend that cannot run this.
    """
    spec = spec if spec is not None else ExpertSpec()
    slots = slots if slots is not None else experts
    given = given_experts(gate_up, down, biases, scales)
    check_experts(hidden, given, spec, hidden_scale)
    if input_scale is not None:
        check_input_scale(hidden, input_scale, spec)
    hidden, up_hidden = scaled_inputs(hidden, input_scale)
    _check_places(hidden, gate_up, plan, experts, slots, out)
    backend = choose_backend(backend, spec, hidden, gate_up).backend
    count_call(backend)
    if up_hidden is None and backend == "triton":
        from raymoe.kernels.triton_backend import expert_rows_triton

        expert_rows_triton(hidden, given, plan, experts, slots, out, spec, hidden_scale)
    elif up_hidden is None and backend == "cpu":
        expert_rows_cpu(hidden, given, plan, experts, slots, out, spec, hidden_scale)
    else:
        ends = plan.offsets.tolist()
        active = [(e, slot) for e, slot in zip(experts, slots, strict=True) if ends[e] < ends[e + 1]]
        if up_hidden is None and backend == "torch" and takes_narrow(given):
            narrow = [(e, slot) for e, slot in active if ends[e + 1] - ends[e] < NARROW]
            if narrow:
                narrow_rows(hidden, given, plan, narrow, ends, out, spec, hidden_scale)
            active = [(e, slot) for e, slot in active if ends[e + 1] - ends[e] >= NARROW]
        _loop(hidden, given, plan, active, ends, out, spec, hidden_scale, up_hidden)


def _loop(
    hidden: Tensor,
    weights: Experts,
    plan: Plan,
    active: list[tuple[int, int]],
    ends: list[int],
    out: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
    up_hidden: Tensor | None,
) -> None:
    for e, slot in active:
        start, end = ends[e], ends[e + 1]
        token = plan.token[start:end]
        scale = hidden_scale.index_select(0, token) if hidden_scale is not None else None
        up_rows = up_hidden.index_select(0, token) if up_hidden is not None else None
        one = dequantized(weights.at(slot), hidden.dtype, spec)
        out[start:end] = expert_mlp(hidden.index_select(0, token), one, 0, spec, scale, up_rows)


def _check_places(
    hidden: Tensor, gate_up: Tensor, plan: Plan, experts: Sequence[int], slots: Sequence[int], out: Tensor
) -> None:
    num_rows = plan.order.numel()
    if plan.inverse.shape[0] != hidden.shape[0]:
        raise ValueError(f"plan is for {plan.inverse.shape[0]} tokens, hidden has {hidden.shape[0]}; plan this batch")
    if out.shape != (num_rows, hidden.shape[1]) or out.dtype != hidden.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {hidden.dtype} {(num_rows, hidden.shape[1])} [S, H], "
            f"got {out.dtype} {tuple(out.shape)} with strides {out.stride()}"
        )
    if len(slots) != len(experts):
        raise ValueError(f"slots has {len(slots)} entries for {len(experts)} experts; give one for each")
    for name, ids, limit in (("experts", experts, plan.num_experts), ("slots", slots, gate_up.shape[0])):
        wrong = [i for i in ids if not 0 <= i < limit]
        if wrong:
            raise ValueError(f"{name} holds {wrong}, but there are {limit}: use 0 to {limit - 1}")
