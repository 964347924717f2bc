"""
The optimizer against torch's AdamW and a Muon written by hand; in test_optim_ranks.py one rank
against several.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

from nanochat.checkpoint import optim_reader
from nanochat.common import UserError
from nanochat.models import GPTConfig, QwenConfig, build_model
from nanochat.optim import (
    ADAMW_KINDS,
    MuonAdamW,
    ParamGroup,
    make_optimizer,
    refuse_divergence,
)
from nanochat.updates import POLAR_EXPRESS, orthogonalize
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


def muon_by_hand(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, momentum: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of one (R, C) matrix, written as the papers have it: the new weights, momentum and
    second moments. `decay` is that of AdamW, before the learning rate."""
    m = momentum * m + (1 - momentum) * g
    x = momentum * m + (1 - momentum) * g  # Nesterov
    x = x / (1.01 * x.norm())  # Polar Express, on the matrix as it lies
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    axis = (
        1 if len(w) >= len(w.T) else 0
    )  # NorMuon: a neuron is a row, or a column if they are more
    v = 0.9 * v + 0.1 * (x * x).mean(axis, keepdim=True)
    y = x / v.sqrt()
    y = y * x.norm() / y.norm()
    step = lr * max(1.0, len(w) / len(w.T)) ** 0.5 * y
    shrinking = (step * w >= 0).double()  # cautious: where the step goes towards zero, or nowhere
    return w - step - lr * decay * shrinking * w, m, v


def run_both_muons(steps: int = 6) -> tuple[float, float]:
    """(largest difference between ours and the one by hand, largest movement) on matrices of all
    forms, with rate, momentum, decay and clipping that change."""
    params = parameters(MATRICES)
    twins = {n: p.detach().double() for n, p in params.items()}
    momenta = {n: torch.zeros_like(w) for n, w in twins.items()}
    moments = {n: torch.zeros(1, dtype=torch.float64) for n in twins}
    before = {n: w.clone() for n, w in twins.items()}
    ours = MuonAdamW([ParamGroup("muon", params, 0.02, weight_decay=0.5)])
    for step in range(steps):
        set_gradients(params, step)
        grads = {n: p.grad.double() for n, p in params.items()}  # type: ignore[union-attr]
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        lr, momentum, decay = 0.02 * (1 - step / 20), 0.85 + step / 50, 0.5 * (1 - step / 10)
        clip = 5.0 + step
        assert norm > clip, "nothing is clipped"
        for n, w in twins.items():
            g = grads[n] * clip / (norm + 1e-6)
            twins[n], momenta[n], moments[n] = muon_by_hand(
                w, g, momenta[n], moments[n], lr, momentum, decay
            )
        found = ours.step(1 - step / 20, momentum, grad_clip=clip, decay_multiplier=1 - step / 10)
        assert float(found) == pytest.approx(float(norm), rel=1e-5)
    difference = max(float((p.detach() - twins[n]).abs().max()) for n, p in params.items())
    movement = max(float((w - before[n]).abs().max()) for n, w in twins.items())
    return difference, movement


def test_the_muon_half_is_the_one_by_hand() -> None:
    difference, movement = run_both_muons()
    assert movement > 0.05
    assert difference < 5e-6  # float32, and small singular values are enlarged up to 850 times


IN_BFLOAT16 = """
import torch
from nanochat import optim, updates
from tests.test_optim import run_both_muons
x = torch.randn(32, 32).bfloat16()
print("alive", float((x @ x.mT).sum()), flush=True)
in_float32 = updates.orthogonalize
updates.orthogonalize = lambda x, dtype: in_float32(x, torch.bfloat16)
print(*run_both_muons())
"""


@pytest.mark.slow
def test_the_muon_half_in_bfloat16() -> None:
    """As we do it on GPUs, to the precision of bfloat16.

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
    # bfloat16 has 8 bits, and the iterations enlarge its rounding where a singular value is small
    assert difference < 0.1 * movement


def equioscillating(low: float, high: float) -> tuple[float, float, float]:
    """The odd polynomial of degree 5 that is nearest to 1 from `low` to `high`, by Remez: its error
    is as large at both ends and, with changing sign, at the two extrema in between."""
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(50):
        points = [(low, 1), (q, -1), (r, 1), (high, -1)]
        system = torch.tensor([[x, x**3, x**5, sign] for x, sign in points], dtype=torch.float64)
        ones = torch.ones(4, dtype=torch.float64)
        a, b, c, _ = torch.linalg.solve(system, ones).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)  # where a + 3 b x^2 + 5 c x^4 = 0
        q, r = sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
    return a, b, c


def test_polar_express_is_derived() -> None:
    """Amsel et al., algorithm 1: each polynomial is the best for the range that the one before has
    left, from 1e-3 to 1 at the start; never for less than a 50th of it (the cushion). All but the
    last take 1.02 times less than they get, as a guard against rounding."""
    low, high = 1e-3, 1.0
    for number, wanted in enumerate(POLAR_EXPRESS, 1):
        a, b, c = equioscillating(max(low, 0.02 * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        centre = 2 / sum(ends)  # around 1 for the true range too
        guarded = [centre * k / 1.02**n for k, n in zip((a, b, c), (1, 3, 5))]
        low = sum(k * low**n for k, n in zip(guarded, (1, 3, 5)))
        high = 2 - low
        last = number == len(POLAR_EXPRESS)
        found = [centre * k for k in (a, b, c)] if last else guarded
        assert found == pytest.approx(wanted, rel=1e-9), number


def mapped(values: Tensor) -> Tensor:
    """What becomes of singular values, in float64, of matrices of Frobenius norm 1."""
    y = values.double() / 1.01
    for a, b, c in POLAR_EXPRESS:
        y = a * y + b * y**3 + c * y**5
    return y


def test_where_singular_values_end() -> None:
    """Between 0.852 and 1.142 if they were at least a thousandth of the matrix's Frobenius norm;
    smaller ones are enlarged about 1,000 times, and none ends higher."""
    assert mapped(torch.logspace(-3, 0, 4001)).min() > 0.852
    assert mapped(torch.logspace(-9, 0, 9001)).max() < 1.142
    small = torch.logspace(-9, -4, 100).double()
    assert ((mapped(small) / small > 970) & (mapped(small) / small < 1000)).all()


@pytest.mark.parametrize("condition", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("shape", [(12, 12), (30, 10), (10, 30), (1, 8), (3, 16, 8)])
def test_orthogonalize_is_near_the_polar_factor(shape: tuple[int, ...], condition: float) -> None:
    """X = U S V^T must become about U V^T: the directions exactly, the singular values as above."""
    u, s, vh = torch.linalg.svd(random(*shape).double(), full_matrices=False)
    strengths = torch.logspace(0, -math.log10(condition), s.size(-1), dtype=torch.float64)
    x = (u @ torch.diag(7.0 * strengths) @ vh).float()
    y = orthogonalize(x)
    assert y.shape == x.shape and y.dtype == torch.float32
    inner = u.mT @ y.double() @ vh.mT  # diagonal: the new singular values
    wanted = torch.diag(mapped(strengths / strengths.norm()))
    # The rounding of float32 is enlarged as much as what was small
    assert (inner - wanted).abs().max() < (5e-4 if condition == 1000 else 5e-5)
    assert torch.allclose(orthogonalize(1e-3 * x), y, atol=1e-3), "only directions count"


def test_orthogonalize_of_nothing_is_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_matrices_of_one_shape_do_not_mix() -> None:
    """They go through the iteration in one batch."""
    stacked = random(3, 8, 5)
    for one, whole in zip(stacked, orthogonalize(stacked)):
        assert torch.allclose(orthogonalize(one), whole, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)])
def test_neurons_get_equal_steps_and_the_matrix_keeps_its_norm(shape: tuple[int, int]) -> None:
    """In the first step, when the second moment is the step's own: all neurons move as far."""
    params = {"w": nn.Parameter(torch.zeros(shape))}
    scales = torch.logspace(0, 1, shape[0])[:, None]
    gradient = random(*shape) * scales
    params["w"].grad = gradient.clone()
    MuonAdamW([ParamGroup("muon", params, 0.01)]).step(1.0)
    moved = -params["w"].detach() / (0.01 * max(1.0, shape[0] / shape[1]) ** 0.5)
    plain = orthogonalize(gradient)
    axis = 1 if shape[0] >= shape[1] else 0
    assert moved.norm() == pytest.approx(float(plain.norm()), rel=1e-5)
    lengths, before = moved.norm(dim=axis), plain.norm(dim=axis)
    assert torch.allclose(lengths, lengths.mean().expand_as(lengths), rtol=1e-4)
    if shape[0] != shape[1]:  # an orthogonal square matrix has equal rows anyway, about
        assert before.max() > 1.1 * before.min(), "nothing was to be made equal"


def test_weights_decay_only_where_the_step_shrinks_them() -> None:
    """Cautious weight decay (arXiv 2510.12402), against a twin without decay: exactly the weights
    whose step goes towards zero lose lr * weight_decay of themselves; the others nothing."""
    params, twins = parameters(MATRICES), parameters(MATRICES)
    for set_of, decay in ((params, 0.5), (twins, 0.0)):
        set_gradients(set_of, 0)
        MuonAdamW([ParamGroup("muon", set_of, 0.02, decay)]).step(1.0)
    both = {True: 0, False: 0}
    for i, (name, shape) in enumerate(MATRICES.items()):
        start, plain, found = random(*shape, seed=i), twins[name].detach(), params[name].detach()
        shrinks = (start - plain) * start > 0
        wanted = torch.where(shrinks, plain - 0.02 * 0.5 * start, plain)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-6), name
        assert torch.equal(found[~shrinks], plain[~shrinks]), name
        for value in (True, False):
            both[value] += int((shrinks == value).sum())
    assert min(both.values()) > 20


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
        assert float(clipped.step(1.0, grad_clip=2.0)) == pytest.approx(float(norm), rel=1e-5)
        assert float(norm) > 2.0
        assert float(reference.step(1.0)) == pytest.approx(2.0, rel=1e-5)
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["tall", "scalar"])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_moves_nothing(first: bool, name: str, value: float) -> None:
    """Nor one whose norm is beyond float32. The step does not wait to see it; whoever reads the
    norm refuses to go on."""
    params = parameters(MATRICES | OTHERS)
    optimizer = both_kinds(params)
    if not first:
        set_gradients(params, 0)
        refuse_divergence(float(optimizer.step(1.0)), 0)
    before = {n: p.detach().clone() for n, p in params.items()}
    state = {n: t.clone() for n, t in optimizer.state_dict().items()}
    set_gradients(params, 1)
    params[name].grad.flatten()[0] = value  # type: ignore[union-attr]
    norm = optimizer.step(1.0, grad_clip=1.0)
    assert norm.shape == () and not norm.isfinite()
    assert all(torch.equal(p, before[n]) for n, p in params.items())
    assert all(torch.equal(t, state[n]) for n, t in optimizer.state_dict().items())
    with pytest.raises(UserError, match=r"step 17 has norm (nan|inf); lower --matrix_lr"):
        refuse_divergence(float(norm), 17)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_the_same_and_compiles_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rate, momentum, decay and clipping change in every step: none may compile it again. A graph
    break anywhere is an error."""
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    shapes = {"tall": MATRICES["tall"], "twin": MATRICES["twin"], "table": OTHERS["table"]}
    params, twins = parameters(shapes), parameters(shapes)
    plain = both_kinds(twins)
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **how: compile(f, backend=backend, fullgraph=True, **how)
    )
    torch._dynamo.reset()
    counters.clear()
    fused = MuonAdamW(plain_groups(plain, params))
    fused.fuse()
    for step in range(5):
        set_gradients(params, step)
        set_gradients(twins, step)
        how = (1 - step / 10, 0.85 + step / 50, 5.0 + step, 1 - step / 10)
        assert torch.allclose(fused.step(*how), plain.step(*how))
        assert counters["stats"]["unique_graphs"] == 2, "one for Muon, one for AdamW"
    for name, p in params.items():
        assert torch.allclose(p, twins[name], atol=1e-6), name
        assert not torch.allclose(p, parameters(shapes)[name], atol=1e-2), "nothing has moved"
    torch._dynamo.reset()


def plain_groups(like: MuonAdamW, params: dict[str, nn.Parameter]) -> list[ParamGroup]:
    """The groups of an optimizer, with other parameters of the same names."""
    return [replace(g, params={n: params[n] for n in g.params}) for g in like.groups]


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
    assert len(state) == 2 * len(MATRICES) + 2 * len(OTHERS)
    assert not any(t.any() for t in state.values())


def test_the_state_of_an_older_optimizer_is_refused(tmp_path: Path) -> None:
    """It had no second moment of neurons; what can be done is said."""
    optimizer = both_kinds(parameters(MATRICES | OTHERS))
    state = {n: t for n, t in optimizer.state_dict().items() if not n.endswith("/neuron_moment")}
    assert len(state) == len(MATRICES) + 2 * len(OTHERS)
    save_file(state, tmp_path / "optim.safetensors")
    with pytest.raises(UserError, match=r"(?s)neuron_moment: another version.*weights"):
        optimizer.load_state_dict(optim_reader(tmp_path), 1)


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
                wanted = ("adamw", 0.004 * adam, 0.0)
            elif is_table:
                wanted = ("adamw", 0.2 * adam, 0.0)
            elif p.ndim == 2:
                wanted = ("muon", 0.02 * 0.5, 0.1)
            else:  # norm weights and biases
                wanted = ("adamw", 0.004 * adam, 0.0)
            assert (group.kind, group.lr, group.weight_decay) == (
                wanted[0], pytest.approx(wanted[1]), wanted[2],
            ), name  # fmt: skip


def test_the_additions_of_turbo_have_rates_of_their_own() -> None:
    model = tiny_model("turbo")
    optimizer = make_optimizer(model, 0.2, 0.004, 0.02, weight_decay=0.1, lr_frac=0.5)
    groups = {name: g for g in optimizer.groups for name in g.params}
    assert set(groups) == {name for name, _ in model.named_parameters()}
    width = (64 / 768) ** -0.5
    for name, g in groups.items():
        if "value_embeds" in name:
            assert (g.kind, g.weight_decay) == ("adamw", 0.0)
            assert g.lr == pytest.approx(ADAMW_KINDS["value_embedding"].share * 0.2 * width * 0.5)
        elif name.startswith("h."):
            assert (g.kind, g.lr, g.weight_decay) == ("muon", 0.01, 0.1)
        elif name not in ("wte.weight", "lm_head.weight"):  # scalars: not scaled by width
            assert (g.kind, g.weight_decay) == ("adamw", 0.0)
            kind = next(k for k, ps in model.param_groups().items() if groups_hold(ps, g))
            how = ADAMW_KINDS[kind]
            assert how.rate == "scalar_lr" and g.betas == how.betas
            assert g.lr == pytest.approx(0.1 * how.share * 0.5)


def groups_hold(tensors: list[Tensor], group: ParamGroup) -> bool:
    return {id(t) for t in tensors} == {id(p) for p in group.params.values()}


@pytest.mark.parametrize("arch", ["gpt", "turbo", "qwen2.5"])
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
