"""Estimates against the allocator's account, choices, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.memory import measured_peak
from nanochat import plan
from nanochat.common import UserError
from nanochat.distributed import DistInfo
from nanochat.flags import TrainFlags
from nanochat.models import GPTConfig, QwenConfig, build_model, make_config
from nanochat.plan import CUDA_RESERVE, MODES, Planner, Setup, settle
from nanochat.recompute import Mode

HERE = DistInfo(0, 0, 1, torch.device("cpu"))
CPU = Setup("cpu", bf16=False, compiled=False)
SMALL: dict[str, Any] = {
    "gpt": GPTConfig(128, 1024, n_layer=3, n_head=2, n_kv_head=2, n_embd=64),
    "qwen2.5": QwenConfig(128, 1024, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_mlp=192),
}


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 6])
def test_the_estimate_is_what_the_allocator_says(arch: str, mode: Mode, batch: int) -> None:
    config = SMALL[arch]
    estimate = Planner(config, CPU, rows=2 * batch).memory(batch, mode).total
    measured = measured_peak(config, batch, 128, mode)
    assert abs(estimate / measured - 1) < 0.1, (estimate, measured)


def test_the_loss_takes_as_many_positions_at_a_time_as_on_the_device() -> None:
    """1,024 positions of a vocabulary of 8,192 are eight chunks on a CPU, and one on a GPU."""
    config = GPTConfig(256, 8192, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    cpu = Planner(config, CPU, rows=8).memory(4).total
    measured = measured_peak(config, 4, 256)
    assert abs(cpu / measured - 1) < 0.1, (cpu, measured)
    assert Planner(config, Setup("cuda", False, False), rows=8).memory(4).total > 1.5 * cpu


def test_a_step_of_one_micro_batch_has_no_gradients_when_it_begins() -> None:
    config = SMALL["gpt"]
    estimates = [Planner(config, CPU, rows).memory(6).total for rows in (6, 12)]
    measured = [measured_peak(config, 6, 128, micro_batches=n) for n in (1, 2)]
    assert estimates[0] < estimates[1]
    assert estimates == pytest.approx(measured, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["gpt", "qwen2.5"])
@pytest.mark.parametrize("mode", MODES)
def test_the_estimate_is_what_a_gpu_measures(arch: str, mode: Mode) -> None:
    config, _ = make_config(arch, 8, 65_536, 1024)
    estimate = Planner(config, Setup(), rows=16).memory(8, mode).total
    measured = measured_peak(config, 8, 1024, mode, device="cuda", bf16=True, compiled=True)
    assert abs(estimate / measured - 1) < 0.1, (estimate, measured)


def test_ranks_share_the_optimizers_state() -> None:
    config = SMALL["gpt"]
    parts = [
        Planner(config, Setup("cpu", False, False, ranks), 8).memory(1).optimizer_step["optimizer"]
        for ranks in (1, 2, 4)
    ]
    assert parts[0] / 2 <= parts[1] < 0.7 * parts[0]
    assert parts[0] / 4 <= parts[2] < parts[1]


def test_shares_are_what_the_optimizer_holds_and_gradients_come_and_go() -> None:
    config = SMALL["qwen2.5"]
    whole = Planner(config, CPU, 8).memory(2)
    params = sum(p.numel() for p in build_model(config, "meta").parameters())
    for size in (2, 4):
        setup = replace(CPU, world_size=8, shard="hsdp" if size < 8 else "fsdp", shard_size=size)
        memory = Planner(config, setup, 8).memory(2)
        at_step = memory.optimizer_step
        assert at_step["weights"] == pytest.approx(4 * params / size, rel=0.1)  # rows are whole
        assert at_step["gradients"] == pytest.approx(4 * params / size, rel=0.1)
        held = whole.optimizer_step["optimizer"]
        assert at_step["optimizer"] == pytest.approx(held / size, rel=0.1)
        kept = {k: v for k, v in whole.micro_batch.items() if k in ("activations", "logits")}
        assert {k: memory.micro_batch[k] for k in kept} == kept


def test_frozen_weights_in_shares_have_neither_gradients_nor_state() -> None:
    setup = replace(CPU, world_size=4, lora_rank=4)
    whole, shares = (
        Planner(SMALL["gpt"], replace(setup, shard=shard, shard_size=size), 8).memory(2)
        for shard, size in (("zero", 1), ("fsdp", 4))
    )
    for name in ("gradients", "optimizer"):
        assert shares.optimizer_step[name] == whole.optimizer_step[name] > 0
    assert shares.optimizer_step["weights"] < 0.4 * whole.optimizer_step["weights"]
    assert shares.micro_batch["gradients"] == whole.micro_batch["gradients"]


@pytest.fixture(scope="module")
def on_eight_gpus() -> dict[str, list[Planner]]:
    """A 7B model on 8 GPUs of 80 GB."""
    config, _ = make_config("qwen2.5-7b", 0, 151_665, 2048)
    setup = Setup(world_size=8)
    return {
        shard: [
            Planner(config, each, 32)
            for each in plan.candidates(TrainFlags(shard=shard), setup)  # type: ignore[arg-type]
        ]
        for shard in ("zero", "fsdp")
    }


def test_7b_trains_on_eight_gpus_with_fsdp_and_not_with_zero(
    on_eight_gpus: dict[str, list[Planner]], capsys: pytest.CaptureFixture[str]
) -> None:
    limit = int(80e9 - CUDA_RESERVE)
    (zero,), (fsdp,) = on_eight_gpus["zero"], on_eight_gpus["fsdp"]
    assert min(zero.memory(1, mode).total for mode in MODES) > limit
    found = fsdp.choose(limit, plan.GPU_MICRO_BATCH_TOKENS, MODES)
    assert found is not None and found.total <= limit
    assert found.batch * found.length >= plan.SENSIBLE_TOKENS
    with capsys.disabled():
        print(f"\n7B, 8 x 80 GB, fsdp: {found.batch} row(s), {found.mode}\n{found.table()}")


def test_auto_takes_zero_where_that_fits_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GPTConfig(8, 256, n_layer=24, n_head=2, n_kv_head=2, n_embd=64)  # little but weights
    eight = replace(CPU, world_size=8)
    zero, fsdp = (Planner(config, each, 4) for each in plan.candidates(TrainFlags(), eight))
    assert (zero.setup.shard, fsdp.setup.shard, fsdp.setup.shard_size) == ("zero", "fsdp", 8)
    least = min(zero.memory(1, mode).total for mode in MODES)
    assert fsdp.memory(1).total < least
    info = DistInfo(0, 0, 8, torch.device("cpu"))
    for limit, shard, why in (
        (2 * least, "zero", "--shard=zero: all fits on each rank"),
        (least - 1, "fsdp", f"--shard=fsdp: --shard=zero would take at least {plan.gb(least)} GB"),
    ):
        monkeypatch.setattr(plan, "usable_memory", lambda info, limit=limit: limit)
        args = TrainFlags()
        settle(args, config, info, 32, 8, eight)
        assert args.shard == shard and why in capsys.readouterr().out
    # What was asked for is not changed, and a refusal names what would fit
    with pytest.raises(UserError, match="--shard=fsdp: ") as e:
        settle(TrainFlags(shard="zero"), config, info, 32, 8, eight)
    assert "activation_checkpointing=block --shard=fsdp" in str(e.value)


def test_on_several_nodes_auto_shares_out_within_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    names = [
        (each.shard, each.shard_size)
        for each in plan.candidates(TrainFlags(), Setup(world_size=16))
    ]
    assert names == [("zero", 1), ("hsdp", 8)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = plan.candidates(TrainFlags(shard="fsdp"), Setup())
    assert [each.shard for each in alone] == ["none"], "one rank has nothing to share out"


# ---- choices


def test_the_micro_batch_divides_the_rows_and_fits() -> None:
    planner = Planner(SMALL["gpt"], CPU, rows=24)
    assert planner.sizes(10 * 128) == [1, 2, 3, 4, 6, 8]
    limit = planner.memory(6).total
    found = planner.largest(limit, 10 * 128, "none")
    assert found is not None and found.batch == 6
    assert planner.largest(limit - 1, 10 * 128, "none").batch == 4  # type: ignore[union-attr]
    assert planner.largest(planner.memory(1).total - 1, 10 * 128, "none") is None


def test_auto_recomputes_only_where_it_must() -> None:
    planner = Planner(SMALL["gpt"], CPU, rows=32)
    everything = planner.memory(32).total
    chosen = planner.choose(everything, 32 * 128, MODES)
    assert chosen is not None and (chosen.batch, chosen.mode) == (32, "none")
    # Where only recomputing lets a row fit, it is turned on, and not before.
    only_block = planner.memory(1, "block").total
    assert only_block < planner.memory(1, "none").total
    chosen = planner.choose(only_block, 32 * 128, MODES)
    assert chosen is not None and chosen.mode == "block"
    assert planner.choose(only_block - 1, 32 * 128, MODES) is None
    assert planner.choose(only_block, 32 * 128, ("none",)) is None


def asked(rows: Any, mode: Any = "auto") -> TrainFlags:
    return TrainFlags(device_batch_size=rows, activation_checkpointing=mode)


def test_a_cpu_takes_a_micro_batch_that_suits_its_caches(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert settle(
        asked("auto", "auto"),
        SMALL["gpt"],
        HERE,
        64,
        128,
    ) == (16, "none")  # 2,048 tokens
    assert "micro-batch: 16 row(s) of 128 tokens" in capsys.readouterr().out
    assert settle(
        asked(3, "auto"),
        SMALL["gpt"],
        HERE,
        64,
        128,
    ) == (3, "none")
    assert settle(asked(3, "mlp"), SMALL["gpt"], HERE, 64, 128) == (3, "mlp")


# ---- refusals


def test_what_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = make_config("gpt", 4, 1024, 512)
    planner = Planner(config, CPU, rows=16)
    limit = planner.memory(2).total
    monkeypatch.setattr(plan, "usable_memory", lambda info: limit)
    with pytest.raises(UserError) as e:
        settle(asked(8, "none"), config, HERE, 16, 512)
    said = str(e.value)
    assert f"takes {plan.gb(planner.memory(8).total)} GB" in said
    assert f"{plan.gb(limit)} GB can be used" in said and "optimizer state" in said
    assert "--device_batch_size=4:" not in said  # too much still
    order = ["--device_batch_size=2:", "checkpointing=mlp:", "checkpointing=block:",
             "--max_seq_len=256:", "--depth=3:"]  # fmt: skip
    places = [said.index(text) for text in order]
    assert places == sorted(places)
    line = next(line for line in said.splitlines() if "--device_batch_size=2:" in line)
    assert line.endswith(f": {plan.gb(planner.memory(2).total)} GB")
    assert (
        settle(
            asked("auto", "auto"),
            config,
            HERE,
            16,
            512,
        )[0]
        >= 2
    )
    monkeypatch.setattr(plan, "usable_memory", lambda info: 1000)
    with pytest.raises(UserError, match="nothing would fit"):
        settle(
            asked("auto", "auto"),
            config,
            HERE,
            16,
            512,
        )


def test_advice_for_a_run_that_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL["gpt"]
    planner = Planner(config, CPU, 8)
    held = planner.memory(8).total
    said = plan.memory_advice(config, CPU, 8, 8, 128, "none", held)
    assert f"--device_batch_size=4: {plan.gb(planner.memory(4).total)} GB" in said
    # What it ran with is not offered again, even if by the estimate it should have fitted
    assert "--device_batch_size=8" not in plan.memory_advice(config, CPU, 8, 8, 128, "none", 2**40)


@pytest.mark.parametrize(("depth", "memory"), [(20, 24e9), (12, 8e9)])
def test_promised_sizes_train_on_small_gpus(
    depth: int, memory: float, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = make_config("gpt", depth, 65_536, 2048)
    limit = int(memory - CUDA_RESERVE)
    planner = Planner(config, Setup(), rows=256)
    found = planner.choose(limit, plan.GPU_MICRO_BATCH_TOKENS, MODES)
    assert found is not None and found.total <= limit
    with capsys.disabled():
        print(f"\nd{depth}, {memory / 1e9:.0f} GB: {found.batch} row(s), {found.mode}")
        print(found.table())
