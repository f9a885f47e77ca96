"""Whoever started a run dies."""

import _thread
import json
import pickle
import subprocess
import sys
import threading
import time

import pytest
from transformers import AutoModelForCausalLM

from raymoe.actors import CHECKPOINT_FOLDER, WorkerGroup
from raymoe.actors.placement_controller import EVENTS_FILE
from tests.actors.elastic.runs import ELASTIC, NUM_NODES, PATIENCE_S
from tests.actors.test_training import living_actors

DRIVER = """
import sys, time, pickle, ray
from raymoe.actors import WorkerGroup
ray.init(address=sys.argv[1], namespace="raymoe", log_to_driver=False)
job = pickle.load(open(sys.argv[2], "rb"))
with WorkerGroup(job) as group:
    group.start()
    for step in group.train():
        print(step.step, flush=True)
"""


@pytest.mark.parametrize("detached", [False, True])
def test_the_driver_dies(cluster, job, tmp_path, detached):
    path = tmp_path / "job.pickle"
    asked = job(**ELASTIC | {"workers": 2, "steps": 60 if detached else 100_000, "detached": detached})
    path.write_bytes(pickle.dumps(asked))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.address, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "0\n"
    driver.kill()
    driver.wait()
    end = time.monotonic() + (PATIENCE_S if detached else 30)
    while living_actors() and time.monotonic() < end:
        time.sleep(0.2)
    assert living_actors() == 0
    checkpoint = asked.folder / CHECKPOINT_FOLDER
    assert checkpoint.is_dir() == detached
    if detached:
        told = [json.loads(line) for line in (asked.folder / EVENTS_FILE).read_text().splitlines()]
        assert [event["step"] for event in told if event["kind"] == "saved"] == [60]
        assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() == asked.total_parameters


@pytest.mark.slow
def test_interrupted_while_it_waits_for_its_workers(cluster, job):
    # three have a place, and are there to be left behind
    asked = job(**ELASTIC | {"workers": NUM_NODES + 2})

    def interrupt():
        end = time.monotonic() + PATIENCE_S
        # they and the controller
        while living_actors() <= NUM_NODES and time.monotonic() < end:
            time.sleep(0.2)
        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), WorkerGroup(asked) as group:
        group.start()
