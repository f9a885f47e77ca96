"""Whether prediction pays: it is off until a comparison with demand-only caching shows a gain, and goes off by itself.

The comparison is with a ghost: an LRU of the same slots that fetches on demand only, kept on expert ids alone beside the live
cache, while prediction is on and while it is off. Prefetching pays for less stall with more bytes, so stall decides, and bytes
where stall is even.
"""

from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["better", "even", "worse"]
State = Literal["off", "probe", "on"]

_MAX_EXPONENT = 10
_PATIENCE = 2
_FIRST_REST = 4
_FAR = 5
"""Margins by which a single window is enough."""


@dataclass(frozen=True)
class WindowCost:
    """What a window of steps cost, live or ghost.

    Raises:
        ValueError: a cost that is negative or no number.
    """

    bytes_per_token: float
    """From slower tiers."""
    stall_s_per_token: float
    """Seconds that the computation waited for experts."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} = {value}: must be a number of at least 0")


class Judge:
    """Decides for one predictor, or for all together, whether it may act in the next window.

    off -> after its windows are over: probe. probe -> better: on; far worse, or twice not better: off. on -> twice in a row worse:
    off. Each time it goes off it stays so twice as long as the last time: 4 * 2^n windows, n up to 10; a gain in a probe halves
    that. A probe costs what it costs, so that it may be one window of five at the most.
    """

    def __init__(self, *, margin: float = 0.02):
        """`margin`: the relative difference that counts as one.

        Raises:
            ValueError: a margin outside [0, 1).
        """
        if not 0.0 <= margin < 1.0:
            raise ValueError(f"margin = {margin}: must be at least 0 and below 1")
        self._margin = margin
        self._state: State = "off"
        self._reason = "no comparison yet"
        self._exponent = 0
        self._windows_left = 1
        self._against = 0
        self._windows = 0
        self._live: WindowCost | None = None
        self._ghost: WindowCost | None = None

    @property
    def is_on(self) -> bool:
        """Whether predictions may move bytes in the window to come (in a probe they do)."""
        return self._state != "off"

    @property
    def is_resting(self) -> bool:
        """Off, and for longer than the window to come: nobody need know what demand only would cost."""
        return self._state == "off" and self._windows_left > 1

    def window(self, live: WindowCost, ghost: WindowCost) -> bool:
        """A window of W steps is over; both costs are of it. Returns `is_on` for the next one."""
        self._windows += 1
        self._live, self._ghost = live, ghost
        verdict, why = self._compare(live, ghost)
        match self._state:
            case "off":
                self._windows_left -= 1
                if self._windows_left <= 0:
                    self._enter("probe", f"probing after {self._windows} windows")
            case "probe" if verdict == "better":
                self._exponent = max(self._exponent - 1, 0)
                self._enter("on", why)
            case "probe" if verdict == "worse" and self._is_far_worse(live, ghost):
                self._end(why)
            case "probe" | "on":
                no_good = verdict == "worse" or (verdict == "even" and self._state == "probe")
                self._against = self._against + 1 if no_good else 0
                if self._against >= _PATIENCE:
                    self._end(why)
                elif self._state == "on":
                    self._reason = why
        return self.is_on

    def report(self) -> dict[str, Any]:
        """State, reason and both counters of the last window, as plain values."""
        return {
            "state": self._state,
            "is_on": self.is_on,
            "reason": self._reason,
            "windows": self._windows,
            "windows_until_probe": self._windows_left if self._state == "off" else 0,
            "windows_against": self._against,
            **{f"live_{name}": value for name, value in _plain(self._live).items()},
            **{f"ghost_{name}": value for name, value in _plain(self._ghost).items()},
        }

    def _enter(self, state: State, reason: str) -> None:
        self._state, self._reason, self._against = state, reason, 0

    def _end(self, reason: str) -> None:
        self._windows_left = _FIRST_REST * 2**self._exponent
        self._exponent = min(self._exponent + 1, _MAX_EXPONENT)
        self._enter("off", reason)

    def _is_far_worse(self, live: WindowCost, ghost: WindowCost) -> bool:
        return live.stall_s_per_token > (1.0 + _FAR * self._margin) * ghost.stall_s_per_token

    def _compare(self, live: WindowCost, ghost: WindowCost) -> tuple[Verdict, str]:
        stall, stall_text = self._differ("stall", live.stall_s_per_token, ghost.stall_s_per_token)
        bytes_, bytes_text = self._differ("bytes", live.bytes_per_token, ghost.bytes_per_token)
        verdict = stall if stall != "even" else bytes_
        return verdict, f"{stall_text}, {bytes_text} a token against demand only"

    def _differ(self, name: str, live: float, ghost: float) -> tuple[Verdict, str]:
        if ghost == 0.0:
            return ("even", f"{name} 0") if live == 0.0 else ("worse", f"{name} where it has none")
        change = live / ghost - 1.0
        text = f"{name} {change:+.1%}"
        if abs(change) <= self._margin:
            return "even", text
        return ("worse" if change > 0 else "better"), text


def _plain(cost: WindowCost | None) -> dict[str, float | None]:
    return vars(cost) if cost is not None else {"bytes_per_token": None, "stall_s_per_token": None}
