"""
The back ends of attention against plain loops, and how one is chosen: with fakes, whatever the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanochat.common import UserError
from nanochat.models import attention
from nanochat.models.attention import attend, choose_attention, window_blocks, window_mask

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_chosen", {})
    yield


def heads(T: int, H: int, K: int, E: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, T, n, E, generator=generator) for n in (H, K, K)]


def plain(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """All scores, in the dtype of the inputs."""
    T, H, K = q.size(1), q.size(2), k.size(2)
    k, v = k.repeat_interleave(H // K, dim=2), v.repeat_interleave(H // K, dim=2)
    scores = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(q.size(-1))
    for t in range(T):
        scores[:, :, t, t + 1 :] = -torch.inf
        if window is not None:
            scores[:, :, t, : max(0, t + 1 - window)] = -torch.inf
    return torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v)


# ---- the back ends


@pytest.mark.parametrize("name", ["sdpa", "math", "flex"])
@pytest.mark.parametrize("window", [None, 1, 5, 11, 12, 99])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_back_ends_that_run_anywhere(name: str, window: int | None, kv_heads: int) -> None:
    """flex, where nothing is compiled, is SDPA with a mask."""
    q, k, v = heads(12, 4, kv_heads)
    attention._chosen["cpu", FP32, 8, window] = name
    y = attend(q, k, v, window)
    assert torch.allclose(y, plain(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize("T", [128, 200, 512, 1000])
@pytest.mark.parametrize("window", [1, 64, 100, 128, 129, 300, 700])
def test_the_map_of_blocks_is_that_of_the_mask(T: int, window: int) -> None:
    """What torch finds by asking about every pair of positions."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(_b: Tensor, _h: Tensor, at: Tensor, other: Tensor) -> Tensor:
        return (other <= at) & (other > at - window)

    found = window_blocks(T, window, "cpu")
    expected = create_block_mask(visible, None, None, T, T, device="cpu")
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert found.seq_lengths == expected.seq_lengths
    if T % 128 == 0:  # else torch takes blocks of the last row, which is cut off, for parts
        assert torch.equal(found.kv_num_blocks, expected.kv_num_blocks)
        assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)
    inside = window_mask(128 * (-(-T // 128)), window).view(-(-T // 128), 128, -1, 128)
    whole = inside.all(3).all(1)
    for row in range(whole.size(0)):
        listed = found.full_kv_indices[0, 0, row, : int(found.full_kv_num_blocks[0, 0, row])]
        assert whole[row].nonzero()[:, 0].tolist() == sorted(listed.tolist())


def test_flex_attention_compiled_is_the_masked_one() -> None:
    """fullgraph: map of blocks and all. Rows of more than one block of 128; grouped heads."""
    q, k, v = heads(300, 2, 1, 16)
    attention._chosen["cpu", FP32, 16, 100] = "flex"
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend=backend)
    assert torch.allclose(compiled(q, k, v, 100), attend(q, k, v, 100), atol=1e-5)
    assert len(graphs) == 1 and "flex_attention" in graphs[0]

    # Under activation checkpointing too: create_block_mask was refused there, and turbo with
    # --activation_checkpointing=block went on without compilation.
    def again(q: Tensor) -> Tensor:
        return checkpoint(lambda q: attend(q, k, v, 100), q, use_reentrant=False)

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(again, fullgraph=True, dynamic=False, backend=backend)
        assert torch.allclose(compiled(q), attend(q, k, v, 100), atol=1e-5)
    assert len(graphs) == 2 and "flex_attention" in graphs[1]


def test_the_window_of_fa3_leaves_out_the_token_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that does what FA3's documents say: `left` positions and the token itself. Older
    versions return the log-sum-exp too."""
    for returned in (lambda y: y, lambda y: (y, None)):

        def flash_attn_func(
            q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int],
            returned: Any = returned,
        ) -> Any:  # fmt: skip
            left, right = window_size
            assert causal and right <= 0
            return returned(plain(q, k, v, None if left < 0 else left + 1))

        module = type(attention)("flash_attn_interface")
        module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
        monkeypatch.setitem(attention.importlib.sys.modules, module.__name__, module)
        q, k, v = heads(12, 4, 2)
        for window in (None, 1, 5):
            attention._chosen["cpu", FP32, 8, window] = "fa3"
            assert torch.allclose(attend(q, k, v, window), plain(q, k, v, window), atol=1e-5)


# ---- the choice


def choose_among(
    monkeypatch: pytest.MonkeyPatch, kernels: dict[str, Callable[..., Tensor]], **settings: Any
) -> str:
    """The choice on this CPU, as if these were the candidates and did that."""
    monkeypatch.setattr(attention, "_candidates", lambda *_: list(kernels))
    monkeypatch.setattr(attention, "_for_probe", kernels.__getitem__)
    return choose_attention("cpu", FP32, 8, **settings)


def broken(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image\nand more lines")


def wrong(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One position too many, or not causal."""
    if window is None:
        return attention._run("math", q, k, v, None).flip(1)
    return attention._run("math", q, k, v, window + 1)


class ForgetsOneGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor) -> Tensor:
        return k.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    return attention._run("math", q, ForgetsOneGradient.apply(k), v, window)


def not_a_number(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    return attention._run("math", q, k, v, window) * float("nan")


right = partial(attention._run, "math")


@pytest.mark.parametrize("window", [None, 1, 100, 1024])
@pytest.mark.parametrize(
    "bad, reason",
    [
        (broken, "RuntimeError no kernel image)"),
        (wrong, "wrong outputs"),
        (not_a_number, "wrong outputs, off by nan"),
        (wrong_gradient, "wrong gradient in k"),
    ],
)
def test_what_fails_its_probe_is_passed_over_and_said(
    bad: Any, reason: str, window: int | None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if bad is wrong_gradient and window == 1:
        pytest.skip("a token that sees itself alone has no gradient in its key")
    kernels = {"cudnn": bad, "flash": right, "efficient": broken}
    assert choose_among(monkeypatch, kernels, window=window, groups=2) == "flash"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"cudnn: {reason}" in said and "efficient" not in said
    assert choose_among(monkeypatch, kernels, window=window, groups=2) == "flash"
    assert capsys.readouterr() == ("", ""), "it is said once"
    q, k, v = heads(12, 4, 2)
    assert torch.allclose(attend(q, k, v, window), plain(q, k, v, window), atol=1e-5)


def test_where_all_fail_pytorch_chooses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_among(monkeypatch, {"cudnn": broken, "math": wrong}) == "sdpa"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cudnn: RuntimeError" in said and "math: wrong" in said


def test_what_is_wanted_must_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"flex: RuntimeError no kernel image.*--attention=auto"):
        choose_among(monkeypatch, {"flex": broken}, wanted="flex")
    monkeypatch.undo()
    with pytest.raises(UserError, match="--attention=fa4 is not known; choose one of auto, fa3"):
        choose_attention("cpu", FP32, 8, wanted="fa4")
    for wanted in ("fa3", "flex"):
        with pytest.raises(UserError, match=f"--attention={wanted} needs CUDA.*cpu"):
            choose_attention("cpu", FP32, 8, wanted=wanted)


def test_a_package_that_is_not_installed_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: None)
    assert choose_among(monkeypatch, {"fa3": right, "cudnn": right}) == "cudnn"
    assert capsys.readouterr().err == ""


def test_the_order_in_which_they_are_tried(capsys: pytest.CaptureFixture[str]) -> None:
    tried = attention._candidates
    assert tried("cuda", None, "auto") == ["fa3", "cudnn", "flash", "efficient", "math"]
    assert tried("cuda", 1024, "auto") == ["fa3", "flex", "sdpa", "math"]
    assert tried("cuda", None, "sdpa") == ["cudnn", "flash", "efficient", "math"]
    assert tried("cuda", 64, "math") == tried("cuda", None, "math") == ["math"]
    for window in (None, 7):  # nothing to choose, nothing to say
        assert choose_attention("cpu", FP32, 64, window) == "sdpa"
    assert choose_attention("cpu", FP32, 64, wanted="math") == "math"
    assert capsys.readouterr() == ("", "")


def test_probing_leaves_the_random_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with torch.no_grad():  # and runs where gradients are off
        assert choose_among(monkeypatch, {"flash": right}) == "flash"
    assert torch.equal(torch.rand(1), expected)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("head_dim, groups", [(64, 1), (128, 1), (64, 7), (128, 6)])
def test_a_gpu_has_something_better_than_arithmetic(
    window: int | None, head_dim: int, groups: int
) -> None:
    name = choose_attention("cuda", BF16, head_dim, window, groups)
    assert name in ("fa3", "flex", "sdpa", "cudnn", "flash", "efficient")
    assert attention._chosen["cuda", BF16, head_dim, window] == name


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("name", ["fa3", "cudnn", "flash", "efficient", "sdpa", "flex"])
def test_every_back_end_of_a_gpu_in_a_compiled_step(name: str, window: int | None) -> None:
    """Under autocast, with queries in float32, as a norm leaves them."""
    if window is None and name == "flex":
        pytest.skip("flex is for windows")
    device = torch.device("cuda")
    reason = attention._why_not(name, device, BF16, 64, window, 2)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    q, k, v = (t.cuda() for t in heads(512, 4, 2, 64))
    v = v.bfloat16()
    attention._chosen["cuda", BF16, 64, window] = name
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    with torch.autocast("cuda", dtype=BF16):
        for function in (compiled, attend):
            y = function(q, k, v, window)
            expected = plain(q.bfloat16().float(), k.bfloat16().float(), v.float(), window)
            assert (y.float() - expected).norm() < 0.01 * expected.norm()
