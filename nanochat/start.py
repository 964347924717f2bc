"""
Where a run begins: at a checkpoint of another run, or at its own.

Finetuning starts from what another stage made, and mid and SFT go on as that was trained: optimizer
state, batch, rates. Pretraining may go on from another base model. A run that was stopped resumes
its own newest whole checkpoint, and must be the run it was: the same data, batch, rates, seed. What
differs is refused by name, unless --allow_changes says it is meant. Floor 3.5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint import (
    check_manifest,
    checkpoint_tokenizer,
    claim,
    find_checkpoint,
    list_tags,
    load_weights,
    newest_whole,
    optim_reader,
    read_meta,
    stage_dir,
    step_dir,
    tidy,
    weights_id,
)
from nanochat.common import UserError, print0, warn0
from nanochat.distributed import DistInfo, rank_and_world, sum_over_ranks
from nanochat.flags import FinetuneFlags, InheritedFlags, TrainFlags
from nanochat.lora import LoraFlags, adapt
from nanochat.models import Config, build_model, config_from_dict, config_to_dict
from nanochat.optim import MuonAdamW, make_optimizer
from nanochat.recompute import Mode
from nanochat.retokenize import retrain_embeddings
from nanochat.shard import build_for
from nanochat.tokenizer import Tokenizer

# base_train's rates are for new weights. Somebody else's run has ended at a decayed rate, usually a
# tenth of its peak (as in Hoffmann et al., arXiv 2203.15556); from there an import goes on.
IMPORT_LR_FRAC = 0.1
# Tokens a step where the checkpoint does not say: few, as own conversations often are.
UNKNOWN_BATCH_SIZE = 65_536


@dataclass
class Start:
    """What a finetuning stage starts from."""

    model: Any  # on the meta device, without weights, while it is not decided how they are shared
    tokenizer: Any
    meta: dict[str, Any]  # of the checkpoint
    tag: str  # of the checkpoint
    name: str  # stage, tag, step and weights, for the checkpoints of the run that starts here
    folder: Path  # of the checkpoint

    def place(self, args: TrainFlags, info: DistInfo, mode: Mode) -> Any:
        """The model with its weights, shared out as settle() has decided (args.shard and `mode` of
        recompute). All ranks must call it."""
        if self.model.get_device().type == "meta":
            self.model = build_for(args, self.model.config, info, mode)
            load_weights(self.folder, self.model)
        return self.model

    def describe(self, train_data: str, validation: str, **more: Any) -> dict[str, Any]:
        """meta of the run that starts here, for the Trainer: the fingerprint of what it learns
        from, what it is validated on in words, and what the stage adds."""
        data = {"train": train_data}
        name = self.meta["tokenizer"]
        return run_meta(name, self.tokenizer, data, self.name, validation) | more


def run_meta(
    tokenizer_name: str | None,
    tokenizer: Any,
    data: dict[str, str],
    started_from: str | None,
    validation: str,
) -> dict[str, Any]:
    """What a run of any stage says of itself in its checkpoints. `data`: fingerprints by role."""
    return {
        "tokenizer": tokenizer_name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data": data,
        "started_from": started_from,
        "validation": validation,
    }


def start_from(
    source: str, source_tag: str | None, args: FinetuneFlags, device: torch.device
) -> Start:
    """Loads a stage's checkpoint, ready to train on: source_tag's, or --model_tag's if the stage
    has one of that name, or the newest. Where several ranks may share out the weights they are not
    read yet: see Start.place."""
    tag = source_tag or (args.model_tag if args.model_tag in list_tags(source) else None)
    folder = find_checkpoint(source, tag, args.step)
    meta = read_meta(folder)
    tokenizer = checkpoint_tokenizer(meta, folder)
    later = rank_and_world()[1] > 1 and args.shard not in ("none", "zero") and not args.preview
    config = config_from_dict(meta["config"], str(folder))
    model = build_model(config, "meta" if later else device)
    if not later:
        load_weights(folder, model)
    print0(f"starting from {folder}")
    return Start(model, tokenizer, meta, folder.parent.name, _name(source, folder), folder)


def lr_frac(asked: float, meta: dict[str, Any] | None) -> float:
    """--init_lr_frac as it was asked for; of -1, what suits new weights (no `meta`), a base model
    of ours, or an import."""
    if asked >= 0:
        return asked
    return IMPORT_LR_FRAC if meta is not None and "imported" in meta else 1.0


def inherit(args: InheritedFlags, start: Start) -> list[str]:
    """Fills in the InheritedFlags that were not typed, says with what, and returns their names.

    Rates are those of the peak, as the checkpoint's run was told: it ended at a decayed one, and
    --init_lr_frac says where this run begins. What the checkpoint does not say is base_train's
    default, for rates of an import IMPORT_LR_FRAC of it."""
    inherited: list[str] = []
    defaults: list[str] = []
    names = [
        flag for flag in InheritedFlags.__annotations__ if getattr(args, flag) < 0
    ]  # not typed
    for flag in names:
        value, is_known = _trained_with(flag, start)
        setattr(args, flag, value)
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        (inherited if is_known else defaults).append(f"--{flag}={shown}")
    if inherited:
        print0(f"as the model was trained: {' '.join(inherited)}")
    if defaults:
        print0(f"the checkpoint does not say, so by default: {' '.join(defaults)}")
    return names


def _trained_with(flag: str, start: Start) -> tuple[Any, bool]:
    """(a flag's value in the run that made the checkpoint, True), or (a default, False)."""
    args = start.meta.get("args", {})
    known = {**args, "max_seq_len": start.model.config.sequence_len}.get(flag)
    if known is not None and known >= 0:
        # base_train's --init_lr_frac lowers its peak; that of mid and SFT is for themselves
        is_scaled = flag.endswith("_lr") and start.meta.get("stage") == "base"
        return known * (args.get("init_lr_frac", 1.0) if is_scaled else 1), True
    if flag == "total_batch_size":
        return UNKNOWN_BATCH_SIZE, False
    default = getattr(TrainFlags, flag)
    return default * (lr_frac(-1, start.meta) if flag.endswith("_lr") else 1), False


def optimizer_of(args: FinetuneFlags, start: Start, info: DistInfo) -> MuonAdamW:
    """The optimizer of a finetuning stage, for the model in its place. With --lora_rank, of the
    matrices that are added to the model here; else of all weights: a new one, or where the stage
    goes on as the model was trained (InheritedFlags), with the state that the checkpoint has of it.
    All ranks must call it."""
    if isinstance(args, LoraFlags) and args.lora_rank:
        return adapt(start.model, args)
    rates = (args.embedding_lr, args.unembedding_lr, args.matrix_lr, args.weight_decay)

    def make() -> MuonAdamW:
        return make_optimizer(start.model, *rates, args.init_lr_frac, shard=args.shard)

    if isinstance(args, InheritedFlags):
        return continued_optimizer(make, args, start, info.device)
    return make()


def continued_optimizer(
    make: Callable[[], MuonAdamW], args: InheritedFlags, start: Start, device: torch.device
) -> MuonAdamW:
    """A new optimizer with the state of the checkpoint's: momentum, second moments, steps taken.

    A cold one where it has none (an import), another kind's (an earlier version of ours, RL), or
    --load_optimizer=0; one line says so. The state knows nothing of the number of ranks. All ranks
    must call it."""
    optimizer, reason = make(), ""
    if args.load_optimizer == 0:
        reason = "--load_optimizer=0"
    elif "imported" in start.meta:
        reason = f"{start.folder} was imported, without one"
    elif start.meta.get("args", {}).get("lora_rank"):
        reason = "the checkpoint's is of LoRA's matrices, which are merged now"
    elif start.meta.get("stage") in ("rl", "dpo"):
        reason = f"{start.meta['stage'].upper()}'s is of other gradients"
    else:
        steps = start.meta.get("optimizer_steps", 0)
        try:
            optimizer.load_state_dict(optim_reader(start.folder), steps)
        except UserError as e:
            reason = str(e)
    # Each rank reads its own part: what one of them lacks, all go without
    if sum_over_ranks(float(bool(reason)), device=device)[0] > 0:
        optimizer = make()
        print0(f"optimizer: cold start ({reason or 'not all ranks could read its state'})")
    else:
        print0(f"optimizer: warm start, with the state after {optimizer.num_steps:,} steps")
    return optimizer


def base_meta(tag: str) -> dict[str, Any]:
    """Of the base model of that tag: what a run needs to know before it builds its own."""
    # load_base will compare the files' hashes, which takes long, and before it trains
    return read_meta(find_checkpoint("base", tag), check=False)


def continued_config(meta: dict[str, Any], tokenizer: Tokenizer, sequence_len: int) -> Config:
    """The shape of that base model, with rows of `sequence_len` tokens; for another tokenizer with
    another vocabulary."""
    config = config_from_dict(meta["config"])
    same = tokenizer.fingerprint == meta["tokenizer_fingerprint"]
    rows = config.vocab_size if same else tokenizer.get_vocab_size()
    return replace(config, sequence_len=sequence_len, vocab_size=rows)


def load_base(tag: str, model: Any, tokenizer: Tokenizer, new_tokenizer: bool = False) -> str:
    """Continued pretraining: fills `model` with the base weights of that tag; returns their name.

    Only the row length may differ, and with `new_tokenizer` (--retrain_embeddings) the vocabulary.
    UserError for another shape or another tokenizer."""
    folder = find_checkpoint("base", tag)
    meta = read_meta(folder)
    old = checkpoint_tokenizer(meta, folder)
    other = old.fingerprint != tokenizer.fingerprint
    if other and not new_tokenizer:
        raise UserError(
            f"--source_tag={tag}: {folder} was trained with --tokenizer={meta['tokenizer']}. To go "
            "on with another tokenizer, and new embeddings, say --retrain_embeddings"
        )
    there = config_from_dict(meta["config"], str(folder))
    rows = model.config.vocab_size if other else there.vocab_size
    if replace(there, sequence_len=model.config.sequence_len, vocab_size=rows) != model.config:
        raise UserError(
            f"--source_tag={tag}: {folder} holds {there}, but --arch and --depth ask for "
            f"{model.config}"
        )
    print0(f"starting from {folder}")
    if other:
        source = build_model(there)
        load_weights(folder, source)
        print0(retrain_embeddings(source, old, model, tokenizer))
    else:
        load_weights(folder, model)
        if new_tokenizer:
            warn0("--retrain_embeddings: the tokenizer is the same, all rows are carried over")
    return _name("base", folder)


def _name(source: str, folder: Path) -> str:
    return f"{source} {folder.parent.name} {folder.name} ({weights_id(folder)})"


# -------------------------------------------------------------------------------------------------
# Resuming


# Flags that may differ when a run is resumed. Every other one decides what is learned and must be
# as it was.
FREE_ON_RESUME = frozenset(
    [
        # where it runs, how it is shown, when it is measured and saved
        "run", "model_tag", "rank_timeout", "device_type", "device_batch_size",
        "activation_checkpointing", "dtype", "compile", "shard", "shard_size", "preview", "resume",
        "repeats", "dry_run", "resume_from_step", "allow_changes", "token_cache_dir", "stream",
        "eval_every", "eval_tokens", "eval_examples", "eval_samples", "val_mixture",
        "core_metric_every", "core_metric_max_per_task", "sample_every", "sample_prompts",
        "save_every", "keep_last", "chat_eval_every", "chat_eval_tasks", "chat_eval_problems",
        "chat_eval_max_new_tokens",
        # compared by what comes of them: shape, number of steps, fingerprints, starting weights
        "arch", "depth", "tokenizer", "data", "val_data", "mixture", "task", "num_iterations",
        "num_epochs", "target_flops", "target_tokens", "target_param_data_ratio", "source",
        "source_tag", "step",
    ]
)  # fmt: skip


def identity(args: TrainFlags, model: Any, num_steps: int, meta: dict[str, Any]) -> dict[str, Any]:
    """What decides the outcome of a run, by the name of the flag or part: all flags but those of
    FREE_ON_RESUME, and for some of those what came of them."""
    flags = {f"--{k}": v for k, v in asdict(args).items() if k not in FREE_ON_RESUME}
    result = {
        **flags,
        "architecture and shape": config_to_dict(model.config),
        "--num_iterations": num_steps,
        "--tokenizer": meta["tokenizer_fingerprint"],
        "starting checkpoint": meta.get("started_from"),
        **{f"{role} data": fingerprint for role, fingerprint in meta["data"].items()},
    }
    return json.loads(json.dumps(result))  # as it will come back from the checkpoint


def find_resumable(
    stage: str, tag: str, args: TrainFlags, info: DistInfo
) -> tuple[Path, dict[str, Any]] | None:
    """(folder, meta) of the checkpoint that --resume or --resume_from_step asks for.

    --resume takes the newest whole one and passes over damaged ones with a warning; None if there
    is none yet, so that the same command starts a run and continues it. A step that was named must
    be there and whole."""
    wanted = args.resume_from_step
    if not args.resume and wanted < 0:
        return None
    found = 0
    if info.rank == 0:  # the others would read the same gigabytes
        claim(stage, tag)
        tidy(stage_dir(stage) / tag)
        found = wanted if wanted >= 0 else newest_whole(stage, tag)
        if wanted >= 0:
            check_manifest(find_checkpoint(stage, tag, wanted))
    found = int(sum_over_ranks(found, device=info.device)[0])
    if found < 0:
        print0(f"--resume: {stage_dir(stage) / tag} holds no checkpoint yet; starting afresh")
        return None
    folder = step_dir(stage, tag, found)
    meta = read_meta(folder, check=False)
    if "imported" in meta:
        raise UserError(
            f"{folder} was imported: it is no run that could be resumed. Start one from it: "
            f"--source_tag={tag}, with another --model_tag"
        )
    return folder, meta


def _change(name: str, then: Any, now: Any) -> str:
    """What became of one part of an identity; of a model's shape only what is another."""
    if isinstance(then, dict) and isinstance(now, dict):
        both = [key for key in now if key in then and then[key] != now[key]]
        if both:
            then, now = ({key: value[key] for key in both} for value in (then, now))
    return f"{name} was {then}, now it is {now}"


def refuse_changes(
    folder: Path, then: dict[str, Any], now: dict[str, Any], allowed: str, doing: str = "resume"
) -> None:
    """Compares identities; raises UserError naming what differs and is not among `allowed`
    (names joined by |)."""
    names = {name.strip() for name in allowed.split("|")} - {""}
    if unknown := sorted(names - now.keys()):
        raise UserError(
            f"--allow_changes: {', '.join(unknown)} is nothing that is compared; that is "
            f"{', '.join(now)}"
        )
    changed = {n: _change(n, then[n], now[n]) for n in now if then.get(n, now[n]) != now[n]}
    refused = [text for name, text in changed.items() if name not in names]
    if refused:
        raise UserError(
            f"cannot {doing} {folder}: its {'; its '.join(refused)}. Use the same as then, start a "
            f'new run with another --model_tag, or say --allow_changes="{"|".join(changed)}"'
        )
    for text in changed.values():
        warn0(f"this is no longer the run it was, as --allow_changes says: its {text}")
