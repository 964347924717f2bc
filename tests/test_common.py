"""Atomic files, JSON lines and the errors that name them, fingerprints and seeds."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from nanochat.common import (
    UserError,
    append_jsonl,
    atomic_write,
    fingerprint,
    get_base_dir,
    print0,
    read_json,
    read_jsonl,
    seed_from,
    warn0,
    write_json,
)


def test_base_dir_is_the_variable_or_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "x"))
    assert get_base_dir() == tmp_path / "x"
    assert not (tmp_path / "x").exists()  # asking makes no folder
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")  # set but empty: as if not set
    assert get_base_dir() == tmp_path / ".cache" / "nanochat"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/runs")  # from an .env file, no shell has seen it
    assert get_base_dir() == tmp_path / "runs"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~nobody-of-that-name/runs")
    with pytest.raises(UserError, match="no such home folder; set NANOCHAT_BASE_DIR"):
        get_base_dir()


def test_only_rank_0_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    print0("unheard")
    warn0("unheard")
    monkeypatch.setenv("RANK", "0")
    print0("heard", 1)
    warn0("careful")
    captured = capsys.readouterr()
    assert captured.out == "heard 1\n"
    assert captured.err == "warning: careful\n"


# ---- atomic files


def test_atomic_write_makes_folders_and_leaves_only_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    with atomic_write(path) as f:
        f.write(b"one")
        assert not path.exists()  # the final name appears at the end
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["b.bin"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """As on two hosts, where processes of the same number write to a disk that both have."""
    path = tmp_path / "a.txt"
    with atomic_write(path, "w") as one, atomic_write(path, "w") as other:
        one.write("one")
        other.write("the other")
    assert path.read_text(encoding="utf-8") == "one"  # it ended last
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_keeps_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    write_json(path, {"old": 0})
    with open(path, encoding="utf-8") as reader:
        write_json(path, {"old": 1})
        assert json.load(reader) == {"old": 0}  # replaced, not written over
    with pytest.raises(RuntimeError), atomic_write(path, "w") as f:
        f.write("half")
        raise RuntimeError
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["b.txt"]


def test_atomic_write_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("old", encoding="utf-8")
    program = (
        "import os, sys; from nanochat.common import atomic_write\n"
        "with atomic_write(sys.argv[1], 'w') as f:\n"
        "    f.write('half'); f.flush(); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == 9
    assert path.read_text(encoding="utf-8") == "old"
    with atomic_write(path, "w") as f:  # what the dead one left does not stand in the way
        f.write("new")
    assert path.read_text(encoding="utf-8") == "new"


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    program = (
        "import sys; from nanochat.common import *\n"
        "row = {'k': '\\xe4\\u4f60\\U0001f600'}\n"
        "write_json(sys.argv[1], row); append_jsonl(sys.argv[2], row)\n"
        "assert read_json(sys.argv[1]) == next(read_jsonl(sys.argv[2]))[1] == row"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    paths = [tmp_path / "a.json", tmp_path / "a.jsonl"]
    subprocess.run([sys.executable, "-c", program, *map(str, paths)], check=True, env=env)
    for path in paths:
        assert json.loads(path.read_bytes().decode("utf-8")) == {"k": "ä你😀"}


# ---- JSON


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}"])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.json"):
        read_json(path)


def test_jsonl_round_trip_with_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "rows.jsonl"
    append_jsonl(path, {"a": 1, "text": "two\nlines\u2028three"})
    with open(path, "a", encoding="utf-8") as f:
        f.write("\n   \n")
    append_jsonl(path, {"a": 2})
    rows = list(read_jsonl(path))
    assert [number for number, _ in rows] == [1, 4]  # empty lines count, and are left out
    assert rows[0][1]["text"] == "two\nlines\u2028three"
    assert rows[1][1] == {"a": 2}


def packed(data: bytes, kind: str) -> bytes:
    if kind == "gz":
        return gzip.compress(data)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_jsonl_may_be_packed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.jsonl.{kind}"
    both = [packed(part.encode(), kind) for part in ('{"a": "é"}\n\n', '{"a": 2}\n')]
    path.write_bytes(b"".join(both))  # as `cat` and the parallel packers make them
    assert list(read_jsonl(path)) == [(1, {"a": "é"}), (3, {"a": 2})]


def test_errors_of_jsonl_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: not valid JSON"):
        list(read_jsonl(path))
    path.write_bytes(b'{"a": "\xe9"}\n')  # Latin-1
    with pytest.raises(UserError, match=r"rows\.jsonl: after line 0 it is not UTF-8"):
        list(read_jsonl(path))


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("keep", [5, 20, -4])
def test_a_torn_packed_file_is_named(tmp_path: Path, kind: str, keep: int) -> None:
    rng = random.Random(0)
    data = packed(json.dumps([rng.random() for _ in range(50)]).encode(), kind)
    path = tmp_path / f"rows.jsonl.{kind}"
    path.write_bytes(data[:keep])
    with pytest.raises(UserError, match=rf"rows\.jsonl\.{kind} cannot be unpacked"):
        list(read_jsonl(path))
    path.write_bytes(b"nothing packed at all")
    with pytest.raises(UserError, match=rf"rows\.jsonl\.{kind} cannot be unpacked"):
        list(read_jsonl(path))


# ---- fingerprints and seeds


def test_fingerprint_knows_where_parts_end_and_their_order() -> None:
    assert fingerprint("ab", "c") == fingerprint(b"ab", b"c")
    different = [
        fingerprint(*p) for p in [(), ("",), ("abc",), ("ab", "c"), ("a", "bc"), ("c", "ab")]
    ]
    assert len(set(different)) == len(different)
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in different)


def test_fingerprint_is_the_same_in_every_process() -> None:
    # hash() is not (PYTHONHASHSEED); a cache key must be. The value is frozen on purpose.
    assert fingerprint("nanochat", b"\x00") == "a889b4830de8bb91"


def test_seeds_differ_where_python_s_own_do_not() -> None:
    assert random.Random(1).random() == random.Random(-1).random()  # the trap
    seeds = [seed_from(s, purpose) for s in (-1, 0, 1, 42) for purpose in ("train", "test")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)
    assert seed_from(1, 2) != seed_from(12)
