"""
Small things everything else stands on: the base directory, errors meant for the user, atomic files.

Floor 0: imports nothing of nanochat.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


class UserError(Exception):
    """Something the user can mend. The message says what was found, and the flag or command that
    helps.

    Command lines show the message alone, without a traceback (see flags.run)."""


def get_base_dir() -> Path:
    """Where every artifact lives: $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat."""
    # ~ is the shell's, but not within quotes, nor in an .env file
    folder = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
    try:
        return Path(folder).expanduser()
    except RuntimeError as e:  # a user id without an account, as in some containers
        raise UserError(f"{folder}: there is no such home folder; set NANOCHAT_BASE_DIR") from e


def is_rank0() -> bool:
    """True in the one process that speaks and writes (torchrun sets RANK)."""
    return int(os.environ.get("RANK", "0")) == 0


def print0(*args: Any, **kwargs: Any) -> None:
    """print, on rank 0 only, flushed at once so that logs can be followed."""
    if is_rank0():
        print(*args, **{"flush": True, **kwargs})


def warn0(message: str) -> None:
    """One line of warning on stderr, on rank 0 only."""
    print0(f"warning: {message}", file=sys.stderr)


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary neighbour of `path`; it gets its final name only when the block ends well.

    The bytes are flushed to disk before the rename, so a crash leaves the old file or the new one,
    never half of one. Text is UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: processes of several machines, or containers, may share the folder
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(tmp, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        if e.filename in (None, str(tmp)):  # a full disk names no file, and ours has another name
            e.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # say what went wrong above, not that nothing can be removed
            tmp.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path, "w") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file; a broken one is a UserError with its path."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}. Write it again with what made it") from e


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, value) for each non-empty line of a .jsonl, .jsonl.gz or
    .jsonl.zst file.

    Errors name file and line."""
    name = os.fspath(path)
    packed = name.endswith((".gz", ".zst"))
    number = 0
    with _unpacked(name) if packed else open(name, encoding="utf-8") as f:
        try:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, json.loads(line)
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: after line {number} it is not UTF-8 text: {e}") from e
        except ValueError as e:
            raise UserError(
                f"{path}:{number}: not valid JSON: {e}. Mend that line, or delete it"
            ) from e
        except OSError as e:
            raise UserError(f"{path} cannot be unpacked: {e}") from e


def _unpacked(path: str) -> io.TextIOWrapper:
    import pyarrow as pa  # knows gzip and zstd; the standard library has no zstd yet

    return io.TextIOWrapper(pa.input_stream(path, compression="detect"), encoding="utf-8")


def append_jsonl(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Appends one JSON object as one line (one write call, so that lines never mix)."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def fingerprint(*parts: str | bytes) -> str:
    """16 hex digits that stand for the parts, in order. For cache keys and identity checks."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))  # ("ab", "c") is not ("a", "bc")
        digest.update(data)
    return digest.hexdigest()[:16]


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed derived from the parts by hashing.

    random.Random(1) and Random(-1) are the same stream; hashed seeds keep every purpose apart."""
    return int(fingerprint(*(str(p) for p in parts)), 16) >> 1
