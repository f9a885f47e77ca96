"""One arena for the engines of a node: found, shared, filled on after a death, and gone with the last."""

import gc
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from raymoe.config import ServeConfig
from raymoe.config.precision import Precision
from raymoe.inference import InferenceEngine, SamplingParams
from raymoe.inference.memory_file import find_existing
from raymoe.inference.node_arena import shared_arena
from raymoe.inference.opening import open_model
from raymoe.inference.precision_file import PrecisionWriter
from raymoe.models import load_without_experts
from tests.inference.conftest import random_prompts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files in memory are Linux's")
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=())
PROMPTS = random_prompts([5, 9, 3])


def engine_of(path, **options) -> InferenceEngine:
    return InferenceEngine(path, max_batch_tokens=64, kv_tokens=1024, device="cpu", **options)


def arenas() -> set[int]:
    """Inodes of those that processes have open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link).startswith("/memfd:raymoe-arena-"):
                found.add(link.stat().st_ino)
    return found


@pytest.fixture
def none_before():
    gc.collect()
    assert not arenas()
    yield
    gc.collect()
    assert not arenas()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("precision", ["native", "int8", "int4:32"])
def test_engines_share_it_and_tokens_stay(saved_model, tmp_path, none_before, family, precision):
    path = shutil.copytree(saved_model(family)[1], tmp_path / "model")
    if precision != "native":
        _, files = load_without_experts(path, torch.float32)
        with PrecisionWriter(path, files, Precision.parse(precision)) as writer:
            writer.write()
            writer.finish({"relative_error": [0.1], "held_out": None})
    with engine_of(path, expert_memory="100%", expert_precision=precision) as alone:
        wanted = alone.generate(PROMPTS, GREEDY)
    with engine_of(path, expert_precision=precision, arena=True) as first:
        with engine_of(path, expert_precision=precision, arena=True) as second:
            assert len(arenas()) == 1
            assert second.generate(PROMPTS, GREEDY) == wanted
        assert first.generate(PROMPTS, GREEDY) == wanted
        stats = first.stats()
        assert stats["misses"] == 0
        assert stats["resident_experts"] == stats["num_experts"] == stats["arena"]["filled"]
        with pytest.raises(ValueError, match="computes with the node's arena"):
            first.set_expert_memory("50%")


def test_it_is_counted_once(saved_model, none_before, monkeypatch):
    asked = []
    monkeypatch.setattr("raymoe.inference.arena.check_fits", lambda what, num_bytes: asked.append(num_bytes))
    monkeypatch.setattr("raymoe.inference.cache.check_fits", lambda *_, **__: asked.append("slots"))
    with engine_of(saved_model("olmoe")[1], arena=True) as first, engine_of(saved_model("olmoe")[1], arena=True):
        assert asked == [first.stats()["arena"]["num_bytes"]]


class _Slow:
    """A source that dies, or waits, after some experts."""

    def __init__(self, source, after, then):
        self.source, self.left, self.then = source, after, then

    def read(self, layer, expert, out):
        if not self.left:
            self.then()
        self.left -= 1
        return self.source.read(layer, expert, out)


def _hold(opened, after, is_held) -> None:
    source = _Slow(opened.tiers["file"], after, _die)
    arena = shared_arena(opened.files.fingerprint(), Precision(), opened.form, source)
    is_held.set()
    time.sleep(60)
    arena.close()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_maker_that_is_killed_leaves_it_to_the_others(saved_model, none_before):
    opened = open_model(saved_model("olmoe")[1], torch.float32, direct_io=False, precision="native")
    fork = multiprocessing.get_context("fork")
    is_held = fork.Event()
    maker = fork.Process(target=_hold, args=(opened, -1, is_held))
    maker.start()
    assert is_held.wait(30)
    (inode,) = arenas()
    unread = _Slow(opened.tiers["file"], 0, lambda: pytest.fail("it is all there already"))
    mine = shared_arena(opened.files.fingerprint(), Precision(), opened.form, unread)
    maker.kill()
    maker.join()
    assert arenas() == {inode}
    newcomer = shared_arena(opened.files.fingerprint(), Precision(), opened.form, unread)
    assert arenas() == {inode}
    assert mine.num_filled == newcomer.num_filled == 16
    newcomer.close()
    mine.close()


def test_a_maker_that_is_killed_while_it_fills_blocks_nobody(saved_model, none_before):
    path = saved_model("olmoe")[1]
    opened = open_model(path, torch.float32, direct_io=False, precision="native")
    fork = multiprocessing.get_context("fork")
    maker = fork.Process(target=_hold, args=(opened, 3, fork.Event()))
    maker.start()
    maker.join(30)
    assert maker.exitcode == -signal.SIGKILL
    assert not arenas()
    with engine_of(path, arena=True) as engine:
        assert engine.stats()["arena"]["filled"] == 16


def test_only_the_same_experts_are_shared(saved_model, tmp_path, none_before):
    path = saved_model("olmoe")[1]
    other = saved_model("mixtral")[1]
    with engine_of(path, arena=True), engine_of(path, arena=True, dtype="float64"), engine_of(other, arena=True):
        assert len(arenas()) == 3
    assert not list(find_existing("arena-nobody", 4096))


def test_what_it_does_not_go_with(saved_model):
    path = saved_model("olmoe")[1]
    for field, value in (("expert_hosts", 2), ("num_gpus", 1), ("expert_memory", "50%")):
        with pytest.raises(ValueError, match=f"leave {field} or arena out"):
            ServeConfig(**{"model": path, "arena": True, field: value})
    assert ServeConfig(model=path, arena=True).arena
