"""The training rivals' workload, and one rival for real: two processes, a tiny model."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.benchmarks.train_rivals import RIVALS, Rival, RivalError, rival, row_of
from raymoe.benchmarks.train_workload import LOADS, WORKLOAD, TrainWorkload

TINY = TrainWorkload(
    hidden_size=32,
    expert_width=24,
    layers=2,
    experts=7,
    choices=3,
    vocabulary=48,
    sequence_length=9,
    sequences=8,
    learning_rate=1e-2,
)


@given(st.sampled_from(LOADS), st.integers(0, 70), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=30, deadline=None)
def test_tokens_choose_what_the_counts_say(load, step, workers):
    counts = TINY.counts(load, step, workers)
    assert counts.shape == (workers, TINY.layers, TINY.experts)
    for rank in range(workers):
        chosen = TINY.choices_of(load, step, rank, workers)
        assert chosen.shape == (TINY.layers, TINY.tokens // workers, TINY.choices)
        for layer, choices in enumerate(chosen.tolist()):
            assert all(len(set(token)) == TINY.choices for token in choices)
            found = [sum(token.count(expert) for token in choices) for expert in range(TINY.experts)]
            assert found == counts[rank, layer].tolist()


def test_loads_are_what_their_names_say():
    balanced, hot = WORKLOAD.counts("balanced", 0, 2), WORKLOAD.counts("hot", 0, 2)
    assert np.ptp(balanced) == 0
    assert hot[..., WORKLOAD.experts // 2 :].sum() == 0
    assert np.ptp(hot[..., : WORKLOAD.experts // 2]) == 0
    skewed = WORKLOAD.counts("smartmoe", 3, 2)
    assert skewed.sum() == balanced.sum() == hot.sum()
    assert skewed.sum(0).max(1).min() > 1.5 * skewed.sum(0).mean()
    # the same routing, seen from another number of workers
    assert (skewed.sum(0) == WORKLOAD.counts("smartmoe", 3, 4).sum(0)).all()
    with pytest.raises(ValueError, match="no load 'cold'; there are: balanced, hot, smartmoe"):
        WORKLOAD.counts("cold", 0, 2)
    with pytest.raises(ValueError, match="sequences = 24 do not split evenly over 5 workers"):
        WORKLOAD.counts("hot", 0, 5)


def test_batches_differ_by_step_and_by_nothing_else():
    assert torch.equal(TINY.batch(5), TINY.batch(5))
    assert not torch.equal(TINY.batch(5), TINY.batch(6))
    batch = WORKLOAD.batch(0)
    assert batch.shape == (WORKLOAD.sequences, WORKLOAD.sequence_length + 1)
    counts = torch.bincount(batch.flatten(), minlength=WORKLOAD.vocabulary)
    assert counts[0] > 1.5 * counts[1] > 2 * counts[7] > 0


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="layers = 0: must be at least 1"):
        TrainWorkload(layers=0)
    with pytest.raises(ValueError, match="half of the 6 experts cannot take that many"):
        TrainWorkload(experts=6, choices=4)
    with pytest.raises(ValueError, match="no rival 'nobody'; there are: transformers, fsdp2"):
        rival("nobody", 2)


def test_fsdp2_learns_what_one_process_learns():
    """Both start from the same weights; the first steps differ by bf16's rounding alone."""
    with rival("transformers", 2, workload=TINY) as alone, rival("fsdp2", 2, workload=TINY) as group:
        assert (alone.workers, group.workers) == (1, 2)
        for load, steps in (("balanced", 3), ("hot", 5)):
            alone.steps(load, steps)
            seconds = group.steps(load, steps)
        assert group.losses[0] == pytest.approx(alone.losses[0], abs=5e-3)
        assert group.losses[2] == pytest.approx(alone.losses[2], abs=5e-2)
        assert group.losses[-1] < group.losses[0] - 0.1
        row = row_of(group, "hot", seconds)
    assert row["tokens_per_s"] == pytest.approx(TINY.tokens / (row["step_ms"] / 1e3))
    assert row["spread"][0] <= row["step_ms"] <= row["spread"][1]
    assert set(row["versions"]) == set(RIVALS["fsdp2"].packages)
    assert (row["system"], row["load"], row["workers"]) == ("fsdp2", "hot", 2)


def test_a_rival_that_breaks_says_why(monkeypatch):
    monkeypatch.setitem(RIVALS, "broken", Rival("plain", "an option that it does not have", options={"speed": "high"}))
    with pytest.raises(RivalError, match=r"(?s)broken: rank 0:.*unexpected keyword argument 'speed'"):
        rival("broken", 1, workload=TINY)
