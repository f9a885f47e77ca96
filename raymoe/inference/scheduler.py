"""Which requests are in the next step: transformers' first come, first served. Importing it registers the scheduler "raymoe"."""

from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

SCHEDULER = "raymoe"


class TokenScheduler(FIFOScheduler):
    """First come, first served; decoding goes before reading prompts."""

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        # transformers 5.23: when the KV cache was full it lets no waiting request in before a running one has finished; if
        # they are all cancelled instead, it would wait for ever
        if not self.active_requests:
            self.block_new_requests = False
        return super().schedule_batch(token_budget, cache_budget)


SCHEDULER_MAPPING[SCHEDULER] = TokenScheduler
