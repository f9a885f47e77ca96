import os

# before the first import of triton anywhere
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# they start clusters, servers or several processes, and take turns
_CROWDED = (
    "tests/actors",
    "tests/deploy",
    "tests/serving/test_app.py",
    "tests/test_cli.py",
    "tests/test_demo.py",
    "tests/test_train_command.py",
    "tests/test_train_rivals.py",
)


# before xdist reads the marks
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(_CROWDED):
            item.add_marker(pytest.mark.xdist_group("crowded"))
