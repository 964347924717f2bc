"""
Data loading: how fast rows reach training, how soon a run starts and resumes.

    python -m bench.data_loading --data=../shared/data/fineweb_like

Synthetic: a data set of 100 shards of the usual size, 52M tokens in 60,000 documents each. Their
text files are small and their token cache is one set of random ids, linked 100 times, so that it
lies in memory after its first use: what is measured is our work, not the disk. Real: one shard of
--data, tokenized, packed and read; and the memory that tokenizing 250M characters takes. Nothing is
trained; batches of 524,288 tokens are taken as fast as they come. The result goes to
bench/results/data_loading.json.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench import surroundings
from nanochat import flags, text_source
from nanochat.common import print0, write_json
from nanochat.dataloader import RowReader, StepLoader
from nanochat.dataset import find_files, iter_texts
from nanochat.packing import pack
from nanochat.text_source import TextSource
from nanochat.token_cache import open_folder, write_folder
from nanochat.tokenizer import Tokenizer, get_tokenizer

OUT = Path(__file__).with_name("results") / "data_loading.json"
STEP_TOKENS = 524_288  # the default --total_batch_size
CPU = torch.device("cpu")


@dataclass
class Args:
    """Time the loading of data."""

    data: str | None = None
    """A file, folder or glob of text; default: $NANOCHAT_BASE_DIR/base_data/."""
    shards: int = 100
    """Shards of the synthetic data set."""
    documents: int = 60_000
    """Documents of each, 870 tokens long on average."""
    vocab_size: int = 65_536
    """Tokens of the vocabulary, which is trained on --data."""
    seconds: float = 5.0
    """How long each throughput is measured."""
    repeats: int = 3
    """Times each start and resume is measured; the median counts."""
    tokenize: str = ""
    """Of a run itself: a folder with a tokenizer and a text.parquet to tokenize."""


def timed(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median seconds, and how much of them the CPU worked: the rest other programs took."""
    seconds, cpu = [], []
    for _ in range(repeats):
        started, cpu_before = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - cpu_before)
    return {
        "seconds": round(statistics.median(seconds), 3),
        "cpu_seconds": round(statistics.median(cpu), 3),
    }


def synthetic(args: Args, folder: Path, tokenizer: Tokenizer) -> TextSource:
    """The data set of many shards: small text files, a cache that is one shard many times."""
    text_source.MIN_SHARD = 1  # small as they are, each file is a shard
    rng = np.random.default_rng(0)
    files = [folder / f"shard_{i:05}.parquet" for i in range(args.shards)]
    for i, path in enumerate(files):
        noise = rng.integers(33, 127, 200_000, dtype=np.uint8).tobytes().decode("ascii")
        pq.write_table(pa.table({"text": [f"{i} {noise}"]}), path)
    source = TextSource(files, tokenizer, cache=folder / "cache")
    lengths = np.clip(rng.lognormal(6.3, 0.97, args.documents), 10, 50_000).astype(np.int64)
    ids = rng.integers(0, tokenizer.get_vocab_size(), lengths.sum()).astype(np.uint16)
    ids[np.cumsum(lengths) - lengths] = tokenizer.get_bos_token_id()
    write_folder(source._folder(0), iter([(ids, lengths)]))
    for shard in range(1, args.shards):
        source._folder(shard).mkdir()
        for path in source._folder(0).iterdir():
            os.link(path, source._folder(shard) / path.name)
    return source


def loader_of(source: TextSource, seq_len: int) -> StepLoader:
    reader = RowReader(source, seq_len + 1, 42, source.tokenizer.get_bos_token_id())
    rows = STEP_TOKENS // seq_len
    return StepLoader(reader, rows, min(32, rows), 0, 1, CPU)


def throughput(source: TextSource, seq_len: int, seconds: float) -> dict[str, float]:
    """Tokens a second that step() hands over, after the first; and what packing did."""
    loader = loader_of(source, seq_len)
    loader.step(0)
    started, cpu_before = time.perf_counter(), time.process_time()
    for step in itertools.count(1):
        loader.step(step)
        spent = time.perf_counter() - started
        if spent > seconds:
            break
    cpu = time.process_time() - cpu_before
    shards = loader.reader.opened()
    return {
        "tokens_per_second": round(step * STEP_TOKENS / spent),
        "tokens_per_cpu_second": round(step * STEP_TOKENS / cpu),
        "shards_opened_meanwhile": len(shards) - 1,
        "cropped": round(shards[0]["cropped"], 6),
        "continued": round(shards[0]["continued"], 4),
    }


def starts(source: TextSource, args: Args) -> dict[str, Any]:
    """Seconds from nothing to the batches of a step."""

    def run(step: int, state: dict[str, int] | None) -> None:
        again = TextSource(source.files, source.tokenizer, cache=source.cache)
        loader = loader_of(again, 2048)
        if state is not None:
            loader.load_state(state)
        loader.reader.expect(10**9)  # as long a run as there are shards for
        loader.step(step)

    # Where the shards of an epoch begin, by walking through all of them once
    loader = loader_of(source, 2048)
    rows_per_step = loader.rows_per_step
    per_shard = len(loader.reader._shard(0).plan)
    last = (args.shards - 1) * per_shard // rows_per_step
    loader.step(last)
    loader.step(last + 1)
    state = loader.state(last + 1)
    within = (per_shard - rows_per_step) // rows_per_step
    return {
        "open 100 shards, without a row": timed(
            lambda: TextSource(source.files, source.tokenizer, cache=source.cache), args.repeats
        ),
        "first step": timed(lambda: run(0, None), args.repeats),
        f"resume at step {within}, the end of the first shard": timed(
            lambda: run(within, None), args.repeats
        ),
        f"resume at step {last + 1}, in shard {state['sequence'] + 1}": timed(
            lambda: run(last + 1, state), args.repeats
        ),
        "the same without the bookmark that a checkpoint holds": timed(
            lambda: run(last + 1, None), 1
        ),
    }


def parts(source: TextSource) -> dict[str, Any]:
    """What opening a shard consists of."""
    documents = source.load(0)
    order = np.random.default_rng(0).permutation(len(documents.lengths))
    found: dict[str, Any] = {
        "tokens": len(documents.ids),
        "documents": len(order),
        "open, with checksums": timed(lambda: open_folder(source._folder(0)), 3),
    }
    for row_len in (257, 2049):
        plan = partial(pack, documents.lengths, order, row_len, cut=True)
        found[f"plan, rows of {row_len}"] = timed(plan, 3)
    return found


def tokenize(folder: Path) -> None:
    """The run that reports its memory: one large shard into the cache."""
    tokenizer = get_tokenizer(folder)
    before = peak_mb()
    started = time.perf_counter()
    source = TextSource([folder / "text.parquet"], tokenizer, cache=folder / "cache")
    tokens = len(source.load(0).ids)
    seconds = time.perf_counter() - started
    print(tokens, seconds, before, peak_mb())


def peak_mb() -> float:
    """The most memory this process has had (Linux; getrusage would count its parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def large_shard(files: list[Path], folder: Path, chars: int) -> dict[str, float]:
    """Tokenizes a shard of that many characters in a process of its own."""

    def texts() -> Iterator[str]:
        count = 0
        for text in itertools.chain.from_iterable(itertools.repeat(list(iter_texts(files)))):
            yield text
            count += len(text)
            if count >= chars:
                return

    pq.write_table(
        pa.table({"text": pa.array(texts(), pa.string())}), folder / "text.parquet",
        row_group_size=1024,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bench.data_loading", f"--tokenize={folder}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    tokens, seconds, before, peak = map(float, done.stdout.split()[-4:])
    return {
        "characters": chars,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "mb_before": round(before),
        "mb_peak": round(peak),
    }


def main(args: Args) -> None:
    if args.tokenize:
        return tokenize(Path(args.tokenize))
    files = find_files(args.data)
    result: dict[str, Any] = {
        "args": asdict(args) | {"data": Path(args.data).name if args.data else "base_data"},
        **surroundings(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = Tokenizer.train(itertools.islice(iter_texts(files), 12_000), args.vocab_size)
        tokenizer.save(folder)
        source = synthetic(args, folder, tokenizer)
        real = TextSource(files[:1], tokenizer, cache=folder / "real")
        started = time.perf_counter()
        real.load(0)
        seconds = time.perf_counter() - started
        result["synthetic"] = {
            "a shard": parts(source),
            "starts": starts(source, args),
            "throughput": {
                f"rows of {n}": throughput(source, n, args.seconds) for n in (256, 2048)
            },
        }
        result["real"] = {
            "a shard": {"tokenized in": round(seconds, 2), **parts(real)},
            "throughput": {f"rows of {n}": throughput(real, n, args.seconds) for n in (256, 2048)},
            "a shard of 250M characters": large_shard(files, folder, 250_000_000),
        }
    write_json(OUT, result)
    print0(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    flags.run(main, Args)
