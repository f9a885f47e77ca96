"""Each GEMM of a layer by itself, with operands made up for it: what the tuner times, the checks compare and warm-up compiles.

T tokens, K choices per token, S = T*K routed rows, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from raymoe.kernels.configs import KINDS, GemmConfig, table_of
from raymoe.kernels.gather_rows_triton import spread_rows_triton
from raymoe.kernels.gmm import gmm
from raymoe.kernels.gmm_gate import gmm_gate
from raymoe.kernels.gmm_gate_grad import gmm_gate_grad
from raymoe.kernels.gmm_k import gmm_k
from raymoe.kernels.moe_mlp import moe_mlp
from raymoe.kernels.plan import plan
from raymoe.kernels.spec import ExpertSpec, apply_gate
from raymoe.kernels.tiles import Tiles, tile_table

INFERENCE_KINDS = ("up", "down")
_WARM_SLOTS = 2


@dataclass(frozen=True)
class LayerKind:
    """What a GEMM of a layer is compiled for."""

    num_experts: int
    hidden_size: int
    inner_size: int
    dtype: torch.dtype
    device: torch.device
    spec: ExpertSpec = field(default_factory=ExpertSpec)
    has_bias: bool = False
    has_scale: bool = False


class GemmCase:
    """One GEMM of `configs.KINDS` with random operands and results that stay in place.

    Args:
        index: [T, K], experts of a routing without gaps.
        slots: experts that have weights, those that `index` may name; default all E.
    """

    def __init__(
        self, kind: str, layer: LayerKind, index: Tensor, generator: torch.Generator, slots: int | None = None
    ) -> None:
        self.kind, self._layer, self._generator = kind, layer, generator
        self._slots = slots if slots is not None else layer.num_experts
        self._plan = plan(index, layer.num_experts)
        self._tiles: dict[int, Tiles] = {}
        spec, hidden_size, inner_size = layer.spec, layer.hidden_size, layer.inner_size
        tokens, rows = index.shape[0], index.numel()
        up_size = spec.gate_up_factor * inner_size
        is_up, is_grad = kind in ("up", "up_train"), kind == "gate_grad"
        widths = {"down": inner_size, "gate_grad": inner_size, "weight_grad": up_size + inner_size}
        self.flops = 2 * rows * hidden_size * widths.get(kind, up_size)
        self.out: dict[str, Tensor] = {}
        self._bias = self._scale = None
        if layer.has_bias and (is_up or is_grad or kind == "down"):
            self._bias = self._normal(self._slots, up_size if is_up else hidden_size, std=0.3)
        if layer.has_scale and (is_up or is_grad):
            self._scale = self._normal(tokens, inner_size)
        if is_up:
            self._x, self._weight = self._normal(tokens, hidden_size), self._matrices(up_size, hidden_size)
            self.out["inner"] = self._empty(rows, inner_size)
            if kind == "up_train":
                self.out["pre"] = self._empty(rows, up_size)
        elif kind == "down":
            self._x, self._weight = self._normal(rows, inner_size), self._matrices(hidden_size, inner_size)
            self.out["rows"] = self._empty(rows, hidden_size)
        elif is_grad:
            self._x, self._weight = self._normal(tokens, hidden_size), self._matrices(hidden_size, inner_size)
            self._pre = self._normal(rows, up_size)
            self._row_weight = torch.rand(rows, generator=generator, device=layer.device)
        elif kind == "input_grad":
            self._x, self._weight = self._normal(rows, up_size), self._matrices(up_size, hidden_size)
            self.out["rows"] = self._empty(rows, hidden_size)
        else:
            assert kind == "weight_grad"
            self._x, self._grad_out = (self._normal(tokens, hidden_size) for _ in range(2))
            self._pre, self._inner = self._normal(rows, up_size), self._normal(rows, inner_size)
            self._order = self._plan.offsets[: self._slots + 1].diff().argsort(descending=True)
            self.out["gate_up"] = self._oriented(self._empty, up_size, hidden_size)
            self.out["down"] = self._oriented(self._empty, hidden_size, inner_size)

    def run(self, config: GemmConfig, *, accumulate: bool = False) -> None:
        """Launch it as the backend does, overwriting `out`; `accumulate` adds to it, for gradients of weights."""
        layer, routed, x = self._layer, self._plan, self._x
        if self.kind == "weight_grad":
            self._sum_rows(config, accumulate)
            return
        tiles = self._tiles.get(config.rows)
        if tiles is None:
            tiles = self._tiles[config.rows] = tile_table(routed, config.rows)
        weight = self._out_in(self._weight)
        is_sorted = config.inputs == "descriptor"
        if self.kind in ("up", "up_train"):
            gmm_gate(
                self._in_order(x) if is_sorted else x,
                weight,
                routed.token,
                tiles,
                config,
                layer.spec,
                self.out["inner"],
                is_sorted=is_sorted,
                pre=self.out.get("pre"),
                bias=self._bias,
                scale=self._scale,
            )
        elif self.kind == "gate_grad":
            grad = gmm_gate_grad(
                self._in_order(x) if is_sorted else x,
                weight.transpose(1, 2),
                routed.token,
                self._pre,
                self._row_weight,
                tiles,
                config,
                layer.spec,
                is_sorted=is_sorted,
                bias=self._bias,
                scale=self._scale,
            )
            self.out = {name: part for name, part in grad._asdict().items() if part is not None}
        elif self.kind == "down":
            gmm(x, weight, tiles, config, self.out["rows"], bias=self._bias)
        else:
            gmm(x, weight.transpose(1, 2), tiles, config, self.out["rows"])

    def _sum_rows(self, config: GemmConfig, accumulate: bool) -> None:
        is_sorted = config.inputs == "descriptor"
        x, grad_out = (self._in_order(rows) if is_sorted else rows for rows in (self._x, self._grad_out))
        token = None if is_sorted else self._plan.token
        offsets = self._plan.offsets[: self._slots + 1]
        out = {name: self._out_in(part) for name, part in self.out.items()}
        options = {"order": self._order, "accumulate": accumulate}
        gmm_k(grad_out, self._inner, offsets, config, out["down"], token_a=token, **options)
        gmm_k(self._pre, x, offsets, config, out["gate_up"], token_b=token, **options)

    def _in_order(self, x: Tensor) -> Tensor:
        return spread_rows_triton(x, self._plan.inverse, self._plan.offsets[-1:])

    def error(self, config: GemmConfig, experts: Iterable[int]) -> float:
        """Largest relative error over the results, for some experts against float32, after a run over NaN.

        Infinite where anything that had to be written is not finite.
        """
        for part in self.out.values():
            part.fill_(float("nan"))
        self.run(config)
        if not all(part.isfinite().all() for part in self.out.values()):
            return float("inf")
        worst = 0.0
        bounds = self._plan.offsets.tolist()
        for e in experts:
            start, end = bounds[e], bounds[e + 1]
            for name, want in self._reference(e, slice(start, end)).items():
                part = self.out[name]
                got = self._out_in(part)[e] if self.kind == "weight_grad" else part[start:end]
                if want.numel():
                    error = ((got.float() - want).norm() / want.norm().clamp(min=1e-20)).item()
                    worst = max(worst, error)
        return worst

    def some_experts(self, count: int = 3) -> list[int]:
        """The busiest, the idlest and others between."""
        order = self._plan.offsets.diff().argsort().tolist()
        return [order[round(at * (len(order) - 1) / max(count - 1, 1))] for at in range(count)]

    def _reference(self, e: int, rows: slice) -> dict[str, Tensor]:
        layer, token = self._layer, self._plan.token[rows]
        spec = layer.spec
        if self.kind == "weight_grad":
            x, grad_out = self._x[token].float(), self._grad_out[token].float()
            return {"gate_up": self._pre[rows].float().T @ x, "down": grad_out.T @ self._inner[rows].float()}
        weight = self._out_in(self._weight)[e].float()
        bias = self._bias[e].float() if self._bias is not None else 0.0
        scale = self._scale[token].float() if self._scale is not None else 1.0
        if self.kind in ("up", "up_train"):
            # the kernel gates what it stores
            pre = (self._x[token].float() @ weight.T + bias).to(layer.dtype)
            found = {"inner": apply_gate(pre.float(), spec) * scale, "pre": pre.float()}
            return {name: found[name] for name in self.out}
        if self.kind in ("down", "input_grad"):
            x = self._x[rows].float()
            return {"rows": x @ weight.T + bias if self.kind == "down" else x @ weight}
        grad_out, s = self._x[token].float(), self._row_weight[rows, None]
        grad = grad_out @ weight
        pre = self._pre[rows].float().requires_grad_()
        value = apply_gate(pre, spec)
        (grad_pre,) = torch.autograd.grad(value, pre, s * scale * grad)
        value = value.detach()
        row_weight = (grad * scale * value).sum(dim=1) + (grad_out * bias).sum(dim=1)
        found = {"pre": grad_pre, "scaled_inner": s * scale * value, "scale": s * grad * value}
        return {name: {**found, "row_weight": row_weight}[name] for name in self.out}

    def _normal(self, *sizes: int, std: float = 1.0) -> Tensor:
        return self._empty(*sizes).normal_(std=std, generator=self._generator)

    def _empty(self, *sizes: int) -> Tensor:
        return torch.empty(*sizes, dtype=self._layer.dtype, device=self._layer.device)

    def _matrices(self, out_size: int, in_size: int) -> Tensor:
        return self._oriented(lambda *sizes: self._normal(*sizes, std=in_size**-0.5), out_size, in_size)

    def _oriented(self, make, out_size: int, in_size: int) -> Tensor:
        sizes = (in_size, out_size) if self._layer.spec.is_transposed else (out_size, in_size)
        return make(self._slots, *sizes)

    def _out_in(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2) if self._layer.spec.is_transposed else weight


def label(config: GemmConfig) -> str:
    """A config in a word: sizes, warps, stages, and what differs from the defaults."""
    tile = f"{config.rows}x{config.cols}x{config.inner} w{config.num_warps} s{config.num_stages}"
    named = ("rows", "cols", "inner", "num_warps", "num_stages")
    others = [f for f in fields(config) if f.name not in named and getattr(config, f.name) != f.default]
    return " ".join([tile, *(f"{f.name}={getattr(config, f.name)}" for f in others)])


def random_index(num_rows: int, num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """[T, K] uniform random experts for at least `num_rows` rows."""
    return torch.randint(
        num_experts, (-(-num_rows // top_k), top_k), generator=generator, device=generator.device, dtype=torch.int64
    )


def compile_gemms(
    layer: LayerKind, kinds: Sequence[str], configs: dict[str, Sequence[GemmConfig]], top_k: int = 8
) -> None:
    """Launch each kind's configs once on a few rows, so that they are compiled; weights of two experts are enough."""
    generator = torch.Generator(layer.device).manual_seed(0)
    slots = min(_WARM_SLOTS, layer.num_experts)
    for kind in kinds:
        case = GemmCase(kind, layer, random_index(64 * top_k, slots, top_k, generator), generator, slots)
        for config in configs[kind]:
            case.run(config)
            if kind == "weight_grad":
                case.run(config, accumulate=True)


def compile_layer(
    spec: ExpertSpec,
    num_experts: int,
    hidden_size: int,
    inner_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_training: bool,
    top_k: int,
    has_bias: bool,
    has_scale: bool,
) -> None:
    """Run everything a layer of this shape can launch: each GEMM in every bucket of its table, and what stands around them."""
    layer = LayerKind(num_experts, hidden_size, inner_size, dtype, device, spec, has_bias, has_scale)
    table = table_of(torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    name = str(dtype).removeprefix("torch.")
    kinds = KINDS if is_training else INFERENCE_KINDS
    compile_gemms(layer, kinds, {kind: list(dict.fromkeys(table[kind][name].values())) for kind in kinds}, top_k)
    # the rest does not depend on the expert width, and weights that narrow cost no memory
    for tokens in (1, 1024):
        _run_narrow_layer(layer, tokens, top_k, is_training)


def _run_narrow_layer(layer: LayerKind, tokens: int, top_k: int, is_training: bool) -> None:
    spec, num_experts, hidden_size, inner_size = layer.spec, layer.num_experts, layer.hidden_size, 16
    up_size = spec.gate_up_factor * inner_size

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(*sizes, dtype=layer.dtype, device=layer.device, requires_grad=is_training)

    def matrices(out_size: int, in_size: int) -> Tensor:
        return zeros(num_experts, *((in_size, out_size) if spec.is_transposed else (out_size, in_size)))

    out = moe_mlp(
        zeros(tokens, hidden_size),
        matrices(up_size, hidden_size),
        matrices(hidden_size, inner_size),
        torch.zeros(tokens, top_k, dtype=torch.int64, device=layer.device),
        torch.zeros(tokens, top_k, device=layer.device, requires_grad=is_training),
        spec=spec,
        biases=(zeros(num_experts, up_size), zeros(num_experts, hidden_size)) if layer.has_bias else None,
        hidden_scale=zeros(tokens, inner_size) if layer.has_scale else None,
        backend="triton",
    )
    if is_training:
        out.backward(torch.zeros_like(out))
