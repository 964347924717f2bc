"""
What every row of the registry promises: causality, initialisation, parameter groups, compilation.

A new architecture is in these tests as soon as it has a tiny config in models_for_tests.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanochat.common import UserError
from nanochat.models import (
    ARCHITECTURES,
    SIZES,
    GPTConfig,
    QwenConfig,
    TurboConfig,
    arch_of,
    build_model,
    config_from_dict,
    config_to_dict,
    make_config,
)
from nanochat.optim import ADAMW_KINDS
from tests.models_for_tests import TINY, randomise, tiny_model, tokens_of

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
# both heads of Qwen; for the others there is one
every_config = pytest.mark.parametrize(
    "config",
    [TINY["gpt"], TINY["turbo"], TINY["qwen2.5"], replace(TINY["qwen2.5"], tied=False)],
    ids=["gpt", "turbo", "qwen-tied", "qwen-untied"],
)


def test_every_row_is_tested() -> None:
    assert set(TINY) == set(ARCHITECTURES)


# ---- the model -----------------------------------------------------------------------------------


@every_architecture
def test_no_position_sees_the_future(arch: str) -> None:
    """A language model must not peek. We show it a text and note its predictions; then we change
    one single token, at position t, and show it the text again. What it predicts *before* t, having
    read only what is unchanged, must stay exactly the same; if it moved, the model has looked
    ahead, and its training loss would be a lie. From t on predictions must move, else the model
    did not read the token at all."""
    model = tiny_model(arch)
    idx = tokens_of(model, 1, 16)
    before = model(idx)
    for t in range(16):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 96
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t]), f"a position before {t} saw it"
        moved = (after - before).abs().amax(-1)[0, t:]
        assert (moved > 1e-6).all(), f"a position from {t} on did not read it"


@every_architecture
def test_rows_of_a_batch_do_not_mix(arch: str) -> None:
    model = tiny_model(arch)
    idx = tokens_of(model, 3, 12)
    together = model(idx)
    for row in range(3):
        assert torch.allclose(together[row], model(idx[row : row + 1])[0], atol=1e-4)


@every_architecture
def test_texts_longer_than_the_configured_length_work(arch: str) -> None:
    """sequence_len is 16 here; the rotary table grows, and earlier predictions stay."""
    model = tiny_model(arch)
    idx = tokens_of(model, 1, 50)
    short = model(idx[:, :16])
    assert torch.allclose(model(idx)[:, :16], short, atol=1e-4)
    roomy = tiny_model(arch, sequence_len=64)
    assert torch.allclose(model(idx), roomy(idx), atol=1e-4)


@every_architecture
def test_the_loss_is_that_of_the_logits(arch: str) -> None:
    model = tiny_model(arch)
    idx, targets = tokens_of(model, 2, 9), tokens_of(model, 2, 9, seed=1)
    targets[1, 3:] = -1
    log_probs = model(idx).log_softmax(-1)
    nll = -log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    assert torch.allclose(model(idx, targets, reduction="none"), nll, atol=1e-4)
    assert torch.allclose(model(idx, targets, reduction="sum"), nll.sum())
    assert torch.allclose(model(idx, targets), nll.sum() / 12)


@every_config
def test_init_weights_writes_every_tensor(config: Any) -> None:
    """Memory after to_empty holds anything; here it holds NaN, and none may be left."""
    with torch.device("meta"):
        model = ARCHITECTURES[arch_of(config)][0](config)
    model = model.to_empty(device="cpu")
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(0))
    named = [*model.named_parameters(), *model.named_buffers()]
    assert len(named) == len(tensors)
    for name, tensor in named:
        assert tensor.isfinite().all(), f"init_weights forgot {name}"


@every_config
def test_param_groups_hold_every_parameter_once(config: Any) -> None:
    model = build_model(config)
    groups = model.param_groups()
    assert set(groups) - set(ADAMW_KINDS) == {"matrix"}, "the optimizer does not know this kind"
    grouped = [id(p) for params in groups.values() for p in params]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim == 2 for p in groups["matrix"]), "Muon takes matrices only"
    assert all(p.ndim == 1 for p in groups.get("vector", []))
    # Muon would make all directions of a table learn alike; rows of rare tokens must not
    assert all(config.vocab_size not in p.shape for p in groups["matrix"])


@every_config
def test_torch_compile_takes_the_model_whole(config: Any) -> None:
    """fullgraph: a graph break anywhere is an error. The eager back end needs no C++ compiler."""
    torch._dynamo.reset()  # programs of other tests count as this one's
    model = randomise(build_model(config, seed=0))
    tokens = tokens_of(model, 2, 17)
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 4:] = -1
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    for reduction in ("sum", "none"):
        loss = compiled(idx, targets, reduction=reduction)
        assert torch.allclose(loss, model(idx, targets, reduction=reduction))
    loss.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- building ------------------------------------------------------------------------------------


@every_architecture
def test_a_seed_gives_the_same_weights_again(arch: str) -> None:
    one, same, other = (build_model(TINY[arch], seed=s) for s in (5, 5, 6))
    torch.manual_seed(123)  # the global generator has no say
    for name, p in one.named_parameters():
        assert torch.equal(p, same.get_parameter(name)), name
    assert any(not torch.equal(p, other.get_parameter(n)) for n, p in one.named_parameters())


@every_architecture
def test_a_model_to_be_loaded_only_needs_its_weights(arch: str) -> None:
    """Without a seed nothing is initialised but what a checkpoint does not hold."""
    source = tiny_model(arch)
    target = build_model(TINY[arch])
    target.load_state_dict(source.state_dict(), strict=True)
    idx = tokens_of(source, 1, 16)
    assert torch.equal(source(idx), target(idx))
    assert target.get_device() == torch.device("cpu")


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch's meta tensors load it themselves")
def test_building_a_model_does_not_load_the_compiler() -> None:
    """Some operations on meta tensors import torch._dynamo or sympy, which takes seconds: every
    command would begin with a pause."""
    code = """
import sys
import torch
known = set(sys.modules)
from nanochat.models import GPTConfig, QwenConfig, TurboConfig, build_model
small = GPTConfig(8, 9, 1, 1, 1, 4), QwenConfig(8, 9, 1, 1, 1, 4, 4), TurboConfig(8, 9, 2, 1, 1, 32)
for config in small:
    build_model(config)
    build_model(config, seed=1)
assert not {"torch._dynamo", "sympy"} & (set(sys.modules) - known)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- configs -------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("depth", range(1, 33))
def test_every_depth_divides(arch: str, depth: int) -> None:
    config, tag = make_config(arch, depth, 1000, 64)
    assert tag == f"d{depth}"
    head_dim = config.n_embd // config.n_head
    assert head_dim * config.n_head == config.n_embd == 64 * depth
    assert head_dim in (64, 128) and (head_dim == 64 or depth >= 8)
    assert config.n_head % config.n_kv_head == 0
    if isinstance(config, QwenConfig):
        assert config.n_mlp % 128 == 0 and 0 <= config.n_mlp - config.n_embd * 8 / 3 < 128
    if isinstance(config, TurboConfig):
        assert config.window % 128 == 0 and config.layer_window(depth - 1) is None
        assert config.has_value_embedding(depth - 1)
    with torch.device("meta"):
        ARCHITECTURES[arch][0](config)


def test_a_published_size_keeps_its_shape_and_takes_the_tokenizers_rows() -> None:
    config, tag = make_config("qwen2.5-0.5b", 20, 65_536, 512)
    assert tag == "qwen2.5-0.5b"
    assert config == replace(SIZES["qwen2.5-0.5b"], vocab_size=65_536, sequence_len=512)


@pytest.mark.parametrize("size", SIZES)
def test_qwens_own_tokenizer_keeps_the_padded_rows(size: str) -> None:
    """151,665 ids (specials included); the published matrices have more rows, rounded up."""
    config, _ = make_config(size, 20, 151_665, 2048)
    assert config.vocab_size == SIZES[size].vocab_size


def test_unknown_architecture_and_depth_are_named() -> None:
    with pytest.raises(UserError, match=r"--arch=llama .*gpt, turbo, qwen2\.5, qwen2\.5-0\.5b"):
        make_config("llama", 4, 1000, 64)
    with pytest.raises(UserError, match="--depth=0"):
        make_config("gpt", 0, 1000, 64)


@every_config
def test_a_config_survives_json(config: Any) -> None:
    data = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(data) == config
    assert data["arch"] == arch_of(config)


def test_foreign_configs_are_refused_by_name() -> None:
    data = config_to_dict(GPTConfig())
    with pytest.raises(UserError, match="/x/y has config keys that gpt does not know: n_mlp, zeta"):
        config_from_dict({**data, "zeta": 1, "n_mlp": 2}, "/x/y")
    with pytest.raises(UserError, match=r"architecture 'mamba'; known: gpt, turbo, qwen2\.5"):
        config_from_dict({**data, "arch": "mamba"})
    with pytest.raises(UserError, match="architecture None"):
        config_from_dict({"n_layer": 2})
