"""What a token costs: parameters it passes, operations, bytes.  E experts, K choices, H hidden size, I expert width."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from raymoe.compression.attach import theta_parameters
from raymoe.compression.settings import LEARNT, CompressionSettings, main_experts
from raymoe.compression.vectors import widths
from raymoe.models import moe_layers


@dataclass(frozen=True)
class Counts:
    """Of one model. A token's active parameters are the dense ones and those of the experts that it runs."""

    active_parameters: int
    active_moe_parameters: int
    """In experts alone."""
    total_parameters: int
    """With the vectors. Compression lowers none of the memory: any expert may be some token's main one."""
    vector_parameters: int
    flops_per_token: int
    """Two for each active parameter but the embedding table's, and the vectors' own: attention over the context is left out."""
    total_bytes: int


def active_counts(model: PreTrainedModel, settings: CompressionSettings | None = None) -> Counts:
    """Exact counts of a model (on the meta device will do), as its tokens run with `settings`; None: in full.

    Pruned experts leave a token as many as it was given, at most; counted as the share that stays.
    """
    layers = moe_layers(model)
    expert = [sum(field.numel for field in layer.layout.fields) for layer in layers]
    in_vectors = set(theta_parameters(model))
    named = {name: p for name, p in model.named_parameters() if name not in in_vectors}
    total = sum(p.numel() for p in named.values())
    dense = total - sum(layer.num_experts * numel for layer, numel in zip(layers, expert, strict=True))
    keep = settings.keep if settings is not None else (1.0,) * len(layers)
    mains = [main_experts(value, layer.top_k) for value, layer in zip(keep, layers, strict=True)]
    active_moe = sum(count * numel for count, numel in zip(mains, expert, strict=True))
    vectors = vector_flops = 0
    if settings is not None and settings.method in LEARNT:
        for layer, count in zip(layers, mains, strict=True):
            hidden, inner = widths(layer)
            width = (1 if settings.tie_input else 2) * hidden + inner
            vectors += (1 if settings.method == "shared_vector" else layer.num_experts) * width
            # summed once (a product and a sum each), then on the rows once and in each main expert
            others = layer.top_k - count
            vector_flops += 2 * others * width + (1 if settings.tie_input else 2) * hidden + count * inner
    table = model.get_input_embeddings().get_parameter("weight")
    head = model.get_output_embeddings()
    is_tied = head is not None and head.get_parameter("weight") is table
    looked_up = 0 if is_tied else table.numel()
    return Counts(
        active_parameters=dense + active_moe,
        active_moe_parameters=active_moe,
        total_parameters=total + vectors,
        vector_parameters=vectors,
        flops_per_token=2 * (dense - looked_up + active_moe) + vector_flops,
        total_bytes=sum(p.numel() * p.element_size() for p in named.values()) + 4 * vectors,
    )
