"""
Finetuning: own data in every stage by one flag, and what is taken over from the checkpoint.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from nanochat import finetune, flags
from nanochat.checkpoint import LOG, list_steps, load_model, read_meta, run_dir, step_dir
from nanochat.common import UserError, read_jsonl
from nanochat.dataloader import IGNORE, MicroBatch, RowReader
from nanochat.distributed import DistInfo
from nanochat.engine import Engine
from nanochat.optim import make_optimizer
from nanochat.schedule import lr_multiplier
from nanochat.step import TrainStep
from nanochat.train import Trainer
from tests.models_for_tests import tiny_model, tokens_of
from tests.tiny_world import BASE_FLAGS, MID_FLAGS, RL_FLAGS, new_world, run_stage

pytestmark = pytest.mark.usefixtures("base")

STEPS = ["--num_iterations=2", "--device_batch_size=2", "--device_type=cpu"]
CHAT_FLAGS = [*STEPS, "--total_batch_size=256", "--sample_prompts=Hello!"]
UNUSUAL = ["--embedding_lr=0.1", "--unembedding_lr=0.003", "--matrix_lr=0.015",
           "--weight_decay=0.01", "--init_lr_frac=0.5"]  # fmt: skip
# What mid and SFT make of the above: the rates are those at the peak of that run
INHERITED = (
    "--max_seq_len=64 --total_batch_size=256 --embedding_lr=0.05 --unembedding_lr=0.0015 "
    "--matrix_lr=0.0075 --weight_decay=0.01"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with data, a tokenizer, a base and a mid model of 2 steps (tag d2)."""
    with new_world(tmp_path_factory) as folder:
        run_stage("base_train", *BASE_FLAGS, "--num_iterations=2", *UNUSUAL)
        run_stage("mid_train", *MID_FLAGS, "--num_iterations=2")
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.output_stream(str(path)) as f:  # packed as the name says
        for row in rows:
            f.write((json.dumps(row) + "\n").encode())
    return str(path)


def chats(count: int, word: str = "own") -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{word} {i}?"},
                      {"role": "assistant", "content": f"Yes, {i}."}]}
        for i in range(count)
    ]  # fmt: skip


def problems(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{i}+1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(count)
    ]


def meta_of(stage: str, tag: str) -> dict[str, Any]:
    return read_meta(step_dir(stage, tag, list_steps(stage, tag)[-1]))


def test_pretraining_on_a_folder(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.jsonl"):
        write(tmp_path / name, [{"text": f"{name} says {i}. " * 5} for i in range(60)])
    tag = "--model_tag=own"
    run_stage("base_train", *BASE_FLAGS, "--num_iterations=2", tag, f"--data={tmp_path}")
    assert meta_of("base", "own")["validation"] == "c.jsonl"
    write(tmp_path / "d.jsonl", [{"text": "later"}])
    lone = ["--num_iterations=1", "--model_tag=lone", f"--data={tmp_path / 'a.jsonl.gz'}"]
    run_stage("base_train", *BASE_FLAGS, *lone, "--max_seq_len=32")
    assert meta_of("base", "lone")["validation"] == "a.jsonl.gz: 1 document in 50, by its hash"


@pytest.mark.parametrize("stage, script", [("mid", "mid_train"), ("sft", "chat_sft")])
def test_conversations_take_the_place_of_the_mixture(
    stage: str, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No hub is asked: with --data alone, nothing but own data is trained on."""
    data = write(tmp_path / "chats.jsonl.zst", chats(300))
    run_stage(script, *CHAT_FLAGS, f"--data={data}", "--source_tag=d2", "--model_tag=own")
    meta = meta_of(stage, "own")
    assert meta["mixture"] == data
    assert meta["validation"] == "chats.jsonl.zst: 1 document in 50, by its hash"
    assert meta["metrics"]["val_loss"] > 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "100.0%" in line]
    assert table[0][:4] == [data, "292", "1", "100.0%"] and len(table) == 2  # and all together
    assert table[0][4] == table[1][2] and int(table[0][4].replace(",", "")) > 4_000  # tokens
    both = ["--mixture=primer-facts@50", "--val_mixture=primer-facts@10", "--model_tag=both"]
    run_stage(script, *CHAT_FLAGS, f"--data={data}", "--source_tag=d2", *both)
    meta = meta_of(stage, "both")
    assert meta["mixture"] == f"primer-facts@50 | {data}"
    assert meta["validation"].startswith("primer-facts@10 | chats.jsonl.zst: 1 document in 50")


def test_problems_for_rl(tmp_path: Path) -> None:
    data = write(tmp_path / "problems.jsonl", problems(200))
    rl = [*RL_FLAGS, "--num_iterations=1", "--source_tag=d2"]
    run_stage("chat_rl", *rl, f"--data={data}", "--model_tag=own")
    meta = meta_of("rl", "own")
    assert meta["validation"] == "problems.jsonl: 1 document in 50, by its hash"
    assert meta["metrics"]["problems"] <= 4  # of those held out
    run_stage("chat_rl", *rl, f"--task={data}", "--model_tag=task")  # the same, as a task
    assert meta_of("rl", "task")["validation"] == meta["validation"]
    few = write(tmp_path / "few.jsonl", problems(3)[1:])  # none to hold out: no evaluation
    run_stage("chat_rl", *rl, f"--data={few}", "--model_tag=few")
    assert "pass1" not in meta_of("rl", "few")["metrics"]


@pytest.mark.parametrize("script, argv", [("mid_train", CHAT_FLAGS), ("chat_rl", RL_FLAGS)])
def test_validation_of_nothing_is_refused(script: str, argv: list[str]) -> None:
    with pytest.raises(UserError, match="--val_data=x belongs to --data"):
        run_stage(script, *argv, "--val_data=x", "--preview")


def test_a_bad_row_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    data = write(tmp_path / "bad.jsonl", [*chats(3), {"text": "no conversation"}])
    with pytest.raises(UserError, match=r"bad\.jsonl:4: expected a Custom row, found columns text"):
        run_stage("mid_train", *CHAT_FLAGS, f"--data={data}", "--model_tag=bad")
    assert list_steps("mid", "bad") == []


def test_every_stage_has_a_preview_that_needs_no_gpu(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where flags ask for one; and the preview of pretraining needs no model either."""
    data = write(tmp_path / "chats.jsonl", chats(300))
    answers = write(tmp_path / "problems.jsonl", problems(200))
    mid = [*MID_FLAGS, "--source_tag=d2"]
    stages = [
        ("tok_train", ["--preview"], ["documents of", "cropped to --doc_cap"]),
        ("base_train", [*BASE_FLAGS, "--depth=99"], ["validation: shard_00004", "dropped", "⟦"]),
        ("mid_train", mid, ["primer-facts", "share", "trained on", "dropped", "⟦", INHERITED]),
        ("chat_sft", [*CHAT_FLAGS, f"--data={data}"], ["100.0%", "by its hash", "Yes, ", "⟦"]),
        ("chat_rl", [*RL_FLAGS, f"--data={answers}"], ["held out", "#### ", "⟦"]),
    ]
    before = sorted(base.glob("*_checkpoints/*/*")), (base / "tokenizer").stat().st_mtime_ns
    for name, argv, expected in stages:
        gpu = [] if name == "tok_train" or torch.cuda.is_available() else ["--device_type=cuda"]
        run_stage(name, *argv, *gpu, "--preview")
        out = capsys.readouterr().out
        assert [text for text in expected if text not in out] == [], name
    after = sorted(base.glob("*_checkpoints/*/*")), (base / "tokenizer").stat().st_mtime_ns
    assert after == before


# ---- what is taken over from the checkpoint


def log_of(stage: str, tag: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(run_dir(stage, tag) / LOG)]


def inherited(stage: str, tag: str) -> str:
    """The flags that are taken over, as a checkpoint has them and as inherit() prints them."""
    args = meta_of(stage, tag)["args"]
    assert log_of(stage, tag)[0]["args"] == args
    names = [name for name in flags.InheritedFlags.__annotations__ if name != "load_optimizer"]
    return " ".join(f"--{name}={args[name]:g}" for name in names)


def test_mid_and_sft_go_on_as_the_base_model_was_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From base through mid to SFT: batch, rates, decay, and the optimizer with its steps."""
    assert inherited("mid", "d2") == INHERITED
    mid = meta_of("mid", "d2")
    assert mid["optimizer_steps"] == 4 and mid["optimizer_from"] == mid["started_from"]
    sft = [*MID_FLAGS, "--num_iterations=3", "--source_tag=d2", "--eval_every=-1"]
    run_stage("chat_sft", *sft, "--model_tag=through")
    said = capsys.readouterr().out
    assert f"as the model was trained: {INHERITED}\n" in said
    assert "optimizer: warm start, with the state after 4 steps\n" in said
    assert inherited("sft", "through") == INHERITED
    assert meta_of("sft", "through")["optimizer_steps"] == 4 + 3
    run_stage("chat_sft", *sft, "--model_tag=cold", "--load_optimizer=0", "--matrix_lr=0")
    said = capsys.readouterr().out
    assert "optimizer: cold start (--load_optimizer=0)\n" in said and "--matrix_lr" not in said
    meta = meta_of("sft", "cold")
    assert (meta["optimizer_steps"], meta["optimizer_from"]) == (3, None)
    assert meta["args"]["matrix_lr"] == 0 and meta["args"]["embedding_lr"] == 0.05  # typed, and not


def test_rl_has_its_own() -> None:
    """Neither rates nor decay nor optimizer of what it starts from; and SFT takes none of its."""
    rl = [*RL_FLAGS, "--num_iterations=2", "--eval_examples=2", "--source_tag=d2"]
    run_stage("chat_rl", *rl, "--model_tag=own-rates", "--matrix_lr=0.03")
    meta = meta_of("rl", "own-rates")
    rates = [meta["args"][name] for name in ("embedding_lr", "unembedding_lr", "weight_decay")]
    assert rates == [0.2, 0.004, 0.0] and meta["args"]["matrix_lr"] == 0.03
    assert meta["optimizer_steps"] <= 2  # those with something to learn from, of its own alone
    after = [*MID_FLAGS, "--num_iterations=1", "--source=rl", "--source_tag=own-rates"]
    run_stage("chat_sft", *after, "--model_tag=after-rl", "--total_batch_size=128")
    meta = meta_of("sft", "after-rl")
    assert (meta["optimizer_steps"], meta["optimizer_from"]) == (1, None)


def test_the_rate_falls_as_the_schedule_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Of mid and SFT: it never rises, where it begins and ends is what the flags say."""
    for stage, script in (("mid", "mid_train"), ("sft", "chat_sft")):
        argv = [*MID_FLAGS, "--num_iterations=5", "--source_tag=d2", "--eval_every=-1"]
        run_stage(script, *argv, "--model_tag=falls", "--final_lr_frac=0.1")
        seen = [row["lr_mul"] for row in log_of(stage, "falls") if row["event"] == "step"]
        ratio = meta_of(stage, "falls")["args"]["warmdown_ratio"]
        assert seen == [lr_multiplier(k, 5, 0, ratio, 0.1) for k in range(5)]
        assert seen[0] == 1.0 and all(a >= b for a, b in itertools.pairwise(seen))
        assert 0.1 < seen[-1] < 1.0


def test_accumulation_is_weighted_by_trained_tokens() -> None:
    """Rows have different shares of trained tokens: a mean of micro-batches' means would differ."""
    for size in (1, 4):
        argv = [*MID_FLAGS, f"--device_batch_size={size}", f"--model_tag=accumulate{size}"]
        run_stage("mid_train", *argv, "--source_tag=d2", "--eval_every=2")
    rows = [
        [(row.get("loss"), row.get("val_loss"), row.get("grad_norm"))
         for row in log_of("mid", f"accumulate{size}") if row["event"] in ("step", "eval")]
        for size in (1, 4)
    ]  # fmt: skip
    for one, other in zip(*rows, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a is b is None or a == pytest.approx(b, rel=1e-3)


def test_short_rows_lose_conversations_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where many questions fill a whole row by themselves: those are dropped, no loss is NaN, and
    the epoch ends."""
    long = [
        {"messages": [{"role": "user", "content": f"word {i} " * 30}, *chat["messages"][1:]]}
        for i, chat in enumerate(chats(60))
    ]
    data = write(tmp_path / "long.jsonl", [*chats(60), *long])
    short = ["--max_seq_len=24", "--total_batch_size=48", "--num_iterations=-1", "--eval_every=5"]
    run_stage("mid_train", *CHAT_FLAGS, *short, f"--data={data}", "--model_tag=short")
    assert re.search(r"(5\d|60) dropped; those dropped have nothing", capsys.readouterr().out)
    rows = log_of("mid", "short")
    losses = [row.get("loss", row.get("val_loss")) for row in rows if row["event"] != "start"]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) > 10 and all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_a_step_without_a_trained_token_changes_nothing() -> None:
    """0/0 is no loss; and nothing decays, nor does the optimizer count the step."""
    model = tiny_model("gpt")
    optimizer = make_optimizer(model, 0.1, 0.1, 0.1, weight_decay=0.1)
    cpu = torch.device("cpu")
    meta = {"tokenizer": None, "tokenizer_fingerprint": "", "data": {}}
    info = DistInfo(0, 0, 1, cpu)
    step = TrainStep(flags.TrainFlags(), info, model, optimizer)
    trainer = Trainer("mid", "none", step, 2, meta)

    def loss_of(batches: list[MicroBatch]) -> float:
        trainer.step(batches, 1.0)
        trainer.flush()
        return log_of("mid", "none")[-1]["loss"]

    before = {name: p.clone() for name, p in model.named_parameters()}
    idx = tokens_of(model, 2, 8)
    assert loss_of([MicroBatch(idx, torch.full_like(idx, IGNORE))] * 2) == 0.0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert optimizer.num_steps == 0 and trainer.state.step == 1
    # Beside such a micro-batch, another counts as if it were alone
    alone = model(idx, idx).item()
    batches = [MicroBatch(idx, torch.full_like(idx, IGNORE)), MicroBatch(idx, idx)]
    assert loss_of(batches) == pytest.approx(alone)
    assert optimizer.num_steps == 1


def test_validation_is_read_in_once_and_is_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that stands still has the same loss at every evaluation, to the bit."""
    readers: list[RowReader] = []

    class Counted(RowReader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            readers.append(self)

    monkeypatch.setattr(finetune, "RowReader", Counted)
    still = ["--embedding_lr=0", "--unembedding_lr=0", "--matrix_lr=0", "--model_tag=still"]
    argv = [*MID_FLAGS, "--num_iterations=3", "--source_tag=d2", "--eval_every=1"]
    run_stage("mid_train", *argv, *still)
    values = [row["val_loss"] for row in log_of("mid", "still") if row["event"] == "eval"]
    assert len(values) == 4 and len(set(values)) == 1 and values[0] > 0
    assert len(readers) == 2  # of training and of validation


def test_few_steps_are_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "chats.jsonl", chats(60))
    own = [*CHAT_FLAGS, "--num_iterations=-1", f"--data={data}", "--model_tag=few"]
    run_stage("chat_sft", *own, "--total_batch_size=512")
    said = capsys.readouterr().err
    assert re.search(r"--num_epochs=1 is over in \d steps of --total_batch_size=512 tokens", said)


# ---- how large a step, where nobody says


def settings(**typed: Any) -> finetune.ConversationFlags:
    """Flags after inherit(), from a model of 2,048-token rows and the usual batch."""
    inherited = {"max_seq_len": 2048, "total_batch_size": 2**19, "embedding_lr": 0.3,
                 "unembedding_lr": 0.008, "matrix_lr": 0.02, "weight_decay": 0.28}  # fmt: skip
    return finetune.ConversationFlags(**{**inherited, **typed})


def fitted(
    num_rows: int, args: finetune.ConversationFlags, world: int = 1, typed: str = ""
) -> tuple[int, float, int]:
    """(rows in a step, share of the matrix rate, steps) that fit_batch makes of it."""
    names = [name for name in flags.InheritedFlags.__annotations__ if name not in typed.split()]
    finetune.fit_batch(args, names, num_rows, world)
    assert args.weight_decay == 0.28
    rows = args.total_batch_size // args.max_seq_len
    return rows, args.matrix_lr / 0.02, finetune.num_steps_of(args, num_rows)


def test_a_step_is_small_enough_for_a_hundred(capsys: pytest.CaptureFixture[str]) -> None:
    """SFT's own mixture, some 10M tokens in 5,000 rows: of 256 rows that were 20 steps."""
    assert fitted(5_000, settings()) == (32, pytest.approx(math.sqrt(32 / 256)), 156)
    said = capsys.readouterr().out
    assert "--total_batch_size=65536 --embedding_lr=0.106066 " in said and "256" in said
    assert fitted(5_000, settings(num_epochs=2.0))[::2] == (64, 156)
    assert fitted(25_599, settings())[0] == 128 and fitted(25_600, settings()) == (256, 1.0, 100)
    assert fitted(200_000, settings()) == (256, 1.0, 781)  # mid has enough
    assert fitted(7, settings())[::2] == (1, 7)
    # The same on 8 ranks; where they are more than rows, one for each
    assert fitted(5_000, settings(), world=8)[0] == 32 and fitted(300, settings(), world=8)[0] == 8
    assert fitted(5_000, settings(device_batch_size=3), world=4)[0] == 36


def test_what_was_typed_is_not_made_smaller() -> None:
    assert fitted(5_000, settings(), typed="total_batch_size") == (256, 1.0, 20)
    assert fitted(5_000, settings(num_iterations=9)) == (256, 1.0, 9)
    rows, rate, _ = fitted(5_000, settings(), typed="matrix_lr")
    assert (rows, rate) == (32, 1.0)


def test_a_run_over_few_rows_takes_small_steps(tmp_path: Path) -> None:
    data = write(tmp_path / "chats.jsonl", chats(300))
    own = ["--num_iterations=-1", "--device_batch_size=auto", "--device_type=cpu"]
    run_stage("chat_sft", *own, f"--data={data}", "--source_tag=d2", "--model_tag=small")
    meta = meta_of("sft", "small")
    assert meta["args"]["total_batch_size"] == 64 and 50 < meta["step"] < 100
    assert meta["args"]["matrix_lr"] == pytest.approx(0.0075 / 2)  # a quarter of the batch
    assert meta["state"]["tokens"] == 64 * meta["step"]


# ---- what one sees while it trains


def test_tasks_are_answered_at_intervals_and_change_nothing() -> None:
    argv = [*MID_FLAGS, "--source_tag=d2", "--eval_every=-1"]
    tasks = ["--chat_eval_tasks=primer-facts | primer-choice", "--chat_eval_every=2",
             "--chat_eval_problems=3", "--chat_eval_max_new_tokens=4"]  # fmt: skip
    run_stage("mid_train", *argv, *tasks, "--model_tag=asked")
    run_stage("mid_train", *argv, "--model_tag=unasked")
    rows = [row for row in log_of("mid", "asked") if "primer-facts" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for row in rows:
        for name in ("primer-facts", "primer-choice"):
            p, n = row[name], row[f"{name}_problems"]
            assert row["event"] == "eval" and n == 3 and 0 <= p <= 1
            assert row[f"{name}_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / n))
    metrics = meta_of("mid", "asked")["metrics"]
    assert metrics["primer-facts"] == rows[-1]["primer-facts"] and "val_loss" in metrics
    assert not [row for row in log_of("mid", "unasked") if "primer-facts" in row]
    one, other = ([row["loss"] for row in log_of("mid", tag) if row["event"] == "step"]
                  for tag in ("asked", "unasked"))  # fmt: skip
    assert len(one) == 6 and one == other
    never = [*argv, *tasks, "--chat_eval_every=-1", "--model_tag=never"]
    run_stage("mid_train", *never)
    assert not [row for row in log_of("mid", "never") if "primer-facts" in row]


def test_a_task_without_answers_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task 'primer-fact'"):
        run_stage("mid_train", *MID_FLAGS, "--chat_eval_tasks=primer-fact", "--model_tag=no")
    silent = write(tmp_path / "chats.jsonl", chats(9))
    with pytest.raises(UserError, match='have no "expected"'):
        run_stage("mid_train", *MID_FLAGS, f"--chat_eval_tasks={silent}", "--model_tag=no")
    assert list_steps("mid", "no") == []


@pytest.mark.parametrize(
    ("script", "typed", "expected"),
    [
        ("mid_train", {}, "mmlu | gsm8k"),
        ("chat_sft", {}, "arc-easy | mmlu | gsm8k"),
        ("mid_train", {"mixture": "smoltalk"}, ""),
        ("chat_sft", {"data": "own.jsonl"}, ""),
        ("chat_sft", {"data": "own.jsonl", "chat_eval_tasks": "mmlu"}, "mmlu"),
    ],
)
def test_own_data_is_not_measured_by_other_tasks_unasked(
    script: str, typed: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So speedrun.sh, which names its mixture on a CPU, answers nothing while it trains."""
    seen: list[Any] = []
    monkeypatch.setattr(finetune, "start_from", lambda *args: None)
    monkeypatch.setattr(finetune, "_train", lambda args, *rest: seen.append(args))
    run_stage(script, "--device_type=cpu", *(f"--{k}={v}" for k, v in typed.items()))
    assert seen[0].chat_eval_tasks == expected


def test_samples_are_shown_at_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    """Each prompt as a conversation, and the likeliest reply of the model as it is then."""
    argv = [*MID_FLAGS, "--source_tag=d2", "--eval_every=-1", "--sample_every=2", "--keep_last=-1"]
    argv += ["--save_every=2", "--sample_prompts=Hello!|What is 2 + 2?", "--model_tag=samples"]
    run_stage("mid_train", *argv)
    begun, *log = log_of("mid", "samples")
    assert sum(row["tokens"] for row in begun["shares"]) > 0  # what the report says of the data
    shown = [row for row in log if row["event"] == "sample"]
    assert [row["step"] for row in shown] == [0, 0, 2, 2, 4, 4, 6, 6]
    out = capsys.readouterr().out
    for at, row in enumerate(shown):
        prompt = ("Hello!", "What is 2 + 2?")[at % 2]
        here = ("mid", "cpu", "samples", row["step"]) if row["step"] else ("base", "cpu", "d2")
        model, tokenizer, _ = load_model(*here)
        ids = tokenizer.render_for_completion({"messages": [{"role": "user", "content": prompt}]})
        assert row["text"].startswith(f"<|bos|><|user_start|>{prompt}<|user_end|>")
        greedy = Engine(model, tokenizer).generate_batch(ids, max_tokens=64, temperature=0)[0][0]
        assert row["text"] == tokenizer.decode(greedy) and row["text"] in out


def test_without_a_question_nothing_is_asked() -> None:
    """The end of a run, at which samples are due whatever the interval, comes to its checkpoint."""
    argv = [*MID_FLAGS, "--num_iterations=2", "--source_tag=d2", "--sample_every=-1"]
    run_stage("mid_train", *argv, "--sample_prompts=", "--model_tag=silent")
    assert list_steps("mid", "silent") == [2]
    assert not [row for row in log_of("mid", "silent") if row["event"] == "sample"]


def test_the_state_that_is_taken_over_shows_in_the_losses() -> None:
    """So test_ranks.py, which compares them, sees that each rank takes over its part."""
    argv = [*MID_FLAGS, "--source_tag=d2", "--device_batch_size=1", "--eval_every=-1"]
    losses = {}
    for flag in ("--load_optimizer=1", "--load_optimizer=0"):
        run_stage("mid_train", *argv, flag, "--model_tag=state")
        losses[flag] = [row["loss"] for row in log_of("mid", "state") if row["event"] == "step"]
    warm, cold = losses.values()
    assert len(warm) == 6 and cold != pytest.approx(warm, rel=1e-3)
