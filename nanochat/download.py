"""
Fetching one large file over HTTP so that it is either whole or not there. Floor 0.

The bytes are collected in NAME.part and get their name when length, hash (where the server gives
one) and the caller's check agree. A break is continued by HTTP Range, from a later process too:
NAME.lock, a small file beside the part, holds the version that its bytes are of, and is locked
while a process is at work, so that two of them never write to one part. Timeouts, resets, 429 and
5xx are retried with growing pauses, as long as a few tries in a row bring something new.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, TypeVar

import requests
import urllib3.exceptions
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema

from nanochat.common import UserError

T = TypeVar("T")

MAX_WAIT = 600.0  # seconds that a server may ask us to wait
CHUNK = 1 << 20  # bytes to read at most at once


class Transient(Exception):
    """A failure that may pass. `wait` is the server's own wish in seconds, if it named one."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Busy(UserError):
    """Another process is fetching this very file."""


class Hopeless(UserError):
    """Other files would fail in the same way: nobody answers, or the disk is full."""


@dataclass(frozen=True)
class Patience:
    """How long to try. With the defaults, half a minute of pauses in which nothing comes."""

    tries: int = 6
    """Failures in a row without one byte more, after which it is given up."""
    timeout: float = 20.0
    """Seconds, to connect and of silence while reading."""
    pause: Callable[[float], None] = time.sleep
    note: Callable[[str], None] = lambda text: None
    """Hears of every failure that is tried again."""


@dataclass(frozen=True)
class Remote:
    """What is known of a file on a server; None and "" for what is not."""

    size: int | None = None
    sha256: str | None = None
    etag: str = ""


def download(
    url: str,
    path: Path,
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int], None] = lambda num_bytes: None,
    patience: Patience = Patience(),
    *,
    known: Remote = Remote(),
    token: str | None = None,
    wait: bool = True,
) -> bool:
    """Downloads `url` to `path`, unless that is there. Returns whether this call did it.

    `check(part)` raises ValueError when the content is not right. `known` is what was heard of the
    file before; what the server says when it sends it counts for more. `progress` hears of the
    bytes that come (below 0: of those thrown away). `token` goes to the url's own host only. If
    another process is at the same file, this waits for it, or raises Busy.

    Raises UserError with the URL after the last try, and at once on answers that will not change
    (404, 403); what has come by then is kept for the next call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claim(path, wait, patience.pause) as version:
        if path.exists():
            return False
        part = _Part(path.with_name(path.name + ".part"), version, progress)

        def attempt() -> None:
            remote = _fetch(url, part, known, token, patience.timeout)
            try:
                part.check(remote)
                if check is not None:
                    check(part.path)
            except ValueError as e:  # wrong from the start: a range would not mend it
                part.start_again(f"the content is not right: {e}", wait=None)
            os.replace(part.path, path)

        persist(attempt, url, patience, part.size)
    return True


def persist(
    attempt: Callable[[], T], url: str, patience: Patience, reached: Callable[[], int] = lambda: 0
) -> T:
    """Calls `attempt` until it succeeds, or has failed too often without `reached()` growing.

    Raises UserError with the URL and the last cause then."""
    failures = best = 0
    while True:
        try:
            return attempt()
        except (InvalidSchema, InvalidURL, MissingSchema) as e:
            raise UserError(f"{url} is not an address that can be fetched: {e}") from e
        except (Transient, requests.RequestException, urllib3.exceptions.HTTPError) as e:
            failure = e
        failures = 1 if reached() > best else failures + 1
        best = max(best, reached())
        if failures >= patience.tries:
            kept = f" ({reached():,} bytes are kept for the next time)" if reached() else ""
            kind = Hopeless if _nobody_answered(failure) else UserError
            raise kind(f"could not download {url} after {failures} tries: {_cause(failure)}{kept}")
        wait = failure.wait if isinstance(failure, Transient) else None
        if wait is None:
            wait = min(30.0, 2.0 ** (failures - 1)) * random.uniform(0.5, 1.5)
        patience.note(f"{_cause(failure)}; trying again in {wait:.0f} s")
        patience.pause(wait)


def _innermost(failure: BaseException) -> BaseException:
    """What requests and urllib3 have wrapped, some of it three times."""
    inner = getattr(failure, "reason", None) or (failure.args or [None])[0]
    return _innermost(inner) if isinstance(inner, BaseException) else failure


def _cause(failure: Exception) -> str:
    """The failure in words, which some errors hold together with another exception."""
    inner = _innermost(failure)
    return inner.args[0] if inner.args and isinstance(inner.args[0], str) else str(inner)


def _nobody_answered(failure: Exception) -> bool:
    """Whether there was not even a connection: no network, no such host, a proxy that refuses."""
    no_connection = (
        urllib3.exceptions.NewConnectionError,
        urllib3.exceptions.ConnectTimeoutError,
        urllib3.exceptions.ProxyError,
    )
    return isinstance(_innermost(failure), no_connection)


# -------------------------------------------------------------------------------------------------
# What a server says


def request_headers(token: str | None) -> dict[str, str]:
    """Headers of every request. requests drops the token where a redirect leads to another host."""
    # Plain bytes: a compressed answer's lengths and ranges would not be those of the file
    headers = {"Accept-Encoding": "identity"}
    return {**headers, "Authorization": f"Bearer {token}"} if token else headers


def raise_for_status(url: str, response: requests.Response) -> None:
    """Transient for what may pass (429, 5xx), UserError with what to do for what will not."""
    status = response.status_code
    said = f"{url} answered HTTP {status}"
    if status in (408, 429) or status >= 500:
        wait = _wanted_pause(response)
        if wait is not None and wait > MAX_WAIT:
            raise UserError(
                f"{said} and asks to come back in {wait / 3600:.1f} hours; run the same command "
                "again then"
            )
        raise Transient(f"HTTP {status}", wait)
    if status in (401, 403):
        raise UserError(
            f"{said}: it is private or not there, or its conditions must be accepted on its page "
            "first. Set HF_TOKEN to an access token of an account that may read it"
        )
    if status in (404, 410):
        raise UserError(f"{said}: there is no such file on this server")
    if status >= 400:
        raise UserError(said)


def _wanted_pause(response: requests.Response) -> float | None:
    """Seconds until the next try as the server wishes it: Retry-After as a number or as a date, or
    the hub's way of saying it, RateLimit: "resolvers";r=0;t=55."""
    after = response.headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    if after:
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    match = re.search(r";\s*t\s*=\s*(\d+)", response.headers.get("RateLimit", ""))
    return float(match[1]) if match else None


def describe(response: requests.Response) -> Remote:
    """The version of the file, and its size and hash if it is one of the hub's LFS files.

    The hub's own answer names them, in headers of their own, and redirects to a CDN that does not
    know them: so the first answer that says something counts."""
    answers = [*response.history, response]

    def first(header: str) -> str:
        return next((a.headers[header] for a in answers if header in a.headers), "")

    etag = (first("X-Linked-ETag") or first("ETag")).removeprefix("W/").strip('"')
    size = first("X-Linked-Size")
    # 64 hex digits are the SHA-256 of an LFS file; 40 the SHA-1 of a git object, not of the bytes
    sha256 = etag.lower() if re.fullmatch(r"[0-9a-fA-F]{64}", etag) else None
    return Remote(int(size) if size.isdigit() else None, sha256, etag)


# -------------------------------------------------------------------------------------------------
# One attempt


class _Part:
    """The bytes that have come so far, and in the open lock file `version` the etag they are of."""

    def __init__(self, path: Path, version: IO[str], progress: Callable[[int], None]) -> None:
        self.path, self.version, self.progress = path, version, progress
        self._told = self.size()  # bytes that `progress` knows of

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _tell(self) -> None:
        size = self.size()
        self.progress(size - self._told)
        self._told = size

    def etag(self) -> str:
        self.version.seek(0)
        return self.version.read()

    def start_again(self, why: str, wait: float | None = 0.0) -> NoReturn:
        """Throws the bytes away."""
        self.path.unlink(missing_ok=True)
        self._tell()
        raise Transient(f"{why}; starting again", wait)

    def receive(self, response: requests.Response, new_etag: str | None) -> None:
        """Appends the body, or begins anew with the body of the version `new_etag`."""
        anew = new_etag is not None
        try:
            with open(self.path, "wb" if anew else "ab") as f:
                if new_etag is not None:
                    # Between the old bytes and the new: a kill leaves no bytes of another version
                    self.version.seek(0)
                    self.version.truncate()
                    self.version.write(new_etag)
                    self.version.flush()
                self._tell()
                # Whatever is there at once, not a full buffer: a break loses nothing
                while chunk := response.raw.read1(CHUNK):
                    f.write(chunk)
                    f.flush()
                    self._tell()
                os.fsync(f.fileno())
        except OSError as e:  # of the disk; those of the network are of other types here
            raise Hopeless(f"cannot write {self.path}: {e}; make room, then run it again") from e

    def check(self, remote: Remote) -> None:
        """Raises ValueError if size or hash are not what the server says."""
        if remote.size not in (None, self.size()):
            raise ValueError(f"it has {self.size()} bytes, the server says {remote.size}")
        if remote.sha256 is not None:
            digest = hashlib.sha256()
            with open(self.path, "rb") as f:
                while chunk := f.read(1 << 22):
                    digest.update(chunk)
            if digest.hexdigest() != remote.sha256:
                raise ValueError(f"its SHA-256 is {digest.hexdigest()}, not {remote.sha256}")


def _fetch(url: str, part: _Part, known: Remote, token: str | None, timeout: float) -> Remote:
    """Gets the rest of the file from where the part ends; Transient if that ends early."""
    have = part.size()
    headers = request_headers(token)
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        remote = describe(response)
        remote = Remote(remote.size or known.size, remote.sha256 or known.sha256, remote.etag)
        where = response.headers.get("Content-Range", "")
        if response.status_code == 416 and where == f"bytes */{have}":
            return remote  # the part is all of it
        if response.status_code == 416:
            part.start_again("the partial file did not fit")
        raise_for_status(url, response)
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise Transient("the server sent a web page in place of the file")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Transient("the server compressed the file, though it was asked not to")
        if response.status_code == 206:
            if not where.startswith(f"bytes {have}-"):
                part.start_again("the server sent another range than was asked for")
            if part.etag() != remote.etag:
                part.start_again("the file on the server has changed")
        else:
            have = 0  # no range support: from the beginning
        length = response.headers.get("Content-Length", "")
        total = remote.size or (have + int(length) if length.isdigit() else None)
        part.receive(response, None if have else remote.etag)
    if total is not None and part.size() < total:
        raise Transient(f"the connection ended after {part.size()} of {total} bytes")
    return remote


# -------------------------------------------------------------------------------------------------
# One process


@contextlib.contextmanager
def _claim(path: Path, wait: bool, pause: Callable[[float], None]) -> Iterator[IO[str]]:
    """The lock file beside `path`, open and held by this process alone; the system frees it when
    the process dies. It stays as long as a part does."""
    lock = path.with_name(path.name + ".lock")
    while True:
        try:
            f = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 -- closed by the next line's with
        except OSError as e:
            raise Hopeless(f"cannot write {lock}: {e}") from e
        with f:
            if _try_lock(f):
                if not _has_name(f, lock):
                    continue  # deleted by the process that was at work: there may be a new one
                try:
                    yield f
                finally:
                    if not path.with_name(path.name + ".part").exists():
                        with contextlib.suppress(PermissionError):  # Windows: it is open
                            lock.unlink()
                return
        if not wait:
            raise Busy(f"{path.name} is being fetched by another process")
        pause(0.5)


def _has_name(f: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(f.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(f: IO[str]) -> bool:
    """Whether this process has the file to itself from now on, until it closes it or dies."""
    try:
        if sys.platform == "win32":
            import msvcrt

            f.seek(1 << 20)  # beyond the text, which could not be read otherwise
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks: what is checked at the end must do
    return True
