"""Ray for the length of a command: a cluster of our own, or the one we were submitted to."""

import fcntl
import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray

NAMESPACE = "raymoe"
_GET_ADDRESS = 0x8915
"""Linux's SIOCGIFADDR: the IPv4 address of an interface."""


@contextmanager
def ray_session(min_cpus: int, *, own: bool = False, dashboard: bool = True) -> Iterator[str]:
    """Connects to Ray and disconnects at the end, also on an exception or Ctrl-C.

    Args:
        min_cpus: CPUs that a cluster of our own offers at least; a small machine then shares its cores.
        own: always start a cluster of our own, never join one. Without it, `RAY_ADDRESS` (which `ray job submit` sets)
            is joined, and one is started where it is absent.
        dashboard: run the dashboard in a cluster of our own.

    Yields:
        The dashboard's URL, or "" without one.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
    if ray.is_initialized():
        raise RuntimeError("Ray is connected already in this process; call ray.shutdown() first")
    if own or "RAY_ADDRESS" not in os.environ:
        context = ray.init(
            address="local",
            num_cpus=max(min_cpus, os.cpu_count() or 1),
            include_dashboard=dashboard,
            **quiet,
        )
    else:
        context = ray.init(**quiet)
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()


@contextmanager
def joined_session() -> Iterator[None]:
    """Connects to the cluster that is there: the one of `RAY_ADDRESS`, or the last one that was started on this machine.

    Raises:
        ValueError: there is none.
    """
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    except ConnectionError:
        raise ValueError("no Ray cluster is running here; set RAY_ADDRESS to that of the one you mean") from None
    try:
        yield
    finally:
        ray.shutdown()


def actor_names() -> list[str]:
    """Names of all raymoe actors in the cluster that have one."""
    # annotated as names alone, which it gives without the argument
    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in named if each["namespace"] == NAMESPACE]


def use_nodes_interface() -> None:
    """Lets gloo meet other ranks at the address that Ray knows the calling worker's node by.

    By itself it takes what the host's name resolves to, on many hosts a loopback address that no other host can reach. An
    interface named by the environment variable `GLOO_SOCKET_IFNAME` stays.
    """
    if (name := _interface_of(ray.util.get_node_ip_address())) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where there is none, or no telling."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no such address
                found = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
