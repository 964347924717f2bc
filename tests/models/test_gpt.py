"""
The GPT: transformers' NanoChatForCausalLM is the oracle for logits and gradients.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanochat.hf import to_hf_name
from nanochat.models import GPT, GPTConfig, build_model
from nanochat.models.layers import rms_norm
from tests.models_for_tests import TINY, randomise, tiny_model, tokens_of


def oracle(model: Any) -> Any:
    """transformers' model with the same weights. Its eager attention shares no kernel with ours."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    c = model.config
    config = transformers.NanoChatConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=4 * c.n_embd,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.sequence_len,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        final_logit_softcapping=15.0,
        pad_token_id=None,  # else the gradient of that row is dropped
        attn_implementation="eager",
    )
    twin = transformers.NanoChatForCausalLM(config).eval()
    weights = {to_hf_name("gpt", name): tensor for name, tensor in model.state_dict().items()}
    twin.load_state_dict(weights, strict=True)
    return twin


@pytest.mark.parametrize(
    "n_layer, n_head, n_kv_head, n_embd",
    [(1, 1, 1, 8), (3, 2, 2, 32), (2, 4, 2, 32), (2, 3, 1, 24), (2, 5, 5, 40), (3, 6, 3, 24)],
)
def test_logits_and_gradients_are_those_of_transformers(
    n_layer: int, n_head: int, n_kv_head: int, n_embd: int
) -> None:
    config = GPTConfig(24, 96, n_layer, n_head, n_kv_head, n_embd)
    model = randomise(build_model(config, seed=1), seed=2)
    with torch.no_grad():
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
        theirs = gradients[to_hf_name("gpt", name)]
        scale = theirs.abs().max()
        assert scale > 0, f"the gradient of {name} says nothing"
        assert (p.grad - theirs).abs().max() < 1e-4 * max(1.0, scale), name


def test_the_oracle_notices_one_wrong_weight() -> None:
    """The comparison above is as sharp as it looks: 1% off in one inner matrix shows."""
    model = tiny_model("gpt")
    twin, idx = oracle(model), tokens_of(model, 1, 12)
    with torch.no_grad():
        model.transformer.h[0].attn.c_k.weight.mul_(torch.linspace(1, 1.01, 32))
    assert (model(idx) - twin(input_ids=idx).logits).abs().max() > 5e-4


@pytest.mark.parametrize(
    "depth, params", [(12, 185_597_952), (20, 560_988_160), (26, 1_081_999_360)]
)
def test_parameter_counts_of_the_recipes(depth: int, params: int) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(depth, 65_536, 2048))
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(
    "depth, n_head, head_dim",
    [(1, 1, 64), (4, 4, 64), (7, 7, 64), (8, 4, 128), (9, 9, 64), (12, 6, 128), (20, 10, 128)],
)
def test_heads_at_a_depth(depth: int, n_head: int, head_dim: int) -> None:
    config = GPTConfig.from_depth(depth, 1000, 64)
    assert (config.n_layer, config.n_embd) == (depth, 64 * depth)
    assert (config.n_head, config.n_kv_head) == (n_head, n_head)
    assert config.n_embd // config.n_head == head_dim
    assert (config.vocab_size, config.sequence_len) == (1000, 64)


def test_at_the_start_each_block_is_the_identity() -> None:
    model = build_model(TINY["gpt"], seed=3)
    idx = tokens_of(model, 2, 10)
    embedded = rms_norm(model.transformer.wte(idx))
    assert torch.allclose(model.hidden(idx), rms_norm(embedded), atol=1e-6)
    # and the prediction is close to knowing nothing: log of the vocabulary
    assert model(idx, idx).item() == pytest.approx(math.log(96), abs=0.05)


def test_every_matrix_learns_from_the_start() -> None:
    """Zero output projections hold back what feeds them for one step, and not for ever."""
    model = build_model(TINY["gpt"], seed=3)
    idx = tokens_of(model, 4, 16)
    for step in range(2):
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        moving = {name: bool(p.grad.any()) for name, p in model.named_parameters()}
        if step == 0:
            assert moving["lm_head.weight"] and moving["transformer.h.0.mlp.c_proj.weight"]
    assert all(moving.values()), moving


def test_flops_by_hand() -> None:
    """d20 as in the speedrun's arithmetic: 6 x 477,102,080 weights (all but the embedding), and 12
    x 20 layers x 1,280 wide x 2,048 positions."""
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(20, 65_536, 2048))
    assert model.flops_per_token() == 6 * 477_102_080 + 12 * 20 * 1280 * 2048
