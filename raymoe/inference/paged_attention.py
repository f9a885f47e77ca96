"""Attention over the paged KV cache on a CPU, where each request reads its own pages and no others.

transformers' own function for a CPU lets every query of a step see the keys of all requests, behind a mask: its cost grows with
the square of the requests. Here the requests that decode are attended to in groups of about equal lengths, padded to the longest
of a group, and prompts one by one. Importing this registers the attention function with transformers.

T new tokens, R rows read from the cache, N requests of a group, H query heads, G key heads, D head size.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator

PAGED_ATTENTION = "raymoe_paged"

_CALL_TOKENS = 64
"""A group of its own costs about what reading this many tokens in vain does."""


class _Group(NamedTuple):
    """Requests with one new token each, padded to the longest."""

    size: int
    length: int
    mask: Tensor | None
    """Added to the scores, [N, 1, 1, length]; None if nothing is padded."""


class _Span(NamedTuple):
    """A request with several new tokens, or one that begins."""

    new: int
    length: int


@dataclass(frozen=True)
class StepLayout:
    """In which order a step's tokens are attended to, and which rows of the cache they read: of the layers of one kind."""

    order: Tensor | None
    """int64 [T]: the step's token at each place; None if they stay as they are."""
    places: Tensor | None
    """int64 [T]: the place of each token of the step."""
    read_index: Tensor
    """int64 [R], padding included; empty if all of the step's requests begin in it: then the new tokens are the rows."""
    write_index: Tensor
    """int64 [T], in `order`."""
    groups: list[_Group]
    spans: list[_Span]
    window: int | None
    """Tokens that a query sees, itself included; None: all before it."""

    def update(self, cache: PagedAttentionCache, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values [T, G, D] of a layer, and reads [R, G, D] what `attend` takes."""
        if self.order is not None:
            key, value = key.index_select(0, self.order), value.index_select(0, self.order)
        return cache.layer_to_allocator[layer_idx].update(key, value, layer_idx, self.read_index, self.write_index)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Each token over its request's rows up to itself.

        Args:
            query: [T, H, D], in the step's order.
            key: [R, G, D] as `update` gave it, H a multiple of G.
            value: [R, G, D'].
            scale: of the scores.
            softcap: scores are squeezed to that range, as Gemma 2 does.
            sinks: [H], a score of every head that takes weight and has no value (gpt_oss).

        Returns:
            [T, H, D'].
        """
        num_heads, key_heads = query.shape[1], key.shape[1]
        if self.order is not None:
            query = query.index_select(0, self.order)
        by_key_head = query.unflatten(1, (key_heads, -1))
        sinks = sinks.view(key_heads, -1, 1) if sinks is not None else None
        parts: list[Tensor] = []
        token = row = 0
        for size, length, mask in self.groups:
            rows = slice(row, row + size * length)
            keys, values = (x[rows].unflatten(0, (size, length)).transpose(1, 2) for x in (key, value))
            mixed = _attention(by_key_head[token : token + size], keys, values, mask, False, scale, softcap, sinks)
            parts.append(mixed.flatten(1, 2))
            token, row = token + size, row + size * length
        for new, length in self.spans:
            # key heads as the batch, so that keys are shared by expansion and not by copies
            own = by_key_head[token : token + new].permute(1, 2, 0, 3)
            keys, values = (
                x[row : row + length].transpose(0, 1)[:, None].expand(-1, num_heads // key_heads, -1, -1)
                for x in (key, value)
            )
            is_plain = new == length and softcap is None and sinks is None and (self.window or length) >= length
            mask = None if is_plain else _causal_mask(new, length, self.window, query.dtype)
            above = sinks[..., None] if sinks is not None else None
            mixed = _attention(own, keys, values, mask, is_plain, scale, softcap, above)
            parts.append(mixed.permute(2, 0, 1, 3).flatten(1, 2))
            token, row = token + new, row + length
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out if self.places is None else out.index_select(0, self.places)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[B, H, T, D] over [B, H, K, D]; `sinks` broadcasts against [B, H, T, 1]."""
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    num_keys = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., :num_keys] @ value


def _causal_mask(new: int, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[T, K] to be added to the scores of the last `new` of `length` tokens."""
    is_seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    if window is not None:
        is_seen = is_seen.triu(length - new - window + 1)
    return torch.zeros(new, length, dtype=dtype).masked_fill_(~is_seen, -torch.inf)


def step_layout(
    allocator: CacheAllocator,
    lengths_q: NDArray[np.int64],
    lengths_k: NDArray[np.int64],
    read_index: Tensor,
    write_index: Tensor,
    dtype: torch.dtype,
) -> StepLayout:
    """Arranges a step.

    Args:
        allocator: of the layers' pages.
        lengths_q: [requests], new tokens of each.
        lengths_k: [requests], tokens that each reads, the new ones among them.
        read_index: int64 [sum of lengths_k] on a CPU, or empty if all requests begin.
        write_index: int64 [T].
        dtype: of the queries.
    """
    window = getattr(allocator, "sliding_window", None)
    if not read_index.numel():
        spans = [_Span(n, n) for n in lengths_q.tolist()]
        return StepLayout(None, None, read_index, write_index, [], spans, window)
    is_single = lengths_q == 1
    single = np.flatnonzero(is_single)
    # longest first, so that neighbours are about equally long
    single = single[np.argsort(-lengths_k[single], kind="stable")]
    sizes = _group_sizes(lengths_k[single].tolist())
    spans = [_Span(int(lengths_q[i]), int(lengths_k[i])) for i in np.flatnonzero(~is_single)]
    if len(sizes) == len(lengths_q) == 1:
        # alone: nothing is moved
        return StepLayout(None, None, read_index, write_index, [_Group(1, int(lengths_k[0]), None)], spans, window)
    first_token, first_row = lengths_q.cumsum() - lengths_q, lengths_k.cumsum() - lengths_k
    requests = np.concatenate((single, np.flatnonzero(~is_single)))
    order = _ranges(first_token[requests], lengths_q[requests])
    starts = np.cumsum([0, *sizes])[:-1].astype(np.intp)
    widths = np.concatenate((np.repeat(lengths_k[single][starts], sizes), lengths_k[~is_single])).astype(np.int64)
    real = np.repeat(lengths_k[requests], widths)
    place = _ranges(np.zeros_like(widths), widths)
    is_real = place < real
    old = read_index.numpy()
    rows = np.where(is_real, old[np.repeat(first_row[requests], widths) + np.minimum(place, real - 1)],
                    allocator.read_trash_index)  # fmt: skip
    masks = torch.zeros(len(rows), dtype=dtype).masked_fill_(torch.from_numpy(~is_real), -torch.inf)
    groups: list[_Group] = []
    row = 0
    for start, size in zip(starts.tolist(), sizes, strict=True):
        length = int(widths[start])
        end = row + size * length
        is_padded = not is_real[row:end].all()
        groups.append(_Group(size, length, masks[row:end].view(size, 1, 1, length) if is_padded else None))
        row = end
    if (order[1:] > order[:-1]).all():
        return StepLayout(None, None, torch.from_numpy(rows), write_index, groups, spans, window)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    taken = torch.from_numpy(order)
    return StepLayout(
        taken, torch.from_numpy(places), torch.from_numpy(rows), write_index[taken], groups, spans, window
    )


def _group_sizes(lengths: list[int]) -> list[int]:
    """Of lengths in descending order: how many go into each group, so that none is padded by more than it saves."""
    sizes: list[int] = []
    longest = padding = 0
    for length in lengths:
        padding += longest - length
        if not sizes or padding > _CALL_TOKENS:
            sizes.append(0)
            longest, padding = length, 0
        sizes[-1] += 1
    return sizes


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, .. of each, `length` numbers, one behind the other."""
    return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths - starts, lengths)


def _paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    cache: PagedAttentionCache,
    layouts: dict[str, StepLayout],
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """([1, H, T, D], [1, G, T, D], [1, G, T, D]) -> [1, T, H, D], as transformers' attention modules call it."""
    layout = layouts[cache.layer_to_allocator[module.layer_idx].layer_type]
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = layout.update(cache, module.layer_idx, new_keys, new_values)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = query[0].transpose(0, 1)
    return layout.attend(queries, keys, values, scale=scale, softcap=softcap, sinks=s_aux)[None], None


AttentionInterface.register(PAGED_ATTENTION, _paged_attention)


def attach_paged_attention(model: PreTrainedModel) -> None:
    """Makes the model, on a CPU, attend to each request's own pages.

    Call it before the KV cache is made: transformers then neither allocates masks nor fills them at every step.
    """
    model.register_forward_pre_hook(_arrange, with_kwargs=True)
    model.config.get_text_config()._attn_implementation = PAGED_ATTENTION


def _arrange(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Once a step, for all its layers."""
    cache: PagedAttentionCache = kwargs["cache"]
    lengths_q = np.diff(kwargs["cu_seq_lens_q"].numpy()).astype(np.int64)
    layouts = {
        allocator.layer_type: step_layout(
            allocator,
            lengths_q,
            np.diff(kwargs["cu_seq_lens_k"][allocator.layer_type].numpy()).astype(np.int64),
            kwargs["read_index"][allocator.index],
            kwargs["write_index"][allocator.index],
            cache.dtype,
        )
        for allocator in cache.cache_allocators.values()
    }
    return args, kwargs | {"layouts": layouts}
