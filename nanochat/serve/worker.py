"""
Threads that generate, for a server that must stay awake: one for each device.

The event loop only passes on what happens; a worker's thread drives its scheduler, step by step,
with the replies of all its requests in one batch. Requests reach the thread through a queue of
commands, what becomes visible comes back once a step. The thread knows the loop only through
`call_soon_threadsafe`.

    pool = Pool([Worker(make_scheduler, tokenizer, "first")], max_open=80)
    job = pool.submit([prompt_ids], sampling, n=2)      # to the least loaded worker
    await job.accepted()                                # or the reason why not
    async for piece in job: ...                         # ends when all its replies have
    job.cancel()                                        # frees its rows, at any time
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nanochat.common import UserError
from nanochat.reply import EventKind, ReplyStream
from nanochat.sampling import Sampling
from nanochat.serve.protocol import ApiError


@dataclass(frozen=True)
class TokenScore:
    """A token of a reply, with its log-probability and the likeliest ones in its place."""

    text: bytes
    logprob: float
    top: list[tuple[bytes, float]]
    start: int
    """Bytes of the reply's text before it."""


@dataclass(frozen=True)
class Piece:
    """What became visible of one of a request's replies."""

    index: int
    kind: EventKind
    text: str
    scores: list[TokenScore]


class Choice:
    """One reply of a request, as the worker's thread sees it."""

    def __init__(self, index: int, tokenizer: Any, sampling: Sampling) -> None:
        self.index = index
        self.reply = ReplyStream(tokenizer, sampling.stop)
        self.request: Any = None  # the scheduler's
        self._tokenizer = tokenizer
        self._scores: list[TokenScore] = []  # of tokens whose text is not out yet
        self._taken = self._shown = 0  # bytes of text

    def take(self, token: Any) -> list[Piece]:
        """One of the scheduler's tokens, as pieces to show."""
        if token.logprob is not None and token.mask == 1:
            text = self._bytes(token.id)
            if text:
                top = [(self._bytes(id), logprob) for id, logprob in token.top or []]
                self._scores.append(TokenScore(text, token.logprob, top, self._taken))
                self._taken += len(text)
        events = self.reply.feed(token.id, token.mask)
        if token.last and not self.reply.reason:
            events += self.reply.finish(token.request.reason or "length")
        # A stop token is no text; any other token that ends with "stop" completed a stop string.
        by_text = self.reply.reason == "stop" and bool(self._bytes(token.id))
        return [self._piece(*event, by_text) for event in events]

    def _piece(self, kind: EventKind, text: str, by_text: bool) -> Piece:
        scores: list[TokenScore] = []
        if kind == "text":
            self._shown += len(text.encode())
            while self._scores and self._scores[0].start < self._shown:
                scores.append(self._scores.pop(0))
        elif kind == "end" and not by_text:  # bytes that never became a whole character
            scores, self._scores = self._scores, []
        else:  # tokens of a tool call or of a stop string are no text
            self._scores.clear()
            self._taken = self._shown
        return Piece(self.index, kind, text, scores)

    def _bytes(self, id: int) -> bytes:
        """The bytes a reader sees of a token: none of a special one."""
        sizes = self._tokenizer.token_bytes
        return self._tokenizer.decode_bytes([id]) if id < len(sizes) and sizes[id] else b""


@dataclass(eq=False)
class Job:
    """A request on its way: iterate over it (async) for its pieces. Lives in the event loop."""

    worker: Worker
    prompts: list[list[int]]
    sampling: Sampling
    choices: list[Choice]
    items: asyncio.Queue[Piece | Exception | None] = field(default_factory=asyncio.Queue)
    """None ends it; an exception is the engine's, raised again where it is awaited."""
    answer: asyncio.Future[None] = field(default_factory=asyncio.Future)
    closed: bool = False  # the worker has nothing of it any more

    async def accepted(self) -> None:
        """Waits until the scheduler has taken it, which is when it is known to be possible."""
        await asyncio.shield(self.answer)

    def cancel(self) -> None:
        """Nobody wants this any more. Harmless when it is finished."""
        if not self.closed:
            self.worker.commands.put(("cancel", self))

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while (item := await self.items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_tokens(self) -> int:
        """Tokens of all replies so far."""
        return sum(choice.reply.num_tokens for choice in self.choices)


Command = tuple[Literal["add", "cancel", "stop"], Any]
Delivery = tuple[Job, "Piece | Exception | Literal['accepted', 'closed']"]


class Worker:
    """One scheduler and the thread that drives it. The thread starts with the first request."""

    def __init__(
        self,
        make_scheduler: Callable[[], Any],
        tokenizer: Any,
        name: str,
        device: torch.device | None = None,
    ) -> None:
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.num_open = 0  # replies asked for and not yet closed; of the event loop
        self._make_scheduler = make_scheduler
        self._device = device
        with self._on_device():
            self._scheduler: Any = make_scheduler()  # None after a failure, until the next request
        self._tokenizer = tokenizer
        self._name = name
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: dict[Job, set[Choice]] = {}  # those with replies to come; of the thread
        self._choices: dict[int, tuple[Job, Choice]] = {}  # by the scheduler's request id
        self._outbox: list[Delivery] = []

    @property
    def num_running(self) -> int:
        """Replies that get a token each step."""
        scheduler = self._scheduler  # which the thread may take away between two looks
        return scheduler.running if scheduler is not None else 0

    def submit(self, prompts: list[list[int]], sampling: Sampling, n: int) -> Job:
        """Hands a request to the thread. To be called in the event loop."""
        choices = [Choice(i, self._tokenizer, sampling) for i in range(n * len(prompts))]
        job = Job(self, prompts, sampling, choices)
        self.num_open += len(choices)
        self._loop = asyncio.get_running_loop()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self.commands.put(("add", job))
        return job

    def warm_up(self) -> None:
        """Compiles what the first replies would have to wait for. Before any request."""
        with self._on_device():
            self._scheduler.warm_up()

    def shutdown(self) -> None:
        """Ends what is running with an error, and the thread. Waits for the step under way."""
        if self._thread is not None:
            self.commands.put(("stop", None))
            self._thread.join()

    def _on_device(self) -> AbstractContextManager[Any]:
        """Each thread has a current GPU of its own; captured graphs and kernels go by it."""
        is_gpu = self._device is not None and self._device.type == "cuda"
        return torch.cuda.device(self._device) if is_gpu else nullcontext()

    # ---- in the thread

    def _run(self) -> None:
        with self._on_device():
            while self._turn():
                pass

    def _turn(self) -> bool:
        """What has come since the last step, then a step. False: the end."""
        try:
            while not self._jobs or not self.commands.empty():  # idle: sleeps until something comes
                what, job = self.commands.get()
                if what == "stop":
                    self._fail_all(shutting_down())
                    return False
                (self._add if what == "add" else self._close)(job)
                self._send()
            for token in self._scheduler.step():
                self._take(token)
        except Exception as e:
            self._fail_all(e)
        except BaseException as e:  # a Rust panic is no Exception, but is to be answered too
            self._fail_all(RuntimeError(repr(e)))
        self._send()
        return True

    def _add(self, job: Job) -> None:
        self._jobs[job] = set(job.choices)
        if self._scheduler is None:
            self._scheduler = self._make_scheduler()
        try:
            n = len(job.choices) // len(job.prompts)
            for p, prompt in enumerate(job.prompts):
                requests = self._scheduler.add(prompt, job.sampling, n)
                for choice, request in zip(job.choices[p * n : (p + 1) * n], requests, strict=True):
                    choice.request = request
                    self._choices[request.id] = (job, choice)
        except UserError as e:
            self._outbox.append((job, ApiError(str(e))))
            self._close(job)
        else:
            self._outbox.append((job, "accepted"))

    def _take(self, token: Any) -> None:
        job, choice = self._choices.get(token.request.id, (None, None))
        if job is None or choice is None:  # cancelled within this step
            return
        self._outbox += [(job, piece) for piece in choice.take(token)]
        if choice.reply.reason:
            if not token.last:  # a stop string: the scheduler does not know
                self._scheduler.cancel(choice.request, "stop")
            del self._choices[token.request.id]
            self._jobs[job].discard(choice)
            if not self._jobs[job]:
                self._close(job)

    def _close(self, job: Job) -> None:
        """Frees whatever the job still holds."""
        for choice in self._jobs.pop(job, ()):
            if choice.request is not None:
                self._scheduler.cancel(choice.request)
                self._choices.pop(choice.request.id, None)
        self._outbox.append((job, "closed"))

    def _fail_all(self, error: Exception) -> None:
        """Nothing that was in a step that went wrong can be trusted: the scheduler goes too."""
        self._outbox += [d for job in self._jobs for d in ((job, error), (job, "closed"))]
        self._jobs, self._choices, self._scheduler = {}, {}, None
        self._send()

    def _send(self) -> None:
        """To the event loop, everything at once: waking it costs more than the rest."""
        batch, self._outbox = self._outbox, []
        if batch and self._loop is not None and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._deliver, batch)
            except RuntimeError:  # closed since: the server is gone, and who waited with it
                return

    # ---- in the event loop

    def _deliver(self, batch: list[Delivery]) -> None:
        for job, item in batch:
            if not job.answer.done():
                if isinstance(item, Exception):
                    job.answer.set_exception(item)
                    job.answer.exception()  # whoever waited may be gone: no warning about that
                else:
                    job.answer.set_result(None)
            if item == "closed" and not job.closed:
                job.closed = True
                self.num_open -= len(job.choices)
                job.items.put_nowait(None)
            elif not isinstance(item, str):
                job.items.put_nowait(item)


class Pool:
    """All workers. A request goes to the one with the fewest replies to make."""

    def __init__(self, workers: Sequence[Worker], max_open: int) -> None:
        """`max_open`: replies that may be made and wait, all together."""
        self.workers = workers
        self._max_open = max_open
        self._closed = False

    @property
    def num_open(self) -> int:
        """Replies being made and waiting."""
        return sum(worker.num_open for worker in self.workers)

    @property
    def num_running(self) -> int:
        return sum(worker.num_running for worker in self.workers)

    @property
    def num_waiting(self) -> int:
        return max(0, self.num_open - self.num_running)

    def submit(self, prompts: list[list[int]], sampling: Sampling, n: int = 1) -> Job:
        """Queues n replies to each prompt; ApiError 429 when there is no room for them."""
        if self._closed:
            raise shutting_down()
        wanted = n * len(prompts)
        if self.num_open + wanted > self._max_open:
            raise busy(f"{self.num_open} replies are being made or waiting")
        worker = min(self.workers, key=lambda worker: worker.num_open)
        return worker.submit(prompts, sampling, n)

    def warm_up(self) -> None:
        """Compiles what the first replies would have to wait for. Before any request."""
        for worker in self.workers:
            worker.warm_up()

    def shutdown(self) -> None:
        """Ends what is running with an error, then the threads. Nothing is taken afterwards."""
        self._closed = True
        for worker in self.workers:
            worker.shutdown()


def shutting_down(seconds: float = 1) -> ApiError:
    """The answer of a server that is about to end."""
    headers = {"Retry-After": str(max(1, round(seconds)))}
    return ApiError("the server is shutting down", None, "shutting_down", 503, headers)


def busy(why: str) -> ApiError:
    """The answer of a server that has no room."""
    return ApiError(f"{why}; try again", None, "queue_full", 429, {"Retry-After": "1"})
