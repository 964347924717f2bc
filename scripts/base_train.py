"""
Pretrains a base model on text: the first and longest stage.

    python -m scripts.base_train --depth=4 --max_seq_len=256 --device_batch_size=8 \
        --total_batch_size=4096 --num_iterations=200
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --run=d20

--depth sets the size of the model; --arch its kind (gpt, qwen2.5, or a published Qwen2.5 size). The
length follows from --num_iterations, --target_flops or --target_param_data_ratio, the first that
is set. Checkpoints go to base_checkpoints/<tag>/, with the log of the run, which can repeat it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat import distributed, flags
from nanochat.common import UserError, get_base_dir, print0
from nanochat.dataloader import RowReader, StepLoader, eval_batches, eval_rows
from nanochat.dataset import split_files
from nanochat.engine import Engine
from nanochat.evals.bpb import evaluate_bpb
from nanochat.evals.bundle import ensure_bundle
from nanochat.evals.core import evaluate_core, read_bundle
from nanochat.models import build_model, make_config
from nanochat.optim import make_optimizer
from nanochat.plan import settle
from nanochat.preview import preview_text
from nanochat.recipe import settle_horizon
from nanochat.schedule import (
    decay_multiplier,
    grad_accum_steps,
    lr_multiplier,
    muon_momentum,
)
from nanochat.shard import build_for, gathered
from nanochat.start import base_meta, continued_config, load_base, lr_frac, run_meta
from nanochat.step import TrainStep
from nanochat.text_source import TextSource
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.train import Trainer
from nanochat.trial import confirm

SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "My favorite color is",
)


@dataclass
class Args(flags.HorizonFlags, flags.CacheFlags):
    """Pretrain a base model."""

    arch: str | None = None
    """gpt (default), qwen2.5 (both sized by --depth), or qwen2.5-0.5b, -1.5b, -3b, -7b."""
    depth: int | None = None
    """Transformer layers (default: 20); width is 64 times as much, and all else follows."""
    source_tag: str | None = None
    """Base model to go on from, with its shape and tokenizer; default: new weights."""
    init_lr_frac: float = -1.0
    """Learning rates start at this share of the values above. -1: all of it, but 0.1 where
    --source_tag was imported: its own training ended near a tenth of its peak, and the rates for
    new weights would undo much of it."""
    max_seq_len: int = 2048
    """Tokens in a row."""
    tokenizer: str | None = None
    """Default: that of --source_tag, else our own, from scripts.tok_train. Or qwen2.5, a name in
    tokenizers/, or a folder with a tokenizer.json."""
    retrain_embeddings: bool = False
    """Go on from --source_tag with another --tokenizer: rows of tokens that both have are carried
    over, others begin with the mean of their pieces' rows."""
    data: str | None = None
    """Text: a file, folder or glob of parquet, jsonl(.gz, .zst) with `text`, or txt. Default:
    base_data/."""
    val_data: str | None = None
    """Validation file; default: the last file of --data, pinned at first use."""
    core_metric_every: int = 2000
    """Steps between CORE evaluations; -1: never."""
    core_metric_max_per_task: int = 500
    """Items of each CORE task; -1: all."""
    sample_every: int = 2000
    """Steps between samples; -1: only at the end."""
    sample_prompts: str = "|".join(SAMPLE_PROMPTS)
    """Beginnings to continue in samples, separated by |."""


def main(args: Args) -> None:
    # Looking at data needs no GPU
    device_type = "cpu" if args.preview else args.device_type
    with distributed.session(device_type, args.seed, args.deterministic, args.rank_timeout) as info:
        train(args, info)


def train(args: Args, info: distributed.DistInfo) -> None:
    if args.retrain_embeddings and not args.source_tag:
        raise UserError("--retrain_embeddings needs a --source_tag, whose embeddings to begin with")
    # What there is to learn from
    source_meta = base_meta(args.source_tag) if args.source_tag else None
    if source_meta is not None and not args.retrain_embeddings:
        args.tokenizer = args.tokenizer or source_meta["tokenizer"]
    tokenizer = get_tokenizer(args.tokenizer)
    bos = tokenizer.get_bos_token_id()
    files = split_files(args.data, args.val_data)
    row_len = args.max_seq_len + 1  # a row's targets are its tokens one further on
    cache = (args.token_cache_dir, args.stream)
    source = TextSource(files.train, tokenizer, files.keep_train, *cache)
    val_source = TextSource([files.val], tokenizer, files.keep_val, *cache)
    reader = RowReader(source, row_len, args.seed, bos)
    val_reader = RowReader(val_source, row_len, 0, bos)
    if args.preview:
        return preview_text(files, reader, tokenizer)

    bundle = get_base_dir() / "eval_bundle"
    if args.core_metric_every > 0:  # missing data should be known before, not after hours
        read_bundle(ensure_bundle(bundle))

    # The model, its optimizer, and how long it trains
    if source_meta is not None and args.arch is None and args.depth is None:
        config = continued_config(source_meta, tokenizer, args.max_seq_len)
        default_tag = f"{args.source_tag}-cpt"  # continued pretraining, as the field has it
    else:
        args.arch = args.arch or "gpt"
        args.depth = 20 if args.depth is None else args.depth
        config, default_tag = make_config(
            args.arch, args.depth, tokenizer.get_vocab_size(), args.max_seq_len
        )
    num_steps = settle_horizon(
        args, build_model(config, "meta"), args.max_seq_len * info.world_size
    )
    eval_rows(val_reader, args.eval_tokens)  # likewise; tokenizes, so after flags are looked at
    rows_per_step = args.total_batch_size // args.max_seq_len
    settled = settle(args, config, info, rows_per_step, args.max_seq_len)
    grad_accum_steps(args.total_batch_size, settled[0], args.max_seq_len, info.world_size)
    model = build_for(args, config, info, settled[1], args.seed)
    started_from = None
    if args.source_tag:
        started_from = load_base(args.source_tag, model, tokenizer, args.retrain_embeddings)
    args.init_lr_frac = lr_frac(args.init_lr_frac, source_meta)
    optimizer = make_optimizer(
        model, args.embedding_lr, args.unembedding_lr, args.matrix_lr, args.weight_decay,
        args.init_lr_frac, args.scalar_lr, args.shard,
    )  # fmt: skip
    run_tokens = num_steps * args.total_batch_size // info.world_size
    train_step = TrainStep(args, info, model, optimizer, run_tokens)
    args.device_batch_size = confirm(settled, train_step, rows_per_step, args.max_seq_len)
    reader.expect(num_steps * rows_per_step)
    loader = StepLoader(
        reader,
        rows_per_step,
        args.device_batch_size,
        info.rank,
        info.world_size,
        info.device,
    )
    data = {"train": source.fingerprint, "val": val_source.fingerprint}
    trainer = Trainer(
        "base", args.model_tag or default_tag, train_step, num_steps,
        run_meta(args.tokenizer, tokenizer, data, started_from, files.validation), loader,
    )  # fmt: skip
    # Step by step
    for step in trainer.steps():
        if trainer.is_due(args.eval_every, at_start=True):
            batches = eval_batches(
                val_reader, args.eval_tokens, args.device_batch_size, info.rank, info.world_size,
                info.device,
            )  # fmt: skip
            batches = trainer.until_stopping(batches)
            with trainer.autocast():
                measured = evaluate_bpb(model, batches, tokenizer.token_bytes)
            trainer.record(val_bpb=measured.bpb)
        if args.core_metric_every > 0 and trainer.is_due(args.core_metric_every):
            with trainer.autocast():
                core = evaluate_core(
                    model, tokenizer, bundle, args.core_metric_max_per_task,
                    stopped=trainer.stopping,
                )  # fmt: skip
            trainer.record(core_metric=core["core_metric"])
        if trainer.is_due(args.sample_every):
            with gathered(model):
                if info.rank == 0:
                    sample(trainer, tokenizer, args.sample_prompts)
        if trainer.is_due(args.save_every):
            trainer.save()
        if step == num_steps:
            continue  # nothing more to train on; the Trainer ends the run
        lr_mul = lr_multiplier(
            step, num_steps, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac
        )
        batches_of_step = loader.step(step)
        for shard in reader.opened():
            trainer.log("shard", **shard)
        decay = decay_multiplier(step, num_steps)
        trainer.step(batches_of_step, lr_mul, muon_momentum(step), decay)


def sample(trainer: Trainer, tokenizer: Tokenizer, prompts: str) -> None:
    """Prints and logs how the model goes on from a few beginnings (rank 0)."""
    engine = Engine(trainer.model, tokenizer)
    for prompt in prompts.split("|"):
        ids = tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id())
        sequences, _ = engine.generate_batch(ids, max_tokens=16, temperature=0)
        text = tokenizer.decode(sequences[0])
        trainer.log("sample", text=text)
        print0(text)


if __name__ == "__main__":
    flags.run(main, Args)
