"""The threads that generate: what they do when something is refused, fails, or is not wanted."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.sampling import Sampling
from nanochat.scheduler import Request
from nanochat.serve.protocol import ApiError
from nanochat.serve.worker import Job, Pool, Worker
from tests.engines_for_tests import ScriptedEngine, ScriptedScheduler, script_of
from tests.tokenizers_for_tests import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT = [1, 2, 3]


def pool_of(scheduler: type[ScriptedScheduler] = ScriptedScheduler, **more: Any) -> Pool:
    engine = ScriptedEngine(script_of(TOKENIZER, "Hello!"), **more)
    return Pool([Worker(lambda: scheduler(engine, 2), TOKENIZER, "test")], max_open=4)


async def text_of(job: Job) -> str:
    await job.accepted()
    return "".join([piece.text async for piece in job if piece.kind == "text"])


def test_replies_of_several_requests_come_apart() -> None:
    async def go() -> list[str]:
        pool = pool_of()
        jobs = [pool.submit([PROMPT], Sampling(max_tokens=n)) for n in (1, 2, 50)]
        texts = await asyncio.gather(*map(text_of, jobs))
        assert pool.num_open == pool.num_running == pool.num_waiting == 0
        pool.shutdown()
        return texts

    whole = "Hello!"
    first, second, third = asyncio.run(go())
    assert third == whole and whole.startswith(second) and second.startswith(first)


class Refusing(ScriptedScheduler):
    """Refuses the second prompt of a request."""

    def add(self, prompt: list[int], sampling: Sampling, num_samples: int = 1) -> list[Request]:
        if prompt == [9]:
            raise UserError("no nines")
        return super().add(prompt, sampling, num_samples)


def test_what_the_scheduler_refuses_is_a_refusal_and_leaves_nothing_behind() -> None:
    async def go() -> None:
        pool = pool_of(Refusing)
        with pytest.raises(ApiError, match="no nines") as e:
            await pool.submit([PROMPT, [9]], Sampling()).accepted()
        assert e.value.status == 400
        assert await text_of(pool.submit([PROMPT], Sampling())) == "Hello!"
        assert pool.num_open == pool.num_running == 0
        pool.shutdown()

    asyncio.run(go())


def test_a_scheduler_that_can_not_be_made_again_is_tried_again_with_the_next_request() -> None:
    made: list[ScriptedScheduler] = []

    class Failing(ScriptedScheduler):
        def step(self) -> Any:
            if self is made[0]:
                raise MemoryError
            return super().step()

    def make() -> ScriptedScheduler:
        if len(made) == 1:
            made.append(made[0])
            raise MemoryError("still none")
        made.append(Failing(ScriptedEngine(script_of(TOKENIZER, "Hello!")), 2))
        return made[-1]

    async def go() -> None:
        pool = Pool([Worker(make, TOKENIZER, "test")], max_open=4)
        for _ in range(2):
            with pytest.raises(MemoryError):
                await text_of(pool.submit([PROMPT], Sampling()))
        assert await text_of(pool.submit([PROMPT], Sampling())) == "Hello!"
        pool.shutdown()

    asyncio.run(go())


def test_cancelled_in_the_queue_it_never_runs() -> None:
    async def go() -> None:
        pool = pool_of(delay=0.001)
        engine_calls = [pool.submit([PROMPT], Sampling(max_tokens=2000)) for _ in range(2)]
        waiting = pool.submit([PROMPT], Sampling())
        await waiting.accepted()
        waiting.cancel()
        waiting.cancel()
        assert [piece async for piece in waiting] == []
        for job in engine_calls:
            job.cancel()
            async for _ in job:
                pass
        assert pool.num_open == 0
        pool.shutdown()
        waiting.cancel()  # harmless ever after

    asyncio.run(go())


def test_after_the_end_nothing_is_taken() -> None:
    async def go() -> None:
        pool = pool_of()
        job = pool.submit([PROMPT], Sampling(max_tokens=10**6))
        await asyncio.to_thread(pool.shutdown)
        with pytest.raises(ApiError) as e:
            await text_of(job)
            await pool.submit([PROMPT], Sampling()).accepted()
        assert e.value.status == 503
        assert not [t for t in threading.enumerate() if t.name == "test"]

    asyncio.run(go())


def test_the_queue_is_counted_in_replies() -> None:
    async def go() -> None:
        pool = pool_of(delay=0.01)
        job = pool.submit([PROMPT, PROMPT], Sampling(), n=2)
        with pytest.raises(ApiError) as e:
            pool.submit([PROMPT], Sampling())
        assert e.value.status == 429 and e.value.headers["Retry-After"]
        async for _ in job:
            pass
        assert await text_of(pool.submit([PROMPT], Sampling())) == "Hello!"
        pool.shutdown()

    asyncio.run(go())
