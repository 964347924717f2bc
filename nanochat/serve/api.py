"""
The chat server as an application object: OpenAI-compatible routes around engines, and the page.

    POST /v1/chat/completions   a reply to a conversation, whole or streamed (server-sent events)
    POST /v1/completions        the continuation of a text
    GET  /v1/models             the one model there is
    GET  /health                what is served, with which defaults, and how busy it is
    GET  /metrics               for Prometheus
    GET  /openapi.json          all of this, for programs
    GET  /                      the chat page (page.html, one file, nothing from elsewhere)

`scripts/chat_web.py` loads a model and runs this. From Python: create_app(...) and any ASGI server.
What a request may say, extensions included: protocol.py. Who may ask: guard.py.
"""

# No `from __future__ import annotations`: FastAPI reads the annotations of functions made below,
# whose names are imported where they are used.

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError
from nanochat.reply import fit_conversation
from nanochat.scheduler import Scheduler
from nanochat.serve.answers import Answer, ChatAnswer, TextAnswer
from nanochat.serve.guard import Access, Guard
from nanochat.serve.limits import Limits
from nanochat.serve.metrics import Metrics
from nanochat.serve.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    error_body,
    refusal,
)
from nanochat.serve.routes import add_routes, describe
from nanochat.serve.worker import Job, Pool, Worker

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger(__name__)

DESCRIPTION = """\
OpenAI's API as far as this server has it. A parameter that is not listed is refused with 400 and
named, unless its value asks for nothing (`"n": 1`, `"tools": []`, null).

**Context.** Conversation and reply share the model's context. A reply that reaches its end has
`finish_reason` "length". A conversation that leaves no room for a reply is refused with 400, code
`context_length_exceeded`; with `"truncation": "auto"` its oldest exchanges are dropped instead, the
system message is kept, and the answer's `dropped_messages` says how many went.

**Special tokens** in any text are plain text and never act.

**Busy.** 429 with Retry-After when the queue is full, 503 when the server is shutting down, 408
when a request took longer than this server allows. Errors within a stream come as an event with
`error`, then `[DONE]`.
"""


def create_app(
    engines: Sequence[Any],
    tokenizer: Any,
    model_name: str,
    limits: Limits,
    access: Access | None = None,
    make_scheduler: Callable[..., Any] = Scheduler,
) -> "FastAPI":
    """The ASGI application that answers with `engines`, each of which has a thread of its own.

    A reply is stopped when its client goes away. Refused requests get 4xx and an OpenAI error
    object. No thread starts before a request. `app.state`: `draining` may be set to refuse new
    replies, `pool` tells what is under way."""
    from fastapi import FastAPI
    from fastapi.middleware.cors import CORSMiddleware

    limits.check()
    access = access or Access()
    workers = [
        Worker(
            partial(make_scheduler, engine, max_batch=limits.max_concurrent),
            tokenizer,
            f"generate-{i}",
            engine.device,
        )
        for i, engine in enumerate(engines)
    ]
    pool = Pool(workers, limits.max_concurrent * len(workers) + limits.max_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # In a thread: the token being computed may take a while, other clients are told goodbye.
        await asyncio.to_thread(pool.shutdown)

    app = FastAPI(
        title="nanochat",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # the built-in documentation pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.draining = False
    app.state.pool = pool
    server = ChatServer(pool, tokenizer, model_name, limits, access.api_key is not None)
    add_routes(app, server)
    describe(app)
    _add_error_handlers(app)
    app.add_middleware(Guard, access=access, limits=limits, metrics=server.metrics)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_error_handlers(app: "FastAPI") -> None:
    """Every error leaves as an object of OpenAI's kind."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    async def refuse(_: "Request", e: Exception) -> "Response":
        assert isinstance(e, ApiError)
        return JSONResponse(e.body, e.status, headers=e.headers)

    async def refuse_body(request: "Request", e: Exception) -> "Response":
        assert isinstance(e, RequestValidationError)
        return await refuse(request, refusal(e.errors()))

    async def refuse_route(request: "Request", e: Exception) -> "Response":
        # 404 and 405 are the router's; 400 is FastAPI's for a body that is no JSON at all: bytes
        # that are no UTF-8, numbers of 5,000 digits, 10,000 nested lists.
        assert isinstance(e, HTTPException)
        where = ascii(request.url.path)[1:-1][:100]
        message = f"{request.method} {where}: {e.detail}"
        if e.status_code == 400:
            message = "the body is not valid JSON"
        return JSONResponse(error_body(message), e.status_code, headers=e.headers)

    async def fail(_: "Request", e: Exception) -> "Response":
        return JSONResponse(_failure(e).body, 500)

    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(Exception, fail)


class ChatServer:
    """What the routes do, and what they share."""

    def __init__(
        self, pool: Pool, tokenizer: Any, model_name: str, limits: Limits, needs_key: bool
    ) -> None:
        self.pool, self.tokenizer, self.limits = pool, tokenizer, limits
        self.needs_key = needs_key
        self.metrics = Metrics(lambda: pool.num_running, lambda: pool.num_waiting)
        self.model_name = model_name
        self.model_card = {
            "id": model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "nanochat",
        }

    def health(self) -> dict[str, Any]:
        defaults = {
            "temperature": self.limits.temperature,
            "top_k": self.limits.top_k,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": min(self.limits.max_new_tokens, self.limits.longest),
        }
        return {
            "status": "ok",
            "model": self.model_name,
            "context": self.limits.max_context,
            "max_reply_tokens": self.limits.longest,
            "defaults": defaults,
            "needs_key": self.needs_key,
            "workers": len(self.pool.workers),
            "running": self.pool.num_running,
            "waiting": self.pool.num_waiting,
        }

    async def chat(self, body: ChatRequest, request: "Request") -> "Response":
        body.check(self.model_name, self.limits)
        # In a thread: a long conversation takes a moment to tokenize, and others are being served.
        prompt, dropped = await asyncio.to_thread(self._render, body)
        job = self.pool.submit([prompt], body.sampling(self.limits, self._room(prompt)), body.n)
        extra = {"dropped_messages": dropped} if body.truncation == "auto" else {}
        as_text = body.tool_format == "text"
        answer = ChatAnswer(self.model_name, job, extra, tools_as_text=as_text)
        return await self._answer(answer, body, request)

    async def complete(self, body: CompletionRequest, request: "Request") -> "Response":
        given = body.prompts()
        body.check(self.model_name, self.limits, len(given))
        prompts = await asyncio.to_thread(lambda: [self._encode(prompt) for prompt in given])
        room = min(map(self._room, prompts))
        job = self.pool.submit(prompts, body.sampling(self.limits, room), body.n)
        return await self._answer(TextAnswer(self.model_name, job), body, request)

    # ---- prompts

    def _room(self, prompt: Sequence[int]) -> int:
        """What the context leaves for the reply."""
        return self.limits.max_context - len(prompt)

    def _least(self, texts: Sequence[str]) -> int:
        """Fewest tokens that the texts can have: what is hopelessly long is refused before it costs
        anything."""
        return sum(len(t.encode()) for t in texts) // int(self.tokenizer.token_bytes.max())

    def _exceeded(self, found: str, param: str) -> ApiError:
        return ApiError(
            f"{param} have {found} tokens; this model's context is {self.limits.max_context} "
            "tokens, reply included. Shorten them, or start anew.",
            param,
            "context_length_exceeded",
        )

    def _render(self, body: ChatRequest) -> tuple[list[int], int]:
        """The prompt's token ids, if they leave room for a reply, and the messages left out."""
        conversation = body.conversation()
        context = self.limits.max_context
        if body.truncation == "auto":
            wanted = body.length_asked or self.limits.max_new_tokens
            # A quarter at least is for the conversation's end, however long a reply is asked for
            room = max(1, min(wanted, context * 3 // 4))
            try:
                return fit_conversation(self.tokenizer, conversation["messages"], context, room)
            except UserError as e:
                raise ApiError(str(e), "messages", "context_length_exceeded") from e
        contents = [message["content"] for message in conversation["messages"]]
        least = self._least(
            [c if isinstance(c, str) else "".join(p["text"] for p in c) for c in contents]
        )
        if least >= context:
            raise self._exceeded(f"more than {least}", "messages")
        ids = self.tokenizer.render_for_completion(conversation)
        if len(ids) >= context:
            raise self._exceeded(str(len(ids)), "messages")
        return ids, 0

    def _encode(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a text to be continued, which begins as a document does."""
        if isinstance(prompt, str):
            least = self._least([prompt])
            if least >= self.limits.max_context:
                raise self._exceeded(f"more than {least}", "prompt")
            ids = self.tokenizer.encode(prompt, prepend=self.tokenizer.get_bos_token_id())
        else:
            ids = prompt
        size = self.tokenizer.get_vocab_size()
        if not ids or max(ids) >= size:
            raise ApiError(f"prompt must be token ids below {size}, one at least", "prompt")
        if len(ids) >= self.limits.max_context:
            raise self._exceeded(str(len(ids)), "prompt")
        return ids

    # ---- answers

    async def _answer(
        self, answer: Answer, body: ChatRequest | CompletionRequest, request: "Request"
    ) -> "Response":
        from starlette.responses import JSONResponse, StreamingResponse

        job = answer.job
        # Not by a `finally` here or in _stream: a client may be gone before that begins
        request.state.at_end.append(lambda: self._end(job))
        self.metrics.prompt_tokens.inc(job.num_prompt_tokens)
        try:
            await job.accepted()
            if body.stream:
                chunks = self._stream(answer, body.stream_options.include_usage, request)
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
            await self._wait(answer, request)
            return JSONResponse(answer.whole())
        except ApiError:
            raise
        except Exception as e:  # answered here: the framework's way would drop the connection too
            return JSONResponse(_failure(e).body, 500)

    def _end(self, job: Job) -> None:
        job.cancel()
        self.metrics.completion_tokens.inc(job.num_tokens)

    async def _wait(self, answer: Answer, request: "Request") -> None:
        """Until the replies are whole, watching that the client waits too."""

        async def cancel_when_gone() -> None:
            # Polled: a whole reply sends nothing in between
            while not await request.is_disconnected():
                await asyncio.sleep(0.1)  # seconds
            request.state.client_gone = True
            answer.job.cancel()

        watcher = asyncio.create_task(cancel_when_gone())
        try:
            first = True
            async for piece in answer.job:
                self._note_first(first, request)
                first = False
                answer.note(piece)
        finally:
            watcher.cancel()

    def _note_first(self, first: bool, request: "Request") -> None:
        if first:
            self.metrics.first_token.observe(time.monotonic() - request.state.began)

    async def _stream(
        self, answer: Answer, include_usage: bool, request: "Request"
    ) -> AsyncIterator[str]:
        """The replies as server-sent events. Cancelled when the client goes away."""
        # With usage in the last chunk, OpenAI's other chunks have the key too
        usage = {"usage": None} if include_usage else {}
        first = True
        request.state.client_gone = True  # until the end is reached
        try:
            for choice in answer.opening():
                yield _event(answer.chunk(choice, **usage))
            async for piece in answer.job:
                self._note_first(first, request)
                first = False
                yield _event(answer.chunk(answer.choice(piece), **usage))
            if include_usage:
                yield _event(answer.chunk(usage=answer.usage()))
            request.state.client_gone = False
        except Exception as e:  # the status line is long sent: the error goes where the text went
            request.state.client_gone = False
            yield _event(e.body if isinstance(e, ApiError) else _failure(e).body)
        yield "data: [DONE]\n\n"


def _failure(e: Exception) -> ApiError:
    """Logs a fault of ours in full and tells the client its kind only."""
    logger.error("generation failed", exc_info=e)
    return ApiError(f"internal error: {type(e).__name__}", None, "internal", 500)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
