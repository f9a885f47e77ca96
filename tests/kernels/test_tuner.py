from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

import benchmarks  # noqa: F401, so that raymoe.benchmarks is found in a checkout as well
from raymoe.benchmarks.kernel_shapes import SHAPES
from raymoe.kernels import tuner
from raymoe.kernels.configs import INTERPRETED, KINDS, GemmConfig
from raymoe.kernels.gemm_cases import GemmCase, LayerKind, label, random_index
from raymoe.kernels.tuner import BUCKETS, candidates, tune

CPU = torch.device("cpu")
FAST, SLOW, WRONG, BROKEN = (GemmConfig(16, 16 * n, 16) for n in range(1, 5))
BEFORE = GemmConfig(64, 64, 64)
SECONDS = {FAST: 1e-3, SLOW: 2e-3, WRONG: 1e-6, BROKEN: 1e-6, BEFORE: 1.5e-3}


class FakeCase:
    """Runs in the time that SECONDS says, which the fake stopwatch reads."""

    flops = 1
    last: GemmConfig

    def __init__(self, kind, layer, index, generator):
        self.kind, self.layer = kind, layer

    def some_experts(self):
        return []

    def error(self, config, experts):
        if config == BROKEN:
            raise RuntimeError("out of resource: shared memory")
        return 0.5 if config == WRONG else 0.0

    def run(self, config):
        FakeCase.last = config


@pytest.fixture
def fakes(monkeypatch):
    def fake_seconds(work, device, calls=1, *, is_queued=False):
        work()
        return SECONDS[FakeCase.last]

    monkeypatch.setattr(tuner, "GemmCase", FakeCase)
    monkeypatch.setattr(tuner, "candidates", lambda kind, dtype, bucket: [WRONG, BROKEN, SLOW, FAST])
    monkeypatch.setattr(tuner, "seconds", fake_seconds)
    monkeypatch.setattr("raymoe.kernels.stopwatch.seconds", fake_seconds)
    table = {kind: {"float32": {4: BEFORE, 16: BEFORE}} for kind in KINDS}
    monkeypatch.setattr(tuner, "table_of", lambda name: table)
    return table


def run_tune(budget_s=100.0, **options):
    rows = []
    shapes = [SHAPES["toy"], SHAPES["olmoe"]]
    table = tune(shapes, torch.float32, CPU, budget_s, kinds=["down"], buckets=[4], report=rows.append, **options)
    return table, rows


def test_fastest_right_candidate_wins(fakes, caplog):
    table, rows = run_tune()
    assert table["down"]["float32"] == {4: FAST, 16: BEFORE}
    assert table["up"] == fakes["up"]
    # the table in force is left alone: a caller decides where to write
    assert fakes["down"]["float32"][4] == BEFORE
    notes = {row["config"]: row["note"] for row in rows if "us" not in row}
    assert "shared memory" in notes[label(BROKEN)]
    assert "WRONG RESULT" in notes[label(WRONG)]
    assert "WRONG RESULT" in caplog.text
    assert rows[-1]["note"] == "wins"
    assert GemmConfig(**rows[-1]["fields"]) == FAST


def test_what_was_in_force_competes(fakes, monkeypatch):
    monkeypatch.setitem(SECONDS, BEFORE, 0.5e-3)
    table, _ = run_tune()
    assert table["down"]["float32"][4] == BEFORE


def test_no_time_keeps_what_was_in_force(fakes):
    table, rows = run_tune(budget_s=-1.0)
    assert table == fakes
    assert rows == [{"kind": "down", "bucket": 4, "note": "no time left: as before", "skipped": True}]


def test_caller_can_keep_a_candidate_out(fakes):
    @contextmanager
    def trial(kind, config):
        yield config != FAST

    table, rows = run_tune(trial=trial)
    assert table["down"]["float32"][4] == BEFORE
    assert {"ended the process before"} == {row["note"] for row in rows if row.get("config") == label(FAST)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_few_and_differ(kind, dtype):
    for bucket in BUCKETS:
        found = candidates(kind, dtype, bucket)
        assert 3 <= len(found) <= 12
        assert len({label(config) for config in found}) == len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_sees_what_is_wrong(kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    case = GemmCase(kind, LayerKind(5, 40, 24, torch.float32, CPU), random_index(30, 5, 2, generator), generator)
    config, run = INTERPRETED[kind], case.run
    assert case.error(config, range(5)) < 5e-6

    def spoil(value):
        def spoiled(config):
            run(config)
            next(reversed(case.out.values())).view(-1)[-1] = value

        return spoiled

    monkeypatch.setattr(case, "run", spoil(1e3))
    assert case.error(config, range(5)) > 1e-2
    monkeypatch.setattr(case, "run", spoil(float("nan")))
    assert case.error(config, []) == float("inf")
