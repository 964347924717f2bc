"""The server as a process: its socket, and its end."""

from __future__ import annotations

import signal
import subprocess
import sys

import httpx
import pytest

from nanochat.common import UserError
from nanochat.serve.run import listen
from tests.conftest import REPO
from tests.serving_for_tests import HELLO, PATIENCE, events_of


def test_a_taken_port_is_explained() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port} is taken.*--port={port + 1}"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "flag"), [("127.0.0.1", 70000, "--port=70000"), ("999.1.1.1", 0, "--host=")]
)
def test_impossible_addresses_are_explained(host: str, port: int, flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        listen(host, port)


SERVER = """
from nanochat.serve.api import create_app
from nanochat.serve.limits import Limits
from nanochat.serve.run import listen, make_server
from tests.engines_for_tests import ScriptedEngine, ScriptedScheduler, script_of
from tests.tokenizers_for_tests import tiny_tokenizer
tokenizer = tiny_tokenizer()
engine = ScriptedEngine(script_of(tokenizer, "Hello! " * 8), delay=0.03)
limits = Limits(max_context=128)
app = create_app([engine], tokenizer, "tiny", limits, make_scheduler=ScriptedScheduler)
with listen("127.0.0.1", 0) as listener:
    server = make_server(app, grace=60)
    print(listener.getsockname()[1], flush=True)
    server.run(sockets=[listener])
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_reply_under_way_is_finished_when_the_process_is_told_to_end(
    sent: signal.Signals,
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}/v1/chat/completions"
        body = {"messages": HELLO, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=PATIENCE, trust_env=False) as response:
            pieces = response.iter_text()
            text = next(pieces)
            process.send_signal(sent)
            text += "".join(pieces)
        *chunks, last, done = events_of(text)
        assert done == "[DONE]" and last["choices"][0]["finish_reason"] == "stop"
        said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        assert said == "Hello! " * 8
        rest, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert "replies under way get 60 s" in rest
    # SIGTERM is what ended it; Ctrl-C is Python's KeyboardInterrupt, as in any program
    assert process.returncode in (-sent, 130, 1)
    assert sent == signal.SIGTERM or errors.splitlines()[-1] == "KeyboardInterrupt"
