"""
Training on conversations: what mid_train and chat_sft share. They differ in their mixture only.

Conversations are rendered, masked and packed best-fit into rows; a row never cuts a conversation
unless that is longer than the row, and then after a reply. The loss is over what the assistant
wrote and the token that ends its turn. Floor 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import distributed, flags, lora
from nanochat.common import UserError, print0, warn0
from nanochat.conversation_source import ConversationSource
from nanochat.dataloader import RowReader, StepLoader, eval_batches
from nanochat.engine import Engine
from nanochat.evals.bpb import evaluate_loss
from nanochat.evals.chat import run_chat_eval
from nanochat.plan import Mode, settle
from nanochat.preview import preview_conversations
from nanochat.schedule import (
    decay_multiplier,
    grad_accum_steps,
    lr_multiplier,
    muon_momentum,
)
from nanochat.shard import gathered
from nanochat.start import Start, inherit, optimizer_of, start_from
from nanochat.step import TrainStep
from nanochat.tasks.common import Task, get_task
from nanochat.tasks.custom import load_own
from nanochat.tasks.mixture import TaskMixture, build_mixture
from nanochat.train import Trainer
from nanochat.trial import confirm

# So many steps, where nobody says how large they are. SFT's own mixture is some ten million tokens:
# twenty steps of pretraining's 524,288, too few for Muon's momentum and a rate that falls.
MIN_STEPS = 100
CHAT_EVAL_BATCH = 32  # problems at a time: beside the optimizer's state there must be room for them
FEW_STEPS = 10  # fewer can hardly change a model


@dataclass
class ConversationFlags(flags.InheritedFlags, flags.ScheduleFlags, lora.LoraFlags):
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
    sample_every: int = 500
    """Steps between samples, the first before training; -1: only at the end."""
    sample_prompts: str = "Hello! Who are you?|What is 27 + 15?"
    """Questions to answer in samples, separated by |; empty: none."""
    chat_eval_every: int = 500
    """Steps between evaluations of --chat_eval_tasks, the first before training; -1: never."""
    chat_eval_tasks: str | None = None
    """Tasks whose test split is answered, joined by |; empty: none. Default: what the head of the
    stage's script says; none if --mixture or --data is given."""
    chat_eval_problems: int = 128
    """Problems of each of them, drawn by the seed; -1: all."""
    chat_eval_max_new_tokens: int = 256
    """Longest reply to them."""


def finetune(
    args: ConversationFlags, stage: str, mixture: str, val_mixture: str, chat_tasks: str
) -> None:
    """Runs mid_train or chat_sft, with these mixtures and tasks to be measured by, unless the flags
    name others, or own data."""
    if args.chat_eval_tasks is None:
        args.chat_eval_tasks = "" if args.data or args.mixture is not None else chat_tasks
    if args.mixture is None:
        args.mixture = "" if args.data else mixture
    if args.val_mixture is None:
        args.val_mixture = "" if args.data else val_mixture
    device_type = "cpu" if args.preview else args.device_type  # looking at data needs no GPU
    with distributed.session(device_type, args.seed, args.deterministic, args.rank_timeout) as info:
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


def load_chat_tasks(args: ConversationFlags) -> list[Task]:
    """The tasks of --chat_eval_tasks; none where they are never evaluated."""
    names = [name.strip() for name in (args.chat_eval_tasks or "").split("|")]
    wanted = args.chat_eval_every > 0 and not args.preview
    return [get_task(name, "test") for name in names if name and wanted]


def fit_batch(
    args: ConversationFlags, inherited: Sequence[str], num_rows: int, world_size: int
) -> bool:
    """Makes an inherited batch small enough for MIN_STEPS steps over `num_rows` rows; says whether.

    The batch becomes a power of two of rows, or what the ranks can share out, and inherited rates
    follow by the root of its size: gradients are that much noisier (Malladi et al., arXiv
    2205.10287, for Adam). What was typed, batch, steps or rates, stays as it is."""
    if "total_batch_size" not in inherited or args.num_iterations > 0:
        return False
    before = args.total_batch_size // args.max_seq_len
    rows = 2 ** int(math.log2(max(1.0, args.num_epochs * num_rows / MIN_STEPS)))
    micro_batch = 1 if args.device_batch_size == "auto" else args.device_batch_size
    rows = math.ceil(rows / (micro_batch * world_size)) * micro_batch * world_size
    if rows >= before:
        return False
    args.total_batch_size = rows * args.max_seq_len
    rates = [flag for flag in inherited if flag.endswith("_lr")]
    for flag in rates:
        setattr(args, flag, getattr(args, flag) * (rows / before) ** 0.5)
    changed = " ".join(f"--{flag}={getattr(args, flag):g}" for flag in rates)
    print0(
        f"{num_rows:,} rows are few for steps of {before:,}; to take at least {MIN_STEPS}: "
        f"--total_batch_size={args.total_batch_size} {changed}"
    )
    return True


def _settle(
    args: ConversationFlags, model: Any, info: distributed.DistInfo
) -> tuple[int, Mode] | None:
    """settle() of plan.py for the batch as it is now; None where nothing will be trained."""
    if args.preview:
        return None
    settled = settle(
        args, model.config, info, args.total_batch_size // args.max_seq_len, args.max_seq_len
    )
    grad_accum_steps(args.total_batch_size, settled[0], args.max_seq_len, info.world_size)
    return settled


def num_steps_of(args: ConversationFlags, num_rows: int) -> int:
    """Optimizer steps: as typed, or so many epochs of so many rows."""
    if args.num_iterations > 0:
        return args.num_iterations
    rows_per_step = args.total_batch_size // args.max_seq_len
    num_steps = max(1, round(args.num_epochs * num_rows / rows_per_step))
    if num_steps < FEW_STEPS:
        warn0(
            f"--num_epochs={args.num_epochs:g} is over in {num_steps} steps of "
            f"--total_batch_size={args.total_batch_size:,} tokens; a smaller batch or more "
            "epochs give the model more steps to learn in"
        )
    return num_steps


def _train(args: ConversationFlags, stage: str, start: Start, info: distributed.DistInfo) -> None:
    tokenizer, model = start.tokenizer, start.model
    bos = tokenizer.get_bos_token_id()
    inherited = inherit(args, start)
    settled = _settle(args, model, info)
    seq_len = args.max_seq_len

    # What there is to learn from
    mixture, val_mixture, validation = load_mixtures(args)
    chat_tasks = load_chat_tasks(args)
    source = ConversationSource(mixture, tokenizer, seq_len + 1)
    reader = RowReader(source, seq_len + 1, args.seed, bos)
    num_rows = reader.rows_per_epoch()
    if fit_batch(args, inherited, num_rows, info.world_size):
        settled = _settle(args, model, info)
    if settled is None:
        return preview_conversations(mixture, source, reader, tokenizer, validation)
    model = start.place(args, info, settled[1])
    print0(f"{mixture.describe(source.counts)}\n{source.account()}\nvalidation: {validation}")
    val_reader = None
    if val_mixture is not None:
        val_source = ConversationSource(val_mixture, tokenizer, seq_len + 1)
        val_reader = RowReader(val_source, seq_len + 1, 0, bos)
    num_steps, rows_per_step = num_steps_of(args, num_rows), args.total_batch_size // seq_len
    optimizer = optimizer_of(args, start, info)
    run_tokens = num_steps * args.total_batch_size // info.world_size
    train_step = TrainStep(args, info, model, optimizer, run_tokens)
    micro_batch = confirm(settled, train_step, rows_per_step, seq_len)
    args.device_batch_size = micro_batch
    loader = StepLoader(reader, rows_per_step, micro_batch, info.rank, info.world_size, info.device)
    meta = start.describe(
        source.fingerprint,
        validation,
        optimizer_from=start.name if optimizer.num_steps else None,  # cold
        mixture=" | ".join(filter(None, [args.mixture, args.data])),
        shares=mixture.shares(source.counts),
    )
    trainer = Trainer(stage, args.model_tag or start.tag, train_step, num_steps, meta, loader)
    for step in trainer.steps():
        if val_reader is not None and trainer.is_due(args.eval_every, at_start=True):
            trainer.record(val_loss=validation_loss(args, trainer, val_reader, micro_batch))
        if chat_tasks and trainer.is_due(args.chat_eval_every, at_start=True):
            trainer.record("eval", **chat_metrics(args, trainer, tokenizer, chat_tasks))
        if trainer.is_due(args.sample_every, at_start=True):
            with gathered(model):
                if info.rank == 0:
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


def chat_metrics(
    args: ConversationFlags, trainer: Trainer, tokenizer: object, tasks: Sequence[Task]
) -> dict[str, float]:
    """Share of each task's problems solved, its standard error, and how many there were. Greedy,
    and always the same problems. All ranks must call it."""
    engine = Engine(trainer.model, tokenizer)
    metrics: dict[str, float] = {}
    for task in tasks:
        with trainer.autocast():
            result = run_chat_eval(
                task, trainer.model, tokenizer, engine, batch_size=CHAT_EVAL_BATCH,
                max_new_tokens=args.chat_eval_max_new_tokens,
                max_problems=args.chat_eval_problems, seed=args.seed, stopped=trainer.stopping,
            )  # fmt: skip
        name = re.sub(r"[^\w.-]+", "_", task.name)  # it may be a path
        metrics |= {name: result.accuracy, f"{name}_stderr": result.stderr}
        metrics[f"{name}_problems"] = result.n
    return metrics


def sample_replies(trainer: Trainer, tokenizer: object, prompts: str) -> None:
    """Prints and logs greedy replies to a few questions (rank 0)."""
    engine = Engine(trainer.model, tokenizer)
    for prompt in filter(None, prompts.split("|")):
        conversation = {"messages": [{"role": "user", "content": prompt}]}
        ids = engine.tokenizer.render_for_completion(conversation)
        sequences, _ = engine.generate_batch(ids, max_tokens=64, temperature=0)
        text = engine.tokenizer.decode(sequences[0])
        trainer.log("sample", text=text)
        print0(text)
