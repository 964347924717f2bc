"""
The chat server as an application object: OpenAI-compatible routes around one engine, and the page.

    POST /v1/chat/completions   a reply, whole or streamed (server-sent events)
    GET  /v1/models             the one model there is
    GET  /health                what is served, and how busy it is
    GET  /                      the chat page (page.html, one file, nothing from elsewhere)

`scripts/chat_web.py` loads a model and runs this. From Python: create_app(...) and any ASGI server.

Beyond OpenAI's shapes: `top_k` in a request. A tool call the model made is no text: it comes as
`delta.tool` = {"type": "python" | "python_output", "text": ...} while streaming, and a whole
message with tool calls has `parts`, its text and tool parts in order. Parts may be sent back as the
`content` of an assistant message.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from nanochat.serve.page import page_route
from nanochat.serve.protocol import ApiError, ChatRequest, Limits, error_body, parse_chat_request
from nanochat.serve.worker import Job, Worker

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger(__name__)


def create_app(engine: Any, tokenizer: Any, model_name: str, limits: Limits) -> FastAPI:
    """The ASGI application that answers with `engine`.

    One reply is generated at a time, in a thread; it is stopped when its client goes away.
    Refused requests get 4xx and an OpenAI error object. No thread starts before a request."""
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route

    server = _ChatServer(engine, tokenizer, model_name, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # In a thread: the token being computed may take a while, other clients are told goodbye.
        await asyncio.to_thread(server.worker.shutdown)

    async def refuse(_: Request, e: Exception) -> Response:
        assert isinstance(e, ApiError)
        return _json(e.body, e.status)

    async def refuse_route(request: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)  # 404 and 405, raised by the router
        return _json(error_body(f"{request.method} {request.url.path}: {e.detail}"), e.status_code)

    async def hung_up(_: Request, __: Exception) -> Response:
        return _json(error_body("client closed the request"), 499)  # for the access log only

    async def fail(_: Request, e: Exception) -> Response:
        return _json(_failure(e), 500)

    return FastAPI(
        title="nanochat",
        lifespan=lifespan,
        routes=[
            Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
            Route("/v1/models", server.models, methods=["GET"]),
            Route("/health", server.health, methods=["GET"]),
            page_route(),
        ],
        exception_handlers={
            ApiError: refuse,
            HTTPException: refuse_route,
            ClientDisconnect: hung_up,
            Exception: fail,
        },
        docs_url=None,  # the built-in documentation pages load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
    )


class _ChatServer:
    """The route handlers and what they share."""

    def __init__(self, engine: Any, tokenizer: Any, model_name: str, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.limits = limits
        self.worker = Worker(engine, tokenizer, limits.max_waiting)
        self.started = int(time.time())

    async def models(self, _: Request) -> Response:
        model = {"id": self.model_name, "object": "model", "owned_by": "nanochat"}
        return _json({"object": "list", "data": [{**model, "created": self.started}]})

    async def health(self, _: Request) -> Response:
        jobs = self.worker.num_jobs
        defaults = {
            "temperature": self.limits.temperature,
            "top_k": self.limits.top_k,
            "max_tokens": min(self.limits.max_tokens, self.limits.context),
        }
        return _json(
            {
                "status": "ok",
                "model": self.model_name,
                "context": self.limits.context,
                "defaults": defaults,
                "running": min(jobs, 1),
                "waiting": max(jobs - 1, 0),
            }
        )

    async def chat_completions(self, request: Request) -> Response:
        from starlette.responses import StreamingResponse

        raw = await self._read_body(request)
        chat = parse_chat_request(raw, self.model_name, self.limits)
        # In a thread: a long conversation takes a moment to tokenize, and others are being served.
        prompt = await asyncio.to_thread(self._render, chat)
        job = self.worker.submit(
            prompt,
            max_tokens=min(chat.max_tokens, self.limits.context - len(prompt)),
            temperature=chat.temperature,
            top_k=chat.top_k,
            seed=chat.seed,
        )
        if chat.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            chunks = self._stream(job, chat.include_usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
        return await self._whole(request, job)

    async def _read_body(self, request: Request) -> bytes:
        """The request's bytes, never more than the limit in memory, whatever its headers claim."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.limits.max_body:
                raise ApiError(
                    f"the request is longer than {self.limits.max_body} bytes", status=413
                )
        return bytes(body)

    def _render(self, chat: ChatRequest) -> list[int]:
        """The prompt's token ids, if they leave room for a reply."""
        context = self.limits.context
        # A text of n bytes has at least n / (longest token) tokens: what is hopelessly long is
        # refused before it costs anything.
        contents = [message["content"] for message in chat.conversation["messages"]]
        texts = [c if isinstance(c, str) else "".join(p["text"] for p in c) for c in contents]
        least = sum(len(t.encode()) for t in texts) // int(self.tokenizer.token_bytes.max())
        ids = [] if least >= context else self.tokenizer.render_for_completion(chat.conversation)
        if not ids or len(ids) >= context:
            found = f"{len(ids)}" if ids else f"more than {least}"
            raise ApiError(
                f"the conversation has {found} tokens; this model's context is {context} tokens, "
                "reply included. Shorten it or start a new conversation.",
                "messages",
                "context_length_exceeded",
            )
        return ids

    def _head(self, kind: str) -> dict[str, Any]:
        """The fields that every answer and every chunk of one begins with."""
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model_name,
        }

    async def _whole(self, request: Request, job: Job) -> Response:
        """Waits for the whole reply, watching that the client does too."""
        watcher = asyncio.create_task(_cancel_when_gone(request, job))
        try:
            async for _ in job:
                pass
        except Exception as e:  # answered here: the framework's way would drop the connection too
            return _json(_failure(e), 500)
        finally:
            job.cancel()
            watcher.cancel()
        message: dict[str, Any] = {"role": "assistant", "content": job.reply.text}
        if any(part["type"] != "text" for part in job.reply.parts):
            message["parts"] = job.reply.parts
        choice = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = job.reply.reason or "stop"
        return _json({**self._head("chat.completion"), "choices": [choice], "usage": _usage(job)})

    async def _stream(self, job: Job, include_usage: bool) -> AsyncIterator[str]:
        """The reply as server-sent events. Cancelled by the framework when the client goes away."""
        head = self._head("chat.completion.chunk")

        def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return _event({**head, "choices": [choice]})

        try:
            yield chunk({"role": "assistant", "content": ""})
            async for kind, text in job:
                if kind == "text":
                    yield chunk({"content": text})
                elif kind == "end":
                    yield chunk({}, text)
                else:
                    part_type = "python" if kind == "tool" else "python_output"
                    yield chunk({"tool": {"type": part_type, "text": text}})
            if include_usage:
                yield _event({**head, "choices": [], "usage": _usage(job)})
        except Exception as e:  # the status line is long sent: the error goes where the text went
            yield _event(_failure(e))
        finally:
            job.cancel()
        yield "data: [DONE]\n\n"


async def _cancel_when_gone(request: Request, job: Job) -> None:
    """Cancels the job when the client hangs up. Polled: a whole reply sends nothing in between."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)  # seconds
    job.cancel()


def _usage(job: Job) -> dict[str, int]:
    prompt, completion = len(job.prompt), job.reply.num_tokens
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _failure(e: Exception) -> dict[str, Any]:
    """Logs a fault of ours in full and tells the client its kind only."""
    logger.error("generation failed", exc_info=e)
    return error_body(f"internal error: {type(e).__name__}", kind="server_error")


def _json(body: dict[str, Any], status: int = 200) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(body, status_code=status)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
