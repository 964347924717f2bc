"""
Somebody else's checkpoint becomes one of ours: Qwen2.5 and NanoChat as transformers keeps them, and
the model_000650.pt of the original nanochat.

What is read is compared with the model it claims to be before anything is written: each tensor by
name, shape and type. Numbers are only widened to float32, which is exact. The tokenizer comes
along, to $NANOCHAT_BASE_DIR/tokenizers/<name>/. The command line is scripts/hf_import.py, the
tables of names are in hf.py. Floor 3.5.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nanochat.chat_format import QWEN_SYSTEM
from nanochat.checkpoint import (
    STAGE_FOLDERS,
    claim,
    set_aside,
    set_log_aside,
    step_dir,
    write_checkpoint,
)
from nanochat.common import (
    UserError,
    atomic_write,
    fingerprint,
    get_base_dir,
    print0,
    read_json,
    write_json,
)
from nanochat.hf import config_from_hf, from_hf_name, to_hf_name
from nanochat.models import ARCHITECTURES, Config, arch_of, config_from_dict, config_to_dict
from nanochat.progress import track
from nanochat.tokenizer import Tokenizer, imported_dir
from nanochat.tokenizer_files import read_default_system, read_vocabulary, tokenizer_json

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# All that is ever read: no .bin, no code.
HUB_FILES = ["*.json", "*.safetensors", "model_*.pt", "tokenizer.pkl"]
OLD_NAME = re.compile(r"model_(\d+)\.pt")
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names -> torch's


@dataclass
class Tensor:
    """A tensor that has not been read yet."""

    theirs: str  # its name there
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


@dataclass
class Found:
    """A checkpoint of somebody else's, opened."""

    folder: Path
    config: Config
    tensors: dict[str, Tensor]  # by our names
    tokenizer_dir: Path
    eos_token_ids: list[Any] = field(default_factory=list)  # where generation is to end
    stage: str | None = None  # if the place says so
    step: int = 0


def import_model(
    where: str,
    tag: str | None = None,
    stage: str | None = None,
    tokenizer_dir: str | None = None,
    max_seq_len: int = 2048,
) -> Path:
    """Imports a folder or hub id; returns the folder of our checkpoint. The flags' meaning is in
    scripts/hf_import.py. UserError, with nothing written, for whatever is not exactly our model."""
    folder, name = locate(where)
    found = open_checkpoint(folder)
    tag = tag or name
    if Path(tag).name != tag:
        raise UserError(f"--model_tag={tag} must be the name of a folder, without a path")
    shape = check_tensors(found)
    directory = Path(tokenizer_dir) if tokenizer_dir else found.tokenizer_dir
    tokenizer = _read_tokenizer(directory, found.config)
    stage, reason = _choose_stage(stage, found, tokenizer)
    final = step_dir(stage, tag, found.step)
    num_params = sum(meta.numel() for meta in shape.values())
    _check_disk(final, 4 * num_params)

    weights = read_weights(found, shape)
    trained_len = found.config.sequence_len
    config = replace(found.config, sequence_len=min(max_seq_len, trained_len))
    tokenizer_name = keep_tokenizer(tokenizer, directory, tag)
    types = sorted({t.dtype for t in found.tensors.values()})
    meta = {
        "stage": stage,
        "step": found.step,
        "config": config_to_dict(config),
        "tokenizer": tokenizer_name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "args": {},  # what it was trained with is not known
        "imported": {"from": where, "dtype": types, "max_position_embeddings": trained_len},
    }
    claim(stage, tag)
    set_log_aside(stage, tag)  # that of a run whose place this takes
    set_aside(stage, tag)
    write_checkpoint(final, weights, {}, meta)
    print0(
        f"imported {where}: {arch_of(config)}, {num_params:,} parameters from {', '.join(types)}\n"
        f"stage {stage}, because {reason}\n"
        f"rows of {config.sequence_len} tokens (--max_seq_len), of the {trained_len} it was made "
        f"for\ntokenizer {tokenizer_name}, {tokenizer.get_vocab_size():,} ids\nsaved {final}"
    )
    sft, chat = f"chat_sft --source=base --source_tag={tag}", f"chat_cli -i {stage} -g {tag}"
    print0(f"go on with, for one: python -m scripts.{sft if stage == 'base' else chat}")
    return final


def locate(where: str) -> tuple[Path, str]:
    """(folder, its name) of --from: a folder of this machine, or a model of the hub, fetched."""
    path = Path(where).expanduser()
    if where and path.is_dir():
        return path, path.resolve().name
    if path.is_file() or not HUB_ID.fullmatch(where):
        raise UserError(
            f"--from={where} is neither a folder nor a model of the hub (as in "
            "--from=Qwen/Qwen2.5-0.5B-Instruct)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, allow_patterns=HUB_FILES)), where.split("/")[1]
    except Exception as e:  # no network, no such model, a closed one, a full disk
        raise UserError(
            f"--from={where}: there is no such folder, and the hub did not give it ({e}). Fetch it "
            f"where there is a network, `hf download {where} --local-dir=DIR`, and say --from=DIR"
        ) from e


# -------------------------------------------------------------------------------------------------
# Opening


def open_checkpoint(folder: Path) -> Found:
    """What a folder holds. An original checkpoint may have a config.json beside it on the hub."""
    old = any(OLD_NAME.fullmatch(path.name) for path in folder.iterdir())
    if not (folder / "config.json").exists() or (old and not any(folder.glob("*.safetensors"))):
        return open_old(folder)
    return open_hugging_face(folder)


def open_hugging_face(folder: Path) -> Found:
    """A folder that transformers' save_pretrained wrote."""
    data = _read_dict(folder / "config.json")
    config = config_from_hf(data, str(folder / "config.json"))
    arch = arch_of(config)
    tensors: dict[str, Tensor] = {}
    for path in _safetensors_files(folder):
        for tensor in _open_safetensors(path):
            try:
                own = from_hf_name(arch, tensor.theirs)
            except UserError as e:
                raise UserError(f"{path} cannot be imported: {e}") from e
            if own in tensors:
                raise UserError(f"{path}: {tensor.theirs} is in another file, too")
            tensors[own] = tensor
    generation = folder / "generation_config.json"
    ends = (_read_dict(generation) if generation.exists() else data).get("eos_token_id")
    return Found(
        folder, config, tensors, folder, eos_token_ids=ends if isinstance(ends, list) else [ends]
    )


def _read_dict(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object")
    return data


def _safetensors_files(folder: Path) -> list[Path]:
    """One file, or those that the index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = ""
        if pickled:
            hint = (
                f"; {pickled[0]} is a pickle, which can run code when it is loaded and is not "
                "read. transformers turns it into safetensors: from_pretrained, save_pretrained"
            )
        raise UserError(f"{folder} holds no model.safetensors and no {index.name}{hint}")
    weight_map = _read_dict(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map")
    files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which {index.name} names; fetch it again")
    return [folder / name for name in files]


def _open_safetensors(path: Path) -> list[Tensor]:
    """The file's tensors, of which only the header is read."""
    try:
        file = safe_open(path, framework="pt")
        names = list(file.keys())
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} cannot be read: {e}. Fetch it again") from e

    def lazily(name: str) -> Tensor:
        header = file.get_slice(name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        return Tensor(name, shape, TYPES.get(dtype, dtype), lambda: file.get_tensor(name))

    return [lazily(name) for name in names]


def open_old(folder: Path) -> Found:
    """The newest model_NNNNNN.pt of a folder of the original nanochat, with its meta_NNNNNN.json.

    torch.load with weights_only builds tensors and nothing else."""
    steps = {int(m.group(1)): p for p in folder.iterdir() if (m := OLD_NAME.fullmatch(p.name))}
    if not steps:
        raise UserError(
            f"{folder} holds neither a config.json (transformers) nor a model_000000.pt (the "
            "original nanochat); a checkpoint of ours needs no import"
        )
    step, path = max(steps.items())
    meta_path = path.with_name(path.name.replace("model_", "meta_")).with_suffix(".json")
    if not meta_path.exists():
        raise UserError(f"{path} has no {meta_path.name} beside it, which holds its shape")
    data = _read_dict(meta_path).get("model_config") or {}
    keys = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    for key in keys:
        if type(data.get(key)) is not int or data[key] < 1:
            raise UserError(f"{meta_path}: model_config has no whole number {key}")
    config = config_from_dict({"arch": "gpt", **data}, str(meta_path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        pairs = [(str(name), tensor.detach()) for name, tensor in state.items()]
    except Exception as e:  # a broken pickle can raise nearly anything
        raise UserError(f"{path} is refused: {e}") from e

    def lazily(name: str, tensor: torch.Tensor) -> Tensor:
        return Tensor(name, tuple(tensor.shape), str(tensor.dtype)[6:], lambda: tensor)

    # torch.compile leaves its mark on the names
    tensors = {name.removeprefix("_orig_mod."): lazily(name, tensor) for name, tensor in pairs}
    beside = folder.resolve().parent.parent / "tokenizer"  # as the original's base directory has it
    has_own = any((folder / f"tokenizer.{end}").exists() for end in ("json", "pkl"))
    stages = {name: stage for stage, name in STAGE_FOLDERS.items()}
    return Found(
        folder,
        config,
        tensors,
        folder if has_own or not beside.is_dir() else beside,
        stage=stages.get(folder.resolve().parent.name),
        step=step,
    )


# -------------------------------------------------------------------------------------------------
# Tensors


def check_tensors(found: Found) -> dict[str, torch.Tensor]:
    """Our model's parameters, on the meta device, by name. UserError naming a tensor that is
    missing, too many, of another shape, or not of a float type that widens exactly."""
    arch = arch_of(found.config)
    with torch.device("meta"):
        own: dict[str, torch.Tensor] = ARCHITECTURES[arch][0](found.config).state_dict()
    tied_twin = {"lm_head.weight"} if getattr(found.config, "tied", False) else set()
    missing = [to_hf_name(arch, name) for name in own if name not in found.tensors]
    extra = [t.theirs for name, t in found.tensors.items() if name not in {*own, *tied_twin}]
    for names, what in ((missing, "it lacks"), (extra, "there is no place for")):
        if names:
            more = " and others" if len(names) > 5 else ""
            raise UserError(
                f"{found.folder} is not the model that its config describes: {what} "
                f"{', '.join(sorted(names)[:5])}{more}"
            )
    for name, tensor in found.tensors.items():
        wanted = tuple((own[name] if name in own else own["model.embed_tokens.weight"]).shape)
        if tensor.shape != wanted:
            raise UserError(
                f"{found.folder}: {tensor.theirs} has shape {tensor.shape}, and by the config it "
                f"is {wanted}"
            )
        if tensor.dtype not in TYPES.values():
            raise UserError(
                f"{found.folder}: {tensor.theirs} is of type {tensor.dtype}; only "
                f"{', '.join(TYPES.values())} can be imported"
            )
    return own


def read_weights(found: Found, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in float32, as training wants them, read one tensor at a time."""
    weights = {
        name: _widened(found.tensors[name]) for name in track(own, "reading weights", "tensors")
    }
    twin = found.tensors.get("lm_head.weight")
    if twin is not None and "lm_head.weight" not in own:
        embedding = weights["model.embed_tokens.weight"].view(torch.int32)  # bits: NaN is NaN
        if not torch.equal(_widened(twin).view(torch.int32), embedding):
            raise UserError(
                f"{found.folder}: tie_word_embeddings is true, but lm_head.weight is not "
                "model.embed_tokens.weight; set it to false in config.json if both are meant"
            )
    return weights


def _widened(tensor: Tensor) -> torch.Tensor:
    try:
        return tensor.read().to(torch.float32).contiguous()
    except (SafetensorError, OSError, RuntimeError) as e:
        raise UserError(f"{tensor.theirs} cannot be read: {e}. Fetch its file again") from e


def _check_disk(final: Path, need: int) -> None:
    """Before minutes of reading; the write itself refuses, too."""
    base = get_base_dir()
    base.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(base).free
    if free < need * 1.05:
        raise UserError(
            f"{final} needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; free some "
            "space, or set NANOCHAT_BASE_DIR to another disk"
        )


# -------------------------------------------------------------------------------------------------
# Tokenizer and stage


def _read_tokenizer(directory: Path, config: Config) -> Tokenizer:
    if not any((directory / f"tokenizer.{end}").exists() for end in ("json", "pkl")):
        raise UserError(
            f"{directory} holds no tokenizer.json and no tokenizer.pkl; give the folder of the "
            "model's tokenizer by --tokenizer"
        )
    tokenizer = Tokenizer(read_vocabulary(directory), read_default_system(directory))
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.get_vocab_size()} ids, and the model only "
            f"{config.vocab_size} rows (vocab_size): it is another model's. Give the folder of its "
            "own by --tokenizer"
        )
    return tokenizer


def keep_tokenizer(tokenizer: Tokenizer, directory: Path, tag: str) -> str:
    """Copies the tokenizer into the base directory; returns the name by which get_tokenizer finds
    it. Another one of that name stays: checkpoints may need it."""
    qwen = get_base_dir() / "tokenizer_qwen2.5"
    if (qwen / "tokenizer.json").exists() and _identity(qwen) == _identity(directory):
        return "qwen2.5"
    there = imported_dir(tag)
    taken = tag == "qwen2.5" or (there is not None and _identity(there) != _identity(directory))
    name = f"{tag}-{_identity(directory)}" if taken else tag
    folder = get_base_dir() / "tokenizers" / name
    # tokenizer.json last, so that whoever finds it finds a complete folder
    for file in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
        if (directory / file).exists() and not (folder / file).exists():
            with open(directory / file, "rb") as source, atomic_write(folder / file) as target:
                shutil.copyfileobj(source, target)
    if not (folder / "tokenizer.json").exists():
        write_json(folder / "tokenizer.json", tokenizer_json(tokenizer.vocabulary))
    return name


def _identity(directory: Path) -> str:
    """Stands for ids and the system prompt of conversations without one: Qwen's base and instruct
    models have one vocabulary and two prompts."""
    system = read_default_system(directory) or QWEN_SYSTEM
    return fingerprint(read_vocabulary(directory).fingerprint(), system)


def _choose_stage(stage: str | None, found: Found, tokenizer: Tokenizer) -> tuple[str, str]:
    """(stage, why): as typed, else a chat model is sft, and every other one base."""
    if stage is not None:
        return stage, "--stage says so"
    if found.stage is not None:
        return found.stage, f"it is in {found.folder.resolve().parent.name}"
    if not found.eos_token_ids:
        raise UserError(f"what is {found.folder}? Give --stage=base, mid, sft or rl")
    end = tokenizer.encode_special("<|assistant_end|>")
    name = next(n for n, id in tokenizer.vocabulary.specials.items() if id == end)
    if end != tokenizer.get_bos_token_id() and end in found.eos_token_ids:
        return "sft", f"its replies end with {name} (--stage for another)"
    return "base", f"it does not end with {name}, as chat models do (--stage for another)"
