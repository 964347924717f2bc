"""
Pretraining text: which files there are, which one is validation, and reading them.

    python -m nanochat.dataset -n 8          # the first 8 shards and the validation shard
    python -m nanochat.dataset -n -1 -w 8    # all 1,823, eight at a time
    python -m nanochat.dataset -n 8 --repo=me/my-shards
    python -m nanochat.dataset prepare --shard_range=0:29   # ... and tokenize them: see prepare.py

The default is karpathy/fineweb-edu-100b-shuffle: parquet shards of one string column `text`, about
250M characters each, whose last shard (shard_01822) is always validation. Own data is a file, a
folder or a glob of .parquet, .jsonl, .jsonl.gz, .jsonl.zst or .txt, given by --data. Floor 1.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nanochat import flags
from nanochat.common import UserError, get_base_dir, is_rank0, print0, read_jsonl, write_json
from nanochat.download import Patience, Remote
from nanochat.hub import Hub, fetch_files
from nanochat.shards import (
    DEFAULT_REPO,
    SHARD_BYTES,
    check_parquet,
    claim_folder,
    last_shard,
    pins_path,
    plan_shards,
    read_pins,
)

ROW_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*ROW_SUFFIXES, ".txt")
VAL_ONE_IN = 50  # a data set of one file gives every 50th document, by hash, to validation
PARQUET_BATCH = 8192  # texts read at a time, some tens of MB
TXT_PIECE = 4000  # characters, about 1,000 tokens: a longer .txt is cut into documents of that size

Keep = Literal["all", "train", "val"]

# First words of file names that say what a file is for, in a folder that has a train file
TRAIN_NAME = re.compile(r"train(ing)?(?![a-z])", re.IGNORECASE)
HELD_OUT_NAMES = [
    re.compile(rf"{word}(?![a-z])", re.IGNORECASE) for word in ("val(id(ation)?)?|dev", "test")
]


@dataclass(frozen=True)
class TextFiles:
    """Training and validation files. `by_hash`: `val` serves as both, split by document hash."""

    train: list[Path]
    val: Path
    by_hash: bool = False

    @property
    def keep_train(self) -> Keep:
        """Which documents of the training files are for training."""
        return "train" if self.by_hash else "all"

    @property
    def keep_val(self) -> Keep:
        """Which documents of the validation file are for validation."""
        return "val" if self.by_hash else "all"

    @property
    def validation(self) -> str:
        """What validation is, in words that do not depend on where the data lies."""
        rule = f": 1 document in {VAL_ONE_IN}, by its hash" if self.by_hash else ""
        return self.val.name + rule


def find_files(data: str | None = None, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files of a file, folder or glob (default: base_data/), sorted by name."""
    path = _where(data)
    ends = tuple(suffixes)
    if path.is_dir():
        files = [p for p in path.iterdir() if p.name.endswith(ends) and p.name[0] != "."]
    elif path.is_file():
        files = [path]
    else:
        found = glob.glob(str(path), recursive=True)
        files = [Path(p) for p in found if p.endswith(ends)]
    if not files:
        hint = "--data takes a file, a folder or a glob of " + ", ".join(suffixes)
        if data is None:
            hint = (
                "download some with `python -m nanochat.dataset -n 8`, or name your own by --data"
            )
        elif path.is_dir():
            names = sorted(p.name for p in path.iterdir())
            hint = f"found {', '.join(names[:8]) or 'nothing'}. {hint}"
        kind = "text files" if ".txt" in suffixes else "parquet or jsonl files"
        raise UserError(f"no {kind} in {path}: {hint}")
    return sorted(files, key=lambda p: (p.name, str(p)))


def _where(data: str | None) -> Path:
    return Path(data or get_base_dir() / "base_data").expanduser()


def split_files(
    data: str | None = None, val_data: str | None = None, suffixes: Sequence[str] = SUFFIXES
) -> TextFiles:
    """Training files and the validation file.

    Validation is --val_data if given; else what a download recorded; else shard_01822 where it is
    there; else, pinned at first use so that files added later never move it, the file that its name
    says is for it beside a train file, or the last by name (of one file: some of its documents)."""
    files = find_files(data, suffixes)
    by_hash = False
    if val_data is not None:
        matches = find_files(val_data, suffixes)
        if len(matches) != 1:
            raise UserError(f"--val_data={val_data} matches {len(matches)} files; name one")
        val = matches[0]
    elif _where(data).is_file():
        val, by_hash = files[0], True
    else:
        val, by_hash = _pinned_val(data, files)
    train = files
    if not by_hash:
        named = [f for f in files if TRAIN_NAME.match(f.name)]  # beside them, others are held out
        train = [f for f in named or files if f.resolve() != val.resolve()]
    if not train:
        raise UserError(
            f"{_where(data)} holds nothing to train on beside the validation file {val}; add a "
            "file, or name other data by --data or --val_data"
        )
    return TextFiles(train, val, by_hash)


def _pinned_val(data: str | None, files: list[Path]) -> tuple[Path, bool]:
    """The validation file of a folder or glob, and whether it is split by document hash: as
    recorded at its first use, which is now if there is no record."""
    pins = read_pins()
    where = _where(data).absolute()
    key = "base_data" if where == _where(None).absolute() else str(where)  # the base may move
    last_shards = [f for f in files if f.name == last_shard()]
    downloaded = "repo" in pins.get(key, {})  # and so its last shard is known, whatever it is
    if len(last_shards) == 1 and len(files) > 1 and not downloaded:
        return last_shards[0], False
    # Files are remembered relative to the folder, of a glob the one before the first wildcard.
    root = where if where.is_dir() else os.path.dirname(re.split(r"[*?\[]", str(where))[0])
    names = [os.path.relpath(f.absolute(), root) for f in files]
    if key not in pins:
        first_choice = _last_held_out(files)
        pins[key] = {"file": names[files.index(first_choice)], "by_hash": len(files) == 1}
        if is_rank0():  # the others come to the same choice; their host may not even write here
            write_json(pins_path(), pins)
    pin = pins[key]
    if pin["file"] not in names:
        mend = f"Put it back, or name another by --val_data (the pin is in {pins_path()})"
        if downloaded:
            mend = (
                f"Finish the download: python -m nanochat.dataset --repo={pin['repo']} -n 8 (for "
                f"data from elsewhere, delete the entry {key} in {pins_path()})"
            )
        raise UserError(f"{where} has {pin['file']} as its validation file, which is gone. {mend}")
    return files[names.index(pin["file"])], pin["by_hash"]


def _last_held_out(files: list[Path]) -> Path:
    """The last file that is for validation by its name, or simply the last."""
    if any(TRAIN_NAME.match(f.name) for f in files):
        for name in HELD_OUT_NAMES:
            found = [f for f in files if name.match(f.name)]
            if found:
                return found[-1]
    return files[-1]


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
    elif name.endswith(ROW_SUFFIXES):
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
            names = file.schema_arrow.names
            raise UserError(f"{path}: row 0: there is no column `text`; found {', '.join(names)}")
        row = 0
        for group in range(file.num_row_groups):
            batches = file.iter_batches(PARQUET_BATCH, row_groups=[group], columns=["text"])
            while True:
                try:
                    batch = next(batches, None)
                    if batch is None:
                        break
                    texts = batch.column(0)
                    texts.validate(full=True)  # that it is UTF-8, above all
                except (pa.ArrowInvalid, OSError) as e:
                    raise UserError(
                        f"{path}: row group {group} (row {row} on) is damaged: {e}"
                    ) from e
                kind = texts.type
                if pa.types.is_dictionary(kind) or pa.types.is_string_view(kind):
                    texts = texts.cast(pa.string())
                is_text = pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)
                if not is_text or texts.null_count:
                    at = texts.is_null().index(True).as_py() if is_text else 0
                    found = f"{texts[at].as_py()!r:.80}"
                    raise UserError(f"{path}: row {row + at}: `text` is {found}, not a string")
                row += len(texts)
                yield texts


def text_size(path: Path) -> int:
    """About how many bytes of text a file holds, without reading it."""
    if not path.name.endswith(".parquet"):
        return path.stat().st_size * (4 if path.name.endswith((".gz", ".zst")) else 1)
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
            found = f"the fields {', '.join(row)}" if isinstance(row, dict) else f"{row!r:.80}"
            if isinstance(row, dict) and "text" in row:
                found = f"{row['text']!r:.80}"
            raise UserError(
                f"{path}:{number}: no string field `text`; found {found}. Give the text that name"
            )
        yield row["text"]


def _read_txt(path: Path) -> Iterator[str]:
    """A text file as documents: whole, or cut at empty lines (else at line ends) if it is long.

    A book as one document would give a single row and could not be split for validation."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: {e}") from e
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
# The command


@dataclass
class PrepareArgs:
    """Tokenize shards into the cache that training reads, downloading those that are missing. Any
    number of tasks may run at a time, on parts or on the same; run it again to finish."""

    shard_range: str = ":"
    """FROM:TO of the shards, counted from 0 as training does, the validation shard last; TO is not
    included, and either may be left out."""
    data: str | None = None
    """Own text: a file, folder or glob; default: base_data/, and what is to be downloaded to it."""
    val_data: str | None = None
    """Validation file; default: as scripts.base_train chooses it."""
    tokenizer: str | None = None
    """Tokenizer, as for scripts.base_train; default: the one that scripts.tok_train made."""
    token_cache_dir: str | None = None
    """Folder of tokenized shards; default: $NANOCHAT_BASE_DIR/token_cache."""
    executor: Literal["local", "ray"] = "local"
    """What runs the tasks: processes of this machine, or a Ray cluster that shares its folders."""
    workers: int = -1
    """Processes of --executor=local; -1: one for each core."""
    ray_address: str | None = None
    """Cluster of --executor=ray; default: $RAY_ADDRESS or a running one, else one is started."""
    estimate: bool = False
    """Say how long all of it takes and what it costs, from the measured speed, and stop."""
    cores: int = 64
    """Cores to reckon with in --estimate."""
    core_hour_price: float = 0.05
    """Dollars for an hour of one core, in --estimate; what you pay may be another price."""


@tyro.conf.configure(tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)
@dataclass
class Args:
    """Download pretraining shards into $NANOCHAT_BASE_DIR/base_data/. Run it again to finish."""

    num_files: Annotated[int, flags.alias("-n")] = -1
    """Training shards to have, from the first; the validation shard always comes too. -1: all."""
    num_workers: Annotated[int, flags.alias("-w")] = 4
    """Files fetched at the same time."""
    repo: str = DEFAULT_REPO
    """Data set on the hub, in the same layout. Its last shard is validation."""
    tries: int = Patience.tries
    """Failures in a row that bring nothing new, after which a file is given up."""
    timeout: float = Patience.timeout
    """Seconds of silence that count as a failure."""
    command: Annotated[
        Annotated[PrepareArgs, tyro.conf.subcommand("prepare")]
        | Annotated[None, tyro.conf.subcommand("download")],
        tyro.conf.arg(name=""),
    ] = None
    """What to do; prepare takes the flags above, too."""


def main(args: Args) -> None:
    if args.num_files < -1 or args.num_files == 0:
        raise UserError(f"-n {args.num_files}: use a positive number of shards, or -1 for all")
    if args.num_workers < 1 or args.tries < 1:
        raise UserError("-w and --tries must be at least 1")
    if args.command is not None:
        # By its name: to its users it belongs here, but it stands on the token cache, above us
        return importlib.import_module("nanochat.prepare").prepare(args, args.command)
    hub = Hub(args.repo, Patience(args.tries, args.timeout))
    files, val = plan_shards(hub, args.num_files)
    fetch_shards(hub, files, val, args.num_workers)


def fetch_shards(hub: Hub, files: dict[str, Remote], val: str, workers: int) -> Path:
    """Has base_data/ hold these files, of which `val` is or will be validation; returns it.

    UserError with the reasons if some could not be fetched, after the others were."""
    folder = get_base_dir() / "base_data"
    claim_folder(folder, hub.repo, files, val)
    outcome = fetch_files(hub, files, folder, check_parquet, workers, SHARD_BYTES)
    print0(
        f"{folder}: {len(outcome.there)} shards were there, {len(outcome.fetched)} fetched "
        f"({outcome.num_bytes / 1e6:,.1f} MB), {len(outcome.failed)} failed"
    )
    if outcome.failed:
        lines = "\n  ".join(f"{name}: {why}" for name, why in [*outcome.failed.items()][:10])
        more = f"\n  and {len(outcome.failed) - 10} more" if len(outcome.failed) > 10 else ""
        raise UserError(
            f"{len(outcome.failed)} shards failed; run the same command again:\n  {lines}{more}"
        )
    return folder


if __name__ == "__main__":
    flags.run(main, Args)
