"""
Qwen2.5: transformers' Qwen2ForCausalLM is the oracle for logits and gradients.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanochat.models import SIZES, Qwen, QwenConfig, build_model
from tests.models_for_tests import TINY, randomise, tiny_model, tokens_of


def oracle(model: Any) -> Any:
    """transformers' model with the same weights, whose names are the same too.

    Its eager attention shares no kernel with ours."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    c = model.config
    config = transformers.Qwen2Config(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.n_mlp,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.sequence_len,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied,
        attn_implementation="eager",
    )
    twin = transformers.Qwen2ForCausalLM(config).eval()
    weights = dict(model.state_dict())
    if c.tied:  # transformers has two names for the one matrix
        assert "lm_head.weight" not in weights
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    twin.load_state_dict(weights, strict=True)
    return twin


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "shape",  # n_layer, n_head, n_kv_head, n_embd, n_mlp
    [(1, 1, 1, 8, 16), (3, 4, 4, 32, 40), (2, 4, 2, 32, 24), (2, 3, 1, 24, 56), (2, 7, 7, 28, 16)],
)
def test_logits_and_gradients_are_those_of_transformers(
    shape: tuple[int, int, int, int, int], tied: bool
) -> None:
    # theta and eps are not the defaults: neither may be a constant in the code
    config = QwenConfig(24, 96, *shape, tied=tied, rope_theta=5000.0, norm_eps=1e-3)
    model = randomise(build_model(config, seed=1), seed=2)
    twin = oracle(model)
    idx, targets = tokens_of(model, 2, 24), tokens_of(model, 2, 24, seed=1)
    targets[0, :5] = -1
    logits, wanted = model(idx), twin(input_ids=idx).logits
    assert logits.dtype == torch.float32 and logits.shape == (2, 24, 96)
    assert (logits - wanted).abs().max() < 2e-5 * wanted.abs().max()

    model(idx, targets).backward()
    F.cross_entropy(wanted.flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        scale = gradients[name].abs().max()
        # A bias on all keys shifts all scores of a query alike until rotation tells them apart, and
        # the softmax ignores shifts: its gradient is small, but it is there.
        assert scale > 1e-6, f"the gradient of {name} says nothing"
        assert (p.grad - gradients[name]).abs().max() < 1e-4 * max(1.0, scale), name


@pytest.mark.parametrize("name", ["k_proj.bias", "v_proj.bias", "input_layernorm.weight"])
def test_the_oracle_notices_one_wrong_vector(name: str) -> None:
    """The comparison above is as sharp as it looks: one small vector 2% off shows."""
    model = tiny_model("qwen2.5")
    twin, idx = oracle(model), tokens_of(model, 1, 16)
    with torch.no_grad():
        for full, p in model.named_parameters():
            if full.startswith("model.layers.0") and full.endswith(name):
                p.mul_(torch.linspace(1, 1.02, len(p)))
    assert (model(idx) - twin(input_ids=idx).logits).abs().max() > 5e-4


@pytest.mark.parametrize(
    "name, params",
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_parameter_counts_of_the_published_sizes(name: str, params: int) -> None:
    with torch.device("meta"):
        model = Qwen(SIZES[name])
    assert sum(p.numel() for p in model.parameters()) == params


def test_shape_at_a_depth() -> None:
    config = QwenConfig.from_depth(20, 65_536, 1024)
    assert (config.n_embd, config.n_head, config.n_layer) == (1280, 10, 20)
    assert config.n_mlp == 3456  # 8/3 x 1,280 = 3,413.3, rounded up to 128
    assert config.tied and config.vocab_size == 65_536 and config.sequence_len == 1024
    assert QwenConfig.from_depth(12, 65_536, 1024).n_mlp == 2048  # 8/3 x 768 exactly


def test_a_tied_head_is_the_embedding() -> None:
    model = tiny_model("qwen2.5", tied=True)
    assert model.head_weight is model.model.embed_tokens.weight
    untied = tiny_model("qwen2.5", tied=False)
    assert untied.head_weight is untied.lm_head.weight
    groups = model.param_groups()
    assert groups["embedding"] == [] and groups["head"][0] is model.head_weight
    groups = untied.param_groups()
    assert groups["embedding"][0] is untied.model.embed_tokens.weight
    assert groups["head"][0] is untied.lm_head.weight


def test_at_the_start_each_block_is_the_identity() -> None:
    model = build_model(TINY["qwen2.5"], seed=3)
    idx = tokens_of(model, 2, 10)
    assert torch.equal(model.hidden(idx), model.model.norm(model.model.embed_tokens(idx)))
    assert model(idx, idx.flip(1)).item() == pytest.approx(math.log(96), abs=0.3)


def test_flops_by_hand() -> None:
    """0.5B: 357,826,560 weights in blocks and 151,936 x 896 in the tied head, once."""
    with torch.device("meta"):
        model = Qwen(SIZES["qwen2.5-0.5b"])
    block = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864  # q and o, k and v, the MLP
    assert 24 * block == 357_826_560
    weights = 24 * block + 151_936 * 896
    assert model.flops_per_token() == 6 * weights + 12 * 24 * 896 * 2048
