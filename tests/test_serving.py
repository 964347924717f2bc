"""
A model made ready to serve says what the model says, and leaves it as it was.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanochat import cpu_kernels
from nanochat.common import UserError
from nanochat.cpu_kernels import PackedLinear
from nanochat.engine import Engine
from nanochat.int8 import Int8Linear
from nanochat.models import layers
from nanochat.serving import make_ready
from tests.decoding_for_tests import assert_close, assert_pieces_are_the_whole
from tests.models_for_tests import TINY, tiny_model, tokens_of
from tests.tokenizers_for_tests import tiny_tokenizer

every_architecture = pytest.mark.parametrize("arch", TINY)


@every_architecture
@torch.no_grad()
def test_the_same_logits_under_the_same_names(arch: str) -> None:
    model = tiny_model(arch)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ready = make_ready(model, pack=False)
    idx = tokens_of(model, 2, 40)
    assert_close(ready(idx), model(idx))
    assert_pieces_are_the_whole(ready, [5, 1, 1, 30, 1])
    assert {n: p.shape for n, p in ready.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }
    for name, p in ready.named_parameters():
        assert torch.equal(p, before[name]) and not p.requires_grad, name
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad, name


def test_layers_of_the_same_input_are_joined_and_share_their_memory() -> None:
    for arch, modules in (("gpt", 1), ("turbo", 1), ("qwen2.5", 2)):
        ready = make_ready(tiny_model(arch), pack=False)
        joined = [m.joined for m in ready.modules() if "joined" in m.__dict__]
        assert len(joined) == 3 * modules  # of three layers
        storages = {p.untyped_storage().data_ptr() for p in ready.parameters()}
        assert all(j.weight.untyped_storage().data_ptr() in storages for j in joined)


@every_architecture
@torch.no_grad()
def test_attention_of_one_token_as_two_products(arch: str) -> None:
    """As SDPA has it: grouped heads, rows of unequal length, memory longer than what it holds."""
    model = tiny_model(arch)
    H, K = model.config.n_head, model.config.n_kv_head
    q = torch.randn(3, 1, H, 8)
    memory = torch.randn(2, 3, K, 16, 8)
    k, v = memory[0][:, :, :11], memory[1][:, :, :11]
    visible = torch.arange(11) <= torch.tensor([[10], [3], [0]])
    for mask in (None, visible[:, None, None]):
        wanted = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
        )
        assert_close(layers.one_query(q, k, v, mask), wanted.transpose(1, 2).reshape(3, 1, H * 8))


@every_architecture
@torch.no_grad()
def test_the_dtype_is_cast_once_and_angles_stay_precise(arch: str) -> None:
    model = tiny_model(arch)
    ready = make_ready(model, torch.float16)
    assert {p.dtype for p in ready.parameters()} == {torch.float16}
    assert ready.rotary.cos.dtype == torch.float32
    idx = tokens_of(model, 1, 20)
    wanted = model(idx)
    assert (ready(idx) - wanted).abs().max() < 0.03 * wanted.abs().max()


# ---- packed for a CPU ----------------------------------------------------------------------------


def held_in(model: Any) -> set[torch.dtype]:
    layers = [vars(m).get("joined", m) for m in model.modules()]
    return {layer.weight.dtype for layer in layers if isinstance(layer, PackedLinear)}


@every_architecture
@torch.no_grad()
def test_packed_matrices_give_the_same_logits(arch: str, kernels: None) -> None:
    """With a tied head and without; held in 16 bits only where that changes nothing."""
    others = [tiny_model(arch, tied=False)] if arch == "qwen2.5" else []
    for model in (tiny_model(arch), *others):
        before = {name: p.clone() for name, p in model.named_parameters()}
        idx = tokens_of(model, 2, 40)
        ready = make_ready(model)
        assert held_in(ready) == {torch.float32}
        assert_close(ready(idx), model(idx))
        assert_pieces_are_the_whole(ready, [5, 1, 1, 30, 1])
        large = [n for n, p in ready.named_parameters() if p.ndim == 2 and min(p.shape) >= 16]
        assert all("wte" in name or "embed" in name for name in large), large
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name])
            p.copy_(p.bfloat16())
        ready = make_ready(model)
        assert held_in(ready) == {torch.bfloat16}
        assert_close(ready(idx), model(idx))


@every_architecture
@torch.no_grad()
def test_packed_matrices_may_be_rounded(arch: str, kernels: None) -> None:
    model = tiny_model(arch)
    idx = tokens_of(model, 2, 40)
    wanted = model(idx)
    for quantize, kinds in (
        ("bfloat16", {torch.bfloat16}),
        ("int8", {torch.int8, torch.float32}),  # the head's
    ):
        ready = make_ready(model, quantize=quantize)
        assert held_in(ready) == kinds
        found = ready(idx)
        assert 0 < (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()
        assert_pieces_are_the_whole(ready, [5, 1, 1, 30, 1])
    assert_close(found, make_ready(model, quantize="int8", pack=False)(idx))


def test_without_kernels_nothing_is_packed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_kernels, "problem", lambda: "no C++ compiler: install g++")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not held_in(make_ready(tiny_model("gpt")))
    out = capsys.readouterr()
    assert not out.out + out.err, "nothing can be done about another processor"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not held_in(make_ready(tiny_model("gpt")))
    out = capsys.readouterr()
    assert "slower than it could be: no C++ compiler" in out.out + out.err
    with pytest.raises(UserError, match=r"--quantize=bfloat16.*C\+\+ compiler"):
        make_ready(tiny_model("gpt"), quantize="bfloat16")


# ---- int8 ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_int8_rounds_each_row_to_its_own_scale() -> None:
    linear = nn.Linear(3, 3)
    linear.weight.copy_(torch.tensor([[1.27, -0.5, 0.004], [0, 0, 0], [-254.0, 1.4, 3.0]]))
    layer = Int8Linear(linear)
    assert layer.weight.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 1, 2]]  # halves to even
    x = torch.tensor([[1.0, 2.0, 3.0]])
    rounded = torch.tensor([[1.27, -0.5, 0.0], [0, 0, 0], [-254.0, 2.0, 4.0]])
    assert torch.allclose(layer(x), x @ rounded.T + linear.bias)


@torch.no_grad()
def test_compiled_one_row_of_int8_is_a_sum_that_says_the_same() -> None:
    """A GPU has a kernel for that; and for more rows none of PyTorch's slow one."""
    torch._dynamo.reset()
    layer = Int8Linear(nn.Linear(24, 40))
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    for shape in ((1, 1, 24), (24,), (3, 1, 24)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), layer(x))
        assert compiled(x.bfloat16()).dtype == torch.bfloat16
    assert ["linear" in graph for graph in graphs] == [False] * 4 + [True] * 2


@every_architecture
@torch.no_grad()
def test_int8_is_near_and_leaves_head_and_embeddings(arch: str) -> None:
    model = tiny_model(arch)
    ready = make_ready(model, quantize="int8", pack=False)
    joined = [vars(m)["joined"] for m in ready.modules() if "joined" in vars(m)]
    assert joined and all(type(m) is Int8Linear for m in joined)
    kept = {n for n, p in ready.named_parameters() if p.ndim == 2}
    assert all("wte" in n or "embed" in n or "lm_head" in n or "gate" in n for n in kept), kept
    idx = tokens_of(model, 2, 40)
    wanted, found = model(idx), ready(idx)
    assert 0 < (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    assert_pieces_are_the_whole(ready, [5, 1, 1, 30, 1])
    engine = Engine(tiny_model(arch, vocab_size=416), tiny_tokenizer(400), tools="none")
    engine.model = make_ready(engine.model, quantize="int8")
    assert len(engine.generate_batch([1, 2], max_tokens=5)[0][0]) > 2


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match=r"--quantize=int4.*none, bfloat16, int8"):
        make_ready(tiny_model("gpt"), quantize="int4")
