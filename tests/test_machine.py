"""What is said of the machine, and that nothing is said where nothing is known."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nanochat import machine


def test_machine_info_is_plausible_and_plain() -> None:
    info = machine.machine_info()
    assert info["cores"] >= 1 and info["platform"]
    assert 0.5 < info.get("memory_gib", 1.0) < 100_000
    json.dumps(info)


def test_versions_name_what_is_installed() -> None:
    found = machine.versions()
    assert found["python"].count(".") == 2 and "torch" in found
    assert "no-such-package" not in found


def test_git_revision_of_a_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    assert machine.git_revision(tmp_path) is None
    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert machine.git_revision(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1", encoding="utf-8")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    revision = machine.git_revision(tmp_path)
    assert revision and len(revision) == 10
    (tmp_path / "file").write_text("2", encoding="utf-8")
    assert machine.git_revision(tmp_path) == f"{revision}-dirty"
    inner = tmp_path / "site-packages"
    inner.mkdir()
    assert machine.git_revision(inner) is None  # some other project's checkout around us


def test_changes_since_a_commit_are_a_patch_that_brings_them_back(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    code = tmp_path / "nanochat"
    code.mkdir()
    (code / "a.py").write_text("one\n\ntwo\n \n", encoding="utf-8")
    assert machine.code_changes(tmp_path) == ""  # no checkout
    before = machine.code_fingerprint(tmp_path)
    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    git("add", "nanochat")
    git("commit", "-q", "-m", "first")
    assert machine.code_changes(tmp_path) == ""
    assert machine.code_fingerprint(tmp_path) == before  # git does not matter
    texts = {"a.py": "ONE\n\ntwo\n \n", "new file.py": "three\n", "z.py": "four\n"}
    for name, text in texts.items():
        (code / name).write_text(text, encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not code", encoding="utf-8")
    after = machine.code_fingerprint(tmp_path)
    assert after != before
    patch = machine.code_changes(tmp_path)
    assert "notes.txt" not in patch
    git("stash", "-q", "-u")
    assert machine.code_fingerprint(tmp_path) == before
    (tmp_path / "code.diff").write_text(patch, encoding="utf-8")
    git("apply", "code.diff")
    assert machine.code_fingerprint(tmp_path) == after
    assert {path.name: path.read_text(encoding="utf-8") for path in code.iterdir()} == texts


def test_absent_tools_are_tolerated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.git_revision(tmp_path) is None


def test_peaks_are_found_by_the_drivers_name() -> None:
    assert machine.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert machine.peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert machine.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert machine.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert machine.peak_flops("Tesla T4") == 65e12
    assert machine.peak_flops("NVIDIA L4") == 121e12
    for other in ("Some new GPU", "NVIDIA L40", "NVIDIA RTX A1000"):  # no part of a name
        assert machine.peak_flops(other) is None
