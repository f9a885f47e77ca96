import json
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

import benchmarks  # noqa: F401, so that raymoe.benchmarks is found in a checkout as well
from raymoe.benchmarks.kernel_jobs import Journal, supervise
from raymoe.benchmarks.kernel_shapes import SHAPES
from raymoe.benchmarks.kernel_targets import noise, summary
from raymoe.benchmarks.kernel_times import COLUMNS, planned_cells
from raymoe.benchmarks.kernels_gpu import main
from raymoe.kernels.configs import KINDS, read_table

ROOT = Path(__file__).parents[1]


def test_whole_run_at_toy_size(tmp_path):
    # every line but CUDA's own: device, checks under the interpreter, tuner, times, targets
    assert main(["--out", str(tmp_path), "--quick", "--tune"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row for row in results["meta"]["checks"] if not row["ok"]] == []
    assert {row["check"].split(",")[0] for row in results["meta"]["checks"]} >= {"silu", "gpt-oss", *KINDS}

    timed = [row for row in results["rows"] if "us" in row]
    assert not [row for row in results["rows"] if row.get("failed")]
    assert all(set(COLUMNS) - {"error"} <= set(row) for row in timed)
    assert {row["kind"] for row in timed} == {"forward", "step", "decode"}
    assert {"raymoe", "transformers grouped_mm", "dense GEMMs"} <= {row["backend"] for row in timed}
    # bfloat16 against float64, through three products
    assert all(0 < row["error"] < 2e-2 for row in timed if "error" in row)
    assert noise(timed) is not None

    table = read_table(tmp_path / "table.json")
    assert 4 in table["down"]["float32"]


WORKER = """
import os, sys, time
import benchmarks
from pathlib import Path
from raymoe.benchmarks.kernel_jobs import Journal, run_pieces

journal = Journal(Path(sys.argv[1]))

def work(name):
    journal.add({"check": name, "ok": True})
    if name == "raises":
        raise ValueError("too many registers")
    if name == "outer":
        for inner in ("outer/crashes", "outer/fine"):
            if inner not in journal.fatal():
                with journal.piece(inner, {"check": inner}):
                    if inner == "outer/crashes":
                        os.abort()
                    journal.add({"check": inner, "ok": True})
    if name == "hangs":
        time.sleep(60)

run_pieces(journal, ["first", "raises", "outer", "hangs", "last"], work, lambda name: {"check": name}, float(sys.argv[2]))
"""


def supervised(folder: Path, deadline: float) -> list[dict]:
    journal = Journal(folder / "checks.jsonl")
    (folder / "worker.py").write_text(WORKER)
    supervise(
        [sys.executable, str(folder / "worker.py"), str(folder / "checks.jsonl"), str(deadline)],
        journal,
        lambda name: {"check": name},
        deadline=deadline,
        stall_s=1.5,
        environment={"PYTHONPATH": str(ROOT)},
        log=folder / "log",
    )
    return journal.rows()


def test_no_piece_takes_the_others_down(tmp_path):
    rows = supervised(tmp_path, time.time() + 60)
    failed = {row["check"]: row["note"] for row in rows if row.get("failed")}
    assert failed.keys() == {"raises", "outer/crashes", "hangs"}
    assert failed["raises"] == "ValueError: too many registers"
    assert "code -6" in failed["outer/crashes"]
    assert "nothing new" in failed["hangs"]
    assert {"first", "outer/fine", "last"} <= {row["check"] for row in rows if row.get("ok")}


def test_no_piece_begins_after_the_deadline(tmp_path):
    rows = supervised(tmp_path, time.time() - 1)
    assert [row["note"] for row in rows] == ["no time left"] * 5
    assert all(row["skipped"] for row in rows)


def test_summary_reads_the_rows_it_needs():
    def row(backend: str, us: float, kind: str = "forward") -> dict:
        return {"shape": "qwen3-30b", "tokens": 32768, "kind": kind, "backend": backend, "us": us, "tflops": 2474 / us}

    decode = {"shape": "olmoe", "tokens": 64, "kind": "decode", "backend": "raymoe", "active_experts": 64.0}
    times = [row("raymoe", 4.5), row("liger", 9.0), {**decode, "us": 210.0, "tflops": 1.0}]
    found = {r["target"]: r for r in summary([{"check": "a", "ok": True}, {"check": "b", "failed": True}], times)}
    assert found["checks that hold, of 2"]["reached"] == "not reached"
    assert found["qwen3-30b 32768 forward, TFLOP/s"]["reached"] == "reached"
    assert found["qwen3-30b 32768 step, TFLOP/s"]["reached"] == "not measured"
    assert found["qwen3-30b 32768 forward, times liger"]["found"] == 2.0
    # 189 us is what the weights take at 4.3 TB/s
    assert found["olmoe 64 decode, share of 4.3 TB/s"]["found"] == pytest.approx(189 / 210, abs=0.01)


def test_plan_covers_what_the_targets_need():
    cells = planned_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.shape.name for cell in cells} == SHAPES.keys() - {"toy"}
