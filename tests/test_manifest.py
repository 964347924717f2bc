"""The manifest: no byte of any file, its own included, changes unnoticed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from nanochat import manifest
from nanochat.manifest import MANIFEST, find_damage, read_manifest, seal

NAMES = ("big.bin", "small.json", "empty")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed folder of three files."""
    (tmp_path / "big.bin").write_bytes(random.Random(0).randbytes(5 << 20))  # more than one chunk
    (tmp_path / "small.json").write_text('{"step": 10}', encoding="utf-8")
    (tmp_path / "empty").touch()
    seal(tmp_path, NAMES)
    return tmp_path


def test_a_sealed_folder_is_whole(folder: Path) -> None:
    assert find_damage(folder, NAMES) is None
    files = read_manifest(folder)
    assert files is not None and [files[n]["size"] for n in NAMES] == [5 << 20, 12, 0]
    # SHA-256 of nothing, from FIPS 180-4's test vectors
    assert files["empty"]["sha256"].startswith("e3b0c44298fc1c149afbf4c8996fb924")


def test_every_byte_of_the_manifest_counts(folder: Path) -> None:
    """Each byte, in three other values: digits of sizes and hashes, keys, white space, braces."""
    path = folder / MANIFEST
    content = path.read_bytes()
    rng = random.Random(1)
    for at in range(len(content)):
        for value in {content[at] ^ 1, content[at] ^ 0x20, rng.randrange(256)} - {content[at]}:
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            assert find_damage(folder, NAMES) == "manifest.json was altered", (at, value)
    for wrong in (b"", content[:-1], content + b"\n", b" " + content, content.replace(b" ", b"")):
        path.write_bytes(wrong)
        assert find_damage(folder, NAMES) == "manifest.json was altered"
    path.unlink()
    assert find_damage(folder, NAMES) == "manifest.json is missing"


@pytest.mark.parametrize("name", ["big.bin", "small.json"])
def test_every_altered_byte_of_a_file_is_noticed_and_the_file_named(
    folder: Path, name: str
) -> None:
    """The first, the last, those around the edge of a chunk, and a sample."""
    content = (folder / name).read_bytes()
    rng, end = random.Random(name), len(content)
    edges = [at for at in (0, 1, end - 2, end - 1, (4 << 20) - 1, 4 << 20) if at < end]
    for at in [*edges, *(rng.randrange(end) for _ in range(20))]:
        with open(folder / name, "r+b") as f:
            f.seek(at)
            f.write(bytes([content[at] ^ rng.randrange(1, 256)]))
        assert find_damage(folder, NAMES) == f"{name} was altered (its SHA-256 differs)", at
        with open(folder / name, "r+b") as f:
            f.seek(at)
            f.write(content[at : at + 1])
    assert find_damage(folder, NAMES) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_longer_or_gone_is_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for wrong in (content[:-1], content[: len(content) // 2], content + b"}"):
        if wrong == content:
            continue
        (folder / name).write_bytes(wrong)
        assert find_damage(folder, NAMES) == f"{name} has {len(wrong)} bytes, not {len(content)}"
    (folder / name).unlink()
    assert find_damage(folder, NAMES) == f"{name} is missing"
    (folder / name).mkdir()
    assert find_damage(folder, NAMES) == f"{name} is missing"


def test_the_list_of_files_is_part_of_it(folder: Path) -> None:
    """A rightly made manifest of fewer files, or of one outside, is none of this folder."""
    files = read_manifest(folder)
    assert files is not None
    for other in ({n: files[n] for n in NAMES[:2]}, {**files, "../../x": files["empty"]}, {}):
        (folder / MANIFEST).write_bytes(manifest._text(other))
        assert find_damage(folder, NAMES) == "manifest.json was altered"
    for other in ([], 7, None, {"files": 3}, {"files": {"big.bin": 1}}):
        (folder / MANIFEST).write_text(json.dumps(other), encoding="utf-8")
        assert find_damage(folder, NAMES) == "manifest.json was altered"


def test_everything_is_flushed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(manifest, "flush", lambda path: flushed.append(path.name))
    seal(folder, NAMES)
    assert flushed == [*NAMES, folder.name]  # the manifest itself is written atomically
