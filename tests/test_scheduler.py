"""
Continuous batching: whatever comes, goes and waits, every request gets what it would get alone.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.sampling import Sampling
from nanochat.scheduler import Request, Scheduler, Token
from nanochat.tools import Tool, ToolLimits
from tests.decoding_for_tests import naive_greedy
from tests.models_for_tests import TINY, tiny_model
from tests.test_engine_tools import Recited, scripted, tool_call
from tests.tokenizers_for_tests import tiny_tokenizer

VOCAB = 400
every_architecture = pytest.mark.parametrize("arch", TINY)


def engine_of(arch: str = "gpt", context: int = 1000, **changes: Any) -> Engine:
    model = tiny_model(arch, vocab_size=VOCAB + 16, sequence_len=context, **changes)
    return Engine(model, tiny_tokenizer(VOCAB), tools="none")


def run(scheduler: Scheduler) -> list[Token]:
    """All tokens, until nothing runs or waits."""
    tokens: list[Token] = []
    while scheduler.running or scheduler.waiting:
        tokens += scheduler.step()
    return tokens


def of(tokens: Iterable[Token], request: Request) -> list[int]:
    return [token.id for token in tokens if token.request is request]


def random_prompt(rng: random.Random, longest: int = 40) -> list[int]:
    return [rng.randrange(256) for _ in range(rng.randint(1, longest))]


def random_sampling(rng: random.Random) -> Sampling:
    return Sampling(
        max_tokens=rng.randint(1, 40),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
        top_k=rng.choice([None, 5, 50]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.02]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        seed=rng.randrange(100),
        logprobs=rng.choice([None, 0, 3]),
    )


@every_architecture
def test_a_warm_scheduler_has_taken_steps_and_forgotten_them(arch: str) -> None:
    """One of one row and one of two; what comes then is as if nothing had been."""
    engine = engine_of(arch)
    cold, warm, small = (Scheduler(engine, max_batch=n) for n in (3, 3, 1))
    for scheduler, wanted in ((warm, [1, 2]), (small, [1])):
        taken: list[int] = []
        forward = scheduler.rows.forward
        scheduler.rows.forward = lambda t, f=forward, n=taken: (n.append(len(t)), f(t))  # type: ignore[method-assign, misc]
        scheduler.warm_up()
        assert taken == wanted and not scheduler.running and not scheduler.waiting
    requests = [s.add([5, 6, 7], Sampling(max_tokens=9), 2) for s in (cold, warm)]
    for scheduler in (cold, warm):
        run(scheduler)
    assert [r.tokens for r in requests[0]] == [r.tokens for r in requests[1]]


@every_architecture
@pytest.mark.parametrize("seed", range(3))
def test_a_request_gets_what_it_would_get_alone(arch: str, seed: int) -> None:
    """Random arrivals, lengths, settings and cancellations, rows fewer than requests; each request
    is compared with a scheduler that has nothing else to do."""
    engine, rng = engine_of(arch), random.Random(seed)
    scheduler = Scheduler(engine, max_batch=rng.randint(2, 5))
    asked: list[Request] = []
    tokens: list[Token] = []
    cancelled = 0
    for _ in range(120):
        if len(asked) < 16 and rng.random() < 0.4:
            prompt, sampling = random_prompt(rng), random_sampling(rng)
            asked += scheduler.add(prompt, sampling, rng.choice([1, 1, 3]))
        if asked and rng.random() < 0.05:
            victim = rng.choice(asked)
            cancelled += not victim.reason
            scheduler.cancel(victim)
        tokens += scheduler.step()
        assert scheduler.running <= scheduler.max_batch
    tokens += run(scheduler)
    assert cancelled >= 1 and len(asked) >= 16
    assert len({r.reason for r in asked}) >= 2
    for request in asked:
        alone = Scheduler(engine, max_batch=request.sample + 1)
        twins = alone.add(request.prompt, request.sampling, request.sample + 1)
        of_twin = [t for t in run(alone) if t.request is twins[-1]]
        ours = [t for t in tokens if t.request is request]
        assert [t.id for t in ours] == request.tokens
        if request.reason == "cancelled":
            assert request.tokens == [t.id for t in of_twin][: len(ours)]
            continue
        assert [(t.id, t.mask, t.last) for t in ours] == [(t.id, t.mask, t.last) for t in of_twin]
        assert request.reason == twins[-1].reason
        for a, b in zip(ours, of_twin):
            assert a.logprob == (None if b.logprob is None else pytest.approx(b.logprob, abs=1e-4))
            assert (a.top is None) == (request.sampling.logprobs is None)


@every_architecture
def test_greedy_requests_are_the_naive_twin_s(arch: str) -> None:
    engine, rng = engine_of(arch), random.Random(1)
    scheduler = Scheduler(engine, max_batch=3)
    prompts = [random_prompt(rng) for _ in range(8)]
    requests = [scheduler.add(p, Sampling(max_tokens=25, temperature=0))[0] for p in prompts]
    run(scheduler)
    for prompt, request in zip(prompts, requests):
        twin = naive_greedy(engine.model, VOCAB, prompt, 25, engine.stops)
        assert [*prompt, *request.tokens] == twin
        assert request.reason == ("stop" if twin[-1] in engine.stops else "length")


def test_the_scheduler_and_generate_batch_say_the_same() -> None:
    engine = engine_of()
    sampling = Sampling(max_tokens=20, seed=9)
    scheduler = Scheduler(engine, max_batch=2)
    requests = scheduler.add([1, 2, 3], sampling, num_samples=4)
    run(scheduler)
    whole, _ = engine.generate_batch([[1, 2, 3]], num_samples=4, max_tokens=20, seed=[9])
    assert [[1, 2, 3, *r.tokens] for r in requests] == whole
    other, _ = engine.generate_batch([[1, 2, 3]], num_samples=4, seed=[9], sampling=sampling)
    assert other == whole


def test_a_prompt_is_prefilled_once_for_all_its_samples() -> None:
    """Even if they cannot all run at once."""
    engine = engine_of()
    seen: list[tuple[int, ...]] = []
    hidden = engine.model.hidden

    def counted(idx: Any, cache: Any = None) -> Any:
        seen.append(tuple(idx.shape))
        return hidden(idx, cache)

    engine.model.hidden = counted
    scheduler = Scheduler(engine, max_batch=2)
    requests = scheduler.add(list(range(50)), Sampling(max_tokens=3), num_samples=7)
    run(scheduler)
    assert sum(50 in shape for shape in seen) == 1, seen
    assert len({tuple(r.tokens) for r in requests}) > 3, "samples are to differ"


def test_requests_are_let_in_in_the_order_they_came() -> None:
    scheduler = Scheduler(engine_of(), max_batch=2)
    requests = [scheduler.add([n], Sampling(max_tokens=4, temperature=0))[0] for n in range(6)]
    assert (scheduler.running, scheduler.waiting) == (0, 6)
    first: list[int] = []
    while scheduler.running or scheduler.waiting:
        for token in scheduler.step():
            if token.request.id not in first:
                first.append(token.request.id)
        assert scheduler.running <= 2
    assert first == [r.id for r in requests]


# ---- context and memory --------------------------------------------------------------------------


@every_architecture
def test_the_context_ends_a_request(arch: str) -> None:
    engine = engine_of(arch, context=20)
    engine.stops = set()
    scheduler = Scheduler(engine, max_batch=4)
    requests = [scheduler.add([5] * n, Sampling(max_tokens=50))[0] for n in (1, 12, 19)]
    tokens = run(scheduler)
    assert [len(r.tokens) for r in requests] == [19, 8, 1]
    assert {r.reason for r in requests} == {"length"}
    assert all(of(tokens, r) == r.tokens for r in requests)
    for n in (20, 21, 500):
        with pytest.raises(UserError, match=rf"prompt has {n} tokens.*context is 20"):
            scheduler.add([5] * n, Sampling())
    with pytest.raises(UserError, match="at least one token"):
        scheduler.add([], Sampling())
    with pytest.raises(UserError, match="top_p=0"):
        scheduler.add([1], Sampling(top_p=0))
    assert (scheduler.running, scheduler.waiting) == (0, 0)


def test_memory_is_bounded_by_what_requests_may_come_to_hold() -> None:
    scheduler = Scheduler(engine_of(), max_batch=8, max_tokens_held=100)
    for n in (10, 10, 10, 30, 10, 10):  # with 20 tokens of reply each
        scheduler.add([1] * n, Sampling(max_tokens=20))
    most = 0
    while scheduler.running or scheduler.waiting:
        scheduler.step()
        held = [len(r.prompt) + r.room for r in scheduler._running]
        most = max(most, len(held))
        assert not held or max(held) * len(held) <= 100
    assert most == 3
    with pytest.raises(UserError, match="120 tokens; this server holds no more than 100"):
        scheduler.add([1] * 60, Sampling(max_tokens=60))


# ---- ends ----------------------------------------------------------------------------------------


def test_cancelling_at_any_time() -> None:
    scheduler = Scheduler(engine_of(), max_batch=1)
    running, waiting = (scheduler.add([n], Sampling(max_tokens=9))[0] for n in (1, 2))
    scheduler.step()
    scheduler.cancel(waiting)
    scheduler.cancel(running, "stop")
    assert (scheduler.running, scheduler.waiting) == (0, 0)
    assert (running.reason, waiting.reason) == ("stop", "cancelled")
    scheduler.cancel(running)
    assert running.reason == "stop"
    assert scheduler.step() == []


def test_a_stop_string_ends_a_request() -> None:
    engine = engine_of()
    engine.stops = set()
    plain, _ = engine.generate_batch([1, 2], max_tokens=30, temperature=0.0)
    text = engine.tokenizer.decode(plain[0][2:])
    stop = text[10:13]
    sampling = Sampling(max_tokens=30, temperature=0, stop=("not there", stop))
    scheduler = Scheduler(engine)
    (request,) = scheduler.add([1, 2], sampling)
    run(scheduler)
    assert request.reason == "stop" and request.tokens == plain[0][2:][: len(request.tokens)]
    assert stop in engine.tokenizer.decode(request.tokens)
    assert stop not in engine.tokenizer.decode(request.tokens[:-1])


def test_log_probabilities_are_the_naive_ones() -> None:
    """Of the model as it is, whatever the settings, with the likeliest beside them."""
    engine = engine_of()
    scheduler = Scheduler(engine)
    sampling = Sampling(max_tokens=6, temperature=0.5, top_k=3, repetition_penalty=2.0, logprobs=4)
    (request,) = scheduler.add([1, 2, 3], sampling)
    (other,) = scheduler.add([4], replace(sampling, logprobs=None))
    tokens = run(scheduler)
    assert all(t.logprob is None and t.top is None for t in tokens if t.request is other)
    with torch.no_grad():
        logits = engine.model(torch.tensor([[1, 2, 3, *request.tokens]]))[0, 2:-1, :VOCAB]
    for token, row in zip((t for t in tokens if t.request is request), logits.log_softmax(-1)):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        values, ids = row.topk(4)
        assert token.top is not None and [id for id, _ in token.top] == ids.tolist()
        assert [p for _, p in token.top] == pytest.approx(values.tolist(), abs=1e-4)


# ---- tools ---------------------------------------------------------------------------------------


def calling_engine(expression: str = "12+30") -> tuple[Engine, list[int]]:
    """A model that calls a tool after token 10, and says 65 after that; and the call."""
    tokenizer = tiny_tokenizer(VOCAB)
    call, without = tool_call(tokenizer, expression)
    end = tokenizer.encode_special("<|output_end|>")
    return scripted(tokenizer, [10, *call], without, [end, 66, 67]), call


def test_a_slow_tool_holds_up_its_own_row_only() -> None:
    engine, call = calling_engine()
    job: Future[str | None] = Future()
    engine.tool = Tool(lambda code: None, quick=False)
    engine.run_tool = lambda code: job  # type: ignore[method-assign]
    scheduler = Scheduler(engine)
    (caller,) = scheduler.add([10], Sampling(max_tokens=len(call) + 20, temperature=0))
    (talker,) = scheduler.add([11], Sampling(max_tokens=60, temperature=0))
    for _ in range(len(call) + 10):
        scheduler.step()
    assert caller.tokens == call, "the caller waits"
    assert len(talker.tokens) == len(call) + 10, "the other does not"
    job.set_result("42")
    forced = engine.tokenizer.tool_output_ids("42")
    told = [(t.id, t.mask) for t in scheduler.step() if t.request is caller]
    assert told == [*((id, 0) for id in forced), (66, 1)]
    run(scheduler)
    assert caller.tokens[: len(call) + len(forced) + 2] == [*call, *forced, 66, 67]
    assert (caller.reason, talker.reason, len(talker.tokens)) == ("length", "length", 60)


def test_a_row_that_waits_may_be_cancelled_and_one_that_waits_alone_goes_on() -> None:
    engine, call = calling_engine()
    gate = threading.Event()

    def slow(code: str) -> str:
        assert gate.wait(timeout=60)
        return code

    engine.tool = Tool(slow, quick=False)
    scheduler = Scheduler(engine, max_batch=1)
    sampling = Sampling(max_tokens=len(call) + 8, temperature=0)
    (first,) = scheduler.add([10], sampling)
    while len(first.tokens) < len(call):
        scheduler.step()
    assert scheduler.step() == []  # nothing else to do; it does not wait for ever either
    scheduler.cancel(first)
    (second,) = scheduler.add([10], sampling)
    while len(second.tokens) < len(call):
        scheduler.step()
    gate.set()
    run(scheduler)
    forced = engine.tokenizer.tool_output_ids("12+30")
    assert second.tokens == [*call, *forced, 66, 67][: len(call) + 8]


def test_a_tool_that_fails_says_so_and_the_reply_goes_on() -> None:
    engine, call = calling_engine()

    def broken(code: str) -> str:
        raise OSError("no more processes")

    engine.tool = Tool(broken, quick=False)
    scheduler = Scheduler(engine)
    (request,) = scheduler.add([10], Sampling(max_tokens=99, temperature=0))
    run(scheduler)
    forced = engine.tokenizer.tool_output_ids("OSError: the tool failed")
    assert request.tokens[len(call) :][: len(forced) + 1] == [*forced, 66]


@pytest.mark.parametrize("quick", [True, False])
def test_how_the_output_comes_in_changes_nothing_after_it(quick: bool) -> None:
    """In one step or in many, at once or later: the same random numbers belong to the same tokens.
    The calls of the recited text are answered, the rest of the replies is chance."""
    tokenizer = tiny_tokenizer(VOCAB)
    call, _ = tool_call(tokenizer, "12+30")
    forced = tokenizer.tool_output_ids("42")

    class Model(Recited):
        def logits(self, x: Any) -> Any:
            sure = super().logits(x)
            chance = torch.arange(VOCAB).remainder(7).float() - 20.0 * (torch.arange(VOCAB) >= 256)
            return torch.where((x == 65).expand_as(sure), chance, sure)

    engine = Engine(Model(1, [*call, *[65] * 99]), tokenizer)
    engine.tool = Tool(lambda code: "42", quick=quick)
    sequences, _ = engine.generate_batch([10], num_samples=3, max_tokens=40, seed=3)
    for s, sequence in enumerate(sequences):
        assert sequence[1 : 1 + len(call) + len(forced)] == [*call, *forced]
        rest = sequence[1 + len(call) + len(forced) :]
        free = Engine(Model(1, [*call, *forced, *[65] * 99]), tokenizer, tools="none")
        whole, _ = free.generate_batch([10], num_samples=3, max_tokens=40, seed=3)
        assert whole[s][1 + len(call) + len(forced) :] == rest
    assert len({tuple(s) for s in sequences}) == 3


def test_calls_and_output_are_limited() -> None:
    engine, _ = calling_engine()
    engine.limits = ToolLimits(characters=5, calls=1)
    engine.tool = Tool(lambda code: "x" * 1000, quick=True)
    ids, masks = engine.generate_batch([10], max_tokens=200, temperature=0.0)
    assert "x" * 5 + "... [cut]" in engine.tokenizer.decode(ids[0])
    assert sum(1 for m in masks[0][1:] if m == 0) == len(
        engine.tokenizer.tool_output_ids("xxxxx... [cut]")
    )
    engine.limits = ToolLimits(calls=0)
    assert 0 not in engine.generate_batch([10], max_tokens=40, temperature=0.0)[1][0][1:]
