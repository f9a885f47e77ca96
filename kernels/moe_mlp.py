"""The experts of one MoE layer, as one differentiable op.

T tokens, K choices per token, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from torch import Tensor

from raymoe.kernels.backend import choose_backend, count_call
from raymoe.kernels.spec import ExpertSpec


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
    backend: str = "auto",
) -> Tensor:
    """Route each token through its experts and sum what they answer, weighted, in choice order.

    Differentiable in `hidden`, both weights, `expert_weight`, `biases` and `hidden_scale`. Choices without an expert cost
    nothing, and whatever stands there (a NaN weight, say) reaches neither the result nor a gradient.

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
        backend: auto | triton | torch | reference. "auto" yields to RAYMOE_KERNELS, then to the device.

    Returns:
        [T, H] in the dtype of `hidden`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or a backend that cannot run this.
    """
    spec = _merge(activation, spec)
    check_experts(hidden, gate_up, down, spec, biases, hidden_scale)
    _check_routing(hidden, expert_index, expert_weight)
    backend = choose_backend(backend, spec, hidden.dtype, hidden.device)
    if backend == "triton":
        from raymoe.kernels.triton_backend import moe_mlp_triton as run
    elif backend == "torch":
        from raymoe.kernels.torch_backend import moe_mlp_torch as run
    else:
        from raymoe.kernels.reference import moe_mlp_reference as run
    count_call(backend)
    return run(hidden, gate_up, down, expert_index, expert_weight, spec, biases, hidden_scale)


def _merge(activation: str, spec: ExpertSpec | None) -> ExpertSpec:
    if spec is None:
        return ExpertSpec(activation=activation)
    if activation not in ("silu", spec.activation):
        raise ValueError(
            f"activation={activation!r} contradicts spec.activation={spec.activation!r}; give only one of them"
        )
    return spec


def check_experts(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    spec: ExpertSpec,
    biases: tuple[Tensor, Tensor] | None,
    hidden_scale: Tensor | None,
) -> None:
    """Raises ValueError, naming the argument, where rows and expert weights do not fit each other."""
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a float tensor [T, H], got {hidden.dtype} {tuple(hidden.shape)}")
    if gate_up.ndim != 3 or down.ndim != 3:
        raise ValueError(
            f"gate_up and down must be [E, out, in], got {tuple(gate_up.shape)} and {tuple(down.shape)}; "
            "stack the experts along the first dimension"
        )
    num_tokens, hidden_size = hidden.shape
    num_experts = gate_up.shape[0]
    inner_size = down.shape[1 if spec.is_transposed else 2]
    up_size = spec.gate_up_factor * inner_size
    layout = "[E, in, out] (spec.is_transposed)" if spec.is_transposed else "[E, out, in]"
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "gate_up": (gate_up, _oriented(num_experts, up_size, hidden_size, spec)),
        "down": (down, _oriented(num_experts, hidden_size, inner_size, spec)),
    }
    if biases is not None:
        expected["biases[0]"] = (biases[0], (num_experts, up_size))
        expected["biases[1]"] = (biases[1], (num_experts, hidden_size))
    if hidden_scale is not None:
        expected["hidden_scale"] = (hidden_scale, (num_tokens, inner_size))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, expected {shape}: hidden is {tuple(hidden.shape)}, down is "
                f"{tuple(down.shape)}, weights are {layout}, is_gated={spec.is_gated}"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move one of them")
        if name == "hidden_scale":
            if not tensor.is_floating_point():
                raise ValueError(f"hidden_scale must be a float tensor, got {tensor.dtype}")
        elif tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, hidden is {hidden.dtype}; cast one of them")


def _oriented(num_experts: int, out_size: int, in_size: int, spec: ExpertSpec) -> tuple[int, int, int]:
    return (num_experts, in_size, out_size) if spec.is_transposed else (num_experts, out_size, in_size)


def _check_routing(hidden: Tensor, expert_index: Tensor, expert_weight: Tensor) -> None:
    if expert_index.ndim != 2 or expert_index.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"expert_index must be [T, K] with T={hidden.shape[0]} as in hidden, got {tuple(expert_index.shape)}"
        )
    if expert_weight.shape != expert_index.shape or not expert_weight.is_floating_point():
        raise ValueError(
            f"expert_weight must be a float tensor {tuple(expert_index.shape)} as expert_index is, "
            f"got {expert_weight.dtype} {tuple(expert_weight.shape)}"
        )
    for name, tensor in (("expert_index", expert_index), ("expert_weight", expert_weight)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move one of them")
