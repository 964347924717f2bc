"""
How fast a step of reinforcement learning is, beside TRL's GRPO: sampling, and training.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0 transformers torch
    python -m bench.rl_speed --peer_python=/tmp/trl/bin/python
    python -m bench.rl_speed --peer_python=/tmp/trl/bin/python --device_type=cuda --n_layer=24 \
        --n_embd=896 --n_head=14 --n_kv_head=2 --vocab_size=65536 --problems=64 --new_tokens=256

The same random Qwen-shaped model in both, the same prompts; every reply runs to --new_tokens, so
that both sample as many tokens. Sampling: our engine, log-probabilities included, and
transformers' generate, which is what TRL samples with unless a vLLM server stands beside it.
Training: one optimizer step on our replies, from rewards to new weights; TRL gets the replies as
ids. "trained" is of those replies, all of one length; "trained_unequal" of the same replies cut at
lengths drawn from a quarter of that to all of it, as replies that end by themselves differ: ours
share a micro-batch with those of their length, TRL's are padded as they come. (Ours is Muon and
AdamW, TRL's AdamW alone: with few tokens a step Muon's share shows.) In float32 on a CPU, bfloat16
(autocast for training) on a GPU. The rounds alternate; the medians count.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import surroundings
from bench.bpe_common import RESULTS
from bench.rl_trl import ask_trl, problems, random_model, rows_of, tiny_tokenizer
from nanochat import flags
from nanochat.common import print0, write_json
from nanochat.dataloader import IGNORE
from nanochat.engine import Engine
from nanochat.hf_export import export_model
from nanochat.optim import make_optimizer
from nanochat.policy import Policy, compared
from nanochat.rollout import Rollouts, sample_rollouts, to_batches

OUT = RESULTS / "rl_speed.json"
NUM_SAMPLES = 4  # as rows_of takes them


@dataclass
class Args:
    """Compare our speed with TRL's."""

    peer_python: str
    """Python of an environment with TRL."""
    device_type: str = "cpu"
    """cpu or cuda."""
    problems: int = 16
    """Problems of a step, as chat_rl's default is; each with four replies."""
    new_tokens: int = 100
    """Tokens of a reply."""
    device_batch_size: int = 8
    """Replies in a micro-batch, in both. Must divide their number."""
    n_layer: int = 4
    """Layers of the model."""
    n_embd: int = 256
    """Its width."""
    n_head: int = 4
    """Query heads."""
    n_kv_head: int = 2
    """Key and value heads."""
    vocab_size: int = 0
    """Rows of the embedding; 0: as many as there are tokens."""
    rounds: int = 5
    """Times that each is measured."""
    out: str = str(OUT)
    """Where the result goes."""


class Seconds:
    """Time of a block on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.value = device, 0.0

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def __enter__(self) -> Seconds:
        self._wait()
        self.value = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self._wait()
        self.value = time.perf_counter() - self.value


def sample(args: Args, engine: Engine, autocast: Any) -> tuple[Rollouts, list[list[int]]]:
    """Replies to the problems, and the prompts."""
    task, rng = problems(), np.random.default_rng(0)
    chosen = [i % len(task) for i in range(args.problems)]
    with autocast:
        rollouts = sample_rollouts(
            engine, task, chosen, num_samples=NUM_SAMPLES, max_new_tokens=args.new_tokens,
            temperature=1.0, top_k=None, seed=1, reward=lambda problem, reply: float(rng.random()),
        )  # fmt: skip
    return rollouts, [engine.tokenizer.render_for_completion(task[p]) for p in chosen]


def cut(rollouts: Rollouts, prompts: list[list[int]], longest: int) -> Rollouts:
    """The replies, each ended at a length drawn from a quarter of the longest to all of it."""
    rng = np.random.default_rng(2)
    ends = [
        len(prompts[i // NUM_SAMPLES]) + int(rng.integers(longest // 4, longest + 1))
        for i in range(len(rollouts.sequences))
    ]
    masks = [mask[:end] for mask, end in zip(rollouts.masks, ends)]
    return replace(
        rollouts,
        sequences=[ids[:end] for ids, end in zip(rollouts.sequences, ends)],
        masks=masks,
        lengths=np.array([sum(mask) for mask in masks]).reshape(rollouts.lengths.shape),
        log_probs=[values[:end] for values, end in zip(rollouts.log_probs, ends)],
    )


def train_step(
    args: Args, policy: Policy, optimizer: Any, rollouts: Rollouts, autocast: Any
) -> None:
    """From rewards to new weights, as chat_rl and the training step do it."""
    device = torch.device(args.device_type)
    batches = to_batches(rollouts, args.device_batch_size, 0, device)
    policy.begin(batches)
    count = sum(int((b.targets != IGNORE).sum()) for b in batches)
    for batch in batches:
        with autocast:
            loss = policy(batch)
        (loss / count).backward()
    optimizer.step(1.0, 0.95, 1.0, 1.0)
    optimizer.zero_grad()
    compared(batches)


def ask(args: Args, folder: Path, rows: list[dict[str, Any]], generate: bool) -> dict[str, Any]:
    """TRL's times with these replies."""
    spec = {
        "task": "speed", "model": str(folder / "model"), "num_samples": NUM_SAMPLES,
        "max_new_tokens": args.new_tokens, "rows": rows, "batch": args.device_batch_size,
        "threads": torch.get_num_threads(), "cuda": args.device_type == "cuda", "steps": 2,
        "generate": generate,
    }  # fmt: skip
    return ask_trl(args.peer_python, folder, spec)


def main(args: Args) -> None:
    """Measures both in turns, and writes the medians."""
    load_before = os.getloadavg()[0]
    device = torch.device(args.device_type)
    on_gpu = device.type == "cuda"
    autocast: Any = torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()
    tokenizer = copy.copy(tiny_tokenizer())
    rows = args.vocab_size or tokenizer.get_vocab_size()
    model = random_model(
        "qwen2.5", rows, n_layer=args.n_layer, n_embd=args.n_embd, n_head=args.n_head,
        n_kv_head=args.n_kv_head,
    )  # fmt: skip
    measured: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_model(folder / "model", model, tokenizer, True, "bench", "float32")
        tokenizer.stop_token_ids = set()  # every reply runs to its full length
        model = model.to(device)
        engine = Engine(model, tokenizer)
        optimizer = make_optimizer(model, 1e-6, 1e-6, 1e-6, 0.0, 1.0)
        policy = Policy(model, model, rows)
        warm, _ = sample(args, engine, autocast)
        train_step(args, policy, optimizer, warm, autocast)
        for _ in range(args.rounds):
            with Seconds(device) as sampling:
                rollouts, prompts = sample(args, engine, autocast)
            ours: dict[str, float] = {"sampled": int(rollouts.lengths.sum()) / sampling.value}
            theirs: dict[str, float] = {}
            unequal = cut(rollouts, prompts, args.new_tokens)
            for name, replies in (("trained", rollouts), ("trained_unequal", unequal)):
                tokens = int(replies.lengths.sum())
                with Seconds(device) as training:
                    train_step(args, policy, optimizer, replies, autocast)
                ours[name] = tokens / training.value
                rows_of_replies = rows_of(replies, prompts)
                answer = ask(args, folder, rows_of_replies, generate=replies is rollouts)
                theirs[name] = tokens / answer["found"]["train"]["seconds"]
                if generated := answer["found"].get("generate"):
                    theirs["sampled"] = generated["tokens"] / generated["seconds"]
            measured["ours"].append(ours)
            measured["trl"].append(theirs)
            print0(f"tokens/s: {measured['ours'][-1]}, TRL {measured['trl'][-1]}")
    medians = {
        who: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for who, runs in measured.items()
    }
    ratios = {key: value / medians["trl"][key] for key, value in medians["ours"].items()}
    settings = {k: v for k, v in vars(args).items() if k not in ("peer_python", "out", "typed")}
    result = {
        "settings": settings,
        "tokens_per_second": medians,
        "ours_over_trl": ratios,
        "runs": measured,
        "peer_versions": answer["versions"],
        **surroundings(load_before),
    }
    write_json(args.out, result)
    print0(f"ours over TRL: {ratios}\nwrote {args.out}")


if __name__ == "__main__":
    flags.run(main, Args)
