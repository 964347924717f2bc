"""
Preference optimization: make the replies that people chose likelier than those they rejected (DPO).

    python -m scripts.chat_dpo --data=pairs.jsonl
    python -m scripts.chat_dpo --data=pairs.jsonl --preview
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_dpo -- --data=pairs.jsonl

A row of the data is a pair of replies to one prompt:

    {"prompt": "How are you?", "chosen": "Fine, thank you!", "rejected": "Who asks?"}

The prompt may be a list of messages instead, and so may the replies (the last message counts).
Starts from the newest SFT model, which is also the reference that the model must not stray from
(--beta), and saves to chatdpo_checkpoints/<tag>/; `python -m scripts.chat_cli -i dpo` talks to it.
With --lora_rank little memory is needed beside the weights. See nanochat/dpo.py for the method.

What to watch: the accuracy on held-out pairs rises above one half and the margin above 0. A margin
that grows while both rewards sink far below 0 forgets how to speak: fewer steps, smaller rates, or
a larger --beta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from nanochat import distributed, flags, lora
from nanochat.common import UserError, print0
from nanochat.dpo import (
    Pairs,
    by_length,
    evaluate_pairs,
    load_pairs,
    make_batch,
    preview_pairs,
    reference_log_probs,
    seen_by,
)
from nanochat.plan import settle
from nanochat.rollout import problem_order
from nanochat.schedule import lr_multiplier
from nanochat.shard import gathered
from nanochat.start import Start, optimizer_of, start_from
from nanochat.step import TrainStep
from nanochat.train import Trainer
from nanochat.trial import confirm


@dataclass
class Args(lora.LoraFlags, flags.FinetuneFlags):
    """Train a chat model on pairs of replies, of which one was preferred."""

    source: flags.Source = "sft"
    """Stage to start from: mid, sft, rl or dpo."""
    source_tag: str | None = None
    """Tag to start from; default: --model_tag if that exists there, else the newest run."""
    data: str = ""
    """Pairs: a file, folder or glob of parquet or jsonl(.gz, .zst) with `prompt`, `chosen` and
    `rejected`. Must be given."""
    val_data: str | None = None
    """Validation file; default: some of --data, pinned at first use."""
    beta: float = 0.1
    """How closely the model is held to where it started: larger, closer."""
    label_smoothing: float = 0.0
    """Share of the pairs that may be labelled the wrong way round, below 0.5."""
    num_iterations: int = -1
    """Optimizer steps; -1: --num_epochs over the pairs."""
    num_epochs: float = 1.0
    """Times the pairs are seen, where --num_iterations does not say."""
    pairs_per_step: int = 32
    """Pairs in one optimizer step, over all ranks."""
    max_seq_len: int = -1
    """Longest prompt with its reply, in tokens; longer pairs are left out. -1: as the model was
    trained."""
    device_batch_size: int | Literal["auto"] = "auto"
    """Replies in one micro-batch on one rank, two to a pair. auto: what fits and keeps the device
    busy. Results do not depend on it."""
    init_lr_frac: float = 0.02
    """Learning rates start at this share of the values above, and fall to 0."""
    lora_lr: float = 5e-5
    """AdamW learning rate of LoRA's matrices at the start, whatever --init_lr_frac says."""
    eval_every: int = 50
    """Steps between evaluations on held-out pairs; -1: only at the end."""


def main(args: Args) -> None:
    if not args.data:
        raise UserError("--data=pairs.jsonl is needed: rows with prompt, chosen and rejected")
    if not (args.beta > 0 and 0 <= args.label_smoothing < 0.5):
        raise UserError(
            f"--beta={args.beta:g} must be above 0, --label_smoothing={args.label_smoothing:g} at "
            "least 0 and below 0.5"
        )
    # Looking at data needs no GPU
    device_type = "cpu" if args.preview else args.device_type
    with distributed.session(device_type, args.seed, args.deterministic, args.rank_timeout) as info:
        start = start_from(args.source, args.source_tag, args, info.device)
        train(args, start, info)


def train(args: Args, start: Start, info: distributed.DistInfo) -> None:
    model, tokenizer = start.model, start.tokenizer
    if args.max_seq_len < 0:
        args.max_seq_len = model.config.sequence_len
    pairs, val_pairs, validation = load_pairs(
        args.data, args.val_data, tokenizer, args.max_seq_len + 1
    )
    if args.preview:
        return preview_pairs(pairs, val_pairs, tokenizer, validation)
    if val_pairs is None:
        validation = "none"
    print0(f"{pairs.account()}\nvalidation: {validation}")
    if args.pairs_per_step < info.world_size:
        raise UserError(
            f"--pairs_per_step={args.pairs_per_step} leaves some of {info.world_size} ranks "
            f"without a pair; use at least {info.world_size}"
        )
    num_steps = args.num_iterations
    if num_steps <= 0:
        num_steps = max(1, round(args.num_epochs * len(pairs) / args.pairs_per_step))

    rows_per_step, length = 2 * args.pairs_per_step, pairs.longest - 1
    settled = settle(args, model.config, info, rows_per_step, length, fixed_rows=False)
    model = start.place(args, info, settled[1])
    optimizer = optimizer_of(args, start, info)
    # The two replies of a pair go through together: their loss is one
    settled = (max(2, settled[0]), settled[1])
    train_step = TrainStep(args, info, model, optimizer)
    micro_batch = confirm(settled, train_step, rows_per_step, length) // 2
    if micro_batch < 1:
        raise UserError(
            f"a pair of {length:,} tokens a reply does not fit; set a smaller --max_seq_len, "
            "--activation_checkpointing=block or --lora_rank"
        )
    trainer = Trainer(
        "dpo", args.model_tag or start.tag, train_step, num_steps,
        start.describe(pairs.fingerprint, validation),
    )  # fmt: skip
    # The model is the reference still, in a run that will be resumed too: it was not yet loaded.
    pad = tokenizer.get_bos_token_id()

    def reference_of(some: Pairs | None) -> torch.Tensor:
        if some is None or args.dry_run:
            return torch.zeros(0, 2)
        return reference_log_probs(model, some, micro_batch, pad, info, trainer.autocast)

    with gathered(model):
        reference, val_reference = reference_of(pairs), reference_of(val_pairs)

    for step in trainer.steps():
        if val_pairs is not None and trainer.is_due(args.eval_every):
            mine = by_length(val_pairs, range(len(val_pairs)), micro_batch)
            batches = (
                make_batch(val_pairs, numbers, val_reference, pad, info.device, args.beta)
                for numbers in mine[info.rank :: info.world_size]
            )
            with trainer.autocast():
                result = evaluate_pairs(model, trainer.until_stopping(batches), info)
            trainer.record("eval", **{f"val_{name}": value for name, value in result.items()})
        if trainer.is_due(args.save_every):
            trainer.save()
        if step == num_steps:
            continue  # nothing more to train on; the Trainer ends the run

        # This step's pairs, shared out over the ranks
        first = step * args.pairs_per_step
        numbers = problem_order(len(pairs), args.seed, first, args.pairs_per_step)
        step_batches = [
            make_batch(
                pairs, group, reference, pad, info.device, args.beta, args.label_smoothing
            )
            for group in by_length(pairs, numbers[info.rank :: info.world_size], micro_batch)
        ]  # fmt: skip
        # The rate falls linearly over the whole run
        trainer.step([*step_batches], lr_multiplier(step, num_steps, warmdown_ratio=1.0))
        trainer.log("dpo", of_step=True, **seen_by(step_batches, info))


if __name__ == "__main__":
    flags.run(main, Args)
