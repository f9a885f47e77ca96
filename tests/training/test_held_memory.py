"""What the allocator holds back is given back when it has become too much."""

import os
import subprocess
import sys

import pytest

from raymoe.actors.roster import KEEP_FREED_MEMORY

STEPS = """
import torch
from raymoe.training.held_memory import HeldMemory, resident_bytes

def step(number):
    blocks = [torch.ones(1 << 20) for _ in range(number)]
    # stays, and keeps the heap from shrinking at its end
    return torch.ones(1 << 10)

memory, kept = HeldMemory(), []
for number in (10, 10, 12, 300):
    kept.append(step(number))
    grown = resident_bytes()
    memory.after_step()
print(grown, resident_bytes(), memory.num_returns)
kept.append(step(10))
memory.after_step()
memory.after_step()
print(memory.num_returns)
"""


@pytest.mark.parametrize("preloaded", [True, False], ids=["jemalloc", "glibc"])
def test_it_is_given_back_once_it_has_grown(preloaded):
    env = os.environ | {key: value for key, value in KEEP_FREED_MEMORY.items() if preloaded or key != "LD_PRELOAD"}
    done = subprocess.run([sys.executable, "-c", STEPS], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    grown, left, returns, later = map(int, done.stdout.split())
    assert returns == 1
    # 300 blocks of 4 MiB had been kept
    assert grown - left > 1_000_000_000
    assert later == 1
