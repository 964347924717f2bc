"""
Our reinforcement learning's loss against TRL's GRPO, on the same model, replies and rewards.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0 transformers torch
    python -m bench.rl_trl --peer_python=/tmp/trl/bin/python

A tiny random model of each architecture is exported; the engine samples replies to word problems,
some of them with tool output among the tokens; rewards are drawn. TRL gets the replies as ids
(rollout_func) and makes everything else of them: advantages, log-probabilities, reference, loss
(loss_type="dapo", which is token-level over the batch), gradient.

Two things differ by intent, and are compared for what they are. TRL divides by std + 1e-4, we by
std. A group without variance has advantages of 0 in both, but its tokens count in TRL's
normaliser, and its replies' KL in TRL's penalty: the case "with a group of equal rewards" is the
same up to the ratio of the token counts.
"""

from __future__ import annotations

import copy
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from bench import surroundings
from bench.bpe_common import RESULTS
from nanochat import flags
from nanochat.common import UserError, print0, read_json, write_json
from nanochat.dataloader import IGNORE
from nanochat.engine import Engine
from nanochat.hf_export import export_model
from nanochat.models import GPTConfig, QwenConfig, build_model
from nanochat.policy import Policy, compared
from nanochat.rollout import Rollouts, advantages, sample_rollouts, to_batches
from nanochat.tasks.common import Rows
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tokenizer import Tokenizer

OUT = RESULTS / "rl_trl.json"
WORKER = Path(__file__).with_name("rl_trl_worker.py")
NUM_SAMPLES, NUM_PROBLEMS, NEW_TOKENS = 4, 5, 24
CASES: list[dict[str, Any]] = [
    {"name": "default", "by_std": False, "clip": 0.0, "kl": 0.0, "moved": False},
    {"name": "by_std", "by_std": True, "clip": 0.0, "kl": 0.0, "moved": False},
    {"name": "clip", "by_std": False, "clip": 0.05, "kl": 0.0, "moved": True},
    {"name": "kl", "by_std": False, "clip": 0.0, "kl": 0.2, "moved": True},
    {"name": "all", "by_std": True, "clip": 0.05, "kl": 0.2, "moved": True},
    {"name": "equal", "by_std": False, "clip": 0.0, "kl": 0.0, "moved": False},
]
CLOSE = 2e-5  # float32, summed in other orders; by_std: and the 1e-4 that TRL adds
CLOSE_BY_STD = 1e-3


@dataclass
class Args:
    """Compare our loss with TRL's."""

    peer_python: str
    """Python of an environment with TRL."""
    out: str = str(OUT)
    """Where the result goes."""


def problems() -> GSM8K:
    names = ("Ann", "Bob", "Cem", "Dora", "Eve")
    rows = [
        {"question": f"{n} has {i + 3} pears and eats {i}. How many are left?", "answer": "#### 3"}
        for i, n in enumerate(names)
    ]
    return GSM8K(Rows([("bench", rows, None)]))


def tiny_tokenizer() -> Tokenizer:
    """Learned from this repository's README."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    return Tokenizer.train(iter([text]), 500)


def random_model(arch: str, vocab_size: int, **shape: Any) -> Any:
    """A model in which every parameter matters."""
    small: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64, **shape}
    config: Any = GPTConfig(256, vocab_size, **small)
    if arch == "qwen2.5":
        config = QwenConfig(256, vocab_size, n_mlp=3 * small["n_embd"], **small)
    return nudged(build_model(config, seed=1), 2, 0.08)


def nudged(model: Any, seed: int, size: float) -> Any:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += size * torch.randn(p.shape, generator=generator)
    return other


def rows_of(rollouts: Rollouts, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The replies as the worker gets them."""
    rows = []
    for i, (ids, mask) in enumerate(zip(rollouts.sequences, rollouts.masks)):
        start = len(prompts[i // NUM_SAMPLES])
        rows.append(
            {
                "prompt": ids[:start],
                "reply": ids[start:],
                "mask": mask[start:],
                "log_probs": rollouts.log_probs[i][start:],
                "reward": float(rollouts.rewards.flat[i]),
            }
        )
    return rows


def ours(model: Any, moved: Any, rollouts: Rollouts, case: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradient norm and gradients, as the training step makes them."""
    vocab_size = model.config.vocab_size
    batches = to_batches(rollouts, 3, 0, torch.device("cpu"), case["by_std"])
    settings: dict[str, Any] = {"clip": case["clip"], "kl": case["kl"]}
    reference = model if case["kl"] else None
    begun = Policy(model, model, vocab_size, reference=reference, **settings)
    begun.begin(batches)
    if case["moved"]:  # a first step on these replies, which saw them as they were sampled
        for batch in batches:
            begun(batch)
        compared(batches)
    now = moved if case["moved"] else model
    now.zero_grad()
    policy = Policy(now, now, vocab_size, **settings)
    count = sum(int((b.targets != IGNORE).sum()) for b in batches)
    loss = torch.stack([policy(b) for b in batches]).sum() / count
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in now.named_parameters()}
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
    return {
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "gradients": gradients,
        "advantages": advantages(rollouts.rewards, case["by_std"]).flatten().tolist(),
        "tokens": count,
    }


def ask_trl(python: str, folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """What the worker finds."""
    write_json(folder / "spec.json", spec)
    # -I: without our modules on the path
    command = [python, "-I", str(WORKER), str(folder)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise UserError(f"TRL under {python} failed:\n{done.stderr.strip()[-3000:]}")
    return read_json(folder / "found.json")


def compare(arch: str, python: str, folder: Path) -> dict[str, Any]:
    """All cases on one architecture."""
    tokenizer = tiny_tokenizer()
    model = random_model(arch, tokenizer.get_vocab_size())
    moved = nudged(model, 3, 0.01)
    for name, weights in (("model", model), ("moved", moved)):
        export_model(folder / name, weights, tokenizer, True, "bench", "float32", overwrite=True)
    task, rng = problems(), np.random.default_rng(0)
    rollouts = sample_rollouts(
        Engine(model, tokenizer), task, range(NUM_PROBLEMS), num_samples=NUM_SAMPLES,
        max_new_tokens=NEW_TOKENS, temperature=1.0, top_k=None, seed=7,
        reward=lambda problem, reply: float(rng.integers(0, 4)),
    )  # fmt: skip
    for i, mask in enumerate(rollouts.masks):  # some tokens as if a tool had written them
        if i % 3 == 0 and sum(mask) > 8:
            start = mask.index(1) + 3
            mask[start : start + 4] = [0] * 4
    assert rollouts.useful.all(), "the drawn rewards must differ within each group"
    prompts = [tokenizer.render_for_completion(task[p]) for p in range(NUM_PROBLEMS)]
    rows: list[dict[str, Any]] = []
    for equal in (False, True):
        if equal:
            rollouts.rewards[1] = 2.0
        cases = [case for case in CASES if (case["name"] == "equal") == equal]
        spec = {
            "task": "loss", "model": str(folder / "model"), "num_samples": NUM_SAMPLES,
            "moved_weights": str(folder / "moved" / "model.safetensors"),
            "max_new_tokens": NEW_TOKENS, "rows": rows_of(rollouts, prompts), "cases": cases,
        }  # fmt: skip
        theirs = ask_trl(python, folder, spec)
        for case in cases:
            row = difference(case, ours(model, moved, rollouts, case), theirs, folder)
            print0(f"{arch:8} {row}")
            rows.append(row)
    return {"arch": arch, "peer_versions": theirs["versions"], "cases": rows}


def difference(
    case: dict[str, Any], our: dict[str, Any], theirs: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """One case, side by side. `scale`: TRL's tokens over ours, 1 where all groups have variance."""
    their = theirs["found"][case["name"]]
    scale = their["tokens"] / our["tokens"]
    found = load_file(folder / f"{case['name']}.grad")
    same = {name: g for name, g in our["gradients"].items() if name in found}
    errors = [float((found[n] * scale - g).abs().max() / g.abs().max()) for n, g in same.items()]
    pairs = zip(our["advantages"], their["advantages"])
    return {
        "case": case["name"],
        "tokens": our["tokens"],
        "their_tokens": their["tokens"],
        "loss": our["loss"],
        "their_loss": their["loss"],
        "loss_difference": abs(our["loss"] - their["loss"] * scale),
        "grad_norm": our["grad_norm"],
        "their_grad_norm": their["grad_norm"],
        "grad_norm_relative_difference": abs(their["grad_norm"] * scale / our["grad_norm"] - 1),
        "gradients_by_name": len(same),
        "gradient_relative_difference": max(errors, default=None),
        "advantage_difference": max(abs(a - b) for a, b in pairs),
    }


def main(args: Args) -> None:
    """Compares on both architectures, and ends in an error where the two disagree."""
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        models = []
        for arch in ("gpt", "qwen2.5"):
            folder = Path(name) / arch
            folder.mkdir()
            models.append(compare(arch, args.peer_python, folder))
    wrong = []
    for model in models:
        for row in model["cases"]:
            close = CLOSE_BY_STD if row["case"] in ("by_std", "all") else CLOSE
            differences = (
                row["loss_difference"], row["grad_norm_relative_difference"],
                row["gradient_relative_difference"] or 0.0,
            )  # fmt: skip
            if max(differences) > close * 10 or row["loss_difference"] > close:
                wrong.append(f"{model['arch']} {row['case']}: {differences}")
    write_json(args.out, {"disagreements": wrong, "models": models, **surroundings(load_before)})
    print0(f"wrote {args.out}")
    if wrong:
        raise UserError("our loss and TRL's disagree:\n" + "\n".join(wrong))


if __name__ == "__main__":
    flags.run(main, Args)
