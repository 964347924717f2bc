"""
One of our models as a folder that `transformers` loads without us.

    config.json  generation_config.json    the shape; where a reply ends
    model.safetensors                      weights (numbered files and an index above 5 GB)
    tokenizer.json  tokenizer_config.json  the same ids; the chat template
    README.md                              the model card
    modeling_nanochat_turbo.py             of a Turbo: its classes, which transformers does not have

    export_model(Path("d20"), model, tokenizer, chat=True, card="# d20 ...")

Names and config.json come from hf.py, the template from chat_template.py; here the files are
written: into a temporary neighbour that gets its name when everything is in it, so that the folder
is there whole or not at all. Floor 3.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanochat.chat_template import chat_template
from nanochat.common import UserError, print0, write_json
from nanochat.hf import AUTO_MAP, config_to_hf, to_hf_name, with_own_tokenizer
from nanochat.manifest import flush
from nanochat.models import arch_of
from nanochat.progress import Progress
from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer_files import QWEN_PATTERN, tokenizer_json

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}

# What an export may leave in its folder: --overwrite removes a folder of these and no other.
OWN_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|model\.safetensors\.index)\.json"
    r"|README\.md|modeling_nanochat_turbo\.py|model(-\d+-of-\d+)?\.safetensors|.*\.gguf"
)

# Qwen's added tokens that stand for something to be read: decoding keeps them where it skips the
# special ones, as with the published tokenizer, whose tool calls are found by them.
READABLE = re.compile(r"</?tool_call>|<\|(fim_.*|repo_name|file_sep)\|>")


def export_model(
    out: Path,
    model: Any,
    tokenizer: Tokenizer,
    chat: bool,
    card: str,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Writes the folder `out`. `chat` says whether the model has learned conversations: its replies
    end at the end of a turn, and it gets a chat template; a base model's text ends with the token
    between documents. `also` writes the weights a second time, in another format, into the folder
    that it is given.

    Raises UserError if `out` is in use, the disk too small, or a value not to be had in `dtype`."""
    out = out.resolve()  # "." too has a name, then
    check_target(out, overwrite)
    need = sum(p.numel() for p in model.state_dict().values()) * DTYPES[dtype].itemsize
    need *= 1 if also is None else 2
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < need * 1.05 + 50e6:  # the tokenizer may take some megabytes
        raise UserError(
            f"--out={out}: the model takes {need / 1e9:.2f} GB as {dtype}, and {free / 1e9:.2f} GB "
            "are free. Free some space, choose another --out"
            + (" or --dtype=bfloat16" if dtype == "float32" else "")
        )
    tmp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # of an export that was killed
    tmp.mkdir()
    try:
        (tmp / "README.md").write_text(card, encoding="utf-8")
        write_tokenizer(tmp, tokenizer, chat, model.config.sequence_len)
        write_configs(tmp, model, tokenizer, chat, dtype)
        write_code(tmp, arch_of(model.config))
        write_weights(tmp, model, dtype, max_shard_size)
        if also is not None:
            also(tmp)
        for path in [*tmp.iterdir(), tmp]:
            flush(path)
        _publish(tmp, out)
    except OSError as e:
        raise UserError(f"--out={out} could not be written: {e}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def check_target(out: Path, overwrite: bool) -> None:
    """Raises UserError unless `out` may be written: it is not there, empty, or an earlier export
    that is to be overwritten."""
    if out.is_file():
        raise UserError(f"--out={out} is a file; give the name of a folder")
    there = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if there and not overwrite:
        raise UserError(f"--out={out} is not empty; choose another folder, or add --overwrite")
    others = [name for name in there if not OWN_FILES.fullmatch(name)]
    if others:
        raise UserError(
            f"--out={out} holds what no export wrote ({', '.join(others[:5])}), and --overwrite "
            "would remove it; choose another folder"
        )


def _publish(tmp: Path, out: Path) -> None:
    """Gives the whole folder its name; an earlier export steps aside first."""
    old = out.with_name(f".{out.name}.old")
    if out.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    tmp.rename(out)
    flush(out.parent)
    shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# weights


def write_weights(
    folder: Path, model: Any, dtype: str = "bfloat16", max_shard_size: str = "5GB"
) -> None:
    """Writes the parameters under transformers' names: one file, or several and their index.

    A tied head is left out, as transformers does: config.json says that it is tied."""
    from huggingface_hub import split_torch_state_dict_into_shards  # heavy

    arch = arch_of(model.config)
    tensors = {to_hf_name(arch, name): t for name, t in model.state_dict().items()}
    # Sizes are all that counts for the split, so the tensors are cast a file at a time, below
    shapes = {name: t.to("meta", DTYPES[dtype]) for name, t in tensors.items()}
    try:
        plan = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    except ValueError as e:
        raise UserError(f"--max_shard_size={max_shard_size}: {e}; write 5GB or 500MB") from e
    files = sorted(plan.filename_to_tensors.items())
    with Progress(len(shapes), "writing weights", "tensors") as bar:
        for number, (file, names) in enumerate(files, 1):
            shard = {name: cast_tensor(name, tensors[name], dtype) for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            bar.advance(len(names))
            size = sum(t.nbytes for t in shard.values())
            print0(f"{file}: {len(names)} tensors, {size / 1e6:,.1f} MB ({number} of {len(files)})")
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def cast_tensor(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """The tensor in that type, on the host. What is too large for it, or no number, is refused."""
    out = tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
    if not torch.isfinite(out).all():
        cause = "has values that are no numbers: the model is broken"
        if torch.isfinite(tensor).all():
            largest = tensor.abs().max().item()
            cause = f"goes up to {largest:.4g}, which {dtype} cannot hold; use --dtype=bfloat16"
        raise UserError(f"{name} {cause}")
    return out


# --------------------------------------------------------------------------------------------------
# config.json, generation_config.json


def write_configs(folder: Path, model: Any, tokenizer: Tokenizer, chat: bool, dtype: str) -> None:
    """Writes config.json and generation_config.json."""
    bos, stops = tokenizer.get_bos_token_id(), stop_ids(tokenizer, chat)
    config = config_to_hf(model.config, stops[0], bos, dtype)
    if not keeps_tokenizer(model, tokenizer):
        config = with_own_tokenizer(config)
        print0(
            f"config.json: model_type is {config['model_type']}, Qwen2's computation under a name "
            "of which transformers takes this tokenizer as it is"
        )
    write_json(folder / "config.json", config)
    generation: dict[str, Any] = {
        "bos_token_id": bos,
        "eos_token_id": stops,
        # Not the end of a turn: training that leaves padding out would never see a turn end
        "pad_token_id": bos,
    }
    unused = list(range(tokenizer.get_vocab_size(), model.config.vocab_size))
    if unused:  # padded rows, which stand for nothing and must not be sampled
        generation["suppress_tokens"] = unused
    write_json(folder / "generation_config.json", generation)


def write_code(folder: Path, arch: str) -> None:
    """Copies the files that hold the classes of an architecture that transformers does not have."""
    for module in {place.split(".")[0] for place in AUTO_MAP.get(arch, {}).values()}:
        shutil.copy(Path(__file__).parent / "hf_code" / f"{module}.py", folder)


def keeps_tokenizer(model: Any, tokenizer: Tokenizer) -> bool:
    """Whether transformers uses the tokenizer we write if config.json has the usual model_type: not
    so for a Qwen model with another tokenizer than Qwen's."""
    vocabulary = tokenizer.vocabulary
    qwens = (vocabulary.pattern, vocabulary.normalization) == (QWEN_PATTERN, "NFC")
    return arch_of(model.config) != "qwen2.5" or qwens


def stop_ids(tokenizer: Tokenizer, chat: bool) -> list[int]:
    """The ids at which generation ends, as with our engine; first the one that the model's training
    ends with: the end of the assistant's turn, or, for a base model, the start of a document."""
    end, bos = tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()
    return list(dict.fromkeys([end, bos] if chat else [bos, end]))


def puts_bos(tokenizer: Tokenizer, chat: bool) -> bool:
    """Whether the exported tokenizer puts the token that begins every document before a text, as it
    was in training. A chat model's does not: its template begins with it. Nor does Qwen's: the
    published one does not."""
    return not chat and tokenizer.chat_format != "qwen2.5"


# --------------------------------------------------------------------------------------------------
# tokenizer.json, tokenizer_config.json


def write_tokenizer(folder: Path, tokenizer: Tokenizer, chat: bool, sequence_len: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the chat template in the latter."""
    names = {id: name for name, id in tokenizer.vocabulary.specials.items()}
    bos = tokenizer.get_bos_token_id()
    content = tokenizer_json(tokenizer.vocabulary)
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is: others bring a split pattern of their own
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sequence_len,
        "clean_up_tokenization_spaces": False,
        "bos_token": names[bos],
        "eos_token": names[stop_ids(tokenizer, chat)[0]],
        "pad_token": names[bos],
        "unk_token": None,
    }
    if tokenizer.chat_format == "qwen2.5":
        for token in content["added_tokens"]:
            token["special"] = not READABLE.fullmatch(token["content"])
    if puts_bos(tokenizer, chat):
        content["post_processor"] = _prepend(names[bos], bos)
        config["add_bos_token"] = True
    template = chat_template(tokenizer.chat_format, tokenizer.default_system)
    if chat and template:
        config["chat_template"] = template
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in content["added_tokens"]
    }
    with open(folder / "tokenizer.json", "w", encoding="utf-8") as f:
        json.dump(content, f, ensure_ascii=False)
    write_json(folder / "tokenizer_config.json", config)


def _prepend(name: str, id: int) -> dict[str, Any]:
    """The post-processor that puts a special token before a text."""
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    text = [{"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, *text],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}},
    }
