"""
Text for training: every shard is tokenized once, ahead of training, and mapped from disk then.

A shard is a file, or several small ones together. The shards that a run will come to are prepared
in the background, by a process of lowest priority that ends with the one that started it; training
on the first one starts meanwhile. Of all processes that share the disk one tokenizes a shard and
the others wait for it. With `stream` there is no cache: a shard is tokenized into memory when its
turn comes, for the same rows. Floor 2.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nanochat.common import UserError, fingerprint, get_base_dir, print0, warn0
from nanochat.dataset import Keep, iter_texts, text_size
from nanochat.packing import Documents
from nanochat.progress import Progress
from nanochat.threads import end_if_over, in_thread
from nanochat.token_cache import (
    claim,
    file_fingerprints,
    free_bytes,
    num_tokens,
    open_folder,
    sweep,
    write_folder,
)
from nanochat.tokenizer import Tokenizer
from nanochat.vocabulary import Vocabulary

T = TypeVar("T")

MIN_SHARD = 8 << 20  # bytes: smaller files are packed together, or each would waste its last row
BATCH_CHARS = 4_000_000  # characters tokenized at a time: what bounds memory, and how soon we end


class TextSource:
    """Text files as shards of Documents, from the cache or, with `stream`, from memory."""

    cut = True  # documents may be cut to fill rows

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: Any,
        keep: Keep = "all",
        cache: str | Path | None = None,
        stream: bool = False,
    ) -> None:
        self.files, self.tokenizer, self.keep, self.stream = files, tokenizer, keep, stream
        self.cache = Path(cache).expanduser() if cache else get_base_dir() / "token_cache"
        self.shards = group(files, [path.stat().st_size for path in files])
        self.keys = self._keys(self.shards)
        self.fingerprint = fingerprint(*self.keys)
        self.num_made = 0  # shards that we have tokenized into the cache
        self._background: subprocess.Popen[bytes] | None = None

    def num_shards(self) -> int:
        return len(self.shards)

    def _keys(self, shards: list[list[Path]]) -> list[str]:
        """What the ids of shards depend on. The names of files do not matter, their order does."""
        files = [path for shard in shards for path in shard]
        prints = file_fingerprints(files, self.cache / "fingerprints.json")
        return [
            fingerprint(self.tokenizer.fingerprint, self.keep, *(prints[path] for path in shard))
            for shard in shards
        ]

    def load(self, shard: int) -> Documents:
        """The documents of a shard, tokenized now if nobody has prepared them."""
        if self.stream:
            return self._in_memory(shard)
        folder = self._folder(shard)
        documents = open_folder(folder)
        if documents is not None:
            return documents
        size = sum(map(text_size, self.shards[shard]))
        try:
            with Progress(size, f"tokenizing {self.shards[shard][0].name}", "B") as bar:
                return self.prepare(shard, wait=True, read=bar.advance)  # type: ignore[return-value]
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):  # hours into a run, perhaps
                warn0(f"{e}: no room for {folder}; this shard is tokenized into memory")
                return self._in_memory(shard)
            raise UserError(
                f"cannot write the token cache {folder} ({e}); name another place by "
                "--token_cache_dir, or do without by --stream (the same rows)"
            ) from e

    def _folder(self, shard: int) -> Path:
        return self.cache / f"{self.shards[shard][0].name.split('.')[0]}-{self.keys[shard]}"

    def _in_memory(self, shard: int) -> Documents:
        ids, lengths = zip(*self._encode(shard))
        offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
        return Documents(np.concatenate(ids), offsets)

    def prepare(
        self, shard: int, wait: bool, read: Callable[[int], None] = lambda size: None
    ) -> Documents | None:
        """Tokenizes a shard into the cache. None if another process is at it and we do not wait.
        `read` hears of the bytes of text that are done.

        Raises OSError where the cache cannot be written."""
        folder = self._folder(shard)
        with claim(folder, wait) as ours:
            if not ours:
                return None
            documents = open_folder(folder)  # another may have made it while we waited
            if documents is None:
                if folder.exists():
                    warn0(f"{folder} is damaged and made again")
                write_folder(folder, self._encode(shard, read))
                self.num_made += 1
                documents = open_folder(folder)
        if documents is None:
            raise UserError(f"{folder} was damaged right after it was written; check the disk")
        return documents

    def _encode(
        self, shard: int, read: Callable[[int], None] = lambda size: None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, lengths) of the shard's documents, each after bos, some megabytes at a time."""
        bos, paths = self.tokenizer.get_bos_token_id(), self.shards[shard]
        found = 0
        for path in paths:
            before = found
            try:
                for texts in _batched(iter_texts([path], keep=self.keep)):
                    end_if_over()
                    ids, offsets = self.tokenizer.encode_batch(texts, prepend=bos)
                    found += len(texts)
                    read(sum(map(len, texts)))  # characters: of most text, about as many bytes
                    yield ids, np.diff(offsets)
            except OSError as e:
                raise UserError(f"{path} cannot be read: {e}") from e
            if found == before and self.keep == "all":
                raise UserError(f"{path} holds no documents; remove it or name others")
        if not found:
            raise UserError(
                f"{paths[0]} has too few documents to give some to training and some to "
                "validation; add text, or name a validation file by --val_data"
            )
        if self._keys([paths]) != [self.keys[shard]]:
            raise UserError(f"{paths[0]} has changed since this run began; begin again")

    # ---------------------------------------------------------------------------------------------
    # Ahead of training

    def tokens(self, shard: int) -> int:
        """How many tokens a shard has; about how many if it is not prepared yet."""
        known = num_tokens(self._folder(shard))
        if known is not None:
            return known
        return int(sum(map(text_size, self.shards[shard])) * self._tokens_per_byte)

    @cached_property
    def _tokens_per_byte(self) -> float:
        """Measured on the first documents, as far as they can be read."""
        texts: list[str] = []
        with contextlib.suppress(UserError, OSError):
            texts.extend(itertools.islice(iter_texts(list(self.files[:1])), 100))
        size = sum(len(text.encode("utf-8", "replace")) for text in texts)
        return len(self.tokenizer.encode_batch(texts, prepend=None)[0]) / size if size else 0.25

    def _missing(self, shards: Sequence[int]) -> list[int]:
        return [shard for shard in shards if num_tokens(self._folder(shard)) is None]

    def check_disk(self, shards: Sequence[int]) -> None:
        """Prints what the cache takes; UserError if these shards will not fit on its disk."""
        if self.stream:
            print0("no token cache: shards are tokenized into memory when their turn comes")
            return
        missing = self._missing(shards)
        itemsize = 2 if self.tokenizer.get_vocab_size() <= 2**16 else 4
        need = sum(self.tokens(shard) for shard in missing) * itemsize
        used, free = sweep(self.cache), free_bytes(self.cache)
        print0(
            f"token cache {self.cache}: {_size(used)} in use, {_size(free)} free; {len(missing)} "
            f"of this run's {len(shards)} shards are to be tokenized ({_size(need)} or so)"
        )
        if need > free:
            raise UserError(
                f"the token cache needs about {_size(need)} and {self.cache} has {_size(free)} "
                "free. Make room, name a folder on another disk by --token_cache_dir, or do "
                "without a cache by --stream: the same rows, each shard tokenized in its turn"
            )

    def _job(self, shards: Sequence[int]) -> dict[str, Any]:
        """What another process must know to prepare these shards, ready for JSON."""
        return {
            "tokenizer": describe_tokenizer(self.tokenizer),
            "shards": [[str(path.absolute()) for path in self.shards[k]] for k in shards],
            "keep": self.keep,
            "cache": str(self.cache.absolute()),
        }

    def prepare_ahead(self, shards: Sequence[int]) -> None:
        """Has these shards prepared, in this order, by a background process (one for a node)."""
        missing = self._missing(shards)
        if self.stream or not missing or int(os.environ.get("LOCAL_RANK", "0")) != 0:
            return
        self._background = subprocess.Popen(
            [sys.executable, "-m", "nanochat.text_source"],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it: it ends when its standard input does
        )
        in_thread(
            _send, self._background.stdin, self._job(missing)
        )  # it is a second until it listens


def group(files: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    """The files in order, as shards of at least MIN_SHARD bytes (the last one may be smaller)."""
    shards: list[list[T]] = []
    total = MIN_SHARD
    for file, size in zip(files, sizes):
        if total >= MIN_SHARD:
            shards.append([])
            total = 0
        shards[-1].append(file)
        total += size
    return shards


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    """The texts in lists of about BATCH_CHARS characters."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _send(pipe: Any, job: dict[str, Any]) -> None:
    """Hands the job over, and leaves the pipe open. If the process has died, it has said why."""
    with contextlib.suppress(BrokenPipeError):
        pipe.write(json.dumps(job).encode() + b"\n")
        pipe.flush()


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# -------------------------------------------------------------------------------------------------
# The background process


def describe_tokenizer(tokenizer: Any) -> str:
    """What another process must know to encode as this tokenizer does."""
    vocabulary = tokenizer.vocabulary
    tokens = sorted(vocabulary.ranks, key=vocabulary.ranks.__getitem__)
    return json.dumps(
        {
            "tokens": [token.decode("latin-1") for token in tokens],
            "pattern": vocabulary.pattern,
            "specials": vocabulary.specials,
            "normalization": vocabulary.normalization,
        }
    )


@lru_cache(maxsize=1)
def tokenizer_of(description: str) -> Tokenizer:
    """The tokenizer that was described; the same one when it is asked for again."""
    about = json.loads(description)
    ranks = {token.encode("latin-1"): id for id, token in enumerate(about["tokens"])}
    return Tokenizer(Vocabulary(about["pattern"], ranks, about["specials"], about["normalization"]))


def prepare_shards(job: dict[str, Any]) -> None:
    """Prepares the shards of a job (see prepare_ahead) that nobody else is preparing.

    A shard that is wrong is named and left; UserError or OSError where the disk is full."""
    tokenizer = tokenizer_of(job["tokenizer"])
    for paths in job["shards"]:
        source = TextSource([*map(Path, paths)], tokenizer, job["keep"], job["cache"])
        source.check_disk([0])  # others use the disk too
        try:
            source.prepare(0, wait=False)
        except UserError as e:
            _warn(e)  # whoever comes to this shard will fail with it


def _warn(error: Exception) -> None:
    print(f"\nwarning: preparing shards ahead: {error}", file=sys.stderr, flush=True)


def _end_with_standard_input() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through a buffer, whose lock would outlive the main thread
    _thread.interrupt_main()  # so that half a shard is removed
    time.sleep(5)  # seconds, far more than a batch takes
    os._exit(1)


def main() -> None:
    """Takes a job, one line of JSON, from standard input; ends at the latest when that closes."""
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(19)
    try:
        prepare_shards(job)
    except (UserError, OSError) as e:
        _warn(e)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
