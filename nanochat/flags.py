"""
Command lines: a dataclass of typed fields becomes `--flag=value`, with tyro doing the work.

A script writes

    @dataclass
    class Args(TrainFlags):
        depth: int = 20
        \"\"\"Transformer layers; the one dial everything else follows.\"\"\"

    if __name__ == "__main__":
        flags.run(main, Args)

The text under a field is its help. Dashes and underscores are the same, `--flag value` and
`--flag=value` too, and a lone `--` (torchrun's separator) is skipped. Every command takes --debug,
which shows the traceback of an error. Floor 0.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import tyro

from nanochat import errors, flag_errors, rank_log
from nanochat.common import UserError, print0

T = TypeVar("T")

DEBUG = "--debug"  # shows tracebacks; every command has it

Source = Literal["base", "mid", "sft", "rl", "dpo"]

# Seconds that ranks wait for one another, as NCCL has it by default: longer than what one rank does
# alone while the others wait (samples, a shard, compiling), and what a lost host can cost at most
RANK_TIMEOUT = 600.0


def alias(*names: str) -> Any:
    """Annotation that gives a flag short names: `steps: Annotated[int, alias("-s")] = 1`."""
    return tyro.conf.arg(aliases=names)


def parse(args_class: type[T], argv: Sequence[str] | None = None) -> T:
    """Parses `argv` (default: the process's own).

    UserError for what it cannot be. Flags that there are not go to a class's attribute `passed_on`
    (no field) if it has one, for the program that it starts. --debug is every command's and no
    field: run() looks for it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--" in words:
        words.remove("--")
    words = [_expanded(word) for word in words if word != DEBUG]
    command = _command(args_class)
    if not {"-h", "--help"} & set(words):
        flag_errors.check_words(args_class, words)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args, rest = tyro.cli(
                args_class, prog=command, description=_help(args_class), args=words,
                return_unknown_args=True,
            )  # fmt: skip
    except SystemExit as e:
        if e.code:
            raise flag_errors.refused(args_class, command, words, said.getvalue()) from None
        raise  # --help
    if hasattr(args_class, "passed_on"):
        vars(args)["passed_on"] = rest
    elif rest:
        raise flag_errors.unknown(args_class, command, words, rest)
    flag_errors.check_values(args)
    vars(args)["typed"] = words  # no field: asdict() and comparisons do not see it
    return args


def _expanded(word: str) -> str:
    """--out=~/x as --out ~/x would have come: bash puts the home folder in at the start of a word
    only, and a folder named "~" is a trap."""
    flag, _, value = word.partition("=")
    is_path = flag.startswith("-") and (value == "~" or value.startswith("~/"))
    return f"{flag}={os.path.expanduser(value)}" if is_path else word


def _command(args_class: type) -> str:
    """What one types to run the program whose flags these are: "python -m scripts.base_train"."""
    module = args_class.__module__
    if module == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is None:
            return f"python {sys.argv[0]}"
        module = spec.name
    return f"python -m {module.removesuffix('.__main__')}"


def _help(args_class: type) -> str:
    said = inspect.cleandoc(args_class.__doc__ or "")
    if said.startswith(f"{args_class.__name__}("):  # what @dataclass writes where there is none
        said = ""
    return f"{said}\n\n{DEBUG} shows where an error comes from (its traceback).".strip()


def typed(args: Any) -> list[str] | None:
    """The words of the command line that `args` were parsed from; None if they were not."""
    return vars(args).get("typed")


def run(main: Callable[[T], Any], args_class: type[T], argv: Sequence[str] | None = None) -> None:
    """Parses the command line and calls main(args). Whatever it raises ends as one readable
    message and a status that is not 0: see errors.py, and rank_log.py for several ranks, of which
    the one that fails first is heard, also if it fails alone (a file missing on one node). A class
    with an attribute `errors_as_json` (no field) gets {"error": ...} where --json was typed."""
    debug = DEBUG in (sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us: what is said goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        rank_log.start(debug)
        main(parse(args_class, argv))
        sys.stdout.flush()  # a full disk or a closed pipe shows here, not while Python ends
    except KeyboardInterrupt:
        print0("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        closed = isinstance(e, BrokenPipeError) and errors.drop_closed_output()
        error = UserError("what read the output has ended (as `| head` does)") if closed else e
        words = sys.argv[1:] if argv is None else argv
        known = errors.explain(error)  # a bug is told in full
        if known and "--json" in words and hasattr(args_class, "errors_as_json"):
            print(json.dumps({"error": str(known)}), flush=True)
        elif not rank_log.report(error):
            rank = int(os.environ.get("RANK", "0"))
            print(errors.words(error, debug, rank or None), file=sys.stderr, flush=True)
        sys.exit(1)


@dataclass
class DeviceFlags:
    """Where to compute."""

    device_type: str = ""
    """cuda, cpu or mps; empty: the best there is."""


@dataclass
class PrecisionFlags(DeviceFlags):
    """In which number format to compute."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Format of matrix products. auto: bfloat16 on GPUs that have it, float16 on older ones, else
    float32. Weights, optimizer and loss are float32 always."""


@dataclass
class TrainFlags(PrecisionFlags):
    """What the four training stages have in common."""

    run: str = "dummy"
    """Name of a wandb run; "dummy" logs to files only."""
    rank_timeout: float = RANK_TIMEOUT
    """With several ranks: seconds that they wait for one that is silent, stopped or behind, before
    they name it and end."""
    model_tag: str | None = None
    """Folder name of the checkpoints; default: d<depth>, or the tag of the model loaded."""
    seed: int = 42
    """Seed of initial weights, data order and sampling."""
    device_batch_size: int | Literal["auto"] = "auto"
    """Rows in one micro-batch on one rank. auto: what fits and keeps the device busy. Results do
    not depend on it."""
    activation_checkpointing: Literal["auto", "none", "mlp", "block"] = "auto"
    """Activations that are computed again instead of kept: none, those of the MLPs, all inside of
    each block. auto: the first of these with which a micro-batch of some size fits. Results do not
    depend on it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the training step. auto: where a trial shows that it works, on a CPU only for a run
    that is long enough to gain by it."""
    shard: Literal["auto", "none", "zero", "fsdp", "hsdp"] = "auto"
    """What several ranks share out. none: nothing, each keeps the whole optimizer state; zero: the
    optimizer state; fsdp: weights and gradients too, for models that do not fit; hsdp: these within
    a node, and each node has all. auto: zero if that fits. Results stay the same."""
    shard_size: int = -1
    """Ranks over which --shard=hsdp shares out one copy; -1: those of a node."""
    fp8: bool = False
    """Compute the large inner matrix products of training in 8 bits (GPUs from Ada and Hopper on).
    Worth it from about a billion parameters."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices and embeddings, at the peak learning rate."""
    embedding_lr: float = 0.2
    """AdamW learning rate of the token embedding, for a width of 768."""
    unembedding_lr: float = 0.004
    """AdamW learning rate of the output head, for a width of 768."""
    matrix_lr: float = 0.02
    """Muon learning rate of the weight matrices."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    eval_every: int = 250
    """Steps between evaluations; -1: only at the end."""
    save_every: int = -1
    """Steps between checkpoints; -1: only at the end."""
    keep_last: int = 2
    """Checkpoints kept of this run; -1 keeps all."""
    resume: bool = False
    """Continue from the newest whole checkpoint of this tag; from the beginning if it has none."""
    resume_from_step: int = -1
    """Continue from this step's checkpoint; -1: do not."""
    allow_changes: str = ""
    """What may differ from the run that is resumed, joined by |, as its refusal names it."""
    preview: bool = False
    """Print a few decoded rows with what is trained on marked, and stop."""
    deterministic: bool = False
    """On a GPU: the same bits every time, from the same flags on the same machine and versions.
    Slower: no kernel that adds in any order, none chosen by timing. A CPU does so by itself."""
    repeats: str | None = None
    """A run, as base/d4 or its folder, that this one repeats: refuse to start unless flags, data,
    tokenizer and starting weights are as they were then (see scripts.rerun)."""
    dry_run: bool = False
    """Get everything ready, compare it with --repeats, and stop before the first step."""


@dataclass
class ScheduleFlags:
    """What the stages that read fixed rows have in common: the rate over the run, validation."""

    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmdown_ratio: float = 0.2
    """Share of the run over which the learning rate falls."""
    final_lr_frac: float = 0.0
    """Share of the learning rate that is left at the end."""
    eval_tokens: int = 20 * 524_288
    """Validation tokens at most, whatever the batch size."""


@dataclass
class HorizonFlags(ScheduleFlags, TrainFlags):
    """Length, batch and rates of pretraining. nanochat/recipe.py fills in what is -1."""

    num_iterations: int = -1
    """Optimizer steps; -1: use one of the next three."""
    target_flops: float = -1.0
    """Train for this many FLOPs; -1: use the next."""
    target_tokens: float = -1.0
    """Train on this many tokens; -1: use the next."""
    target_param_data_ratio: float = 20.0
    """Train on this many tokens per parameter (20: Hoffmann et al., arXiv 2203.15556)."""
    total_batch_size: int = -1
    """Tokens in one optimizer step, over all ranks; -1: by the tokens that are trained on."""
    embedding_lr: float = -1.0
    """AdamW learning rate of the token embedding, for a width of 768; -1: 0.3 at the batch that
    --total_batch_size=-1 gives, and by the root of the batch at a smaller one."""
    unembedding_lr: float = -1.0
    """AdamW learning rate of the output head, for a width of 768; -1: 0.008, likewise."""
    matrix_lr: float = -1.0
    """Muon learning rate of the weight matrices; -1: 0.02, likewise."""
    scalar_lr: float = -1.0
    """AdamW learning rate of --arch=turbo's scalars; -1: 0.1, likewise."""
    weight_decay: float = -1.0
    """Decoupled, cautious weight decay of the matrices, falling to 0 over the run; -1: 0.28."""
    grad_clip: float = 0.0
    """Largest global norm of the gradient; 0 switches clipping off: no update grows with its
    gradient here, and clipping teaches no more (bench/LEARNING.md)."""
    warmup_steps: int = 40
    """Steps of linear warm-up."""
    warmdown_ratio: float = 0.65
    """Share of the run over which the learning rate falls."""
    final_lr_frac: float = 0.05
    """Share of the learning rate that is left at the end."""


@dataclass
class CacheFlags:
    """Where tokenized text is kept."""

    token_cache_dir: str | None = None
    """Folder of tokenized shards; default: $NANOCHAT_BASE_DIR/token_cache."""
    stream: bool = False
    """Keep no token cache: tokenize each shard into memory in its turn. The same rows."""


@dataclass
class FinetuneFlags(TrainFlags):
    """What the stages that start from a checkpoint have in common."""

    step: int | None = None
    """Step of the checkpoint to start from; default: the last."""
    init_lr_frac: float = 1.0
    """Learning rates start at this share of the values above."""


@dataclass
class InheritedFlags(FinetuneFlags):
    """What mid and SFT take over from the run that made their checkpoint, unless it is typed.

    nanochat/start.py fills in every flag that is declared here. RL has its own."""

    max_seq_len: int = -1
    """Tokens in a row; -1: as the model was trained."""
    total_batch_size: int = -1
    """Tokens in one optimizer step, over all ranks; -1: as the model was trained, or fewer where
    that is not a hundred steps (rates that are not typed follow by the root)."""
    embedding_lr: float = -1.0
    """AdamW learning rate of the token embedding, for a width of 768; -1: as it was at its peak."""
    unembedding_lr: float = -1.0
    """AdamW learning rate of the output head, for a width of 768; -1: as it was at its peak."""
    matrix_lr: float = -1.0
    """Muon learning rate of the weight matrices; -1: as it was at its peak."""
    weight_decay: float = -1.0
    """Decoupled weight decay of the matrices and embeddings; -1: as the model was trained."""
    load_optimizer: Literal[0, 1] = 1
    """1: a warm start, with the checkpoint's optimizer state if it has one; 0: a cold start."""
