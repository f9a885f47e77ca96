import math
import os

# before the first import of triton anywhere
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch
from hypothesis import HealthCheck, settings

# how long an example takes says more of the machine's other guests than of the code; `make test` has the same examples each time,
# `make test-slow` new ones
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("raymoe", settings.get_profile("explore"), derandomize=True)
settings.load_profile("raymoe")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiers_in_order(monkeypatch):
    """Tiers are asked in the order given: reads that a busy machine held up do not change it."""
    monkeypatch.setattr("raymoe.inference.tiers._NOISE_S", math.inf)
