"""
The architectures against transformers where it is easy to be wrong: odd numbers of heads, texts
much longer than the configured length, generation with a cache, and torch.compile around it.

The oracles, and the first comparison of logits and gradients, are in test_gpt.py, test_qwen.py and
test_turbo.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.engine import KVCache
from nanochat.hf import to_hf_name
from nanochat.models import ARCHITECTURES, arch_of
from tests.models import test_gpt, test_qwen, test_turbo
from tests.models_for_tests import tiny_model, tokens_of

ORACLES = {"gpt": test_gpt.oracle, "turbo": test_turbo.oracle, "qwen2.5": test_qwen.oracle}
CASES = [("gpt", {}), ("turbo", {}), ("qwen2.5", {"tied": True}), ("qwen2.5", {"tied": False})]
every_case = pytest.mark.parametrize(
    ("arch", "changes"), CASES, ids=["gpt", "turbo", "tied", "untied"]
)


def heads(n_head: int, n_kv_head: int) -> dict[str, int]:
    return {"n_head": n_head, "n_kv_head": n_kv_head, "n_embd": 16 * n_head, "n_layer": 2}


def assert_close(logits: Tensor, wanted: Tensor) -> None:
    """Equal but for the last bits of float32: 1e-5 for logits of ordinary size (about 10)."""
    scale = float(wanted.abs().max())
    assert 1 < scale < 200, "not the logits of a model that says something"
    assert (logits - wanted).abs().max() < 2e-6 * scale


def assert_same_gradients(model: Any, twin: Any, idx: Tensor, targets: Tensor) -> None:
    """Of every parameter, relative to the largest of its own."""
    model(idx, targets).backward()
    logits = twin(input_ids=idx).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    for name, p in model.named_parameters():
        wanted = theirs[to_hf_name(arch_of(model.config), name)]
        assert (p.grad - wanted).abs().max() < 2e-5 * max(1.0, float(wanted.abs().max())), name


def test_every_architecture_has_an_oracle() -> None:
    assert set(ORACLES) == set(ARCHITECTURES)


@every_case
@pytest.mark.parametrize(("n_head", "n_kv_head"), [(3, 3), (5, 1), (7, 1), (9, 3), (15, 5)])
def test_odd_numbers_of_heads(
    arch: str, changes: dict[str, Any], n_head: int, n_kv_head: int
) -> None:
    model = tiny_model(arch, **heads(n_head, n_kv_head), **changes)
    twin = ORACLES[arch](model)
    idx, targets = tokens_of(model, 2, 40), tokens_of(model, 2, 40, seed=1)
    with torch.no_grad():
        assert_close(model(idx), twin(input_ids=idx).logits)
    assert_same_gradients(model, twin, idx, targets)


@every_case
def test_positions_in_the_thousands(arch: str, changes: dict[str, Any]) -> None:
    """The table of 16 positions grows to 3,000, and every parameter learns from the last ones."""
    model = tiny_model(arch, **{**heads(3, 1), "n_layer": 1}, **changes)
    twin = ORACLES[arch](model)
    twin.set_attn_implementation("sdpa")  # the eager one writes the whole matrix of scores
    idx = tokens_of(model, 1, 3000)
    targets = torch.full((1, 3000), -1)
    targets[0, 2900:] = tokens_of(model, 100, seed=1)
    with torch.no_grad():
        assert_close(model(idx)[:, 2500:], twin(input_ids=idx).logits[:, 2500:])
    assert_same_gradients(model, twin, idx, targets)


@every_case
@pytest.mark.parametrize(("n_head", "n_kv_head"), [(4, 2), (3, 1), (5, 5)])
@torch.no_grad()
def test_decoding_with_a_cache(
    arch: str, changes: dict[str, Any], n_head: int, n_kv_head: int
) -> None:
    """Prompt, a chunk, then one token at a time: our cache, theirs, and no cache at all agree."""
    model = tiny_model(arch, **heads(n_head, n_kv_head), **changes)
    twin = ORACLES[arch](model)
    idx, lengths = tokens_of(model, 2, 60), [11, 7, *[1] * 42]
    cache, past = KVCache(model.config.n_layer, batch=2), None
    ours, theirs, at = [], [], 0
    for T in lengths:
        piece = idx[:, at : at + T]
        ours.append(model(piece, kv_cache=cache))
        out = twin(input_ids=piece, past_key_values=past, use_cache=True)
        theirs.append(out.logits)
        past, at = out.past_key_values, at + T
    assert_close(torch.cat(ours, 1), torch.cat(theirs, 1))
    assert_close(torch.cat(ours, 1), model(idx))


@every_case
@torch.no_grad()
def test_decoding_prompts_of_many_lengths(arch: str, changes: dict[str, Any]) -> None:
    """One batch here, padded on the right; there, each text alone with a cache of its own. One is
    far longer than the model was made for."""
    model = tiny_model(arch, **heads(3, 1), **changes)
    twin = ORACLES[arch](model)
    lengths, more = [1, 300, 17], 5
    texts = [tokens_of(model, 1, n + more, seed=n) for n in lengths]
    prompt = torch.zeros(3, max(lengths), dtype=torch.int64)
    for row, text, n in zip(prompt, texts, lengths):
        row[:n] = text[0, :n]
    cache = KVCache(model.config.n_layer, batch=3)
    logits = model(prompt, kv_cache=cache)
    cache.set_lengths(lengths)
    ours = [logits[range(3), [n - 1 for n in lengths]]]
    for step in range(more):
        idx = torch.cat([text[:, n + step, None] for text, n in zip(texts, lengths)])
        ours.append(model(idx, kv_cache=cache)[:, 0])
    for row, (text, n) in enumerate(zip(texts, lengths)):
        out = twin(input_ids=text[:, :n], use_cache=True)
        theirs = [out.logits[0, -1]]
        for step in range(more):
            piece = text[:, n + step, None]
            out = twin(input_ids=piece, past_key_values=out.past_key_values, use_cache=True)
            theirs.append(out.logits[0, -1])
        assert_close(torch.stack(ours)[:, row], torch.stack(theirs))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_torch_compile_takes_decoding_whole(arch: str) -> None:
    """fullgraph: a graph break anywhere is an error. A step is not compiled for its position: else
    every token would be."""
    torch._dynamo.reset()  # programs of other tests count as this one's
    model = tiny_model(arch, n_layer=1, sequence_len=64)
    idx = tokens_of(model, 2, 24)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    cache = KVCache(model.config.n_layer, batch=2)
    pieces = [model(idx[:, :12], kv_cache=cache)]
    for i in range(12, 24):
        pieces.append(compiled(idx[:, i : i + 1], kv_cache=cache))
    assert_close(torch.cat(pieces, 1), model(idx))
    assert len(graphs) == 2  # the first step by its position, then one for any
