"""The commands about a run, on a real one: `raymoe train` that dies with all its processes, and goes on with `--resume`."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import yaml

from raymoe.training.checkpoint import latest
from tests.actors.conftest import tiny_tree
from tests.actors.elastic.leftovers import training
from tests.actors.elastic.runs import ELASTIC, PATIENCE_S, TOLERANCE, raymoe

EVERY, MORE = 10, 15


def wait(is_so, process):
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert process.poll() is None, "raymoe train has ended"
        assert time.monotonic() < end
        time.sleep(0.2)


def logged(folder):
    """Loss by step, as the run's own log has them; a later line wins."""
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if line["kind"] == "step"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_is_watched_changed_killed_and_resumed(cluster, tmp_path, undisturbed):
    checkpoints, config = tmp_path / "checkpoints", tmp_path / "train.yaml"
    changes = ELASTIC | {"checkpoint": {"folder": str(checkpoints), "every_steps": EVERY}}
    config.write_text(yaml.safe_dump(tiny_tree(tmp_path, **changes)))
    env = os.environ | {"RAY_ADDRESS": cluster.address, "COLUMNS": "160"}
    train = [sys.executable, "-m", "raymoe", "train", str(config)]
    printed = (tmp_path / "printed.txt").open("w")
    first = subprocess.Popen(train, env=env, stdout=printed, stderr=subprocess.STDOUT)

    def status():
        raymoe(cluster, "status", "--json", str(tmp_path / "status.json"))
        [row] = json.loads((tmp_path / "status.json").read_text())["rows"]
        return row

    def has_workers(number):
        return lambda: len(status()["workers"]) == number

    wait(lambda: latest(checkpoints) is not None, first)
    found = status()
    assert found["failure"] is None
    assert found["tokens_per_s"] > 0
    assert [worker["rank"] for worker in found["workers"]] == [0, 1, 2]
    assert sum(worker["experts"] for worker in found["workers"]) == 2 * 8
    assert all(worker["snapshot_step"] <= found["next_step"] for worker in found["workers"])

    raymoe(cluster, "scale", "2")
    wait(has_workers(2), first)
    found = status()
    assert (found["min"], found["max"], found["epoch"]) == (1, 2, 1)
    assert "left, its experts stayed; 2 workers" in found["events"][0]

    node = found["workers"][1]["node"]
    watching = subprocess.Popen(
        [sys.executable, "-m", "raymoe", "status", "--watch"], env=env, stdout=subprocess.PIPE, text=True
    )
    raymoe(cluster, "drain", node)
    wait(lambda: len(there := status()["workers"]) and node not in {each["node"] for each in there}, first)
    # who drains leaves with as many as are wanted taken in elsewhere
    wait(has_workers(2), first)

    # all of it, at one blow
    first.kill()
    for pid in training():
        if pid != watching.pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    first.wait()
    shown, _ = watching.communicate(timeout=PATIENCE_S)
    assert watching.returncode == 0
    assert "joined; 2 workers" in shown

    before = logged(tmp_path)
    newest = latest(checkpoints)
    assert newest is not None
    goes_on = int(newest.name.partition("-")[2])
    assert goes_on >= EVERY
    raymoe(cluster, "train", str(config), "--resume", f"steps={goes_on + MORE}", timeout_s=2 * PATIENCE_S)
    after = logged(tmp_path)
    # what was done just before the kill may not have been logged any more
    assert {*before, *range(goes_on, goes_on + MORE)} == set(after)
    losses = undisturbed.losses(max(after) + 1)
    assert after == pytest.approx({step: losses[step] for step in after}, rel=TOLERANCE)
