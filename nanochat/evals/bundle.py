"""
Getting the CORE eval bundle: 22 tasks, 25 MB zipped, published with karpathy/nanochat. Floor 4.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
import zipfile
from pathlib import Path

from nanochat.common import UserError
from nanochat.distributed import broadcast_object, rank_and_world
from nanochat.download import Patience, download
from nanochat.progress import Progress

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MAX_UNZIPPED = 2 << 30  # bytes; the real one is about 160 MB


def has_bundle(bundle_dir: Path) -> bool:
    """Whether the folder holds a bundle."""
    return (bundle_dir / "core.yaml").is_file()


def ensure_bundle(bundle_dir: Path) -> Path:
    """Downloads and unpacks the bundle if it is not there; returns its folder.

    Call it before a long run. Raises UserError, on every rank, where it cannot be had."""
    problem = ""
    if rank_and_world()[0] == 0 and not has_bundle(bundle_dir):
        try:
            _fetch(bundle_dir)
        except UserError as e:  # told to the other ranks, which would wait for ever
            problem = (
                f"the CORE eval bundle is not in {bundle_dir}, and getting it failed: {e}. Unpack "
                f"{BUNDLE_URL} there, so that {bundle_dir / 'core.yaml'} exists, or leave CORE out"
            )
    problem = str(broadcast_object(problem))
    if problem:
        raise UserError(problem)
    return bundle_dir


def _fetch(bundle_dir: Path) -> None:
    """Download, unpack beside the final place, rename."""
    if bundle_dir.exists() and any(bundle_dir.iterdir()):
        raise UserError(f"{bundle_dir} exists but has no core.yaml; move it away")
    bundle_dir.parent.mkdir(parents=True, exist_ok=True)
    archive = bundle_dir.parent / "eval_bundle.zip"
    # Somebody who is offline should not wait for minutes to hear of it
    patience = Patience(pause=lambda s: time.sleep(min(s, 2.0)))
    with Progress(None, f"downloading {BUNDLE_URL}", "B") as bar:
        download(BUNDLE_URL, archive, _check_zip, progress=bar.advance, patience=patience)
    unpack(archive, bundle_dir)
    archive.unlink()


def _check_zip(path: Path) -> None:
    """Raises ValueError unless the file is a whole zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except zipfile.BadZipFile as e:
        raise ValueError(f"not a zip archive: {e}") from e
    if broken:
        raise ValueError(f"{broken} is damaged")


def unpack(archive_path: Path, bundle_dir: Path) -> None:
    """Unpacks a bundle's zip so that `bundle_dir` is either complete or not there.

    Raises UserError for an archive that holds no bundle, or that would write elsewhere."""
    with (
        tempfile.TemporaryDirectory(prefix=".eval_bundle-", dir=bundle_dir.parent) as temporary,
        zipfile.ZipFile(archive_path) as archive,
    ):
        root = Path(temporary).resolve()
        total = 0
        for info in archive.infolist():
            total += info.file_size
            target = (root / info.filename).resolve()
            is_link = stat.S_ISLNK(info.external_attr >> 16)
            if is_link or total > MAX_UNZIPPED or not target.is_relative_to(root):
                raise UserError(f"{archive_path}: refusing to unpack {info.filename!r}")
        archive.extractall(root)
        found = sorted(root.rglob("core.yaml"), key=lambda p: len(p.parts))
        if not found:
            raise UserError(f"{archive_path} holds no core.yaml")
        if bundle_dir.exists():
            shutil.rmtree(bundle_dir)  # empty: _fetch has looked
        os.replace(found[0].parent, bundle_dir)
