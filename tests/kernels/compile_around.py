"""Compile the kernels around the GEMMs for Hopper without a GPU, and print what became of each launch as JSON.

Run by test_compile_around.py as a process of its own: the interpreter, which the other tests need, takes the compiler's
place. The functions that launch are called with tensors on the CPU, their kernels replaced by recorders: what is compiled
is what they would have launched.
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

from raymoe.kernels import gather_rows_triton, gather_sum, group_sum, plan_triton, tiles
from raymoe.kernels.plan import plan

MODULES = (gather_rows_triton, gather_sum, group_sum, plan_triton, tiles)
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
OPS = ("LDG", "STG", "LDG.E.128", "STG.E.128", "ATOM", "ATOMG", "RED", "LDL", "STL")


class Recorder:
    """Stands for a kernel and keeps the launches that it is asked for."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def compile_launch(kernel, args: tuple, kwargs: dict) -> dict[str, int]:
    """Instruction counts and resources of the specialisation that a launch with these arguments takes."""
    options = {"num_warps": kwargs.pop("num_warps", 4)}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    types, constants, marks = {}, {}, {}
    for at, param in enumerate(kernel.params):
        value = values[param.name]
        is_one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or is_one:
            types[param.name], constants[param.name] = "constexpr", value
            continue
        types[param.name] = "i32" if isinstance(value, int) else TYPES[value.dtype]
        address = value if isinstance(value, int) else value.data_ptr()
        if address % 16 == 0 and not param.do_not_specialize:
            marks[(at,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(kernel, types, constants, marks), target=GPUTarget("cuda", 90, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        both = subprocess.check_output(
            [tool, "--dump-resource-usage", "--dump-sass", file.name], text=True, stderr=subprocess.DEVNULL
        )
    counts = {op: len(re.findall(rf"\b{re.escape(op)}\b", both)) for op in OPS}
    before_sum = re.split(r"\b(?:FFMA|FADD|FMUL)\b", both)[0]
    counts["wide loads before the first sum"] = len(re.findall(r"\bLDG\.E\.128\b", before_sum))
    counts |= {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", both)}
    return counts | {"shared_bytes": built.metadata.shared, "threads": 32 * options["num_warps"]}


def main() -> None:
    launches: list = []
    for module in MODULES:
        for name in [n for n in vars(module) if n.startswith("_") and n.endswith("_kernel")]:
            setattr(module, name, Recorder(getattr(module, name), launches))
    results = {}

    def record(name: str, run, *args, **kwargs) -> None:
        launches.clear()
        run(*args, **kwargs)
        results[name] = [compile_launch(*launch) for launch in launches]

    index = torch.zeros(256, 8, dtype=torch.int64)
    routing = plan(index, 128)
    rows = torch.zeros(2048, 2048, dtype=torch.bfloat16)
    hidden = rows[:256]
    weight = torch.zeros(256, 8)
    end = routing.offsets[-1:]
    record("plan of 2048 slots", plan_triton.plan_triton, index, 128)
    record("plan of 5120 slots", plan_triton.plan_triton, torch.zeros(640, 8, dtype=torch.int64), 512)
    record("tile table", tiles.tile_table, routing, 16)
    record("tile table of 1024", tiles.tile_table, plan(index, 1024), 16, range(1024), range(1024))
    record("combine", gather_sum.triton_gather_sum, rows, routing, weight, torch.bfloat16)
    record("combine in float32", gather_sum.triton_gather_sum, rows.float(), routing, weight, torch.float32)
    record("gather rows", gather_rows_triton.gather_rows_triton, hidden, routing.token, end)
    record("spread rows", gather_rows_triton.spread_rows_triton, hidden, routing.inverse, end)
    record("group sum", group_sum.group_sum, hidden, routing.offsets, row_weight=weight.view(-1), token=routing.token)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
