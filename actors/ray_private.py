"""Every private or alpha call of Ray that raymoe makes, each with what it stands in for."""

import re

from ray._private import state
from ray._private.ray_logging import stdout_deduplicator


def hide_driver_lines(pattern: str) -> None:
    """Keeps lines of other processes that match off the driver's stdout.

    `RAY_DEDUP_LOGS_SKIP_REGEX` does the same, but is read once, when Ray is imported.
    """
    stdout_deduplicator.skip_re = re.compile(pattern)


def draining_nodes() -> set[str]:
    """Ids, in hex, of nodes that are about to be taken away: preempted, or given up by the autoscaler."""
    return set(state.state.get_draining_nodes())
