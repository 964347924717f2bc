"""
A web server on 127.0.0.1 that misbehaves to order, for the tests of downloads.

    with FileServer({"/a.bin": data}) as server:
        server.script["/a.bin"] = [fail(503), truncate(1000)]  # one entry a request
        download(server.url + "/a.bin", path)
        assert len(server.paths) == 3
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# (handler, the whole file): answers one request
Answer = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Serves the files of its FileServer, with Range, or what the script says instead."""

    protocol_version = "HTTP/1.1"
    owner: FileServer

    def do_GET(self) -> None:
        data = self.owner.files.get(self.path)
        with self.owner.lock:
            self.owner.paths.append(self.path)
            self.owner.ranges.append(self.headers.get("Range"))
            self.owner.tokens.append(self.headers.get("Authorization"))
            script = self.owner.script.get(self.path)
            answer = script.pop(0) if script else self.owner.always or whole
        if data is None and answer is whole:
            answer = fail(404)
        self.close_connection = True
        # The client may hang up on us; that is its business.
        with contextlib.suppress(ConnectionError):
            answer(self, data or b"")

    def do_HEAD(self) -> None:
        with self.owner.lock:
            self.owner.heads.append(self.path)
        data = self.owner.files.get(self.path)
        self.send(404 if data is None else 200, b"", length=len(data or b""))

    def send(
        self, status: int, body: bytes, length: int | None = None, **headers: str | int
    ) -> None:
        """One response; `length` is what Content-Length says, by default the truth."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Connection", "close")
        for name, value in {**self.owner.headers.get(self.path, {}), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


class FileServer:
    """The server: `files` by path, `script` of misbehaviours by path, and what was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.script: dict[str, list[Answer]] = {}
        self.always: Answer | None = None  # instead of `whole`, where the script says nothing
        self.headers: dict[str, dict[str, str | int]] = {}  # more of them, by path
        self.paths: list[str] = []  # of every GET, in order; the next two as well
        self.ranges: list[str | None] = []
        self.tokens: list[str | None] = []
        self.heads: list[str] = []  # paths of every HEAD
        self.lock = threading.Lock()
        handler = type("OwnedHandler", (Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FileServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def shard(index: int, rows: int | None = None) -> bytes:
    """A parquet file; no two of the same size."""
    buffer = io.BytesIO()
    rows = 300 + 100 * index if rows is None else rows
    texts = [f"shard {index} document {row}: ä, 你好" for row in range(rows)]
    pq.write_table(pa.table({"text": texts}), buffer)
    return buffer.getvalue()


class FakeHub(FileServer):
    """A hub with one data set, and its listing in pages of two where there is one."""

    def __init__(self, repo: str, names: list[str]) -> None:
        self.root = f"/datasets/{repo}/resolve/main/"
        super().__init__({self.root + name: shard(i) for i, name in enumerate(names)})
        self.tree = f"/api/datasets/{repo}/tree/main?limit=1000"

    def publish_listing(self) -> None:
        entries: list[dict[str, Any]] = [{"type": "file", "path": "README.md", "size": 7}]
        for path, data in self.files.items():
            if path.startswith(self.root):
                lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
                name = path.removeprefix(self.root)
                entries.append({"type": "file", "path": name, "size": len(data), "lfs": lfs})
        pages = [entries[i : i + 2] for i in range(0, len(entries), 2)]
        for i, page in enumerate(pages):
            path = self.tree if i == 0 else f"{self.tree}&cursor={i}"
            self.files[path] = json.dumps(page).encode()
            if i + 1 < len(pages):
                following = f'<{self.url}{self.tree}&cursor={i + 1}>; rel="next"'
                self.headers[path] = {"Link": following}

    def shards_asked_for(self) -> list[str]:
        return [p.removeprefix(self.root)[6:11] for p in self.paths if p.startswith(self.root)]


def whole(handler: Handler, data: bytes) -> None:
    """As it should be: the file, or the part that Range asks for."""
    match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
    if match is None:
        return handler.send(200, data)
    first = int(match[1])
    if first >= len(data):
        return handler.send(416, b"", Content_Range=f"bytes */{len(data)}")
    where = f"bytes {first}-{len(data) - 1}/{len(data)}"
    return handler.send(206, data[first:], Content_Range=where)


def without_range(handler: Handler, data: bytes) -> None:
    """The whole file, whatever part was asked for."""
    handler.send(200, data)


def wrong_range(handler: Handler, data: bytes) -> None:
    """206, but of another part than was asked for."""
    handler.send(206, data[1:], Content_Range=f"bytes 1-{len(data) - 1}/{len(data)}")


def without_length(handler: Handler, data: bytes) -> None:
    """No Content-Length: the end of the connection is the end of the file."""
    handler.protocol_version = "HTTP/1.0"
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(data)


def fail(status: int, **headers: str | int) -> Answer:
    """Only a status, such as 503; headers as keywords, Retry_After=3."""
    return lambda handler, data: handler.send(status, b"sorry", **headers)


def truncate(count: int) -> Answer:
    """Promises the file, sends `count` bytes of it, and ends the connection politely."""
    return lambda handler, data: handler.send(200, data[:count], length=len(data))


def understate(count: int) -> Answer:
    """Says that the file has `count` bytes only: nobody can see that from outside."""
    return lambda handler, data: handler.send(200, data[:count])


def reset(count: int) -> Answer:
    """Sends `count` bytes and resets the connection."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.send(200, data[:count], length=len(data))
        handler.wfile.flush()
        # Linger of zero seconds: close() sends RST
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return answer


def stall(seconds: float, count: int = 100) -> Answer:
    """Sends `count` bytes, and then nothing for a while."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.send(200, data[:count], length=len(data))
        handler.wfile.flush()
        time.sleep(seconds)

    return answer


def drip(piece: int, seconds: float) -> Answer:
    """The file, or the part that Range asks for, `piece` bytes at a time with pauses between."""

    def answer(handler: Handler, data: bytes) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
        first = int(match[1]) if match else 0
        where = f"bytes {first}-{len(data) - 1}/{len(data)}"
        more = {"Content_Range": where} if match else {}
        handler.send(206 if match else 200, b"", len(data) - first, **more)
        for at in range(first, len(data), piece):
            handler.wfile.write(data[at : at + piece])
            time.sleep(seconds)

    return answer


def html(handler: Handler, data: bytes) -> None:
    """A web page, as a captive portal sends it."""
    handler.send(200, b"<html>please log in</html>", Content_Type="text/html; charset=utf-8")


def compressed(handler: Handler, data: bytes) -> None:
    """gzip, whether it was asked for or not."""
    handler.send(200, gzip.compress(data), Content_Encoding="gzip")


def chunked(pieces: int, end: bool) -> Answer:
    """The file without its length, in pieces; without the last one, it is cut off."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        size = -(-len(data) // pieces)
        for at in range(0, len(data) if end else len(data) - size, size):
            piece = data[at : at + size]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if end:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def redirect(url: str, **headers: str | int) -> Answer:
    """302 to another address, as the hub does to its CDN."""
    return lambda handler, data: handler.send(302, b"", Location=url, **headers)
