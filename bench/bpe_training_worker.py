"""One measured BPE training, in a process of its own: the worker of bench/bpe_training.py.

Needs nothing but the standard library and the package that is measured (pyarrow for arrays), so
that it runs under the Python of any environment. Reads the texts first, then starts the clock,
trains, and prints one line of JSON. Its argument is JSON too; bench/bpe_training.py makes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable


def memory_mib(field: str) -> float | None:
    """VmRSS (held now) or VmHWM (the most held) of this process; None where Linux does not tell.

    Not getrusage: its maximum outlives exec, so it would tell of the parent process.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields[field].split()[0]) / 1024  # given in KiB
    except (OSError, KeyError):
        return None


def reset_peak() -> None:
    """Makes VmHWM start anew from what is held now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
        f.write("5")


def tiktoken_mismatches(tokenizer, texts: list[str]) -> int:
    """How many of the texts tiktoken encodes otherwise than the tokenizer itself."""
    import tiktoken

    ranks = {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}
    encoding = tiktoken.Encoding(
        "bench", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={}
    )
    return sum(tokenizer.encode(text) != encoding.encode_ordinary(text) for text in texts)


# Each returns what is timed: a function that trains on the texts. That gives back the tokenizer
# and, where the package tells them in bytes, a function for the tokens by rank.


def rustbpe_trainer(vocab_size: int, pattern: str) -> Callable:
    """Ours or PyPI's 0.1.0, whichever this Python has."""
    import rustbpe

    def train(texts):
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=pattern)
        return tokenizer, lambda: [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()]

    return train


def ffbpe_trainer(vocab_size: int, pattern: str) -> Callable:
    """ffbpe as its train_bpe does it. Without a pattern its own (GPT-2's), which it scans by hand;
    any other goes through its regex engine."""
    from ffbpe import BpeTrainer, PreTokenizer

    def train(texts):
        counter = PreTokenizer([], pat_str=pattern or None).word_counter()
        counter.add_source(iter(texts))
        # Ties as in rustbpe, or the merges could not be compared.
        trainer = BpeTrainer([], tie_break="smallest_pair_id")
        trainer.add_word_counter(counter)
        trainer.train(vocab_size)
        return trainer, lambda: sorted(trainer.vocab, key=trainer.vocab.get)

    return train


def tokenizers_trainer(vocab_size: int, pattern: str) -> Callable:
    """Hugging Face tokenizers; its ties break in another way."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    def train(texts):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(iter(texts), trainer)
        return tokenizer, None

    return train


TRAINERS = {
    "rustbpe": rustbpe_trainer,
    "ffbpe": ffbpe_trainer,
    "tokenizers": tokenizers_trainer,
}


def read(folder: str, kind: str) -> list:
    """The texts: a list of str, or a list of Arrow arrays of them."""
    if kind == "array":
        import pyarrow.parquet as pq

        return pq.read_table(folder + "/texts.parquet")["text"].chunks
    with open(folder + "/texts.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def main(spec: dict) -> None:
    if spec["threads"]:
        # Affinity, not a library's own variable: every thread pool takes its size from it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    train = TRAINERS[spec["package"]](spec["vocab_size"], spec["pattern"])
    texts = read(spec["folder"], spec["texts"])
    reset_peak()
    before = memory_mib("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    tokenizer, tokens = train(texts)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = memory_mib("VmHWM")
    result = {
        "version": importlib.metadata.version(spec["package"]),
        "seconds": round(seconds, 3),
        # Over all threads; other work on the machine disturbs this less.
        "cpu_seconds": round(cpu_seconds, 3),
        # What training added to the memory that the texts take anyway.
        "added_rss_mib": round(peak - before, 1) if peak and before else None,
    }
    if tokens:
        merges = hashlib.sha256()
        for rank, token in enumerate(tokens()):
            merges.update(f"{rank} {token.hex()}\n".encode())
        result["merges_sha256"] = merges.hexdigest()
    if check_docs := spec["check_docs"]:
        result["tiktoken_docs"] = min(check_docs, len(texts))
        result["tiktoken_mismatches"] = tiktoken_mismatches(tokenizer, texts[:check_docs])
    print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
