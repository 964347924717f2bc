"""
Pretraining text: which files there are, which one is validation, and reading them.

    python -m nanochat.dataset -n 8          # the first 8 shards and the validation shard
    python -m nanochat.dataset -n -1         # all 1,823

The default is karpathy/fineweb-edu-100b-shuffle: parquet shards of one string column `text`, about
250M characters each, whose last shard (shard_01822) is always validation. Own data is a file, a
folder or a glob of .parquet, .jsonl, .jsonl.gz or .txt, given by --data. Floor 1.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from nanochat import flags
from nanochat.common import UserError, get_base_dir, print0, read_json, read_jsonl, write_json
from nanochat.download import download

DEFAULT_REPO = "karpathy/fineweb-edu-100b-shuffle"
LAST_SHARD = 1822  # of the default data set: validation, by name
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
VAL_ONE_IN = 50  # a data set of one file gives every 50th document, by hash, to validation
PARQUET_BATCH = 8192  # texts read at a time, some tens of MB
TXT_PIECE = 4000  # characters, about 1,000 tokens: a longer .txt is cut into documents of that size

Keep = Literal["all", "train", "val"]


@dataclass(frozen=True)
class TextFiles:
    """Training and validation files. `by_hash`: `val` serves as both, split by document hash."""

    train: list[Path]
    val: Path
    by_hash: bool = False


def find_files(data: str | None = None) -> list[Path]:
    """The text files of a file, folder or glob (default: base_data/), sorted by name."""
    path = _where(data)
    if path.is_dir():
        files = [p for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.name[0] != "."]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(p) for p in glob.glob(str(path)) if p.endswith(SUFFIXES)]
    if not files:
        hint = "--data takes a file, a folder or a glob of " + ", ".join(SUFFIXES)
        if data is None:
            hint = (
                "download some with `python -m nanochat.dataset -n 8`, or name your own by --data"
            )
        raise UserError(f"no text files in {path}: {hint}")
    return sorted(files, key=lambda p: (p.name, str(p)))


def _where(data: str | None) -> Path:
    return Path(data or get_base_dir() / "base_data").expanduser()


def split_files(data: str | None = None, val_data: str | None = None) -> TextFiles:
    """Training files and the validation file.

    Validation is --val_data if given; else shard_01822 where it is there; else the last file by
    name (of one file: some of its documents), pinned at first use, so that files added later never
    move it."""
    files = find_files(data)
    by_hash = False
    last_shards = [f for f in files if f.name == shard_name(LAST_SHARD)]
    if val_data is not None:
        matches = find_files(val_data)
        if len(matches) != 1:
            raise UserError(f"--val_data={val_data} matches {len(matches)} files; name one")
        val = matches[0]
    elif len(last_shards) == 1 and len(files) > 1:
        val = last_shards[0]
    elif _where(data).is_file():
        val, by_hash = files[0], True
    else:
        val, by_hash = _pinned_val(data, files)
    train = files if by_hash else [f for f in files if f.resolve() != val.resolve()]
    if not train:
        raise UserError(
            f"{_where(data)} holds nothing to train on beside the validation file {val}; add a "
            "file, or name other data by --data or --val_data"
        )
    return TextFiles(train, val, by_hash)


def _pinned_val(data: str | None, files: list[Path]) -> tuple[Path, bool]:
    """The validation file of a folder or glob, and whether it is split by document hash: as
    recorded at its first use, which is now if there is no record."""
    pins_path = get_base_dir() / "validation_files.json"
    pins = read_json(pins_path) if pins_path.exists() else {}
    where = _where(data).absolute()
    key = "base_data" if where == _where(None).absolute() else str(where)  # the base may move
    # Files are remembered relative to the folder, of a glob the one before the first wildcard.
    root = where if where.is_dir() else os.path.dirname(re.split(r"[*?\[]", str(where))[0])
    names = [os.path.relpath(f.absolute(), root) for f in files]
    if key not in pins:
        pins[key] = {"file": names[-1], "by_hash": len(files) == 1}
        write_json(pins_path, pins)
    pin = pins[key]
    if pin["file"] not in names:
        raise UserError(
            f"{where} was used with {pin['file']} as its validation file, which is gone. "
            f"Put it back, or name another by --val_data (the pin is in {pins_path})"
        )
    return files[names.index(pin["file"])], pin["by_hash"]


def train_files(data: str | None = None) -> list[Path]:
    """The training files of `data`, in order."""
    return split_files(data).train


def val_file(data: str | None = None) -> Path:
    """The validation file of `data`."""
    return split_files(data).val


def is_val_document(text: str) -> bool:
    """Whether a document of a one-file data set is validation: a stable hash decides."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VAL_ONE_IN == 0


def iter_texts(paths: list[Path], doc_cap: int | None = None, keep: Keep = "all") -> Iterator[str]:
    """Yields the documents of the files in order, cut to `doc_cap` characters if given.

    Errors name the file, and the line where there are lines."""
    for path in paths:
        for text in _read_texts(path):
            if keep == "all" or (keep == "val") == is_val_document(text):
                yield text if doc_cap is None else text[:doc_cap]


def _read_texts(path: Path) -> Iterator[str]:
    name = path.name
    if name.endswith(".parquet"):
        yield from _read_parquet(path)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_jsonl_texts(path)
    elif name.endswith(".txt"):
        yield from _read_txt(path)
    else:
        raise UserError(f"{path}: cannot read this kind of file; use {', '.join(SUFFIXES)}")


def _read_parquet(path: Path) -> Iterator[str]:
    for texts in iter_text_arrays(path):
        yield from texts.to_pylist()


def iter_text_arrays(path: Path) -> Iterator[Any]:
    """Yields the texts of a parquet file as Arrow string arrays, which cost no Python object for
    each text. Some thousand at a time: row groups may be of any size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as e:
        raise UserError(
            f"{path} is not a readable parquet file ({e}); delete it and download it again"
        ) from e
    with file:
        if "text" not in file.schema_arrow.names:
            raise UserError(f"{path} has no column `text`; found {file.schema_arrow.names}")
        for group in range(file.num_row_groups):
            row = 0
            batches = file.iter_batches(PARQUET_BATCH, row_groups=[group], columns=["text"])
            while True:
                try:
                    batch = next(batches, None)
                    if batch is None:
                        break
                    texts = batch.column(0)
                    texts.validate(full=True)  # that it is UTF-8, above all
                except (pa.ArrowInvalid, OSError) as e:
                    raise UserError(f"{path}: row group {group} is damaged: {e}") from e
                kind = texts.type
                if pa.types.is_dictionary(kind) or pa.types.is_string_view(kind):
                    texts = texts.cast(pa.string())
                is_text = pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)
                if not is_text or texts.null_count:
                    at = texts.is_null().index(True).as_py() if is_text else 0
                    raise UserError(
                        f"{path}: row {row + at} of row group {group} holds "
                        f"{type(texts[at].as_py()).__name__}, not a string"
                    )
                row += len(texts)
                yield texts


def text_size(path: Path) -> int:
    """About how many bytes of text a file holds, without reading it: for a progress bar."""
    if not path.name.endswith(".parquet"):
        return path.stat().st_size * (3 if path.name.endswith(".gz") else 1)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError):
        return 0  # reading it will say what is wrong
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text")


def _read_jsonl_texts(path: Path) -> Iterator[str]:
    for number, row in read_jsonl(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{path}:{number}: no string field `text`; found {found}")
        yield row["text"]


def _read_txt(path: Path) -> Iterator[str]:
    """A text file as documents: whole, or cut at empty lines (else at line ends) if it is long.

    A book as one document would give a single row and could not be split for validation."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e}") from e
    start = 0
    while len(text) - start > TXT_PIECE:
        least, most = start + TXT_PIECE // 2, start + TXT_PIECE
        # One past the last empty line, else the last line end, of the window; else all of it
        empty_line, line_end = text.rfind("\n\n", least, most), text.rfind("\n", least, most)
        end = empty_line + 2 if empty_line >= 0 else line_end + 1 if line_end >= 0 else most
        yield text[start:end]
        start = end
    yield text[start:]


# -------------------------------------------------------------------------------------------------
# Download


@dataclass
class Args:
    """Download pretraining shards into $NANOCHAT_BASE_DIR/base_data/. Run it again to finish."""

    num_files: Annotated[int, flags.alias("-n")] = -1
    """Training shards to have, from the first; the validation shard always comes too. -1: all."""
    num_workers: Annotated[int, flags.alias("-w")] = 4
    """Files fetched at the same time."""
    repo: str = DEFAULT_REPO
    """Data set on the hub, in the same layout."""


def shard_name(index: int) -> str:
    """The file name of a shard of the default data set."""
    return f"shard_{index:05d}.parquet"


def check_parquet(path: Path) -> None:
    """Raises ValueError if the file has no readable parquet footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as e:
        raise ValueError(f"not a parquet file: {e}") from e


def main(args: Args) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    if args.num_files < -1 or args.num_files == 0:
        raise UserError(f"-n {args.num_files}: use a positive number of shards, or -1 for all")
    count = LAST_SHARD if args.num_files == -1 else min(args.num_files, LAST_SHARD)
    names = [shard_name(LAST_SHARD), *(shard_name(i) for i in range(count))]
    folder = get_base_dir() / "base_data"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [n for n in names if not (folder / n).exists()]
    need = len(missing) * 100_000_000  # a shard is about 100 MB
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{len(missing)} shards need about {need / 1e9:.0f} GB and {folder} has "
            f"{free / 1e9:.0f} GB free; use a smaller -n or another NANOCHAT_BASE_DIR"
        )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    failed: dict[str, str] = {}
    columns = ("{task.description}", BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns) as bar, ThreadPoolExecutor(max(1, args.num_workers)) as pool:
        task = bar.add_task(f"{len(missing)} shards", total=need or None)

        def fetch(name: str) -> None:
            url = f"{endpoint}/datasets/{args.repo}/resolve/main/{name}"
            try:
                download(url, folder / name, check_parquet, lambda n: bar.advance(task, n))
            except UserError as e:
                failed[name] = str(e)

        list(pool.map(fetch, missing))
    fetched = len(missing) - len(failed)
    print0(f"{folder}: {len(names) - len(missing)} shards were there, {fetched} fetched")
    if failed:
        lines = "\n  ".join([*failed.values()][:5])
        raise UserError(f"{len(failed)} shards failed; run the same command again:\n  {lines}")


if __name__ == "__main__":
    flags.run(main, Args)
