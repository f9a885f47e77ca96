"""Sizes that differ from step to step do not make a process grow without end."""

import os
import subprocess
import sys

from raymoe.actors.roster import KEEP_FREED_MEMORY

STEPS = """
import random, sys, torch
from raymoe.training.held_memory import HeldMemory, resident_bytes
torch.set_num_threads(1)
rng, memory, most = random.Random(0), HeldMemory(), 0
for step in range(60):
    held = []
    for _ in range(24):
        held.append(torch.ones(rng.randrange(1 << 16, 1 << 22)))
        if len(held) > 8:
            del held[rng.randrange(len(held))]
    del held
    if sys.argv[1] == "trim":
        memory.after_step()
    most = max(most, resident_bytes())
print(most, memory.num_trims)
"""


def peak(how):
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how],
        env=os.environ | KEEP_FREED_MEMORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


def test_memory_is_given_back_when_it_has_grown():
    grown, none = peak("keep")
    bounded, trims = peak("trim")
    assert none == 0
    # once or twice, not at every step
    assert 0 < trims < 20
    assert bounded < grown
