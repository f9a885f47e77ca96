"""What a run must leave nothing of: processes, actors, placement groups, listening ports, shared memory."""

import os
import time
from contextlib import suppress
from pathlib import Path

from ray._private.state import actors
from ray.util import placement_group_table

MARK = "RAYMOE_TEST_CLUSTER"
"""Environment variable that all processes of a test's cluster inherit, wherever they end up after their parents."""
_PATIENCE_S = 20.0
_RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray-dashboard")
_SHARED_MEMORY = Path("/dev/shm")


class Leftovers:
    """What is there as a test begins; `check` is for its end."""

    def __init__(self) -> None:
        self._files = _files()

    def found(self) -> list[str]:
        """What has come since, in words."""
        left = []
        for pid in marked():
            if not _is_rays_own(title := _title(pid)):
                left.append(f"process {pid}: {title}")
                left += [f"port {port} of process {pid}" for port in _ports(pid)]
            if _maps_snapshots(pid):
                left.append(f"a snapshot's memory in process {pid}: {title}")
        left += [f"actor {each['Name']}: {each['State']}" for each in actors().values() if each["State"] != "DEAD"]
        table = placement_group_table()
        left += [f"placement group {name}" for name, each in table.items() if each["state"] != "REMOVED"]
        new = _files() - self._files
        return left + [f"file {path}" for path in sorted(new - _mapped_elsewhere(new))]

    def check(self) -> None:
        """Fails if something is still there after a while."""
        until = time.monotonic() + _PATIENCE_S
        while (left := self.found()) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left, "\n".join(left)


def marked() -> list[int]:
    """Processes of the cluster that this process has started, itself left out."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
        except OSError:  # it is gone
            continue
        if mark in variables and int(name) != os.getpid():
            found.append(int(name))
    return found


def training() -> dict[int, str]:
    """Processes of the cluster that are no part of Ray, by what they call themselves."""
    return {pid: title for pid in marked() if not _is_rays_own(title := _title(pid))}


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _is_rays_own(title: str) -> bool:
    """Daemons, and workers that have nothing to do; one that has no title is about to be gone."""
    return not title or title.startswith(_RAYS_OWN) or "/ray/" in title


def _maps_snapshots(pid: int) -> bool:
    try:
        return "memfd:raymoe-snapshot" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def _ports(pid: int) -> set[int]:
    """That a process listens on."""
    found = set()
    with suppress(OSError):  # it is gone
        inodes = {os.readlink(fd.path) for fd in os.scandir(f"/proc/{pid}/fd")}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def _files() -> set[str]:
    """Shared memory with a name."""
    return {str(path) for path in _SHARED_MEMORY.iterdir()}


def _mapped_elsewhere(files: set[str]) -> set[str]:
    """Those of them that processes outside the cluster use."""
    inside = {*marked(), os.getpid()}
    found = set()
    for name in filter(str.isdecimal, os.listdir("/proc")) if files else ():
        if int(name) not in inside:
            with suppress(OSError):  # it is gone
                maps = Path(f"/proc/{name}/maps").read_text()
                found |= {path for path in files if path in maps}
    return found
