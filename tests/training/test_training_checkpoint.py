"""Training checkpoints with real files and real ranks."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from raymoe.config.checkpoint import CheckpointConfig
from raymoe.config.load import parse_config
from raymoe.training import checkpoint_folder, checkpoint_storage
from raymoe.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    SaveError,
    latest,
    load,
    read_common,
    resume_path,
)
from raymoe.training.world import join_world, leave_world
from tests.training.ranks import run_ranks

# as the module sets it; pytest starts from its own filters
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LAYERS, EXPERTS, NUMEL = 2, 5, 37
KINDS = ("master", "exp_avg", "exp_avg_sq")


class State:
    """A rank's state whose every value follows from its name and `seed`; seed None: empty tensors, to be filled."""

    def __init__(self, seed: int | None, keeps: list[tuple[int, int]], rank: int = 0):
        self.seed = seed
        # two more rows than are used, as a pool with copies has
        self.pool = torch.full((len(KINDS), len(keeps) + 2, NUMEL), float("nan"))
        self._experts = {
            key: {kind: self.pool[k, row] for k, kind in enumerate(KINDS)} for row, key in enumerate(keeps)
        }
        self._dense = {
            "parameter/norm": torch.zeros(7, dtype=torch.bfloat16, requires_grad=True),
            "master/attention": torch.zeros(13, 9),
            "exp_avg/attention": torch.zeros(9, 13, dtype=torch.float64).T,
            "step": torch.zeros((), dtype=torch.int64),
            "none": torch.zeros(0, 3),
        }
        self._own = {"rng": torch.zeros(11, dtype=torch.uint8)}
        self.rank = rank
        if seed is not None:
            with torch.no_grad():
                for name, tensor in self.tensors().items():
                    tensor.copy_(value(name, tensor, seed))

    def dense(self) -> dict[str, Tensor]:
        return self._dense

    def experts(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        return self._experts

    def common(self) -> dict[str, object]:
        return {"step": self.seed, "owners": np.arange(6).reshape(2, 3), "history": [{"mean": 0.1 + 0.2}, None]}

    def own(self) -> dict[str, Tensor]:
        return self._own

    def tensors(self) -> dict[str, Tensor]:
        experts = {f"{key}{kind}": tensor for key, kinds in self._experts.items() for kind, tensor in kinds.items()}
        return self._dense | experts | {f"{name} of rank {self.rank}": tensor for name, tensor in self._own.items()}

    def is_that_of(self, seed: int, own: bool = True) -> bool:
        return all(
            torch.equal(tensor, value(name, tensor, seed))
            for name, tensor in self.tensors().items()
            if own or "of rank" not in name
        )


def value(name: str, tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1009 + seed)
    return (torch.randn(tensor.shape, generator=generator) * 50 + 100).to(tensor.dtype)


def kept_by(owners: list[list[int]], rank: int) -> list[tuple[int, int]]:
    return [(layer, expert) for layer, row in enumerate(owners) for expert, owner in enumerate(row) if owner == rank]


ALL = kept_by([[0] * EXPERTS] * LAYERS, 0)


def alone(folder: Path, **options) -> Checkpointer:
    return Checkpointer(folder, rank=0, size=1, group=None, **options)


def newest(folder: Path) -> Path:
    path = latest(folder)
    assert path is not None
    return path


def load_alone(path: Path) -> State:
    state = State(None, ALL)
    load(path, state, rank=0, size=1, group=None)
    return state


def save_alone(folder: Path, *steps: int, **options) -> None:
    checkpointer = alone(folder, **options)
    for step in steps:
        checkpointer.save(step, State(step, ALL))
    checkpointer.close()


# on ranks


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


def fill_the_disk(join, rank, folder):
    world = join()
    checkpointer = Checkpointer(folder, rank=rank, size=world.size, group=None)
    checkpointer.save(1, State(1, ALL if rank else [], rank))
    checkpointer.wait()
    checkpointer.save(2, State(2, ALL if rank else [], rank))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer.wait()
    try:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        checkpointer.save(3, State(3, ALL if rank else [], rank))
        with pytest.raises(SaveError) as error:
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # rank 0 tidies up
    left = sorted(path.name for path in folder.iterdir() if rank == 0)
    checkpointer.save(4, State(4, ALL if rank else [], rank))
    checkpointer.close()
    return str(error.value), left


def test_no_room_leaves_the_last_good_one(tmp_path):
    # a limit on the size of files is the full disk that needs no privileges: a write fails in the middle of a file
    (message, left), (other_message, _) = run_ranks(2, fill_the_disk, tmp_path)
    assert f"{tmp_path}: saving step 3 failed: rank 1: [Errno 27] File too large" in message
    assert message == other_message
    assert left == ["step-00000001", "step-00000002", "writer.lock"]
    assert load_alone(newest(tmp_path)).is_that_of(4, own=False)


# killed in the middle


def slow_rank(rank, folder, pipe):
    world = join_world(f"file://{folder}/world", rank, 2, timeout_s=60)
    checkpointer = Checkpointer(folder / "checkpoints", rank=rank, size=world.size, group=None)
    keeps = [ALL[:5], ALL[5:]][rank]
    checkpointer.save(1, State(1, keeps, rank))
    checkpointer.wait()
    write = checkpoint_storage._write

    def stuck(file, *args):
        result = write(file, *args)
        file.flush()
        if rank == 1:
            pipe.send("writing")
            time.sleep(60)
        return result

    checkpoint_storage._write = stuck
    checkpointer.save(2, State(2, keeps, rank))
    if rank == 0:
        pipe.recv()
        leave_world()
    with pytest.raises(SaveError) as error:
        checkpointer.close()
    pipe.send(str(error.value))


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stuck"])
def test_a_lost_rank_spoils_nothing(tmp_path, killed):
    context = multiprocessing.get_context("spawn")
    folder = tmp_path / "checkpoints"
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [context.Process(target=slow_rank, args=(r, tmp_path, pipes[r][1])) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        assert pipes[1][0].poll(60)
        if killed:
            ranks[1].kill()
        pipes[0][0].send("leave")
        assert pipes[0][0].poll(20), "rank 0 is free"
        assert f"{folder}: saving step 2 failed: " in pipes[0][0].recv()
        ranks[0].join(20)
        assert ranks[0].exitcode == 0
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert load_alone(newest(folder)).is_that_of(1, own=False)
    save_alone(folder, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000003", "writer.lock"]


class Crash(BaseException):
    pass


@pytest.mark.parametrize("resumed_step", [None, 10])
def test_a_crash_at_any_operation_leaves_a_good_one(tmp_path, monkeypatch, resumed_step):
    """Replaces step 20 (a run that went back to 10), or adds it, with one checkpoint kept; dies at the n-th operation."""
    before = tmp_path / "before"
    save_alone(before, 10)
    if resumed_step is not None:
        save_alone(before, 20)
    number = 0
    for number in range(100):
        folder = shutil.copytree(before, tmp_path / str(number))
        operations = 0
        with monkeypatch.context() as patch:
            # nothing is lost with the process but what it has not done: synchronising is only a moment to die at
            patch.setattr(os, "fsync", lambda _: None)

            def dying(function, number=number):
                def call(*args, **kwargs):
                    nonlocal operations
                    operations += 1
                    # the dead do not tidy up either
                    if operations > number:
                        raise Crash
                    return function(*args, **kwargs)

                return call

            checkpointer = alone(folder, keep=1, resumed_step=resumed_step)
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (os, "rmdir"), (os, "unlink")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            checkpointer.save(20, State(21, ALL))
            has_crashed = False
            try:
                checkpointer.wait()
            except (Crash, SaveError):
                has_crashed = True
        # the system frees the lock of the dead
        assert checkpointer._lock is not None
        checkpointer._lock.release()
        found = newest(folder)
        state = load_alone(found)
        was_replaced = read_common(found)["step"] == 21
        assert state.is_that_of(21 if was_replaced else 20 if resumed_step else 10)
        save_alone(folder, 30)
        assert load_alone(newest(folder)).is_that_of(30)
        assert not list(folder.glob(".*"))
        if not has_crashed:
            break
    assert number > 8, "all operations of a save were seen"


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


# what is refused


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_alone(folder, 4)
    return newest(folder)


@pytest.fixture
def copy_of_good(good, tmp_path):
    return shutil.copytree(good, tmp_path / good.name)


def where(path: Path, key: str) -> tuple[Path, int, int]:
    """File, offset and bytes of a tensor."""
    metadata = pickle.loads((path / "metadata.pickle").read_bytes())
    (stored,) = [stored for index, stored in metadata.storage_data.items() if index.fqn == key]
    return path / stored[0], stored[1], stored[2]


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 0x10
    file.write_bytes(content)


def test_a_flipped_byte_is_named(copy_of_good):
    file, offset, num_bytes = where(copy_of_good, "experts/1/3/exp_avg")
    flip(file, offset + num_bytes - 1)
    assert latest(copy_of_good.parent) == copy_of_good
    with pytest.raises(CheckpointError, match=r"tensors-00000.bin: damaged: .* tensor experts/1/3/exp_avg does not"):
        load_alone(copy_of_good)


@pytest.mark.parametrize("name", ["tensors-00000.bin", "metadata.pickle", "common.json", "common.npz"])
def test_truncated_and_missing_files_are_named(copy_of_good, name):
    file = copy_of_good / name
    num_bytes = file.stat().st_size
    os.truncate(file, num_bytes - 1)
    with pytest.raises(CheckpointError, match=f"{name}: truncated: {num_bytes - 1} bytes, {num_bytes} were written"):
        load_alone(copy_of_good)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load_alone(copy_of_good)
    assert latest(copy_of_good.parent) is None


def test_partial_and_unknown_manifests(copy_of_good):
    file = copy_of_good / "manifest.json"
    content = json.loads(file.read_text()) | {"format": 2}
    del content["crc32"]
    content["crc32"] = checkpoint_folder._crc32(content)
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"format 2; this version of raymoe reads format 1"):
        load_alone(copy_of_good)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match=r"manifest.json: damaged"):
        load_alone(copy_of_good)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint: manifest.json is missing"):
        read_common(copy_of_good)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_flipped_byte_goes_unnoticed(good, tmp_path, data):
    path = shutil.copytree(good, tmp_path / "copy", dirs_exist_ok=True)
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    flip(file, data.draw(st.integers(0, file.stat().st_size - 1)))
    with pytest.raises(CheckpointError, match=file.name):
        load_alone(path)


def test_another_model_is_refused(good):
    def refused(state: State, text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            load(good, state, rank=0, size=1, group=None)
        assert state.pool.isnan().all(), "nothing is filled"

    refused(
        State(None, [*ALL, (2, 0)]), r"does not hold experts/2/0/master, experts/2/0/exp_avg, .*: it is partial, or of"
    )
    refused(State(None, ALL[:-1]), r"holds experts/1/4/exp_avg, .*, which this run does not have")
    state = State(None, ALL)
    state._dense["master/attention"] = torch.zeros(13, 8)
    refused(
        state, r"dense/master/attention is torch.float32 \[13, 8\] in this run, but torch.float32 \[13, 9\] in the ch"
    )
    state._dense["master/attention"] = torch.zeros(13, 9, dtype=torch.bfloat16)
    refused(state, r"dense/master/attention is torch.bfloat16 .* but torch.float32")


def load_with_damage(join, rank, path):
    world = join()
    state = State(None, ALL[:5] if rank else ALL[5:], rank)
    with pytest.raises(CheckpointError) as error:
        load(path, state, rank=rank, size=world.size, group=None)
    return str(error.value)


def test_damage_that_one_rank_meets_is_an_error_on_all(copy_of_good):
    file, offset, _ = where(copy_of_good, "experts/0/2/master")
    flip(file, offset)
    messages = run_ranks(2, load_with_damage, copy_of_good)
    assert messages[0] == messages[1]
    assert "experts/0/2/master" in messages[0]


def test_a_state_that_is_not_whole_is_not_saved(tmp_path):
    checkpointer = alone(tmp_path)
    checkpointer.save(1, State(1, [*ALL[:3], ALL[4]]))
    with pytest.raises(SaveError, match=r"saving step 1 failed: no rank keeps experts/0/3/exp_avg"):
        checkpointer.close()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"a": {"b": [0, {1, 2}]}}, r"common\.a\.b\[1\]: set cannot be saved"),
        ({"a": {3: 1}}, r"common\.a: key 3 cannot be saved; keys must be strings"),
        ({"a": np.array([None])}, r"common\.a: ndarray of object cannot be saved"),
    ],
)
def test_common_values_that_cannot_be_saved(tmp_path, values, text):
    state = State(1, ALL)
    state.common = lambda: values
    checkpointer = alone(tmp_path)
    with pytest.raises(ValueError, match=text):
        checkpointer.save(1, state)
    checkpointer.close()


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
