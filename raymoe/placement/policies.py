"""All placement policies by name."""

from __future__ import annotations

from raymoe.placement.fssdp import Fssdp, FssdpKnown, FssdpPaper, FssdpPaperRemat, FssdpRemat
from raymoe.placement.policy import ExpertParallel, Policy
from raymoe.placement.rivals import RIVALS

_OURS: tuple[Policy, ...] = (
    ExpertParallel(),
    FssdpPaper(),
    FssdpPaperRemat(),
    Fssdp(),
    FssdpRemat(),
    FssdpKnown(),
)
_POLICIES: dict[str, Policy] = {each.name: each for each in (*_OURS, *RIVALS)}


def policy_names() -> tuple[str, ...]:
    """The names that ``policy`` knows."""
    return tuple(_POLICIES)


def trainable_names() -> tuple[str, ...]:
    """Those that a training run can follow: they keep experts whole, and plan from the past alone."""
    return tuple(name for name, each in _POLICIES.items() if each.keeps_whole and not each.knows_loads)


def policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: no such policy; the message lists those there are.
    """
    if name not in _POLICIES:
        raise ValueError(f"no placement policy {name!r}; there are: {', '.join(policy_names())}")
    return _POLICIES[name]
