"""
A model whose weights are shared out learns what a whole one learns, in every mode and on any number
of ranks, and a checkpoint of one goes on in any other.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nanochat.checkpoint import load_weights, optim_reader, save_checkpoint, snapshot
from nanochat.common import UserError
from nanochat.dataloader import MicroBatch
from nanochat.distributed import DistInfo, local, local_rows
from nanochat.flags import TrainFlags
from nanochat.lora import add_lora, lora_optimizer
from nanochat.models import build_model
from nanochat.optim import MuonAdamW, make_optimizer
from nanochat.policy import Policy, PolicyBatch, compared, frozen_copy
from nanochat.precision import Precision
from nanochat.shard import build_for, gathered, init_sharded, shard_size, sharded_modules
from nanochat.step import TrainStep
from tests.models_for_tests import TINY, tiny_model, tokens_of
from tests.ranks_for_tests import as_ranks

WORLDS = (2, 3, 4)
MODES = ("none", "zero", "fsdp", "hsdp")
ROWS, LENGTH, STEPS, SAVED_AT = 12, 12, 3, 2
RATES = (0.02, 0.002, 0.01, 0.1)  # embedding, head, matrices, decay


def modes(size: int) -> list[str]:
    """Those that so many ranks can be in. With one copy hsdp is fsdp."""
    return [mode for mode in MODES if mode != "hsdp" or size == 4]


def flags(mode: str, size: int) -> TrainFlags:
    """hsdp has two copies."""
    return TrainFlags(shard=mode, shard_size=2 if size == 4 else size)  # type: ignore[arg-type]


def here(rank: int, size: int) -> DistInfo:
    return DistInfo(rank, rank, size, torch.device("cpu"))


def place(arch: str, args: TrainFlags, info: DistInfo, recompute: Any = "none") -> Any:
    """The tiny model of that architecture with random weights, which matter all."""
    plain = tiny_model(arch)
    model = build_for(args, plain.config, info, recompute)
    with torch.no_grad():
        for p, q in zip(model.parameters(), plain.parameters()):
            low, high = local_rows(p)
            local(p.detach()).copy_(q[low:high])
    return model


def batches_of(step: int, rank: int, size: int, config: Any, micro: int = 2) -> list[MicroBatch]:
    """This rank's rows of a step, in micro-batches; some targets do not count."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, config.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    rows = rows[rank::size]
    targets = rows[:, 1:].clone()
    targets[:, :3] = -1
    return [
        MicroBatch(rows[at : at + micro, :-1], targets[at : at + micro])
        for at in range(0, len(rows), micro)
    ]


def learn(
    model: Any, optimizer: MuonAdamW, args: TrainFlags, info: DistInfo, steps: range
) -> tuple[list[list[float]], TrainStep]:
    """(loss, norm of the gradient) of every step."""
    step = TrainStep(args, info, model, optimizer)
    curve = []
    for number in steps:
        batches = batches_of(number, info.rank, info.world_size, model.config)
        curve.append(step.take(number, batches, (1.0, 0.9, 1.0), False).numbers.read())
    return curve, step


def save(tag: str, model: Any, optimizer: MuonAdamW) -> Path:
    return save_checkpoint("base", tag, SAVED_AT, model, optimizer.state_dict(), {})


def curves(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Every architecture in every mode: the whole run, which saves in its midst."""
    info, result = here(rank, size), {}
    for arch in TINY:
        for mode in modes(size):
            args = flags(mode, size)
            model = place(arch, args, info, "block" if size == 2 else "none")
            optimizer = make_optimizer(model, *RATES, shard=mode)
            first, _ = learn(model, optimizer, args, info, range(SAVED_AT))
            save(f"{arch}-{mode}-{size}", model, optimizer)
            last, _ = learn(model, optimizer, args, info, range(SAVED_AT, STEPS))
            result[arch, mode] = first + last
    result["beside"] = [check(info) for check in CHECKS]
    if size == 2:
        result["beside"].append(bfloat16(info))
    return result


def resume(arch: str, writer: str, args: TrainFlags, info: DistInfo, folder: Path) -> Any:
    model = build_for(args, TINY[arch], info, "none")
    optimizer = make_optimizer(model, *RATES, shard=args.shard)
    saved = folder / "base_checkpoints" / writer / f"step_{SAVED_AT:06d}"
    load_weights(saved, model)
    optimizer.load_state_dict(optim_reader(saved), SAVED_AT)
    return learn(model, optimizer, args, info, range(SAVED_AT, STEPS))[0]


def resumed(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What every mode makes of the checkpoints of other modes and other numbers of ranks."""
    info, result = here(rank, size), {}
    for writer in WORLDS:
        for mode in modes(writer):
            for reader in modes(size) if writer == 4 else {mode} & {*modes(size)}:
                tag = f"qwen2.5-{mode}-{writer}"
                args = flags(reader, size)
                result[mode, writer, reader] = resume("qwen2.5", tag, args, info, folder)
    return result


# ---- checks that run on every rank


def same_values(info: DistInfo) -> bool:
    """To the bit those of one process, though no rank draws them all."""
    for arch in TINY:
        for mode in {"fsdp", "hsdp"} & {*modes(info.world_size)}:
            model = build_for(flags(mode, info.world_size), TINY[arch], info, "none", seed=3)
            plain = build_model(TINY[arch], seed=3)
            for name, p in model.named_parameters():
                low, high = local_rows(p)
                assert torch.equal(local(p.detach()), plain.get_parameter(name)[low:high]), name
            for (_, a), (_, b) in zip(model.named_buffers(), plain.named_buffers()):
                assert torch.equal(a, b)
            held = sum(local(p).numel() for p in model.parameters())
            assert held < 0.8 * sum(p.numel() for p in plain.parameters())
    return True


def unequal_batches(info: DistInfo) -> bool:
    """Ranks with fewer micro-batches than others, or none, do not hang, and change nothing."""
    args, alone = flags("fsdp", info.world_size), here(0, 1)
    everything = [b for r in range(3) for b in batches_of(0, r, 3, TINY["gpt"], 1)][:5]
    mine = everything if info.rank == 0 else []
    found = []
    for mode, where, batches in (("fsdp", info, mine), ("none", alone, everything)):
        model = place("gpt", TrainFlags(shard=mode), where)  # type: ignore[arg-type]
        optimizer = make_optimizer(model, *RATES, shard=mode)
        step = TrainStep(args, where, model, optimizer)
        if mode == "none":  # of one process, in the midst of others
            count = sum(int(b.count()) for b in batches)
            loss = torch.stack([b.loss(model) for b in batches]).sum() / count
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            found.append([float(loss.detach()), float(norm)])
        else:
            found.append(step.take(1, batches, (1.0, 0.9, 1.0), False).numbers.read())
    assert found[0] == pytest.approx(found[1], rel=1e-5), found
    return True


def bfloat16(info: DistInfo) -> bool:
    """Weights that travel in bfloat16 give the products of those that are rounded after it, to the
    bit, but for Qwen's norms; master weights, gradients and state are float32, and so is what is
    saved while the weights are together."""
    rounded = Precision(info.device, torch.bfloat16, "for this test")
    # oneDNN's products in bfloat16 are an illegal instruction on some CPUs
    with torch.backends.mkldnn.flags(enabled=False):
        for arch in TINY:
            exact, found = arch != "qwen2.5", []
            plain = tiny_model(arch)
            idx, saved = tokens_of(plain, 2, 9), plain.state_dict()
            for mode in ("fsdp", "zero"):
                args = flags(mode, info.world_size)
                with patch("nanochat.shard.choose_precision", lambda *_: rounded):
                    model = place(arch, args, info)
                optimizer = make_optimizer(model, *RATES, shard=mode)
                step = TrainStep(args, info, model, optimizer)
                step.precision = rounded
                with gathered(model), rounded.autocast():
                    assert (model.param_groups()["matrix"][0].dtype == torch.bfloat16) == (
                        mode == "fsdp"
                    )
                    assert not exact or torch.equal(model(idx), plain(idx))
                    kept = snapshot(model.state_dict())
                assert all(torch.equal(t, saved[name]) for name, t in kept.items())
                batches = batches_of(0, info.rank, info.world_size, plain.config)
                step._run_passes(batches, torch.tensor(12.0))
                grads = [local(p.grad) for p in model.parameters()]
                held = [t for entries in optimizer.state.values() for t in entries.values()]
                weights = [local(p) for p in model.parameters()]
                assert {t.dtype for t in [*grads, *weights, *held]} == {torch.float32}
                optimizer.zero_grad()
                for number in (1, 2):
                    taken = step.take(number, batches, (1.0, 0.9, 1.0), False)
                    found.append(taken.numbers.read())
            # The second step's weights are the first's but for the order of sums, and are rounded
            assert found[0] == pytest.approx(found[2], rel=1e-5 if exact else 2e-2), (arch, found)
            assert found[1] == pytest.approx(found[3], rel=1e-2 if exact else 4e-2), (arch, found)
    return True


def rollouts(info: DistInfo) -> bool:
    """Gathered, a rank may compute as often as it likes, by any of the model's methods; afterwards
    the weights are in shares again, and training goes on."""
    args = flags("fsdp", info.world_size)
    model, plain = place("turbo", args, info), tiny_model("turbo")
    idx = tokens_of(plain, 2, 9)
    with gathered(model), gathered(model):
        for _ in range(info.rank):
            with torch.inference_mode():
                wanted = plain(idx)
                assert torch.allclose(model(idx), wanted, atol=1e-5)
                assert torch.allclose(model.logits(model.hidden(idx)), wanted, atol=1e-5)
    assert all(hasattr(p, "device_mesh") for p in model.parameters())
    with gathered(model):  # a signal may end a run in here, which then saves
        saved = snapshot(model.state_dict())
        assert saved.keys() == (plain.state_dict().keys() if info.rank == 0 else set())
        assert all(torch.equal(t, plain.state_dict()[name]) for name, t in saved.items())
    optimizer = make_optimizer(model, *RATES)
    learn(model, optimizer, args, info, range(1))
    assert all(hasattr(p, "device_mesh") for p in model.parameters())
    return True


def frozen_weights(info: DistInfo) -> bool:
    """LoRA's matrices are whole on every rank, beside frozen weights in shares."""
    found = []
    for mode in ("fsdp", "zero"):
        args = flags(mode, info.world_size)
        model = place("gpt", args, info)
        add_lora(model, 2, alpha=4.0, seed=1)
        optimizer = lora_optimizer(model, 0.05, args.shard)
        found.append(learn(model, optimizer, args, info, range(3))[0])
        with gathered(model):
            found[-1].append([float(model(tokens_of(model, 1, 9)).detach().square().mean())])
    for a, b in zip(*found):
        assert a == pytest.approx(b, rel=1e-4), found
    assert found[0][0][0] != found[0][2][0]
    return True


def policies(info: DistInfo) -> bool:
    """RL's loss, of a model with more rows than the tokenizer has ids, with a frozen copy."""
    found = []
    for mode in ("fsdp", "none"):
        args = flags(mode, info.world_size)
        model = place("qwen2.5", args, info)
        reference = frozen_copy(model)
        optimizer = make_optimizer(model, *RATES, shard=mode)
        step = TrainStep(args, info, model, optimizer)
        policy = Policy(model, step.forward, 90, kl=0.1, reference=reference)
        step.forward = policy
        idx = tokens_of(model, 2, 9) % 90
        batches = [
            PolicyBatch(idx[:, :-1], idx[:, 1:], advantages=torch.tensor([[1.0], [-0.5]]))
            for _ in range(1 + info.rank % 2)
        ]
        numbers = []
        for number in range(2):
            with gathered(model) if sharded_modules(model) else nullcontext():
                policy.begin(batches)
            taken = step.take(number, [*batches], (1.0, 0.9, 1.0), False).numbers.read()
            numbers += [compared(batches)["kl"], *taken]
        found.append(numbers)
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5), found
    return True


CHECKS = (same_values, unequal_batches, rollouts, frozen_weights, policies)

# ---- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shard")


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The curve of one process, by architecture."""
    result, info, args = {}, here(0, 1), flags("none", 1)
    for arch in TINY:
        model = tiny_model(arch)
        optimizer = make_optimizer(model, *RATES)
        result[arch] = learn(model, optimizer, args, info, range(STEPS))[0]
    return result


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[int, list[dict[str, Any]]]:
    return as_ranks(curves, WORLDS, folder)


@pytest.fixture(scope="module")
def others(ranks: Any, folder: Path) -> dict[int, list[dict[str, Any]]]:
    return as_ranks(resumed, (2, 4), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "mode"), [(size, mode) for size in WORLDS for mode in modes(size)]
)
@pytest.mark.parametrize("arch", TINY)
def test_the_curve_is_that_of_one_process(
    ranks: Any, alone: Any, arch: str, mode: str, size: int
) -> None:
    """Losses and norms, over steps with several micro-batches, some of them recomputed."""
    assert abs(alone[arch][0][0] - alone[arch][-1][0]) > 0.05, "nothing was learned"
    for result in ranks[size]:
        for found, wanted in zip(result[arch, mode], alone[arch], strict=True):
            assert found == pytest.approx(wanted, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", WORLDS)
def test_what_stands_beside_training(ranks: Any, size: int) -> None:
    """Initial values, unequal batches, evaluation, LoRA, RL: asserted on the ranks."""
    assert all(all(result["beside"]) for result in ranks[size])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_any_mode_resumes_any_other_at_any_number_of_ranks(
    others: Any, alone: Any, size: int
) -> None:
    for result in others[size]:
        # Every mode of 4 ranks, and its own of 2 and 3
        assert len(result) == 4 * len(modes(size)) + 2 * 3
        for how, curve in result.items():
            for found, wanted in zip(curve, alone["qwen2.5"][SAVED_AT:], strict=True):
                assert found == pytest.approx(wanted, rel=2e-4), how


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "mode"), [(size, mode) for size in WORLDS for mode in modes(size)]
)
@pytest.mark.parametrize("arch", TINY)
def test_one_process_resumes_what_several_ranks_saved(
    ranks: Any, folder: Path, alone: Any, arch: str, mode: str, size: int
) -> None:
    curve = resume(arch, f"{arch}-{mode}-{size}", flags("none", 1), here(0, 1), folder)
    for found, wanted in zip(curve, alone[arch][SAVED_AT:], strict=True):
        assert found == pytest.approx(wanted, rel=2e-4)


def test_copies_must_fill_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert shard_size("hsdp", 16) == 8 and shard_size("hsdp", 16, 4) == 4
    assert shard_size("fsdp", 16) == 16 and shard_size("zero", 16) == 1
    with pytest.raises(UserError, match=r"--shard=hsdp: 12 ranks .* over 8; set --shard_size"):
        shard_size("hsdp", 12)


def test_a_whole_model_is_gathered_already() -> None:
    model = tiny_model("gpt")
    with gathered(model):
        assert not hasattr(model, "is_gathered")
    init_sharded(model, 3)  # of one process, too
    for p, q in zip(model.parameters(), build_model(TINY["gpt"], seed=3).parameters()):
        assert torch.equal(p, q)
