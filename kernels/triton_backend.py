"""The expert layer in Triton kernels: four GEMMs back for two forth, from the input and the pre-activations only.

T tokens, K choices per token, S = T*K routed rows, E experts, H hidden size, I expert width. No host sync, no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raymoe.kernels.configs import GemmConfig, gemm_config
from raymoe.kernels.gather_rows_triton import spread_rows_triton
from raymoe.kernels.gather_sum import triton_gather_sum
from raymoe.kernels.gmm import gmm
from raymoe.kernels.gmm_gate import gmm_gate
from raymoe.kernels.gmm_gate_grad import gmm_gate_grad
from raymoe.kernels.gmm_k import gmm_k
from raymoe.kernels.group_sum import group_sum
from raymoe.kernels.operands import Experts, Gradients, Needs
from raymoe.kernels.plan import Plan
from raymoe.kernels.spec import ExpertSpec
from raymoe.kernels.tiles import Tiles, tile_table


def forward_triton(
    hidden: Tensor,
    experts: Experts,
    plan: Plan,
    expert_weight: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
    *,
    keep_pre: bool,
) -> tuple[Tensor, Tensor | None]:
    """The layer's output [T, H], and what `backward_triton` needs of it: pre-activations [S, 2I] ([S, I] if not gated) or None.

    Weights may be int8 or float8 where `experts` has their scales. Rows of the pre-activations without an expert are undefined.
    """
    hidden = hidden.contiguous()
    tables = _TileTables(plan)
    inner, pre = _up(hidden, experts, plan, tables, spec, hidden_scale, keep_pre=keep_pre)
    rows = _down(inner, experts, plan, tables, spec, hidden.new_empty(plan.order.numel(), hidden.shape[1]))
    return triton_gather_sum(rows, plan, expert_weight, hidden.dtype), pre


def backward_triton(
    grad_out: Tensor,
    hidden: Tensor,
    experts: Experts,
    plan: Plan,
    expert_weight: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
    pre: Tensor,
    needs: Needs,
    *,
    into: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """The gradients that `needs` names.

    Args:
        grad_out: [T, H].
        pre: as `forward_triton` gave them.
        into: gradients of the weights, of any strides, to add to; those of `gate_up` and `down` then are None in the result.
    """
    hidden, grad_out = hidden.contiguous(), grad_out.contiguous()
    scale = hidden_scale.contiguous() if hidden_scale is not None else None
    up_weight, down_weight = _out_in(experts.gate_up, spec), _out_in(experts.down, spec)
    tables = _TileTables(plan)
    config, config_k = _config("gate_grad", hidden.dtype, plan), _config("weight_grad", hidden.dtype, plan)
    # sorted rows without an expert carry whatever weight stands there; no kernel reads behind an expert's last row
    row_weight = expert_weight.reshape(-1)[plan.order]
    # two GEMMs read it: brought into order once for both
    sorted_grad = None
    if "descriptor" in (config.inputs, config_k.inputs if needs.down else ""):
        sorted_grad = _in_order(grad_out, plan)
    gate = gmm_gate_grad(
        grad_out if sorted_grad is None else sorted_grad,
        down_weight.transpose(1, 2),
        plan.token,
        pre,
        row_weight,
        tables.of(config),
        config,
        spec,
        is_sorted=sorted_grad is not None,
        bias=_dense(experts.down_bias),
        scale=scale,
    )
    grad_hidden = grad_gate_up = grad_down = grad_weight = grad_up_bias = grad_down_bias = grad_scale = None
    if needs.hidden:
        config = _config("input_grad", hidden.dtype, plan)
        rows = hidden.new_empty(plan.order.numel(), hidden.shape[1])
        gmm(gate.pre, up_weight.transpose(1, 2), tables.of(config), config, rows)
        grad_hidden = triton_gather_sum(rows, plan, None, hidden.dtype)
    # the heaviest experts first: what is left for the end is small
    order = plan.offsets.diff().argsort(descending=True) if needs.gate_up or needs.down else None
    if needs.down:
        out, grad_down = _gradient_of(experts.down, into[1] if into is not None else None)
        source, token = (grad_out, plan.token) if sorted_grad is None else (sorted_grad, None)
        out = _out_in(out, spec)
        gmm_k(
            source,
            gate.scaled_inner,
            plan.offsets,
            config_k,
            out,
            token_a=token,
            order=order,
            accumulate=into is not None,
        )
    if needs.gate_up:
        out, grad_gate_up = _gradient_of(experts.gate_up, into[0] if into is not None else None)
        source, token = hidden, plan.token
        if config_k.inputs == "descriptor":
            source, token = _in_order(hidden, plan), None
        out = _out_in(out, spec)
        gmm_k(gate.pre, source, plan.offsets, config_k, out, token_b=token, order=order, accumulate=into is not None)
    if needs.expert_weight:
        slots = gate.row_weight[plan.inverse]
        grad_weight = torch.where(plan.inverse < plan.offsets[-1], slots, 0).to(expert_weight.dtype)
    if needs.gate_up_bias:
        grad_up_bias = group_sum(gate.pre, plan.offsets)
    if needs.down_bias:
        grad_down_bias = group_sum(grad_out, plan.offsets, row_weight=row_weight, token=plan.token)
    if needs.hidden_scale:
        assert hidden_scale is not None
        assert gate.scale is not None, "the gate kernel writes it where there is a scale"
        grad_scale = triton_gather_sum(gate.scale, plan, None, hidden_scale.dtype)
    return Gradients(grad_hidden, grad_gate_up, grad_down, grad_weight, grad_up_bias, grad_down_bias, grad_scale)


def expert_rows_triton(
    hidden: Tensor,
    experts: Experts,
    plan: Plan,
    expert_ids: Sequence[int],
    slots: Sequence[int],
    out: Tensor,
    spec: ExpertSpec,
    hidden_scale: Tensor | None,
) -> None:
    """Write the rows of `expert_ids`, whose weights stand at `slots`, to `out` [S, H]: weights are read where they stand."""
    tables = _TileTables(plan, expert_ids, slots)
    inner, _ = _up(hidden.contiguous(), experts, plan, tables, spec, hidden_scale, keep_pre=False)
    _down(inner, experts, plan, tables, spec, out)


def _up(
    hidden: Tensor,
    experts: Experts,
    plan: Plan,
    tables: _TileTables,
    spec: ExpertSpec,
    scale: Tensor | None,
    *,
    keep_pre: bool,
) -> tuple[Tensor, Tensor | None]:
    weight = _out_in(experts.gate_up, spec)
    num_rows, up_size = plan.order.numel(), weight.shape[1]
    config = _config("up_train" if keep_pre else "up", _type_of(experts, hidden), plan)
    inner = hidden.new_empty(num_rows, up_size // spec.gate_up_factor)
    pre = hidden.new_empty(num_rows, up_size) if keep_pre else None
    is_sorted = config.inputs == "descriptor"
    gmm_gate(
        _in_order(hidden, plan) if is_sorted else hidden,
        weight,
        plan.token,
        tables.of(config),
        config,
        spec,
        inner,
        is_sorted=is_sorted,
        pre=pre,
        bias=_dense(experts.gate_up_bias),
        scale=scale.contiguous() if scale is not None else None,
        weight_scale=_dense(experts.gate_up_scale),
    )
    return inner, pre


def _down(inner: Tensor, experts: Experts, plan: Plan, tables: _TileTables, spec: ExpertSpec, out: Tensor) -> Tensor:
    config = _config("down", _type_of(experts, inner), plan)
    weight, bias, weight_scale = _out_in(experts.down, spec), _dense(experts.down_bias), _dense(experts.down_scale)
    return gmm(inner, weight, tables.of(config), config, out, bias=bias, weight_scale=weight_scale)


class _TileTables:
    """Tile tables of one plan by row-tile size: kinds whose tiles are as high share one."""

    def __init__(self, plan: Plan, expert_ids: Sequence[int] | None = None, slots: Sequence[int] = ()) -> None:
        self._plan, self._expert_ids, self._slots = plan, expert_ids, slots
        self._tables: dict[int, Tiles] = {}

    def of(self, config: GemmConfig) -> Tiles:
        if config.rows not in self._tables:
            self._tables[config.rows] = tile_table(self._plan, config.rows, self._expert_ids, self._slots)
        return self._tables[config.rows]


def _config(kind: str, dtype: torch.dtype, plan: Plan) -> GemmConfig:
    return gemm_config(kind, dtype, plan.order.numel(), plan.num_experts, plan.order.device)


def _type_of(experts: Experts, hidden: Tensor) -> torch.dtype:
    """What the tables know the weights by: their own type where it is quantised."""
    return hidden.dtype if experts.gate_up_scale is None else experts.gate_up.dtype


def _in_order(x: Tensor, plan: Plan) -> Tensor:
    """[S, N] from [T, N]: the row that each sorted row reads; rows without an expert are undefined."""
    return spread_rows_triton(x, plan.inverse, plan.offsets[-1:])


def _gradient_of(weight: Tensor, into: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(where to write, what to return)."""
    if into is not None:
        return into, None
    grad = weight.new_empty(weight.shape)
    return grad, grad


def _out_in(weight: Tensor, spec: ExpertSpec) -> Tensor:
    """Expert weights as [E, out, in], a view."""
    return weight.transpose(1, 2) if spec.is_transposed else weight


def _dense(per_channel: Tensor | None) -> Tensor | None:
    return per_channel if per_channel is None or per_channel.stride(1) == 1 else per_channel.contiguous()
