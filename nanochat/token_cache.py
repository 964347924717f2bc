"""
Tokenized documents on disk: what a file is, a folder of ids, and who may write it.

A cache folder holds ids.bin, offsets.bin (int64) and meta.json with their sizes and checksums. Its
name holds the fingerprints of what it was made from, so that what is stale is never found. It
appears under its name when it is whole; what is damaged afterwards is noticed when it is opened.
text_source.py decides what is in it. Floor 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError, atomic_write, fingerprint, print0, read_json, write_json
from nanochat.packing import Documents
from nanochat.threads import end_if_over

try:
    import fcntl
except ImportError:  # Windows: processes that start together may do the same work twice
    fcntl = None  # type: ignore[assignment]

STALE_SECONDS = 3600  # after which what a killed process left half-written is removed


# -------------------------------------------------------------------------------------------------
# What a file is


def file_fingerprints(files: Sequence[Path], store: Path) -> dict[Path, str]:
    """What stands for the content of each file.

    Of parquet, size, head and tail do: the tail is its table of contents. Of text, where one letter
    may be edited, every byte counts; `store` (a JSON file) remembers it, for as long as neither
    size nor times of the file change."""
    known: Any = {}
    with contextlib.suppress(OSError, UserError):
        known = read_json(store)
    known = known if isinstance(known, dict) else {}
    prints, changed = {}, False
    for path in files:
        if path.name.endswith(".parquet"):
            prints[path] = _parquet_fingerprint(path)
            continue
        name, stat = str(path.absolute()), path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if isinstance(known.get(name), list) and known[name][:-1] == state:
            prints[path] = known[name][-1]
            continue
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while chunk := f.read(1 << 22):
                digest.update(chunk)
        prints[path] = digest.hexdigest()
        # Small ones cost nothing; a young one may change again within one tick of its clock
        if stat.st_size > 1 << 20 and time.time_ns() - max(state[1:]) > 2_000_000_000:
            known[name], changed = [*state, prints[path]], True
    if changed:
        with contextlib.suppress(OSError):
            write_json(store, known)
    return prints


def _parquet_fingerprint(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(1 << 16)
        f.seek(max(0, size - (1 << 16)))
        return fingerprint(str(size), head, f.read())


# -------------------------------------------------------------------------------------------------
# A folder


def open_folder(folder: Path) -> Documents | None:
    """The documents in a cache folder; None where it is missing or any byte of it is wrong."""
    try:
        meta = read_json(folder / "meta.json")
        if meta["dtype"] not in ("uint16", "uint32"):
            return None
        # A plain array of the mapped memory: np.memmap itself is slow to index
        ids = np.asarray(np.memmap(folder / "ids.bin", meta["dtype"], mode="r"))
        offsets = np.fromfile(folder / "offsets.bin", np.int64)
        whole = (len(ids), len(offsets) - 1) == (meta["tokens"], meta["documents"])
        # Reads all of it once, as training will: 0.1 s for a shard of 100 MB
        whole = whole and [zlib.crc32(ids.data), zlib.crc32(offsets.data)] == meta["crc32"]
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return None
    return Documents(ids, offsets) if whole else None


def num_tokens(folder: Path) -> int | None:
    """Tokens of a cache folder by its own account, which is read at once; None where there is none.

    Only opening it tells whether it is whole."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, UserError):
        return int(read_json(folder / "meta.json")["tokens"])
    return None


def write_folder(folder: Path, batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes batches of (ids, document lengths) as they come into a temporary folder, then renames
    it: all of it, or nothing."""
    tmp = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    lengths: list[np.ndarray] = []
    crc, dtype = 0, ""
    try:
        with atomic_write(tmp / "ids.bin") as f:
            for ids, of_documents in batches:
                crc, dtype = zlib.crc32(ids.data, crc), ids.dtype.name
                f.write(ids.tobytes())
                lengths.append(of_documents)
        offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
        with atomic_write(tmp / "offsets.bin") as f:
            f.write(offsets.tobytes())
        write_json(
            tmp / "meta.json",
            {
                "documents": len(offsets) - 1,
                "tokens": int(offsets[-1]),
                "dtype": dtype,
                "crc32": [crc, zlib.crc32(offsets.data)],
            },
        )
        if open_folder(folder) is None:  # where there are no locks, another may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            try:
                tmp.rename(folder)
            except OSError:  # by less than the time since we looked
                if open_folder(folder) is None:
                    raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def sweep(cache: Path) -> int:
    """Removes what killed processes left half-written; returns the bytes of ids that remain."""
    for tmp in cache.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another rank, or host, has renamed or removed it
            written = max((p.stat().st_mtime for p in tmp.iterdir()), default=tmp.stat().st_mtime)
            if time.time() - written > STALE_SECONDS:
                shutil.rmtree(tmp, ignore_errors=True)
    size = 0
    for path in cache.glob("*/*.bin"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return size


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk where a folder is, or will be."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


# -------------------------------------------------------------------------------------------------
# Who may write it


@contextlib.contextmanager
def claim(folder: Path, wait: bool) -> Iterator[bool]:
    """The right to make `folder`: one of all processes that share the disk has it. False if that is
    another and we do not wait. It is a lock of the operating system: it ends with its process."""
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        started, said = time.monotonic(), False
        while not (ours := _lock(f)) and wait:
            time.sleep(0.05)  # seconds
            end_if_over()
            if not said and time.monotonic() - started > 10:
                print0(f"waiting for another process that prepares {folder}")
                said = True
        try:
            yield ours
        finally:
            if ours:
                path.unlink(missing_ok=True)


def _lock(file: Any) -> bool:
    """Takes the lock of an open file, if nobody has it."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: at worst two processes do the same work
    return True
