"""The expert layer token by token in float64, sharing nothing with the ops, and the cases the tests feed to both.

T tokens, K choices per token, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from raymoe.kernels import ExpertSpec, combine, expert_rows, moe_mlp, plan

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
    """[T, H]; differentiable, one (token, choice) at a time. A spec's own functions get rows one by one, in float64."""
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
            if spec.gate_fn is not None:
                inner = spec.gate_fn(pre[None])[0]
            elif spec.is_gated:
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
            if spec.post_norm is not None:
                row = spec.post_norm(row[None])[0]
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

    def run(self, backend: str, **options: object) -> Tensor:
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
            **options,
        )

    def rows(self, parts: list[list[int]], backend: str, slots: dict[int, int] | None = None, **options) -> Tensor:
        """The layer the way serving computes it: the rows of some experts at a time, then one sum."""
        routing = plan(self.index, self.gate_up.shape[0] if slots is None else len(slots))
        rows = torch.full((self.index.numel(), self.hidden.shape[1]), math.nan, dtype=self.hidden.dtype)
        for part in parts:
            expert_rows(
                self.hidden,
                self.gate_up,
                self.down,
                routing,
                part,
                slots=[slots[e] for e in part] if slots is not None else None,
                out=rows,
                spec=self.spec,
                biases=self.biases,
                hidden_scale=self.scale,
                backend=backend,
                **options,
            )
        return combine(rows, routing, self.weight.detach())

    def pooled(self, slots: dict[int, int], num_slots: int) -> Case:
        """The same case with the experts at slots of one flat buffer; everything else in it is NaN."""
        names = ("gate_up", "down", "gate_up_bias", "down_bias")
        given = {name: getattr(self, name).detach() for name in names if getattr(self, name) is not None}
        sizes = [x[0].numel() for x in given.values()]
        # a slot's length is a multiple of 16 bytes, as the buffers of serving are
        padding = 8 + -sum(sizes) % 8
        buffer = torch.full((num_slots, sum(sizes) + padding), math.nan, dtype=self.hidden.dtype)
        views = {}
        for (name, x), part in zip(given.items(), buffer.split([*sizes, padding], dim=1), strict=False):
            views[name] = part.view(num_slots, *x.shape[1:])
            for e, slot in slots.items():
                views[name][slot] = x[e]
        return replace(self, **views)


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


def routed(counts: list[int], *, top_k: int = 1, without: int = 0, seed: int = 0) -> Tensor:
    """An index [T, K] that gives expert e counts[e] rows, in random order, and `without` more (and a rest) no expert."""
    rows = sum(counts) + without
    given = torch.tensor([*counts, without + -rows % top_k])
    index = torch.arange(len(counts) + 1).repeat_interleave(given)
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))].view(-1, top_k)


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64; where nothing is wanted, whether anything came (NaN included)."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    if not want.any():
        return 0.0 if not got.any() else math.inf
    error = ((got - want).norm() / want.norm()).item()
    return math.inf if math.isnan(error) else error


def truth(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle's output for a case in float64, and the float64 leaves that it is differentiable in."""
    names = ("hidden", "gate_up", "down", "weight", "gate_up_bias", "down_bias", "scale")
    given = {name: getattr(case, name) for name in names if getattr(case, name) is not None}
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in given.items()}
    hidden, gate_up, down, weight, *extras = (exact.get(name) for name in names)
    return oracle(hidden, gate_up, down, case.index.tolist(), weight, case.spec, *extras), exact


def errors(case: Case, backend: str) -> dict[str, float]:
    """Relative error of the output and of every gradient against the oracle."""
    out = case.run(backend)
    assert out.dtype == case.hidden.dtype
    leaves = case.leaves
    got = torch.autograd.grad(out, list(leaves.values()), case.grad_out)
    assert [g.dtype for g in got] == [x.dtype for x in leaves.values()]
    want_out, exact = truth(case)
    want = torch.autograd.grad(
        want_out, [exact[name] for name in leaves], case.grad_out.double(), allow_unused=True, materialize_grads=True
    )
    result = {"out": relative_error(out, want_out)}
    return result | {name: relative_error(g, w) for name, g, w in zip(leaves, got, want, strict=True)}


def assert_close(case: Case, backend: str, tolerance: float) -> None:
    found = errors(case, backend)
    assert max(found.values()) <= tolerance, found
