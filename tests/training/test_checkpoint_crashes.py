"""Checkpoints that do not come about: no room, ranks that die or hang, a crash at any operation."""

import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path

import pytest

from raymoe.training import checkpoint_storage
from raymoe.training.checkpoint import (
    Checkpointer,
    SaveError,
    read_common,
)
from raymoe.training.world import join_world, leave_world
from tests.training.checkpoint_states import ALL, State, alone, load_alone, newest, save_alone
from tests.training.ranks import run_ranks

# as the module sets it; pytest starts from its own filters
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


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
