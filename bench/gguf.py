"""
GGUF against llama.cpp itself: the same ids, the same logits, the same 64 greedy tokens.

    python -m venv /tmp/llama && CMAKE_ARGS=-DGGML_NATIVE=OFF \\
        /tmp/llama/bin/pip install llama-cpp-python
    python -m bench.gguf --data=texts/ --peer_python=/tmp/llama/bin/python

For every split pattern that the export knows, a vocabulary is trained on the training text with it,
exported with a tiny random model, and llama.cpp encodes documents of the validation text. For our
own pattern, which llama.cpp has no name for, all names that come near it are tried: the best is
nanochat.gguf.NEAREST. Then models of several shapes and types are compared in their logits, the
tokens they continue with, where replies end, and how a conversation begins. What must be equal and
is not ends it in an error. The result: bench/results/gguf.json.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import is_normalized
from unittest.mock import patch

import numpy as np
import torch

import rustbpe
from bench import surroundings
from bench.bpe_common import RESULTS, Run, describe, measure
from nanochat import flags, gguf
from nanochat.common import UserError, print0, write_json
from nanochat.dataset import iter_texts, split_files
from nanochat.engine import Engine
from nanochat.gguf import write_gguf
from nanochat.hf_export import DTYPES
from nanochat.models import QwenConfig, build_model
from nanochat.tokenizer import Tokenizer, without_surrogates
from nanochat.tokenizer_files import GPT2_PATTERN, GPT4_PATTERN, GPT4O_PATTERN, QWEN_PATTERN
from nanochat.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN, Vocabulary

OUT = RESULTS / "gguf.json"
PATTERNS = {
    "qwen2.5": QWEN_PATTERN,
    "gpt-2": GPT2_PATTERN,
    "gpt-4": GPT4_PATTERN,
    "gpt-4o": GPT4O_PATTERN,
    "ours": SPLIT_PATTERN,
}
# What llama.cpp might take for our pattern: its names for patterns that cut words as ours does or
# nearly so, and digits in threes (the first five), singly (three more), or not at all.
CANDIDATES = (
    "llama-bpe", "gpt-4o", "deepseek-v3", "kimi-k2", "tiny_aya",
    "bailingmoe", "qwen2", "tekken",
    "gpt-2", "deepseek-llm",
)  # fmt: skip
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
TOKENS = 64  # of a greedy continuation
PROMPT = 48  # ids that it continues

# (tokenizer, type of the file, what is special about the shape)
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen2.5", "float32", {}),
    ("qwen2.5", "float32", {"tied": False, "n_kv_head": 4}),
    ("qwen2.5", "float32", {"n_kv_head": 1, "n_head": 3, "n_embd": 96, "norm_eps": 1e-5}),
    ("qwen2.5", "float32", {"rope_theta": 10_000.0}),
    ("ours", "float32", {}),
    ("qwen2.5", "float16", {}),
    ("qwen2.5", "bfloat16", {}),
]
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "What is 27 + 15?"}]},
    {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "  Where?\n\n"},
            {"role": "assistant", "content": "Here."},
            {"role": "user", "content": "It's 東京, isn't it?"},
        ]
    },
]


@dataclass
class Args:
    """Compare exported GGUF files with llama.cpp."""

    peer_python: str
    """Python of an environment with llama-cpp-python."""
    data: str | None = None
    """A folder or glob of text files; default: $NANOCHAT_BASE_DIR/base_data/. The validation file
    of it, as in training, is what llama.cpp encodes."""
    about: str = "text"
    """What the text is, for the record."""
    documents: int = 500
    """Documents of the validation text to encode."""
    train_chars: int = 30_000_000
    """Characters of training text to learn the vocabularies from."""
    vocab_size: int = 8192
    """Ordinary tokens of the vocabularies."""
    prompts: int = 8
    """Continuations for each model."""
    out: str = str(OUT)
    """Where the result goes."""


def train(texts: list[str], name: str, size: int) -> Tokenizer:
    """A tokenizer with that pattern; Qwen's special tokens and NFC go with Qwen's pattern."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, size, pattern=PATTERNS[name])
    ranks: dict[bytes, int] = {}
    for token, _ in trainer.get_mergeable_ranks():
        ranks.setdefault(bytes(token), len(ranks))
    is_qwen = name == "qwen2.5"
    names = QWEN_SPECIALS if is_qwen else SPECIAL_TOKENS
    specials = {special: len(ranks) + i for i, special in enumerate(names)}
    return Tokenizer(Vocabulary(PATTERNS[name], ranks, specials, "NFC" if is_qwen else None))


def random_model(tokenizer: Tokenizer, shape: dict[str, Any]) -> Any:
    """A tiny model in which every parameter matters, with rows of padding at the end."""
    rows = (-(-tokenizer.get_vocab_size() // 64) + 1) * 64
    config = QwenConfig(256, rows, n_layer=3, n_head=4, n_kv_head=2, n_embd=128, n_mlp=192)
    model = build_model(replace(config, **shape), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            matrix = p.ndim == 2 and "embed" not in name and "lm_head" not in name
            # Twice the usual: continuations then go on instead of going round in a circle
            p.normal_(mean, 2 * p.size(1) ** -0.5 if matrix else 0.3, generator=generator)
    return model


def ask(args: Args, folder: Path, **spec: Any) -> dict[str, Any]:
    """What llama.cpp says of model.gguf in the folder."""
    write_json(folder / "spec.json", spec)  # too much for a command line
    run = Run("llama-cpp-python", "str", len(os.sched_getaffinity(0)))
    return measure("gguf_worker.py", args.peer_python, run, folder=str(folder))


def compare_tokenization(
    args: Args, folder: Path, name: str, tokenizer: Tokenizer, pre: str, texts: list[str]
) -> dict[str, Any]:
    """How many documents get other ids with that pre-tokenizer."""
    model = random_model(tokenizer, {"n_layer": 1, "n_embd": 32, "n_mlp": 32})
    with patch.dict(gguf.PRE_TOKENIZERS, {PATTERNS[name]: pre}):
        write_gguf(folder / "model.gguf", model, tokenizer, "bench", True, "float32")
    theirs = ask(args, folder, task="encode", texts=texts)["ids"]
    ours = tokenizer.encode(texts)
    differ = [text for text, a, b in zip(texts, ours, theirs) if a != b]
    nfc = tokenizer.vocabulary.normalization == "NFC"
    row = {
        "pattern": name,
        "pre_tokenizer": pre,
        "documents": len(texts),
        "documents_that_differ": len(differ),
        "of_these_with_digits": sum(any(map(str.isnumeric, text)) for text in differ),
        # llama.cpp does not normalise: these are other texts there
        "of_these_not_nfc": sum(nfc and not is_normalized("NFC", text) for text in differ),
        "tokens": sum(map(len, ours)),
        "tokens_there": sum(map(len, theirs)),
    }
    print0(f"{name:8} as {pre:12} {len(differ):4} of {len(texts)} documents differ")
    return row


def compare_model(
    args: Args, folder: Path, tokenizer: Tokenizer, dtype: str, shape: dict[str, Any],
    texts: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Logits, greedy continuations, stop tokens and the beginning of a conversation."""
    model = random_model(tokenizer, shape)
    write_gguf(folder / "model.gguf", model, tokenizer, "bench", True, dtype)
    long = (tokenizer.encode(text, prepend="<|bos|>") for text in texts)
    prompts = [ids[:PROMPT] for ids in long if len(ids) >= PROMPT][: args.prompts]
    chats = [conversation["messages"] for conversation in CONVERSATIONS]
    with torch.no_grad():  # compared is the arithmetic: here with the values that the file has
        for p in model.parameters():
            p.copy_(p.to(DTYPES[dtype]) if p.ndim == 2 else p)
    theirs = ask(args, folder, task="run", prompts=prompts, tokens=TOKENS, chats=chats)
    rows, _ = Engine(model, tokenizer).generate_batch(prompts, max_tokens=TOKENS, temperature=0)
    with torch.inference_mode():
        logits = model(torch.tensor(prompts))[..., : tokenizer.get_vocab_size()]
    difference = (torch.from_numpy(np.load(folder / "logits.npy")) - logits).abs().max().item()
    ours = [row[PROMPT:] for row in rows]
    # Ours ends where it samples a stop token
    same = [a == b[: len(a)] for a, b in zip(ours, theirs["tokens"])]
    opened = [tokenizer.render_for_completion(conversation) for conversation in CONVERSATIONS]
    row = {
        "pattern": next(name for name, p in PATTERNS.items() if p == tokenizer.vocabulary.pattern),
        "dtype": dtype,
        "shape": shape,
        "prompts": len(prompts),
        "tokens": sum(map(len, ours)),
        "distinct_tokens": len(set(itertools.chain(*ours))),
        "continuations_that_differ": same.count(False),
        "logits_max_difference": float(f"{difference:.3g}"),
        "logits_max": float(f"{logits.abs().max().item():.3g}"),
        "same_stop_tokens": set(theirs["stop"]) == tokenizer.stop_token_ids,
        "same_chat_ids": theirs["chats"] == opened,
        "version": theirs["version"],
    }
    print0(
        f"{row['pattern']:8} {dtype:9} {shape or ''}: {row['continuations_that_differ']} of "
        f"{len(prompts)} continuations differ, logits by {difference:.2g}"
    )
    return row


def check(tokenization: list[dict[str, Any]], models: list[dict[str, Any]]) -> None:
    """Raises UserError for what the export promises and llama.cpp does not confirm."""
    ours = [row for row in tokenization if row["pattern"] == "ours"]
    best = min(ours, key=lambda row: row["documents_that_differ"])
    if best["pre_tokenizer"] != gguf.NEAREST:
        raise UserError(f"nanochat.gguf.NEAREST should be {best['pre_tokenizer']!r}")
    for row in tokenization:
        differ = row["documents_that_differ"] - row["of_these_not_nfc"]
        if row["pattern"] == "qwen2.5" and differ:
            raise UserError(f"with Qwen2.5's pattern the ids differ: {row}")
    for row in models:
        # With the other types llama.cpp rounds what goes through the model too
        exact = row["dtype"] != "float32" or row["continuations_that_differ"] == 0
        if not (exact and row["same_stop_tokens"] and row["same_chat_ids"]):
            raise UserError(f"llama.cpp does another thing: {row}")


def main(args: Args) -> None:
    load_before = os.getloadavg()[0]
    files = split_files(args.data)
    left, learn = args.train_chars, []
    for text in map(without_surrogates, iter_texts(files.train)):
        learn.append(text[:left])
        left -= len(learn[-1])
        if left <= 0:
            break
    texts = list(itertools.islice(map(without_surrogates, iter_texts([files.val])), args.documents))
    tokenizers = {name: train(learn, name, args.vocab_size) for name in PATTERNS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenization = [
            compare_tokenization(args, folder, name, tokenizer, pre, texts)
            for name, tokenizer in tokenizers.items()
            for pre in (CANDIDATES if name == "ours" else (gguf.PRE_TOKENIZERS[PATTERNS[name]],))
        ]
        models = [
            compare_model(args, folder, tokenizers[name], dtype, shape, texts)
            for name, dtype, shape in MODELS
        ]
    check(tokenization, models)
    result = {
        "corpus": describe(texts, args.about),
        "vocab_size": args.vocab_size,
        "tokenization": tokenization,
        "models": models,
        **surroundings(load_before),
    }
    write_json(args.out, result)
    print0(f"wrote {args.out}")


if __name__ == "__main__":
    flags.run(main, Args)
