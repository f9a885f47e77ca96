"""The interpreter takes code that the compiler refuses or spoils, so the tables are compiled too: for Hopper, on any machine.

With the pinned Triton, and with 3.6, the oldest that is supported: it assembles differently, and it is what runs on the GPU host.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raymoe.kernels.configs import KINDS, GemmConfig

MAX_SHARED_BYTES = 232448  # of one block on sm_90
REGISTERS = 65536
OLDEST = "3.6.0"
HALF_TYPES = ("bfloat16", "float16")
QUANTISED = ("float8_e4m3fn", "int8")
EVERYTHING = ["--dtypes", *HALF_TYPES, "float32", *QUANTISED, "--variants", "plain", "full", "pointers"]
ROOT = Path(__file__).parents[2]


def compile_tables(arguments, packages=None):
    """What compile_sm90.py found, with the Triton of this environment or the one in the folder `packages`."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    if packages is not None:
        env |= {"PYTHONPATH": str(packages), "TRITON_CACHE_DIR": str(packages / "cache")}
    script = Path(__file__).with_name("compile_sm90.py")
    done = subprocess.run([sys.executable, str(script), *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def oldest_triton():
    """A folder with the oldest Triton alone, under build/, kept for the next run; made from PyPI."""
    folder = ROOT / "build" / f"triton-{OLDEST}"
    if not (folder / f"triton-{OLDEST}.dist-info").exists():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), f"triton=={OLDEST}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)} failed; it needs a package index:\n{done.stderr[-2000:]}"
    return folder


def problems(entry):
    """What is wrong with one compiled entry: an empty list, or this change must not ship."""
    found, config, dtype = entry["found"], GemmConfig(**entry["config"]), entry["dtype"]
    wrong = []

    def claim(holds, text):
        if not holds:
            wrong.append(text)

    claim(found["STACK"] == found["LDL"] == found["STL"] == 0, "spills registers")
    claim(found["shared_bytes"] <= MAX_SHARED_BYTES, "shared memory")
    claim(found["REG"] * 32 * config.num_warps <= REGISTERS, "registers")
    rows_by_tma, weights_by_tma = config.inputs == "descriptor", found["form"] != "pointers"
    if entry["kind"] == "weight_grad":
        weights_by_tma = rows_by_tma
    claim((found["UTMALDG"] > 0) == (rows_by_tma or weights_by_tma), "TMA")
    claim((found["LDGSTS"] > 0) == (not rows_by_tma or not weights_by_tma), "asynchronous copies")
    if dtype == "float32":
        # tensor cores would make it TF32
        claim(found["HGMMA"] == found["HMMA"] == 0 < found["FFMA"], "float32 is not exact")
        return wrong
    tile = [config.rows, config.cols * (2 if entry["kind"] in ("up", "up_train") else 1)]
    height, width = reversed(tile) if config.is_swapped else tile
    if height < 64:
        claim(found["HMMA"] > 0 == found["HGMMA"], "tensor cores")
        return wrong
    claim(found["HGMMA"] > 0 == found["HMMA"], "tensor cores")
    groups = config.num_warps // 4
    width = min(width // (groups // min(groups, height // 64)), 256)
    claim(found["shapes"] == [f"64x{width}x16"], f"tensor-core shape is not 64x{width}x16")
    claim(found["pending"] >= 1, "waits for each product")
    # weights that pass through registers, to be converted or reordered, are fed in smaller steps
    through_registers = config.is_swapped and (dtype in QUANTISED or found["form"] == "nk_pair")
    if not through_registers:
        claim(found["WARPGROUP.ARRIVE"] < found["HGMMA"], "one wait for each instruction")
    return wrong


def assert_sound(compiled, kinds=KINDS):
    assert {entry["kind"] for entry in compiled["results"]} == set(kinds)
    wrong = [{**entry, "wrong": found} for entry in compiled["results"] if (found := problems(entry))]
    assert not wrong, json.dumps(wrong, indent=1)


def test_default_triton():
    pytest.importorskip("triton")
    assert_sound(compile_tables(["--fast"]))


def test_oldest_triton(oldest_triton):
    compiled = compile_tables(["--fast"], oldest_triton)
    assert compiled["triton"] == OLDEST
    assert_sound(compiled)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_oldest", [False, True])
def test_every_entry(is_oldest, request):
    packages = request.getfixturevalue("oldest_triton") if is_oldest else None
    assert_sound(compile_tables(EVERYTHING, packages))


SOUND = {
    "kind": "down",
    "dtype": "bfloat16",
    "config": {"rows": 128, "cols": 256, "inner": 64, "num_warps": 8, "weights": "descriptor"},
    "found": {"HGMMA": 4, "HMMA": 0, "FFMA": 0, "UTMALDG": 4, "LDGSTS": 16, "LDL": 0, "STL": 0, "STACK": 0, "REG": 164}
    | {"WARPGROUP.ARRIVE": 1, "pending": 1, "shapes": ["64x256x16"], "shared_bytes": 196640, "form": "nk"},
}
BROKEN = {
    "spills registers": {"STL": 3, "STACK": 16},
    "shared memory": {"shared_bytes": 245760},
    "registers": {"REG": 257},
    "tensor cores": {"HGMMA": 0, "HMMA": 64, "WARPGROUP.ARRIVE": -1, "shapes": ["64x256x16"]},
    "tensor-core shape is not 64x256x16": {"shapes": ["64x128x16"]},
    "one wait for each instruction": {"WARPGROUP.ARRIVE": 4},
    "waits for each product": {"pending": 0},
    "asynchronous copies": {"LDGSTS": 0},
    "TMA": {"UTMALDG": 0},
}


def test_sound_build_passes():
    assert problems(SOUND) == []


@pytest.mark.parametrize("name", BROKEN)
def test_broken_build_is_seen(name):
    assert problems({**SOUND, "found": SOUND["found"] | BROKEN[name]}) == [name]


def test_tf32_is_seen():
    exact = {"HGMMA": 0, "shapes": [], "FFMA": 2048}
    entry = {**SOUND, "dtype": "float32"}
    assert problems({**entry, "found": SOUND["found"] | exact}) == []
    assert problems(entry) == ["float32 is not exact"]
