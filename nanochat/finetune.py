"""
Training on conversations: what mid_train and chat_sft share. They differ in their mixture only.

Conversations are rendered, masked and packed best-fit into rows; a row never cuts a conversation
unless that is longer than the row. The loss is over what the assistant wrote and the token that
ends its turn. Floor 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat import distributed, flags
from nanochat.common import UserError, print0, warn0
from nanochat.dataloader import ConversationSource, RowReader, StepLoader, eval_batches
from nanochat.engine import Engine
from nanochat.evals.bpb import evaluate_loss
from nanochat.optim import make_optimizer
from nanochat.plan import settle
from nanochat.preview import preview_conversations
from nanochat.schedule import (
    decay_multiplier,
    grad_accum_steps,
    lr_multiplier,
    muon_momentum,
)
from nanochat.start import Start, continued_optimizer, inherit, start_from
from nanochat.tasks.custom import load_own
from nanochat.tasks.mixture import TaskMixture, build_mixture
from nanochat.train import Trainer
from nanochat.trial import confirm

FEW_STEPS = 10  # fewer can hardly change a model


@dataclass
class ConversationFlags(flags.InheritedFlags, flags.ScheduleFlags):
    """Flags of the stages that train on conversations; the scripts set source and mixture."""

    source: flags.Source = "base"
    """Stage to start from: base, mid or sft."""
    source_tag: str | None = None
    """Tag to start from; default: --model_tag if that exists there, else the newest run."""
    data: str | None = None
    """Own conversations: a file, folder or glob of parquet or jsonl(.gz, .zst) with `messages`.
    They take the place of the default mixture; with --mixture, they are added to it."""
    val_data: str | None = None
    """Validation file; default: some of --data, pinned at first use."""
    mixture: str | None = None
    """Tasks to train on: name[@rows][*epochs] joined by |. A name may be a file or folder of own
    rows. Default: what the head of the stage's script says."""
    val_mixture: str | None = None
    """Tasks whose test split gives the validation loss; empty: none. Default: as for --mixture."""
    num_iterations: int = -1
    """Optimizer steps; -1: --num_epochs over the mixture."""
    num_epochs: float = 1.0
    """Times the mixture is seen, where --num_iterations does not say."""
    warmdown_ratio: float = 0.5
    """Share of the run over which the learning rate falls."""
    sample_prompts: str = "Hello! Who are you?|What is 27 + 15?"
    """Questions to answer in samples at the end, separated by |."""


def finetune(args: ConversationFlags, stage: str, mixture: str, val_mixture: str) -> None:
    """Runs mid_train or chat_sft, with these mixtures unless the flags name others, or own data."""
    if args.mixture is None:
        args.mixture = "" if args.data else mixture
    if args.val_mixture is None:
        args.val_mixture = "" if args.data else val_mixture
    device_type = "cpu" if args.preview else args.device_type  # looking at data needs no GPU
    with distributed.session(device_type, args.seed, args.deterministic) as info:
        start = start_from(args.source, args.source_tag, args, info.device)
        _train(args, stage, start, info)


def load_mixtures(args: ConversationFlags) -> tuple[TaskMixture, TaskMixture | None, str]:
    """Conversations to train on, those for the validation loss, and in words which these are."""
    train, val, said = None, None, [args.val_mixture]
    if args.data:
        own = load_own(args.data, args.val_data)
        train, val = own.train, own.val
        said.append(own.validation)
    elif args.val_data:
        raise UserError(f"--val_data={args.val_data} belongs to --data; else use --val_mixture")
    mixture = build_mixture(args.mixture or "", "train", args.seed, train)
    if not args.val_mixture and val is None:
        return mixture, None, "none"
    val_mixture = build_mixture(args.val_mixture or "", "test", args.seed, val)
    return mixture, val_mixture, " | ".join(filter(None, said))


def _train(args: ConversationFlags, stage: str, start: Start, info: distributed.DistInfo) -> None:
    tokenizer, model = start.tokenizer, start.model
    bos = tokenizer.get_bos_token_id()
    inherit(args, start)
    seq_len = args.max_seq_len
    rows_per_step = args.total_batch_size // seq_len
    if not args.preview:
        settled = settle(args, model.config, info, rows_per_step, seq_len)
        grad_accum_steps(args.total_batch_size, settled[0], seq_len, info.world_size)

    # What there is to learn from
    mixture, val_mixture, validation = load_mixtures(args)
    source = ConversationSource(mixture, tokenizer, seq_len + 1)
    reader = RowReader(source, seq_len + 1, args.seed, bos)
    if args.preview:
        return preview_conversations(mixture, source, reader, tokenizer, validation)
    print0(f"{mixture.describe()}\n{source.account()}\nvalidation: {validation}")
    val_reader = None
    if val_mixture is not None:
        val_source = ConversationSource(val_mixture, tokenizer, seq_len + 1)
        val_reader = RowReader(val_source, seq_len + 1, 0, bos)

    num_steps = num_steps_of(args, reader, rows_per_step)
    rates = (args.embedding_lr, args.unembedding_lr, args.matrix_lr, args.weight_decay)
    optimizer = continued_optimizer(
        lambda: make_optimizer(model, *rates, args.init_lr_frac), args, start, info.device
    )
    micro_batch = confirm(settled, args, model, optimizer, info, rows_per_step, seq_len)
    args.device_batch_size = micro_batch
    loader = StepLoader(reader, rows_per_step, micro_batch, info.rank, info.world_size, info.device)
    trainer = Trainer(
        stage,
        args.model_tag or start.tag,
        args,
        info,
        model,
        optimizer,
        num_steps,
        meta={
            "tokenizer": start.meta["tokenizer"],
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "data": {"train": source.fingerprint},
            "started_from": start.name,
            "optimizer_from": start.name if optimizer.num_steps else None,  # cold
            "mixture": " | ".join(filter(None, [args.mixture, args.data])),
            "validation": validation,
        },
        loader=loader,
    )
    for step in trainer.steps():
        if val_reader is not None and trainer.is_due(args.eval_every, at_start=True):
            trainer.record(val_loss=validation_loss(args, trainer, val_reader, micro_batch))
        if trainer.is_due(-1) and info.rank == 0:
            sample_replies(trainer, tokenizer, args.sample_prompts)
        if trainer.is_due(args.save_every):
            trainer.save()
        if step == num_steps:
            continue  # nothing more to train on; the Trainer ends the run
        lr_mul = lr_multiplier(
            step, num_steps, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac
        )
        decay = decay_multiplier(step, num_steps)
        trainer.step(loader.step(step), lr_mul, muon_momentum(step), decay)


def num_steps_of(args: ConversationFlags, reader: RowReader, rows_per_step: int) -> int:
    """--num_iterations, or as many as --num_epochs over the mixture take; few are warned about."""
    if args.num_iterations > 0:
        return args.num_iterations
    num_steps = max(1, round(args.num_epochs * reader.rows_per_epoch() / rows_per_step))
    if num_steps < FEW_STEPS:
        warn0(
            f"--num_epochs={args.num_epochs:g} is over in {num_steps} steps of "
            f"--total_batch_size={args.total_batch_size:,} tokens; a smaller batch or more "
            "epochs give the model more steps to learn in"
        )
    return num_steps


def validation_loss(
    args: ConversationFlags, trainer: Trainer, reader: RowReader, micro_batch: int
) -> float:
    """Mean loss over the same rows every time, shared out over the ranks."""
    info = trainer.info
    batches = eval_batches(
        reader, args.eval_tokens, micro_batch, info.rank, info.world_size, info.device
    )
    with trainer.autocast():
        return evaluate_loss(trainer.model, trainer.until_stopping(batches))


def sample_replies(trainer: Trainer, tokenizer: object, prompts: str) -> None:
    """Prints and logs greedy replies to a few questions (rank 0)."""
    engine = Engine(trainer.model, tokenizer)
    for prompt in prompts.split("|"):
        conversation = {"messages": [{"role": "user", "content": prompt}]}
        ids = engine.tokenizer.render_for_completion(conversation)
        sequences, _ = engine.generate_batch(ids, max_tokens=64, temperature=0)
        text = engine.tokenizer.decode(sequences[0])
        trainer.log("sample", text=text)
        print0(text)
