"""All placement policies by name."""

from __future__ import annotations

from raymoe.placement.fssdp import Fssdp, FssdpKnown, FssdpPaper, FssdpPaperRemat, FssdpRemat
from raymoe.placement.policy import ExpertParallel, Policy
from raymoe.placement.rivals import RIVALS

_OURS: tuple[Policy, ...] = (ExpertParallel(), FssdpPaper(), FssdpPaperRemat(), Fssdp(), FssdpRemat(), FssdpKnown())
_POLICIES: dict[str, Policy] = {each.name: each for each in (*_OURS, *RIVALS)}


def policy_names() -> tuple[str, ...]:
    """The names that ``policy`` knows."""
    return tuple(_POLICIES)


def policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: no such policy; the message lists those there are.
    """
    if name not in _POLICIES:
        raise ValueError(f"no placement policy {name!r}; there are: {', '.join(policy_names())}")
    return _POLICIES[name]
