"""
Which path leads where, and what /openapi.json says of it.
"""

# No `from __future__ import annotations`: FastAPI reads the annotations of functions made below,
# whose names are imported where they are used.

from typing import TYPE_CHECKING, Any

from nanochat.serve import shapes
from nanochat.serve.metrics import Metrics
from nanochat.serve.page import page_route
from nanochat.serve.protocol import ApiError, ChatRequest, CompletionRequest
from nanochat.serve.shapes import (
    ChatChunk,
    ChatCompletion,
    Health,
    ModelCard,
    ModelList,
    TextChunk,
    TextCompletion,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

    from nanochat.serve.api import ChatServer


def add_routes(app: "FastAPI", server: "ChatServer") -> None:
    """The routes, each with what it answers and how it refuses, for /openapi.json."""
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response

    app.router.routes.append(page_route())

    @app.get(
        "/health",
        summary="What is served, and how busy it is",
        responses={**shapes.refusals(*shapes.ANY), 503: {"model": Health, "description": "Ending"}},
        response_model=Health,
    )
    async def health() -> JSONResponse:
        if app.state.draining:
            return JSONResponse({**server.health(), "status": "shutting_down"}, 503)
        return JSONResponse(server.health())

    @app.get(
        "/metrics",
        summary="For Prometheus",
        responses=shapes.refusals(*shapes.KEYED),
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        return Response(server.metrics.text(), headers={"Content-Type": Metrics.content_type})

    @app.get(
        "/v1/models",
        summary="The one model there is",
        responses=shapes.refusals(*shapes.KEYED),
        response_model=ModelList,
    )
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [server.model_card]})

    @app.get(
        "/v1/models/{name}",
        summary="The same, by name",
        responses=shapes.refusals(*shapes.KEYED, 404),
        response_model=ModelCard,
    )
    async def model(name: str) -> JSONResponse:
        if name != server.model_name:
            raise ApiError("no such model", "model", "model_not_found", 404)
        return JSONResponse(server.model_card)

    @app.post(
        "/v1/chat/completions",
        summary="Continue a conversation",
        responses=shapes.replies(ChatCompletion, ChatChunk),
        response_model=None,
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await server.chat(body, request)

    @app.post(
        "/v1/completions",
        summary="Continue a text",
        responses=shapes.replies(TextCompletion, TextChunk),
        response_model=None,
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await server.complete(body, request)


def describe(app: "FastAPI") -> None:
    """Completes /openapi.json: with the events of streams, without FastAPI's 422 (ours is 400)."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            schemas = document["components"]["schemas"]
            schemas.update(shapes.chunk_schemas())
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            for methods in document["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
