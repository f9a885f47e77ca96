import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.kernels import gather_rows_triton as module
from raymoe.kernels import plan
from raymoe.kernels.gather_rows_triton import gather_rows_triton, spread_rows_triton

NUM_EXPERTS = 4


def gather(source, routing, out=None):
    return gather_rows_triton(source, routing.token, routing.offsets[-1:], out)


def spread(source, routing, out=None):
    return spread_rows_triton(source, routing.inverse, routing.offsets[-1:], out)


def check(copy, num_tokens, top_k, num_cols, dtype=torch.float32):
    index = torch.randint(0, NUM_EXPERTS + 1, (num_tokens, top_k))
    routing = plan(index, NUM_EXPERTS)
    source = torch.randn(num_tokens, num_cols).to(dtype)
    # NaN as its bits, since the interpreter computes with no bfloat16
    out = torch.full((index.numel(), num_cols), 7.0, dtype=dtype)
    got = copy(source, routing, out)
    assert got is out
    runs = [t for e in range(NUM_EXPERTS) for t, row in enumerate(index.tolist()) for choice in row if choice == e]
    want = [source[t].tolist() for t in runs] + [[7.0] * num_cols] * (index.numel() - len(runs))
    assert out.tolist() == want


@pytest.mark.parametrize("copy", [gather, spread])
def test_matches_oracle(copy):
    @settings(max_examples=15, deadline=None)
    @given(
        num_tokens=st.integers(0, 20),
        top_k=st.integers(1, 12),
        num_cols=st.integers(1, 140),
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    )
    def run(num_tokens, top_k, num_cols, dtype):
        check(copy, num_tokens, top_k, num_cols, dtype)

    run()


@pytest.mark.parametrize("copy", [gather, spread])
def test_block_sizes_of_a_device(monkeypatch, copy):
    monkeypatch.setattr(module, "is_interpreted", lambda: False)
    check(copy, 9, 3, 300)


@pytest.mark.parametrize("copy", [gather, spread])
def test_without_experts_nothing_is_written(copy):
    routing = plan(torch.full((5, 2), NUM_EXPERTS), NUM_EXPERTS)
    assert copy(torch.zeros(5, 3), routing).isnan().all()


@pytest.mark.parametrize("copy", [gather, spread])
def test_addresses_past_32_bits(copy):
    # 4 GB of address space, of which one page is touched
    last = 2**25 + 1
    torch.utils.deterministic.fill_uninitialized_memory = False
    large = torch.empty(last + 1, 64, dtype=torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = True
    small = torch.full((1, 64), 3.0, dtype=torch.float16)
    if copy is gather:
        large[last] = 3.0
        out = gather_rows_triton(large, torch.tensor([last]), torch.tensor([1], dtype=torch.int32))
        assert torch.equal(out, small)
    else:
        spread_rows_triton(small, torch.tensor([[last]]), torch.tensor([last + 1], dtype=torch.int32), large)
        assert torch.equal(large[last:], small)
