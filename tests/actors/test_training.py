"""A training run in Ray actors, on a cluster of its own."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymoe.actors import WorkerGroup, WorkersFailed, ray_session
from raymoe.models import moe_layers
from raymoe.placement import overlap_degree
from raymoe.telemetry import read_trace


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_session(min_cpus=4, own=True, dashboard=False):
        yield


def living_actors() -> int:
    from ray._private.state import actors

    return sum(actor["State"] == "ALIVE" for actor in actors().values())


def test_two_workers_train_save_and_leave_a_trace(job, tmp_path):
    this = job(experts={"policy": "fssdp-paper"})
    with WorkerGroup(this) as group:
        group.start()
        steps = list(group.train())
        group.save(tmp_path / "checkpoint")
        states = group.states()
        published = group.publication()

    assert [step.step for step in steps] == list(range(12))
    assert steps[-1].loss < steps[0].loss - 0.5
    # what was measured was published once and applied: copies are made after it, none before
    assert published.is_measured
    assert steps[0].copies == 0
    measured = published.cluster, published.workload
    degree = overlap_degree(measured[1].attention_ns, measured[0].budget_bytes_s, measured[1].expert_bytes)
    assert (steps[-1].copies > 0) == (degree > 0)
    assert measured[0].num_devices == 2
    assert min(measured[0].flops_s, measured[0].latency_ns, measured[1].attention_ns) > 1
    assert all(state.kernel_calls == {"torch": 24} for state in states)
    assert [state.owned_experts for state in states] == [(4, 4), (4, 4)]

    traces = [read_trace(this.folder / "trace" / f"rank-{rank}.parquet") for rank in range(2)]
    rows = sum(trace["counts"].reshape(12, 2, 8) for trace in traces)
    assert np.array_equal(rows, [step.loads for step in steps])
    assert (rows.sum(axis=2) == 6 * 16 * 2).all()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert len(moe_layers(model)) == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint").eos_token == "<|endoftext|>"
    assert living_actors() == 0


def test_the_triton_kernels_run_inside_the_actors(job):
    env = {"RAYMOE_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    runs = {}
    for backend, changes in {"triton": {"env": env}, "torch": {}}.items():
        with WorkerGroup(job(steps=1, batch=2, **changes)) as group:
            group.start()
            runs[backend] = [step.loss for step in group.train()], [state.kernel_calls for state in group.states()]
    assert runs["triton"][1] == [{"triton": 2}, {"triton": 2}]
    assert runs["torch"][1] == [{"torch": 2}, {"torch": 2}]
    assert runs["triton"][0] == pytest.approx(runs["torch"][0], rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{"lora": {"rank": 2, "experts": True}}, {"dense": "sharded"}], ids=["lora", "sharded"]
)
def test_other_ways_to_train(job, changes):
    with WorkerGroup(job(steps=5, snapshots={"every": 2}, **changes)) as group:
        group.start()
        assert [step.step for step in group.train()] == list(range(5))
        assert all(state.snapshot_step is not None for state in group.states())


def test_a_failing_worker_is_told_from_those_it_takes_along(job):
    this = job(steps=50)
    # rank 1 alone cannot write its trace
    (this.folder / "trace").mkdir()
    (this.folder / "trace" / "rank-1.parquet.partial").mkdir()
    with WorkerGroup(this) as group:
        group.start()
        with pytest.raises(WorkersFailed, match=r"worker 1 failed: IsADirectoryError: .*rank-1\.parquet") as caught:
            list(group.train())
    assert "Connection closed" not in str(caught.value)


def test_no_room_says_what_is_asked_and_what_is_free(job):
    asked = job(workers=3, worker_cpus=4, worker_timeout_s=3)
    with (
        WorkerGroup(asked) as group,
        pytest.raises(WorkersFailed, match=r"3 workers could not be placed within 3 s\. They need 4"),
    ):
        group.start()
    assert living_actors() == 0
