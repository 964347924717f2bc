"""
Folders of tokenized documents: whole or not there, made by one process, found by what they are of.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat import token_cache
from nanochat.token_cache import (
    claim,
    file_fingerprints,
    free_bytes,
    num_tokens,
    open_folder,
    sweep,
    write_folder,
)
from tests.conftest import REPO

BATCHES = [
    (np.arange(1000, 1500, dtype=np.uint16), np.array([100, 0, 400])),
    (np.arange(7, 27, dtype=np.uint16), np.array([20])),
]


def written(folder: Path) -> Path:
    write_folder(folder, iter(BATCHES))
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "cache" / "a")
    documents = open_folder(folder)
    assert documents is not None
    assert documents.ids.tolist() == [*range(1000, 1500), *range(7, 27)]
    assert documents.ids.dtype == np.uint16
    assert documents.offsets.tolist() == [0, 100, 100, 500, 520]
    assert not documents.ids.flags.owndata  # a shard need not fit into memory
    assert num_tokens(folder) == 520
    assert list(folder.parent.iterdir()) == [folder]


def flip(path: Path, at: int, n: int = 1, to: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    for i in range(at, at + n):
        data[i] = data[i] ^ 1 if to is None else to
    path.write_bytes(data)


TEARS: list[Any] = [
    lambda folder: (folder / "ids.bin").unlink(),
    lambda folder: (folder / "ids.bin").write_bytes(b""),
    lambda folder: (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-2]),
    lambda folder: (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes() + b"12"),
    lambda folder: flip(folder / "ids.bin", 500, 100, to=0),
    lambda folder: flip(folder / "ids.bin", 777),
    lambda folder: flip(folder / "offsets.bin", 9),
    lambda folder: (folder / "offsets.bin").write_bytes(b"12345"),
    lambda folder: (folder / "meta.json").unlink(),
    lambda folder: (folder / "meta.json").write_text("", encoding="utf-8"),
    lambda folder: (folder / "meta.json").write_text("[]", encoding="utf-8"),
    lambda folder: (folder / "meta.json").write_text('{"tokens": 1}', encoding="utf-8"),
    lambda folder: (folder / "meta.json").write_text(
        json.dumps({**json.loads((folder / "meta.json").read_text()), "dtype": "object"}),
        encoding="utf-8",
    ),
    lambda folder: [path.unlink() for path in folder.iterdir()],
    shutil.rmtree,
]


@pytest.mark.parametrize("tear", TEARS)
def test_what_is_torn_is_noticed_and_can_be_written_again(tmp_path: Path, tear: Any) -> None:
    folder = written(tmp_path / "a")
    tear(folder)
    assert open_folder(folder) is None
    assert open_folder(written(folder)) is not None
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    def broken() -> Any:
        yield BATCHES[0]
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path / "a", broken())
        there = list(tmp_path.iterdir())
        assert there in ([], [tmp_path / "a"])
        written(tmp_path / "a")
    assert open_folder(tmp_path / "a") is not None


def test_what_killed_processes_leave_is_swept_in_time(tmp_path: Path) -> None:
    size = (written(tmp_path / "a") / "ids.bin").stat().st_size
    for name, age in (("old", 2 * token_cache.STALE_SECONDS), ("young", 60)):
        half = tmp_path / f".b.{name}.tmp" / ".ids.bin.1.tmp"
        half.parent.mkdir()
        half.write_bytes(b"12")
        os.utime(half, (time.time() - age,) * 2)
    assert sweep(tmp_path) == size + 5 * 8
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".b.young.tmp", "a"]
    assert sweep(tmp_path / "nowhere") == 0


def test_what_another_host_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of several hosts sweep one cache; others rename what they have finished."""
    size = (written(tmp_path / "a") / "ids.bin").stat().st_size
    found, real = [tmp_path / ".b.tmp", tmp_path / "c" / "ids.bin"], Path.glob
    monkeypatch.setattr(
        Path,
        "glob",
        lambda path, pattern: [*real(path, pattern), *(p for p in found if p.match(pattern))],
    )
    assert sweep(tmp_path) == size + 5 * 8


def test_room_is_that_of_the_disk_where_the_folder_will_be(tmp_path: Path) -> None:
    expected = shutil.disk_usage(tmp_path).free
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(expected, rel=0.1)


# ---- who may write

HOLDER = """
import sys, time
from pathlib import Path
from nanochat.token_cache import claim
with claim(Path(sys.argv[1]), wait=False) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


def test_one_process_has_the_claim_and_a_dead_one_has_not(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "a"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with claim(folder, wait=False) as ours:
        assert not ours
    with claim(folder.with_name("b"), wait=False) as ours:
        assert ours  # another folder's claim is another
    holder.kill()  # it cannot give anything back
    with claim(folder, wait=True) as ours:
        assert ours
        with claim(folder, wait=False) as twice:
            assert not twice
    assert holder.wait(60) != 0
    assert not list(folder.parent.iterdir())  # no lock is left


# ---- what a file is


def test_text_files_are_read_once_and_every_change_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = tmp_path / "a.jsonl", tmp_path / "cache" / "fingerprints.json"
    path.write_bytes(b"x" * (1 << 21))
    first = file_fingerprints([path], store)
    assert not store.exists()  # it is so young that it may change within a tick of the clock
    later = time.time_ns() + 10**10
    monkeypatch.setattr(token_cache.time, "time_ns", lambda: later)
    assert file_fingerprints([path], store) == first
    hashed: list[int] = []
    sha256 = token_cache.hashlib.sha256
    monkeypatch.setattr(
        token_cache.hashlib, "sha256", lambda *args: hashed.append(1) or sha256(*args)
    )
    assert file_fingerprints([path], store) == first
    assert hashed == []
    # One letter in the middle, the same size, the old time put back
    before = path.stat()
    time.sleep(0.05)
    flip(path, 1 << 20)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_fingerprints([path], store) != first
    store.write_text("nonsense", encoding="utf-8")
    flip(path, 1 << 20)
    assert file_fingerprints([path], store) == first
