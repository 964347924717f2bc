"""Training in 8 bits: near to float32, only where it should be, off by default, and undone.

torch._scaled_mm computes on a CPU too, so all of this runs without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nanochat import fp8
from nanochat.common import UserError
from nanochat.fp8 import E4M3, E5M2, Fp8, Fp8Linear, check_fp8, round_to_fp8, try_fp8
from tests.models_for_tests import tiny_model, tokens_of

CPU = torch.device("cpu")
WIDE: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 128}


def wide_model(arch: str = "gpt") -> Any:
    return tiny_model(arch, **WIDE, **({"n_mlp": 256} if arch == "qwen2.5" else {}))


def loss_and_grads(model: Any, idx: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(idx, idx.roll(-1, 1))
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def test_rounding_uses_the_whole_range_and_keeps_zeros() -> None:
    x = torch.tensor([[0.0, 1e-3, -2.0, 0.7]])
    for dtype, error in ((E4M3, 1 / 16), (E5M2, 1 / 8)):
        rounded, factor = round_to_fp8(x, dtype)
        assert rounded.float().abs().max() == torch.finfo(dtype).max
        torch.testing.assert_close(rounded.float() * factor, x, rtol=error, atol=0)
        zeros, factor = round_to_fp8(torch.zeros(2, 2), dtype)
        assert not zeros.float().any() and factor.isfinite()
    _, factor = round_to_fp8(torch.tensor([1.0, torch.nan]), E4M3)
    assert factor.isnan()  # what is broken stays visible


def test_products_work_on_this_machine() -> None:
    assert try_fp8(CPU) is None


def check_near(grads: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """The gradient as a whole points where float32's does, and that of each matrix nearly: that of
    a query goes through the softmax of scores that were rounded, and has the most noise."""
    cosine = torch.nn.functional.cosine_similarity
    whole = [torch.cat([g.flatten() for g in each.values()]) for each in (grads, exact)]
    assert cosine(*whole, dim=0) > 0.99
    for name, grad in grads.items():
        # Softmax hardly sees a key's bias: what is left of its gradient is small, and noise
        if grad.ndim == 2:
            assert cosine(grad.flatten(), exact[name].flatten(), dim=0) > 0.98, name
        assert grad.dtype == torch.float32


@pytest.mark.parametrize("arch", ["gpt", "qwen2.5"])
def test_loss_and_gradients_are_near_to_float32_s(arch: str) -> None:
    model = wide_model(arch)
    idx = tokens_of(model, 4, 16)
    exact, exact_grads = loss_and_grads(model, idx)
    eights = Fp8(model)
    with eights.on():
        rounded, grads = loss_and_grads(model, idx)
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.01)
    check_near(grads, exact_grads)


def test_it_is_off_outside_and_names_stay() -> None:
    model = wide_model()
    idx = tokens_of(model, 2, 16)
    before, state = model(idx), {name: id(p) for name, p in model.named_parameters()}
    names = list(model.state_dict())
    eights = Fp8(model)
    assert list(model.state_dict()) == names
    assert {name: id(p) for name, p in model.named_parameters()} == state
    assert torch.equal(model(idx), before)
    with eights.on():
        assert not torch.equal(model(idx), before)
    assert torch.equal(model(idx), before)
    with pytest.raises(ZeroDivisionError), eights.on():
        raise ZeroDivisionError
    assert torch.equal(model(idx), before)


def test_only_large_inner_linears_are_changed() -> None:
    model = wide_model()
    assert set(Fp8(model).names) == {
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert type(model.lm_head) is nn.Linear
    assert not fp8.fits(nn.Linear(112, 128)) and not fp8.fits(nn.Linear(128, 136))
    assert fp8.fits(nn.Linear(128, 144))
    small = tiny_model("gpt")
    with pytest.raises(UserError, match=r"--fp8: no linear .* at least 128"):
        Fp8(small)


def test_rows_that_do_not_fit_are_computed_plainly() -> None:
    linear: Any = nn.Linear(128, 128)
    x = torch.randn(3, 5, 128)
    plain = linear(x)
    linear.__class__, linear.switch = Fp8Linear, fp8._Switch()
    linear.switch.on = True
    assert torch.equal(linear(x), plain)
    assert not torch.equal(linear(x.repeat(1, 16, 1))[:, :5], plain)


def test_weights_are_rounded_once_a_step_and_not_again_in_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounded: list[tuple[torch.dtype, torch.Size]] = []

    def count(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        rounded.append((dtype, x.shape))
        return round_to_fp8(x, dtype)

    monkeypatch.setattr(fp8, "round_to_fp8", count)
    model = wide_model()
    eights = Fp8(model)
    with eights.on():
        loss = model(tokens_of(model, 1, 16), tokens_of(model, 1, 16))
        forward = len(rounded)
        loss.backward()
    assert forward == 2 * len(eights.names) and {d for d, _ in rounded[:forward]} == {E4M3}
    assert len(rounded) == 3 * len(eights.names) and {d for d, _ in rounded[forward:]} == {E5M2}


def test_autocast_decides_the_output_s_format() -> None:
    linear: Any = nn.Linear(128, 128)
    linear.__class__, linear.switch = Fp8Linear, fp8._Switch()
    linear.switch.on = True
    x = torch.randn(16, 128)
    assert linear(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert linear.weight.grad.dtype == linear.bias.grad.dtype == torch.float32


def test_flops_are_counted_by_shape() -> None:
    """Else MFU under float8 would leave out the layers that are in it (karpathy/nanochat #815)."""
    model = wide_model()
    before = model.flops_per_token()
    eights = Fp8(model)
    assert model.flops_per_token() == before
    with eights.on():
        assert model.flops_per_token() == before


def test_it_compiles_in_one_piece_and_once() -> None:
    """Traced and differentiated as for a GPU, executed by PyTorch's own kernels."""
    from torch._dynamo.utils import counters

    model = wide_model()
    idx = tokens_of(model, 2, 16)
    eights = Fp8(model)
    with eights.on():
        plain, _ = loss_and_grads(model, idx)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(3):
        with eights.on():
            loss = compiled(idx, idx.roll(-1, 1))
            loss.backward()
        with torch.no_grad():
            model(idx)  # an evaluation in between
    assert loss.item() == pytest.approx(plain, rel=1e-3)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("device", [CPU, torch.device("mps")])
def test_it_is_refused_where_it_cannot_be(device: torch.device) -> None:
    with pytest.raises(UserError, match="--fp8 needs a CUDA device"):
        check_fp8(device)


def test_old_and_broken_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="--fp8: NVIDIA A100 has no float8 products"):
        check_fp8(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fp8, "try_fp8", lambda device: "it burns")
    with pytest.raises(UserError, match="--fp8: it burns"):
        check_fp8(gpu)


@pytest.mark.parametrize("kind", ["raises", "wrong"])
def test_a_trial_notices_what_does_not_work(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    product = fp8._product

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kind == "raises":
            raise RuntimeError("not compiled for this device\nstack")
        return product(*args, **kwargs) * 1.3

    monkeypatch.setattr(fp8, "_product", broken)
    assert ("not compiled for" if kind == "raises" else "differ by 3") in (try_fp8(CPU) or "")


@pytest.mark.gpu
def test_a_gpu_that_has_it_agrees_with_float32() -> None:
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) < fp8.CAPABILITY:
        pytest.skip("a GPU without float8")
    check_fp8(device)
    model = wide_model().to(device)
    idx = tokens_of(model, 4, 16).to(device)
    exact, exact_grads = loss_and_grads(model, idx)
    with Fp8(model).on():
        rounded, grads = loss_and_grads(model, idx)
    assert rounded == pytest.approx(exact, rel=0.01)
    check_near(grads, exact_grads)
