"""chat_web: that it serves what it loaded, on the address asked for, and explains what fails."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from nanochat import flags
from nanochat.common import UserError
from nanochat.scheduler import Scheduler
from nanochat.serve.options import access_of, devices_of, step_of
from scripts import chat_web
from scripts.chat_web import Args
from tests.models_for_tests import tiny_model
from tests.serving_for_tests import PATIENCE
from tests.tokenizers_for_tests import tiny_tokenizer


@contextmanager
def running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **more: Any
) -> Iterator[httpx.Client]:
    """The script's main in a thread, with a tiny random model in the checkpoint's place."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt", vocab_size=tokenizer.get_vocab_size(), sequence_len=64)

    def load(source: str, device: Any, **which: Any) -> tuple[Any, Any, dict[str, Any]]:
        assert source == "rl" and which == {"model_tag": "d1", "step": None}
        return model, tokenizer, {"tag": "d1", "step": 3}

    ready = threading.Event()
    servers: list[uvicorn.Server] = []

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            servers.append(self)
            ready.set()

    monkeypatch.setattr(chat_web, "load_model", load)
    monkeypatch.setattr(uvicorn, "Server", Server)
    args = Args("cpu", source="rl", model_tag="d1", port=0, max_new_tokens=7, **more)
    thread = threading.Thread(target=chat_web.main, args=(args,))
    thread.start()
    assert ready.wait(timeout=PATIENCE)
    line = capsys.readouterr().out
    address = next(word for word in line.split() if word.startswith("http"))
    try:
        with httpx.Client(base_url=address, timeout=PATIENCE, trust_env=False) as client:
            yield client
    finally:
        servers[0].should_exit = True
        thread.join(timeout=PATIENCE)
        assert not thread.is_alive()


BODY = {"messages": [{"role": "user", "content": "Hello"}], "seed": 1}


def test_it_serves_the_model_it_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(monkeypatch, capsys) as served:
        assert served.base_url.host == "127.0.0.1"
        assert served.get("/v1/models").json()["data"][0]["id"] == "rl-d1"
        health = served.get("/health").json()
        assert health["context"] == 64 and health["defaults"]["max_tokens"] == 7
        assert health["workers"] == 1
        replies = [served.post("/v1/chat/completions", json=BODY) for _ in range(2)]
        assert all(reply.status_code == 200 for reply in replies)
        assert replies[0].json()["choices"] == replies[1].json()["choices"]
        assert 1 <= replies[0].json()["usage"]["completion_tokens"] <= 7
        assert "nanochat" in served.get("/").text
        # A loopback address answers to its own names only
        assert served.get("/health", headers={"Host": "evil.example"}).status_code == 403


def test_flags_reach_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    key = tmp_path / "key.txt"
    key.write_text("the-key\n", encoding="utf-8")
    more = {
        "workers": 2, "max_context": 40, "max_reply_tokens": 9, "max_concurrent": 2,
        "max_waiting": 0, "max_body": 5000, "api_key_file": str(key), "tools": "none",
        "quantize": "int8", "allowed_hosts": ["chat.example"], "cors_origins": ["https://page.example/"],
    }  # fmt: skip
    warm: set[Scheduler] = set()

    def warm_up(scheduler: Scheduler) -> None:
        warm.add(scheduler)

    monkeypatch.setattr(Scheduler, "warm_up", warm_up)
    with running(monkeypatch, capsys, **more) as served:
        assert len(warm) == 2  # before the first request
        served.headers["Host"] = "chat.example"
        health = served.get("/health").json()
        assert health["workers"] == 2 and health["context"] == 40 and health["needs_key"]
        assert health["max_reply_tokens"] == 9
        assert served.post("/v1/chat/completions", json=BODY).status_code == 401
        served.headers.update({"Authorization": "Bearer the-key", "Origin": "https://page.example"})
        reply = served.post("/v1/chat/completions", json=BODY)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://page.example"
        for wrong, status in [
            ({"max_tokens": 10}, 400),
            ({"n": 5}, 400),
            ({"user": "x" * 5000}, 413),
        ]:
            assert served.post("/v1/chat/completions", json={**BODY, **wrong}).status_code == status


def test_a_context_beyond_the_models_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt", sequence_len=64)
    monkeypatch.setattr(
        chat_web, "load_model", lambda *_, **__: (model, tiny_tokenizer(), {"tag": "d1"})
    )
    with pytest.raises(UserError, match=r"--max_context=65.*64 tokens"):
        chat_web.main(Args("cpu", port=0, max_context=65))


@pytest.mark.parametrize(
    "flag",
    ["max_concurrent", "max_new_tokens", "max_body", "read_timeout", "request_timeout", "port"],
)
def test_limits_that_allow_nothing_are_explained(
    monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    model = tiny_model("gpt", sequence_len=64)
    monkeypatch.setattr(
        chat_web, "load_model", lambda *_, **__: (model, tiny_tokenizer(), {"tag": "d1"})
    )
    with pytest.raises(UserError, match=f"--{flag}=-1"):
        chat_web.main(Args("cpu", **{"port": 0, flag: -1}))


def test_who_may_ask(capsys: pytest.CaptureFixture[str]) -> None:
    closed = access_of(Args())
    assert closed.hosts is not None and "localhost" in closed.hosts and closed.api_key is None
    assert closed.origins == []
    assert access_of(Args(host="127.0.0.5")).hosts == ["localhost", "127.0.0.1", "::1", "127.0.0.5"]
    assert not capsys.readouterr().err
    assert access_of(Args(host="0.0.0.0")).hosts is None
    assert "--api_key_file=FILE" in capsys.readouterr().err  # a warning
    assert access_of(Args(host="0.0.0.0", api_key="k")).api_key == "k"
    assert access_of(Args(host="0.0.0.0", api_key="k", allowed_hosts=["A.b"])).hosts == ["a.b"]
    assert not capsys.readouterr().err


def test_keys_that_are_none_are_explained(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for args, message in [
        (Args(api_key_file=str(tmp_path / "none")), "--api_key_file=.*none"),
        (Args(api_key_file=str(empty)), "is empty"),
        (Args(api_key_file=str(empty), api_key="k"), "give one of them"),
        (Args(api_key="ключ"), "ASCII"),
    ]:
        with pytest.raises(UserError, match=message):
            access_of(args)


def test_one_worker_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert devices_of(Args(), cpu) == [cpu] and devices_of(Args(workers=2), cpu) == [cpu, cpu]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [d.index for d in devices_of(Args(), gpu)] == [0, 1, 2]
    assert [d.index for d in devices_of(Args(workers=2), gpu)] == [0, 1]
    with pytest.raises(UserError, match=r"--workers=4.*3 GPUs"):
        devices_of(Args(workers=4), gpu)
    for device in (cpu, gpu):
        with pytest.raises(UserError, match=r"--workers=-1"):
            devices_of(Args(workers=-1), device)
    assert step_of(Args(), gpu) == "graph" and step_of(Args(), cpu) == "plain"
    assert step_of(Args(decoding="compiled"), gpu) == "compiled"


def test_short_and_long_flags() -> None:
    argv = ["-i", "sft", "-g", "d20", "-s", "7", "-t", "0.5", "-k", "3", "-m", "9", "-p", "81"]
    argv += ["--host", "0.0.0.0", "--device-type", "cpu"]
    assert flags.parse(Args, argv) == Args(
        device_type="cpu", source="sft", model_tag="d20", step=7, host="0.0.0.0", port=81,
        temperature=0.5, top_k=3, max_new_tokens=9,
    )  # fmt: skip
    assert flags.parse(Args, []).host == "127.0.0.1"
    origins = flags.parse(Args, ["--cors_origins", "https://a.b", "https://c.d"]).cors_origins
    assert origins == ["https://a.b", "https://c.d"]
