"""
Tokenizing a whole data set ahead of training, as many independent tasks.

    python -m nanochat.dataset prepare                          # all of it, on this machine
    python -m nanochat.dataset prepare --shard_range=0:29       # one task of many
    python -m nanochat.dataset prepare --executor=ray           # on a Ray cluster
    python -m nanochat.dataset prepare --estimate --cores=64    # what that takes, on paper

A task is a range of shards: it fetches those that are missing and tokenizes each into the cache
that training reads (text_source.py does that, here as there). A shard is in the cache whole or not
at all, so a task that was killed is run again and does what is left; two that come to the same
shard take turns. recipes/prepare_data.sbatch does it as an array of Slurm tasks. Floor 2.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nanochat.common import UserError, get_base_dir, print0, read_json
from nanochat.dataset import Args, Keep, PrepareArgs, fetch_shards, split_files, text_size
from nanochat.download import Patience
from nanochat.hub import Hub
from nanochat.progress import Progress
from nanochat.shards import (
    DEFAULT_REPO,
    LAST_SHARD,
    SHARD_BYTES,
    SHARD_CHARS,
    plan_shards,
    read_pins,
)
from nanochat.text_source import TextSource, describe_tokenizer, group, tokenizer_of
from nanochat.tokenizer import get_tokenizer

T = TypeVar("T")

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def prepare(args: Args, options: PrepareArgs) -> None:
    """Does what `python -m nanochat.dataset prepare` was asked for.

    UserError at the end for the shards that failed, after all others were made."""
    if options.workers < 1 and options.workers != -1:
        raise UserError(f"--workers={options.workers}: use a positive number, or -1 for all cores")
    if options.cores < 1:
        raise UserError(f"--cores={options.cores} must be at least 1")
    if options.estimate:
        print0(estimate(options.cores, options.core_hour_price))
        return
    tokenizer = get_tokenizer(options.tokenizer)
    begin, end = parse_range(options.shard_range)
    sources = [
        TextSource(files, tokenizer, keep, options.token_cache_dir)
        for files, keep in _parts(args, options, begin, end)
    ]
    shards = [
        Shard(
            tuple(str(path.absolute()) for path in paths), source.keep, str(source.cache.absolute())
        )
        for source in sources
        for paths in source.shards
    ]
    if not shards:
        print0(f"--shard_range={options.shard_range}: there are no such shards, nothing to do")
        return
    for source in sources:
        source.check_disk(range(source.num_shards()))
    description = describe_tokenizer(tokenizer)
    started = time.monotonic()
    done = Tally()
    with Progress(sum(shard.size() for shard in shards), "tokenizing", "B") as bar:
        # What another task is at comes last: by then it will mostly have been made
        for wait in (False, True):
            if not shards:
                break
            for shard, result in _run(options, description, shards, wait):
                if done.count(shard, result):
                    bar.advance(shard.size())
            shards, done.busy = done.busy, []
    print0(f"{sources[0].cache}: {done} in {time.monotonic() - started:.1f} s")
    if done.failed:
        lines = [f"\n  {name}: {why}" for name, why in done.failed.items()]
        raise UserError(
            f"{len(done.failed)} shards failed; mend that and run the same command again:"
            + "".join(lines[:10])
        )


def parse_range(text: str) -> tuple[int, int | None]:
    """(from, to or None) of --shard_range; UserError for what is none."""
    found = re.fullmatch(r"(\d*):(\d*)", text)
    if found is None:
        raise UserError(f"--shard_range={text}: write FROM:TO, as 0:29; either may be left out")
    return int(found[1] or 0), int(found[2]) if found[2] else None


# -------------------------------------------------------------------------------------------------
# Which files


def _parts(
    args: Args, options: PrepareArgs, begin: int, end: int | None
) -> Iterator[tuple[list[Path], Keep]]:
    """The files of these shards, on disk by then, and which of their documents are meant."""
    pin = read_pins().get("base_data", {})
    base_data = get_base_dir() / "base_data"
    from_hub = "repo" in pin or not (base_data.is_dir() and any(base_data.glob("*.*")))
    keep_train: Keep = "all"
    keep_val: Keep = "all"
    if from_hub and options.data is None and options.val_data is None:
        repo = pin.get("repo", args.repo) if args.repo == DEFAULT_REPO else args.repo
        hub = Hub(repo, Patience(args.tries, args.timeout))
        train, val = _from_hub(hub, args, begin, end)
    else:
        files = split_files(options.data, options.val_data)
        sizes = [path.stat().st_size for path in files.train]
        train, val = _take(files.train, sizes, files.val, begin, end)
        keep_train, keep_val = files.keep_train, files.keep_val
    if train:
        yield train, keep_train
    if val:
        yield val, keep_val


def _take(
    train: Sequence[T], sizes: Sequence[int], val: T, begin: int, end: int | None
) -> tuple[list[T], list[T]]:
    """Files of the shards begin to end, as training makes shards of files: (train, validation)."""
    shards = group(train, sizes)
    taken = [file for shard in shards[begin:end] for file in shard]
    last = begin <= len(shards) and (end is None or end > len(shards))
    return taken, [val] if last else []


def _from_hub(hub: Hub, args: Args, begin: int, end: int | None) -> tuple[list[Path], list[Path]]:
    """The same of a data set on the hub; what is missing is fetched."""
    folder = get_base_dir() / "base_data"
    # A thousand tasks on machines without a network, perhaps: ask only for what is missing
    for ask in (False, True):
        files, val = plan_shards(hub, args.num_files, ask)
        names = sorted(name for name in files if name != val)
        sizes = [
            (folder / name).stat().st_size
            if (folder / name).exists()
            else files[name].size or SHARD_BYTES
            for name in names
        ]
        train, last = _take(names, sizes, val, begin, end)
        wanted = {name: files[name] for name in [*train, *last]}
        if all((folder / name).exists() for name in wanted):
            break
    if wanted:
        fetch_shards(hub, wanted, val, args.num_workers)
    return [folder / name for name in train], [folder / name for name in last]


# -------------------------------------------------------------------------------------------------
# Who does it


@dataclass(frozen=True)
class Shard:
    """A shard to be prepared, by whichever process."""

    paths: tuple[str, ...]
    keep: Keep
    cache: str

    def size(self) -> int:
        """About how many bytes of text it holds."""
        return sum(text_size(Path(path)) for path in self.paths)


@dataclass(frozen=True)
class Result:
    """What came of a shard: tokens, or that another process is at it, or what is wrong."""

    tokens: int = 0
    made: bool = False
    busy: bool = False
    error: str = ""


@dataclass
class Tally:
    """What came of all of them."""

    there: int = 0
    made: int = 0
    tokens: int = 0
    busy: list[Shard] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def count(self, shard: Shard, result: Result) -> bool:
        """Takes note of one; whether that is all that there is to do for it."""
        if result.busy:
            self.busy.append(shard)
        elif result.error:
            self.failed[Path(shard.paths[0]).name] = result.error
        else:
            self.there += not result.made
            self.made += result.made
            self.tokens += result.tokens
        return not result.busy

    def __str__(self) -> str:
        return (
            f"{self.there} shards were there, {self.made} tokenized, {len(self.failed)} failed; "
            f"{self.tokens:,} tokens"
        )


def prepare_shard(description: str, shard: Shard, wait: bool) -> Result:
    """Has the cache hold a shard. Says what is wrong rather than raise it, for the sake of the
    other shards; `wait`: for another process that is at it."""
    try:
        source = TextSource(
            [*map(Path, shard.paths)], tokenizer_of(description), shard.keep, shard.cache
        )
        documents = source.prepare(0, wait)  # what is there is read through, and made again if torn
    except (UserError, OSError) as e:
        return Result(error=str(e))
    if documents is None:
        return Result(busy=True)
    return Result(len(documents.ids), made=source.num_made > 0)


Results = Iterator[tuple[Shard, Result]]


def _run(options: PrepareArgs, description: str, shards: Sequence[Shard], wait: bool) -> Results:
    """Prepares the shards; yields what came of each, in the order in which they are done."""
    if options.executor == "ray":
        return _on_ray(options.ray_address, description, shards, wait)
    cores = _cores()
    workers = min(len(shards), len(cores) if options.workers == -1 else options.workers)
    if workers <= 1:  # of one process the encoder uses all cores
        return ((shard, prepare_shard(description, shard, wait)) for shard in shards)
    return _in_processes(workers, cores, description, shards, wait)


def _cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]


def _in_processes(
    workers: int, cores: list[int], description: str, shards: Sequence[Shard], wait: bool
) -> Results:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, context, _begin_worker, (context.Value("i", 0), cores, workers)
    )
    try:
        futures = {pool.submit(prepare_shard, description, s, wait): s for s in shards}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                died = "its process was killed; if memory ran out, use fewer --workers"
                yield futures[future], Result(error=died)
    finally:  # Ctrl-C, too: what is under way ends by itself, or by the same Ctrl-C
        pool.shutdown(cancel_futures=True)


def _begin_worker(count: Any, cores: list[int], workers: int) -> None:
    """A worker keeps to its share of the cores, so that encoders do not start a thread on each core
    in every worker; and ends with the process that started it, however that ends."""
    with count.get_lock():
        number = count.value
        count.value += 1
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[number % len(cores) :: workers])
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _on_ray(address: str | None, description: str, shards: Sequence[Shard], wait: bool) -> Results:
    try:
        import ray
    except ImportError as e:
        raise UserError("--executor=ray needs Ray: `uv pip install 'ray>=2.40'`") from e
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        except Exception as e:  # no such cluster, no port, no time: of many classes, one bare
            raise UserError(f"no Ray to be had (--ray_address={address}): {e}") from e
    try:
        task = ray.remote(num_cpus=1)(prepare_shard)
        described = ray.put(description)  # once, not with each of a thousand tasks
        running = {task.remote(described, shard, wait): shard for shard in shards}
        while running:
            (ref,), _ = ray.wait([*running], num_returns=1)
            shard = running.pop(ref)
            try:
                yield shard, ray.get(ref)
            except ray.exceptions.RayError as e:  # a node is gone, even after Ray's own retries
                yield shard, Result(error=str(e))
    finally:
        if ours:
            ray.shutdown()


# -------------------------------------------------------------------------------------------------
# On paper


def estimate(cores: int, price: float) -> str:
    """What preparing the default data set takes on so many cores at `price` dollars an hour each:
    by the measured speed of the encoder alone, and by that of a whole shard, as one table.

    UserError where the results of the benchmarks are not at hand."""
    encoding = _result("bpe_encoding.json", "python -m bench.bpe_encoding")
    loading = _result("data_loading.json", "python -m bench.data_loading")
    shards = LAST_SHARD + 1
    corpus = encoding["corpus"]
    mb = shards * SHARD_CHARS * corpus["mb"] / corpus["chars"]
    # From str, by our pattern, and all cores of that machine at work: each is slower than alone
    encoder = max(
        (
            e for e in encoding["encoders"]
            if (e["package"], e["texts"], e["pattern"]) == ("rustbpe", "str", "ours")
        ),
        key=lambda e: e["threads"],
    )  # fmt: skip
    tokens = encoder["runs"][0]["tokens"] / corpus["chars"] * SHARD_CHARS * shards
    shard = loading["real"]["a shard of 250M characters"]
    rows = [
        ("encoder alone", mb * encoder["threads"] / encoder["mb_per_s"], encoding),
        (
            "read, encode, write",
            shards * shard["seconds"] * SHARD_CHARS / shard["characters"]
            * loading["machine"]["cores"],
            loading,
        ),
    ]  # fmt: skip
    lines = [
        f"{shards:,} shards, {shards * SHARD_CHARS / 1e9:,.0f}B characters, {mb / 1e6:,.2f} TB of "
        f"text, on {cores} cores at ${price:g} a core-hour:",
        f"{'':<20} {'core-hours':>10} {'hours':>7} {'dollars':>8}   measured on",
    ]
    for name, seconds, result in rows:
        hours, machine = seconds / 3600, result["machine"]
        lines.append(
            f"{name:<20} {hours:>10.2f} {hours / cores:>7.3f} {hours * price:>8.2f}   "
            f"{machine['cores']} cores of {machine['cpu']}, load before {result['load_before']}"
        )
    seconds = rows[0][1] / cores
    lines += [
        f"To keep up with the encoder, network and disk must bring "
        f"{shards * SHARD_BYTES / seconds / 1e6:,.0f} MB/s of packed",
        f"shards ({shards * SHARD_BYTES / 1e9:,.0f} GB in all) and take "
        f"{2 * tokens / seconds / 1e6:,.0f} MB/s of ids ({2 * tokens / 1e9:,.0f} GB): mostly it is "
        "they that decide.",
    ]
    return "\n".join(lines)


def _result(name: str, command: str) -> Any:
    if not (RESULTS / name).exists():
        raise UserError(
            f"--estimate reads {RESULTS / name}, which is not there; {command} makes it"
        )
    return read_json(RESULTS / name)
