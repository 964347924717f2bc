"""
Which requests run, and what becomes of each token: continuous batching without a tensor in it.

    scheduler = Scheduler(engine, max_batch=16)
    requests = scheduler.add(prompt, Sampling(temperature=0.7), num_samples=2)
    while scheduler.running or scheduler.waiting:
        for token in scheduler.step():
            ...  # token.request, token.id, token.mask, token.last

Requests wait in line until a row is free. A step runs one pass for all rows and gives each its next
token; a row whose request has ended leaves, and the next in line takes its place. A prompt is
prefilled once for all of its samples. A request's tokens do not depend on who shares the batch.
No threads but those of slow tools, no asyncio. Floor 2.75: the engine, which does the computing,
stands above and is known by what it offers (`EngineLike`, `RowsLike`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from nanochat.common import UserError, seed_from
from nanochat.reply import ReplyStream
from nanochat.sampling import Sampling
from nanochat.tools import Tool, ToolUse

TOOL_PATIENCE = 0.05  # seconds that a step waits for a tool when no row has anything else to do


class Picked(NamedTuple):
    """What was chosen for a row."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]] | None


class RowsLike(Protocol):
    """The rows of a batch as the scheduler sees them: numbered, the last takes a leaver's place."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Any]: ...  # one handle a prompt
    def join(self, prefilled: Sequence[Any], samplings: Sequence[Sampling]) -> None: ...
    def forward(self, tokens: Sequence[Sequence[int]]) -> None: ...  # what each row goes on with
    def pick(self, uniforms: Sequence[float]) -> list[Picked]: ...
    def leave(self, row: int) -> None: ...


class EngineLike(Protocol):
    """What the scheduler asks of an engine."""

    tokenizer: Any
    stops: set[int]
    tool: Tool | None

    @property
    def context(self) -> int | None: ...
    def rows(self, max_batch: int) -> RowsLike: ...
    def tool_use(self) -> ToolUse | None: ...
    def run_tool(self, code: str) -> Future[str | None]: ...


@dataclass
class _Group:
    """The samples of one prompt, which share its prefill."""

    prompt: list[int]
    handle: Any = None
    unborn: int = 0  # samples that wait for a row


@dataclass(eq=False)
class Request:
    """One reply: waiting, running, or ended for a reason."""

    id: int
    prompt: list[int]
    sampling: Sampling
    sample: int = 0
    """Which of the prompt's samples."""
    tokens: list[int] = field(default_factory=list)
    """The reply so far, the stop token and tool output included."""
    reason: str = ""
    """"" while waiting or running, then "stop", "length" or "cancelled"."""
    room: int = 0
    """Tokens that it may have: max_tokens, or what the context leaves."""
    group: _Group | None = field(default=None, repr=False)
    random: Any = field(default=None, repr=False)  # None: always the likeliest token
    tool: ToolUse | None = field(default=None, repr=False)
    text: ReplyStream | None = field(default=None, repr=False)  # if there are stop strings
    job: Future[str | None] | None = field(default=None, repr=False)  # a tool at work
    pending: list[int] = field(default_factory=list, repr=False)  # tokens the model has not seen


class Token(NamedTuple):
    """One token of one request."""

    request: Request
    id: int
    mask: int
    """1: sampled; 0: forced, which is tool output."""
    logprob: float | None
    """Its log-probability; None if not asked for, and for forced tokens."""
    top: list[tuple[int, float]] | None
    """The likeliest tokens there, with their log-probabilities."""
    last: bool
    """The request ends with it."""


class Scheduler:
    """Decides; the engine's rows compute."""

    def __init__(
        self,
        engine: EngineLike,
        max_batch: int = 16,
        max_tokens_held: int | None = None,
        context: int | None = None,
    ) -> None:
        """`max_tokens_held`: what the running requests may hold at most, prompts and replies at
        their longest (None: no bound but max_batch). `context`: where a request ends with reason
        "length"; default: the model's, -1: nowhere."""
        self.engine, self.max_batch = engine, max_batch
        self.max_tokens_held = max_tokens_held
        self.context = engine.context if context is None else context
        if self.context is not None and self.context < 0:
            self.context = None
        self.rows = engine.rows(max_batch)
        self._running: list[Request] = []  # by row
        self._waiting: deque[Request] = deque()
        self._ids = itertools.count()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, prompt: Sequence[int], sampling: Sampling, num_samples: int = 1) -> list[Request]:
        """Puts a prompt's samples in line. UserError if it is empty, does not fit into the context,
        or asks for what there is not."""
        sampling.check()
        if not prompt:
            raise UserError("a prompt must have at least one token")
        room = sampling.max_tokens
        if self.context is not None:
            if len(prompt) >= self.context:
                raise UserError(
                    f"the prompt has {len(prompt)} tokens; the model's context is {self.context} "
                    "tokens, reply included. Shorten it or start a new conversation"
                )
            room = min(room, self.context - len(prompt))
        if self.max_tokens_held is not None and len(prompt) + room > self.max_tokens_held:
            raise UserError(
                f"prompt and reply may have {len(prompt) + room} tokens; this server holds no more "
                f"than {self.max_tokens_held}. Shorten the prompt, or ask for fewer tokens"
            )
        group = _Group(list(prompt), unborn=num_samples)
        requests = [
            Request(next(self._ids), group.prompt, sampling, s, room=room, group=group)
            for s in range(num_samples)
        ]
        self._waiting.extend(requests)
        return requests

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """Ends a request now, wherever it is; harmless when it has ended. A reader that found the
        end itself may say another `reason`."""
        if request.reason:
            return
        request.reason = reason
        if request in self._waiting:
            self._waiting.remove(request)
            self._born(request)
        elif request in self._running:
            self._leave(self._running.index(request))

    def step(self) -> list[Token]:
        """One pass for all running requests, and for those that are let in: a token for each, in
        no particular order. Tool output comes at once; a row whose tool is at work gets none."""
        told = self._finish_tools()
        self._leave_ended()
        waits = {row for row, r in enumerate(self._running) if r.job is not None}
        if len(waits) < len(self._running):
            self.rows.forward([[] if r.job else r.pending for r in self._running])
        self._admit()
        if len(waits) == len(self._running):
            jobs = [r.job for r in self._running if r.job is not None]
            if jobs and not told:
                wait(jobs, timeout=TOOL_PATIENCE, return_when=FIRST_COMPLETED)
            return told
        uniforms = [
            0.0 if row in waits or r.random is None else r.random.random()
            for row, r in enumerate(self._running)
        ]
        picked = self.rows.pick(uniforms)
        tokens = [
            token
            for row, request in enumerate(self._running)
            if row not in waits
            for token in self._take(request, picked[row])
        ]
        self._leave_ended()
        return told + tokens

    def warm_up(self) -> None:
        """A step of one row and one of two, for nobody: what is compiled at the first of each is so
        before anybody waits for it. Only while nothing runs."""
        for n in sorted({1, min(2, self.max_batch)}):
            (handle,) = self.rows.prefill([[0]])
            self.rows.join([handle] * n, [Sampling()] * n)
            self.rows.forward([[0]] * n)
            for row in reversed(range(n)):
                self.rows.leave(row)

    # ---- rows

    def _admit(self) -> None:
        """Lets requests in, in the order they came, while there are rows and memory."""
        entering: list[Request] = []
        while self._waiting and len(self._running) + len(entering) < self.max_batch:
            if not self._fits([*self._running, *entering, self._waiting[0]]):
                break
            entering.append(self._waiting.popleft())
        if not entering:
            return
        groups = {id(r.group): r.group for r in entering if r.group is not None}
        fresh = [group for group in groups.values() if group.handle is None]
        if fresh:
            for group, handle in zip(fresh, self.rows.prefill([g.prompt for g in fresh])):
                group.handle = handle
        handles = [r.group.handle for r in entering if r.group is not None]
        self.rows.join(handles, [r.sampling for r in entering])
        for request in entering:
            if request.sampling.temperature > 0:
                seed = seed_from(request.sampling.seed, request.sample)
                request.random = np.random.default_rng(seed)
            request.tool = self.engine.tool_use()
            if request.sampling.stop:
                request.text = ReplyStream(self.engine.tokenizer, request.sampling.stop)
            self._born(request)
        self._running += entering

    def _fits(self, requests: Sequence[Request]) -> bool:
        # Rows are padded to the longest: that many tokens are held in memory
        if self.max_tokens_held is None:
            return True
        longest = max(len(r.prompt) + r.room for r in requests)
        return longest * len(requests) <= self.max_tokens_held

    @staticmethod
    def _born(request: Request) -> None:
        """One sample less that needs the prompt's prefill; the last one lets go of it."""
        group = request.group
        assert group is not None
        group.unborn -= 1
        if group.unborn == 0:
            group.handle = None

    def _leave_ended(self) -> None:
        for row in reversed(range(len(self._running))):
            if self._running[row].reason:
                self._leave(row)

    def _leave(self, row: int) -> None:
        request = self._running[row]
        if request.job is not None:
            request.job.cancel()
            request.job = None
        self.rows.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    # ---- tokens

    def _take(self, request: Request, picked: Picked) -> list[Token]:
        """The sampled token, and what a tool that answers at once has to say to it."""
        stopped = picked.id in self.engine.stops
        code = request.tool.feed(picked.id) if request.tool is not None else None
        request.pending = []
        tokens = [self._say(request, picked.id, 1, picked, "stop" if stopped else "")]
        if code is not None and not request.reason:
            assert self.engine.tool is not None
            if self.engine.tool.quick:
                tokens += self._force(request, self.engine.tool.run(code))
            else:
                request.job = self.engine.run_tool(code)
        return tokens

    def _say(
        self, request: Request, id: int, mask: int, picked: Picked | None, reason: str = ""
    ) -> Token:
        """Adds a token to a reply and sees whether it is the last."""
        request.tokens.append(id)
        request.pending.append(id)
        if request.text is not None and not reason:
            request.text.feed(id, mask)
            reason = request.text.reason
        if not reason and len(request.tokens) >= request.room:
            reason = "length"
        request.reason = reason
        logprob, top = (None, None) if picked is None else (picked.logprob, picked.top)
        return Token(request, id, mask, logprob, top, last=bool(reason))

    def _force(self, request: Request, result: str | None) -> list[Token]:
        """What a tool said, as tokens. Each takes a random number, as a sampled one would: what
        comes after is the same however the output came in."""
        assert request.tool is not None
        tokens = []
        for id in request.tool.answer(result):
            if request.random is not None:
                request.random.random()
            tokens.append(self._say(request, id, 0, None))
            if request.reason:
                break
        return tokens

    def _finish_tools(self) -> list[Token]:
        """The output of tools that have done their work."""
        tokens: list[Token] = []
        for request in self._running:
            job = request.job
            if job is None or not job.done():
                continue
            request.job = None
            error = job.exception()
            # The machine's trouble, not the program's; the reply goes on, told no more than this
            result = f"{type(error).__name__}: the tool failed" if error else job.result()
            tokens += self._force(request, result)
        return tokens
