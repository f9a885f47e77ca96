"""The `ExpertHosts` deployment: it owns a served model's expert hosts, so that they come and go with the application."""

from typing import Any

import ray
from ray import serve

from raymoe.config import ServeConfig

_PLACED_S = 60.0


@serve.deployment(name="ExpertHosts")
class ExpertHosts:
    """One replica. Serve ends it with the application, and the directory and all hosts end with it."""

    def __init__(self, config: ServeConfig):
        """
        Raises:
            ValueError: not one host could be started; says why.
        """
        # not at the top: whoever builds the application (`serve run`) must not wait for torch
        from raymoe.actors.expert_directory import start_directory

        assert config.expert_hosts is not None, "the application has this deployment only with hosts"
        name = directory_name()
        self._directory = start_directory(
            name, config.model, config.expert_hosts, config.dtype, config.env, precision=config.expert_precision
        )
        why = ray.get(self._directory.wait.remote(_PLACED_S))
        if why is not None:
            raise ValueError(f"expert_hosts: no host could be started: {why}")

    async def facts(self) -> dict[str, Any]:
        """See `ExpertDirectory.facts`."""
        facts: Any = self._directory.facts.remote()
        return await facts

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises: with a new directory, and new hosts."""
        answer: Any = self._directory.ping.remote()
        await answer


def directory_name() -> str:
    """Of the application that the calling replica belongs to."""
    return f"{serve.get_replica_context().app_name}/expert-directory"
