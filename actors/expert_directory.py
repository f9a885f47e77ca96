"""The actor that owns a served model's expert hosts and the directory of who holds what."""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from raymoe import env
from raymoe.actors.host_directory import Directory
from raymoe.actors.host_fleet import HostFleet
from raymoe.actors.session import NAMESPACE
from raymoe.config import ExpertHostsConfig

_POLL_S = 0.05
_NAME_S = 30.0


@ray.remote(num_cpus=0, max_concurrency=8)  # pyright: ignore[reportCallIssue]  (Ray's overloads lack max_concurrency)
class ExpertDirectory:
    """Owns the hosts, so they end with it; it ends with whoever made it. Found by its name, see `start_directory`.

    Args:
        model: the checkpoint, where all nodes see it.
        dtype, precision: of the computation, a name of torch's, and of experts.
        variables: of the hosts' environment.
    """

    def __init__(self, model: Path, config: ExpertHostsConfig, dtype: str, precision: str, variables: dict[str, str]):
        logging.basicConfig(level=env.log_level())
        self._fleet = HostFleet(model, config, dtype, precision, variables)

    def __repr__(self) -> str:
        return "ExpertDirectory"

    def look(self, known_version: int, usage: np.ndarray | None) -> Directory | None:
        """The directory, or None if it is what the caller knows.

        Args:
            usage: int64 [L, E], how often the caller has asked hosts for each expert since it last looked.
        """
        if usage is not None:
            self._fleet.asked_for(usage)
        directory = self._fleet.directory
        return None if directory.version == known_version else directory

    def wait(self, timeout_s: float) -> str | None:
        """Returns when a host is there, and else why none is."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            if self._fleet.directory.hosts:
                return None
            if self._fleet.failure is not None:
                return self._fleet.failure
            time.sleep(_POLL_S)
        return f"none was placed within {timeout_s:g} s; the cluster may lack the CPUs or GPUs that each reserves"

    def ping(self) -> None:
        """Answers."""

    def scale(self, count: int) -> None:
        """Has so many hosts from now on. Raises: ValueError."""
        self._fleet.scale(count)

    def facts(self) -> dict[str, Any]:
        """Plain values: version, and what each host says of itself."""
        return self._fleet.facts()


def start_directory(
    name: str,
    model: Path,
    config: ExpertHostsConfig,
    dtype: str,
    variables: dict[str, str] | None = None,
    *,
    precision: str = "native",
) -> ActorHandle:
    """Starts the directory `name` and with it the hosts; all end with the calling process, or when the handle goes.

    Raises:
        ValueError: there is another one of that name, which does not end.
    """
    until_s = time.monotonic() + _NAME_S
    while True:
        try:
            return ExpertDirectory.options(name=name, namespace=NAMESPACE).remote(
                model, config, dtype, precision, variables or {}
            )
        except ValueError:
            # that of an owner who has just ended
            if time.monotonic() > until_s:
                raise
            time.sleep(_POLL_S)
