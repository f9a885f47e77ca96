"""The memory there is, in cgroup trees as they are found: nested, mounted in part, both versions, or none."""

import pytest

from raymoe.config import check_fits, memory_limit, total_memory

GIB = 2**30
V2_MOUNT = "29 23 0:26 {inner} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {inner} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"


def tree(root, files: dict[str, object]):
    for name, content in {"proc/meminfo": meminfo(64, 48), **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def meminfo(total_gib, available_gib):
    return f"MemTotal:  {total_gib * 2**20} kB\nMemFree: 12 kB\nMemAvailable:  {available_gib * 2**20} kB"


def test_a_machine_without_cgroups(tmp_path):
    found = memory_limit(tree(tmp_path, {}))
    assert (found.total_bytes, found.available_bytes) == (64 * GIB, 48 * GIB)
    assert found.limited_by == str(tmp_path / "proc/meminfo")


@pytest.mark.parametrize(("own", "parent", "expected"), [("max", "max", 64), (8 * GIB, "max", 8), (8 * GIB, 4 * GIB, 4),
                                                        ("max", 5 * GIB, 5), (99 * GIB, 99 * GIB, 64)])  # fmt: skip
def test_v2_takes_the_smallest_of_its_own_and_its_parents(own, parent, expected, tmp_path):
    root = tree(tmp_path, {
        "proc/self/cgroup": "0::/job/worker-1",
        "proc/self/mountinfo": V2_MOUNT.format(inner="/"),
        "sys/fs/cgroup/job/worker-1/memory.max": own,
        "sys/fs/cgroup/job/memory.max": parent,
    })  # fmt: skip
    assert total_memory(root) == expected * GIB


def test_memory_that_is_used_elsewhere_in_the_parent_is_not_there(tmp_path):
    cgroup = "sys/fs/cgroup/job"
    root = tree(tmp_path, {
        "proc/self/cgroup": "0::/job/me",
        "proc/self/mountinfo": V2_MOUNT.format(inner="/"),
        f"{cgroup}/memory.max": 10 * GIB,
        f"{cgroup}/memory.current": 9 * GIB,
        f"{cgroup}/memory.stat": f"anon 7\ninactive_file {2 * GIB}\nactive_file 5",
        f"{cgroup}/me/memory.max": 6 * GIB,
        f"{cgroup}/me/memory.current": 1 * GIB,
    })  # fmt: skip
    found = memory_limit(root)
    assert (found.total_bytes, found.available_bytes) == (6 * GIB, 3 * GIB)
    assert found.limited_by == str(tmp_path / cgroup / "me/memory.max")


def test_memory_high_counts_for_beyond_it_everything_stalls(tmp_path):
    root = tree(tmp_path, {
        "proc/self/cgroup": "0::/",
        "proc/self/mountinfo": V2_MOUNT.format(inner="/"),
        "sys/fs/cgroup/memory.max": 10 * GIB,
        "sys/fs/cgroup/memory.high": 7 * GIB,
    })  # fmt: skip
    assert memory_limit(root).limited_by.endswith("memory.high")
    assert total_memory(root) == 7 * GIB


def test_v1_beside_an_empty_v2(tmp_path):
    root = tree(tmp_path, {
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/pods/a\n0::/",
        "proc/self/mountinfo": V1_MOUNT.format(inner="/") + "\n" + V2_MOUNT.format(inner="/"),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
        "sys/fs/cgroup/memory/pods/memory.limit_in_bytes": 12 * GIB,
        "sys/fs/cgroup/memory/pods/memory.usage_in_bytes": 4 * GIB,
        "sys/fs/cgroup/memory/pods/memory.stat": f"total_inactive_file {GIB}\ninactive_file 3",
        "sys/fs/cgroup/memory/pods/a/memory.limit_in_bytes": 2**63 - 4096,
    })  # fmt: skip
    found = memory_limit(root)
    assert (found.total_bytes, found.available_bytes) == (12 * GIB, 9 * GIB)


@pytest.mark.parametrize("inner", ["/", "/docker/4f"])
def test_a_container_that_is_told_the_hosts_path(inner, tmp_path):
    root = tree(tmp_path, {
        "proc/self/cgroup": "4:memory:/docker/4f",
        "proc/self/mountinfo": V1_MOUNT.format(inner=inner),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 3 * GIB,
    })  # fmt: skip
    assert total_memory(root) == 3 * GIB


def test_a_budget_that_does_not_fit_is_refused_with_the_numbers(tmp_path):
    root = tree(tmp_path, {
        "proc/self/cgroup": "0::/me",
        "proc/self/mountinfo": V2_MOUNT.format(inner="/"),
        "sys/fs/cgroup/me/memory.max": 4 * GIB,
        "sys/fs/cgroup/me/memory.current": GIB,
    })  # fmt: skip
    check_fits("expert_memory: 50%", 3 * GIB, root=root)
    check_fits("expert_memory: 50%", 5 * GIB, held_bytes=2 * GIB, root=root)
    with pytest.raises(
        ValueError,
        match=rf"expert_memory: 50% is {3 * GIB + 1} bytes \(3\.00 GiB\), but only 3\.00 GiB of the 4\.00 GiB that "
        rf".*/me/memory\.max allows are free\. At most {3 * GIB} bytes fit",
    ):
        check_fits("expert_memory: 50%", 3 * GIB + 1, root=root)
    with pytest.raises(ValueError, match=r"\(1\.00 GiB of it held already\).* At most 4294967296 bytes fit"):
        check_fits("expert_memory: 50%", 4 * GIB + 1, held_bytes=GIB, root=root)


def test_this_machine_has_some_memory():
    found = memory_limit()
    assert 0 < found.available_bytes <= found.total_bytes
