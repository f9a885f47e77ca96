"""The GEMM kernels one by one, against a loop over rows; outputs start as NaN."""

import pytest
import torch

from raymoe.kernels import plan
from raymoe.kernels.gmm import gmm
from raymoe.kernels.gmm_k import gmm_k
from raymoe.kernels.group_sum import group_sum
from raymoe.kernels.tiles import gmm_config, gmm_k_config, tile_table

TOKENS, TOP_K, EXPERTS, IN, OUT = 29, 2, 5, 75, 100


@pytest.fixture
def routing():
    index = torch.randint(0, EXPERTS + 1, (TOKENS, TOP_K))
    index[index == 3] = 0
    return plan(index, EXPERTS)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_gathered", [False, True])
def test_gmm(routing, is_gathered, has_bias, is_transposed):
    x = torch.randn(TOKENS if is_gathered else TOKENS * TOP_K, IN)
    weight = torch.randn(EXPERTS, IN, OUT).mT if is_transposed else torch.randn(EXPERTS, OUT, IN)
    bias = torch.randn(EXPERTS, OUT) if has_bias else None
    out = torch.empty(TOKENS * TOP_K, OUT)
    config = gmm_config(routing, x.dtype)
    token = routing.token if is_gathered else None
    gmm(x, weight, tile_table(routing, config.rows), config, out, token=token, bias=bias)
    for row, e in enumerate(routing.expert.tolist()):
        if e == EXPERTS:
            assert out[row].isnan().all()
            continue
        want = weight[e] @ x[routing.token[row] if is_gathered else row]
        want = want + bias[e] if has_bias else want
        # float32 sums of 75 products of size 1
        torch.testing.assert_close(out[row], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gathered", ["a", "b"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_gmm_k(routing, gathered, is_transposed):
    a = torch.randn(TOKENS if gathered == "a" else TOKENS * TOP_K, OUT)
    b = torch.randn(TOKENS if gathered == "b" else TOKENS * TOP_K, IN)
    out = torch.empty(EXPERTS, IN, OUT).mT if is_transposed else torch.empty(EXPERTS, OUT, IN)
    gmm_k(a, b, routing.offsets, gmm_k_config(a.dtype), out, **{f"token_{gathered}": routing.token})
    for e in range(EXPERTS):
        rows = (routing.expert == e).nonzero().flatten()
        token = routing.token[rows]
        want = a[token if gathered == "a" else rows].T @ b[token if gathered == "b" else rows]
        torch.testing.assert_close(out[e], want, rtol=1e-5, atol=1e-5)
    # expert 3 has no rows: the kernel writes its zeros
    assert not out[3].any()


@pytest.mark.parametrize("is_gathered", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_group_sum(routing, is_gathered, is_weighted):
    x = torch.randn(TOKENS if is_gathered else TOKENS * TOP_K, 70)
    weight = torch.rand(TOKENS * TOP_K) if is_weighted else None
    got = group_sum(x, routing.offsets, row_weight=weight, token=routing.token if is_gathered else None)
    for e in range(EXPERTS):
        rows = (routing.expert == e).nonzero().flatten()
        picked = x[routing.token[rows] if is_gathered else rows]
        want = (picked * weight[rows, None] if is_weighted else picked).sum(0)
        torch.testing.assert_close(got[e], want, rtol=1e-5, atol=1e-5)
