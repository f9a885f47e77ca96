"""Which steps are computed on one thread, and that the process keeps its setting."""

import pytest
import torch

from raymoe.inference import InferenceEngine, SamplingParams
from raymoe.inference.step_threads import FEW_ROWS, SMALL_BYTES, StepThreads
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("expert_bytes", "device", "rows", "expected"),
    [
        (SMALL_BYTES, "cpu", FEW_ROWS, 1),
        (SMALL_BYTES, "cpu", FEW_ROWS + 1, 2),
        (SMALL_BYTES + 1, "cpu", 1, 2),
        (SMALL_BYTES, "cuda", 1, 2),
    ],
)
def test_threads_of_a_step(expert_bytes, device, rows, expected):
    threads = StepThreads(expert_bytes, device)
    threads.begin(rows)
    assert torch.get_num_threads() == expected
    threads.end()
    assert torch.get_num_threads() == 2


def test_one_thread_stays_one():
    torch.set_num_threads(1)
    threads = StepThreads(SMALL_BYTES, "cpu")
    threads.begin(1)
    threads.end()
    assert torch.get_num_threads() == 1


def test_an_engine_decodes_on_one_thread_and_reads_long_prompts_on_all(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path)
    seen: list[tuple[int, int]] = []
    with InferenceEngine(tmp_path, expert_memory="100%", kv_tokens=512) as engine:
        watch = engine._foresight.routed

        def routed(layer, hidden, expert_index, wanted):
            seen.append((len(hidden), torch.get_num_threads()))
            watch(layer, hidden, expert_index, wanted)

        engine._foresight.routed = routed
        engine.generate([list(range(2, 2 + FEW_ROWS + 1))], SamplingParams(max_tokens=3, stop_token_ids=()))
    assert set(seen) == {(FEW_ROWS + 1, 2), (1, 1)}
