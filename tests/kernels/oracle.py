"""The expert layer token by token in float64, sharing nothing with the ops, and the cases the tests feed to both.

T tokens, K choices per token, E experts, H hidden size, I expert width.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from raymoe.kernels import ExpertSpec, moe_mlp

SPECS = {
    "silu": ExpertSpec(),
    "gelu": ExpertSpec(activation="gelu", is_interleaved=True),
    "gelu_tanh": ExpertSpec(activation="gelu_tanh", is_transposed=True),
    "relu": ExpertSpec(activation="relu"),
    "ungated_relu2": ExpertSpec(activation="relu2", is_gated=False),
    "ungated_transposed": ExpertSpec(activation="gelu", is_gated=False, is_transposed=True),
    "clamped_silu": ExpertSpec(gate_limit=0.3),
    "gpt_oss": ExpertSpec(is_transposed=True, is_interleaved=True, gate_limit=0.3, gate_alpha=1.702, up_offset=1.0),
}


def _act(name: str, x: Tensor, alpha: float) -> Tensor:
    if name == "silu":
        return x / (1 + torch.exp(-alpha * x))
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return torch.where(x > 0, x, 0 * x) ** (2 if name == "relu2" else 1)


def oracle(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: list[list[int]],
    weight: Tensor,
    spec: ExpertSpec,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """[T, H]; differentiable, one (token, choice) at a time."""
    outputs = []
    for t, choices in enumerate(index):
        total = 0 * hidden[t]
        for k, e in enumerate(choices):
            if e == gate_up.shape[0]:
                continue
            matrix = gate_up[e].T if spec.is_transposed else gate_up[e]
            pre = matrix @ hidden[t]
            if gate_up_bias is not None:
                pre = pre + gate_up_bias[e]
            if spec.is_gated:
                half = pre.numel() // 2
                gate, up = (pre[0::2], pre[1::2]) if spec.is_interleaved else (pre[:half], pre[half:])
                if spec.gate_limit is not None:
                    gate = torch.minimum(gate, torch.full_like(gate, spec.gate_limit))
                    up = torch.maximum(
                        torch.minimum(up, torch.full_like(up, spec.gate_limit)), torch.full_like(up, -spec.gate_limit)
                    )
                inner = _act(spec.activation, gate, spec.gate_alpha) * (up + spec.up_offset)
            else:
                inner = _act(spec.activation, pre, 1.0)
            if scale is not None:
                inner = inner * scale[t]
            row = (down[e].T if spec.is_transposed else down[e]) @ inner
            if down_bias is not None:
                row = row + down_bias[e]
            total = total + weight[t, k] * row
        outputs.append(total)
    return torch.stack(outputs) if outputs else hidden * 1


@dataclass
class Case:
    """Inputs of one layer; all but `index` want gradients."""

    hidden: Tensor
    gate_up: Tensor
    down: Tensor
    weight: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    scale: Tensor | None
    index: Tensor
    spec: ExpertSpec
    grad_out: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: x for n, x in named.items() if isinstance(x, Tensor) and x.requires_grad}

    @property
    def biases(self) -> tuple[Tensor, Tensor] | None:
        return (self.gate_up_bias, self.down_bias) if self.gate_up_bias is not None else None

    def run(self, backend: str) -> Tensor:
        return moe_mlp(
            self.hidden,
            self.gate_up,
            self.down,
            self.index,
            self.weight,
            spec=self.spec,
            biases=self.biases,
            hidden_scale=self.scale,
            backend=backend,
        )


def make_case(
    spec: ExpertSpec = SPECS["silu"],
    *,
    tokens: int = 13,
    top_k: int = 3,
    experts: int = 5,
    hidden: int = 37,
    inner: int = 19,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    with_extras: bool = False,
    index: Tensor | None = None,
    seed: int = 0,
) -> Case:
    """Random inputs; about one choice in E + 1 has no expert (index E) and carries a NaN weight."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random, dtype=torch.float64) * std).to(dtype)

    def matrices(out_size: int, in_size: int) -> Tensor:
        shape = (in_size, out_size) if spec.is_transposed else (out_size, in_size)
        return normal(experts, *shape, std=in_size**-0.5).requires_grad_()

    pre = spec.gate_up_factor * inner
    if index is None:
        index = torch.randint(0, experts + 1, (tokens, top_k), generator=random)
    weight = torch.rand(index.shape, generator=random, dtype=torch.float64).to(weight_dtype or dtype)
    weight[index == experts] = float("nan")
    return Case(
        hidden=normal(index.shape[0], hidden).requires_grad_(),
        gate_up=matrices(pre, hidden),
        down=matrices(hidden, inner),
        weight=weight.requires_grad_(),
        gate_up_bias=normal(experts, pre, std=0.3).requires_grad_() if with_extras else None,
        down_bias=normal(experts, hidden, std=0.3).requires_grad_() if with_extras else None,
        scale=normal(index.shape[0], inner).requires_grad_() if with_extras else None,
        index=index,
        spec=spec,
        grad_out=normal(index.shape[0], hidden),
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64; where nothing is wanted, whether anything came (NaN included)."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    if not want.any():
        return 0.0 if not got.any() else math.inf
    error = ((got - want).norm() / want.norm()).item()
    return math.inf if math.isnan(error) else error


def errors(case: Case, backend: str) -> dict[str, float]:
    """Relative error of the output and of every gradient against the oracle."""
    out = case.run(backend)
    assert out.dtype == case.hidden.dtype
    leaves = case.leaves
    got = torch.autograd.grad(out, list(leaves.values()), case.grad_out)
    assert [g.dtype for g in got] == [x.dtype for x in leaves.values()]

    names = ("hidden", "gate_up", "down", "weight", "gate_up_bias", "down_bias", "scale")
    given = {name: getattr(case, name) for name in names if getattr(case, name) is not None}
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in given.items()}
    hidden, gate_up, down, weight, *extras = (exact.get(name) for name in names)
    truth = oracle(hidden, gate_up, down, case.index.tolist(), weight, case.spec, *extras)
    want = torch.autograd.grad(
        truth, [exact[name] for name in leaves], case.grad_out.double(), allow_unused=True, materialize_grads=True
    )
    result = {"out": relative_error(out, truth)}
    return result | {name: relative_error(g, w) for name, g, w in zip(leaves, got, want, strict=True)}


def assert_close(case: Case, backend: str, tolerance: float) -> None:
    found = errors(case, backend)
    assert max(found.values()) <= tolerance, found
