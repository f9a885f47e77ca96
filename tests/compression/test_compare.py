"""What is reported of a compression."""

import pytest
import torch

from raymoe import compression
from raymoe.compression.compare import gap_closed
from tests.compression.test_compress import TOKENS
from tests.tiny_models import tiny_model


def test_share_of_a_known_gap_and_its_interval():
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = 2 + 0.5 * noise
    dropped = full + 0.4 + 0.01 * noise.roll(1)
    compressed = dropped - 0.24 + 0.02 * noise.roll(2)
    share, low, high = gap_closed(full, dropped, compressed)
    assert share == pytest.approx(0.6, abs=0.02)
    assert low < share < high
    assert high - low < 0.05
    assert gap_closed(full, full + 0.01 * noise, full) == (None, None, None)
    assert gap_closed(full, dropped, dropped)[0] == 0
    assert gap_closed(full, dropped, full)[0] == pytest.approx(1)


def test_compare_reports_each_apart():
    model = compression.compress(tiny_model("olmoe", num_experts_per_tok=4), keep=0.5)
    found = compression.compare(model, TOKENS, batches=(1, 3), rounds=2)
    assert found.loss == found.dropped_loss
    assert found.gap == pytest.approx(found.dropped_loss - found.full_loss)
    assert found.gap_closed in (None, 0)
    expert = 3 * 32 * 16
    assert found.full_counts.active_moe_parameters == 2 * 4 * expert
    assert found.counts.active_moe_parameters == 2 * 2 * expert
    assert found.counts.vector_parameters == sum(p.numel() for p in compression.theta_parameters(model).values())
    assert found.counts.total_bytes > found.full_counts.total_bytes
    assert set(found.latency_ms) == {1, 3}
    assert all(ms > 0 for times in found.latency_ms.values() for ms in times)
    with pytest.raises(ValueError, match="at least two sequences"):
        compression.compare(model, TOKENS[:1])
