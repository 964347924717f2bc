"""Recomputing activations changes memory and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanochat.engine import KVCache
from nanochat.recompute import MODES, Mode, blocks_of, recompute
from tests.models_for_tests import TINY, tiny_model, tokens_of


def gradients(model: Any, forward: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    idx = tokens_of(model, 2, 16)
    model.zero_grad()
    loss = (model if forward is None else forward)(idx[:, :-1], idx[:, 1:])
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients_are_the_same_to_the_bit(arch: str, mode: Mode) -> None:
    model = tiny_model(arch)
    names, (loss, plain) = list(model.state_dict()), gradients(model)
    runs = []
    for block in blocks_of(model):
        block.mlp.register_forward_pre_hook(lambda *_: runs.append("mlp"))
        block.register_forward_pre_hook(lambda *_: runs.append("block"))
    recompute(model, mode)
    again, found = gradients(model)
    assert torch.equal(loss, again) and all(map(torch.equal, plain, found))
    assert list(model.state_dict()) == names
    # A hook stands outside of what is recomputed, so only what is inside of blocks runs twice.
    layers = model.config.n_layer
    assert runs.count("block") == layers
    assert runs.count("mlp") == layers * (2 if mode == "block" else 1)
    recompute(model, "none")
    assert all(not hasattr(type(b), "plain") for b in blocks_of(model))


@pytest.mark.parametrize("arch", TINY)
def test_less_is_kept_from_mode_to_mode(arch: str) -> None:
    model, kept = tiny_model(arch), []
    idx = tokens_of(model, 2, 16)
    for mode in MODES:
        recompute(model, mode)
        seen: dict[int, int] = {}

        def pack(t: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(idx, idx)
        kept.append(sum(seen.values()))
    assert kept[0] > kept[1] > kept[2], kept


@pytest.mark.parametrize("arch", TINY)
def test_generation_with_a_cache_is_untouched(arch: str) -> None:
    model = tiny_model(arch)
    idx = tokens_of(model, 1, 8)
    with torch.no_grad():
        plain = model(idx)
        recompute(model, "block")
        assert torch.equal(model(idx), plain)
        cache = KVCache(model.config.n_layer, batch=1)
        pieces = [model(piece, kv_cache=cache) for piece in (idx[:, :5], idx[:, 5:])]
    torch.testing.assert_close(torch.cat(pieces, dim=1), plain)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mlp", "block"])
def test_a_compiled_model_recomputes_too(mode: Mode) -> None:
    model = tiny_model("gpt", n_layer=1)
    loss, plain = gradients(model)
    recompute(model, mode)
    # The graph is captured and differentiated as ever, but run as it is: no C++ is compiled.
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    again, found = gradients(model, compiled)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(found, plain)


def test_a_sharded_model_keeps_its_mode() -> None:
    """Its classes are FSDP's by then; the mode that it has may be asked for again."""
    model = tiny_model("gpt")
    recompute(model, "mlp")
    classes = [type(block.mlp) for block in blocks_of(model)]
    for block in blocks_of(model):
        block.unshard = None
    recompute(model, "mlp")
    assert [type(block.mlp) for block in blocks_of(model)] == classes
    with pytest.raises(ValueError, match="cannot change to recompute 'block'"):
        recompute(model, "block")
