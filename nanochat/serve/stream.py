"""Moved: replies are read by nanochat/reply.py."""

from nanochat.reply import Event, ReplyStream

__all__ = ["Event", "ReplyStream"]
