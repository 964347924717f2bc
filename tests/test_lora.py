"""LoRA: only the small matrices learn; the first step is the model; all others see it merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nanochat.checkpoint import list_steps, load_model, read_meta, step_dir
from nanochat.common import UserError, read_jsonl
from nanochat.engine import Engine
from nanochat.flags import TrainFlags
from nanochat.lora import (
    LoraFlags,
    LoraLinear,
    adapt,
    add_lora,
    has_lora,
    lora_optimizer,
    merged_rows,
)
from nanochat.plan import Planner, Setup
from nanochat.recompute import blocks_of, recompute
from tests.models_for_tests import TINY, tiny_model, tokens_of
from tests.tiny_world import BASE_FLAGS, MID_FLAGS, new_world, run_stage

RANK = 2
LORA_FLAGS = [*MID_FLAGS, "--lora_rank=4", "--lora_lr=0.01", "--source_tag=d2", "--eval_every=-1"]


def adapted(arch: str, trained: bool = False) -> Any:
    """A tiny model with LoRA; `trained`: B is not zero any more."""
    model = tiny_model(arch)
    add_lora(model, RANK, alpha=4.0, seed=1)
    if trained:
        generator = torch.Generator().manual_seed(5)
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.lora_b.data.normal_(0.0, 0.5, generator=generator)
    return model


@pytest.mark.parametrize("arch", TINY)
def test_the_first_step_sees_the_model_as_it_was(arch: str) -> None:
    """To the bit, and so does sampling; every matrix of the blocks has two beside it."""
    plain, model = tiny_model(arch), adapted(arch)
    idx = tokens_of(model, 2, 12)
    assert torch.equal(model(idx), plain(idx))
    linears = [m for b in blocks_of(model) for m in b.modules() if isinstance(m, nn.Linear)]
    beside = [m for m in linears if isinstance(m, LoraLinear)]
    assert len(beside) >= 6 * model.config.n_layer
    assert all(min(m.weight.shape) <= RANK for m in linears if m not in beside)  # turbo's gates
    assert all(float(m.lora_scale) == 4.0 / RANK for m in beside)


@pytest.mark.parametrize("arch", TINY)
def test_only_the_small_matrices_have_gradients_and_state(arch: str) -> None:
    model = adapted(arch, trained=True)
    optimizer = lora_optimizer(model, 0.01)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen.keys() == tiny_model(arch).state_dict().keys()
    idx = tokens_of(model, 2, 12)
    model(idx, idx).backward()
    for name, p in model.named_parameters():
        small = name.endswith((".lora_a", ".lora_b"))
        assert small == (p.grad is not None) == (name in optimizer.named), name
        assert not small or p.grad.abs().sum() > 0, name
    optimizer.step(1.0)
    assert {key.split("/")[0] for key in optimizer.state_dict()} == set(optimizer.named)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_the_gradient_is_that_of_the_product() -> None:
    """y = (W + s B A) x, differentiated by autograd where the sum is written out."""
    model = adapted("qwen2.5", trained=True)
    linear = next(m for m in model.modules() if isinstance(m, LoraLinear))
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    a, b = (p.detach().clone().requires_grad_() for p in (linear.lora_a, linear.lora_b))
    dense = x @ (linear.weight + 2.0 * (b @ a)).T + linear.bias
    torch.testing.assert_close(linear(x), dense)
    found = torch.autograd.grad(linear(x).square().sum(), (linear.lora_a, linear.lora_b))
    for got, want in zip(found, torch.autograd.grad(dense.square().sum(), (a, b))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", TINY)
def test_merged_it_is_a_plain_model(arch: str) -> None:
    model, plain = adapted(arch, trained=True), tiny_model(arch)
    idx = tokens_of(model, 2, 12)
    before = plain(idx)
    held = copy.deepcopy(model.state_dict())
    assert has_lora(held)
    tensors = merged(held, plain)
    for name, tensor in tensors.items():  # a rank may want some rows only
        if tensor.ndim == 2:
            some = merged_rows(held.__getitem__, held, name, (1, 3), tensor.device)
            torch.testing.assert_close(some, tensor[1:3])
    plain.load_state_dict(tensors)
    assert (plain(idx) - before).abs().max() > 0.1  # there was something to merge
    torch.testing.assert_close(plain(idx), model(idx), rtol=1e-4, atol=1e-4)
    same = merged(tensors, plain)  # of a plain one nothing changes
    assert all(torch.equal(same[name], t) for name, t in tensors.items())


def merged(tensors: dict[str, torch.Tensor], plain: Any) -> dict[str, torch.Tensor]:
    """All tensors of the plain model."""
    return {
        name: merged_rows(tensors.__getitem__, tensors, name, (0, len(t)), t.device)
        for name, t in plain.state_dict().items()
    }


@pytest.mark.parametrize("arch", TINY)
def test_it_learns_a_tiny_task(arch: str) -> None:
    """To say one row by heart, with recomputed blocks too."""
    model = adapted(arch)
    recompute(model, "block")
    optimizer = lora_optimizer(model, 0.02)
    idx = tokens_of(model, 1, 13)
    losses = []
    for _ in range(60):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step(1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], losses


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="--lora_rank=32: no matrix"):
        add_lora(tiny_model("gpt"), 32, 1.0)
    args = type("Args", (TrainFlags,), {"lora_rank": -1, "lora_alpha": 1.0, "lora_lr": 1.0})
    with pytest.raises(UserError, match="--lora_rank=-1 must be at least 1"):
        adapt(tiny_model("gpt"), args())
    with pytest.raises(UserError, match="leave --fp8 away"):
        adapt(tiny_model("gpt"), args(fp8=True))


@pytest.mark.parametrize("arch", TINY)
def test_the_plan_knows_that_little_is_trained(arch: str) -> None:
    whole, part = (
        Planner(TINY[arch], Setup("cpu", False, False, lora_rank=rank), rows=2).memory(1)
        for rank in (0, RANK)
    )
    trained = sum(p.numel() for p in adapted(arch).parameters() if p.requires_grad)
    assert part.optimizer_step["optimizer"] == 2 * 4 * trained
    assert part.micro_batch["gradients"] == 4 * trained
    assert whole.optimizer_step["optimizer"] > 2 * part.optimizer_step["optimizer"]
    assert part.total < whole.total


# ---- runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with data, a tokenizer and a base model of 6 steps (tag d2)."""
    with new_world(tmp_path_factory) as folder:
        run_stage("base_train", *BASE_FLAGS)
    return folder


def losses(base: Path, tag: str) -> list[float]:
    path = base / "mid_checkpoints" / tag / "log.jsonl"
    return [row["loss"] for _, row in read_jsonl(path) if row["event"] == "step"]


def files(tag: str, step: int = 6) -> dict[str, torch.Tensor]:
    folder = step_dir("mid", tag, step)
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optim.safetensors")}


def test_a_run_from_start_to_chat(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed it is the same to the bit; loaded without any flag it is a plain model; the next
    stage trains all of that."""
    run_stage("mid_train", *LORA_FLAGS, "--model_tag=whole", "--save_every=3", "--keep_last=-1")
    said = capsys.readouterr().out
    whole = files("whole")
    trained = {n: t.numel() for n, t in whole.items() if n.endswith((".lora_a", ".lora_b"))}
    assert f"LoRA of rank 4 beside 12 matrices: {sum(trained.values()):,} parameters" in said
    base_weights = load_file(step_dir("base", "d2", 6) / "model.safetensors")
    assert all(torch.equal(whole[name], t) for name, t in base_weights.items())
    assert {n.split("/")[0] for n in whole if "/" in n} == set(trained)
    assert losses(base, "whole")[-1] < losses(base, "whole")[0]

    run_stage("mid_train", *LORA_FLAGS, "--model_tag=whole", "--resume_from_step=3")
    again = files("whole")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], t) for name, t in whole.items())

    model, tokenizer, meta = load_model("mid", "cpu", "whole")
    assert meta["args"]["lora_rank"] == 4
    assert set(model.state_dict()) == set(base_weights)
    plain, _, _ = load_model("base", "cpu", "d2")
    lora, _, _ = load_model("base", "cpu", "d2")
    add_lora(lora, 4, 32.0)
    lora.load_state_dict({n: t for n, t in whole.items() if "/" not in n})
    idx = tokens_of(model, 2, 20)
    torch.testing.assert_close(model(idx), lora(idx), rtol=1e-4, atol=1e-4)
    assert (model(idx) - plain(idx)).abs().max() > 1e-2
    assert Engine(model, tokenizer).generate_batch([1, 2, 3], max_tokens=3)[0]

    capsys.readouterr()
    sft = [*MID_FLAGS, "--num_iterations=1", "--source=mid", "--source_tag=whole"]
    run_stage("chat_sft", *sft, "--model_tag=next", "--eval_every=-1")
    assert "optimizer: cold start (the checkpoint's is of LoRA's" in capsys.readouterr().out
    assert not has_lora(load_file(step_dir("sft", "next", 1) / "model.safetensors"))


def test_an_export_is_the_adapted_model(base: Path, tmp_path: Path) -> None:
    """What transformers computes with the exported folder is what the run computed."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    run_stage("mid_train", *LORA_FLAGS, "--num_iterations=2", "--model_tag=export")
    out = ["--model_tag=export", "--source=mid", f"--out={tmp_path / 'hf'}", "--dtype=float32"]
    run_stage("hf_export", *out)
    lora, _, _ = load_model("base", "cpu", "d2")
    add_lora(lora, 4, 32.0)
    lora.load_state_dict({n: t for n, t in files("export", 2).items() if "/" not in n})
    idx = tokens_of(lora, 2, 20)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(theirs(idx).logits, lora(idx), rtol=1e-3, atol=1e-3)


def test_another_rank_or_none_cannot_resume(base: Path) -> None:
    argv = [*LORA_FLAGS, "--num_iterations=2", "--model_tag=strict"]
    run_stage("mid_train", *argv)
    for flag in ("--lora_rank=2", "--lora_rank=0", "--lora_alpha=7", "--lora_lr=0.5"):
        with pytest.raises(UserError, match=f"its {flag.split('=')[0]} was"):
            run_stage("mid_train", *argv, flag, "--resume")
    assert read_meta(step_dir("mid", "strict", list_steps("mid", "strict")[-1]))["step"] == 2


@pytest.mark.parametrize("width", [896, 1536, 2048, 3584])
def test_the_default_rate_is_the_published_one_for_models_of_these_widths(width: int) -> None:
    """Those of Qwen2.5, by the rule that docs/06-finetuning.md cites; it is for alpha 32."""
    assert LoraFlags.lora_alpha == 32
    assert LoraFlags.lora_lr == pytest.approx(5e-4 * (2000 / width) ** 0.0775, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", TINY)
def test_compiled_on_a_gpu_it_is_the_same(arch: str) -> None:
    """In bfloat16, as a run computes: the sum stays in it, and gradients are in float32."""
    model = adapted(arch, trained=True).cuda()
    idx = tokens_of(model, 2, 12).cuda()
    optimizer = lora_optimizer(model, 0.01)
    found = []
    for forward in (model, torch.compile(model)):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            linear = next(m for m in model.modules() if isinstance(m, LoraLinear))
            x = torch.ones(3, linear.in_features, device="cuda")
            assert linear(x).dtype == torch.bfloat16
            loss = forward(idx, idx)
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in optimizer.named.values())
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        found.append(loss.item())
        optimizer.step(1e-6)
        optimizer.zero_grad()
    assert found[0] == pytest.approx(found[1], rel=2e-2)
