"""`raymoe train` as a person and a logger see it: two small real runs, the second going on from the first."""

import io
import json
import re
from contextlib import nullcontext

import pytest
from rich.console import Console

from raymoe.actors import ray_session
from raymoe.commands.train import run_training
from raymoe.commands.train_opening import reserved_copy_bytes
from raymoe.commands.train_report import result_meta, step_rows, training_report
from raymoe.config import ConfigError, TrainConfig, parse_config
from raymoe.telemetry import write_report
from tests.actors.conftest import TINY

STEPS, EVERY, MORE = 13, 5, 4


def configuration(folder, **changes):
    (folder / "text.txt").write_text("\n\n".join(f"the {i}th line says {i % 7} times seven" for i in range(900)))
    tree = {
        "model": {"config": TINY},
        "data": {"source": str(folder / "text.txt"), "sequence_length": 16, "held_out": 0.2},
        "tokenizer": {"vocab_size": 300},
        "experts": {"policy": "fssdp-paper-rm", "reshard_every": 6, "extra_slots": 3},
        "batch": 6,
        "micro_batch": 2,
        "steps": STEPS,
        "optimizer": {"lr": 1e-2, "warmup_steps": 2, "schedule": "constant"},
        "checkpoint": {"folder": str(folder / "checkpoints"), "every_steps": EVERY},
        "env": {"SERVICE_KEY": "not-to-be-logged"},
        "output": str(folder / "run"),
    }
    return parse_config(TrainConfig, tree | changes)


def run(config):
    screen = io.StringIO()
    return run_training(
        config, Console(file=screen, width=200, force_terminal=False), nullcontext("")
    ), screen.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    with ray_session(min_cpus=4, own=True, dashboard=False):
        first = run(configuration(folder))
        log = (folder / "run" / "log.jsonl").read_text()
        with pytest.raises(
            ConfigError, match=r"steps: .*step-0*13 has 13 steps done, the run asks for 13; raise 'steps'"
        ):
            run(configuration(folder))
        assert (folder / "run" / "log.jsonl").read_text() == log
        second = run(configuration(folder, steps=STEPS + MORE))
    return folder, first, second


def line(shown, name):
    [found] = re.findall(rf"^{name} +(\S.*)$", shown, re.MULTILINE)
    return found


def test_it_says_first_what_it_chose_and_why(runs):
    _, (outcome, shown), _ = runs
    before = shown.partition("step     1/13")[0]
    told = dict(outcome.chosen)
    for name, said in told.items():
        assert f"{name:<11} {said}" in before
    assert "8 experts; a token takes 2 a layer" in told["model"]
    [number] = re.findall(r"([\d,]+) sequences of 16", told["data"])
    sequences = int(number.replace(",", ""))
    assert told["data"].endswith(f"13 steps take 78: {78 / sequences:.2f} passes over them")
    assert told["batch"] == "6 sequences a step (96 tokens) = 2 workers x 2 passes x 1.5"
    assert told["policy"].startswith("fssdp-paper-rm (as configured): ")
    assert told["m"] == "3 copies a layer at most on a worker: experts.extra_slots"
    assert told["t"] == "from costs that the first steps measure; no copies until then"
    assert told["transport"] == "p2p (by default): all workers are on one node"
    assert told["dispatch"].startswith("local (the policy's)")
    assert told["re-sharding"] == "asked every 6 steps (experts.reshard_every)"


def test_memory_is_told_by_part_with_the_copies_that_are_to_come(runs):
    _, (outcome, shown), _ = runs
    job = outcome.job
    assert re.search(r"worker.*parameters.*gradients.*optimizer.*copies.*total", shown)
    # two layers' sets of three experts of 3 x 32 x 16 float32, with their gradients
    expert_bytes = 3 * 32 * 16 * 4
    publication = job.first_publication((0, 0))
    assert reserved_copy_bytes(job, publication) == 2 * 2 * 3 * expert_bytes
    for row in outcome.memory:
        assert row["copies"] == pytest.approx(2 * 2 * 3 * expert_bytes / 1e6)
        assert row["parameters"] == row["gradients"]
        assert row["optimizer"] == pytest.approx(2 * row["parameters"], rel=0.01)
        assert row["total"] == pytest.approx(
            sum(row[part] for part in ("parameters", "gradients", "optimizer", "copies"))
        )


def test_progress_has_an_end_in_sight_and_says_what_happened(runs):
    folder, (outcome, shown), _ = runs
    progress = re.findall(r"^step +(\d+)/13 .* imbalance \S+ -> \S+ +(\d+:\d\d) left$", shown, re.MULTILINE)
    assert [int(step) for step, _ in progress] == list(range(1, 14))
    assert progress[-1][1] == "0:00"
    assert re.search(r"^measured +[\d,]+ MB/s within a node, .* attention [\d.]+ ms a layer", shown, re.MULTILINE)
    assert f"checkpoint after 13 steps: {folder / 'checkpoints' / 'step-00000013'}" in shown
    resharded = [step.step for step in outcome.steps if step.resharded]
    assert [event.step for event in outcome.events if event.name == "re-sharded"] == resharded
    assert {event.name for event in outcome.events} >= {"measured", "checkpoint"}


def test_every_step_is_logged_once_over_both_runs(runs):
    folder, (first, _), (second, _) = runs
    entries = [json.loads(each) for each in (folder / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if entry["kind"] == "step"]
    assert [entry["step"] for entry in steps] == list(range(STEPS + MORE))
    for entry, step in zip(steps, first.steps + second.steps, strict=True):
        assert entry["train/loss"] == step.loss
        assert entry["perf/step_ms"] == pytest.approx(step.step_s * 1e3)
        assert sum(entry[name] for name in entry if name.startswith("bytes/")) == sum(step.moved_bytes.values())
        assert sum(entry[name] for name in entry if name.startswith("bytes_by_link/")) == sum(step.link_bytes.values())
    starts = [entry["run"] for entry in entries if entry["kind"] == "start"]
    assert [start["next_step"] for start in starts] == [0, STEPS]
    assert starts[0]["config"]["experts"]["policy"] == "fssdp-paper-rm"
    assert "not-to-be-logged" not in json.dumps(starts)
    assert [entry["summary"]["steps"] for entry in entries if entry["kind"] == "end"] == [STEPS, STEPS + MORE]
    assert {entry["event"] for entry in entries if entry["kind"] == "event"} >= {"measured", "checkpoint", "resumed"}


def test_a_run_that_goes_on_starts_where_the_other_ended(runs):
    _, (_, _), (outcome, shown) = runs
    assert [step.step for step in outcome.steps] == list(range(STEPS, STEPS + MORE))
    assert line(shown, "goes on").startswith(f"with step {STEPS}, from ")
    assert re.findall(r"^step +(\d+)/17 ", shown, re.MULTILINE) == ["14", "15", "16", "17"]
    assert dict(outcome.chosen)["t"] == "from the costs that were measured before the checkpoint"
    assert "measured  " not in shown
    assert outcome.events[0].name == "resumed"


def test_the_report_and_json_hold_it_all(runs, tmp_path):
    _, (outcome, _), _ = runs
    write_report(tmp_path / "report.html", training_report(outcome, "raymoe train train.yaml"))
    page = (tmp_path / "report.html").read_text()
    for title in ("What happened", "What was chosen", "Bytes moved between workers", "The same by link", "Memory, MB"):
        assert f"<h2>{title}</h2>" in page
    assert "What placement costs" in page
    assert "step-00000013" in page
    meta = result_meta(outcome)
    assert 0 < meta["plan_share"] < 1
    assert 0 <= meta["exposed_share"] < 1
    assert json.loads(json.dumps(meta))["memory_mb"] == outcome.memory
    assert [row["step"] for row in step_rows(outcome.steps)] == list(range(STEPS))
