"""
A folder's manifest: size and SHA-256 of its files and of itself, so that no change goes unnoticed.

    seal(folder, names)          # after the files are written
    find_damage(folder, names)   # None, or "optim.safetensors was altered (its SHA-256 differs)"

The manifest has exactly one right text for its files: any other byte in it is damage too. Floor 0.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write

MANIFEST = "manifest.json"


def seal(folder: Path, names: Sequence[str]) -> None:
    """Writes the manifest of these files and flushes everything to disk, the folder included."""
    for name in names:
        flush(folder / name)
    with atomic_write(folder / MANIFEST) as f:
        f.write(_text({name: _measure(folder / name) for name in names}))
    flush(folder)


def find_damage(folder: Path, names: Sequence[str]) -> str | None:
    """What is wrong with the files of a sealed folder, by name; None if they are as they were.

    Reads every byte: a few seconds for gigabytes, one thread a file."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    files = read_manifest(folder)
    if files is None or sorted(files) != sorted(names):
        return f"{MANIFEST} was altered"
    for name, expected in files.items():  # first what takes no reading
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
    with ThreadPoolExecutor(len(files)) as threads:  # hashing releases the interpreter's lock
        found = threads.map(lambda name: _measure(folder / name), files)
        for name, now in zip(files, found):
            if now != files[name]:
                return f"{name} was altered (its SHA-256 differs)"
    return None


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """{name: {"size", "sha256"}} as the manifest has it; None if it is not as it was written."""
    try:
        content = (folder / MANIFEST).read_bytes()
        files = json.loads(content)["files"]
        return files if _text(files) == content else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _text(files: dict[str, dict[str, Any]]) -> bytes:
    """The manifest of these files; its own hash makes a flipped digit stand out."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": digest}, indent=2) + "\n").encode()


def _measure(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def flush(path: Path) -> None:
    """fsync of a file or (where the system allows it) a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if not path.is_dir():
            raise OSError(f"could not flush {path} to disk: {e}") from e
    finally:
        os.close(fd)
