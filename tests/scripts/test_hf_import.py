"""hf_import as one runs it, and every stage going on from what it made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from nanochat import flags
from nanochat.checkpoint import load_model, read_meta, step_dir
from nanochat.common import UserError, get_base_dir
from nanochat.engine import Engine
from nanochat.models import ARCHITECTURES
from nanochat.primer.write import write_primer
from nanochat.serve.api import create_app
from nanochat.serve.limits import Limits
from scripts import chat_cli
from tests.hf_for_tests import config_of, save_hf, tokenizer_of
from tests.tiny_world import MID_FLAGS, RL_FLAGS, run_stage

pytestmark = pytest.mark.usefixtures("base")

ONE = ["--num_iterations=1", "--device_batch_size=2", "--device_type=cpu", "--eval_tokens=128"]
BASE = [*ONE, "--max_seq_len=64", "--total_batch_size=256", "--core_metric_every=-1"]
CHAT = [*MID_FLAGS, *ONE, "--total_batch_size=256"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with data and no tokenizer, and what is to be imported in theirs/."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        write_primer(folder, seed=1, scale=0.01)
        ends = dict.fromkeys(ARCHITECTURES, "<|assistant_end|>") | {"qwen2.5": "<|im_end|>"}
        for arch, end in ends.items():
            save_hf(folder / "theirs" / arch, arch, "bfloat16", "30KB", end, sequence_len=128)
            run_stage("hf_import", f"--from={folder}/theirs/{arch}", "--stage=base")
            run_stage("hf_import", f"--from={folder}/theirs/{arch}", f"--model_tag={arch}-chat")
    return folder


def meta_of(stage: str, tag: str, step: int = 1) -> dict[str, Any]:
    return read_meta(step_dir(stage, tag, step))


@pytest.mark.parametrize("arch", ["qwen2.5", "turbo", "gpt"])
def test_every_training_stage_goes_on_from_it(
    arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step each, from the tag alone: shape, tokenizer and row length are the import's."""
    run_stage("base_train", *BASE, f"--source_tag={arch}")
    capsys.readouterr()
    run_stage("base_train", *BASE, f"--source_tag={arch}", "--resume")  # the same run, by its tag
    assert "this run has ended already" in capsys.readouterr().out
    run_stage("mid_train", *CHAT, f"--source_tag={arch}")
    run_stage("chat_sft", *CHAT, "--source=mid", f"--source_tag={arch}")
    rl = [*RL_FLAGS, "--num_iterations=1", "--eval_examples=2", "--source=sft"]
    run_stage("chat_rl", *rl, f"--source_tag={arch}-chat")
    started = {
        ("base", f"{arch}-cpt"): f"base {arch} step_000000",
        ("mid", arch): f"base {arch} step_000000",
        ("sft", arch): f"mid {arch} step_000001",
        ("rl", f"{arch}-chat"): f"sft {arch}-chat step_000000",
    }
    for (stage, tag), start in started.items():
        meta = meta_of(stage, tag)
        assert meta["started_from"].startswith(start)
        model, tokenizer, _ = load_model(stage, "cpu", tag)
        length = 64 if stage == "base" else 128
        assert model.config == config_of(arch, sequence_len=length)
        assert tokenizer.fingerprint == tokenizer_of(arch).fingerprint
        # Kept under the tag, except that qwen2.5 is the name of Qwen's own
        name = f"{arch}-chat" if stage == "rl" else arch
        assert (meta["tokenizer"] == name) != (name == "qwen2.5")
    before = load_model("base", "cpu", arch)[0].state_dict()
    after = load_model("base", "cpu", f"{arch}-cpt")[0].state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_first_step_learns_at_the_rate_it_is_told() -> None:
    """At rate 0 a stage hands the import on as it was: its weights and nothing else are taken."""
    still = ["--embedding_lr=0", "--unembedding_lr=0", "--matrix_lr=0", "--model_tag=still"]
    run_stage("base_train", *BASE, "--source_tag=qwen2.5", *still)
    before = load_model("base", "cpu", "qwen2.5")[0].state_dict()
    after = load_model("base", "cpu", "still")[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def rates_of(stage: str, tag: str, step: int = 1) -> list[float]:
    args = meta_of(stage, tag, step)["args"]
    return [args[name] for name in ("embedding_lr", "unembedding_lr", "matrix_lr")]


def test_own_conversations_from_the_tag_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mid and SFT on an import: a cold optimizer, rates at a tenth; then SFT goes on from that."""
    chats = [
        {"messages": [{"role": "user", "content": f"What is {i}?"},
                      {"role": "assistant", "content": f"A number, {i}."}]} for i in range(200)
    ]  # fmt: skip
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    own = [*ONE, f"--data={data}", "--sample_prompts=Hello!", "--device_batch_size=1"]
    tenth = pytest.approx([0.02, 0.0004, 0.002])
    for stage, script in (("mid", "mid_train"), ("sft", "chat_sft")):
        argv = ["--source=base", "--source_tag=qwen2.5", "--model_tag=own"]
        run_stage(script, *own, *argv, "--total_batch_size=128")
        said = capsys.readouterr().out
        assert "step_000000 was imported, without one)" in said
        assert "does not say, so by default: --embedding_lr=0.02 --unembedding_lr=0.0004 " in said
        assert rates_of(stage, "own") == tenth
        meta = meta_of(stage, "own")
        assert meta["mixture"] == str(data) and meta["metrics"]["val_loss"] > 0
        assert (meta["optimizer_steps"], meta["optimizer_from"]) == (1, None)
    argv = ["--source=mid", "--source_tag=own", "--model_tag=own-2"]
    run_stage("chat_sft", *own, *argv)
    said = capsys.readouterr().out
    assert "optimizer: warm start, with the state after 1 steps" in said
    assert rates_of("sft", "own-2") == tenth and meta_of("sft", "own-2")["optimizer_steps"] == 2
    assert meta_of("sft", "own-2")["args"]["total_batch_size"] == 128


def test_continued_pretraining_of_an_import_learns_at_a_tenth() -> None:
    """And what comes after takes that for its peak; of a model of ours, it is all of the rate."""
    for tag, typed, frac in (("tenth", [], 0.1), ("typed", ["--init_lr_frac=0.3"], 0.3)):
        run_stage("base_train", *BASE, "--source_tag=gpt", f"--model_tag={tag}", *typed)
        assert meta_of("base", tag)["args"]["init_lr_frac"] == frac
    run_stage("mid_train", *CHAT, "--source_tag=tenth")
    peak = meta_of("base", "tenth")["args"]
    assert rates_of("mid", "tenth") == pytest.approx(
        [0.1 * peak[name] for name in ("embedding_lr", "unembedding_lr", "matrix_lr")]
    )
    assert meta_of("mid", "tenth")["optimizer_steps"] == 2  # and the optimizer is there again
    run_stage("base_train", *BASE, "--source_tag=tenth", "--model_tag=ours")
    assert meta_of("base", "ours")["args"]["init_lr_frac"] == 1.0


def test_pretraining_goes_on_with_another_tokenizer(base: Path) -> None:
    """The tag is still enough for the shape; the rows are the new tokenizer's."""
    argv = ["--source_tag=qwen2.5", f"--tokenizer={base}/theirs/gpt", "--model_tag=retrained"]
    with pytest.raises(UserError, match="say --retrain_embeddings"):
        run_stage("base_train", *BASE, *argv)
    run_stage("base_train", *BASE, *argv, "--retrain_embeddings")
    model, tokenizer, _ = load_model("base", "cpu", "retrained")
    assert model.config == config_of("qwen2.5", sequence_len=64, vocab_size=400)
    assert tokenizer.fingerprint == tokenizer_of("gpt").fingerprint


@pytest.mark.parametrize("arch", ["qwen2.5", "turbo", "gpt"])
def test_it_is_evaluated_and_talks(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    tag = f"--model_tag={arch}-chat"
    argv = ["--device_type=cpu", "-a", "primer-math|primer-facts", "-x", "2", "-m", "8"]
    run_stage("chat_eval", *argv, tag)
    rows = (get_base_dir() / "report" / "chat_eval.jsonl").read_text(encoding="utf-8")
    last = json.loads(rows.splitlines()[-1])
    assert (last["model_tag"], last["step"]) == (f"{arch}-chat", 0)
    capsys.readouterr()
    run_stage("chat_cli", "--device_type=cpu", tag, "--prompt=Hello!", "--max_new_tokens=8")
    assert capsys.readouterr().out
    model, tokenizer, _ = load_model("sft", "cpu", f"{arch}-chat")  # as scripts.chat_web does
    limits = Limits(max_context=model.config.sequence_len, max_new_tokens=8, temperature=0.0)
    with TestClient(create_app([Engine(model, tokenizer)], tokenizer, "it", limits)) as client:
        asked = {"messages": [{"role": "user", "content": "Hello!"}]}
        reply = client.post("/v1/chat/completions", json=asked).json()
    assert reply["model"] == "it" and reply["usage"]["completion_tokens"] > 0


def test_an_import_is_no_run_to_resume_and_not_written_over() -> None:
    argv = [*BASE, "--source_tag=gpt", "--model_tag=gpt"]
    with pytest.raises(UserError, match="Give another --model_tag"):
        run_stage("base_train", *argv)
    with pytest.raises(UserError, match="was imported: it is no run that could be resumed"):
        sft = [*CHAT, "--source=base", "--source_tag=gpt", "--model_tag=gpt-chat"]
        run_stage("chat_sft", *sft, "--resume")


def test_another_shape_than_the_imports_is_refused() -> None:
    with pytest.raises(UserError, match="but --arch and --depth ask for"):
        run_stage("base_train", *BASE, "--source_tag=gpt", "--depth=2")


def test_the_command_line_says_what_became_of_it(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage("hf_import", f"--from={base}/theirs/gpt", "--source=rl", "--max_seq_len=32")
    said = capsys.readouterr().out
    for part in ("gpt, ", "from bfloat16", "stage rl, because --stage says so", "rows of 32 tokens",
                 "of the 128 it was made for", "tokenizer gpt, 400 ids",
                 "chat_cli -i rl -g gpt"):  # fmt: skip
        assert part in said
    with pytest.raises(UserError, match="--max_seq_len=0 must be at least 1"):
        run_stage("hf_import", f"--from={base}/theirs/gpt", "--max_seq_len=0")
    assert flags.parse(chat_cli.Args, []).source == "sft"  # where chat models are looked for
