"""Eviction policies by name, for `ServeConfig.eviction`."""

from collections.abc import Callable

from raymoe.inference.eviction import EvictionPolicy, GlobalLru, LeastRecentlyUsed
from raymoe.inference.eviction_expected import ExpectedUse
from raymoe.inference.eviction_frequency import LeastFrequentlyUsed, Plec

PolicyFactory = Callable[[int, int], EvictionPolicy]
"""Makes a policy from (layers, slots)."""

POLICIES: dict[str, PolicyFactory] = {
    policy.name: policy for policy in (ExpectedUse, LeastRecentlyUsed, GlobalLru, LeastFrequentlyUsed, Plec)
}
DEFAULT_POLICY = ExpectedUse.name


def policy_by_name(name: str) -> PolicyFactory:
    """The factory of an eviction policy.

    Raises:
        ValueError: there is none of that name; lists those that there are.
    """
    if name not in POLICIES:
        raise ValueError(f"eviction: there is no policy '{name}'; there are {', '.join(POLICIES)}")
    return POLICIES[name]
