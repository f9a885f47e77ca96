"""What an engine tells the metrics: at most once a second, because a step may take less than recording it does."""

import threading
import time

from raymoe.inference.cache import CacheCounters, ExpertCache
from raymoe.telemetry import metrics

_PERIOD_S = 1.0


class Meter:
    """Gathers on the generation thread and publishes every second, and when the last request is done."""

    def __init__(self, cache: ExpertCache):
        self._cache = cache
        self._lock = threading.Lock()
        self._seen = CacheCounters()
        self._tokens = 0
        self._since_s: float | None = None
        self.tokens_per_s = 0.0
        """Of the last period; 0 while nothing runs."""

    def submitted(self, prompt_tokens: int) -> None:
        metrics.SERVE_TOKENS_TOTAL.inc(prompt_tokens, kind="prompt")
        with self._lock:
            self._since_s = self._since_s or time.monotonic()

    def first_token(self, waited_s: float) -> None:
        metrics.SERVE_TTFT_S.observe(waited_s)

    def ended(self, reason: str) -> None:
        metrics.SERVE_REQUESTS_TOTAL.inc(status=reason)

    def stepped(self, generated_tokens: int, is_idle: bool) -> None:
        """After every step; `is_idle`: no request is left."""
        with self._lock:
            now_s = time.monotonic()
            self._tokens += generated_tokens
            elapsed_s = now_s - (self._since_s or now_s)
            if elapsed_s < _PERIOD_S and not is_idle:
                return
            tokens, self._tokens = self._tokens, 0
            self.tokens_per_s = 0.0 if is_idle else tokens / elapsed_s
            self._since_s = None if is_idle else now_s
            total = self._cache.totals()
            seen, self._seen = self._seen, total
        metrics.SERVE_TOKENS_TOTAL.inc(tokens, kind="generated")
        metrics.SERVE_TOKENS_PER_S.set(self.tokens_per_s)
        done = total - seen
        metrics.SERVE_EXPERT_HITS_TOTAL.inc(done.hits)
        metrics.SERVE_EXPERT_MISSES_TOTAL.inc(done.late + done.misses)
        metrics.SERVE_EXPERT_FETCHED_BYTES_TOTAL.inc(done.fetched_bytes)
        metrics.SERVE_EXPERT_PREFETCHED_TOTAL.inc(done.prefetched)
        metrics.SERVE_EXPERT_WASTED_BYTES_TOTAL.inc(done.wasted_bytes)
        metrics.SERVE_EXPERT_STALL_S_TOTAL.inc(done.stall_s)
        metrics.SERVE_RESIDENT_EXPERTS.set(self._cache.resident)
