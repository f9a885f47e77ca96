"""Is the layer right on this device: every variant, forward and backward, against float64, and what serving and training lean on.

Rows of {check, ok, error, limit, note}. Memory that a kernel should write is filled with NaN first. T tokens, K choices per token,
S = T*K routed rows, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raymoe.benchmarks.kernel_jobs import Journal, Row
from raymoe.benchmarks.kernel_rivals import relative_error
from raymoe.benchmarks.kernel_shapes import Shape, drop_choices, routing
from raymoe.kernels import ExpertSpec, combine, expert_rows, moe_mlp, plan
from raymoe.kernels.backend import is_interpreted

# relative, over a whole tensor: the type's rounding through three products
LIMITS = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# Triton's interpreter truncates to bfloat16 instead of rounding, which biases sums
_INTERPRETED_BF16 = 4e-2

SPECS = {
    "silu": ExpertSpec(),
    "gelu interleaved": ExpertSpec(activation="gelu", is_interleaved=True),
    "gelu_tanh transposed": ExpertSpec(activation="gelu_tanh", is_transposed=True),
    "relu": ExpertSpec(activation="relu"),
    "relu2 ungated": ExpertSpec(activation="relu2", is_gated=False),
    "gelu ungated transposed": ExpertSpec(activation="gelu", is_gated=False, is_transposed=True),
    "silu clamped": ExpertSpec(gate_limit=0.3),
    "gpt-oss": ExpertSpec(is_transposed=True, is_interleaved=True, gate_limit=0.3, gate_alpha=1.702, up_offset=1.0),
}


@dataclass(frozen=True)
class Inputs:
    """A layer's operands; the tensors of `leaves` want gradients."""

    leaves: dict[str, Tensor]
    index: Tensor
    grad_out: Tensor
    spec: ExpertSpec

    def forward(self, backend: str) -> Tensor:
        x = self.leaves
        return moe_mlp(
            x["hidden"],
            x["gate_up"],
            x["down"],
            self.index,
            x["expert_weight"],
            spec=self.spec,
            biases=(x["gate_up_bias"], x["down_bias"]) if "gate_up_bias" in x else None,
            hidden_scale=x.get("hidden_scale"),
            backend=backend,
        )

    def step(self, backend: str = "triton") -> dict[str, Tensor]:
        """Output and gradients."""
        out = self.forward(backend)
        grads = torch.autograd.grad(out, list(self.leaves.values()), self.grad_out.to(out.dtype))
        return {"out": out.detach(), **dict(zip(self.leaves, grads, strict=True))}

    def in_float64(self) -> Inputs:
        return replace(self, leaves={name: x.detach().double().requires_grad_() for name, x in self.leaves.items()})


def make_inputs(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    spec: ExpertSpec = SPECS["silu"],
    distribution: str = "uniform",
    has_gaps: bool = False,
    has_extras: bool = False,
) -> Inputs:
    """Random operands; `has_gaps` leaves some choices without an expert, their weights NaN; extras are biases and a scale."""
    generator = torch.Generator(device).manual_seed(tokens)
    num_experts, hidden_size, inner_size = shape.num_experts, shape.hidden_size, shape.inner_size
    up_size = spec.gate_up_factor * inner_size

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator, device=device) * std).to(dtype)

    def matrices(out_size: int, in_size: int) -> Tensor:
        sizes = (in_size, out_size) if spec.is_transposed else (out_size, in_size)
        return normal(num_experts, *sizes, std=in_size**-0.5)

    index, weight = routing(shape, tokens, distribution, generator)
    if has_gaps:
        index = drop_choices(index, num_experts, generator)
        weight[index == num_experts] = float("nan")
    leaves = {
        "hidden": normal(tokens, hidden_size),
        "gate_up": matrices(up_size, hidden_size),
        "down": matrices(hidden_size, inner_size),
        "expert_weight": weight,
    }
    if has_extras:
        leaves |= {
            "gate_up_bias": normal(num_experts, up_size, std=0.3),
            "down_bias": normal(num_experts, hidden_size, std=0.3),
            "hidden_scale": normal(tokens, inner_size),
        }
    for x in leaves.values():
        x.requires_grad_()
    return Inputs(leaves, index, normal(tokens, hidden_size), spec)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so that an unwritten result cannot pass."""
    # warn only: cuBLAS's own workspace setting is none of our business
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def limit_of(dtype: torch.dtype) -> float:
    return _INTERPRETED_BF16 if dtype == torch.bfloat16 and is_interpreted() else LIMITS[dtype]


def verdict(check: str, error: float, limit: float, note: str = "") -> Row:
    return {"check": check, "ok": error <= limit, "error": error, "limit": limit, "note": note}


def compare(check: str, got: dict[str, Tensor], want: dict[str, Tensor], limit: float) -> Row:
    errors = {name: relative_error((got[name],), (want[name],)) for name in got}
    worst = max(errors, key=lambda name: errors[name])
    return verdict(check, errors[worst], limit, "" if errors[worst] <= limit else f"in {worst}")


def bitwise(check: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> Row:
    different = [name for name in got if not torch.equal(got[name], want[name])]
    return verdict(check, float(len(different)), 0.0, f"differ: {', '.join(different)}" if different else "")


ALIGNED = Shape("aligned", 16, 256, 128, 4)
ODD = Shape("odd", 9, 200, 72, 3)
TINY = Shape("tiny", 4, 40, 24, 2)


def check_layer(name: str, dtype: torch.dtype, journal: Journal, device: torch.device) -> None:
    """One spec: three distributions, gaps and extras, sizes from a few rows an expert to several tiles."""
    spec = SPECS[name]
    cases = [(TINY, 9, "uniform", True, True), (TINY, 9, "zipf", False, False)]
    if device.type == "cuda":
        cases = [
            (ALIGNED, 7, "balanced", False, False),
            (ALIGNED, 1500, "zipf", True, True),
            (ODD, 130, "uniform", True, True),
            (ODD, 1500, "zipf", True, False),
        ]
    for shape, tokens, distribution, has_gaps, has_extras in cases:
        inputs = make_inputs(
            shape,
            tokens,
            dtype,
            device,
            spec=spec,
            distribution=distribution,
            has_gaps=has_gaps,
            has_extras=has_extras,
        )
        want = inputs.in_float64().step("reference")
        with poisoned_memory():
            got = inputs.step()
        extras = (", gaps" if has_gaps else "") + (", bias and scale" if has_extras else "")
        title = f"{name}, {str(dtype).removeprefix('torch.')}, {shape.name} T={tokens} {distribution}{extras}"
        journal.add(compare(title, got, want, limit_of(dtype)))


def check_repeats(journal: Journal, device: torch.device) -> None:
    """The same inputs give the same bits."""
    shape, tokens = (ALIGNED, 2000) if device.type == "cuda" else (TINY, 9)
    inputs = make_inputs(shape, tokens, torch.float32, device, distribution="zipf", has_gaps=True, has_extras=True)
    with poisoned_memory():
        journal.add(bitwise("two runs, same bits", inputs.step(), inputs.step()))


def check_expert_rows(journal: Journal, device: torch.device) -> None:
    """Serving's half in pieces, weights in any slots, gives the bits of one call, and the layer's result."""
    shape, tokens = (ALIGNED, 300) if device.type == "cuda" else (TINY, 9)
    inputs = make_inputs(shape, tokens, torch.float32, device, has_gaps=True)
    x = {name: leaf.detach() for name, leaf in inputs.leaves.items()}
    routed = plan(inputs.index, shape.num_experts)
    slots = torch.randperm(shape.num_experts, device=device).tolist()
    gate_up, down = torch.empty_like(x["gate_up"]), torch.empty_like(x["down"])
    gate_up[slots], down[slots] = x["gate_up"], x["down"]
    results = []
    for parts in (1, 3):
        out = x["hidden"].new_full((inputs.index.numel(), shape.hidden_size), float("nan"))
        for part in range(parts):
            ids = list(range(part, shape.num_experts, parts))
            expert_rows(
                x["hidden"], gate_up, down, routed, ids, slots=[slots[e] for e in ids], out=out, backend="triton"
            )
        results.append({"out": combine(out, routed, x["expert_weight"])})
    journal.add(bitwise("expert_rows in three calls as in one", *results))
    want = {"out": inputs.in_float64().step("reference")["out"]}
    journal.add(compare("expert_rows and combine", results[1], want, limit_of(torch.float32)))


def check_grad_into(journal: Journal, device: torch.device) -> None:
    """Weight gradients added where they already stand."""
    shape, tokens = (ALIGNED, 300) if device.type == "cuda" else (TINY, 9)
    inputs = make_inputs(shape, tokens, torch.float32, device)
    x = inputs.leaves
    want = inputs.in_float64().step("reference")
    into = torch.ones_like(x["gate_up"]), torch.ones_like(x["down"])
    out = moe_mlp(
        x["hidden"],
        x["gate_up"],
        x["down"],
        inputs.index,
        x["expert_weight"],
        spec=inputs.spec,
        grad_into=into,
        backend="triton",
    )
    (grad_hidden,) = torch.autograd.grad(out, [x["hidden"]], inputs.grad_out)
    got = {"gate_up": into[0] - 1, "down": into[1] - 1, "hidden": grad_hidden}
    # the ones they are added to cost digits
    journal.add(compare("gradients added in place", got, want, 10 * limit_of(torch.float32)))


def check_compile(journal: Journal, device: torch.device) -> None:
    """torch.compile takes the layer whole, forward and backward."""
    shape, tokens = (ALIGNED, 130) if device.type == "cuda" else (TINY, 9)
    inputs = make_inputs(shape, tokens, torch.float32, device, has_extras=True)
    engine = "inductor" if device.type == "cuda" else "aot_eager"

    @torch.compile(fullgraph=True, backend=engine)
    def layer(hidden: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return moe_mlp(hidden * 2, gate_up, down, index, weight, backend="triton").sin()

    names: tuple[str, ...] = ("hidden", "gate_up", "down", "expert_weight")
    x = [inputs.leaves[name] for name in names]
    hidden, gate_up, down, weight = x
    out = layer(hidden, gate_up, down, inputs.index, weight)
    plain = moe_mlp(hidden * 2, gate_up, down, inputs.index, weight, backend="triton").sin()
    results: list[dict[str, Tensor]] = [
        dict(zip(("out", *names), (y, *torch.autograd.grad(y, x, inputs.grad_out)), strict=True)) for y in (out, plain)
    ]
    got, want = results
    journal.add(compare(f"torch.compile, whole graph, {engine}", got, want, limit_of(torch.float32)))


def check_graph(journal: Journal, device: torch.device) -> None:
    """A CUDA graph of the layer, replayed on other inputs and another routing, gives the bits of a plain call."""
    for run in (_forward, Inputs.step):
        held = make_inputs(ALIGNED, 300, torch.bfloat16, device, has_gaps=True, has_extras=True)
        other = make_inputs(ALIGNED, 300, torch.bfloat16, device, distribution="zipf", has_gaps=True, has_extras=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = run(held)
        with torch.no_grad():
            for name, x in held.leaves.items():
                x.copy_(other.leaves[name])
            held.index.copy_(other.index)
            held.grad_out.copy_(other.grad_out)
        graph.replay()
        torch.cuda.synchronize()
        journal.add(bitwise(f"CUDA graph of {run.__name__.strip('_')}", replayed, run(other)))


def _forward(inputs: Inputs) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"out": inputs.forward("triton")}


def check_no_sync(journal: Journal, device: torch.device) -> None:
    """Neither forward nor backward waits for the device."""
    inputs = make_inputs(ALIGNED, 300, torch.bfloat16, device, has_gaps=True, has_extras=True)
    inputs.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    journal.add(verdict("no host synchronisation", 0.0, 0.0))


def check_wide_rows(journal: Journal, device: torch.device) -> None:
    """More than 2^31 elements in the routed rows: the last tokens come out as they do alone."""
    shape, tokens, last = Shape("wide rows", 16, 2048, 64, 8), 140_000, 50
    if device.type != "cuda":
        shape, tokens, last = TINY, 12, 3
    inputs = make_inputs(shape, tokens, torch.bfloat16, device)
    got = inputs.step()
    few = {name: inputs.leaves[name][-last:].detach() for name in ("hidden", "expert_weight")}
    tail = Inputs(
        {name: few.get(name, x.detach()) for name, x in inputs.leaves.items()},
        inputs.index[-last:],
        inputs.grad_out[-last:],
        inputs.spec,
    ).in_float64()
    want = tail.step("reference")
    got = {name: got[name][-last:] for name in ("out", "hidden", "expert_weight")}
    journal.add(compare("more than 2^31 elements of rows", got, want, limit_of(torch.bfloat16)))


def check_wide_slots(journal: Journal, device: torch.device) -> None:
    """Experts more than 2^31 elements apart, as views of flat slot buffers."""
    shape, tokens, apart = replace(ALIGNED, num_experts=3, top_k=2), 300, 2**31 + 128
    if device.type != "cuda":
        shape, tokens, apart = replace(TINY, num_experts=3), 9, 2**13
    inputs = make_inputs(shape, tokens, torch.bfloat16, device)
    want = inputs.in_float64().step("reference")
    x = inputs.leaves
    numel = 2 * apart + x["gate_up"][0].numel() + x["down"][0].numel()
    flat = torch.full((numel,), float("nan"), device=device, dtype=torch.bfloat16)
    offset = 0
    for name in ("gate_up", "down"):
        _, rows, columns = x[name].shape
        view = flat.as_strided((3, rows, columns), (apart, columns, 1), offset)
        view.copy_(x[name].detach())
        x[name] = view.detach().requires_grad_()
        offset += rows * columns
    journal.add(compare("experts 2^31 elements apart", inputs.step(), want, limit_of(torch.bfloat16)))


_ANYWHERE: dict[str, Callable[[Journal, torch.device], None]] = {
    "repeats": check_repeats,
    "expert_rows": check_expert_rows,
    "grad_into": check_grad_into,
    "compile": check_compile,
    "wide rows": check_wide_rows,
    "wide slots": check_wide_slots,
}
_CUDA = {"graph": check_graph, "no_sync": check_no_sync}


def layer_checks(device: torch.device) -> dict[str, Callable[[Journal], None]]:
    """Name -> what runs it, in order."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32,)
    names = SPECS if device.type == "cuda" else ("silu", "gpt-oss")
    checks: dict[str, Callable[[Journal], None]] = {}
    for name in names:
        for dtype in dtypes:
            checks[f"layer/{name}/{dtype}"] = lambda journal, name=name, dtype=dtype: check_layer(
                name, dtype, journal, device
            )
    others = _ANYWHERE | (_CUDA if device.type == "cuda" else {})
    return checks | {name: lambda journal, check=check: check(journal, device) for name, check in others.items()}
