"""
The key/value cache of models with sliding windows, and of models that look at the token before.

The slow twin runs the whole text through the model, without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.engine import Engine, KVCache
from nanochat.models import gpt, layers, qwen
from tests.decoding_for_tests import (
    assert_pieces_are_the_whole,
    assert_rows_keep_to_themselves,
    naive_greedy,
)
from tests.models_for_tests import tiny_model, tokens_of
from tests.tokenizers_for_tests import tiny_tokenizer

both_architectures = pytest.mark.parametrize("arch", ["gpt", "qwen2.5"])
# Of the three layers of a tiny model; None: a layer sees everything.
WINDOWS: list[tuple[int | None, ...]] = [(1, 4, None), (7, 7, 7), (None, 64, 3), (100, 20, 33)]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=WINDOWS, ids=str)
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives every layer of both architectures its window."""

    def windowed(q: Tensor, k: Tensor, v: Tensor, cache: Any = None, layer: int = 0) -> Tensor:
        return layers.attention(q, k, v, cache, layer, window=request.param[layer])

    for module in (gpt, qwen):
        monkeypatch.setattr(module, "attention", windowed)
    return request.param


# ---- windows -------------------------------------------------------------------------------------


def test_windows_change_what_the_model_says(windows: Any) -> None:
    """Else everything below would hold without them."""
    model = tiny_model("gpt")
    idx = tokens_of(model, 1, 150)
    other = idx.clone()
    other[0, 0] += 1
    reach = sum(w - 1 for w in windows) if None not in windows else 150
    moved = (model(idx) - model(other))[0].abs().amax(-1) > 1e-6  # (T,)
    assert moved[: min(20, reach + 1)].any() and not moved[reach + 1 :].any()


@both_architectures
@pytest.mark.parametrize("steps", [[5, 1, 7, 1, 1, 30, 1], [40, *[1] * 100], [1, 64, 65, 3]])
def test_cached_logits_are_the_naive_ones_with_windows(
    arch: str, steps: list[int], windows: Any
) -> None:
    """Far beyond the windows."""
    assert_pieces_are_the_whole(tiny_model(arch), steps)


@both_architectures
def test_rows_of_different_lengths_share_a_cache_with_windows(arch: str, windows: Any) -> None:
    assert_rows_keep_to_themselves(tiny_model(arch))


def test_generated_text_is_the_naive_one_with_windows(windows: Any) -> None:
    engine = Engine(tiny_model("gpt", vocab_size=416), tiny_tokenizer(400), tools="none")
    engine.stops = set()
    prompts = [tokens_of(engine.model, n).clamp(max=255).tolist() for n in (1, 40, 7)]
    expected = [naive_greedy(engine.model, 400, prompt, 30) for prompt in prompts]
    assert engine.generate_batch(prompts, max_tokens=30, temperature=0.0)[0] == expected


def test_torch_compile_takes_decoding_with_windows_whole(windows: Any) -> None:
    """fullgraph: a graph break anywhere is an error. Only a few graphs, whatever the position."""
    model = tiny_model("gpt", n_layer=3, sequence_len=128)
    idx = tokens_of(model, 2, 60)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    cache = KVCache(model.config.n_layer, batch=2)
    pieces = [model(idx[:, :36], kv_cache=cache)]
    pieces += [compiled(idx[:, i : i + 1], kv_cache=cache) for i in range(36, 60)]
    assert torch.allclose(torch.cat(pieces, 1), model(idx), atol=1e-4)
    assert len(graphs) == 2


# ---- the token before ----------------------------------------------------------------------------


def naive_previous(text: Tensor) -> Tensor:
    """(N,) -> (N,): the text, one to the right."""
    return torch.cat((text.new_tensor([-1]), text[:-1]))


@pytest.mark.parametrize("steps", [[5, 1, 7, 1, 1, 3], [3, *[1] * 150], [64, 65, 64, 1, 200]])
def test_the_token_before_each(steps: list[int]) -> None:
    """In pieces of any size; what is held grows on the way."""
    text = torch.randint(0, 1000, (2, sum(steps)), generator=torch.Generator().manual_seed(0))
    cache, pieces = KVCache(1, batch=2), []
    for piece in text.split(steps, dim=1):
        pieces.append(cache.previous(piece))
        cache.advance(piece.size(1))
    assert torch.equal(torch.cat(pieces, 1), torch.stack([naive_previous(row) for row in text]))


def test_the_token_before_in_rows_of_different_lengths() -> None:
    """Padded prompts are shortened, rows leave and are copied; padding is never a token before."""
    lengths, more = [1, 13, 60, 29], 90
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 1000, (n + more,), generator=generator) for n in lengths]
    expected = [naive_previous(text) for text in texts]
    cache = KVCache(1, batch=4)
    prompt = torch.full((4, max(lengths)), 1234)  # never a token of a text
    for row, text, n in zip(prompt, texts, lengths):
        row[:n] = text[:n]
    found = cache.previous(prompt)
    assert all(torch.equal(found[i, :n], expected[i][:n]) for i, n in enumerate(lengths))
    cache.advance(prompt.size(1))
    cache.set_lengths(lengths)
    rows, at = [0, 1, 2, 3], list(lengths)
    for step in range(more // 3):
        if step == 10:
            rows = [3, 0, 3, 2]
            cache.select(rows)
            at = [at[r] for r in rows]
        idx = torch.stack([texts[r][n : n + 3] for r, n in zip(rows, at)])
        found = cache.previous(idx)
        assert torch.equal(found, cache.previous(idx)), "asking twice is asking once"
        assert torch.equal(found, torch.stack([expected[r][n : n + 3] for r, n in zip(rows, at)]))
        cache.advance(3)
        at = [n + 3 for n in at]


def test_an_empty_row_has_no_token_before_even_if_it_held_one() -> None:
    cache = KVCache(1, batch=2)
    cache.previous(torch.tensor([[5, 6], [7, 8]]))
    cache.advance(2)
    cache.set_lengths([0, 1])
    assert cache.previous(torch.tensor([[1, 2], [3, 4]])).tolist() == [[-1, 1], [7, 3]]


def test_a_model_that_never_asks_holds_no_tokens_and_may_not_begin_late() -> None:
    model = tiny_model("gpt")
    cache = KVCache(model.config.n_layer, batch=1)
    model(tokens_of(model, 1, 4), kv_cache=cache)
    assert cache.ids is None
    with pytest.raises(ValueError, match="without being asked"):
        cache.previous(tokens_of(model, 1, 1))


def test_torch_compile_takes_previous_whole() -> None:
    def step(cache: KVCache, idx: Tensor) -> Tensor:
        found = cache.previous(idx)
        cache.advance(idx.size(1))
        return found

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    text = tokens_of(tiny_model("gpt"), 1, 20)
    cache = KVCache(1, batch=1)
    pieces = [step(cache, text[:, :4])]
    pieces += [compiled(cache, text[:, i : i + 1]) for i in range(4, 20)]
    assert torch.equal(torch.cat(pieces, 1)[0], naive_previous(text[0]))
