"""
What a server allows, and what it takes where a request says nothing: said once, as flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from nanochat import flags
from nanochat.common import UserError


@dataclass
class Limits:
    """Limits and defaults. A server wants `max_context` to be a number of tokens, not 0."""

    temperature: Annotated[float, flags.alias("-t")] = 0.8
    """Used where a request names none; 0: always the likeliest token."""
    top_k: Annotated[int, flags.alias("-k")] = 50
    """Sample among the k likeliest tokens, where a request says nothing; 0: among all."""
    max_new_tokens: Annotated[int, flags.alias("-m")] = 512
    """Longest reply in tokens, where a request says nothing."""
    max_reply_tokens: int = 0
    """Longest reply that a request may ask for; 0: as long as the context."""
    max_context: int = 0
    """Tokens of conversation and reply together; 0: what the model was trained for."""
    max_concurrent: int = 16
    """Replies made at the same time, on each worker. More wait."""
    max_waiting: int = 64
    """Replies that may wait; requests beyond get 429 and Retry-After."""
    max_body: int = 1 << 20
    """Bytes of one request; larger ones get 413."""
    read_timeout: float = 10.0
    """Seconds in which a request must have arrived whole."""
    request_timeout: float = 600.0
    """Seconds in which a request must have been answered, waiting included."""

    def check(self) -> None:
        """UserError, by the flag, for limits that let nothing through."""
        for flag, least in [
            ("temperature", 0),
            ("top_k", 0),
            ("max_new_tokens", 1),
            ("max_reply_tokens", 0),
            ("max_context", 0),
            ("max_concurrent", 1),
            ("max_waiting", 0),
            ("max_body", 1),
            ("read_timeout", 0.001),
            ("request_timeout", 0.001),
        ]:
            value = getattr(self, flag)
            if not value >= least:
                raise UserError(f"--{flag}={value:g} must be at least {least:g}")

    @property
    def longest(self) -> int:
        """Tokens of the longest reply that may be asked for."""
        return min(self.max_context, self.max_reply_tokens or self.max_context)
