"""Compile the Triton kernels for Hopper without a GPU, and print what became of each as JSON; run by test_compile.py.

A process of its own: the interpreter, which the other tests need, takes the compiler's place.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from raymoe.kernels import gather_sum, gmm, gmm_gate, gmm_gate_grad, gmm_k, group_sum, plan
from raymoe.kernels.tiles import TileConfig, gmm_config, gmm_k_config

TENSORS = {"x", "w", "bias", "out", "scale", "pre", "grad_out", "grad_pre", "scaled_inner", "a", "b", "rows_in", "rows"}
TYPES = {"token": "*i64", "inverse": "*i64", "row_weight": "*fp32", "weight": "*fp32", "grad_weight_parts": "*fp32"}
TYPES |= {"grad_scale": "*fp32", "limit": "fp32", "alpha": "fp32", "offset": "fp32"}
TYPES |= dict.fromkeys(("tile_row", "tile_end", "tile_slot", "offsets", "num_real"), "*i32")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GATE = {"ACTIVATION": "silu", "IS_GATED": True}
PLAIN = {"HAS_LIMIT": False, "HAS_BIAS": False, "HAS_SCALE": False, "bias": None, "scale": None, "bias_stride": 0}
PLAIN |= {"col_step": 1, "grad_scale": None}
FULL = {"HAS_LIMIT": True, "HAS_BIAS": True, "HAS_SCALE": True, "col_step": 2, "up_at": 1}
TILE = ("BM", "BN", "BK")


def build(kernel, dtype: str, constants: dict, tile: TileConfig) -> dict[str, int]:
    """Instruction counts and resources of one specialisation, with the alignment marks that a launch would give."""
    names = kernel.arg_names
    known = {**constants, **dict(zip(TILE, tile, strict=False)), "UPCAST": False}
    known = {name: value for name, value in known.items() if name in names}
    types = {
        name: "constexpr" if name in known else f"*{dtype}" if name in TENSORS else TYPES.get(name, "i32")
        for name in names
    }
    odd = ("num_tokens", "num_rows", "limit", "alpha", "offset")
    marks = {(at,): [["tt.divisibility", 16]] for at, n in enumerate(names) if n not in known and n not in odd}
    built = triton.compile(
        ASTSource(kernel, types, known, marks),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        both = subprocess.check_output(
            [tool, "--dump-resource-usage", "--dump-sass", file.name], text=True, stderr=subprocess.DEVNULL
        )
    counts = {op: len(re.findall(rf"\b{op}\b", both)) for op in ("HGMMA", "HMMA", "FFMA", "LDGSTS", "LDL", "STL")}
    counts |= {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", both)}
    return counts | {"shared_bytes": built.metadata.shared, "threads": 32 * tile.num_warps}


def main() -> None:
    """Argument: bf16 or fp32."""
    dtype = sys.argv[1]
    prefill = plan(torch.zeros(128, 1, dtype=torch.int64), 1)
    decode = plan(torch.zeros(4, 1, dtype=torch.int64), 1)
    tile = gmm_config(prefill, DTYPES[dtype])
    gate_tile = gmm_config(prefill, DTYPES[dtype], has_gate=True)
    small = gmm_config(decode, DTYPES[dtype], has_gate=True)
    tile_k = gmm_k_config(DTYPES[dtype])
    up, back = gmm_gate._gmm_gate_kernel, gmm_gate_grad._gmm_gate_grad_kernel
    flat = {"w_stride_k": 1}
    swapped = {"w_stride_n": 1}
    saving = {"SAVE_PRE": True, **GATE, **flat}
    bare = {"token": None, "GATHER": False, **PLAIN}
    gathered = {"out_stride_n": 1, "GATHER_A": True, "GATHER_B": False}
    results = {
        "gmm": build(gmm._gmm_kernel, dtype, {**bare, **flat}, tile),
        "gmm transposed": build(gmm._gmm_kernel, dtype, {**bare, **swapped}, tile),
        "gmm_gate": build(up, dtype, {**saving, **PLAIN}, gate_tile),
        "gmm_gate full": build(up, dtype, {**saving, **FULL}, gate_tile),
        "gmm_gate decode": build(up, dtype, {**saving, **PLAIN}, small),
        "gmm_gate_grad": build(back, dtype, {**GATE, **PLAIN, **swapped}, gate_tile),
        "gmm_gate_grad full": build(back, dtype, {**GATE, **FULL, **swapped}, gate_tile),
        "gmm_k": build(gmm_k._gmm_k_kernel, dtype, gathered, tile_k),
        "group_sum": build(
            group_sum._group_sum_kernel, dtype, {"GATHER": True, "HAS_WEIGHT": True}, TileConfig(0, 64, 32)
        ),
        "gather_sum": build(
            gather_sum._gather_sum_kernel,
            dtype,
            {"K": 8, "HAS_WEIGHT": True, "ACC": triton.language.float32, "BT": 1},
            TileConfig(0, 512, 0),
        ),
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
