"""Training checkpoints with real files and real ranks."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from raymoe.config.checkpoint import CheckpointConfig
from raymoe.config.load import parse_config
from raymoe.training import checkpoint_storage
from raymoe.training.checkpoint import (
    Checkpointer,
    SaveError,
    latest,
    load,
    read_common,
    resume_path,
)
from tests.training.checkpoint_states import ALL, State, alone, kept_by, load_alone, newest, save_alone, value
from tests.training.ranks import run_ranks

# as the module sets it; pytest starts from its own filters
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save_on(join, rank, folder, keeps, seed):
    world = join()
    checkpointer = Checkpointer(folder, rank=rank, size=world.size, group=None)
    checkpointer.save(seed, State(seed, keeps[rank], rank))
    checkpointer.close()


def load_on(join, rank, path, keeps):
    world = join()
    state = State(None, keeps[rank], rank)
    found = load(path, state, rank=rank, size=world.size, group=world.dense)
    return found, state.is_that_of(found.step, own=found.own_restored), bool(state.own()["rng"].any())


SAVED_OWNERS = [[0, 1, 2, 2, 1], [2, 2, 2, 2, 1]]


@pytest.fixture(scope="module")
def saved_by_three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    run_ranks(3, save_on, folder, [kept_by(SAVED_OWNERS, rank) for rank in range(3)], 7)
    return newest(folder)


@pytest.mark.parametrize("owners", [[[0] * 5] * 2, [[1, 1, 0, 1, 0], [1] * 5], [[2, 0, 0, 1, 2], [1, 0, 1, 0, 1]]])
def test_loads_on_any_number_of_ranks(saved_by_three, owners):
    size = 1 + max(map(max, owners))
    results = run_ranks(size, load_on, saved_by_three, [kept_by(owners, rank) for rank in range(size)])
    for found, is_same, has_own in results:
        assert (found.step, found.saved_size, is_same) == (7, 3, True)
        assert found.own_restored == has_own == (size == 3)
        assert list(found.own) == (["rng"] if size == 3 else [])


def test_layout_and_common(saved_by_three):
    assert saved_by_three.name == "step-00000007"
    assert sorted(path.name for path in saved_by_three.parent.iterdir()) == ["step-00000007", "writer.lock"]
    common = read_common(saved_by_three)
    assert (common["step"], common["history"]) == (7, [{"mean": 0.1 + 0.2}, None])
    np.testing.assert_array_equal(common["owners"], np.arange(6).reshape(2, 3))


def test_replicas_and_dense_tensors_are_saved_once(tmp_path):
    first, others = ALL[:6], ALL[4:]
    run_ranks(2, save_on, tmp_path, [first, others], 3)
    path = newest(tmp_path)
    state = State(3, ALL)
    # each rank saves its own tensors too
    expected = sum(tensor.nbytes for tensor in state.tensors().values()) + state.own()["rng"].nbytes
    assert sum(file.stat().st_size for file in path.glob("tensors-*.bin")) == expected
    for found, is_same, _ in run_ranks(2, load_on, path, [others, first]):
        assert is_same
        assert found.own_restored


def shard_and_save(join, rank, folder):
    world = join()
    mesh = init_device_mesh("cpu", (world.size,))
    state = State(2, ALL if rank == 0 else [], rank)
    for name in ("master/attention", "step", "none"):
        placements = [Shard(0)] if name == "master/attention" else None
        state._dense[name] = distribute_tensor(state._dense[name], mesh, placements)
    checkpointer = Checkpointer(folder, rank=rank, size=world.size, group=world.dense)
    checkpointer.save(2, state)
    state._dense["master/attention"].zero_()
    checkpointer.close()


def load_sharded(join, rank, path, dim):
    world = join()
    mesh = init_device_mesh("cpu", (world.size,))
    state = State(None, ALL, rank)
    expected = value("master/attention", state._dense["master/attention"], 2)
    state._dense["master/attention"] = distribute_tensor(state._dense["master/attention"], mesh, [Shard(dim)])
    load(path, state, rank=rank, size=world.size, group=None)
    return torch.equal(state._dense["master/attention"].full_tensor(), expected)


def test_sharded_dense_tensors(tmp_path):
    run_ranks(3, shard_and_save, tmp_path)
    assert load_alone(newest(tmp_path)).is_that_of(2, own=False)
    assert run_ranks(2, load_sharded, latest(tmp_path), 0) == [True, True]
    assert run_ranks(2, load_sharded, latest(tmp_path), 1) == [True, True]


def save_unequal(join, rank, folder, what):
    world = join()
    state = State(1, ALL[: 4 + rank])
    if what == "dense" and rank == 1:
        state._dense["extra"] = torch.zeros(3)
    if what == "common":
        common = state.common() | {"loss": rank}
        state.common = lambda: common
    checkpointer = Checkpointer(folder, rank=rank, size=world.size, group=None)
    checkpointer.save(1, state)
    with pytest.raises(SaveError) as error:
        checkpointer.wait()
    checkpointer.close()
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("dense", "dense() must be equal on all ranks; ranks 0 and 1 differ in extra"),
        ("common", "common() must be equal on all ranks; ranks 0 and 1 differ in loss"),
    ],
)
def test_ranks_that_differ_are_told(tmp_path, what, text):
    for message in run_ranks(2, save_unequal, tmp_path, what):
        assert text in message
    assert [path.name for path in tmp_path.iterdir()] == ["writer.lock"]


# behind the training's back


def test_what_is_saved_is_the_state_at_the_call(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = checkpoint_storage._write

    def held(*args):
        assert may_write.wait(30)
        return write(*args)

    monkeypatch.setattr(checkpoint_storage, "_write", held)
    checkpointer = alone(tmp_path)
    state = State(5, ALL)
    checkpointer.save(5, state)
    assert latest(tmp_path) is None
    for tensor in state.tensors().values():
        tensor.detach().fill_(1)
    may_write.set()
    checkpointer.wait()
    assert load_alone(newest(tmp_path)).is_that_of(5)
    checkpointer.save(6, State(6, ALL[:7]))
    checkpointer.save(7, State(7, ALL))
    checkpointer.close()
    assert load_alone(newest(tmp_path)).is_that_of(7)


# one folder, one run


def test_retention(tmp_path):
    save_alone(tmp_path, 1, 5, 9, 12, keep=2)
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-00000009", "step-00000012"]
    with pytest.raises(ValueError, match="keep: at least 1"):
        alone(tmp_path, keep=0)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    checkpointer = alone(tmp_path)
    with pytest.raises(
        ValueError, match=rf"another run is writing checkpoints here \(host .*, process {os.getpid()}\)"
    ):
        alone(tmp_path)
    checkpointer.save(10, State(10, ALL))
    checkpointer.close()
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run, up to step-00000010"):
        resume_path(tmp_path, "never")
    assert resume_path(tmp_path, "latest") == latest(tmp_path)
    assert resume_path(tmp_path / "new", "latest") is resume_path(tmp_path / "new", "never") is None
    with pytest.raises(ValueError, match=r"step 10 cannot be saved: the checkpoint of step 10 is there already"):
        save_alone(tmp_path, 10)


def test_a_run_takes_the_folder_from_its_own_rank_that_hangs(tmp_path):
    hangs = alone(tmp_path, run="one")
    with pytest.raises(ValueError, match=r"another run is writing .*, run one\)"):
        alone(tmp_path, run="two")
    anew = alone(tmp_path, run="one")
    anew.save(10, State(10, ALL))
    anew.wait()
    with pytest.raises(ValueError, match=r"another run is writing .*, run one\)"):
        alone(tmp_path, run="two")
    # what it lets go of at last is no longer the lock
    hangs.close()
    with pytest.raises(ValueError, match=r"another run is writing .*, run one\)"):
        alone(tmp_path)
    anew.close()
    alone(tmp_path, run="two").close()


def test_a_run_that_goes_back_replaces_what_it_left(tmp_path):
    save_alone(tmp_path, 10, 20, 30)
    checkpointer = alone(tmp_path, resumed_step=10)
    checkpointer.save(20, State(99, ALL))
    checkpointer.close()
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-00000010", "step-00000020"]
    assert load_alone(newest(tmp_path)).is_that_of(99)


def test_configuration():
    assert parse_config(CheckpointConfig, {"folder": "x", "resume": "never"}).resume == "never"
    assert parse_config(CheckpointConfig, {"folder": "x", "resume": "x/step-00000003"}).resume == Path(
        "x/step-00000003"
    )
    with pytest.raises(ValueError, match="every_steps"):
        parse_config(CheckpointConfig, {"every_steps": 0})
    with pytest.raises(ValueError, match="no folder is given"):
        parse_config(CheckpointConfig, {"resume": "never"})
