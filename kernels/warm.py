"""Compile a layer's kernels before the first step, once a node: one process compiles, the others load what it left."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from raymoe.kernels.backend import is_interpreted
from raymoe.kernels.configs import table_of
from raymoe.kernels.once import once_per_node
from raymoe.kernels.spec import ExpertSpec, triton_refusal

_logger = logging.getLogger(__name__)

_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs"}
_NETWORK_FILE_SYSTEMS |= {"9p", "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.juicefs", "wekafs"}


def warm_up(
    spec: ExpertSpec,
    num_experts: int,
    hidden_size: int,
    inner_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_training: bool,
    top_k: int = 8,
    has_bias: bool = False,
    has_scale: bool = False,
) -> float:
    """Compile, or load, every Triton kernel that a layer of this shape can need, and return the seconds it took.

    Of the processes of a node that ask for the same layer one compiles and the others wait for it. Takes a few hundred
    megabytes of the device for a moment. Where Triton does not run (a CPU, a spec with Python functions) it returns at once.

    Args:
        is_training: the backward pass too.
        top_k: K, choices per token.
        has_bias: the experts have biases.
        has_scale: calls will pass `hidden_scale`.
    """
    device = torch.device(device)
    if device.type != "cuda" or is_interpreted() or triton_refusal(spec, dtype, dtype) is not None:
        return 0.0
    import triton

    started = time.perf_counter()
    folder = cache_folder()
    triton.knobs.cache.dir = str(folder)
    name = torch.cuda.get_device_name(device)
    layer = {
        "spec": asdict(spec),
        "num_experts": num_experts,
        "hidden_size": hidden_size,
        "inner_size": inner_size,
        "dtype": str(dtype),
        "is_training": is_training,
        "top_k": top_k,
        "has_bias": has_bias,
        "has_scale": has_scale,
    }
    node = {
        "device": name,
        "capability": torch.cuda.get_device_capability(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": source_digest(),
        "table": repr(table_of(name)),
    }

    def compile_all() -> None:
        from raymoe.kernels.gemm_cases import compile_layer

        compile_layer(
            spec,
            num_experts,
            hidden_size,
            inner_size,
            dtype,
            device,
            is_training=is_training,
            top_k=top_k,
            has_bias=has_bias,
            has_scale=has_scale,
        )
        torch.cuda.synchronize(device)

    once_per_node(folder / "raymoe", warm_key(layer, node), compile_all, notes={**layer, "device": name})
    return time.perf_counter() - started


def warm_key(layer: dict, node: dict) -> str:
    """Names what was compiled: another layer, device, version, table or kernel source gives another key."""
    content = json.dumps([layer, node], sort_keys=True, default=str)
    return "warm-" + hashlib.sha256(content.encode()).hexdigest()[:24]


@cache
def source_digest() -> str:
    """Of the Python files of this package: an edited kernel is compiled anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """The node's folder for compiled kernels: TRITON_CACHE_DIR or Triton's default, made if missing.

    A default that lies in a home on the network would be shared with other nodes, slowly and with locks that few servers
    keep well: then it is a folder of this user in the node's temporary folder, and a warning says so.

    Raises:
        ValueError: that temporary folder belongs to somebody else.
    """
    import triton

    folder = Path(triton.knobs.cache.dir)
    is_default = folder == Path(triton.knobs.cache.get_triton_dir("cache"))
    if is_default and (kind := network_file_system(folder)) is not None:
        local = Path(tempfile.gettempdir()) / f"raymoe-triton-{os.getuid()}"
        _logger.warning(
            "Triton's cache folder %s is on a network file system (%s); compiling into %s instead. "
            "Set TRITON_CACHE_DIR to choose the folder",
            folder,
            kind,
            local,
        )
        folder = local
        # compiled code is run: nobody else may have put it there
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise ValueError(f"{folder} belongs to another user; set TRITON_CACHE_DIR to a folder of this node")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def network_file_system(path: Path, mounts: str | None = None) -> str | None:
    """Type of the network file system that `path` lies on, e.g. nfs4; None if it is local or the mounts are not known.

    Args:
        mounts: content in the format of /proc/mounts, for tests.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
    path = path.absolute()
    # of nested mounts the innermost holds the path, and of two on one place the later
    best, found = -1, None
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if path.is_relative_to(place) and len(place) >= best:
            best, found = len(place), kind
    return found if found in _NETWORK_FILE_SYSTEMS else None
