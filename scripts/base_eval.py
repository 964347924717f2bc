"""
Evaluates a base model: the CORE benchmark, bits per byte on training and validation text, samples.

    python -m scripts.base_eval
    python -m scripts.base_eval --model_tag=d20 --eval=core --max_per_task=500
    python -m scripts.base_eval --hf=openai-community/gpt2 --eval=core  # a folder does, too
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval

CORE reads $NANOCHAT_BASE_DIR/eval_bundle, which is downloaded if it is not there. One row is
appended to report/base_eval.jsonl; every CORE question with its prediction is in report/base_eval/.
"control" is what the same predictions score on other questions, "majority" what the commonest
answer scores: what is not above them is habit, not knowledge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from nanochat import distributed, flags
from nanochat.checkpoint import load_model
from nanochat.common import UserError, append_jsonl, get_base_dir, is_rank0, print0
from nanochat.dataloader import RowReader, eval_batches
from nanochat.dataset import split_files
from nanochat.engine import Engine
from nanochat.evals.bpb import evaluate_bpb
from nanochat.evals.bundle import ensure_bundle
from nanochat.evals.core import evaluate_core, read_bundle
from nanochat.evals.hf_folder import TransformersModel, load_hf
from nanochat.precision import autocast
from nanochat.text_source import TextSource

KINDS = ("core", "bpb", "sample")
CORE_KEYS = ("results", "centered", "n", "stderr", "chance", "control", "majority")
PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "If 5*x + 3 = 13, then x is",
)


@dataclass
class Args(flags.CacheFlags, flags.PrecisionFlags):
    """Evaluate a base model."""

    source: Annotated[flags.Source, flags.alias("-i")] = "base"
    """Stage of the model: base, mid, sft, rl or dpo."""
    model_tag: Annotated[str | None, flags.alias("-g")] = None
    """Tag of the model; default: the newest."""
    step: Annotated[int | None, flags.alias("-s")] = None
    """Step of the checkpoint; default: the last."""
    hf: str | None = None
    """Evaluate this Hugging Face folder or model of the hub instead. Not an architecture of ours:
    run by transformers, if installed."""
    eval: str = ",".join(KINDS)
    """What to measure, joined by commas: core, bpb, sample."""
    max_per_task: int = -1
    """Items of each CORE task; -1: all."""
    split_tokens: int = 40 * 524_288
    """Tokens of training and of validation text that bits per byte is measured on."""
    device_batch_size: int = 32
    """Rows of text at a time on one process."""
    data: str | None = None
    """File, folder or glob of text; default: base_data/."""
    val_data: str | None = None
    """Validation file; default: as in training."""


def main(args: Args) -> None:
    with distributed.session(args.device_type) as info:
        evaluate(args, info)


def evaluate(args: Args, info: distributed.DistInfo) -> dict[str, Any]:
    """Measures what --eval asks for, and appends it as one row."""
    wanted = [kind.strip() for kind in args.eval.split(",") if kind.strip()]
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown or not wanted:
        raise UserError(f"--eval={args.eval}: choose of {', '.join(KINDS)}, joined by commas")
    # What may be missing is looked for first: loading a model takes a while
    bundle = ensure_bundle(get_base_dir() / "eval_bundle") if "core" in wanted else None
    if bundle is not None:
        read_bundle(bundle)
    files = split_files(args.data, args.val_data) if "bpb" in wanted else None
    stage = args.source if args.hf is None else "hf"
    if args.hf is not None:
        model, tokenizer, meta = load_hf(args.hf, info.device)
    else:
        model, tokenizer, meta = load_model(args.source, info.device, args.model_tag, args.step)
    print0(f"evaluating {stage} {meta['tag']}, step {meta['step']}")
    run_name = f"{stage}_{meta['tag']}_{meta['step']}"
    row: dict[str, Any] = {
        "source": stage,
        "model_tag": meta["tag"],
        "step": meta["step"],
        "typed": flags.typed(args),
    }

    if "sample" in wanted and info.rank == 0:
        row["samples"] = samples(model, tokenizer)
        for text in row["samples"]:
            print0(f"  {text!r}")

    if files is not None:
        # One file of training text is enough to compare with, and tokenizing all takes long
        for split, paths, keep in (
            ("train", files.train[:1], files.keep_train), ("val", [files.val], files.keep_val),
        ):  # fmt: skip
            source = TextSource(paths, tokenizer, keep, args.token_cache_dir, args.stream)
            row_len = model.config.sequence_len + 1
            reader = RowReader(source, row_len, 0, tokenizer.get_bos_token_id())
            batches = eval_batches(
                reader, args.split_tokens, args.device_batch_size, info.rank, info.world_size,
                info.device,
            )  # fmt: skip
            with autocast(info.device, args.dtype):
                found = evaluate_bpb(model, batches, tokenizer.token_bytes)
            row |= {f"{split}_{key}": value for key, value in found._asdict().items()}
            print0(
                f"{split} bits per byte: {found.bpb:.4f} +- {found.stderr:.4f} "
                f"({found.num_bytes:,} bytes)"
            )

    if bundle is not None:
        items_dir = get_base_dir() / "report" / "base_eval" / run_name
        with autocast(info.device, args.dtype):
            core = evaluate_core(model, tokenizer, bundle, args.max_per_task, items_dir=items_dir)
        row.update(core_row(core), items=str(items_dir.relative_to(get_base_dir())))
        print0(f"every question with its prediction: {items_dir}")

    if is_rank0():
        append_jsonl(get_base_dir() / "report" / "base_eval.jsonl", row)
    return row


def core_row(core: dict[str, Any]) -> dict[str, Any]:
    """evaluate_core's outcome as the row keeps it; says what it comes to."""
    tasks = {label: {key: core[key][label] for key in CORE_KEYS} for label in core["results"]}
    above = sum(
        t["results"] - 2 * t["stderr"] > max(t["chance"], t["control"], t["majority"])
        for t in tasks.values()
    )
    print0(
        f"CORE {core['core_metric']:.4f} +- {core['core_stderr']:.4f}; {above} of {len(tasks)} "
        "tasks are two standard errors above chance, control and majority"
    )
    return {
        "core_metric": core["core_metric"], "core_stderr": core["core_stderr"], "core_tasks": tasks,
    }  # fmt: skip


def samples(model: Any, tokenizer: Any) -> list[str]:
    """How the model goes on with PROMPTS, and four texts of its own."""
    bos = tokenizer.get_bos_token_id()
    prompts = [tokenizer.encode(prompt, prepend=bos) for prompt in PROMPTS]
    if isinstance(model, TransformersModel):
        torch.manual_seed(0)
        found = model.generate_batch(prompts, 1, 16, 0.0) + model.generate_batch(
            [[bos]], 4, 64, 1.0
        )
    else:
        engine = Engine(model, tokenizer)
        found, _ = engine.generate_batch(prompts, max_tokens=16, temperature=0)
        found += engine.generate_batch([bos], num_samples=4, max_tokens=64, temperature=1.0)[0]
    return [tokenizer.decode(ids[1:]) for ids in found]


if __name__ == "__main__":
    flags.run(main, Args)
