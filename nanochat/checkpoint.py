"""
Checkpoints: one format for every stage, whole or not there, and no pickle.

    <base>/<stage>_checkpoints/<tag>/        the folder of a run
        log.jsonl            what it was made of, and all it measured (see report/runs.py)
        code-<hash>.diff     what had been changed in the code since its commit, if anything had
    <base>/<stage>_checkpoints/<tag>/step_000200/
        model.safetensors    weights
        optim.safetensors    optimizer state, independent of the number of ranks
        meta.json            model config, tokenizer, arguments, training state
        manifest.json        size and SHA-256 of the files above, and of itself

A checkpoint is written to a temporary folder, flushed, and renamed: a kill at any moment leaves it
there or not. Loading compares the manifest first.

The format is one, whatever --shard and the number of ranks. Where tensors are sharded they come
together on rank 0 one after the other, into its host's memory, of which a node has more than its
GPUs; any number of ranks reads back its own rows. PyTorch's distributed checkpoints would need no
rank to hold them all, but keep an index that is a pickle, and make two formats of one. Floor 3.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanochat.common import UserError, get_base_dir, print0, read_json, warn0, write_json
from nanochat.communication import Ranks, row_parts
from nanochat.distributed import barrier, local, local_rows, rank_and_world, shard_group
from nanochat.lora import has_lora, merged_rows
from nanochat.manifest import find_damage, flush, read_manifest, seal
from nanochat.models import build_model, config_from_dict, config_to_dict
from nanochat.tokenizer import Tokenizer, get_tokenizer

try:
    import fcntl
except ImportError:  # Windows: two runs of one tag are not told apart
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
STAGE_FOLDERS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
    "dpo": "chatdpo_checkpoints",
}
STAGE_SCRIPTS = {
    "base": "base_train",
    "mid": "mid_train",
    "sft": "chat_sft",
    "rl": "chat_rl",
    "dpo": "chat_dpo",
}
STEP_NAME = re.compile(r"step_(\d{6,})")
FILES = ("model.safetensors", "optim.safetensors", "meta.json")
LOG = "log.jsonl"


def stage_dir(source: str) -> Path:
    """The folder of a stage's runs. `source` is base, mid, sft, rl or dpo."""
    if source not in STAGE_FOLDERS:
        raise UserError(f"source={source!r}: choose one of {', '.join(STAGE_FOLDERS)}")
    return get_base_dir() / STAGE_FOLDERS[source]


def run_dir(source: str, tag: str) -> Path:
    """The folder of one run: its log and its checkpoints."""
    return stage_dir(source) / tag


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def step_dir(source: str, tag: str, step: int) -> Path:
    return run_dir(source, tag) / step_name(step)


def list_steps(source: str, tag: str) -> list[int]:
    """Steps with a checkpoint, ascending. Temporary folders do not count."""
    return _steps_in(run_dir(source, tag))


def _steps_in(folder: Path) -> list[int]:
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted(int(m.group(1)) for n in names if (m := STEP_NAME.fullmatch(n)))


def list_tags(source: str) -> list[str]:
    """Tags of the stage that have a checkpoint."""
    folder = stage_dir(source)
    tags = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return [t for t in sorted(tags) if list_steps(source, t)]


def newest_tag(source: str) -> str:
    """The tag whose newest checkpoint was written last."""
    tags = list_tags(source)
    if not tags:
        raise UserError(
            f"no {source} checkpoint in {stage_dir(source)}; "
            f"make one with `python -m scripts.{STAGE_SCRIPTS[source]}`"
        )

    def written(tag: str) -> float:
        # Of the folder, whose entries never change: a damaged one has no meta.json to ask.
        return step_dir(source, tag, list_steps(source, tag)[-1]).stat().st_mtime

    return max(tags, key=written)


def find_checkpoint(source: str, tag: str | None = None, step: int | None = None) -> Path:
    """The folder of a checkpoint: newest tag and last step unless given."""
    tag = tag or newest_tag(source)
    steps = list_steps(source, tag)
    if not steps:
        raise UserError(
            f"no {source} checkpoint with --model_tag={tag} in {stage_dir(source)}; "
            f"make one with `python -m scripts.{STAGE_SCRIPTS[source]} --model_tag={tag}`"
        )
    if step is not None and step not in steps:
        raise UserError(f"{stage_dir(source) / tag} has no step {step}; it has {steps}")
    return step_dir(source, tag, steps[-1] if step is None else step)


# -------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    source: str,
    tag: str,
    step: int,
    model: Any,
    optim_state: dict[str, torch.Tensor],
    meta: dict[str, Any],
    keep_last: int = -1,
) -> Path:
    """Writes one checkpoint (rank 0; the others wait), keeping `keep_last` of the steps up to it.

    `meta` must be JSON; the step and the model's config are added. Raises UserError when the disk
    is too small. Trainer.save does the same in the background."""
    folder = step_dir(source, tag, step)
    weights = snapshot(model.state_dict())
    if rank_and_world()[0] == 0:
        full = {**meta, "step": step, "config": config_to_dict(model.config)}
        write_checkpoint(folder, weights, optim_state, full, keep_last)
    barrier()
    return folder


def snapshot(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the memory of rank 0's host ({} elsewhere), also of what is there already: training
    goes on while they are written. All ranks must call it, for those tensors that are sharded."""
    result = {}
    for name, t in tensors.items():
        whole: torch.Tensor | None = t.detach()
        if shard_group(t) is not None:
            ranks = Ranks.of([t])
            if not ranks.has_rank0:
                continue
            whole = ranks.to_rank0(
                local(t.detach()), row_parts(t.shape, ranks.size), t.shape, local(t.detach())
            )
        if whole is not None and rank_and_world()[0] == 0:
            result[name] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return result


def write_checkpoint(
    folder: Path,
    weights: dict[str, torch.Tensor],
    optim_state: dict[str, torch.Tensor],
    meta: dict[str, Any],
    keep_last: int = -1,
) -> None:
    """Writes tensors that nobody changes meanwhile. On any error what was there stays as it was.

    Raises UserError, with what is needed and what is free, when the disk is too small."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tidy(folder.parent)
    tmp = folder.with_name(f".{folder.name}.tmp")
    need = sum(t.nbytes for part in (weights, optim_state) for t in part.values())
    try:
        tmp.mkdir()
        if shutil.disk_usage(tmp).free < need * 1.05:
            raise OSError("the disk is too full")
        save_file(weights, tmp / "model.safetensors")
        # safetensors takes no views
        save_file({k: v.contiguous() for k, v in optim_state.items()}, tmp / "optim.safetensors")
        write_json(tmp / "meta.json", {"format": FORMAT, **meta})
        seal(tmp, FILES)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(tmp, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        raise UserError(
            f"the checkpoint {folder} could not be written: {e}. It needs {_size(need)} and "
            f"{_size(free)} are free; free some space or lower --keep_last. Earlier "
            "checkpoints are untouched"
        ) from e
    _publish(tmp, folder)
    prune(folder, keep_last)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def prune(folder: Path, keep_last: int) -> None:
    """Removes all but `keep_last` of the checkpoints up to this one (-1: none). Later ones are of
    another run with this tag: they must not push out what is new. Rank 0 only."""
    steps = [s for s in _steps_in(folder.parent) if s <= _number(folder)]
    for old in steps[:-keep_last] if keep_last > 0 else []:
        _discard(folder.with_name(step_name(old)))


def _publish(tmp: Path, folder: Path) -> None:
    """Gives a whole checkpoint its name. The same step, if it is there, steps aside for a moment:
    tidy() puts it back should we be killed just then."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    tmp.rename(folder)
    flush(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def _discard(folder: Path) -> None:
    """Removes a checkpoint: out of the way by one rename first, so that none is ever half there."""
    tmp = folder.with_name(f".{folder.name}.tmp")
    folder.rename(tmp)
    shutil.rmtree(tmp)


_claims: dict[Path, TextIO] = {}  # open until the process ends, however it ends


def claim(source: str, tag: str) -> None:
    """UserError if another process, on this machine or one that shares the folder, is writing
    checkpoints of this tag; else none can until this one ends. Rank 0 only."""
    path = stage_dir(source) / ".running" / tag
    if path in _claims or fcntl is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's no fork inherits it
    except OSError as e:
        file.seek(0)
        who = file.read().strip()
        file.close()
        if e.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        raise UserError(
            f"another run ({who}) is writing the {source} checkpoints of {tag}: wait until it "
            "ends, or give this one a name of its own by --model_tag"
        ) from e
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _claims[path] = file


def tidy(folder: Path) -> None:
    """Clears what killed saves and removals left among a tag's checkpoints (rank 0)."""
    for old in folder.glob(".step_*.old"):
        final = folder / old.name[1 : -len(".old")]
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
    for tmp in folder.glob(".step_*.tmp"):
        print0(f"{tmp} is an unfinished checkpoint: removed")
        shutil.rmtree(tmp)


def set_aside(source: str, tag: str, after: int = -1) -> None:
    """Moves a tag's checkpoints later than step `after` to .old/<tag>; without it all of them, in
    place of what was moved there before. Rank 0 only."""
    later = [s for s in list_steps(source, tag) if s > after]
    if not later:
        return
    old = stage_dir(source) / ".old" / tag
    old.mkdir(parents=True, exist_ok=True)
    for step in _steps_in(old) if after < 0 else []:
        shutil.rmtree(old / step_name(step), ignore_errors=True)
    for step in later:
        shutil.rmtree(old / step_name(step), ignore_errors=True)
        step_dir(source, tag, step).rename(old / step_name(step))
    print0(f"the earlier checkpoints of {tag}, steps {later}, are in {old} now")


def set_log_aside(source: str, tag: str) -> None:
    """A new run of an old tag begins a new log; the old one goes where its checkpoints will go,
    or away if there are none. Rank 0 only."""
    folder, old = run_dir(source, tag), stage_dir(source) / ".old" / tag
    files = [path for path in (folder / LOG, *folder.glob("code-*.diff")) if path.exists()]
    if not list_steps(source, tag):
        for path in files:
            path.unlink()
    elif files:
        old.mkdir(parents=True, exist_ok=True)
        for path in (old / LOG, *old.glob("code-*.diff")):
            path.unlink(missing_ok=True)
        for path in files:
            path.rename(old / path.name)


# -------------------------------------------------------------------------------------------------
# Reading


def newest_whole(source: str, tag: str) -> int:
    """The last step whose checkpoint is undamaged; -1 if the tag has no checkpoint at all."""
    steps = list_steps(source, tag)
    for step in reversed(steps):
        problem = find_damage(step_dir(source, tag, step), FILES)
        if problem is None:
            return step
        warn0(f"{step_dir(source, tag, step)} is damaged and passed over: {problem}")
    if steps:
        raise UserError(
            f"none of the checkpoints in {stage_dir(source) / tag} is whole (steps {steps}); "
            "remove them, or leave --resume away to start again"
        )
    return -1


def check_manifest(folder: Path) -> None:
    """Compares every file with the manifest. Raises UserError naming the file that differs, and
    the newest whole checkpoint before it."""
    problem = find_damage(folder, FILES)
    if problem is None:
        return
    offer = "no earlier whole one is there: copy it again, or train it again"
    for step in reversed(_steps_in(folder.parent)):
        if step < _number(folder) and not find_damage(folder.with_name(step_name(step)), FILES):
            offer = f"an earlier one is whole: --step={step} (training: --resume_from_step={step})"
            break
    raise UserError(f"checkpoint {folder} is damaged: {problem}; {offer}")


def _number(folder: Path) -> int:
    """The step in a checkpoint's name; -1 if it has another name."""
    match = STEP_NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def weights_id(folder: Path) -> str:
    """16 digits that stand for a checkpoint's weights: two of the same are the same weights."""
    return (read_manifest(folder) or {})["model.safetensors"]["sha256"][:16]


def read_meta(folder: Path, check: bool = True) -> dict[str, Any]:
    """The metadata of a checkpoint, whose files are compared with the manifest first."""
    if check:
        check_manifest(folder)
    meta = read_json(folder / "meta.json")
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder} has checkpoint format {meta.get('format')}, this is {FORMAT}")
    return meta


def load_weights(folder: Path, model: Any) -> None:
    """Fills the model; missing, extra or misshapen tensors are refused by name. What LoRA trained
    is merged into a plain model. Of a sharded model a rank reads its own rows: the file is mapped,
    one tensor after the other, and no more of it is read than is copied."""
    try:
        file = safe_open(folder / "model.safetensors", framework="pt")
    except (OSError, SafetensorError) as e:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {e}") from e
    own = model.state_dict()
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    merge = has_lora(shapes) and not has_lora(own)
    plain = {name for name in shapes if not (merge and has_lora([name]))}
    wrong = sorted(set(own) ^ plain) or sorted(n for n in own if tuple(own[n].shape) != shapes[n])
    if wrong:
        raise UserError(f"{folder} does not fit the model: {', '.join(wrong[:5])}")
    with torch.no_grad():
        for name, tensor in own.items():
            mine = local(tensor.detach())
            beside = shapes if merge else {}
            mine.copy_(merged_rows(file.get_tensor, beside, name, local_rows(tensor), mine.device))


def optim_reader(folder: Path) -> Callable[[str], torch.Tensor]:
    """A function that reads one tensor of the optimizer state by name, without the others."""
    file = safe_open(folder / "optim.safetensors", framework="pt")

    def get(name: str) -> torch.Tensor:
        try:
            return file.get_tensor(name)
        except SafetensorError as e:
            raise UserError(
                f"{folder} has no optimizer state {name}: another version of nanochat wrote it. "
                "Its run cannot be resumed; the next stage, or base_train --source_tag, can train "
                f"on from its weights ({e})"
            ) from e

    return get


def checkpoint_tokenizer(meta: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer a checkpoint was trained with; another one than then is refused."""
    tokenizer = get_tokenizer(meta["tokenizer"])
    if tokenizer.fingerprint != meta["tokenizer_fingerprint"]:
        raise UserError(
            f"{folder} was trained with another tokenizer (fingerprint "
            f"{meta['tokenizer_fingerprint']}) than the one there now ({tokenizer.fingerprint}). "
            "Put the old one back, or train again from scripts.base_train"
        )
    return tokenizer


def load_model(
    source: str,
    device: torch.device | str,
    model_tag: str | None = None,
    step: int | None = None,
) -> tuple[Any, Tokenizer, dict[str, Any]]:
    """(model, tokenizer, meta) of a stage's checkpoint: newest tag and last step unless given.

    The model is in evaluation mode. meta["tag"] and meta["step"] say what was loaded."""
    folder = find_checkpoint(source, model_tag, step)
    meta = read_meta(folder)
    tokenizer = checkpoint_tokenizer(meta, folder)
    model = build_model(config_from_dict(meta["config"], str(folder)), device)
    load_weights(folder, model)
    model.eval()
    return model, tokenizer, {**meta, "tag": folder.parent.name, "folder": str(folder)}
