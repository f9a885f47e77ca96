"""Gates and their derivatives inside Triton kernels, in float32: the twins of `spec.apply_gate`."""

import triton
import triton.language as tl

# comparisons below are written so that a NaN falls through: a NaN must reach the result as it does in torch


@triton.jit
def activate(x, alpha, ACTIVATION: tl.constexpr):
    """Value and derivative of the activation at x."""
    if ACTIVATION == "silu":
        sigma = tl.sigmoid(alpha * x)
        value = x * sigma
        slope = sigma * (1.0 + alpha * x * (1.0 - sigma))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) = sigmoid(2 * y)
        cdf = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * cdf
        slope = cdf + value * (1.0 - cdf) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        value = tl.where(x <= 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.where(x <= 0.0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@triton.jit
def gate_value(gate, up, limit, alpha, offset, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """Activated inner value of a gate and an up pre-activation."""
    if HAS_LIMIT:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value, _slope = activate(gate, alpha, ACTIVATION)
    return value * (up + offset)


@triton.jit
def gate_slopes(gate, up, limit, alpha, offset, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """Activated inner value, and its derivatives in the gate and in up."""
    gate_passes = 1.0
    up_passes = 1.0
    if HAS_LIMIT:
        gate_passes = tl.where(gate > limit, 0.0, 1.0)
        up_passes = tl.where((up > limit) | (up < -limit), 0.0, 1.0)
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value, slope = activate(gate, alpha, ACTIVATION)
    shifted = up + offset
    return value * shifted, gate_passes * slope * shifted, up_passes * value
