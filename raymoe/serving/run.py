"""Serve an application for the length of a `with`: what `raymoe serve` and the demo do."""

import json
import logging
import math
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import ray
from ray import serve

from raymoe.actors.ray_private import hide_driver_lines
from raymoe.actors.session import ray_session
from raymoe.config import ServeConfig
from raymoe.errors import RunFailed
from raymoe.serving.app import build_app
from raymoe.serving.grpc_service import SERVICERS

_HEALTH_TIMEOUT_S = 60.0
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


@contextmanager
def serving(config: ServeConfig, *, app_name: str = "raymoe") -> Iterator[str]:
    """Serves `config.model` and takes everything down again at the end, also on an exception or Ctrl-C.

    Uses the Ray that this process is connected to; if there is none, one for the length of the call (`ray_session`).

    Yields:
        The base URL, e.g. http://127.0.0.1:8000, once /health answers there.

    Raises:
        RunFailed: the address is taken, the application did not start, or the cluster serves something already.
    """
    port = _claim_port(config.host, config.port)
    if config.grpc_port is not None:
        _claim_port("0.0.0.0", config.grpc_port)
    with _session(config), _quiet_driver():
        if serve.status().proxies:
            raise RunFailed(
                "this Ray cluster runs Serve already, whose address cannot be changed; add the application to it with "
                "'serve run raymoe.serving:build_app --name raymoe --route-prefix /raymoe model=...', or use another cluster"
            )
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": config.host, "port": port},
                grpc_options=_grpc_options(config.grpc_port),
                logging_config=_QUIET,
            )
            _deploy(config, app_name)
            url = _url(config.host, port)
            _wait_healthy(url)
            try:
                yield url
            finally:
                # what clients wait for is answered before the proxy goes
                serve.delete(app_name)
        finally:
            serve.shutdown()


def _grpc_options(port: int | None) -> dict[str, Any] | None:
    return None if port is None else {"port": port, "grpc_servicer_functions": list(SERVICERS)}


def _session(config: ServeConfig) -> AbstractContextManager:
    if ray.is_initialized():
        return nullcontext()
    hosts = config.expert_hosts
    wanted = config.engines * config.num_cpus + (hosts.count * hosts.num_cpus if hosts is not None else 0)
    # one for Serve's own processes and the gateway
    return ray_session(min_cpus=math.ceil(wanted) + 1, dashboard=False)


def _deploy(config: ServeConfig, app_name: str) -> None:
    try:
        serve.run(build_app(config), name=app_name, route_prefix="/", logging_config=_QUIET)
    except RuntimeError as error:
        raise RunFailed(_cause(app_name) or str(error)) from None


def _cause(app_name: str) -> str | None:
    """What a replica's constructor raised: Serve wraps it in its own words and frames."""
    status = serve.status().applications.get(app_name)
    for name, deployment in status.deployments.items() if status else ():
        raised = re.findall(r"^\s*(?:\w+\.)*(\w*(?:Error|Exception)): (.+)$", deployment.message, flags=re.MULTILINE)
        if raised:
            kind, message = raised[-1]
            return message if kind == "ValueError" else f"{name}: {kind}: {message}"
    return None


def _wait_healthy(url: str) -> None:
    deadline_s = time.monotonic() + _HEALTH_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=_HEALTH_TIMEOUT_S) as answer:
                json.load(answer)
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline_s:
                raise RunFailed(f"{url}/health does not answer after {_HEALTH_TIMEOUT_S:g} s: {error}") from None
            time.sleep(0.1)


def _claim_port(host: str, port: int) -> int:
    """Serve would wait for a port that is taken; 0 is any free one."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # as the server does: a connection that has just ended does not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RunFailed(
                f"cannot listen on {host}:{port} ({error.strerror}); set host and port (or grpc_port), or port=0 for any free one"
            ) from None
        return probe.getsockname()[1]


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


@contextmanager
def _quiet_driver() -> Iterator[None]:
    """Serve tells each of its steps on the driver's stderr, and Ray reports the end of Serve's controller as a failed task."""
    # for good: the report may come late
    hide_driver_lines(r"ServeController\.graceful_shutdown failed")
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
