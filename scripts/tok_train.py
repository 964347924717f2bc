"""
Trains the tokenizer: the first stage, which every other one needs.

    python -m scripts.tok_train                      # 65,536 tokens, from 2 billion characters
    python -m scripts.tok_train --vocab_size=4096 --data=my_texts/

Reads the training text (never the validation file), learns a byte-level BPE with rustbpe, writes
tokenizer.json, token_bytes.pt and tokenizer.pkl to $NANOCHAT_BASE_DIR/tokenizer/. Models trained
with an older tokenizer of that folder cannot be used with the new one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from nanochat import flags
from nanochat.common import UserError, append_jsonl, get_base_dir, print0
from nanochat.dataset import iter_text_arrays, iter_texts, split_files, text_size
from nanochat.preview import preview_corpus
from nanochat.progress import Progress
from nanochat.tokenizer import Tokenizer, without_surrogates

NUM_CHECKED = 200  # documents on which decode(encode(text)) must give the text back


@dataclass
class Args:
    """Train the tokenizer on the training text; writes $NANOCHAT_BASE_DIR/tokenizer/."""

    max_chars: int = 2_000_000_000
    """Characters of text to learn from; more changes little."""
    vocab_size: int = 65_536
    """Tokens in all: 256 bytes, learned merges, 9 special tokens."""
    doc_cap: int = 10_000
    """Characters taken of each document, so that a few huge ones do not decide the vocabulary."""
    data: str | None = None
    """Text: a file, folder or glob of parquet, jsonl(.gz, .zst) with `text`, or txt. Default:
    base_data/."""
    val_data: str | None = None
    """Validation file, which is not read; default: as scripts.base_train chooses it."""
    preview: bool = False
    """Print a few documents and how many are counted, and stop."""


class Corpus:
    """Texts on their way to the trainer, each cut to doc_cap, max_chars in all; counts them.

    Parquet goes as Arrow arrays, each of many texts, everything else as str: no more than one
    batch of texts is in memory."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.files = split_files(args.data, args.val_data)
        self.docs = self.chars = 0
        self.bytes_read = 0  # about, and before anything is cut
        self.checked: list[str] = []  # the first few texts

    def __iter__(self) -> Iterator[Any]:
        keep = self.files.keep_train  # a lone file holds both parts
        for path in self.files.train:
            arrow = path.name.endswith(".parquet") and keep == "all"
            texts = ([text] for text in iter_texts([path], keep=keep))
            for batch in iter_text_arrays(path) if arrow else texts:
                yield from self._counted(batch)
                if self.chars >= self.args.max_chars:
                    return

    def _counted(self, batch: Any) -> Iterator[Any]:
        """Cuts and counts an Arrow array or a list of texts; what max_chars falls into, as str."""
        if isinstance(batch, list):
            self.bytes_read += sum(map(len, batch))
        else:
            self.bytes_read += batch.nbytes
            batch = pc.utf8_slice_codeunits(batch, 0, self.args.doc_cap)
            chars = pc.sum(pc.utf8_length(batch)).as_py() or 0
            if self.chars + chars < self.args.max_chars:
                self.docs += len(batch)
                self.chars += chars
                self.checked += batch[: NUM_CHECKED - len(self.checked)].to_pylist()
                yield batch
                return
            batch = batch.to_pylist()
        for text in batch:
            text = text[: min(self.args.doc_cap, self.args.max_chars - self.chars)]
            self.docs += 1
            self.chars += len(text)
            if len(self.checked) < NUM_CHECKED:
                self.checked.append(text)
            yield text
            if self.chars >= self.args.max_chars:
                return


class Meter:
    """Shows how far it is: the reading of the text, then the merging of tokens."""

    def __init__(self, corpus: Corpus, bar: Progress) -> None:
        self.corpus, self.bar = corpus, bar
        self.size = max(1, sum(map(text_size, corpus.files.train)))
        self.merging = False
        self.bar.show("reading")

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Called by the trainer about once a second, see Tokenizer.train."""
        if phase != "count":
            if not self.merging:
                self.merging = True
                self.bar.restart(total, "merging", "tokens", start=done)
            self.bar.advance(done - self.bar.eta.done)
            return
        # The trainer knows the bytes that it has counted, we what there is to read
        docs, chars = self.corpus.docs, self.corpus.chars
        share = min(1, max(self.corpus.bytes_read / self.size, chars / self.corpus.args.max_chars))
        self.bar.advance(share - self.bar.eta.done, show=False)
        self.bar.show(
            f"reading: {docs:,} documents, {chars / 1e6:,.0f}M characters, {share:.0%}, "
            f"{self.bar.rest()}"
        )


def main(args: Args) -> None:
    for flag in ("max_chars", "doc_cap"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag}={getattr(args, flag)}: must be at least 1")
    if args.preview:
        files = split_files(args.data, args.val_data)
        return preview_corpus(files, args.doc_cap, args.max_chars)

    # Learn. The trainer pulls the texts through as it counts them; the corpus is never in memory.
    start = time.perf_counter()
    corpus = Corpus(args)
    with Progress(1.0, "reading") as bar:
        tokenizer = Tokenizer.train(corpus, args.vocab_size, Meter(corpus, bar))
    seconds = time.perf_counter() - start
    if corpus.chars == 0:
        raise UserError(f"the training text is empty (--data={args.data or 'base_data'})")

    # Check before anything is replaced: what is encoded comes back
    checked = [without_surrogates(text) for text in corpus.checked]
    encoded = tokenizer.encode(checked)
    for text, ids in zip(checked, encoded, strict=True):
        if tokenizer.decode(ids) != text:
            raise RuntimeError(f"decode(encode(text)) is not the text for {text[:200]!r}")

    directory = get_base_dir() / "tokenizer"
    tokenizer.save(directory)

    lengths = tokenizer.token_bytes[tokenizer.token_bytes > 0]  # special tokens have 0
    row = {
        "vocab_size": tokenizer.get_vocab_size(),
        "max_chars": args.max_chars,
        "doc_cap": args.doc_cap,
        "docs": corpus.docs,
        "chars": corpus.chars,
        "seconds": round(seconds, 2),
        "token_bytes_mean": round(float(lengths.mean()), 3),
        "token_bytes_std": round(float(lengths.std()), 3),
        "token_bytes_min": int(lengths.min()),
        "token_bytes_max": int(lengths.max()),
        "chars_per_token": round(sum(map(len, checked)) / max(1, sum(map(len, encoded))), 3),
        "typed": flags.typed(args),
        "time": time.time(),
    }
    append_jsonl(get_base_dir() / "report" / "tok_train.jsonl", row)
    print0(
        f"{row['vocab_size']:,} tokens from {corpus.chars:,} characters of {corpus.docs:,} "
        f"documents in {seconds:.1f} s; {row['chars_per_token']} characters a token\n"
        f"written to {directory}"
    )


if __name__ == "__main__":
    flags.run(main, Args)
