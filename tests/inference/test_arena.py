"""One copy of the experts for several processes, whole for all of them, and gone with the last."""

import dataclasses
import os
import pickle
import signal
import sys
import warnings

import pytest
import torch

from raymoe.config.precision import Precision
from raymoe.inference.arena import ArenaError, ArenaTier
from raymoe.inference.tiers import CheckpointTier, NotHeld, Tiers
from raymoe.models import expert_parameters, load_without_experts, moe_layers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files in memory are Linux's")
MIB = 2**20


@pytest.fixture
def model(saved_model):
    """(layers, the files as a tier, [experts of a layer, flat])"""
    model, path = saved_model("olmoe")
    _, files = load_without_experts(path, torch.float32)
    flat = []
    for layer in moe_layers(model):
        flat.append(torch.zeros(layer.num_experts, layer.layout.numel))
        layer.layout.pack(expert_parameters(layer), flat[-1])
    return files.layers, CheckpointTier(files), flat


def read(source, layer, expert, numel):
    out = torch.full((numel,), torch.nan)
    source.read(layer, expert, out)
    return out


def num_mapped() -> int:
    with open("/proc/self/maps") as file:
        return sum("raymoe-arena" in line for line in file)


def in_another_process(check) -> None:
    """Runs `check` in a fork, and wants it to be true."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_another_process_reads_what_the_maker_fills_in(model):
    layers, source, flat = model
    numel = layers[0].layout.numel
    with ArenaTier.create(layers, dtype=torch.float32) as arena:
        arena.fill(source, [(0, 3)])
        handle = pickle.loads(pickle.dumps(arena.handle))
        with ArenaTier.attach(handle, layers) as mapped:
            assert torch.equal(read(mapped, 0, 3, numel), flat[0][3])
            with pytest.raises(NotHeld, match="expert 4 of MoE layer 0"):
                read(mapped, 0, 4, numel)
            assert (mapped.num_filled, mapped.facts()["held"]) == (1, 16)
            arena.fill(source)
            assert mapped.num_filled == 16
            in_another_process(lambda: torch.equal(read(ArenaTier.attach(handle, layers), 1, 7, numel), flat[1][7]))
            assert num_mapped() == 2
    assert num_mapped() == 0


def test_a_layer_is_computed_with_as_it_lies(model):
    layers, source, flat = model
    with ArenaTier.create(layers, dtype=torch.float32) as arena:
        arena.fill(source, [(1, expert) for expert in range(8)])
        pool = arena.pool(1)
        assert torch.equal(pool, flat[1])
        assert pool.data_ptr() - arena.memory.data_ptr() == arena._place[1, 0]
        with pytest.raises(ArenaError, match="MoE layer 0 is not there as a whole and native"):
            arena.pool(0)


@pytest.mark.parametrize("precision", ["int8", "int4:32"])
def test_lossy_experts_take_less_and_come_near(precision, model):
    layers, source, flat = model
    numel = layers[0].layout.numel
    with ArenaTier.create(layers, dtype=torch.float32, precision=Precision.parse(precision)) as arena:
        arena.fill(source)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.zeros(numel, dtype=dtype)
            assert arena.read(0, 5, out) < numel * 4 / 3
            error = (out.float() - flat[0][5]).norm() / flat[0][5].norm()
            assert 0.001 < error < 0.15
        with pytest.raises(ArenaError, match="not there as a whole and native"):
            arena.pool(0)


def test_some_experts_and_the_files_for_the_rest(model):
    layers, source, flat = model
    held = [(1, 2), (0, 7), (1, 0)]
    with ArenaTier.create(layers, dtype=torch.float32, experts=held) as arena:
        arena.fill(source)
        tiers = Tiers({"arena": arena, "file": source})
        for layer in range(2):
            for expert in range(8):
                assert torch.equal(read(tiers, layer, expert, layers[0].layout.numel), flat[layer][expert])
        assert [(s.reads, s.absent) for s in tiers.stats()] == [(3, 13), (13, 0)]


def test_a_maker_that_is_killed_leaves_nothing_and_takes_nothing_away(model):
    layers, source, flat = model
    numel = layers[0].layout.numel
    there, back = os.pipe()
    child = os.fork()
    if not child:
        arena = ArenaTier.create(layers, dtype=torch.float32)
        arena.fill(source)
        os.write(back, pickle.dumps(arena.handle))
        signal.pause()
    handle = pickle.loads(os.read(there, MIB))
    mapped = ArenaTier.attach(handle, layers)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for number in (there, back):
        os.close(number)
    assert torch.equal(read(mapped, 1, 6, numel), flat[1][6])
    with pytest.raises(ArenaError, match=rf"process {child} that made it cannot be reached \(No such file"):
        ArenaTier.attach(handle, layers)
    mapped.close()
    assert num_mapped() == 0


def test_a_mapping_cannot_be_written_by_python(model):
    layers, _, _ = model
    with (
        warnings.catch_warnings(),
        ArenaTier.create(layers, dtype=torch.float32) as arena,
        ArenaTier.attach(arena.handle, layers, is_writable=True) as pinnable,
    ):
        warnings.simplefilter("error")
        with ArenaTier.attach(arena.handle, layers), open("/proc/self/maps") as file:
            modes = [line.split()[1] for line in file if "raymoe-arena" in line]
        assert sorted(modes) == ["r--s", "rw-s", "rw-s"]
        assert len(pinnable.memory) == arena.handle.num_bytes


def test_a_handle_of_something_else_is_refused(model, tmp_path):
    layers, _, _ = model
    with (
        ArenaTier.create(layers, dtype=torch.float32) as arena,
        (tmp_path / "x").open("wb") as other,
        pytest.raises(ArenaError, match="is no longer the one that made it"),
    ):
        ArenaTier.attach(dataclasses.replace(arena.handle, number=other.fileno()), layers)


def test_no_descriptor_is_left(model):
    layers, source, _ = model
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with ArenaTier.create(layers, dtype=torch.float32) as arena:
            arena.fill(source, [(0, 0)])
            forgotten = ArenaTier.attach(arena.handle, layers)
            del forgotten
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_than_there_is_and_experts_that_are_none(model, monkeypatch):
    layers, _, _ = model
    with pytest.raises(ArenaError, match="there is no expert 8 in MoE layer 0"):
        ArenaTier.create(layers, dtype=torch.float32, experts=[(0, 8)])

    def none_left(*_):
        raise OSError(28, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "posix_fallocate", none_left)
    with pytest.raises(ArenaError, match=r"no \d+ bytes of shared memory"):
        ArenaTier.create(layers, dtype=torch.float32)
    assert len(os.listdir("/proc/self/fd")) == before
