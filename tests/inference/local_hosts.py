"""Hosts of experts in this process, and fixtures to make them: `experts` and `hold`, to be imported."""

import time

import numpy as np
import pytest
import torch

from raymoe.inference.holding import Holding
from raymoe.inference.remote import HostSpeed
from raymoe.inference.tier_rate import TierRate
from raymoe.inference.tiers import CheckpointTier, NotHeld
from raymoe.models import expert_parameters, load_without_experts, moe_layers

ALL = [(layer, expert) for layer in range(2) for expert in range(8)]
"""Of a tiny olmoe."""
CHEAP = TierRate(1e12, 0.0, 1)


@pytest.fixture
def experts(saved_model):
    """(layers, the files as a tier, [experts of a layer, flat])"""
    model, path = saved_model("olmoe")
    _, files = load_without_experts(path, torch.float32)
    flat = []
    for layer in moe_layers(model):
        flat.append(torch.zeros(layer.num_experts, layer.layout.numel))
        layer.layout.pack(expert_parameters(layer), flat[-1])
    return files.layers, CheckpointTier(files), flat


@pytest.fixture
def hold(experts):
    """Makes holdings that are closed at the end of the test."""
    made = []

    def make(memory="100%", keys=ALL, source=None) -> Holding:
        made.append(Holding(experts[0], source or experts[1], memory=memory, dtype=torch.float32))
        made[-1].hold(keys)
        return made[-1]

    yield make
    for holding in made:
        holding.close()


def until(check, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


class LocalHosts:
    """`RemoteExperts` whose hosts are holdings of this process; `spoil` may change or refuse what they answer."""

    def __init__(self, *holdings, is_near=False, spoil=None, way=CHEAP):
        self.holdings, self.is_near, self.way = list(holdings), is_near, way
        self.spoil = spoil or (lambda answer: answer)
        self.given, self.sent = [], []
        self.is_closed = False

    def on_node(self):
        return [h.handle for h in self.holdings] if self.is_near else []

    def holder(self, layer, expert):
        return next((n for n, h in enumerate(self.holdings) if h.held()[layer, expert]), None)

    def give(self, layer, expert):
        host = self.holder(layer, expert)
        if host is None:
            raise NotHeld("nobody")
        self.given.append((layer, expert))
        return self.spoil(self.holdings[host].give([(layer, expert)])[0])

    def send(self, host, layer, rows, experts, counts):
        self.sent.append((host, layer, list(experts), list(counts)))
        hosts = self

        class Sent:
            def wait(self):
                data = hosts.holdings[host].compute(
                    layer, rows.numpy().view(np.uint8).ravel(), rows.dtype, experts, counts
                )
                data = hosts.spoil(data)
                return torch.from_numpy(data.rows.copy()).view(rows.dtype).view(rows.shape)

        return Sent()

    def speed(self, host):
        return HostSpeed(self.way, 0.0, 0.0)

    def facts(self):
        return {"given": len(self.given)}

    def close(self):
        self.is_closed = True
