"""
The optimizer against torch's own two, and one rank against several.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from nanochat.common import UserError
from nanochat.models import GPTConfig, QwenConfig, build_model
from nanochat.optim import MuonAdamW, ParamGroup, make_optimizer, orthogonalize
from tests.models_for_tests import tiny_model, tokens_of

Shapes = dict[str, tuple[int, ...]]
MATRICES: Shapes = {"tall": (9, 4), "wide": (4, 9), "square": (6, 6), "twin": (9, 4), "row": (1, 5)}
OTHERS: Shapes = {"table": (13, 5), "vector": (7,), "one": (1,), "scalar": (), "cube": (2, 3, 5)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(shapes: Shapes, seed: int = 0) -> dict[str, nn.Parameter]:
    return {n: nn.Parameter(random(*s, seed=seed + i)) for i, (n, s) in enumerate(shapes.items())}


def set_gradients(params: dict[str, nn.Parameter], step: int, share: float = 1.0) -> None:
    """Gradients that depend on the step alone. A rank may hold a share of them."""
    for i, p in enumerate(params.values()):
        p.grad = share * random(*p.shape, seed=1000 * (step + 1) + i)


# ---- AdamW ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-10, 1e-2])
def test_the_adamw_half_is_torchs(weight_decay: float, eps: float) -> None:
    """Ten steps of a changing rate. A large eps shows where it is added, the first steps show the
    bias correction."""
    params, twins = parameters(OTHERS), parameters(OTHERS)
    ours = MuonAdamW([ParamGroup("adamw", params, 0.03, weight_decay, (0.8, 0.95), eps)])
    torchs = torch.optim.AdamW(
        twins.values(), lr=0.03, betas=(0.8, 0.95), eps=eps, weight_decay=weight_decay
    )
    for step in range(10):
        set_gradients(params, step)
        set_gradients(twins, step)
        multiplier = 1 - step / 20
        torchs.param_groups[0]["lr"] = 0.03 * multiplier
        ours.step(multiplier)
        torchs.step()
        for name, p in params.items():
            assert torch.allclose(p, twins[name], rtol=0, atol=1e-6), (name, step)


# ---- Muon ----------------------------------------------------------------------------------------


def run_both_muons(steps: int = 6) -> tuple[float, float]:
    """(largest difference between ours and torch's, largest movement) on matrices of all forms."""
    params, twins = parameters(MATRICES), parameters(MATRICES)
    before = {name: p.detach().clone() for name, p in params.items()}
    ours = MuonAdamW([ParamGroup("muon", params, 0.02, weight_decay=0.1)])
    torchs = torch.optim.Muon(twins.values(), lr=0.02, weight_decay=0.1, nesterov=True)
    for step in range(steps):
        set_gradients(params, step)
        set_gradients(twins, step)
        multiplier, momentum = 1 - step / 20, 0.85 + step / 50
        torchs.param_groups[0].update(lr=0.02 * multiplier, momentum=momentum)
        ours.step(multiplier, momentum)
        torchs.step()
    with torch.no_grad():
        difference = max(float((p - twins[n]).abs().max()) for n, p in params.items())
        movement = max(float((p - before[n]).abs().max()) for n, p in params.items())
    return difference, movement


def test_the_muon_half_is_torchs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon computes in bfloat16, whose rounding would hide small mistakes. Here its module
    is told that float32 is what it is to call bfloat16, so that the two must agree closely."""
    muon = pytest.importorskip("torch.optim._muon", reason="this torch has no Muon")
    if getattr(muon, "torch", None) is not torch:
        pytest.skip("this torch's Muon is organised in another way")

    class Float32Torch:
        bfloat16 = torch.float32

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(muon, "torch", Float32Torch())
    difference, movement = run_both_muons()
    assert movement > 0.05
    assert difference < 2e-6


IN_BFLOAT16 = """
import torch
from nanochat import optim
from tests.test_optim import run_both_muons
x = torch.randn(32, 32).bfloat16()
print("alive", float((x @ x.mT).sum()), flush=True)
in_float32 = optim.orthogonalize
optim.orthogonalize = lambda x, dtype: in_float32(x, torch.bfloat16)
print(*run_both_muons())
"""


@pytest.mark.slow
def test_the_muon_half_is_torchs_in_bfloat16() -> None:
    """As torch has it and as we do it on GPUs, to the precision of bfloat16.

    In a process of its own: on some CPUs a bfloat16 product is an illegal instruction, which the
    environment variable avoids on most of them."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "OMP_NUM_THREADS": "1"}
    repo = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", IN_BFLOAT16],
        check=False, cwd=repo, env=env, timeout=120,
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    if done.returncode < 0 and "alive" not in done.stdout:
        pytest.skip(f"bfloat16 products die here (signal {-done.returncode})")
    assert done.returncode == 0, done.stderr
    difference, movement = map(float, done.stdout.splitlines()[-1].split())
    assert movement > 0.05
    # bfloat16 has 8 bits; five iterations amplify the differences in rounding a little
    assert difference < 0.03 * movement


@pytest.mark.parametrize("shape", [(12, 12), (30, 10), (10, 30), (1, 8), (3, 16, 8)])
def test_orthogonalize_is_near_the_polar_factor(shape: tuple[int, ...]) -> None:
    """X = U S V^T must become about U V^T: the directions exactly, the singular values near 1."""
    wide_spectrum = torch.linalg.svd(random(*shape), full_matrices=False)
    strengths = torch.linspace(1.0, 0.05, wide_spectrum.S.size(-1))
    x = 7.0 * wide_spectrum.U @ torch.diag(strengths) @ wide_spectrum.Vh
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x)
    assert y.shape == x.shape and y.dtype == torch.float32
    inner = u.mT @ y @ vh.mT  # diagonal: the new singular values
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(inner, torch.diag_embed(values), atol=1e-4)
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.allclose(orthogonalize(1e-3 * x), y, atol=1e-4), "only directions count"


def test_orthogonalize_of_nothing_is_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_matrices_of_one_shape_do_not_mix() -> None:
    """They go through the iteration in one batch."""
    stacked = random(3, 8, 5)
    for one, whole in zip(stacked, orthogonalize(stacked)):
        assert torch.allclose(orthogonalize(one), whole, atol=1e-5)


# ---- a step --------------------------------------------------------------------------------------


def both_kinds(params: dict[str, nn.Parameter]) -> MuonAdamW:
    matrices = {n: p for n, p in params.items() if n in MATRICES}
    others = {n: p for n, p in params.items() if n not in MATRICES}
    return MuonAdamW(
        [
            ParamGroup("muon", matrices, 0.02, weight_decay=0.1),
            ParamGroup("adamw", others, 0.05, weight_decay=0.1),
            ParamGroup("adamw", {}, 0.1),  # a model without a kind of parameter
        ]
    )


def test_the_norm_and_the_clipping_are_torchs() -> None:
    params, twins = parameters(MATRICES | OTHERS), parameters(MATRICES | OTHERS)
    clipped, reference = both_kinds(params), both_kinds(twins)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        norm = torch.nn.utils.clip_grad_norm_(twins.values(), 2.0)
        assert clipped.step(1.0, grad_clip=2.0) == pytest.approx(float(norm), rel=1e-5)
        assert float(norm) > 2.0
        assert reference.step(1.0) == pytest.approx(2.0, rel=1e-5)
    for name, p in params.items():
        assert torch.allclose(p, twins[name], atol=1e-6), name


@pytest.mark.parametrize("grad_clip", [0.0, 1e9])
def test_a_small_gradient_is_not_scaled_up(grad_clip: float) -> None:
    params = parameters({"vector": (7,)})
    set_gradients(params, 0)
    before = params["vector"].grad.clone()  # type: ignore[union-attr]
    both_kinds(params).step(1.0, grad_clip=grad_clip)
    assert torch.equal(params["vector"].grad, before)  # type: ignore[arg-type]


def test_a_parameter_without_a_gradient_counts_as_zero() -> None:
    params, twins = parameters(MATRICES | OTHERS), parameters(MATRICES | OTHERS)
    ours, reference = both_kinds(params), both_kinds(twins)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        if step == 1:
            for name in ("tall", "table", "scalar"):
                params[name].grad = None
                twins[name].grad = torch.zeros_like(twins[name])
        assert ours.step(1.0) == reference.step(1.0)
        ours.zero_grad()
        assert all(p.grad is None for p in params.values())
    for name, p in params.items():
        assert torch.equal(p, twins[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["tall", "scalar"])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_moves(
    name: str, value: float
) -> None:
    params = parameters(MATRICES | OTHERS)
    optimizer = both_kinds(params)
    set_gradients(params, 0)
    optimizer.step(1.0)
    before = {n: p.detach().clone() for n, p in params.items()}
    state = {n: t.clone() for n, t in optimizer.state_dict().items()}
    set_gradients(params, 1)
    params[name].grad.flatten()[0] = value  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"step 1 has norm (nan|inf); lower --matrix_lr"):
        optimizer.step(1.0, grad_clip=1.0)
    assert optimizer.num_steps == 1
    assert all(torch.equal(p, before[n]) for n, p in params.items())
    assert all(torch.equal(t, state[n]) for n, t in optimizer.state_dict().items())


def test_state_saved_and_loaded_continues_bitwise() -> None:
    params, again = parameters(MATRICES | OTHERS), parameters(MATRICES | OTHERS)
    whole, first = both_kinds(params), both_kinds(again)
    for step in range(6):
        set_gradients(params, step)
        whole.step(1.0)
        if step == 3:  # a new optimizer takes over
            state = {n: t.clone() for n, t in first.state_dict().items()}
            first, steps = both_kinds(again), first.num_steps
            first.load_state_dict(state.__getitem__, steps)
            for tensor in state.values():
                tensor.fill_(float("nan"))  # it must have copied
        set_gradients(again, step)
        first.step(1.0)
    for name, p in params.items():
        assert torch.equal(p, again[name]), name


def test_the_state_that_is_given_is_a_copy() -> None:
    """It is written while the next step changes the state in place."""
    params = parameters(MATRICES | OTHERS)
    optimizer = both_kinds(params)
    set_gradients(params, 0)
    optimizer.step(1.0)
    given = optimizer.state_dict()
    before = {name: tensor.clone() for name, tensor in given.items()}
    set_gradients(params, 1)
    optimizer.step(1.0)
    assert all(torch.equal(given[name], before[name]) for name in before)
    assert not any(torch.equal(t, before[name]) for name, t in optimizer.state_dict().items())


def test_state_before_the_first_step_is_zeros() -> None:
    """A checkpoint of step 0 has every entry, so that loading needs no special case."""
    state = both_kinds(parameters(MATRICES | OTHERS)).state_dict()
    assert len(state) == len(MATRICES) + 2 * len(OTHERS)
    assert not any(t.any() for t in state.values())


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [None, True, False])
def test_make_optimizer_gives_every_parameter_its_rate(tied: bool | None) -> None:
    config: Any = GPTConfig(16, 64, 2, 2, 2, 48)
    if tied is not None:
        config = QwenConfig(16, 64, 2, 2, 1, 48, 40, tied)
    model = build_model(config, seed=0)
    optimizer = make_optimizer(model, 0.2, 0.004, 0.02, weight_decay=0.1, lr_frac=0.5)
    assert set(optimizer.named) == {name for name, _ in model.named_parameters()}
    adam = (48 / 768) ** -0.5 * 0.5  # = 2: four times faster than at width 768, and then half
    for group in optimizer.groups:
        for name, p in group.params.items():
            assert p is model.get_parameter(name)
            is_table = "wte" in name or "embed_tokens" in name
            if name == "lm_head.weight" or (is_table and tied):
                wanted = ("adamw", 0.004 * adam, 0.1)
            elif is_table:
                wanted = ("adamw", 0.2 * adam, 0.1)
            elif p.ndim == 2:
                wanted = ("muon", 0.02 * 0.5, 0.1)
            else:  # norm weights and biases do not decay
                wanted = ("adamw", 0.004 * adam, 0.0)
            assert (group.kind, group.lr, group.weight_decay) == (
                wanted[0], pytest.approx(wanted[1]), wanted[2],
            ), name  # fmt: skip


@pytest.mark.parametrize("arch", ["gpt", "qwen2.5"])
def test_it_learns(arch: str) -> None:
    """A few steps on one batch bring the loss far down: signs and rates are as they should be."""
    model = tiny_model(arch)
    optimizer = make_optimizer(model, 0.2, 0.02, 0.02)
    idx = tokens_of(model, 4, 17)
    losses = []
    for _ in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step(1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
