"""
Decoding on fixed memory says what decoding on growing memory says; a captured graph is emulated.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat import static_step
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.kv_cache import KVCache
from nanochat.sampling import Sampling
from nanochat.scheduler import Scheduler
from nanochat.static_step import GraphStep, Step, make_step
from tests.decoding_for_tests import assert_close
from tests.models_for_tests import TINY, tiny_model, tokens_of
from tests.tokenizers_for_tests import tiny_tokenizer

every_architecture = pytest.mark.parametrize("arch", TINY)


class Emulated(GraphStep):
    """A graph without CUDA: what was captured is run again, on the same tensors."""

    LEAST = 32
    captured = 0

    def capture(self, action: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captured += 1
        logits = action().clone()

        def replay() -> None:
            logits.copy_(action())

        return replay, logits


STEPS: dict[str, Callable[[Any], Step]] = {
    "static": lambda model: Step(model, compile="off"),
    "graph": lambda model: Emulated(model, compile="off"),
}


@every_architecture
@pytest.mark.parametrize("kind", STEPS)
@torch.no_grad()
def test_logits_are_the_naive_ones(arch: str, kind: str) -> None:
    """Rows of different lengths, past growths of the memory and of the rotary table."""
    model = tiny_model(arch)
    lengths, more = [1, 13, 60], 80
    texts = [tokens_of(model, 1, n + more, seed=n) for n in lengths]
    naive = [model(text)[0] for text in texts]
    prompt = torch.zeros(3, max(lengths), dtype=torch.int64)
    for row, text, n in zip(prompt, texts, lengths):
        row[:n] = text[0, :n]
    model = tiny_model(arch)  # whose table knows 16 positions
    cache = KVCache(model.config.n_layer, batch=3)
    model(prompt, kv_cache=cache)
    step = STEPS[kind](model)
    for i in range(more):
        at = [n + i for n in lengths]
        cache.set_lengths(at)
        idx = torch.stack([text[0, n : n + 1] for text, n in zip(texts, at)])
        logits = step(idx, cache)
        for row, n in enumerate(at):
            assert_close(logits[row], naive[row][n], (row, i))


@every_architecture
def test_a_scheduler_with_graphs_says_what_one_without_says(arch: str) -> None:
    """Requests come and go, so that graphs of several sizes serve; the memory never moves, as the
    engine gives it room for the whole context."""
    model = tiny_model(arch, vocab_size=416, sequence_len=100)
    engine = Engine(model, tiny_tokenizer(400), tools="none")
    replies = []
    for kind in (None, "graph"):
        engine.step = None if kind is None else STEPS[kind](model)
        rng = random.Random(0)
        scheduler = Scheduler(engine, max_batch=5)
        requests = []
        for _ in range(60):
            if len(requests) < 12 and rng.random() < 0.5:
                prompt = [rng.randrange(256) for _ in range(rng.randint(1, 40))]
                sampling = Sampling(
                    rng.randint(1, 70), rng.choice([0.0, 1.0]), seed=rng.randrange(9)
                )
                requests += scheduler.add(prompt, sampling)
            scheduler.step()
        while scheduler.running or scheduler.waiting:
            scheduler.step()
        replies.append([r.tokens for r in requests])
    assert replies[0] == replies[1] and len(replies[0]) == 12
    step: Any = engine.step
    assert 2 <= step.captured == len(step.graphs) <= 4 * 3
    rows, seen = map(set, zip(*step.graphs))
    assert len(rows) > 1 and seen == {32, 64, 100}


def test_a_step_that_does_not_compile_is_plain_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no C++ compiler")

    def wrong(*args: Any) -> Tensor:
        return static_step.decode(*args) + 1.0

    model = tiny_model("gpt")
    idx = tokens_of(model, 2, 1)
    for compiled, reason in ((broken, "no C++ compiler"), (wrong, "other logits")):
        monkeypatch.setattr(torch, "compile", lambda _, compiled=compiled, **__: compiled)
        cache = KVCache(model.config.n_layer, batch=2)
        with torch.no_grad():
            model(tokens_of(model, 2, 5), kv_cache=cache)
            step = Step(model, compile="traced")
            logits = step(idx, cache)
            wanted = model(torch.cat((tokens_of(model, 2, 5), idx), 1))[:, -1]
        assert_close(logits, wanted)
        out = capsys.readouterr()
        assert reason in out.out + out.err
        assert step.decode is static_step.decode


def compile_with(backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile as the step calls it, its guards included, but without the C++ compiler."""
    real = torch.compile

    def compile(f: Any, options: dict[str, Any]) -> Any:
        guards = {"guard_filter_fn": options["guard_filter_fn"]}
        return real(f, fullgraph=True, backend=backend, options=guards)

    monkeypatch.setattr(torch, "compile", compile)


@every_architecture
@torch.no_grad()
def test_torch_compile_takes_the_step_whole(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a break in the graph, and one graph for any size of the memory."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_with(backend, monkeypatch)
    model = tiny_model(arch, n_layer=2)
    idx = tokens_of(model, 2, 150)
    naive = model(idx)
    cache = KVCache(model.config.n_layer, batch=2)
    model(idx[:, :30], kv_cache=cache)
    step = Step(model, compile="traced")
    for i in range(30, 150):
        assert_close(step(idx[:, i : i + 1], cache), naive[:, i])
        cache.set_lengths([i + 1] * 2)
    assert step.decode is not static_step.decode
    assert len(graphs) <= 2


@torch.no_grad()
def test_a_program_serves_its_own_model_and_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the same shapes in models of other settings; rows come and go."""
    torch._dynamo.reset()
    compile_with(lambda graph, _: graph.forward, monkeypatch)
    models = [tiny_model("qwen2.5", n_layer=2, norm_eps=eps) for eps in (1e-6, 1.0)]
    steps = [Step(model, compile="traced") for model in models]
    for B in (1, 3, 1, 2):
        for model, step in zip(models, steps):
            idx = tokens_of(model, B, 12)
            cache = KVCache(model.config.n_layer, batch=B)
            model(idx[:, :10], kv_cache=cache)
            for i in (10, 11):
                assert_close(step(idx[:, i : i + 1], cache), model(idx)[:, i], (B, i))
                cache.set_lengths([i + 1] * B)
            assert step.decode is not static_step.decode


def test_steps_by_name() -> None:
    model = tiny_model("gpt")
    assert make_step("plain", model) is None
    with pytest.raises(UserError, match=r"--step=graph needs CUDA.*cpu"):
        make_step("graph", model)
    with pytest.raises(UserError, match=r"--step=fast.*plain, compiled, graph"):
        make_step("fast", model)


@pytest.mark.gpu
@every_architecture
@torch.no_grad()
def test_a_captured_graph_says_what_the_model_says(arch: str) -> None:
    model = tiny_model(arch, sequence_len=128).cuda()
    idx = tokens_of(model, 3, 100).cuda()
    naive = model(idx)
    cache = KVCache(model.config.n_layer, batch=3, device="cuda", room=128)
    model(idx[:, :30], kv_cache=cache)
    step = GraphStep(model, compile="off")
    for i in range(30, 100):
        assert torch.allclose(step(idx[:, i : i + 1], cache), naive[:, i], atol=1e-2)
        cache.set_lengths([i + 1] * 3)
    assert list(step.graphs) == [(4, 128)]
