"""
Reinforcement learning on problems whose answers can be checked (GSM8K, or rows of that form).

    python -m scripts.chat_rl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --run=d20

Each step takes a few problems, samples several replies to each, rewards the right ones, and makes
what did better than its group's mean more likely. Starts from the newest SFT model and saves to
chatrl_checkpoints/<tag>/. Rates and optimizer are its own: gradients of rewards are unlike those of
text. See nanochat/rollout.py for the method.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nanochat import distributed, flags
from nanochat.common import UserError, fingerprint, seed_from
from nanochat.distributed import sum_over_ranks
from nanochat.engine import Engine
from nanochat.evals.chat import run_chat_eval
from nanochat.optim import make_optimizer
from nanochat.preview import preview_problems
from nanochat.rollout import problem_order, sample_rollouts, to_batches
from nanochat.schedule import lr_multiplier
from nanochat.start import Start, start_from
from nanochat.tasks.common import Task, get_task
from nanochat.tasks.custom import load_own
from nanochat.train import Trainer


@dataclass
class Args(flags.FinetuneFlags):
    """Improve a chat model by rewarding right answers."""

    source: flags.Source = "sft"
    """Stage to start from: mid, sft or rl."""
    source_tag: str | None = None
    """Tag to start from; default: --model_tag if that exists there, else the newest run."""
    task: str = "gsm8k"
    """Problems: gsm8k, or a name or folder of own rows that has a train and a test split."""
    data: str | None = None
    """Own problems, in place of --task: a file, folder or glob of parquet or jsonl(.gz, .zst) with
    `question` and `answer` (ending in #### NUMBER)."""
    val_data: str | None = None
    """Validation file; default: some of --data, pinned at first use."""
    num_iterations: int = -1
    """Optimizer steps; -1: --num_epochs over the problems."""
    num_epochs: float = 1.0
    """Times the problems are seen, where --num_iterations does not say."""
    examples_per_step: int = 16
    """Problems in one optimizer step, over all ranks."""
    num_samples: int = 16
    """Replies sampled for each problem."""
    device_batch_size: int = 8
    """Replies in one micro-batch of training on one rank. Results stay the same."""
    max_new_tokens: int = 256
    """Longest reply, in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_k: int = 50
    """Sample among this many tokens; 0: all."""
    init_lr_frac: float = 0.05
    """Learning rates start at this share of the values above, and fall to 0."""
    eval_every: int = 60
    """Steps between evaluations on held-out problems; -1: only before and after."""
    eval_examples: int = 400
    """Held-out problems of an evaluation."""
    save_every: int = 60
    """Steps between checkpoints; -1: only at the end."""


def main(args: Args) -> None:
    # Looking at data needs no GPU
    device_type = "cpu" if args.preview else args.device_type
    with distributed.session(device_type, args.seed, args.deterministic) as info:
        start = start_from(args.source, args.source_tag, args, info.device)
        train(args, start, info)


def problems_of(args: Args) -> tuple[Task, Task | None, str]:
    """Problems to learn from, those held out (None if there are too few), and which these are."""
    # A lone file as --task has no splits: it is own data
    data = args.data or (args.task if Path(args.task).is_file() else None)
    if data is not None:
        own = load_own(data, args.val_data, answers=True)
        return own.train, own.val, own.validation
    if args.val_data:
        raise UserError(f"--val_data={args.val_data} belongs to --data; --task has a test split")
    return get_task(args.task, "train"), get_task(args.task, "test"), f"test split of {args.task}"


def train(args: Args, start: Start, info: distributed.DistInfo) -> None:
    model, tokenizer = start.model, start.tokenizer
    task, val_task, validation = problems_of(args)
    if args.examples_per_step < info.world_size:
        raise UserError(
            f"--examples_per_step={args.examples_per_step} leaves some of {info.world_size} ranks "
            f"without a problem; use at least {info.world_size}"
        )
    if args.preview:
        seq_len = model.config.sequence_len
        return preview_problems(task, val_task, tokenizer, seq_len, args.max_new_tokens)
    num_steps = args.num_iterations
    if num_steps <= 0:
        num_steps = max(1, round(args.num_epochs * len(task) / args.examples_per_step))
    optimizer = make_optimizer(
        model, args.embedding_lr, args.unembedding_lr, args.matrix_lr, args.weight_decay,
        args.init_lr_frac,
    )  # fmt: skip
    trainer = Trainer(
        "rl",
        args.model_tag or start.tag,
        args,
        info,
        model,
        optimizer,
        num_steps,
        meta={
            "tokenizer": start.meta["tokenizer"],
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "data": {"train": fingerprint(*(json.dumps(task[i]) for i in range(len(task))))},
            "started_from": start.name,
            "validation": validation,
        },
    )
    engine = Engine(model, tokenizer)

    for step in trainer.steps():
        if val_task is not None and (trainer.is_due(args.eval_every) or step == 0):
            with trainer.autocast():
                result = run_chat_eval(
                    val_task, model, tokenizer, engine, batch_size=128, temperature=0.0,
                    max_new_tokens=args.max_new_tokens, max_problems=args.eval_examples,
                    stopped=trainer.stopping,
                )  # fmt: skip
            trainer.record(pass1=result.accuracy, pass1_stderr=result.stderr, problems=result.n)
        if trainer.is_due(args.save_every):
            trainer.save()
        if step == num_steps:
            continue  # nothing more to train on; the Trainer ends the run

        # This step's problems, shared out over the ranks
        first = step * args.examples_per_step
        problems = problem_order(len(task), args.seed, first, args.examples_per_step)
        with trainer.autocast():
            rollouts = sample_rollouts(
                engine, task, problems[info.rank :: info.world_size],
                num_samples=args.num_samples, max_new_tokens=args.max_new_tokens,
                temperature=args.temperature, top_k=args.top_k or None,
                seed=seed_from(args.seed, "rollouts", step), stopped=trainer.stopping,
            )  # fmt: skip
        trainer.end_if_stopped()  # the replies may have been broken off
        n, reward, tokens, ended = sum_over_ranks(
            rollouts.rewards.size, rollouts.rewards.sum(), rollouts.lengths.sum(),
            rollouts.ended.sum(), device=info.device,
        )  # fmt: skip
        trainer.metrics["reward"] = reward / n
        trainer.log("rl", reward=reward / n, completion_tokens=tokens / n, ended=ended / n)
        batches = to_batches(
            rollouts, args.device_batch_size, tokenizer.get_bos_token_id(), info.device
        )
        # The rate falls linearly over the whole run
        trainer.step(batches, lr_multiplier(step, num_steps, warmdown_ratio=1.0))


if __name__ == "__main__":
    flags.run(main, Args)
