"""
Many files of a data set on the Hugging Face hub: which there are, and fetching them side by side.

The hub is $HF_ENDPOINT, by default https://huggingface.co; $HF_TOKEN opens private data sets. What
there is, with sizes and hashes, comes from one listing; a mirror without one can serve the files
all the same.
Floor 0, above download.py.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from rich import filesize

from nanochat.common import UserError
from nanochat.download import (
    Busy,
    Hopeless,
    Patience,
    Remote,
    describe,
    download,
    persist,
    raise_for_status,
    request_headers,
)
from nanochat.progress import Progress

Check = Callable[[Path], None]


class Hub:
    """One data set on the hub."""

    def __init__(self, repo: str, patience: Patience) -> None:
        self.repo, self.patience = repo, patience
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.token = os.environ.get("HF_TOKEN")

    def url(self, name: str) -> str:
        """Where a file of the data set is."""
        return f"{self.endpoint}/datasets/{self.repo}/resolve/main/{name}"

    def list_files(self, tries: int) -> dict[str, Remote] | None:
        """The files at the top of the data set by name; None if the server lists nothing.

        Raises UserError if nobody answers or the server fails that many times."""
        patience = replace(self.patience, tries=tries)
        files: dict[str, Remote] = {}
        url = f"{self.endpoint}/api/datasets/{self.repo}/tree/main?limit=1000"
        while url:
            entries, url = persist(lambda: self._page(url), url, patience)  # noqa: B023
            if entries is None:
                return None
            for entry in entries:
                lfs = entry.get("lfs") or {}
                digest = str(lfs.get("oid"))
                files[entry["path"]] = Remote(
                    lfs.get("size", entry.get("size")),
                    digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None,
                )
        return files

    def _page(self, url: str) -> tuple[list[dict[str, Any]] | None, str]:
        """A page of the listing, if it is one, and the address of the next."""
        ours = urlsplit(url).netloc == urlsplit(self.endpoint).netloc  # a page may lead elsewhere
        headers = request_headers(self.token if ours else None)
        response = requests.get(url, headers=headers, timeout=self.patience.timeout)
        if response.status_code == 429 or response.status_code >= 500:
            raise_for_status(url, response)
        try:
            entries = response.json() if response.ok else None
        except ValueError:
            entries = None
        if not isinstance(entries, list) or not all("path" in entry for entry in entries):
            return None, ""
        return entries, response.links.get("next", {}).get("url", "")

    def size(self, name: str) -> int | None:
        """The size of a file without fetching it; None if the server does not say."""
        try:
            response = requests.head(
                self.url(name),
                headers=request_headers(self.token),
                timeout=self.patience.timeout,
                allow_redirects=True,
            )
        except requests.RequestException:
            return None
        length = response.headers.get("Content-Length", "") if response.ok else ""
        return describe(response).size or (int(length) if length.isdigit() else None)


# -------------------------------------------------------------------------------------------------
# Many files


class _Stopped(Exception):
    """Raised in the threads when the whole is to end."""


@dataclass
class Outcome:
    """What became of the files."""

    there: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name -> why."""
    num_bytes: int = 0
    """Received, parts of files that failed included."""


def fetch_files(
    hub: Hub, files: dict[str, Remote], folder: Path, check: Check, workers: int, usual_size: int
) -> Outcome:
    """Fetches the files that `folder` lacks, `workers` at a time. Failures do not stop the others,
    unless these would fail too. Ctrl-C does: parts are kept for the next time.

    Raises UserError when the disk is too small, before anything is fetched. Files of unknown size
    are taken to be as large as the first one, or as usual if the server does not say that."""
    folder.mkdir(parents=True, exist_ok=True)
    there = [name for name in files if (folder / name).exists()]
    missing = {name: remote for name, remote in files.items() if name not in there}
    on_disk = sum(p.stat().st_size for name in missing for p in folder.glob(f"{name}.part"))
    sizes = {name: remote.size for name, remote in missing.items() if remote.size}
    guess = next((hub.size(name) or usual_size for name in missing if name not in sizes), 0)
    expected = {name: sizes.get(name, guess) for name in missing}
    total = sum(expected.values())
    free = shutil.disk_usage(folder).free
    if total - on_disk > free:
        raise UserError(
            f"{len(missing)} files need {filesize.decimal(total - on_disk)} and {folder} has "
            f"{filesize.decimal(free)} free; use a smaller -n or another NANOCHAT_BASE_DIR"
        )
    outcome = Outcome(there)
    with Progress(total, f"0/{len(missing)} files", "B", start=on_disk) as bar:
        try:
            run = _Run(hub, folder, check, bar, outcome, expected)
            # What another process is at comes last: by then, it will mostly have been fetched
            busy = run.fetch(missing, workers, wait=False)
            run.fetch({name: missing[name] for name in busy}, workers, wait=True)
        except KeyboardInterrupt:
            bar.note("what has come is kept: run the same command again to go on")
            raise
        finally:
            outcome.num_bytes = int(bar.eta.done) - on_disk
    return outcome


class _Run:
    """The threads of one fetch_files."""

    def __init__(
        self,
        hub: Hub,
        folder: Path,
        check: Check,
        bar: Progress,
        outcome: Outcome,
        expected: dict[str, int],
    ) -> None:
        self.hub, self.folder, self.check = hub, folder, check
        self.bar, self.outcome, self.expected = bar, outcome, expected
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.done, self.total = 0, sum(expected.values())

    def fetch(self, files: dict[str, Remote], workers: int, wait: bool) -> list[str]:
        """Fetches; returns the files that another process is at, unless they are waited for."""
        busy = []
        with ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(self._one, n, r, wait): n for n, r in files.items()}
            try:
                for future in as_completed(futures):
                    try:
                        future.result()
                    except Busy:
                        busy.append(futures[future])
                    except _Stopped:
                        self.outcome.failed[futures[future]] = "stopped with the others"
                    except UserError as e:
                        self.outcome.failed[futures[future]] = str(e)
                        if isinstance(e, Hopeless):
                            self.stop.set()
            except BaseException:  # Ctrl-C: the threads end at their next byte or pause
                self.stop.set()
                raise
        return busy

    def _one(self, name: str, remote: Remote, wait: bool) -> None:
        patience = replace(
            self.hub.patience,
            pause=self._pause,
            note=lambda text: self.bar.note(f"{name}: {text}"),
        )
        self._pause(0)
        by_us = download(
            self.hub.url(name), self.folder / name, self.check, self._advance, patience,
            known=remote, token=self.hub.token, wait=wait,
        )  # fmt: skip
        # What another process fetched is no part of what we had to do
        size = (self.folder / name).stat().st_size if by_us else 0
        with self.lock:
            (self.outcome.fetched if by_us else self.outcome.there).append(name)
            self.done += 1
            self.total += size - self.expected[name]
            self.bar.what = f"{self.done}/{len(self.expected)} files"
            self.bar.resize(self.total)

    def _pause(self, seconds: float) -> None:
        # Between two tries, and with 0 seconds at every piece that comes, a thread hears of the end
        if self.stop.wait(seconds):
            raise _Stopped

    def _advance(self, num_bytes: int) -> None:
        self._pause(0)
        self.bar.advance(num_bytes)
