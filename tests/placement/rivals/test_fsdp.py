import numpy as np

from raymoe.placement.rivals import Fsdp
from tests.placement.rivals.cases import cluster_of, even_state, history_of


def test_everything_is_everywhere():
    # 2 layers x 3 experts x 4 ranks = 24 copies, of each 3/4 of 100 bytes come from other ranks, twice; gradients once
    state = even_state(cluster_of(2, 2), 3, num_layers=2, rematerialise=Fsdp.rematerialise)
    plan = Fsdp().prepare(history_of([9, 1, 1], [0, 0, 0]), state)
    assert plan.copies.all()
    assert plan.layout == "sliced"
    assert plan.bytes == {"sparse_all_gather": 2 * 24 * 75, "sparse_reduce_scatter": 24 * 75}
    assert not np.any(plan.owners)
