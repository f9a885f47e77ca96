"""The fixed training workload of `bench train`: one model, one batch a step, one routing a step, for raymoe and for its rivals.

B sequences in the global batch, n tokens predicted in each, T tokens of a rank in a step, R ranks, L MoE layers, E experts,
K choices a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from raymoe.placement.generate import generate

LOADS = ("balanced", "hot", "smartmoe")

_TRACE_RANKS = 8
_TRACE_STEPS = 64


@dataclass(frozen=True)
class TrainWorkload:
    """Sizes of model and batch, and AdamW's settings. Weights, tokens and routing are functions of it alone.

    With the default sizes the MoE blocks' forward and backward take 0.81 of a balanced step (0.88 of its forward and backward) in
    one process with one thread, bf16 with fp32 masters, and an expert gets 1,280 rows.

    Raises:
        ValueError: a size below 1, or so many choices that half of the experts cannot take them.
    """

    hidden_size: int = 256
    expert_width: int = 3072
    layers: int = 4
    experts: int = 16
    choices: int = 8
    heads: int = 2
    vocabulary: int = 512
    sequence_length: int = 128
    """Tokens predicted in a sequence."""
    sequences: int = 24
    """Of the global batch, over all ranks."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "expert_width", "layers", "experts", "choices", "heads", "vocabulary", "sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if 2 * self.choices > self.experts:
            raise ValueError(
                f"choices = {self.choices}: half of the {self.experts} experts cannot take that many distinct choices"
            )

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.sequences * self.sequence_length

    def config(self) -> OlmoeConfig:
        """The model as transformers has it; it has no balance loss, as the routing is given."""
        return OlmoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.expert_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            num_experts=self.experts,
            num_experts_per_tok=self.choices,
            max_position_embeddings=self.sequence_length,
            router_aux_loss_coef=0.0,
            output_router_logits=False,
            use_cache=False,
            pad_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )

    def model(self) -> OlmoeForCausalLM:
        """The model with its first weights, fp32, in training mode."""
        torch.manual_seed(self.seed)
        return OlmoeForCausalLM(self.config()).train()

    def batch(self, step: int) -> Tensor:
        """Tokens of the global batch, int64 [B, n + 1]: a unigram language whose n-th word comes 1/n as often as the first."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        share = 1 / torch.arange(1, self.vocabulary + 1, dtype=torch.float64)
        drawn = torch.multinomial(
            share, self.sequences * (self.sequence_length + 1), replacement=True, generator=generator
        )
        return drawn.view(self.sequences, -1)

    def counts(self, load: str, step: int, workers: int) -> np.ndarray:
        """Rows that each rank's tokens give each expert, int64 [R, L, E].

        `balanced`: all experts alike. `hot`: all rows on the experts that expert parallelism keeps on worker 0 (on the first K,
        if those are fewer). `smartmoe`: the generated preset of that name, a step of it a step.

        Raises:
            ValueError: an unknown load, or a batch that does not split evenly over `workers`.
        """
        if load not in LOADS:
            raise ValueError(f"no load {load!r}; there are: {', '.join(LOADS)}")
        if self.sequences % workers:
            raise ValueError(f"sequences = {self.sequences} do not split evenly over {workers} workers")
        if load == "smartmoe":
            return _trace(self, workers)[step % _TRACE_STEPS]
        wanted = self.experts if load == "balanced" else max(self.choices, self.experts // workers)
        rows = self.tokens // workers * self.choices
        counts_E = np.zeros(self.experts, dtype=np.int64)
        counts_E[:wanted] = rows // wanted + (np.arange(wanted) < rows % wanted)
        return np.broadcast_to(counts_E, (workers, self.layers, self.experts)).copy()

    def choices_of(self, load: str, step: int, rank: int, workers: int) -> Tensor:
        """The experts that each token of a rank takes, int64 [L, T, K], distinct in a token; counted they are `counts`."""
        tokens = self.tokens // workers
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + rank)
        layers = []
        for counts_E in torch.from_numpy(self.counts(load, step, workers)[rank]):
            # an expert has at most T rows, so in rows T apart it does not come twice
            rows = torch.arange(self.experts).repeat_interleave(counts_E)
            layers.append(rows.view(self.choices, tokens).T[torch.randperm(tokens, generator=generator)])
        return torch.stack(layers)


WORKLOAD = TrainWorkload()


@cache
def _trace(workload: TrainWorkload, workers: int) -> np.ndarray:
    ranks = max(workers, _TRACE_RANKS)
    trace = generate(
        "smartmoe",
        steps=_TRACE_STEPS,
        ranks=ranks,
        layers=workload.layers,
        experts=workload.experts,
        tokens_per_rank=workload.tokens // ranks,
        choices=workload.choices,
        seed=workload.seed,
    )
    return trace.for_ranks(workers).rows
