"""What a budget promises is what the process does not take, measured from outside."""

import sys

import pytest
import torch

from raymoe.benchmarks.inference_memory import measure
from tests.tiny_models import tiny_model


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_twentieth_of_the_experts_saves_most_of_their_memory(tmp_path):
    torch.manual_seed(0)
    # the benchmark's experts, 0.39 MB each: 201 MB in all
    model = tiny_model("olmoe", hidden_size=256, intermediate_size=128, num_experts=64, num_hidden_layers=8)
    model.save_pretrained(tmp_path)
    resident, small = measure(tmp_path, ["5%"])
    # experts that nobody has asked for cost the resident engine nothing: what is compared is what it really took
    assert resident["touched"] > 0.9 * resident["num_experts"]
    assert (small["slots"], resident["num_experts"]) == (25, 512)
    assert small["saved_share"] >= 0.85
