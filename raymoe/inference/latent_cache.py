"""Multi-head latent attention under transformers' continuous batching: the paged KV cache keeps the compressed latents.

A token takes kv_lora_rank + qk_rope_head_dim elements a layer, whatever the number of heads (DeepSeek-V2, arXiv 2405.04434,
section 2.1): 576 instead of the 5120 (V2-Lite) or 40960 (V3) of its expanded keys and values. Importing this registers the
allocator and the attention function with transformers.

T new tokens, K tokens that the batch reads, H heads.
"""

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR, PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    FULL_ATTENTION,
    CachePool,
    FullAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raymoe.inference.paged_attention import PAGED_ATTENTION, StepLayout
from raymoe.inference.servable import is_latent

LATENT_ATTENTION = "raymoe_latent"


class _FullAttention(FullAttentionCacheAllocator):
    """transformers' own, but for models with latent attention, where that one is an error of shapes."""

    def __new__(cls, *, config: PreTrainedConfig, **_: Any) -> "_FullAttention":
        return object.__new__(LatentCacheAllocator if is_latent(config) else cls)


class LatentCacheAllocator(_FullAttention):
    """Pages [tokens_per_page, kv_lora_rank + qk_rope_head_dim] of full attention layers: one row a token, for all heads."""

    supports_block_table = False
    rows_per_token = 1

    def __init__(
        self,
        index: int,
        config: PreTrainedConfig,
        num_key_value_heads: int,
        cache_dtype: torch.dtype,
        page_size: int,
        layer_indices: list[int],
        allow_block_sharing: bool,
    ):
        """As its base; `num_key_value_heads` is not used."""
        self.cache_dtype = cache_dtype
        self._sizes = [config.kv_lora_rank, config.qk_rope_head_dim]
        self._before_cache_tensor_init(
            index=index,
            layer_indices=layer_indices,
            tokens_per_page=page_size,
            bytes_per_page=sum(self._sizes) * cache_dtype.itemsize * page_size,
            allow_block_sharing=allow_block_sharing,
        )

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: CachePool
    ) -> None:
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        rows = cache_tensor.view(self.cache_dtype).view(-1, sum(self._sizes))
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, rows, pool)
        # an index counts from the first page of its block, which belongs to the first layer
        self._rows = {layer: rows[i * self.tokens_per_page :] for i, layer in enumerate(self.layer_indices)}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, read_index: Tensor, write_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the new latents [T, 1, kv_lora_rank] and rotary keys [T, 1, qk_rope_head_dim], and reads all of the batch's.

        Returns:
            The same two of every token that the batch reads, the new ones among them.
        """
        rows = self._rows[layer_idx]
        rows.index_copy_(0, write_index, torch.cat((key_states, value_states), dim=-1).squeeze(1))
        # empty: all prompts of the batch begin in this step, so the new ones are all there is
        if not read_index.numel():
            return key_states, value_states
        latent, rotary = rows.index_select(0, read_index)[:, None].split(self._sizes, dim=-1)
        return latent, rotary


# a name of our own would need transformers to know its sequence lengths and masks, which are those of full attention
ATTN_TYPE_TO_ALLOCATOR[FULL_ATTENTION] = _FullAttention


class _PagedLatents:
    """What an attention module takes for `past_key_values` (the part of it that it uses), for one call."""

    def __init__(self, module: nn.Module, cache: PagedAttentionCache, kwargs: dict[str, Any]):
        self._module = module
        self._cache = cache
        self._kwargs = kwargs
        self.rows: Tensor | None = None
        """[K, kv_lora_rank + qk_rope_head_dim], if attention shall compute with them as they are."""

    def update(self, latent: Tensor, rotary: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """([1, 1, T, kv_lora_rank], [1, 1, T, qk_rope_head_dim]) -> the same of what the module shall expand."""
        num_new = latent.shape[2]
        layout = _layout_of(self._kwargs)
        if layout is not None:
            rows = layout.update(self._cache, layer_idx, latent[0].transpose(0, 1), rotary[0].transpose(0, 1))
            latent, rotary = (one.transpose(0, 1)[None] for one in rows)
        else:
            latent, rotary = self._cache.update(latent, rotary, layer_idx, self._kwargs)
        if not _is_absorbing_cheaper(self._module, num_new, latent.shape[2]):
            return latent, rotary
        self.rows = torch.cat((latent, rotary), dim=-1)[0, 0]
        # the module expands what it gets; one token is the least it can
        return latent[:, :, :1], rotary[:, :, :1]


def _layout_of(kwargs: dict[str, Any]) -> StepLayout | None:
    """Of the step, where requests read their own pages alone."""
    layouts = kwargs.get("layouts")
    return layouts[FULL_ATTENTION] if layouts is not None else None


def _is_absorbing_cheaper(module: Any, num_new: int, num_read: int) -> bool:
    """Compares the multiplications of one head."""
    latent, rotary, nope, value = (
        module.kv_lora_rank,
        module.qk_rope_head_dim,
        module.qk_nope_head_dim,
        module.v_head_dim,
    )
    expanding = num_read * latent * (nope + value) + num_new * num_read * (nope + rotary + value)
    absorbing = num_new * latent * (nope + value) + num_new * num_read * 2 * (latent + rotary)
    return absorbing < expanding


def _latent_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    latents: _PagedLatents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over latents: the up-projections of keys and values move to the queries' side (arXiv 2405.04434, section 2.1.2).

    Args:
        query: [1, H, T, qk_nope_head_dim + qk_rope_head_dim].
        latents: with `rows`; without, attention is over `key` and `value` as usual.

    Returns:
        [1, T, H, v_head_dim].
    """
    layout = _layout_of(kwargs)
    if latents is None or latents.rows is None:
        if layout is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        heads = (one[0].transpose(0, 1) for one in (query, key, value))
        return layout.attend(*heads, scale=scaling)[None], None
    nope, rank = module.qk_nope_head_dim, module.kv_lora_rank
    up = module.kv_b_proj.weight.view(-1, nope + module.v_head_dim, rank)
    into_latent = torch.cat((query[0, :, :, :nope] @ up[:, :nope], query[0, :, :, nope:]), dim=-1)
    # values of the keys' width keep to the fast kernels; what is past the latent is dropped
    if layout is not None:
        rows = latents.rows[:, None]
        mixed = layout.attend(into_latent.transpose(0, 1), rows, rows, scale=scaling).transpose(0, 1)
    else:
        rows = latents.rows.expand(1, up.shape[0], -1, -1)
        mixed = scaled_dot_product_attention(into_latent[None], rows, rows, attention_mask, scale=scaling)[0]
    out = mixed[:, :, :rank] @ up[:, nope:].transpose(1, 2)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(LATENT_ATTENTION, _latent_attention)


def attach_latents(model: PreTrainedModel) -> None:
    """Makes the model's latent attention use the paged cache before it expands keys and values, not after.

    Continuous batching gives the cache to the attention function, which sees expanded heads only; these modules offer their
    latents to `past_key_values`, which continuous batching leaves empty. Call it when the cache has been made: transformers
    knows no attention function of ours, and builds the mask that this one needs on a GPU for "sdpa".
    """
    assert model.config.get_text_config()._attn_implementation in ("sdpa", PAGED_ATTENTION)
    modules = [module for module in model.modules() if hasattr(module, "kv_a_proj_with_mqa")]
    assert modules
    for module in modules:
        module.register_forward_pre_hook(_use_latents, with_kwargs=True)
    model.config.get_text_config()._attn_implementation = LATENT_ATTENTION


def _use_latents(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    cache = kwargs.get("cache")
    if cache is None:
        return args, kwargs
    kwargs = {name: value for name, value in kwargs.items() if name != "cache"}
    latents = _PagedLatents(module, cache, dict(kwargs))
    return args, kwargs | {"past_key_values": latents, "latents": latents}


def expanded_blocks(config: PreTrainedConfig, num_pages: int) -> int:
    """transformers counts a KV cache in blocks of heads of `head_dim`: how many of those take the bytes of `num_pages`."""
    expanded = 2 * find_num_key_value_heads(config) * find_head_dim(config)
    return ceil(num_pages * (config.kv_lora_rank + config.qk_rope_head_dim) / expanded)
