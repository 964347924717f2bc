"""
What the server counts, for Prometheus: GET /metrics.

    nanochat_requests_total{route,status}    answered requests; status 499: the client went away
    nanochat_prompt_tokens_total             tokens taken in
    nanochat_completion_tokens_total         tokens made, those of replies nobody waited for too
    nanochat_replies_running, _waiting       now
    nanochat_request_seconds                 from arrival to the end of the answer
    nanochat_first_token_seconds             from arrival to the first text of a reply
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

# Seconds; a reply may take minutes on a CPU.
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """One server's numbers, in a registry of its own: several may live in a process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        r = self.registry = CollectorRegistry()
        self.requests = Counter(
            "nanochat_requests", "Answered requests", ["route", "status"], registry=r
        )
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "Tokens taken in", registry=r)
        self.completion_tokens = Counter("nanochat_completion_tokens", "Tokens made", registry=r)
        Gauge("nanochat_replies_running", "Replies being made", registry=r).set_function(running)
        Gauge("nanochat_replies_waiting", "Replies in the queue", registry=r).set_function(waiting)
        self.seconds = Histogram(
            "nanochat_request_seconds",
            "Seconds from arrival to the end of an answer",
            ["route"],
            buckets=_BUCKETS,
            registry=r,
        )
        self.first_token = Histogram(
            "nanochat_first_token_seconds",
            "Seconds from arrival to the first text of a reply",
            buckets=_BUCKETS,
            registry=r,
        )

    def text(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self.registry)
