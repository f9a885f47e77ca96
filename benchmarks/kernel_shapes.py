"""The layers that the kernel benchmarks run: their shapes, routings, work and the fewest bytes they can move.

T tokens, K choices per token, S = T*K routed rows, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One MoE layer, gated: gate_up [E, 2I, H], down [E, H, I]."""

    name: str
    num_experts: int
    hidden_size: int
    inner_size: int
    top_k: int

    @property
    def expert_numel(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.inner_size


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe", 64, 2048, 1024, 8),
        Shape("qwen3-30b", 128, 2048, 768, 8),
        Shape("mixtral-8x7b", 8, 4096, 14336, 2),
        Shape("deepseek-v3", 256, 7168, 2048, 8),
        # vLLM publishes H200 times of its fused MoE for this one (its pull request 44818)
        Shape("vllm-44818", 128, 2816, 704, 8),
        Shape("toy", 6, 64, 32, 2),
    )
}

KINDS = ("forward", "step", "decode")
"""forward: without gradients; step: forward and backward; decode: forward of a few tokens, weights cold."""

DISTRIBUTIONS = ("balanced", "uniform", "zipf")
_ZIPF = 1.2


def scaled(shape: Shape, width: float) -> Shape:
    """The same layer with H and I multiplied by `width`, e.g. 0.5; sizes stay multiples of 8."""
    hidden_size, inner_size = (max(8, round(n * width / 8) * 8) for n in (shape.hidden_size, shape.inner_size))
    return replace(shape, name=f"{shape.name}*{width:g}", hidden_size=hidden_size, inner_size=inner_size)


def routing(shape: Shape, tokens: int, distribution: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(expert_index int64 [T, K], expert_weight float32 [T, K]) on the generator's device; no expert twice in a token.

    Args:
        distribution: balanced (every expert within one row of every other), uniform (random top-k) or zipf (an expert's
            popularity falls as rank^-1.2, and the least popular eighth gets nothing).

    Raises:
        ValueError: an unknown distribution.
    """
    device, num_experts, top_k = generator.device, shape.num_experts, shape.top_k
    popularity = torch.randperm(num_experts, generator=generator, device=device)
    if distribution == "balanced":
        slots = torch.arange(tokens * top_k, device=device).view(tokens, top_k) % num_experts
        order = torch.randperm(tokens, generator=generator, device=device)
        index = popularity[slots[order]]
    elif distribution in ("uniform", "zipf"):
        score = torch.zeros(num_experts, device=device)
        if distribution == "zipf":
            score = -_ZIPF * torch.log1p(popularity.float())
            active = max(top_k, num_experts - max(1, num_experts // 8))
            score[popularity >= active] = -torch.inf
        # the k largest of log-probability plus Gumbel noise are k draws without replacement
        noise = torch.rand(tokens, num_experts, generator=generator, device=device).clamp_(1e-9, 1 - 1e-7)
        index = (score - (-noise.log()).log()).topk(top_k, dim=1).indices
    else:
        raise ValueError(f"distribution is {distribution!r}; use one of {', '.join(DISTRIBUTIONS)}")
    weight = torch.rand(tokens, top_k, generator=generator, device=device) + 0.1
    return index, weight / weight.sum(dim=1, keepdim=True)


def drop_choices(index: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """`index` with a random number of each token's choices, never the first, set to E: the raggedness of top-p."""
    tokens, top_k = index.shape
    kept = torch.randint(1, top_k + 1, (tokens, 1), generator=generator, device=index.device)
    return torch.where(torch.arange(top_k, device=index.device) < kept, index, num_experts)


def layer_weights(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(gate_up [E, 2I, H], down [E, H, I]), normal, scaled so that rows keep their size."""
    sizes = (2 * shape.inner_size, shape.hidden_size), (shape.hidden_size, shape.inner_size)
    gate_up, down = (
        torch.empty(shape.num_experts, out, inner, dtype=dtype, device=generator.device).normal_(
            std=inner**-0.5, generator=generator
        )
        for out, inner in sizes
    )
    return gate_up, down


def flops(shape: Shape, rows: int, kind: str) -> int:
    """Floating-point operations of `rows` rows that have an expert; padding never counts as work."""
    return (18 if kind == "step" else 6) * rows * shape.hidden_size * shape.inner_size


def floor_bytes(shape: Shape, tokens: int, kind: str, *, rows: int, experts: int, element_size: int = 2) -> int:
    """Fewest bytes through device memory, with one kernel a GEMM and a separate sum over choices.

    Every kernel reads its operands once and writes its result once: cached gathers are free, weights are read once a GEMM.
    A step also keeps the pre-activations, and its backward pass has four GEMMs (docs/kernels.md).

    Args:
        rows: rows that have an expert.
        experts: experts that have rows; only their weights are read, while a step writes the gradients of all.
    """
    token, row, inner = (
        tokens * shape.hidden_size,
        rows * shape.hidden_size,
        rows * shape.inner_size,
    )
    weights = experts * shape.expert_numel
    # x in; inner rows out and in; rows out and in; result out
    forward = weights + 2 * token + 2 * inner + 2 * row
    if kind != "step":
        return forward * element_size
    keep_pre = 2 * inner
    gate_grad = token + 2 * inner + 2 * inner + inner
    grad_hidden = 2 * inner + row + row + token
    grad_weights = (token + inner) + (token + 2 * inner) + shape.num_experts * shape.expert_numel
    return (forward + keep_pre + weights + gate_grad + grad_hidden + grad_weights) * element_size


def floor_s(work: int, num_bytes: int, flops_per_s: float, bytes_per_s: float) -> float:
    """Seconds that nothing can beat: the larger of arithmetic and traffic at the two ceilings of the machine."""
    return max(work / flops_per_s, num_bytes / bytes_per_s)
