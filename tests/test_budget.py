"""The plan of a run against the run: what it prints and logs, what lies on the disk afterwards."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import budget, flags, plan
from nanochat.budget import SHARDS, Budget, checkpoints_kept, share_of_peak
from nanochat.checkpoint import LOG, run_dir, step_dir
from nanochat.cluster import GPUS, find_gpu
from nanochat.common import UserError, write_json
from nanochat.distributed import DistInfo
from nanochat.flags import HorizonFlags
from nanochat.plan import CUDA_RESERVE, Setup, settle
from scripts import plan as script
from scripts.plan import Args, budget_of, main
from tests.tiny_world import BASE_FLAGS, make_world, run_stage


def planned(*argv: str, word: str = "", nodes: int = 1) -> Budget:
    return budget_of(flags.parse(Args, list(argv)), word, nodes)


# ---- the run itself


@pytest.mark.slow
def test_a_run_prints_and_logs_what_was_planned(
    own_base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_world(own_base_dir)
    ours = ("--num_iterations", "--total_batch_size", "--device_batch_size")
    words = [w for w in BASE_FLAGS if not w.startswith(ours)]
    words += ["--target_tokens=2000", "--model_tag=t"]
    run_stage("base_train", *words)
    said = capsys.readouterr().out
    rows = (run_dir("base", "t") / LOG).read_text(encoding="utf-8").splitlines()
    start = next(row for row in map(json.loads, rows) if row["event"] == "start")
    last = [row for row in map(json.loads, rows) if row["event"] == "step"][-1]

    scripted = [w for w in words if "core_metric" not in w and "sample_prompts" not in w]
    main(flags.parse(Args, [*scripted, "--gpus=1", "--json"]))
    (found,) = json.loads(capsys.readouterr().out)
    for name in ("num_params", "params", "flops_per_token", "num_steps"):
        assert found[name] == start[name], name
    assert found["total_batch_size"] == start["args"]["total_batch_size"]
    assert found["config"] == start["model"]
    assert (found["num_steps"], found["tokens"]) == (last["step"], last["tokens"])
    b = planned(*scripted, "--gpus=1")
    assert b.run.chosen in said and f"{b.run.num_params:,} parameters, {b.run.num_steps}" in said
    # And what it leaves behind: tensors, and some kilobytes of names and shapes
    folder = step_dir("base", "t", last["step"])
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert 0 <= size - b.disk["checkpoints"] < 20_000 < b.disk["checkpoints"] / 10


@pytest.mark.parametrize("words", [
    ["--depth=6"], ["--depth=4", "--arch=qwen2.5", "--activation_checkpointing=block"],
    ["--depth=4", "--device_batch_size=4", "--arch=turbo"],
])  # fmt: skip
def test_memory_is_what_base_train_settles_for(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    own_base_dir: Path,
) -> None:  # fmt: skip
    """The table, the micro-batch and the mode, as on a rank of 8 H100."""
    b = planned(*words)
    memory = b.chosen_memory
    assert memory is not None
    limit = int(80e9) - CUDA_RESERVE
    monkeypatch.setattr(plan, "usable_memory", lambda info: limit)
    info = DistInfo(0, 0, 8, torch.device("cpu"))
    args = flags.parse(Args, words)
    rows = b.run.tokens_per_step // 2048
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    chosen = settle(args, b.run.config, info, rows, 2048, Setup("cuda", True, True, 8))
    assert args.shard == b.shard
    assert chosen == (memory.batch, memory.mode)
    assert memory.table() in capsys.readouterr().out
    assert memory.total <= limit


def test_7b_trains_on_8_gpus_of_80_gb_and_says_in_which_mode(own_base_dir: Path) -> None:
    args = ("--size=7b", "--device_batch_size=1", "--activation_checkpointing=block")
    b = planned(*args)
    assert list(b.memory) == ["zero", "fsdp", "none"]  # as auto tries them, then the rest
    assert b.memory["zero"] is b.memory["none"] is None and b.shard == "fsdp"
    assert b.chosen_memory is not None and b.chosen_memory.total < 80e9
    assert b.step is not None and b.sent > 3 * 4 * b.run.num_params


# ---- data


@pytest.mark.parametrize(("word", "params", "tokens", "shards"), [
    ("--depth=12", 186e6, 3.7e9, 72), ("--depth=20", 561e6, 11.2e9, 216),
    ("--depth=26", 1.08e9, 21.6e9, 416), ("--size=1.5b", 1.54e9, 31e9, 593),
    ("--size=7b", 7.62e9, 152e9, 2925),
])  # fmt: skip
def test_the_table_of_sizes(
    word: str, params: float, tokens: float, shards: int, monkeypatch: pytest.MonkeyPatch,
    own_base_dir: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(budget, "memory_of", lambda *args: None)  # seconds
    b = planned(word=word)
    assert b.run.num_params == pytest.approx(params, rel=0.005)
    assert b.run.tokens == pytest.approx(tokens, rel=0.01)
    assert b.characters == pytest.approx(4.8 * b.run.tokens)
    assert b.shards == shards
    assert bool(b.warning) == (shards > SHARDS) == (word == "--size=7b")
    if b.warning:
        assert "2,925" in b.warning and "1,822" in b.warning
        enough = b.warning.split("--target_param_data_ratio=")[1].split()[0]
        again = planned(f"--target_param_data_ratio={enough}", word=word)
        assert 0.99 * SHARDS < again.shards <= 1.01 * SHARDS


def test_checkpoints_that_lie_on_the_disk_at_once() -> None:
    def kept(every: int, keep: int) -> int:
        return checkpoints_kept(HorizonFlags(save_every=every, keep_last=keep), 100)

    assert [kept(-1, 2), kept(10, 2), kept(10, -1), kept(60, 2), kept(1, 1)] == [1, 3, 10, 2, 2]


# ---- time and money


def test_share_of_the_peak_is_typed_or_measured_or_assumed(tmp_path: Path) -> None:
    row: dict[str, Any] = {"name": "gpt-d12", "num_params": 186e6, "peak_flops": 989e12}
    table = [row | {"mfu": 0.5}, row | {"name": "big", "num_params": 1.5e9, "mfu": 0.6},
             row | {"mfu": None}, row | {"peak_flops": 312e12, "mfu": 0.1}]  # fmt: skip
    write_json(tmp_path / "s.json", {"machine": {"gpus": ["NVIDIA H100"]}, "table": table})
    speeds = tmp_path / "s.json"
    assert share_of_peak("H100", 200_000_000, -1, speeds).value == 0.5
    found = share_of_peak("H100", 900_000_000, -1, speeds)
    assert found.value == 0.6 and "big" in found.source and "measured" in found.source
    assert share_of_peak("H100", 1, 0.3, speeds).value == 0.3
    for gpu, path in (("B200", speeds), ("H100", tmp_path / "none.json")):
        found = share_of_peak(gpu, 1, -1, path)
        assert found.value == budget.ASSUMED_SHARE and "assumption" in found.source


def test_hours_and_dollars_follow_from_the_step(own_base_dir: Path) -> None:
    b = planned("--depth=4", "--price=2", "--mfu=0.5", "--gpus=2", "--shard=zero")
    assert b.step is not None and b.hours is not None and b.mfu is not None
    assert b.hours == pytest.approx(b.run.num_steps * b.step.total / 3600)
    assert b.dollars == pytest.approx(b.hours * 2 * 2)
    assert b.mfu == pytest.approx(b.run.flops / (b.hours * 3600 * 2 * 989e12))
    assert b.mfu < 0.5 == b.share.value
    slower = replace(b, cluster=replace(b.cluster, network=1e9))
    assert slower.hours == b.hours  # one node does not use it


# ---- the command


def test_a_plain_plan_has_everything_on_whole_lines(
    capsys: pytest.CaptureFixture[str], own_base_dir: Path
) -> None:
    main(flags.parse(Args, ["--depth=4", "--gpus=1", "--gpu=rtx4090"]))
    said = capsys.readouterr().out
    assert "\x1b" not in said and "…" not in said
    for word in ("parameters: matrix", "FLOPs a token", "shards to download", "disk, GB",
                 "micro-batch", "hours", "dollars", "--total_batch_size=", "assumption",
                 "$3 for a GPU"):  # fmt: skip
        assert word in said, word


def test_a_step_at_scale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_base_dir: Path
) -> None:
    """A row for each number of GPUs; more GPUs take less time, in larger part to send."""
    monkeypatch.setattr(script, "SCALED", ("--depth=2",))
    main(flags.parse(Args, ["--scale", "--device_batch_size=1", "--json"]))
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["gpus"]) for row in rows] == [("d2", gpus) for gpus in (8, 64, 512)]
    for few, more in itertools.pairwise(rows):
        assert more["step_seconds"]["passes"] < few["step_seconds"]["passes"]
        assert more["mfu"] < few["mfu"] < few["share_of_peak"]["value"]
    main(flags.parse(Args, ["--scale", "--device_batch_size=1"]))
    said = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:1] == ["d2"] for line in said) == 3


def test_a_tokenizer_that_is_there_counts(
    own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "memory_of", lambda *args: None)  # seconds
    assert budget.vocabulary(None)[0] == 65_536
    make_world(own_base_dir)
    assert planned("--depth=2").run.config.vocab_size == 500
    assert planned("--depth=2", "--vocab_size=777").run.config.vocab_size == 777
    assert planned(word="--depth=2").run.config.vocab_size == 65_536
    assert planned("--size=0.5b", "--device_batch_size=1").run.config.vocab_size == 151_936


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"--gpu=h1000.*choose one of .*h100"):
        planned("--depth=4", "--gpu=h1000")
    with pytest.raises(UserError, match="--gpus=0"):
        main(flags.parse(Args, ["--gpus=0"]))


def test_every_gpu_has_a_peak_and_is_found() -> None:
    for name, gpu in GPUS.items():
        assert find_gpu(gpu.name) is find_gpu(name) is gpu
        assert 1e13 < gpu.peak < 1e16 and gpu.memory >= 24e9 and gpu.hbm > gpu.link
