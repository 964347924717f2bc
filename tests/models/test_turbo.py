"""
Turbo: the class that exports take along (nanochat/hf_code/), which shares no code with ours, is the
oracle for logits and gradients; each addition to the GPT is looked at by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanochat.hf import config_to_hf
from nanochat.models import Turbo, TurboConfig, build_model, turbo
from nanochat.models.layers import rms_norm
from tests.models_for_tests import TINY, randomise, tiny_model, tokens_of


def oracle(model: Any) -> Any:
    """The exported class with the same weights, from the config.json that we would write."""
    pytest.importorskip("transformers", minversion="5.0")
    from nanochat.hf_code.modeling_nanochat_turbo import (
        NanochatTurboConfig,
        NanochatTurboForCausalLM,
    )

    data = config_to_hf(model.config, eos_token_id=1, bos_token_id=0, dtype="float32")
    twin = NanochatTurboForCausalLM(NanochatTurboConfig(**data)).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


# ---- the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_layer, n_head, n_kv_head, n_embd, window",
    [(1, 1, 1, 32, 5), (3, 2, 2, 64, 1), (2, 4, 2, 64, 7), (5, 3, 1, 48, 30), (9, 4, 4, 32, 3)],
)
def test_logits_and_gradients_are_those_of_the_exported_class(
    n_layer: int, n_head: int, n_kv_head: int, n_embd: int, window: int
) -> None:
    config = TurboConfig(24, 96, n_layer, n_head, n_kv_head, n_embd, window)
    model = randomise(build_model(config, seed=1), seed=2)
    with torch.no_grad():
        model.residual_scale.normal_(1.0, 0.3)  # else deep ones forget their lower layers
        model.lm_head.weight.mul_(4)  # so that the softcap is felt
    twin = oracle(model)
    idx, targets = tokens_of(model, 2, 24), tokens_of(model, 2, 24, seed=1)
    targets[0, :5] = -1
    logits, wanted = model(idx), twin(input_ids=idx).logits
    assert logits.dtype == torch.float32 and logits.shape == (2, 24, 96)
    assert logits.abs().max() > 10, "the softcap is not tested by such small logits"
    assert (logits - wanted).abs().max() < 2e-5 * wanted.abs().max()

    model(idx, targets).backward()
    F.cross_entropy(wanted.flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    for name, p in model.named_parameters():
        scale = gradients[name].abs().max()
        assert scale > 0 or (n_layer == 1 and name == "backout_scale"), f"{name} says nothing"
        assert (p.grad - gradients[name]).abs().max() < 1e-4 * max(1.0, scale), name


@pytest.mark.parametrize(
    "name", ["residual_scale", "embedding_scale", "smear_scale", "backout_scale", "smear_gate",
             "value_gate", "value_embeds.0", "h.0.attn.c_k"],
)  # fmt: skip
def test_the_oracle_notices_one_wrong_weight(name: str) -> None:
    """The comparison above is as sharp as it looks: every kind of weight shows when it is off."""
    model = tiny_model("turbo")
    twin, idx = oracle(model), tokens_of(model, 1, 16)
    with torch.no_grad():
        for full, p in model.named_parameters():
            if name in full:
                p.mul_(torch.linspace(1.1, 1.2, p.numel()).view(p.shape))
    assert (model(idx) - twin(input_ids=idx).logits).abs().max() > 5e-4


def test_training_lowers_the_loss_of_every_depth() -> None:
    """One layer has no middle, two have one value table, five have a long layer in between."""
    for n_layer in (1, 2, 5):
        model = build_model(replace(TINY["turbo"], n_layer=n_layer), seed=n_layer)
        idx = tokens_of(model, 4, 17)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], n_layer


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7, 12, 13, 20])
def test_shape_at_a_depth(depth: int) -> None:
    """Counted from the shape alone: every fourth layer and the last see everything; tables of value
    vectors on the last layer and every other one before it."""
    config = TurboConfig.from_depth(depth, 1000, 1024)
    assert (config.n_layer, config.n_embd) == (depth, 64 * depth)
    head_dim = 128 if depth >= 8 and depth % 2 == 0 else 64
    assert config.n_embd // config.n_head == head_dim and config.n_kv_head == config.n_head
    long = [i for i in range(depth) if config.layer_window(i) is None]
    assert long == sorted({*range(3, depth, 4), depth - 1})
    assert {config.layer_window(i) for i in range(depth)} - {None} <= {256}
    tables = [i for i in range(depth) if config.has_value_embedding(i)]
    assert tables == sorted(range(depth - 1, -1, -2))
    with torch.device("meta"):
        model = Turbo(config)
    V, D, K = 1000, 64 * depth, config.n_kv_head
    blocks = depth * 12 * D * D + len(tables) * turbo.GATE_CHANNELS * K
    rest = 2 * depth + turbo.GATE_CHANNELS + 2  # scalars on the stream, the gate, smear and backout
    assert sum(p.numel() for p in model.parameters()) == (2 + len(tables)) * V * D + blocks + rest


@pytest.mark.parametrize(
    "sequence_len, window", [(64, 128), (512, 128), (513, 256), (1024, 256), (2048, 512)]
)
def test_short_windows_are_a_quarter_in_whole_blocks(sequence_len: int, window: int) -> None:
    assert TurboConfig.from_depth(4, 1000, sequence_len).window == window


def test_flops_by_hand() -> None:
    """d12 at 2,048 positions: blocks of 12 x 768^2 and six gates of 32 x 6, the smear's gate, the
    head; nine layers attend to 512 positions, three (3, 7 and 11) to all."""
    config = TurboConfig.from_depth(12, 65_536, 2048)
    with torch.device("meta"):
        model = Turbo(config)
    matmul = 12 * 12 * 768 * 768 + 6 * 32 * 6 + 32 + 65_536 * 768
    attention = 12 * 768 * (9 * 512 + 3 * 2048)
    assert model.flops_per_token() == 6 * matmul + attention
    short = Turbo(replace(TINY["turbo"], window=100))  # longer than a row, which is 16
    everything = replace(TINY["turbo"], window=16)
    assert short.flops_per_token() == Turbo(everything).flops_per_token()


# ---- each addition -------------------------------------------------------------------------------


def test_at_the_start_it_is_a_plain_stream() -> None:
    """Zero output projections: blocks are the identity; the smear adds nothing; each layer adds a
    share of the embedding; of the middle a share is taken off; the rest is the norm's business."""
    model = build_model(TINY["turbo"], seed=3)
    idx = tokens_of(model, 2, 10)
    embedded = rms_norm(model.wte(idx))
    assert torch.allclose(model.hidden(idx), rms_norm(embedded), atol=1e-5)
    assert not model.smear_scale.any() and not model.smear_gate.weight.any()
    assert (model.residual_scale == 1).all()
    # each block's gates begin at 1: twice the sigmoid of nothing
    for block in model.h:
        assert block.attn.value_gate is None or not block.attn.value_gate.weight.any()
    assert model(idx, idx).item() == pytest.approx(math.log(96), abs=0.05)


def test_everything_learns_from_the_start() -> None:
    """What begins at zero holds back what it multiplies for a step or two, and not for ever."""
    model = build_model(TINY["turbo"], seed=3)
    idx = tokens_of(model, 4, 16)
    for _ in range(4):
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:]).backward()
        moving = {name: bool(p.grad.any()) for name, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert all(moving.values()), moving


def reach(model: Any, length: int, at: int) -> list[int]:
    """The positions whose logits move when the token at that position is another."""
    idx = tokens_of(model, 1, length)
    other = idx.clone()
    other[0, at] = (other[0, at] + 1) % model.config.vocab_size
    moved = (model(idx) - model(other))[0].abs().amax(-1) > 1e-6  # (T,)
    return moved.nonzero().flatten().tolist()


@torch.no_grad()
def test_how_far_a_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no layer were long, a token's news would travel window - 1 positions a layer, and the
    smear carries it one more; with the last layer long it travels everywhere."""
    model = tiny_model("turbo")  # three layers, windows of 5
    assert reach(model, 60, at=10) == list(range(10, 60))
    for block in model.h:
        block.attn.window = 5
    assert reach(model, 60, at=10) == list(range(10, 10 + 3 * 4 + 1 + 1))
    model.smear_scale.zero_()
    assert reach(model, 60, at=10) == list(range(10, 10 + 3 * 4 + 1))


@torch.no_grad()
def test_the_smear_is_of_the_token_before_and_of_no_other() -> None:
    model = tiny_model("turbo")
    idx = tokens_of(model, 1, 12)
    plain, smeared = rms_norm(model.wte(idx)), model._smeared(idx, None)
    assert torch.equal(smeared[:, 0], plain[:, 0]), "nothing stands before the first"
    gate = torch.sigmoid(plain[:, 1:, :32] @ model.smear_gate.weight.T)
    wanted = plain[:, 1:] + model.smear_scale * gate * plain[:, :-1]
    assert torch.allclose(smeared[:, 1:], wanted, atol=1e-6)


ADDITIONS: dict[str, Callable[[Any], Any]] = {
    "value embeddings": lambda m: [t.weight.zero_() for t in m.value_embeds.values()],
    "value gates": lambda m: m.h[0].attn.value_gate.weight.zero_(),
    "residual scale": lambda m: m.residual_scale.fill_(1.0),
    "embedding scale": lambda m: m.embedding_scale.zero_(),
    "smear": lambda m: m.smear_scale.zero_(),
    "smear gate": lambda m: m.smear_gate.weight.zero_(),
    "backout": lambda m: m.backout_scale.zero_(),
}


@pytest.mark.parametrize("addition", ADDITIONS)
@torch.no_grad()
def test_every_addition_matters(addition: str) -> None:
    model = tiny_model("turbo")
    idx = tokens_of(model, 1, 12)
    before = model(idx)
    ADDITIONS[addition](model)
    assert (model(idx) - before).abs().max() > 1e-2
