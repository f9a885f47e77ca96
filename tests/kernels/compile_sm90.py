"""Compile the Triton GEMMs for Hopper without a GPU, and print what became of each as JSON; run by test_compile.py.

A process of its own: the interpreter, which the other tests need, takes the compiler's place, and Triton may be another version.
Every entry of the tables that ship is compiled in the variants that matter: plain (a gated layer as most families have it), full
(all that a family may add, weights the other way round) and pointers (where TMA cannot fetch the weights).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from raymoe.kernels.configs import TABLES, GemmConfig, read_table

# by path: the package exports functions of the same names
KERNELS = {
    "up": import_module("raymoe.kernels.gmm_gate").gmm_gate_kernel,
    "down": import_module("raymoe.kernels.gmm").gmm_kernel,
    "gate_grad": import_module("raymoe.kernels.gmm_gate_grad").gmm_gate_grad_kernel,
    "weight_grad": import_module("raymoe.kernels.gmm_k").gmm_k_kernel,
}
KERNELS |= {"up_train": KERNELS["up"], "input_grad": KERNELS["down"]}
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8e4nv", "int8": "i8"}
QUANTISED = ("float8_e4m3fn", "int8")
TENSORS = dict.fromkeys(["weight_scale", "grad_scale", "grad_weight_parts", "row_weight"], "*fp32")
TENSORS |= dict.fromkeys(["tile_row", "tile_end", "tile_slot", "num_row_tiles", "offsets"], "*i32")
TENSORS |= dict.fromkeys(("token", "order"), "*i64") | dict.fromkeys(("limit", "alpha", "offset"), "fp32")
OF_ROWS_TYPE = ["x", "bias", "scale", "pre", "out", "grad_pre", "scaled_inner", "a", "b"]
UNALIGNED = ("num_rows", "num_experts")
VARIANTS = ("plain", "full", "pointers")


def specialisation(kind: str, dtype: str, config: GemmConfig, variant: str) -> tuple[dict[str, str], dict[str, object]]:
    """(type of each argument, constants), as a launch would have them."""
    is_full = variant == "full"
    is_gate = kind in ("up", "up_train", "gate_grad")
    rows_type = "bf16" if dtype in QUANTISED else TYPES[dtype]
    types = TENSORS | dict.fromkeys(OF_ROWS_TYPE, f"*{rows_type}") | {"w": f"*{TYPES[dtype]}"}
    by_tma = config.inputs == "descriptor"
    # gate and up alternate in the full variant, as in the family that also clamps
    layout = "pairs" if is_full else "halves"
    columns = 2 if kind in ("up", "up_train") else 1
    # forward reads weights as they stand, backward with the last two dimensions swapped; full variants have them transposed
    is_swapped_view = (kind in ("gate_grad", "input_grad")) != (variant != "plain")
    form = "kn" if is_swapped_view else "nk"
    if columns == 2 and layout == "halves":
        form = "nk_pair" if form == "nk" else "pointers"
    if variant == "pointers" or config.weights == "pointers":
        form = "pointers"
    known: dict[str, object] = {
        "ACTIVATION": "silu",
        "LAYOUT": layout,
        "HAS_LIMIT": is_full,
        "HAS_BIAS": is_full and kind != "input_grad",
        "HAS_SCALE": is_full,
        "HAS_WEIGHT_SCALE": dtype in QUANTISED,
        "SAVE_PRE": kind == "up_train",
        "GATHER": is_gate and not by_tma,
        "ROWS_BY_TMA": by_tma,
        "FORM": form,
        "GATHER_A": False,
        "GATHER_B": not by_tma,
        "A_BY_TMA": by_tma,
        "B_BY_TMA": by_tma,
        "HAS_ORDER": True,
        "ACCUMULATE": is_full,
        "IS_SWAPPED": config.is_swapped,
        "IS_PERSISTENT": config.is_persistent,
        "IS_FLATTENED": config.is_flattened,
        "GROUP": config.group,
        "SLICES": config.slices,
        "UPCAST": False,
        "BM": config.rows,
        "BN": config.cols,
        "BK": config.inner,
        "w_stride_n" if is_swapped_view else "w_stride_k": 1,
        "out_stride_m" if is_full else "out_stride_n": 1,
    }
    for name, absent in {
        "HAS_BIAS": {"bias": None, "bias_stride": 0},
        "HAS_SCALE": {"scale": None, "grad_scale": None},
        "HAS_WEIGHT_SCALE": {"weight_scale": None, "weight_scale_stride": 0},
        "SAVE_PRE": {"pre": None} if kind == "up" else {},
    }.items():
        known |= {} if known[name] else absent
    if kind in ("down", "input_grad") or (kind == "weight_grad" and by_tma):
        known["token"] = None
    rows, cols, inner = config.rows, config.cols, config.inner
    if by_tma:
        types["x"] = f"tensordesc<{rows_type}[{rows},{inner}]>"
        types["a"], types["b"] = (f"tensordesc<{rows_type}[1,1,{inner},{n}]>" for n in (rows, cols))
    if form != "pointers":
        block = {
            "nk": f"{columns * cols},{inner}",
            "kn": f"{inner},{columns * cols}",
            "nk_pair": f"2,{cols},{inner}",
        }[form]
        types["w"] = f"tensordesc<{TYPES[dtype]}[1,{block}]>"
    return types, known


def build(kind: str, dtype: str, config: GemmConfig, variant: str) -> dict[str, object]:
    """Instruction counts and resources of one specialisation, with the alignment marks that a launch would give."""
    kernel = KERNELS[kind]
    types, known = specialisation(kind, dtype, config, variant)
    names = kernel.arg_names
    known = {name: value for name, value in known.items() if name in names}
    signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in names}
    marks = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if name not in UNALIGNED and (signature[name] == "i32" or signature[name].startswith("*"))
    }
    built = triton.compile(
        ASTSource(kernel, signature, known, marks),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        both = subprocess.check_output(
            [tool, "--dump-resource-usage", "--dump-sass", file.name], text=True, stderr=subprocess.DEVNULL
        )
    ops = ("HGMMA", "HMMA", "FFMA", "UTMALDG", "LDGSTS", "LDL", "STL", "WARPGROUP.ARRIVE")
    found: dict[str, object] = {op: len(re.findall(rf"\b{op}\b", both)) for op in ops}
    found |= {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", both)}
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", both)
    found["pending"] = max((int(n, 16) for n in waits), default=0)
    found["shapes"] = sorted(set(re.findall(r"HGMMA\.(\w+)", both)))
    found["shared_bytes"] = built.metadata.shared
    found["form"] = known.get("FORM", "pointers")
    return found


def entries(dtypes: list[str], is_fast: bool) -> Iterator[tuple[str, str, GemmConfig]]:
    """Each distinct (kind, type, config) of the tables; fast: those of the lowest and highest bucket of each kind."""
    seen = set()
    for path in sorted(TABLES.glob("*.json")):
        for kind, by_dtype in read_table(path).items():
            for dtype, by_bucket in by_dtype.items():
                buckets = sorted(by_bucket)
                for bucket in [buckets[0], buckets[-1]] if is_fast else buckets:
                    entry = (kind, dtype, by_bucket[bucket])
                    if dtype in dtypes and entry not in seen:
                        seen.add(entry)
                        yield entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=sorted(TYPES))
    parser.add_argument("--variants", nargs="+", default=["plain"], choices=VARIANTS)
    parser.add_argument("--fast", action="store_true")
    arguments = parser.parse_args()
    results = []
    for kind, dtype, config in entries(arguments.dtypes, arguments.fast):
        for variant in arguments.variants:
            if variant == "pointers" and (config.weights == "pointers" or kind == "weight_grad"):
                continue
            found = build(kind, dtype, config, variant)
            results.append({"kind": kind, "dtype": dtype, "variant": variant, "config": asdict(config), "found": found})
    json.dump({"triton": triton.__version__, "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
