"""Memory budgets as people write them, and the memory there really is to spend."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ROOT = Path("/")
_GIB = 2**30


def parse_memory(value: str | int, total_bytes: int) -> int:
    """Bytes that a budget stands for: "50%" of `total_bytes`, "512MiB", "1.5GB", or a number of bytes.

    What a share is a share of is the caller's to say: `expert_memory` is one of all the model's experts, not of the machine.

    Raises:
        ValueError: not such a budget, or not above 0, or above 100 %.
    """
    text = str(value).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMG]?i?B)?", text, flags=re.IGNORECASE)
    if not match or float(match[1]) <= 0 or (match[2] == "%" and float(match[1]) > 100):
        raise ValueError(
            f"{text!r} is not a memory budget; write a share such as '50%' (up to 100%) or bytes such as '512MiB'"
        )
    number, unit = float(match[1]), match[2]
    return int(total_bytes * number / 100) if unit == "%" else int(number * _UNITS[(unit or "B").upper()])


@dataclass(frozen=True)
class MemoryLimit:
    """What a process may take before it is killed for it."""

    total_bytes: int
    """The machine's memory, or the smallest limit of the process's cgroup and those around it."""
    available_bytes: int
    """What is left of it now; pages that the kernel would give up are counted as left."""
    limited_by: str
    """The file that says so, for messages."""


def memory_limit(root: Path = _ROOT) -> MemoryLimit:
    """The memory this process may use: the machine's, or less where cgroups (v1, v2 or both) say so.

    Args:
        root: of the file system; another one in tests.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst ("memory.max", "memory.high", "memory.stat") and
    cgroup-v1/memory.rst.
    """
    machine = _fields(root / "proc/meminfo")
    total_bytes, limited_by = machine["MemTotal:"] * 1024, root / "proc/meminfo"
    available_bytes = machine.get("MemAvailable:", machine["MemTotal:"]) * 1024
    for file, limit, used in _cgroup_limits(root):
        if limit < total_bytes:
            total_bytes, limited_by = limit, file
        available_bytes = min(available_bytes, max(0, limit - used))
    return MemoryLimit(total_bytes, available_bytes, str(limited_by))


def total_memory(root: Path = _ROOT) -> int:
    """Bytes that this process may use at most, see `memory_limit`."""
    return memory_limit(root).total_bytes


def check_fits(what: str, wanted_bytes: int, *, held_bytes: int = 0, root: Path = _ROOT) -> None:
    """Refuses a budget that the process would be killed for.

    Args:
        what: the field and its value, which the message begins with: "expert_memory: 50%".
        wanted_bytes: to be allocated.
        held_bytes: of them allocated already, or given back when they are (a cache that is resized).

    Raises:
        ValueError: they do not fit; says what is wanted, what is there, and what says so.
    """
    found = memory_limit(root)
    if wanted_bytes - held_bytes <= found.available_bytes:
        return
    held = f" ({held_bytes / _GIB:.2f} GiB of it held already)" if held_bytes else ""
    raise ValueError(
        f"{what} is {wanted_bytes} bytes ({wanted_bytes / _GIB:.2f} GiB){held}, but only "
        f"{found.available_bytes / _GIB:.2f} GiB of the {found.total_bytes / _GIB:.2f} GiB that {found.limited_by} allows are "
        f"free. At most {found.available_bytes + held_bytes} bytes fit: give less, or raise that limit."
    )


def _cgroup_limits(root: Path) -> Iterator[tuple[Path, int, int]]:
    """(file, limit, bytes in use that cannot be reclaimed) of this process's memory cgroups and all above them."""
    for mount, is_v2, own in _cgroup_mounts(root):
        limits = ("memory.max", "memory.high") if is_v2 else ("memory.limit_in_bytes",)
        usage = "memory.current" if is_v2 else "memory.usage_in_bytes"
        cache = "inactive_file" if is_v2 else "total_inactive_file"
        folder = mount / own
        while True:
            found = [(_number(folder / name), folder / name) for name in limits]
            used = max(0, (_number(folder / usage) or 0) - _fields(folder / "memory.stat").get(cache, 0))
            yield from ((file, limit, used) for limit, file in found if limit is not None)
            if folder == mount or mount not in folder.parents:
                break
            folder = folder.parent


def _cgroup_mounts(root: Path) -> Iterator[tuple[Path, bool, str]]:
    """(where a hierarchy with memory limits is mounted, whether it is v2, this process's place in it)."""
    own = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        own["" if not controllers else "memory" if "memory" in controllers.split(",") else controllers] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        is_v2 = kind == "cgroup2"
        if not is_v2 and not (kind == "cgroup" and "memory" in options.rsplit(" ", 1)[-1].split(",")):
            continue
        inner, mounted_at = before.split(" ")[3:5]
        path = own.get("" if is_v2 else "memory")
        if path is not None:
            # a container may see its own cgroup as the root of what is mounted, and still be told the path on the host
            place = path.removeprefix(inner) if inner != "/" else path
            here = root / mounted_at.lstrip("/")
            yield here, is_v2, place.lstrip("/") if (here / place.lstrip("/")).is_dir() else ""


def _number(file: Path) -> int | None:
    """What stands in a file; None if it is not there, or says "max"."""
    text = next(iter(_lines(file)), "max").strip()
    return int(text) if text.isdigit() else None


def _fields(file: Path) -> dict[str, int]:
    rows = (line.split() for line in _lines(file))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
