"""What is not loaded, or not saved: damaged and partial checkpoints, and states that are not whole."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymoe.training import checkpoint_folder
from raymoe.training.checkpoint import (
    CheckpointError,
    SaveError,
    latest,
    load,
    read_common,
)
from tests.training.checkpoint_states import (
    ALL,
    State,
    alone,
    load_alone,
    newest,
    save_alone,
)
from tests.training.ranks import run_ranks

# as the module sets it; pytest starts from its own filters
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


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
