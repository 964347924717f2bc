"""Preference optimization end to end: it learns what is preferred, and resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanochat.checkpoint import list_steps, load_model, read_meta, run_dir, step_dir
from nanochat.common import UserError, read_jsonl
from tests.tiny_world import BASE_FLAGS, MID_FLAGS, new_world, run_stage

DPO_FLAGS = [
    "--source=mid", "--source_tag=d2", "--pairs_per_step=8", "--num_iterations=4",
    "--device_batch_size=6", "--eval_every=2", "--device_type=cpu", "--init_lr_frac=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a mid model (tag d2), and pairs in which short replies are liked."""
    with new_world(tmp_path_factory) as folder:
        run_stage("base_train", *BASE_FLAGS)
        run_stage("mid_train", *MID_FLAGS)
    rows = [
        {"prompt": f"Is {i} a number?", "chosen": "Yes.", "rejected": f"Who knows what {i % 7} is."}
        for i in range(240)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def rows_of(tag: str, event: str) -> list[dict[str, Any]]:
    return [
        row for _, row in read_jsonl(run_dir("dpo", tag) / "log.jsonl") if row["event"] == event
    ]


def files(tag: str, step: int = 4) -> dict[str, torch.Tensor]:
    folder = step_dir("dpo", tag, step)
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optim.safetensors")}


def dpo(base: Path, *argv: str) -> None:
    run_stage("chat_dpo", *DPO_FLAGS, f"--data={base / 'pairs.jsonl'}", *argv)


def test_it_learns_what_is_preferred(base: Path) -> None:
    """Also of pairs that it has not seen; and the model is there for everybody under -i dpo."""
    dpo(base, "--model_tag=learns", "--num_iterations=12")
    losses = [row["loss"] for row in rows_of("learns", "step")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    seen = rows_of("learns", "dpo")
    assert [row["step"] for row in seen] == list(range(1, 13))
    assert seen[-1]["accuracy"] == 1.0 and seen[-1]["margin"] > 1.0
    last = rows_of("learns", "eval")[-1]
    assert last["step"] == 12 and last["val_accuracy"] == 1.0
    assert last["val_loss"] < 0.5 * math.log(2)
    model, tokenizer, meta = load_model("dpo", "cpu")
    assert (meta["stage"], meta["tag"]) == ("dpo", "learns")

    def log_prob(text: str, source: Any) -> float:
        messages = [{"role": "user", "content": "Is 999 a number?"}]
        start = tokenizer.render_for_completion({"messages": messages})
        ids = torch.tensor([[*start, *tokenizer.encode(text)]])
        targets = ids[:, 1:].clone()
        targets[:, : len(start) - 1] = -1
        return -source(ids[:, :-1], targets, reduction="sum").item()

    before, _, _ = load_model("mid", "cpu", "d2")
    gains = [log_prob(t, model) - log_prob(t, before) for t in ("Yes.", "Who knows what 3 is.")]
    assert gains[0] > gains[1] + 10  # nats: the margin over --beta


def test_a_resumed_run_is_the_same(base: Path) -> None:
    dpo(base, "--model_tag=whole", "--save_every=2", "--keep_last=-1")
    whole, rows = files("whole"), rows_of("whole", "step")
    evals = [row["val_loss"] for row in rows_of("whole", "eval")]
    dpo(base, "--model_tag=whole", "--save_every=2", "--keep_last=-1", "--resume_from_step=2")
    again = files("whole")
    assert again.keys() == whole.keys() and all(torch.equal(again[n], whole[n]) for n in whole)
    assert [row["loss"] for row in rows_of("whole", "step")] == [row["loss"] for row in rows]
    assert [row["val_loss"] for row in rows_of("whole", "eval")] == evals
    for flag in ("--beta=0.2", "--label_smoothing=0.1", "--pairs_per_step=4"):
        with pytest.raises(UserError, match=f"its {flag.split('=')[0]} was"):
            dpo(base, "--model_tag=whole", "--resume", flag)


def test_with_lora_only_its_matrices_move(base: Path) -> None:
    dpo(base, "--model_tag=lora", "--num_iterations=8", "--lora_rank=4", "--lora_lr=0.01")
    losses = [row["loss"] for row in rows_of("lora", "step")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    trained, start = files("lora", 8), load_file(step_dir("mid", "d2", 6) / "model.safetensors")
    assert all(torch.equal(trained[name], t) for name, t in start.items())
    model, _, _ = load_model("dpo", "cpu", "lora")
    assert model.state_dict().keys() == start.keys()


def test_preview_and_refusals(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dpo(base, "--preview", "--model_tag=none")
    said = capsys.readouterr().out
    assert "pairs: 2" in said and "0 dropped" in said and "held out (pairs.jsonl: 1" in said
    assert "⟦Yes.<|assistant_end|>⟧" in said and "pair 0, rejected" in said
    for argv, message in [
        (["--data="], "--data=pairs.jsonl is needed"),
        (["--beta=0"], "--beta=0 must be above 0"),
        (["--label_smoothing=0.5"], "--label_smoothing=0.5"),
        (["--max_seq_len=3"], "leaves nothing to train on"),
    ]:
        with pytest.raises(UserError, match=message):
            dpo(base, "--model_tag=none", *argv)
    assert list_steps("dpo", "none") == []


def test_sft_goes_on_from_it_with_an_optimizer_of_its_own(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo(base, "--model_tag=before", "--num_iterations=1")
    argv = [*MID_FLAGS, "--source=dpo", "--source_tag=before", "--num_iterations=1"]
    run_stage("chat_sft", *argv, "--total_batch_size=128", "--eval_every=-1")
    assert "cold start (DPO's is of other gradients)" in capsys.readouterr().out
    assert read_meta(step_dir("sft", "before", 1))["started_from"].startswith("dpo before")
