"""Downloads from a server that truncates, stalls, resets, lies, fails: whole, or not there."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import hashlib
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.download import Busy, Hopeless, Patience, Remote, download
from tests.servers_for_tests import (
    Answer,
    FileServer,
    Handler,
    chunked,
    compressed,
    drip,
    fail,
    html,
    redirect,
    reset,
    stall,
    truncate,
    understate,
    whole,
    without_length,
    without_range,
    wrong_range,
)

DATA = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)  # another version of the same length
SHA256 = hashlib.sha256(DATA).hexdigest()
TRIES = Patience.tries


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer({"/a.bin": DATA}) as server:
        yield server


class Fetch:
    """One call of download() with pauses that take no time, and what it did."""

    def __init__(self, server: FileServer, folder: Path) -> None:
        self.server, self.path = server, folder / "new" / "a.bin"
        self.part = self.path.with_name("a.bin.part")
        self.pauses: list[float] = []
        self.notes: list[str] = []
        self.progress: list[int] = []
        self.patience = Patience(timeout=5, pause=self.pauses.append, note=self.notes.append)
        self.known = Remote()
        self.token: str | None = None
        self.content: bytes | None = DATA  # None: nobody knows what is right

    def __call__(self, *script: Answer, name: str = "/a.bin") -> bool:
        self.server.script[name] = list(script)
        return download(
            self.server.url + name, self.path, self.check, self.progress.append, self.patience,
            known=self.known, token=self.token,
        )  # fmt: skip

    def check(self, part: Path) -> None:
        if self.content is not None and part.read_bytes() != self.content:
            raise ValueError("these are other bytes")

    def left(self) -> list[str]:
        return sorted(p.name for p in self.path.parent.iterdir())

    def leave_part(self, data: bytes, version: str = "") -> None:
        """What a process that was killed leaves behind."""
        self.path.parent.mkdir(exist_ok=True)
        self.part.write_bytes(data)
        self.path.with_name("a.bin.lock").write_text(version, encoding="utf-8")


@pytest.fixture
def fetch(server: FileServer, tmp_path: Path) -> Fetch:
    return Fetch(server, tmp_path)


def assert_whole(fetch: Fetch) -> None:
    assert fetch.path.read_bytes() == DATA
    assert fetch.left() == ["a.bin"]  # and nothing beside it
    assert sum(fetch.progress) == len(DATA)


def test_a_server_that_behaves_is_asked_once(fetch: Fetch) -> None:
    assert fetch()
    assert_whole(fetch)
    assert fetch.server.ranges == [None]
    assert fetch.pauses == []
    assert not fetch()  # what is there is not fetched again
    assert len(fetch.server.paths) == 1


# ---- breaks


@pytest.mark.parametrize("broken", [truncate(1000), truncate(200_000), reset(200_000), truncate(0)])
def test_a_break_is_mended_by_one_more_request(fetch: Fetch, broken: Answer) -> None:
    fetch(broken)
    assert_whole(fetch)
    assert len(fetch.server.ranges) == 2
    assert len(fetch.pauses) == len(fetch.notes) == 1
    said = r"(Connection broken: .*|the connection ended .*|Read timed out.*); trying again in \d s"
    assert re.fullmatch(said, fetch.notes[0])  # once, without the wrappings


@pytest.mark.parametrize("count", [1, 1000, 100_007])
def test_what_came_before_a_break_is_not_fetched_again(fetch: Fetch, count: int) -> None:
    fetch(truncate(count))
    assert_whole(fetch)
    assert fetch.server.ranges == [None, f"bytes={count}-"]


def test_as_many_breaks_as_it_takes_while_each_brings_something(fetch: Fetch) -> None:
    def a_little(handler: Handler, data: bytes) -> None:
        """The range that was asked for, broken off after 10,000 bytes."""
        first = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        where = f"bytes {first}-{len(data) - 1}/{len(data)}"
        handler.send(
            206 if first else 200, data[first : first + 10_000], len(data) - first,
            Content_Range=where,
        )  # fmt: skip

    fetch(*[a_little] * 29)
    assert_whole(fetch)
    assert max(fetch.pauses) <= 1.5  # each counts as the first failure


def test_silence_is_a_break_too(fetch: Fetch) -> None:
    fetch.patience = replace(fetch.patience, timeout=0.2)
    fetch(stall(1.0, count=100))
    assert_whole(fetch)
    assert fetch.server.ranges == [None, "bytes=100-"]


def test_a_server_without_range_starts_from_the_beginning(fetch: Fetch) -> None:
    fetch(truncate(1000), without_range)
    assert_whole(fetch)
    assert fetch.server.ranges == [None, "bytes=1000-"]
    assert min(fetch.progress) == -1000  # the bar goes back


def test_another_range_than_asked_for_is_not_glued_on(fetch: Fetch) -> None:
    fetch(truncate(1000), wrong_range)
    assert_whole(fetch)
    assert fetch.server.ranges == [None, "bytes=1000-", None]


@pytest.mark.parametrize("answer", [without_length, chunked(3, end=True)])
def test_a_server_that_names_no_length(fetch: Fetch, answer: Answer) -> None:
    fetch(answer)
    assert_whole(fetch)


def test_chunks_that_break_off_are_continued(fetch: Fetch) -> None:
    fetch(chunked(3, end=False))
    assert_whole(fetch)
    assert fetch.server.ranges == [None, "bytes=200000-"]


# ---- lies: length, hash, kind


def test_a_length_that_is_too_small_is_found_by_the_check(fetch: Fetch) -> None:
    fetch(understate(5000))
    assert_whole(fetch)
    assert fetch.server.ranges == [None, None]  # content that is wrong is not continued


def test_a_length_that_is_too_small_is_known_to_be_where_the_size_is(fetch: Fetch) -> None:
    fetch.known = Remote(size=len(DATA))
    fetch(understate(5000))
    assert_whole(fetch)
    assert fetch.server.ranges == [None, "bytes=5000-"]


def test_a_length_that_is_too_large_costs_one_more_request(fetch: Fetch) -> None:
    def overstate(handler: Handler, data: bytes) -> None:
        handler.send(200, data, len(data) + 1000)

    fetch(overstate)
    assert_whole(fetch)  # 416 says that the part is all there is
    assert fetch.server.ranges == [None, f"bytes={len(DATA)}-"]


@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag"])
@pytest.mark.parametrize("form", ['"{}"', 'W/"{}"', "{}"])
def test_the_hash_of_the_server_is_checked(fetch: Fetch, header: str, form: str) -> None:
    fetch.content = None
    headers = fetch.server.headers["/a.bin"] = {header: form.format(SHA256)}
    assert fetch()
    assert_whole(fetch)
    fetch.path.unlink()
    headers[header] = form.format(SHA256.replace("a", "b"))
    with pytest.raises(UserError, match=f"after {TRIES} tries: .*SHA-256 is {SHA256}, not"):
        fetch()
    assert fetch.left() == []
    assert fetch.server.ranges == [None] * (1 + TRIES)  # never continued


def test_a_hash_known_from_elsewhere_is_checked_too(fetch: Fetch) -> None:
    fetch.content, fetch.known = None, Remote(sha256=SHA256)

    def spoiled(handler: Handler, data: bytes) -> None:
        handler.send(200, OTHER)

    fetch(spoiled)
    assert_whole(fetch)


@pytest.mark.parametrize("etag", ["0" * 40, "0" * 32, "z" * 64, "v1"])
def test_an_etag_that_is_no_sha256_is_no_hash(fetch: Fetch, etag: str) -> None:
    fetch.server.headers["/a.bin"] = {"ETag": f'"{etag}"'}
    fetch()
    assert_whole(fetch)


def test_a_size_that_the_server_names_is_checked(fetch: Fetch) -> None:
    fetch.content = None
    fetch.server.headers["/a.bin"] = {"X-Linked-Size": len(DATA) - 1}
    with pytest.raises(UserError, match="it has 300000 bytes, the server says 299999"):
        fetch()
    assert fetch.left() == []


@pytest.mark.parametrize("answer", [html, compressed])
def test_a_web_page_or_a_compressed_answer_is_not_the_file(fetch: Fetch, answer: Answer) -> None:
    fetch.content = None  # the content alone would not tell
    assert fetch(answer)
    assert_whole(fetch)
    fetch.path.unlink()
    with pytest.raises(UserError, match=r"a web page in place of|compressed"):
        fetch(*[answer] * 99)
    assert fetch.left() == []


def test_content_that_stays_wrong_never_gets_the_name(fetch: Fetch) -> None:
    fetch.server.files["/a.bin"] = b"<html>not what you want</html>"
    with pytest.raises(UserError, match="these are other bytes"):
        fetch()
    assert fetch.left() == []
    assert sum(fetch.progress) == 0


# ---- failures that pass, and that do not


def test_failures_that_pass_are_retried_with_growing_pauses(fetch: Fetch) -> None:
    fetch(*[fail(status) for status in (500, 502, 503, 504, 429)])
    assert_whole(fetch)
    assert len(fetch.server.paths) == TRIES
    for attempt, pause in enumerate(fetch.pauses):
        assert 0.5 * 2**attempt <= pause <= 1.5 * 2**attempt  # with jitter


@pytest.mark.parametrize("after", [7, 0])
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds(fetch: Fetch, status: int, after: int) -> None:
    fetch(fail(status, Retry_After=after))
    assert_whole(fetch)
    assert fetch.pauses == [after]


def test_retry_after_as_a_date(fetch: Fetch) -> None:
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    fetch(fail(503, Retry_After=soon), fail(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"))
    assert_whole(fetch)
    assert 28 <= fetch.pauses[0] <= 30
    assert fetch.pauses[1] == 0  # that moment is past


def test_the_hubs_own_way_of_saying_when(fetch: Fetch) -> None:
    fetch(fail(429, RateLimit='"resolvers";r=0;t=55'))
    assert_whole(fetch)
    assert fetch.pauses == [55]


def test_a_word_in_retry_after_means_the_usual_pause(fetch: Fetch) -> None:
    fetch(fail(503, Retry_After="later"))
    assert 0.5 <= fetch.pauses[0] <= 1.5


def test_a_server_that_wants_hours_is_not_asked_before(fetch: Fetch) -> None:
    with pytest.raises(UserError, match=r"HTTP 429 and asks to come back in 2\.0 hours"):
        fetch(fail(429, Retry_After=7200))
    assert fetch.pauses == []
    assert len(fetch.server.paths) == 1


@pytest.mark.parametrize(
    ("status", "said"), [(404, "no such file"), (403, "HF_TOKEN"), (401, "HF_TOKEN"), (400, "")]
)
def test_what_will_not_change_is_an_error_at_once(fetch: Fetch, status: int, said: str) -> None:
    with pytest.raises(UserError, match=rf"/a\.bin answered HTTP {status}.*{said}"):
        fetch(fail(status))
    assert fetch.pauses == []
    assert fetch.left() == []


def test_after_the_last_try_the_error_names_url_and_cause(fetch: Fetch) -> None:
    with pytest.raises(UserError, match=r"http.*/a\.bin after 6 tries: HTTP 503$") as error:
        fetch(*[fail(503)] * 99)
    assert len(fetch.server.paths) == TRIES
    assert len(fetch.pauses) == TRIES - 1  # none after the last
    assert fetch.left() == []
    assert not isinstance(error.value, Hopeless)  # the server answers: other files may be had


def test_what_came_is_kept_for_the_next_time(fetch: Fetch) -> None:
    with pytest.raises(UserError, match=r"HTTP 503 \(1,000 bytes are kept"):
        fetch(truncate(1000), *[fail(503)] * 99)
    assert fetch.left() == ["a.bin.lock", "a.bin.part"]
    fetch.progress.clear()
    fetch()
    assert fetch.path.read_bytes() == DATA and fetch.left() == ["a.bin"]
    assert fetch.server.ranges[-1] == "bytes=1000-"
    assert sum(fetch.progress) == len(DATA) - 1000  # what came now


def test_nobody_there_and_no_address(fetch: Fetch, tmp_path: Path) -> None:
    url = fetch.server.url.replace("http://", "")
    with pytest.raises(UserError, match="not an address"):
        download(f"{url}/a.bin", tmp_path / "a", patience=fetch.patience)
    assert fetch.pauses == []  # an address does not mend itself
    with FileServer({}) as gone:
        pass
    with pytest.raises(Hopeless, match=r"after 6 tries: HTTPConn.*: .*refused$"):
        download(f"{gone.url}/a.bin", tmp_path / "a", patience=fetch.patience)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_it_at_once(fetch: Fetch) -> None:
    fetch.path.parent.mkdir()
    fetch.part.symlink_to("/dev/full")  # the disk that never has room
    with pytest.raises(Hopeless, match=r"No space left on device; make room"):
        fetch()
    assert fetch.pauses == []
    assert not fetch.path.exists()


def test_a_place_that_cannot_be_written_to(fetch: Fetch) -> None:
    fetch.path.parent.mkdir()
    fetch.path.with_name("a.bin.lock").mkdir()  # a folder in its way, as good as no permission
    with pytest.raises(Hopeless, match=r"cannot write .*a\.bin\.lock: "):
        fetch()


# ---- redirects, as the hub does: its answer knows the file, the CDN has the bytes


def test_a_redirect_keeps_range_hash_and_version(fetch: Fetch) -> None:
    fetch.content = None
    etag = {"X_Linked_ETag": f'"{SHA256}"', "X_Linked_Size": len(DATA), "ETag": '"0123"'}
    with FileServer({"/blob": DATA}) as cdn:
        cdn.headers["/blob"] = {"ETag": '"of-the-cdn"'}
        cdn.script["/blob"] = [truncate(1000)]
        fetch(*[redirect(f"{cdn.url}/blob", **etag)] * 2)
        assert_whole(fetch)
        assert cdn.ranges == fetch.server.ranges == [None, "bytes=1000-"]

        fetch.path.unlink()
        cdn.files["/blob"] = OTHER
        with pytest.raises(UserError, match="SHA-256"):
            fetch(*[redirect(f"{cdn.url}/blob", **etag)] * 99)
    assert fetch.left() == []


def test_the_token_stays_with_the_host_it_is_for(fetch: Fetch) -> None:
    fetch.token = "hf_secret"
    with FileServer({"/blob": DATA}) as cdn:
        fetch(redirect(f"{cdn.url}/blob"))
        assert fetch.server.tokens == ["Bearer hf_secret"]
        assert cdn.tokens == [None]
    assert_whole(fetch)


# ---- what earlier processes left


def test_the_part_of_a_dead_process_is_continued(fetch: Fetch) -> None:
    fetch.leave_part(DATA[:5000])
    fetch()
    assert fetch.path.read_bytes() == DATA and fetch.left() == ["a.bin"]
    assert fetch.server.ranges == ["bytes=5000-"]


def test_a_part_that_is_all_of_the_file_is_not_fetched_again(fetch: Fetch) -> None:
    fetch.leave_part(DATA)
    fetch()
    assert fetch.path.read_bytes() == DATA and fetch.left() == ["a.bin"]
    assert fetch.server.ranges == [f"bytes={len(DATA)}-"]


@pytest.mark.parametrize("part", [DATA + b"!", b"?" * 1000, OTHER])
def test_a_part_of_other_bytes_is_thrown_away(fetch: Fetch, part: bytes) -> None:
    fetch.leave_part(part)
    fetch()
    assert fetch.path.read_bytes() == DATA and fetch.left() == ["a.bin"]
    assert fetch.server.ranges == [f"bytes={len(part)}-", None]
    assert sum(fetch.progress) == len(DATA) - len(part)


def test_versions_are_never_mixed(fetch: Fetch) -> None:
    """The file on the server changes between two runs: the old part is worth nothing, even where
    nothing else would tell (same length, no hash, a check that looks at the end alone)."""
    fetch.content = None
    fetch.server.headers["/a.bin"] = {"ETag": '"old"'}
    fetch.server.files["/a.bin"] = OTHER
    with pytest.raises(UserError):
        fetch(truncate(1000), *[fail(503)] * 99)
    assert fetch.path.with_name("a.bin.lock").read_text(encoding="utf-8") == "old"
    fetch.server.headers["/a.bin"] = {"ETag": '"new"'}
    fetch.server.files["/a.bin"] = DATA
    fetch(whole)
    assert fetch.path.read_bytes() == DATA
    assert fetch.server.ranges[-2:] == ["bytes=1000-", None]


def test_a_part_whose_version_is_not_known_is_not_trusted(fetch: Fetch) -> None:
    fetch.server.headers["/a.bin"] = {"ETag": '"new"'}
    fetch.leave_part(DATA[:1000])
    fetch()
    assert fetch.path.read_bytes() == DATA
    assert fetch.server.ranges == ["bytes=1000-", None]


# ---- two at once


def test_a_second_process_waits_or_hears_that_it_is_being_fetched(fetch: Fetch) -> None:
    patience = replace(fetch.patience, pause=time.sleep)
    args = (fetch.server.url + "/a.bin", fetch.path, fetch.check, fetch.progress.append, patience)
    fetch.server.script["/a.bin"] = [drip(50_000, 0.1)]
    results: list[bool] = []
    first = threading.Thread(target=lambda: results.append(download(*args)))
    first.start()
    while not fetch.part.exists():
        time.sleep(0.01)
    with pytest.raises(
        Busy, match="by another process"
    ):  # a lock of the kernel: threads are as good
        download(*args, wait=False)
    assert not download(*args)  # waits, and finds it done
    first.join()
    assert results == [True]
    assert_whole(fetch)
    assert fetch.server.ranges == [None]


def test_a_process_that_is_killed_frees_its_file(fetch: Fetch) -> None:
    url = fetch.server.url + "/a.bin"
    fetch.server.script["/a.bin"] = [stall(20, count=7000)]
    program = (
        "import sys; from pathlib import Path; from nanochat.download import download; "
        "download(sys.argv[1], Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, url, str(fetch.path)])
    while not (fetch.part.exists() and fetch.part.stat().st_size == 7000):
        time.sleep(0.02)
    with pytest.raises(Busy):
        download(url, fetch.path, wait=False)
    process.kill()
    process.wait()
    assert download(url, fetch.path, fetch.check, wait=False)
    assert fetch.server.ranges == [None, "bytes=7000-"]
    assert fetch.left() == ["a.bin"]


def test_many_at_once_give_one_whole_file(fetch: Fetch) -> None:
    """Some finish, some wait, locks come and go: one of them fetches it, all are content."""
    url = fetch.server.url + "/a.bin"
    fetch.server.always = drip(100_000, 0.01)
    results: list[bool] = []
    patience = replace(fetch.patience, pause=lambda seconds: time.sleep(0.001))

    def one() -> None:
        results.append(download(url, fetch.path, fetch.check, patience=patience))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]
    assert fetch.path.read_bytes() == DATA and fetch.left() == ["a.bin"]
    assert fetch.server.ranges == [None]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_what_has_the_name_is_one_version_whole(fetch: Fetch, seed: int) -> None:
    """Random faults, from a server whose file changes now and then, over as many runs as it takes.
    No check and no hash help: length and version alone must keep the bytes apart."""
    rng = random.Random(seed)
    versions = {'"one"': DATA, '"two"': OTHER[:250_000]}
    current = '"one"'

    def answer(handler: Handler, data: bytes) -> None:
        nonlocal current
        if rng.random() < 0.2:
            current = rng.choice([*versions])
        handler.owner.headers["/a.bin"] = {"ETag": current}
        count = rng.randrange(250_000)
        faults = [
            truncate(count), reset(count), fail(503), html, without_range, wrong_range,
            chunked(4, end=False), whole,
        ]  # fmt: skip
        rng.choices(faults, [4, 4, 2, 1, 1, 1, 1, 1])[0](handler, versions[current])

    fetch.content = None
    fetch.server.always = answer
    fetch.patience = replace(fetch.patience, tries=2)
    while not fetch.path.exists():
        with contextlib.suppress(UserError):
            fetch()
    assert fetch.path.read_bytes() in versions.values()
    assert fetch.left() == ["a.bin"]
    assert sum(fetch.progress) == len(fetch.path.read_bytes())


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_a_file_system_without_locks_still_gets_a_whole_file(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(f: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    fetch()
    assert_whole(fetch)
