"""Many clients at once, some of them hostile: each gets its own answer, whole, and only that."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nanochat.engine import Engine
from nanochat.sampling import Sampling
from nanochat.scheduler import Request
from tests.engines_for_tests import ScriptedEngine, ScriptedScheduler
from tests.models_for_tests import tiny_model
from tests.serving_for_tests import HELLO, PATIENCE, Served, events_of, serving, wait_until
from tests.tokenizers_for_tests import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONTEXT = 96
WORDS = ["harbour", "Selby", "seven", "baker", "two", "and", "it", "lives", "said"]


def engines(count: int) -> list[Engine]:
    """The same random model, a copy for each worker."""
    size = TOKENIZER.get_vocab_size()
    models = [tiny_model("turbo", vocab_size=size, sequence_len=CONTEXT) for _ in range(count)]
    # In float64 no sum depends visibly on who shares the batch, on whatever CPU
    return [Engine(model.double(), TOKENIZER) for model in models]


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    limits = {"max_context": CONTEXT, "max_concurrent": 16, "max_waiting": 64}
    with serving(engines(request.param), TOKENIZER, **limits) as server:
        yield server


def asked(i: int) -> dict[str, Any]:
    """A request of its own for each i: prompt, length, seed and settings."""
    rng = random.Random(i)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=1 + i % 9))}],
        "max_tokens": rng.randint(4, 24),
        "temperature": rng.choice([0, 0.7, 1.5]),
        "top_k": rng.choice([0, 5, 50]),
        "top_p": rng.choice([1, 0.9]),
        "seed": i,
    }
    if i % 5 == 0:
        body["repetition_penalty"] = 1.3
    return body


def answer_of(stream: str) -> tuple[str, str, int]:
    """(text, finish reason, tokens) of a whole stream."""
    *chunks, usage, done = events_of(stream)
    assert done == "[DONE]", stream
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    return text, choices[-1]["finish_reason"], usage["usage"]["completion_tokens"]


def alone(served: Served, body: dict[str, Any]) -> tuple[str, str, int]:
    answer = served.client.post("/v1/chat/completions", json=body).json()
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    return text, choice["finish_reason"], answer["usage"]["completion_tokens"]


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    more = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/chat/completions", json={**body, **more})
    assert response.status_code == 200, response.text
    return response.text


def async_client(served: Served) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=served.url, timeout=PATIENCE, trust_env=False, limits=limits)


def test_64_streaming_clients_get_what_each_gets_alone(served: Served) -> None:
    bodies = [asked(i) for i in range(64)]
    most = 0

    async def all_at_once() -> list[str]:
        nonlocal most
        async with async_client(served) as client:
            tasks = [asyncio.create_task(streamed(client, body)) for body in bodies]
            while not all(task.done() for task in tasks):
                health = (await client.get("/health")).json()
                most = max(most, health["running"])
                await asyncio.sleep(0.02)
            return [task.result() for task in tasks]

    together = [answer_of(text) for text in asyncio.run(all_at_once())]
    assert most > 2  # they did share batches
    assert together == [alone(served, body) for body in bodies]
    assert len({text for text, _, _ in together}) > 40


HOSTILE: list[bytes] = [
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"messages": ' * 20_000,
    b'{"seed": ' + b"9" * 10_000 + b"}",
    b'{"messages": [{"role": "user", "content": "' + b"a" * 10_000_000 + b'"}]}',
    b'{"messages": [{"role": "user", "content": "' + b"a" * 900_000 + b'"}]}',
    b'{"messages": [{"role": "user", "content": "' + b"\\u0000" * 9_000 + b'"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "top_p": -Infinity}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -5}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000}',
    b'{"messages": [{"role": "user", "content": "x"}], "stop": [[[]]]}',
    b'{"messages": [{"role": "user", "content": "x"}], "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"messages": ' + b'{"messages": ' * 300 + b"1" + b"}" * 301,
    b'{"messages": [' + b'{"role": "user", "content": "x"},' * 20_000 + b"1]}",
    b'{"messages": {"role": "user"}, "messages": 3}',
    b'{"prompt": "x", "prompt": 3}',
    b'{"prompt": ' + json.dumps([[1]] * 5000).encode() + b"}",
    b'{"prompt": ' + json.dumps([2**70]).encode() + b"}",
]


@pytest.mark.parametrize("raw", HOSTILE, ids=lambda raw: raw[:50].decode("latin-1"))
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_hostile_bodies_are_refused(served: Served, route: str, raw: bytes) -> None:
    response = served.client.post(route, content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 413), response.text[:300]
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.text) < 1000


async def misbehave(client: httpx.AsyncClient, rng: random.Random) -> None:
    """One bad turn: broken JSON, a wrong value, or hanging up in the midst of a reply."""
    kind = rng.randrange(4)
    if kind == 0:
        raw = rng.choice([raw for raw in HOSTILE if len(raw) < 50_000])
        await client.post(
            "/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"}
        )
    elif kind == 1:
        await client.post("/v1/chat/completions", json={**asked(rng.randrange(99)), "top_p": 7})
    else:
        body = {**asked(rng.randrange(99)), "max_tokens": 60, "stream": kind == 2, "n": 2}
        with pytest.raises((httpx.ReadTimeout, asyncio.TimeoutError)):
            await asyncio.wait_for(_read_a_little(client, body), rng.uniform(0.01, 0.1))


async def _read_a_little(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for _ in response.aiter_bytes():
            await asyncio.sleep(0.02)
        raise asyncio.TimeoutError  # it was quicker


def test_answers_stay_the_same_among_errors_and_hang_ups(served: Served) -> None:
    """A row that another request left, in whatever state, says nothing of it to the next."""
    bodies = [asked(i) for i in (3, 8)]
    wanted = [alone(served, body) for body in bodies]

    async def chaos() -> list[str]:
        answers: list[str] = []
        async with async_client(served) as client:

            async def good(body: dict[str, Any]) -> None:
                for _ in range(12):
                    answers.append(await streamed(client, body))

            async def bad(seed: int) -> None:
                rng = random.Random(seed)
                for _ in range(12):
                    await misbehave(client, rng)

            await asyncio.gather(*map(good, bodies), *map(bad, range(6)))
        return answers

    answers = [answer_of(text) for text in asyncio.run(chaos())]
    assert len(answers) == 24 and set(answers) == set(wanted)
    wait_until(lambda: served.metric("nanochat_replies_running") == 0)
    wait_until(lambda: served.metric("nanochat_replies_waiting") == 0)
    assert served.metric("nanochat_requests_total", status="500") == 0


class EchoScheduler(ScriptedScheduler):
    """Every reply is its own prompt."""

    def add(self, prompt: list[int], sampling: Sampling, num_samples: int = 1) -> list[Request]:
        end = TOKENIZER.encode_special("<|assistant_end|>")
        start = TOKENIZER.encode_special("<|user_start|>")
        steps = [(id, 1) for id in prompt[prompt.index(start) + 1 : -2]] + [(end, 1)]
        self.engine.scripts = [steps]
        return super().add(prompt, sampling, num_samples)


def test_no_secret_reaches_another_client() -> None:
    echo = ScriptedEngine([(0, 1)], delay=0.001)
    limits = {"max_context": 400, "max_new_tokens": 300, "max_concurrent": 8}
    with serving([echo], TOKENIZER, make_scheduler=EchoScheduler, **limits) as served:

        async def client_of(client: httpx.AsyncClient, name: str, seed: int) -> None:
            rng = random.Random(seed)
            for i in range(15):
                secret = f"{name}{rng.randrange(10**6)}"
                body = {"messages": [{"role": "user", "content": secret * 3}]}
                if i % 3 == 2:
                    await misbehave(client, rng)
                text, reason, _ = answer_of(await streamed(client, body))
                assert (text, reason) == (secret * 3, "stop")

        async def both() -> None:
            async with async_client(served) as client:
                names = ["ada", "bob"] * 4
                await asyncio.gather(*(client_of(client, n, i) for i, n in enumerate(names)))

        asyncio.run(both())
        assert served.chat(messages=HELLO).json()["choices"][0]["message"]["content"] == "Hello"


@pytest.mark.gpu
def test_each_gpu_has_a_worker_and_every_reply_comes_whole() -> None:
    import torch

    from nanochat.serving import make_ready

    made = engines(torch.cuda.device_count())
    on_gpus = [
        Engine(make_ready(engine.model.float().to(f"cuda:{i}")), TOKENIZER, step="graph")
        for i, engine in enumerate(made)
    ]
    with serving(on_gpus, TOKENIZER, max_context=CONTEXT) as served:
        assert served.health()["workers"] == len(on_gpus)

        async def all_at_once() -> list[str]:
            async with async_client(served) as client:
                return await asyncio.gather(*(streamed(client, asked(i)) for i in range(64)))

        for i, text in enumerate(asyncio.run(all_at_once())):
            _, reason, tokens = answer_of(text)
            assert reason == "stop" or tokens == asked(i)["max_tokens"]
        assert served.metric("nanochat_requests_total", status="200") >= 64
