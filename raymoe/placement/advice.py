"""Which policy to run, in plain words and with its reasons, from the rows of ``raymoe.placement.compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymoe.placement.compare import MEMORY_SHARE_PERCENT

LEAST_GAIN = 1.03
"""A policy must make the step this many times faster than expert parallelism: less is within what the model leaves out."""

SAME_WITHIN = 1.01
"""Of policies whose steps are this close, the one that takes least memory."""

POOR_FORECAST = 0.1
"""Share of the load that a forecast puts on the wrong experts, above which it is called poor. Measured traces have 0.02 to
0.03 once training has settled (SmartMoE's, window of 5)."""

_NOTABLE = 0.1
_FEW_STEPS = 20

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Advice:
    """A recommendation. Everything it says is simulated."""

    policy: str
    """The one to run."""

    headline: str
    """One sentence: what to do and why."""

    reasons: list[str] = field(default_factory=list)
    """What else speaks for it or against it, a sentence each."""


def advise(rows: Sequence[Row], trace_facts: Mapping[str, Any]) -> Advice:
    """The fastest policy that one can run and that fits in memory, or expert parallelism if that gains too little.

    Args:
        rows: of ``compare``, expert parallelism among them. Those with ``is_bound`` are never recommended.
        trace_facts: ``num_steps`` (that were counted), ``num_experts``, ``num_devices`` and ``drift``, as far as known.

    Raises:
        ValueError: no row of expert parallelism to compare with.
    """
    baseline = next((row for row in rows if row["policy"] == "ep"), None)
    if baseline is None:
        raise ValueError(
            f"the rows are of {', '.join(row['policy'] for row in rows)}: without ep there is no comparison"
        )
    real = [row for row in rows if not row["is_bound"]]
    fitting = [row for row in real if row["fits"] is not False]
    if not fitting:
        return _nothing_fits(real)
    best = _best(fitting)
    gain = baseline["step_ms"] / best["step_ms"] if best["step_ms"] else 1.0
    if baseline["fits"] is not False and gain < LEAST_GAIN:
        reasons = [*_too_large(real, fitting, baseline), *_about_trace(baseline, rows, trace_facts)]
        return Advice("ep", _not_worth_it(baseline, best, gain), reasons)
    reasons = [
        *_against(best, baseline),
        *_too_large(real, fitting, best),
        *_rematerialisation(best, rows),
        *_left(best, rows),
        *_everywhere(best, trace_facts),
        *_about_trace(best, rows, trace_facts),
    ]
    return Advice(best["policy"], _use(best, baseline, gain), reasons)


def _best(rows: Sequence[Row]) -> Row:
    fastest = min(row["step_ms"] for row in rows)
    return min((row for row in rows if row["step_ms"] <= fastest * SAME_WITHIN), key=lambda row: row["memory_bytes"])


def _not_worth_it(baseline: Row, best: Row, gain: float) -> str:
    state = (
        f"the all-to-all is {_percent(_share(baseline, 'all_to_all_ms'))} of the step and the busiest device has "
        f"{baseline['imbalance']:.2f}x the mean"
    )
    if best is baseline:
        return f"Not worth it, stay with expert parallelism (ep): {state}, and no policy makes the step faster."
    return (
        f"Not worth it, stay with expert parallelism (ep): {state}. "
        f"The best of the others, {best['policy']}, would make the step {gain:.2f}x as fast."
    )


def _use(best: Row, baseline: Row, gain: float) -> str:
    saved = {part: baseline[part] - best[part] for part in ("compute_ms", "all_to_all_ms")}
    if baseline["fits"] is False and gain < LEAST_GAIN:
        cause = f"with expert parallelism the experts do not fit ({_takes(baseline)})"
    elif saved["compute_ms"] >= saved["all_to_all_ms"]:
        busiest = f"{baseline['imbalance']:.1f}x the mean there and {best['imbalance']:.1f}x with it"
        cause = f"the busiest device computes {busiest}"
    else:
        falls = f"falls from {_ms(baseline['all_to_all_ms'])} to {_ms(best['all_to_all_ms'])}"
        cause = f"the all-to-all, {_percent(_share(baseline, 'all_to_all_ms'))} of the step there, {falls}"
    more = best["memory_bytes"] - baseline["memory_bytes"]
    cost = f"costs {_size(more)} more a device" if more > 0 else "takes no more memory"
    return f"Use {best['policy']}: steps {gain:.2f}x as fast as with expert parallelism, because {cause}; {cost}."


def _nothing_fits(rows: Sequence[Row]) -> Advice:
    least = min(rows, key=lambda row: row["memory_bytes"])
    return Advice(
        least["policy"],
        f"Nothing fits: even with {least['policy']} the experts take {_takes(least)}.",
        [
            f"Up to {MEMORY_SHARE_PERCENT} % are for experts; the rest is for dense parameters, activations and buffers.",
            "Take more devices or larger ones, or keep the optimizer state elsewhere.",
        ],
    )


def _against(best: Row, baseline: Row) -> list[str]:
    said = [
        f"Its MoE layers reach {_percent(best['ideal_share'])} of the ideal: perfectly even experts and no transfers."
    ]
    if best["bytes"] > baseline["bytes"]:
        said.append(
            f"It moves {_size(best['bytes'])} a step over all links, {best['bytes'] / max(baseline['bytes'], 1):.1f}x what "
            "expert parallelism does."
        )
    for part, words in (
        ("exposed_ms", "Transfers that nothing hides take {} of its step: faster links would shorten it."),
        ("reshard_ms", "Moving experts to new homes takes {} of its step."),
    ):
        if _share(best, part) > _NOTABLE:
            said.append(words.format(_percent(_share(best, part))))
    if best["plan_ms"] > _NOTABLE * best["moe_ms"]:
        said.append(
            f"Planning a layer took {best['plan_ms']:.2g} ms here, not counted in the step: it has to hide behind the step "
            "before."
        )
    return said


def _too_large(real: Sequence[Row], fitting: Sequence[Row], best: Row) -> list[str]:
    """The fastest that memory rules out, if it is faster than the one that is recommended."""
    names = {row["policy"] for row in fitting}
    faster = [row for row in real if row["policy"] not in names and row["step_ms"] < best["step_ms"]]
    if not faster:
        return []
    row = min(faster, key=lambda row: row["step_ms"])
    faster_by = f"{best['step_ms'] / row['step_ms']:.2f}x"
    return [f"{row['policy']} would be {faster_by} as fast as that, but its experts take {_takes(row)}."]


def _rematerialisation(best: Row, rows: Sequence[Row]) -> list[str]:
    if not best["rematerialises"]:
        return []
    keeping = next((row for row in rows if f"{row['policy']}-rm" == best["policy"]), None)
    if keeping is None:
        why = ""
    elif keeping["fits"] is False:
        why = f" Kept until backward, they would take {_takes(keeping)}."
    elif keeping["extra_slots"] < best["extra_slots"]:
        why = f" Kept until backward, there is memory for {keeping['extra_slots']} of them a layer."
    else:
        why = f" Kept until backward, they would take {_size(keeping['memory_bytes'] - best['memory_bytes'])} more a device."
    return [f"It frees copies after forward and gathers them again in backward (re-materialisation).{why}"]


def _left(best: Row, rows: Sequence[Row]) -> list[str]:
    """What knowing the loads beforehand would still bring."""
    known = [row for row in rows if row["is_bound"] and 0 < row["step_ms"] * LEAST_GAIN < best["step_ms"]]
    if not known:
        return []
    row = min(known, key=lambda row: row["step_ms"])
    faster_by = f"{best['step_ms'] / row['step_ms']:.2f}x"
    return [f"With the loads known beforehand ({row['policy']}, a bound) steps would be {faster_by} as fast."]


def _everywhere(best: Row, facts: Mapping[str, Any]) -> list[str]:
    most = facts.get("num_experts", 0) * (facts.get("num_devices", 0) - 1)
    if not most or best["copies"] < 0.95 * most:
        return []
    return [
        "Nearly every expert is on every device in every step: experts this small may as well be plain data parallel."
    ]


def _about_trace(best: Row, rows: Sequence[Row], facts: Mapping[str, Any]) -> list[str]:
    said = []
    error = max(row["forecast_error"] for row in rows)
    if error > POOR_FORECAST:
        drift = facts.get("drift")
        moves = f" ({_percent(drift)} of it moves from one step to the next)" if drift is not None else ""
        said.append(
            f"The forecast is poor: it puts {_percent(error)} of the load on the wrong experts{moves}. "
            "Policies that see the gate's counts before they copy lose least by it."
        )
    if best["cold_ms"] is not None and best["moe_ms"] and best["cold_ms"] > 1.25 * best["moe_ms"]:
        said.append(
            f"Its first steps, which are not counted, take {best['cold_ms'] / best['moe_ms']:.1f}x as long a layer."
        )
    num_steps = facts.get("num_steps")
    if num_steps is not None:
        idle = [
            f"{row['policy']} (every {row['interval']})"
            for row in rows
            if row["interval"] and row["interval"] > num_steps
        ]
        if idle:
            said.append(
                f"In the {num_steps} steps that were counted there was no occasion to move experts for {', '.join(idle)}: a longer "
                "trace would show what that brings."
            )
        elif num_steps < _FEW_STEPS:
            said.append(f"Only {num_steps} steps were counted: a longer trace would make this surer.")
    return said


def _share(row: Row, part: str) -> float:
    return row[part] / row["step_ms"] if row["step_ms"] else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _takes(row: Row) -> str:
    device = f" of a device's {_size(row['memory_bytes'] / row['memory_share'])}" if row["memory_share"] else ""
    return f"{_size(row['memory_bytes'])}{device}"


def _size(num_bytes: float) -> str:
    for unit, size, least in (("TB", 1e12, 1e12), ("GB", 1e9, 1e8), ("MB", 1e6, 1e5)):
        if num_bytes >= least:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
