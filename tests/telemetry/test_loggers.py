"""Loggers on real files, and on a distribution that is installed for the test."""

import json
import logging
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.config import ConfigError, TrainConfig, parse_config
from raymoe.config.logs import LogConfig
from raymoe.telemetry.loggers import RunLog, open_loggers
from raymoe.telemetry.loggers_jsonl import JsonLinesLogger

TREE = {"model": {"config": {"model_type": "olmoe"}}}


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(path):
    return [entry["step"] for entry in entries(path) if entry["kind"] == "step"]


def log_steps(path, first, last, ended=True):
    logger = JsonLinesLogger(path)
    logger.start({"next_step": first, "config": {"seed": 3}})
    for step in range(first, last):
        logger.step(step, {"train/loss": 1 / (step + 1)})
    if ended:
        logger.end({"loss": 0.5})
    return logger


def test_json_lines_hold_what_was_logged_as_it_comes(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    logger = log_steps(path, 0, 2, ended=False)
    assert steps_of(path) == [0, 1]  # before the end, without closing
    logger.event(1, "resharded", {"experts": 3})
    logger.step(2, {"train/loss": math.nan, "train/lr": 0.25})
    logger.end({"loss": math.inf, "by_part": {"experts": [1, 2.5]}})
    start, first, _, event, last, end = entries(path)
    assert start["run"]["config"] == {"seed": 3}
    assert first["train/loss"] == 1.0
    assert {key: event[key] for key in ("kind", "step", "event", "experts")} == {
        "kind": "event", "step": 1, "event": "resharded", "experts": 3,
    }  # fmt: skip
    assert last["train/loss"] is None
    assert last["train/lr"] == 0.25
    assert end["summary"] == {"loss": None, "by_part": {"experts": [1, 2.5]}}


@given(done=st.integers(1, 9), kept=st.integers(1, 9), torn=st.integers(0, 60))
def test_a_run_that_goes_on_has_every_step_once(tmp_path_factory, done, kept, torn):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    log_steps(path, 0, done, ended=False).event(done, "checkpoint", {})
    if torn:
        path.write_bytes(path.read_bytes()[:-torn])
    before = [step for step in range(done) if f'"step": {step},' in path.read_text().rpartition("\n")[0]]
    log_steps(path, kept, kept + 3)
    assert steps_of(path) == [step for step in before if step < kept] + [kept, kept + 1, kept + 2]
    assert all(entry["step"] < kept for entry in entries(path) if entry["kind"] == "event")
    assert list(path.parent.iterdir()) == [path]


def test_a_run_from_the_beginning_starts_a_new_file(tmp_path):
    log_steps(tmp_path / "log.jsonl", 0, 5)
    log_steps(tmp_path / "log.jsonl", 0, 2)
    assert steps_of(tmp_path / "log.jsonl") == [0, 1]


@pytest.mark.parametrize("line", ["{broken\n", "[1, 2]\n", '{"step": "x"}\n'])
def test_a_foreign_file_is_left_as_it_is(tmp_path, line):
    path = tmp_path / "log.jsonl"
    log_steps(path, 0, 2)
    content = path.read_text() + line + '{"kind": "end"}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=r"log\.jsonl, line 5: not an entry of a run's log"):
        JsonLinesLogger(path).start({"next_step": 2})
    assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


class Failing:
    def __init__(self):
        self.calls = 0

    def start(self, run):
        self.calls += 1

    def step(self, number, values):
        self.calls += 1
        raise ConnectionError("service is down")

    def event(self, number, name, fields):
        self.calls += 1

    def end(self, summary):
        self.calls += 1


def test_a_logger_that_raises_is_dropped_with_one_warning(tmp_path, caplog):
    failing, jsonl = Failing(), JsonLinesLogger(tmp_path / "log.jsonl")
    with caplog.at_level(logging.WARNING, "raymoe"), RunLog([("remote", failing), ("jsonl", jsonl)]) as log:
        log.start({})
        for step in range(4):
            log.step(step, {"train/loss": 1.0})
        log.end({})
    assert [record.getMessage() for record in caplog.records] == [
        "logs: remote failed and gets no more of this run: ConnectionError: service is down"
    ]
    assert failing.calls == 2
    assert steps_of(tmp_path / "log.jsonl") == [0, 1, 2, 3]
    assert [entry["kind"] for entry in entries(tmp_path / "log.jsonl")].count("end") == 1


def test_a_run_that_breaks_off_is_ended_with_the_reason(tmp_path):
    log = open_loggers([LogConfig(name="jsonl")], tmp_path)

    def run():
        with log:
            log.start({})
            raise RuntimeError("worker 1 died")

    with pytest.raises(RuntimeError, match="worker 1 died"):
        run()
    assert entries(tmp_path / "log.jsonl")[-1]["summary"] == {"ended": "RuntimeError: worker 1 died"}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package `acme-logs` with two loggers, as pip would have left it."""
    site = tmp_path / "site"
    info = site / "acme_logs-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-logs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[raymoe.loggers]\nacme = acme_logs:Acme\nbent = acme_logs:missing\n")
    (site / "acme_logs.py").write_text(
        "class Acme:\n"
        "    made = []\n"
        "    def __init__(self, config):\n"
        "        if 'project' not in config: raise KeyError('project')\n"
        "        self.config, self.calls = config, []; Acme.made.append(self)\n"
        "    def start(self, run): self.calls.append(('start', run))\n"
        "    def step(self, number, values): self.calls.append((number, values))\n"
        "    def event(self, number, name, fields): self.calls.append((number, name, fields))\n"
        "    def end(self, summary): self.calls.append(('end', summary))\n"
    )
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("acme_logs", None)


def test_a_logger_of_another_package_is_found_by_its_entry_point(tmp_path, installed):
    config = parse_config(TrainConfig, TREE | {"logs": ["jsonl", {"name": "acme", "project": "x", "tags": ["a"]}]})
    log = open_loggers(config.logs, tmp_path)
    log.start({"next_step": 0})
    log.step(0, {"train/loss": 2.0})
    log.event(1, "measured", {"near": 1})
    log.end({"loss": 2.0})
    import acme_logs  # pyright: ignore[reportMissingImports]

    [made] = acme_logs.Acme.made
    assert made.config == {"project": "x", "tags": ["a"]}
    assert made.calls == [
        ("start", {"next_step": 0}),
        (0, {"train/loss": 2.0}),
        (1, "measured", {"near": 1}),
        ("end", {"loss": 2.0}),
    ]
    assert steps_of(tmp_path / "log.jsonl") == [0]


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ([{"name": "acme"}], r"logs: the logger 'acme' of acme-logs cannot be used: KeyError: 'project'"),
        (["bent"], r"logs: the logger 'bent' of acme-logs cannot be used: AttributeError: .*missing"),
        (["acne"], r"logs: there is no logger 'acne'; there are jsonl, tensorboard, acme, bent\. Others"),
    ],
)
def test_loggers_that_cannot_be_had_are_named(tmp_path, installed, logs, message):
    with pytest.raises(ValueError, match=message):
        open_loggers(parse_config(TrainConfig, TREE | {"logs": logs}).logs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "jsonl", "pth": "x"}, r"logs\.0: .*unknown key 'pth'; jsonl takes 'path' alone"),
        ({"name": "tensorboard", "folder": 3}, r"logs\.0: .*folder must be a path, got 3"),
        ({"project": "x"}, r"logs\.0\.name: missing; this key is required"),
        (7, r"logs\.0"),
    ],
)
def test_bad_entries_are_refused_by_key(entry, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(TrainConfig, TREE | {"logs": [entry]})


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ValueError, match=r"tensorboard is not installed; install raymoe\[tensorboard\]"):
        open_loggers([LogConfig(name="tensorboard")], tmp_path)


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    for first, last in ((0, 6), (4, 8)):
        log = open_loggers([LogConfig(name="tensorboard")], tmp_path)
        log.start({"next_step": first})
        for step in range(first, last):
            log.step(step, {"train/loss": first + step / 8})
        log.event(first + 1, "resharded", {"experts": 3})
        log.end({"loss": 1.5})
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in read.Scalars("train/loss")] == [
        (0, 0.0), (1, 0.125), (2, 0.25), (3, 0.375), (4, 4.5), (5, 4.625), (6, 4.75), (7, 4.875),
    ]  # fmt: skip
    assert set(read.Tags()["tensors"]) == {"run", "events/resharded", "summary"}
    assert b'"experts": 3' in read.Tensors("events/resharded")[-1].tensor_proto.string_val[0]
