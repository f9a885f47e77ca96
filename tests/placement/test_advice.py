"""Recommendations: each case that a person should be told about, from rows as `compare` makes them."""

import pytest

from raymoe.placement.advice import advise

DEVICE_BYTES = 80e9


def row(policy="ep", **changes):
    """A row whose step is the sum of its parts, as `compare` makes it; 100 ms unless told otherwise."""
    made = {
        "policy": policy,
        "is_bound": False,
        "rematerialises": policy.endswith("-rm"),
        "interval": None,
        "extra_slots": 8,
        "attention_ms": 20.0,
        "compute_ms": 50.0,
        "all_to_all_ms": 30.0,
        "exposed_ms": 0.0,
        "reshard_ms": 0.0,
        "moe_ms": 8.0,
        "cold_ms": 8.0,
        "ideal_share": 0.5,
        "imbalance": 2.0,
        "bytes": 10**9,
        "memory_bytes": 10**9,
        "copies": 0.0,
        "forecast_error": 0.02,
        "plan_ms": 0.01,
    } | changes
    made["step_ms"] = sum(made[f"{part}_ms"] for part in ("attention", "compute", "all_to_all", "exposed", "reshard"))
    made["memory_share"] = made["memory_bytes"] / DEVICE_BYTES
    return {"fits": made["memory_share"] <= 0.8} | made


BUSY = row(imbalance=5.8, compute_ms=150.0)
FAST = row("fssdp", imbalance=1.3, all_to_all_ms=20.0, memory_bytes=1.6e9)


def said(advice):
    return "\n".join(advice.reasons)


def test_a_clear_gain():
    advice = advise([BUSY, FAST], {})
    assert advice.policy == "fssdp"
    assert advice.headline == (
        "Use fssdp: steps 2.22x as fast as with expert parallelism, because the busiest device computes 5.8x the mean there and "
        "1.3x with it; costs 0.6 GB more a device."
    )
    assert "Its MoE layers reach 50 % of the ideal" in said(advice)


def test_a_gain_by_fewer_exchanges():
    advice = advise([row(all_to_all_ms=300.0), FAST], {})
    assert "because the all-to-all, 81 % of the step there, falls from 300 ms to 20 ms" in advice.headline


def test_nothing_to_gain():
    advice = advise([row(imbalance=1.05, all_to_all_ms=3.0), row("fssdp", imbalance=1.0, all_to_all_ms=2.0)], {})
    assert advice.policy == "ep"
    assert advice.headline.startswith(
        "Not worth it, stay with expert parallelism (ep): the all-to-all is 4 % of the step and the busiest device has 1.05x the"
    )
    assert "The best of the others, fssdp, would make the step 1.01x as fast." in advice.headline


def test_nothing_faster_at_all():
    advice = advise([row(), row("fssdp", exposed_ms=50.0)], {})
    assert advice.policy == "ep"
    assert advice.headline.endswith("no policy makes the step faster.")


@pytest.mark.parametrize(("compute_ms", "policy"), [(47.2, "ep"), (47.0, "fssdp")])
def test_less_than_three_percent_is_not_worth_it(compute_ms, policy):
    assert advise([row(), row("fssdp", compute_ms=compute_ms)], {}).policy == policy


def test_bounds_are_never_recommended():
    known = row("fssdp-known", is_bound=True, compute_ms=1.0)
    advice = advise([BUSY, FAST, known], {})
    assert advice.policy == "fssdp"
    assert "With the loads known beforehand (fssdp-known, a bound) steps would be 1.76x as fast." in said(advice)
    assert advise([row(), known], {}).policy == "ep"


def test_what_does_not_fit_is_not_recommended_but_named():
    large = row("fssdp", compute_ms=10.0, memory_bytes=90e9)
    small = row("smartmoe", compute_ms=60.0, imbalance=2.0)
    advice = advise([BUSY, large, small], {})
    assert advice.policy == "smartmoe"
    assert "fssdp would be 1.83x as fast as that, but its experts take 90 GB of a device's 80 GB." in said(advice)
    advice = advise([row(), large], {})
    assert advice.policy == "ep"
    assert "fssdp would be 1.67x as fast as that, but its experts take 90 GB" in said(advice)


def test_a_slower_one_that_does_not_fit_is_not_named():
    assert "fsdp" not in said(advise([BUSY, FAST, row("fsdp", compute_ms=500.0, memory_bytes=90e9)], {}))


def test_rematerialisation_when_copies_do_not_fit():
    keeping = row("fssdp", compute_ms=40.0, memory_bytes=90e9)
    freeing = row("fssdp-rm", compute_ms=45.0, memory_bytes=2e9)
    advice = advise([BUSY, keeping, freeing], {})
    assert advice.policy == "fssdp-rm"
    assert "(re-materialisation). Kept until backward, they would take 90 GB of a device's 80 GB." in said(advice)


def test_rematerialisation_when_few_copies_fit():
    advice = advise([BUSY, row("fssdp", extra_slots=1, compute_ms=90.0), row("fssdp-rm", extra_slots=8)], {})
    assert advice.policy == "fssdp-rm"
    assert "Kept until backward, there is memory for 1 of them a layer." in said(advice)


def test_of_equals_the_one_that_takes_least_memory():
    others = [row("fssdp", memory_bytes=3e9), row("fssdp-rm", compute_ms=50.5, memory_bytes=2e9)]
    advice = advise([BUSY, *others], {})
    assert advice.policy == "fssdp-rm"
    assert "Kept until backward, they would take 1 GB more a device." in said(advice)


def test_expert_parallelism_that_does_not_fit():
    advice = advise([row(memory_bytes=90e9), row("laer", compute_ms=55.0, memory_bytes=8e9)], {})
    assert advice.policy == "laer"
    assert "because with expert parallelism the experts do not fit (90 GB of a device's 80 GB)" in advice.headline
    assert "takes no more memory" in advice.headline


def test_nothing_fits():
    advice = advise([row(memory_bytes=90e9), row("fssdp", memory_bytes=99e9)], {})
    assert advice.policy == "ep"
    assert advice.headline == "Nothing fits: even with ep the experts take 90 GB of a device's 80 GB."


def test_unknown_memory_bounds_nothing():
    unknown = {"fits": None, "memory_share": None}
    assert advise([BUSY | unknown, FAST | unknown], {}).policy == "fssdp"


def test_a_poor_forecast():
    advice = advise([BUSY | {"forecast_error": 0.22}, FAST], {"drift": 0.31})
    assert "it puts 22 % of the load on the wrong experts (31 % of it moves from one step to the next)" in said(advice)
    assert "forecast" not in said(advise([BUSY, FAST], {"drift": 0.02}))


def test_exposed_transfers_and_moves():
    advice = advise([BUSY, row("fssdp", compute_ms=20.0, exposed_ms=20.0, reshard_ms=15.0, bytes=3 * 10**9)], {})
    assert "Transfers that nothing hides take 19 % of its step" in said(advice)
    assert "Moving experts to new homes takes 14 % of its step." in said(advice)
    assert "It moves 3 GB a step over all links, 3.0x what expert parallelism does." in said(advice)


def test_slow_planning():
    assert "Planning a layer took 2 ms here" in said(advise([BUSY, FAST | {"plan_ms": 2.0}], {}))


def test_copies_of_everything():
    sizes = {"num_experts": 8, "num_devices": 4}
    assert "plain data parallel" in said(advise([BUSY, FAST | {"copies": 24.0}], sizes))
    assert "plain data parallel" not in said(advise([BUSY, FAST | {"copies": 20.0}], sizes))


def test_a_short_trace():
    assert "Only 8 steps were counted" in said(advise([BUSY, FAST], {"num_steps": 8}))
    advice = advise([BUSY, FAST, row("smartmoe", interval=25)], {"num_steps": 8})
    assert "In the 8 steps that were counted there was no occasion to move experts for smartmoe (every 25)" in said(
        advice
    )
    assert "counted" not in said(advise([BUSY, FAST, row("smartmoe", interval=25)], {"num_steps": 200}))


def test_a_slow_start():
    assert "Its first steps, which are not counted, take 2.0x as long a layer." in said(
        advise([BUSY, FAST | {"cold_ms": 16.0}], {})
    )


def test_without_a_baseline():
    with pytest.raises(ValueError, match="the rows are of fssdp: without ep there is no comparison"):
        advise([FAST], {})
