"""What raymoe.inference assumes of transformers' continuous batching, beyond its documented surface."""

import inspect

import pytest
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR, PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, Scheduler
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from raymoe.inference.latent_cache import _FullAttention
from raymoe.inference.scheduler import TokenScheduler


def test_our_scheduler_is_registered():
    assert SCHEDULER_MAPPING["raymoe"] is TokenScheduler


def test_a_blocked_scheduler_lets_requests_in_once_nothing_runs(monkeypatch):
    scheduler = TokenScheduler.__new__(TokenScheduler)
    scheduler.active_requests, scheduler.block_new_requests = {}, True
    monkeypatch.setattr("raymoe.inference.scheduler.FIFOScheduler.schedule_batch", lambda self, *_: None)
    scheduler.schedule_batch(1, 1)
    assert not scheduler.block_new_requests


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (Scheduler, ["schedule_batch", "_process_candidates"]),
        (OutputRouter, ["deliver", "deliver_batch", "fail_and_deliver"]),
        (
            ContinuousBatchingManager,
            ["add_request", "cancel_request", "pause", "is_running", "start", "stop", "destroy", "warmup"],
        ),
    ],
)
def test_names_we_use_exist(owner, names):
    assert [name for name in names if not callable(getattr(owner, name, None))] == []


def test_the_manager_reads_router_and_processor_when_the_loop_starts():
    """Both are replaced between the manager's construction and its start."""
    source = inspect.getsource(ContinuousBatchingManager._create_batch_processor)
    assert "self.output_router" in source
    assert "self.logit_processor" in source


def test_the_cache_asks_for_allocators_by_keyword_and_the_scheduler_for_prefixes():
    """Ours is put in by name of the attention, and counts what `search_prefix_match` finds."""
    assert ATTN_TYPE_TO_ALLOCATOR[FULL_ATTENTION] is _FullAttention
    assert (
        "ATTN_TYPE_TO_ALLOCATOR[attn_type](index=index, layer_indices=layer_indices, **ca_kwargs)"
        in inspect.getsource(PagedAttentionCache.__init__)
    )
    assert "self.cache.search_prefix_match(" in inspect.getsource(Scheduler._infer_request_tokens)


@pytest.mark.parametrize("attention", [DeepseekV2Attention, DeepseekV3Attention])
def test_latents_are_offered_before_they_are_expanded(attention):
    source = inspect.getsource(attention.forward)
    assert source.index("past_key_values.update(") < source.index("self.expand_kv(")
    assert "**kwargs" in source[source.index("attention_interface(") :]


def test_processors_get_the_states_and_one_row_of_arguments():
    parameters = inspect.signature(ContinuousBatchingLogitsProcessorList.prepare_tensor_args).parameters
    assert list(parameters) == ["self", "requests_in_batch", "arg_storage"]


def test_outputs_carry_all_tokens_so_far_also_after_a_reset():
    state = RequestState(request_id="a", initial_tokens=[1, 2], max_new_tokens=5, streaming=True)
    state.generated_tokens = [3]
    again = state.create_equivalent_initial_request()
    again.generated_tokens = [4]
    output = again.to_generation_output()
    assert isinstance(output, GenerationOutput)
    assert (output.prompt_ids, output.generated_tokens) == ([1, 2], [3, 4])
    assert RequestStatus.FAILED > RequestStatus.FINISHED
