"""The routing plan as Triton kernels: one launch for decoding, three above.

T tokens, K choices per token, S = T*K slots, E experts. No host sync, no atomics on global memory, the same bits every time.

A slot's key is its expert, then its own number; keys differ, so a slot's sorted row is the count of smaller keys. Few
slots are counted against all others, and the E + 1 offsets likewise, as keys of no slot. Many slots are cut into chunks: a
slot is counted within its chunk, and a table says how far each expert's run has come before that chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.plan import Plan

ONE_LAUNCH_SLOTS = 4096
"""Up to here counting every slot against every other should cost less than two more launches (counted, not timed)."""

_NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def _load_experts(expert_index, slots, keep, num_experts):
    """int32; what is no expert counts as E, so that rows stay a permutation whatever the router wrote."""
    expert = tl.load(expert_index + slots, mask=keep, other=0).to(tl.int64)
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)


@triton.jit
def _is_smaller(a, b):
    """int32 1 where a < b, else 0, for non-negative int32: from the sign of the difference, which takes fewer instructions."""
    return ((a - b).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _store_rows(order, token, expert, inverse, slots, keep, row, own, top_k):
    row = row.to(tl.int64)
    tl.store(inverse + slots, row, mask=keep)
    tl.store(order + row, slots.to(tl.int64), mask=keep)
    tl.store(token + row, (slots // top_k).to(tl.int64), mask=keep)
    tl.store(expert + row, own.to(tl.int64), mask=keep)


@triton.jit(do_not_specialize=["num_slots", "top_k"])
def _small_plan_kernel(
    expert_index,
    order,
    token,
    expert,
    inverse,
    offsets,
    num_slots,
    num_experts,
    top_k,
    BQ: tl.constexpr,
    BS: tl.constexpr,
):
    at = tl.program_id(0) * BQ + tl.arange(0, BQ)
    is_slot = at < num_slots
    own = _load_experts(expert_index, at, is_slot, num_experts)
    bound = at - num_slots
    query = tl.where(is_slot, own * num_slots + at, bound * num_slots)
    smaller = tl.zeros((BQ, BS), dtype=tl.int32)
    for first in tl.range(0, num_slots, BS, num_stages=4):
        slots = first + tl.arange(0, BS)
        keep = slots < num_slots
        key = _load_experts(expert_index, slots, keep, num_experts) * num_slots + slots
        key = tl.where(keep, key, _NEVER)
        smaller += _is_smaller(key[None, :], query[:, None])
    count = tl.sum(smaller, axis=1)
    _store_rows(order, token, expert, inverse, at, is_slot, count, own, top_k)
    tl.store(offsets + bound, count, mask=(bound >= 0) & (bound <= num_experts))


@triton.jit(do_not_specialize=["num_slots"])
def _count_kernel(expert_index, up_to, num_slots, num_experts, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """up_to[chunk, e]: slots of the chunk with an expert of at most e; up_to[chunk, E] are all."""
    chunk = tl.program_id(0).to(tl.int64)
    slots = chunk * CHUNK + tl.arange(0, CHUNK)
    own = _load_experts(expert_index, slots, slots < num_slots, num_experts)
    counts = tl.histogram(own, BINS, mask=(slots < num_slots) & (own < num_experts))
    bins = tl.arange(0, BINS)
    line = up_to + chunk * (num_experts + 1)
    tl.store(line + bins, tl.cumsum(counts, axis=0), mask=bins < num_experts)
    tl.store(line + num_experts, tl.minimum(num_slots - chunk * CHUNK, CHUNK).to(tl.int32))


@triton.jit(do_not_specialize=["num_chunks"])
def _base_kernel(up_to, base, offsets, num_chunks, num_experts, BC: tl.constexpr, BE: tl.constexpr):
    """base[chunk, e] + (a slot's place in its sorted chunk) = the slot's sorted row; and the offsets."""
    experts = tl.program_id(0) * BE + tl.arange(0, BE)
    keep_e = experts <= num_experts
    chunks = tl.arange(0, BC).to(tl.int64)
    below = tl.zeros((BE,), dtype=tl.int32)
    for first in range(0, num_chunks, BC):
        at = (first + chunks)[:, None] * (num_experts + 1) + experts[None, :]
        keep = (first + chunks < num_chunks)[:, None] & keep_e[None, :]
        below += tl.sum(tl.load(up_to + at - 1, mask=keep & (experts > 0)[None, :], other=0), axis=0)
    tl.store(offsets + experts, below, mask=keep_e)
    for first in range(0, num_chunks, BC):
        at = (first + chunks)[:, None] * (num_experts + 1) + experts[None, :]
        keep = (first + chunks < num_chunks)[:, None] & keep_e[None, :]
        lower = tl.load(up_to + at - 1, mask=keep & (experts > 0)[None, :], other=0)
        counts = tl.load(up_to + at, mask=keep, other=0) - lower
        tl.store(base + at, below[None, :] + tl.cumsum(counts, axis=0) - counts - lower, mask=keep)
        below += tl.sum(counts, axis=0)


@triton.jit(do_not_specialize=["num_slots", "top_k"])
def _place_kernel(
    expert_index, base, order, token, expert, inverse, num_slots, num_experts, top_k, CHUNK: tl.constexpr
):
    chunk = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CHUNK)
    slots = chunk * CHUNK + place
    keep = slots < num_slots
    own = _load_experts(expert_index, slots, keep, num_experts)
    key = tl.where(keep, own * CHUNK + place, _NEVER)
    row = tl.load(base + chunk * (num_experts + 1) + own, mask=keep, other=0)
    row += tl.sum(_is_smaller(key[:, None], key[None, :]), axis=0)
    _store_rows(order, token, expert, inverse, slots, keep, row, own, top_k)


def plan_triton(expert_index: Tensor, num_experts: int) -> Plan:
    """`plan` for a tensor on CUDA (or on a CPU under Triton's interpreter): the same bits, nothing read back.

    Args:
        expert_index: [T, K], an integer type. Whatever lies outside 0 to E - 1 counts as no expert.
    """
    num_tokens, top_k = expert_index.shape
    flat = expert_index.reshape(-1)
    num_slots = flat.numel()
    order, token, expert, inverse = (torch.empty_like(flat, dtype=torch.int64) for _ in range(4))
    result = Plan(
        order, token, expert, inverse.view(num_tokens, top_k), flat.new_empty(num_experts + 1, dtype=torch.int32)
    )
    if num_slots == 0:
        result.offsets.zero_()
        return result
    with torch.cuda.device_of(flat):
        if num_slots <= (32 if is_interpreted() else ONE_LAUNCH_SLOTS):
            _plan_at_once(flat, result, num_experts, top_k)
        else:
            _plan_in_chunks(flat, result, num_experts, top_k)
    return result


def _plan_at_once(flat: Tensor, result: Plan, num_experts: int, top_k: int) -> None:
    num_slots = flat.numel()
    block_queries, block_slots = (128, 16) if is_interpreted() else (16, 512)
    grid = (triton.cdiv(num_slots + num_experts + 1, block_queries),)
    _small_plan_kernel[grid](
        flat, *result, num_slots, num_experts, top_k, BQ=block_queries, BS=block_slots, num_warps=8
    )


def _plan_in_chunks(flat: Tensor, result: Plan, num_experts: int, top_k: int) -> None:
    num_slots = flat.numel()
    chunk, block_chunks, block_experts = (16, 4, 128) if is_interpreted() else (128, 512, 8)
    num_chunks = triton.cdiv(num_slots, chunk)
    up_to, base = (flat.new_empty(num_chunks, num_experts + 1, dtype=torch.int32) for _ in range(2))
    bins = max(triton.next_power_of_2(num_experts), 32)
    _count_kernel[(num_chunks,)](flat, up_to, num_slots, num_experts, BINS=bins, CHUNK=chunk)
    _base_kernel[(triton.cdiv(num_experts + 1, block_experts),)](
        up_to, base, result.offsets, num_chunks, num_experts, BC=block_chunks, BE=block_experts, num_warps=8
    )
    _place_kernel[(num_chunks,)](flat, base, *result[:4], num_slots, num_experts, top_k, CHUNK=chunk)
