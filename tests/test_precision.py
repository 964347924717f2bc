"""Which number format is chosen, that it was tried, and float16's loss scale."""

from __future__ import annotations

import subprocess

import pytest
import torch

from nanochat import precision
from nanochat.common import UserError
from nanochat.optim import MuonAdamW, ParamGroup
from nanochat.precision import LossScaler, choose_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_memory_of_other_tests() -> None:
    choose_precision.cache_clear()


def test_a_cpu_computes_in_float32_and_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)  # calling it would fail
    for wanted in ("auto", "float32"):
        chosen = choose_precision(wanted, CPU)
        assert chosen.name == "float32"
        with chosen.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    native = capability >= (8, 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(precision, "_fails_here", lambda dtype, device: None)
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    "capability, name",
    [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16"), ((7, 0), "float16"),
     ((6, 1), "float32")],
)  # fmt: skip
def test_a_gpu_computes_in_what_is_native(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_precision("auto", pretend_gpu(monkeypatch, capability)).name == name


def test_a_format_that_fails_its_trial_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(precision, "_fails_here", lambda dtype, device: "it burns")
    chosen = choose_precision("auto", gpu)
    assert chosen.name == "float32" and "bfloat16 it burns" in chosen.why
    with pytest.raises(UserError, match=r"--dtype=bfloat16: it burns; use --dtype=auto"):
        choose_precision("bfloat16", gpu)


def test_a_trial_notices_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 products in place of bfloat16 ones: no process can be killed by that."""
    linear = precision.F.linear
    calls: list[int] = []

    def wrong(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        y = linear(x.float(), w.float())
        return y if len(calls) == 1 else (1.1 * y).bfloat16()

    monkeypatch.setattr(precision.F, "linear", wrong)
    assert "differs by 10" in (precision._fails_here(torch.bfloat16, CPU) or "")


@pytest.mark.parametrize(
    "program, said",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", r"SIGILL.*ONEDNN_MAX_CPU_ISA"),
        ("raise ImportError('no such thing {}')", r"ImportError: no such thing bfloat16"),
        ("print('it differs {}')", r"it differs bfloat16"),
        ("print('works') # {}", None),
    ],
)
def test_on_a_cpu_the_trial_has_a_process_of_its_own(
    program: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "TRY", program)
    if said is None:
        assert choose_precision("bfloat16", CPU).dtype == torch.bfloat16
        return
    with pytest.raises(UserError, match=f"--dtype=bfloat16: .*{said}.*--dtype=float32"):
        choose_precision("bfloat16", CPU)


def test_the_trial_itself_runs_and_comes_to_a_verdict() -> None:
    """Whether bfloat16 works here is not for us to say; that the program is whole is."""
    problem = precision._fails_elsewhere(torch.bfloat16)
    assert problem is None or "trying" not in problem


# ---- the loss scale


def make_params() -> list[torch.Tensor]:
    params = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    params[1].grad = torch.zeros(2, 2)
    return params


def test_gradients_are_brought_back_to_their_size() -> None:
    scaler, params = LossScaler(True), make_params()
    scaler.scaled((params[0] * torch.tensor([1.0, 2.0, 1e-6])).sum()).backward()
    assert scaler.unscale(params)
    assert params[0].grad is not None
    assert torch.equal(params[0].grad, torch.tensor([1.0, 2.0, 1e-6]))


def test_a_scaler_that_is_off_does_nothing() -> None:
    scaler, params = LossScaler(False), make_params()
    loss = params[0].sum()
    assert scaler.scaled(loss) is loss
    params[1].grad = torch.full((2, 2), torch.inf)
    assert scaler.unscale(params) and scaler.state() == {}


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_halves_the_scale_and_many_good_steps_double_it(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossScaler, "GROWTH_STEPS", 3)
    scaler, params = LossScaler(True), make_params()
    good = params[1].grad
    assert good is not None
    params[1].grad = good.index_fill(0, torch.tensor([1]), bad)
    before = params[1].grad.clone()
    assert not scaler.unscale(params) and scaler.scale == 2.0**15
    torch.testing.assert_close(params[1].grad, before, equal_nan=True)
    params[1].grad = good
    scales = []
    for _ in range(6):
        assert scaler.unscale(params)
        scales.append(scaler.scale)
    assert scales == [2.0**15, 2.0**15, 2.0**16, 2.0**16, 2.0**16, 2.0**17]


def test_all_ranks_leave_out_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank's overflow counts, also for a rank that had no gradient."""
    monkeypatch.setattr(precision, "all_reduce_sum", lambda tensor: tensor + 1)
    assert not LossScaler(True).unscale(make_params())
    assert not LossScaler(True).unscale([torch.ones(1, requires_grad=True)])


def test_a_run_that_diverges_is_not_float16_s_fault() -> None:
    scaler, params = LossScaler(True), make_params()
    params[1].grad = torch.full((2, 2), torch.inf)
    with pytest.raises(UserError, match=r"--dtype=float16: .*diverged.*--matrix_lr"):
        for _ in range(50):
            scaler.unscale(params)


def test_the_scale_is_kept_over_a_resume() -> None:
    one, two = LossScaler(True), LossScaler(True)
    one.scale, one.good_steps = 512.0, 7
    two.load_state(one.state())
    assert (two.scale, two.good_steps) == (512.0, 7)
    two.load_state({})  # a run in another format was resumed
    assert two.scale == 512.0
    off = LossScaler(False)
    off.load_state(one.state())
    assert off.scaled(torch.ones(())) == 1


def test_small_gradients_survive_float16_with_the_scale_and_vanish_without() -> None:
    """A product computed in float16, whose gradient 1e-8 is below float16's smallest number."""
    for enabled in (True, False):
        scaler = LossScaler(enabled)
        w = torch.ones(1, requires_grad=True)
        y = (w.half() * 1.0).float()
        scaler.scaled(1e-8 * y.sum()).backward()
        assert scaler.unscale([w]) and w.grad is not None
        assert float(w.grad) == (pytest.approx(1e-8, rel=1e-3) if enabled else 0.0)


def test_it_works_with_our_optimizer() -> None:
    """The same step as without a scale."""
    results = []
    for enabled in (True, False):
        w = torch.nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4))
        optimizer = MuonAdamW([ParamGroup("adamw", {"w": w}, lr=0.1)])
        scaler = LossScaler(enabled)
        for k in range(3):
            scaler.scaled((w.sin() * k).square().sum()).backward()
            assert scaler.unscale(optimizer.named.values())
            optimizer.step(1.0, grad_clip=1.0)
            optimizer.zero_grad()
        results.append(w.detach().clone())
    torch.testing.assert_close(*results)
