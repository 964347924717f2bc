"""
One of our Qwen2.5-shaped models as a GGUF file, which llama.cpp and what is built on it load.

    write_gguf(Path("d20.gguf"), model, tokenizer, name="d20", chat=True, dtype="bfloat16")

The file holds shape, vocabulary, chat template and weights; it is written by the `gguf` package,
one tensor at a time, and gets its name when it is whole. No value is computed: tensors change their
names and, if asked, their type. Rows of padding beyond the tokenizer's last id are left out, since
the format has no word for rows that must never be sampled. Smaller, quantized files are made from
this one by llama.cpp's own llama-quantize.

llama.cpp cuts text by the pre-tokenizer's name, from a list compiled into it: ours is not there,
and the nearest one is used (see NEAREST). It does not bring text into the Unicode form NFC either,
as Qwen's tokenizer does. bench/gguf.py compares with llama.cpp itself. Floor 3, above hf_export.py.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from nanochat.chat_template import chat_template
from nanochat.common import UserError, atomic_write, print0, warn0
from nanochat.hf_export import DTYPES, READABLE, cast_tensor, puts_bos, stop_ids
from nanochat.models import arch_of
from nanochat.progress import track
from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer_files import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    GPT4O_PATTERN,
    QWEN_PATTERN,
    tokenizer_json,
)
from nanochat.vocabulary import SPLIT_PATTERN

ARCH = "qwen2"  # llama.cpp's name of the architecture

# Our names of a block's modules -> GGUF's.
BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",  # absent when tied: llama.cpp takes the embedding then
}
ROWS_ARE_IDS = ("token_embd.weight", "output.weight")

# Split patterns -> llama.cpp's names. Ours has none: no name there cuts words as we do and digits
# in twos. Llama 3's, which cuts digits in threes, gave the same ids for the most documents.
NEAREST = "llama-bpe"
PRE_TOKENIZERS = {
    QWEN_PATTERN: "qwen2",
    GPT2_PATTERN: "gpt-2",
    GPT4_PATTERN: "llama-bpe",
    GPT4O_PATTERN: "gpt-4o",
    SPLIT_PATTERN: NEAREST,
}


def check_gguf(model: Any, tokenizer: Tokenizer) -> None:
    """Raises UserError, and says what stands in the way, unless `write_gguf` can write the model.

    Quick: for before an export that takes minutes."""
    arch = arch_of(model.config)
    if arch != "qwen2.5":
        raise UserError(
            f"--gguf: this model is a {type(model).__name__} (--arch={arch}), and llama.cpp has no "
            "such architecture (norms without weights, normalised queries and keys, relu squared, "
            "softcapped logits). Leave --gguf out: transformers loads the export. For llama.cpp "
            "train with --arch=qwen2.5"
        )
    vocabulary = tokenizer.vocabulary
    if vocabulary.pattern not in PRE_TOKENIZERS:
        raise UserError(
            f"--gguf: llama.cpp has no name for this tokenizer's split pattern, "
            f"{vocabulary.pattern!r}, and would give other ids. Leave --gguf out"
        )
    _import_gguf()


def write_gguf(
    path: Path, model: Any, tokenizer: Tokenizer, name: str, chat: bool, dtype: str
) -> None:
    """Writes the model, `name` for people to read, its matrices as `dtype` ("bfloat16", "float16",
    "float32"). `chat` says whether it has learned conversations, as in hf_export.export_model.

    Norms and biases are float32 always: they are small, and llama.cpp wants them so. Raises
    UserError for what llama.cpp cannot run, and for values that are not to be had in `dtype`."""
    check_gguf(model, tokenizer)
    gguf = _import_gguf()
    writer = gguf.GGUFWriter(path, ARCH)
    _add_shape(writer, model.config, name, gguf.LlamaFileType[_FILE_TYPES[dtype]])
    _add_vocabulary(writer, tokenizer, gguf.TokenType)
    _add_special_ids(writer, tokenizer, chat)
    template = chat_template(tokenizer.chat_format, tokenizer.default_system)
    if chat and template:
        writer.add_chat_template(template)
    tensors = gguf_tensors(model, tokenizer.get_vocab_size())
    types = {key: dtype if t.ndim == 2 else "float32" for key, t in tensors.items()}
    for key, t in tensors.items():
        kind = gguf.GGMLQuantizationType[_TENSOR_TYPES[types[key]]]
        size = t.numel() * DTYPES[types[key]].itemsize
        # The type is named, so the one of NumPy, which has no bfloat16, does not count
        writer.add_tensor_info(key, t.shape, None, size, raw_dtype=kind)
    try:
        with atomic_write(path) as f, contextlib.closing(writer):
            writer.write_header_to_file(Path(f.name))  # opens the temporary file a second time
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for key in track(tensors, f"writing {path.name}", "tensors"):
                cast = cast_tensor(key, tensors[key], types[key])
                raw = cast.view(torch.uint16) if cast.dtype == torch.bfloat16 else cast
                writer.write_tensor_data(raw.numpy())
    except OSError as e:
        raise UserError(f"{path} could not be written: {e}") from e
    print0(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1e6:,.1f} MB")
    _say_what_differs(tokenizer)


# The `gguf` package's names of our types: of a file as a whole, and of a tensor.
_FILE_TYPES = {"bfloat16": "MOSTLY_BF16", "float16": "MOSTLY_F16", "float32": "ALL_F32"}
_TENSOR_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def _import_gguf() -> Any:
    try:
        import gguf  # an extra: only this export needs it
    except ImportError as e:
        raise UserError(
            "--gguf needs the package gguf, which is not installed: uv sync --extra gguf "
            "(or pip install gguf), or leave --gguf out"
        ) from e
    return gguf


def gguf_tensors(model: Any, rows: int) -> dict[str, torch.Tensor]:
    """The parameters under GGUF's names, embedding and head cut to `rows`, the tokenizer's size.

    The rotary halves of queries and keys need no reordering: this architecture rotates as we do."""
    found = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")  # "weight" or "bias"
        if module.startswith("model.layers."):
            number, _, inner = module.removeprefix("model.layers.").partition(".")
            renamed = f"blk.{number}.{BLOCK_NAMES[inner]}.{kind}"
        else:
            renamed = f"{OUTER_NAMES[module]}.{kind}"
        found[renamed] = tensor[:rows] if renamed in ROWS_ARE_IDS else tensor
    return found


def _add_shape(writer: Any, config: Any, name: str, file_type: int) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_context_length(config.sequence_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_mlp)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _add_vocabulary(writer: Any, tokenizer: Tokenizer, kinds: Any) -> None:
    """Tokens with their kinds, merges, and the pre-tokenizer's name.

    Control tokens are what text never becomes. Qwen's tool tags are there to be read, so they are
    "user defined": llama.cpp prints them, and, as with Qwen's own files, takes them out of text."""
    content = tokenizer_json(tokenizer.vocabulary)["model"]
    pre = PRE_TOKENIZERS[tokenizer.vocabulary.pattern]
    if content["ignore_merges"] and pre != "llama-bpe":  # which looks whole pieces up first
        raise UserError("--gguf: the tokenizer has tokens that no merge makes; llama.cpp needs all")
    specials = {id: name for name, id in tokenizer.vocabulary.specials.items()}
    spelled = {id: token for token, id in content["vocab"].items()}
    tokens, types = [], []
    for id in range(tokenizer.get_vocab_size()):
        if id in specials:
            readable = tokenizer.chat_format == "qwen2.5" and READABLE.fullmatch(specials[id])
            tokens.append(specials[id])
            types.append(kinds.USER_DEFINED if readable else kinds.CONTROL)
        else:  # ids between special tokens may stand for nothing
            tokens.append(spelled.get(id, f"[UNUSED{id}]"))
            types.append(kinds.NORMAL if id in spelled else kinds.UNUSED)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE, bytes spelled as GPT-2 does
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(content["merges"])


def _add_special_ids(writer: Any, tokenizer: Tokenizer, chat: bool) -> None:
    """Where generation ends, and whether a text begins with the token that begins documents: the
    same as in the export for transformers."""
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    writer.add_bos_token_id(bos)
    writer.add_pad_token_id(bos)
    writer.add_eos_token_id(stop_ids(tokenizer, chat)[0])
    writer.add_eot_token_id(end)
    # "End of message": one more at which llama.cpp ends a reply, and nothing besides. Our engine
    # ends at both too
    writer.add_eom_token_id(bos)
    writer.add_add_bos_token(puts_bos(tokenizer, chat))


# Of bench/results/gguf.json, whose test compares: documents of the validation text that llama.cpp
# encodes to other ids than we do, with NEAREST in the place of our pattern.
MEASURED = {"documents": 300, "differ": 166}


def _say_what_differs(tokenizer: Tokenizer) -> None:
    """Warns where llama.cpp will give other ids than ours for some texts."""
    if tokenizer.vocabulary.pattern == SPLIT_PATTERN:
        differ, documents = MEASURED["differ"], MEASURED["documents"]
        warn0(
            "llama.cpp has no pre-tokenizer that cuts digits in twos, as this tokenizer does. The "
            f"nearest, {NEAREST!r}, cuts them in threes: numbers get other ids there, and so did "
            f"{differ} of {documents} documents of mixed text ({differ / documents:.0%}). Models "
            "trained with --tokenizer=qwen2.5 have no such difference"
        )
