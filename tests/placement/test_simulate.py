from dataclasses import replace

import numpy as np
import pytest

from raymoe.placement import ClusterSpec, LoadTrace, Workload, expert_memory, layer_cost, policy, policy_names, simulate
from raymoe.placement.plan import Base, LayerPlan, Plan, owned
from raymoe.placement.policy import PolicyDefaults
from raymoe.placement.sharding import even_owners

CLUSTER = ClusterSpec.even(2, 2, intra_bytes_s=10**10, inter_bytes_s=10**9, latency_ns=1000, flops_s=10**12)
LAYER = Workload(
    expert_bytes=10**5, row_bytes=200, row_flops=10**5, attention_ns=10**5, choices=2, state_bytes=6 * 10**5
)


def small_trace(steps: int = 12, seed: int = 0) -> LoadTrace:
    shares = 1 / np.arange(1, 9) ** 1.5
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(600, shares / shares.sum(), size=(steps, 4, 2))
    return LoadTrace(rows, "small", choices=2)


def run(name: str, trace: LoadTrace | None = None, **of):
    return simulate(trace or small_trace(), policy(name), CLUSTER, LAYER, extra_slots=of.pop("extra_slots", 8), **of)


def test_expert_parallelism_is_the_cost_model_step_by_step():
    trace, owners = small_trace(), even_owners(2, 8, 4)
    result = run("ep")
    for step in range(trace.num_steps):
        for layer in range(2):
            plan = LayerPlan(owners[layer], owned(owners[layer], 4))
            expected = layer_cost(plan, trace.rows[step, :, layer], LAYER, CLUSTER).moe_ns
            assert result.of("moe_ns")[step, layer] == expected


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_runs_from_a_cold_start(name):
    result = run(name)
    assert np.isfinite(result.of("moe_ns")).all()
    assert (result.of("ideal_ns") <= result.of("moe_ns")).all()
    assert result.memory_bytes > 0


def test_the_first_step_knows_nothing():
    assert run("fssdp-paper").num_copies[0].sum() == 0
    assert run("fssdp-paper").num_copies[1].sum() > 0


def test_a_bound_knows_the_loads_before_the_step():
    assert run("fssdp-known").num_copies[0].sum() > 0
    assert run("fssdp-known").forecast_error.max() == 0


def test_forecast_error_is_reported():
    errors = run("ep").forecast_error
    assert (errors[0] == 1 / 2).all()  # nothing was forecast
    assert 0 < errors[1:].max() < 0.2


def test_forecasts_differ_and_the_last_value_follows_a_shift_at_once():
    trace = small_trace(12)
    shifted = replace(trace, rows=np.concatenate([trace.rows[:6], trace.rows[6:, :, :, ::-1]]))
    errors = {
        name: run("fssdp", shifted, forecast=name).forecast_error[7].mean() for name in ("mean", "last", "exponential")
    }
    assert errors["last"] < errors["exponential"] < errors["mean"]


class _Mover(PolicyDefaults):
    """Moves every expert to the next rank each third step."""

    name = "mover"
    source = "test"
    interval = 3

    def prepare(self, history, state):
        return Plan.of(state.base, owned(state.base.owners, 4), state.workload)

    def reshard(self, history, state):
        assert len(history) == state.steps_since_reshard
        return Base.of_owners((state.base.owners + 1) % 4, 4)


def test_moving_homes_is_charged_when_it_happens():
    result = simulate(small_trace(), _Mover(), CLUSTER, LAYER, extra_slots=0)
    assert np.flatnonzero(result.reshard_ns).tolist() == [3, 6, 9]
    # 4 experts of 7e5 bytes leave each rank; ranks 1 and 3 send to the other node
    assert result.reshard_ns[3] == 1000 + 4 * 7 * 10**5


def test_memory_by_hand():
    # 4 experts a rank: parameters, gradients and state; rank 1 takes one copy in one layer
    copies = owned(even_owners(2, 8, 4), 4)
    copies[0, 0, 1] = 1
    plan = Plan.of(Base.of_owners(even_owners(2, 8, 4), 4), copies, LAYER)
    home = 4 * 8 * 10**5
    assert expert_memory(plan, LAYER).tolist() == [home, home + 10**5 + 2 * 10**5, home, home]
    freed = replace(LAYER, rematerialise=True)
    assert expert_memory(plan, freed).tolist() == [home, home + 2 * 2 * 10**5, home, home]


def test_a_trace_is_split_over_more_ranks_and_put_together_for_fewer():
    trace = small_trace()
    more, fewer = trace.for_ranks(8), trace.for_ranks(2)
    assert (more.rows.sum(axis=1) == trace.rows.sum(axis=1)).all()
    assert (fewer.rows.sum(axis=1) == trace.rows.sum(axis=1)).all()
    halves = more.rows[:, 0::2], more.rows[:, 1::2]
    assert (halves[0] + halves[1] == trace.rows).all()
    assert np.abs(halves[0] - halves[1]).max() <= 1
    assert abs(more.rows.sum(axis=3) - 300).max() <= 4


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="has 4 ranks, which cannot be split over 6"):
        small_trace().for_ranks(6)


def test_columns_may_come_in_any_order():
    trace = small_trace(3)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in trace.rows.shape[:3]], indexing="ij")).reshape(3, -1)
    order = np.random.default_rng(1).permutation(index.shape[1])
    columns = {name: index[i][order] * 10 for i, name in enumerate(("step", "rank", "layer"))}
    columns["counts"] = trace.rows.reshape(-1, 8)[order]
    assert (LoadTrace.of_columns(columns).rows == trace.rows).all()
    columns = {name: values[:-1] for name, values in columns.items()}
    with pytest.raises(ValueError, match=r"step \d+, layer \d+, rank \d+ comes 0 times"):
        LoadTrace.of_columns(columns)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.zeros((1, 1, 1)), "got float64"),
        (np.zeros((1, 1, 0, 2), int), "integers"),
        (np.full((1, 1, 1, 1), -1), r"rows\[0, 0, 0, 0\] = -1"),
    ],
)
def test_a_trace_is_counts(rows, said):
    with pytest.raises(ValueError, match=said):
        LoadTrace(rows)
