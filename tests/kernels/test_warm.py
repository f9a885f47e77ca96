import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from raymoe.kernels import ExpertSpec, once
from raymoe.kernels.warm import cache_folder, network_file_system, source_digest, warm_key, warm_up

# processes of their own that load the one file, since importing torch in each would take seconds
CHILD = f"""
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("once", {once.__file__!r})
once = importlib.util.module_from_spec(spec)
spec.loader.exec_module(once)
folder, name, behaviour = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def work():
    with (folder / "log").open("a") as log:
        is_cold = not (folder / "cache").exists()
        log.write(f"{{name}} {{'compiles' if is_cold else 'loads'}}\\n")
    if is_cold:
        if behaviour == "dies":
            print("holds", flush=True)
            time.sleep(60)
        if behaviour == "raises":
            raise RuntimeError("no such register")
        time.sleep(0.3)
        (folder / "cache").write_text("compiled")

print("first" if once.once_per_node(folder / "locks", "key", work, timeout_s=float(sys.argv[4])) else "later", flush=True)
"""


def start(folder: Path, name: str, behaviour: str = "works", timeout_s: float = 30.0) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(folder), name, behaviour, str(timeout_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def logged(folder: Path) -> list[str]:
    return [line.split()[1] for line in (folder / "log").read_text().splitlines()]


def test_one_process_compiles_and_the_others_load(tmp_path):
    children = [start(tmp_path, f"actor{n}") for n in range(5)]
    answers = [child.communicate(timeout=30)[0].strip() for child in children]
    assert sorted(answers) == ["first", *["later"] * 4]
    assert sorted(logged(tmp_path)) == ["compiles", *["loads"] * 4]
    assert (tmp_path / "locks" / "key.json").exists()
    # a process that comes when all is done waits for nobody
    late = start(tmp_path, "late", timeout_s=0.0)
    assert late.communicate(timeout=30)[0].strip() == "later"


def test_killed_holder_hangs_nobody(tmp_path):
    holder = start(tmp_path, "holder", "dies")
    assert holder.stdout.readline().strip() == "holds"
    waiting = start(tmp_path, "waiting")
    time.sleep(0.3)
    assert waiting.poll() is None
    holder.send_signal(signal.SIGKILL)
    assert waiting.communicate(timeout=10)[0].strip() == "first"
    holder.communicate()


def test_failed_compile_leaves_no_marker(tmp_path):
    failing = start(tmp_path, "failing", "raises")
    assert "no such register" in failing.communicate(timeout=30)[1]
    assert not (tmp_path / "locks" / "key.json").exists()
    assert start(tmp_path, "next").communicate(timeout=30)[0].strip() == "first"
    assert not list((tmp_path / "locks").glob("*.partial"))


def test_hung_holder_is_not_waited_for_longer_than_allowed(tmp_path):
    holder = start(tmp_path, "holder", "dies")
    assert holder.stdout.readline().strip() == "holds"
    alone = start(tmp_path, "alone", timeout_s=0.2)
    assert alone.communicate(timeout=30)[0].strip() == "later"
    assert not (tmp_path / "locks" / "key.json").exists()
    holder.kill()
    holder.communicate()


def test_key_changes_with_everything_that_changes_the_kernels():
    layer = {"num_experts": 8, "dtype": "torch.bfloat16", "is_training": True}
    node = {"device": "a", "triton": "3.7.1", "table": "{}", "kernels": source_digest()}
    keys = {warm_key(layer, node), warm_key({**layer, "is_training": False}, node)}
    keys |= {warm_key(layer, {**node, name: "other"}) for name in node}
    assert len(keys) == 2 + len(node)
    assert warm_key(dict(layer), dict(node)) in keys


MOUNTS = """\
/dev/vda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/vdb1 /home/scratch xfs rw 0 0
server:/data /my\\040data nfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/tmp/x", None),
        ("/home/me/.triton/cache", "nfs4"),
        ("/home/scratch/cache", None),
        ("/homes/me", None),
        ("/my data/cache", "nfs"),
    ],
)
def test_network_file_system(path, expected):
    assert network_file_system(Path(path), MOUNTS) == expected


def test_cache_folder_leaves_a_network_home_and_says_so(tmp_path, monkeypatch, caplog):
    triton = pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("raymoe.kernels.warm.network_file_system", lambda path: "nfs4")
    folder = cache_folder()
    assert folder.parent == tmp_path
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0
    assert "TRITON_CACHE_DIR" in caplog.text
    # a folder that was asked for is taken as it is
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "asked"))
    assert triton.knobs.cache.dir == str(tmp_path / "asked")
    assert cache_folder() == tmp_path / "asked"


def test_cache_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("raymoe.kernels.warm.network_file_system", lambda path: "nfs4")
    somebody = os.getuid() + 1
    (tmp_path / f"raymoe-triton-{somebody}").mkdir()
    monkeypatch.setattr("os.getuid", lambda: somebody)
    with pytest.raises(ValueError, match="another user"):
        cache_folder()


def test_nothing_to_warm_without_cuda():
    spec = ExpertSpec()
    assert warm_up(spec, 4, 32, 16, torch.float32, torch.device("cpu"), is_training=True) == 0.0
