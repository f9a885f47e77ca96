import json
import os
import uuid

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from tests.actors.conftest import tiny_job
from tests.actors.elastic import traps as traps_module
from tests.actors.elastic.leftovers import MARK, Leftovers
from tests.actors.elastic.runs import ELASTIC, NUM_NODES, Undisturbed, set_nodes
from tests.actors.elastic.traps import Traps, arm


@pytest.fixture(scope="package")
def cluster():
    os.environ[MARK] = uuid.uuid4().hex
    # workers cannot be placed on the head, which so never loses one
    this = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    # workers do not find the tests' modules
    cloudpickle.register_pickle_by_value(traps_module)
    hook = {"worker_process_setup_hook": arm}
    ray.init(address=this.address, namespace="raymoe", log_to_driver=False, runtime_env=hook)
    yield this
    ray.shutdown()
    this.shutdown()
    cloudpickle.unregister_pickle_by_value(traps_module)
    del os.environ[MARK]


@pytest.fixture(autouse=True)
def whole(cluster):
    """Three nodes for workers, whatever the test before has taken away."""
    set_nodes(cluster, NUM_NODES)


@pytest.fixture(autouse=True)
def leaves_nothing(whole):
    """No test leaves anything of its run."""
    before = Leftovers()
    yield before
    before.check()


@pytest.fixture
def traps(tmp_path):
    return Traps(tmp_path / "traps")


@pytest.fixture(scope="session")
def undisturbed_of(tmp_path_factory):
    """The undisturbed run of a configuration; its steps are computed once for all tests that ask."""
    runs = {}

    def of(tree):
        key = json.dumps(tree, sort_keys=True)
        if key not in runs:
            folder = tmp_path_factory.mktemp("undisturbed")
            runs[key] = Undisturbed(tiny_job(folder, **tree), folder)
        return runs[key]

    return of


@pytest.fixture
def undisturbed(undisturbed_of):
    return undisturbed_of(ELASTIC)
