"""Attention over each request's own pages against a plain loop, and through the engine against transformers' own `generate`."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.inference import InferenceEngine, SamplingParams
from raymoe.inference.paged_attention import PAGED_ATTENTION, _group_sizes, step_layout
from tests.inference.conftest import generate_alone, random_prompts
from tests.tiny_models import tiny_model

HEADS, KEY_HEADS, SIZE, VALUE_SIZE = 6, 2, 8, 5
ROWS = 400
# float32 sums of at most a few hundred products, in another order
TOLERANCE = 2e-5
FULL: Any = SimpleNamespace(read_trash_index=0)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=())


def truth(query, key, value, *, scale, window=None, softcap=None, sinks=None):
    """One request: the last queries [T, H, D] over rows [K, G, D], position by position."""
    new, length = len(query), len(key)
    out = torch.zeros(new, HEADS, VALUE_SIZE, dtype=torch.float64)
    for t in range(new):
        last = length - new + t
        first = 0 if window is None else max(0, last - window + 1)
        for h in range(HEADS):
            g = h // (HEADS // KEY_HEADS)
            scores = key[first : last + 1, g].double() @ query[t, h].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum() + (sinks[h].double().exp() if sinks is not None else 0)
            out[t, h] = weights @ value[first : last + 1, g].double() / total
    return out


def step(requests, window=None, seed=0):
    """Requests (new, length) somewhere in a cache: (layout, query, the cache's keys and values, each one's rows of them)."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(ROWS, KEY_HEADS, SIZE, generator=generator)
    values = torch.randn(ROWS, KEY_HEADS, VALUE_SIZE, generator=generator)
    # row 0 is where padding reads
    pages = (torch.randperm(ROWS - 1, generator=generator) + 1).split([length for _, length in requests] + [
        ROWS - 1 - sum(length for _, length in requests)
    ])  # fmt: skip
    own = list(pages[: len(requests)])
    lengths_q, lengths_k = (np.array(column, dtype=np.int64) for column in zip(*requests, strict=True))
    written = torch.cat([rows[-new:] for rows, (new, _) in zip(own, requests, strict=True)])
    allocator: Any = FULL if window is None else SimpleNamespace(read_trash_index=0, sliding_window=window)
    layout = step_layout(allocator, lengths_q, lengths_k, torch.cat(own), written, torch.float32)
    query = torch.randn(int(lengths_q.sum()), HEADS, SIZE, generator=generator)
    return layout, query, keys, values, own


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.linspace(-1, 2, HEADS)},
}


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from([1, 1, 1, 2, 5, 9]), st.integers(0, 40)).map(lambda r: (r[0], r[0] + r[1])),
        min_size=1,
        max_size=8,
    ),
    window=st.sampled_from([None, 3, 7]),
)
def test_every_token_sees_its_own_request_up_to_itself(name, requests, window):
    if window is not None:
        # a window's cache gives no more than the window before the new tokens
        requests = [(new, min(length, new + window - 1)) for new, length in requests]
    layout, query, keys, values, own = step(requests, window)
    read = layout.read_index
    found = layout.attend(query, keys[read], values[read], scale=0.4, **OPTIONS[name])
    token = 0
    for (new, _), rows in zip(requests, own, strict=True):
        here = slice(token, token + new)
        want = truth(query[here], keys[rows], values[rows], scale=0.4, window=window, **OPTIONS[name])
        assert (found[here] - want).abs().max() <= TOLERANCE
        token += new


@given(requests=st.lists(st.tuples(st.just(1), st.integers(1, 40)), min_size=2, max_size=8))
@settings(max_examples=25, deadline=None)
def test_what_padding_reads_reaches_nobody(requests):
    layout, query, keys, values, _ = step(requests)
    read = layout.read_index
    clean = layout.attend(query, keys[read], values[read], scale=0.4)
    keys[0], values[0] = 1e4, -1e4
    assert torch.equal(layout.attend(query, keys[read], values[read], scale=0.4), clean)


def test_new_keys_are_written_where_they_belong():
    layout, *_, own = step([(1, 3), (4, 9), (1, 30)])
    tokens = torch.arange(6) if layout.order is None else layout.order
    written = torch.empty(6, dtype=torch.int64)
    written[tokens] = layout.write_index
    assert written.tolist() == [*own[0][-1:].tolist(), *own[1][-4:].tolist(), *own[2][-1:].tolist()]


def test_groups_are_padded_by_less_than_a_call_costs():
    assert _group_sizes([]) == []
    assert _group_sizes([50] * 9) == [9]
    assert _group_sizes([4000, 90, 80, 70]) == [1, 3]
    lengths = sorted(np.random.default_rng(0).integers(1, 2000, 64).tolist(), reverse=True)
    sizes = _group_sizes(lengths)
    assert sum(sizes) == 64
    first = np.cumsum([0, *sizes])
    assert all(sum(lengths[a] - n for n in lengths[a:b]) <= 64 for a, b in pairwise(first))


# layers that see everything beside layers that see a window smaller than a page, than a prompt and than the answers
WINDOWS = {
    "mixtral": {"sliding_window": 12},
    "gpt_oss": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {},
    "phimoe": {},
    "deepseek_v3": {},
}


@pytest.mark.parametrize("family", WINDOWS)
def test_families_get_the_tokens_of_generate(family, tmp_path):
    model = tiny_model(family, **WINDOWS[family])
    model.save_pretrained(tmp_path)
    prompts = random_prompts([3, 50, 7, 90, 1, 33])
    with InferenceEngine(tmp_path, max_batch_tokens=32, kv_tokens=1024) as engine:
        assert engine._batcher._manager.model.config.get_text_config()._attn_implementation.startswith("raymoe_")
        assert engine.generate(prompts, greedy(16)) == [generate_alone(model, prompt, 16) for prompt in prompts]


def test_no_masks_are_made(make_engine):
    engine = make_engine("olmoe")
    assert engine._batcher._manager.model.config._attn_implementation == PAGED_ATTENTION
    assert engine._batcher._manager.batch_processor.inputs_and_outputs.attention_mask is None
