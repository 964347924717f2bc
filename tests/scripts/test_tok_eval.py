"""The tokenizer's measurements, with and without other vocabularies to compare."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from nanochat.common import UserError, read_jsonl
from nanochat.report.card import write_report
from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer_files import GPT2_PATTERN
from nanochat.vocabulary import Vocabulary
from scripts import tok_eval
from scripts.tok_eval import LANGUAGES, SAMPLES, Args
from tests.tokenizers_for_tests import tiny_tokenizer

TEXTS = ("validation", *SAMPLES, *LANGUAGES)


@pytest.fixture
def base(own_base_dir: Path) -> Path:
    """A base directory with a tokenizer and a validation text of two documents."""
    tiny_tokenizer().save(own_base_dir / "tokenizer")
    (own_base_dir / "base_data").mkdir(parents=True)
    for name, texts in (("a.jsonl", ["never read"]), ("b.jsonl", ["The river. é", "The sea."])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (own_base_dir / "base_data" / name).write_text(rows, encoding="utf-8")
    return own_base_dir


def rows(base: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = [row for _, row in read_jsonl(base / "report" / "tok_eval.jsonl")]
    return {(row["text"], row["tokenizer"]): row for row in found}


def no_network(name: str) -> tiktoken.Encoding:
    raise ConnectionError(name)


def test_offline_measures_ours_and_says_so(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    tok_eval.main(Args())
    said = capsys.readouterr().out
    assert "GPT-2 (ConnectionError), GPT-4 (ConnectionError)" in said
    assert "korean" in said
    measured = rows(base)
    assert set(measured) == {(text, "ours") for text in TEXTS}
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer.encode("The river. é"), *tokenizer.encode("The sea.")]
    row = measured["validation", "ours"]
    assert (row["bytes"], row["tokens"]) == (21, len(ids))
    assert row["bytes_per_token"] == pytest.approx(21 / len(ids), abs=1e-3)
    assert row["chars_per_token"] == pytest.approx(20 / len(ids), abs=1e-3)
    assert row["used_share"] == pytest.approx(len(set(ids)) / 391, abs=1e-4)
    assert row["vocab"] == 391
    assert row["mb_per_second"] >= 0 and row["batch_mb_per_second"] >= 0
    lines = [line.split() for line in said.splitlines()]
    shown = [f"{row[key]:.2f}" for key in ("bytes_per_token", "chars_per_token")]
    assert ["validation", "21", *shown] in lines
    assert ["ours", "391", f"{row['used_share']:.1%}"] in [line[:3] for line in lines]


def test_others_are_measured_on_the_same_texts(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {bytes([b]): b for b in range(256)}  # a vocabulary of bytes stands in for the others
    encoding = tiktoken.Encoding("b", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tok_eval.main(Args())
    measured = rows(base)
    assert len(measured) == 3 * len(TEXTS)
    assert measured["korean", "GPT-4"]["bytes_per_token"] == 1
    assert measured["korean", "GPT-2"]["bytes"] == measured["korean", "ours"]["bytes"]
    ours = measured["validation", "ours"]["bytes_per_token"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["text", "bytes", "ours", "GPT-2", "GPT-4", "characters,", "ours"] in lines
    assert ["validation", "21", f"{ours:.2f}", "1.00", "1.00"] in [line[:5] for line in lines]


def test_another_tokenizer_is_called_by_its_name(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One without tokens for conversations, such as GPT-2's, will do."""
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    ranks = tiny_tokenizer(600).vocabulary.ranks
    plain = Vocabulary(GPT2_PATTERN, ranks, {"<|endoftext|>": len(ranks)})
    Tokenizer(plain).save(tmp_path / "plain")
    tok_eval.main(Args())
    tok_eval.main(Args(tokenizer=str(tmp_path / "plain")))
    measured = rows(base)
    assert measured["validation", "plain"]["vocab"] == len(ranks)
    assert measured["validation", "ours"]["vocab"] == 391


def test_the_report_shows_them(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    tok_eval.main(Args())
    write_report(base / "report", base / "report" / "report.md")
    text = (base / "report" / "report.md").read_text(encoding="utf-8")
    row = rows(base)["hindi", "ours"]
    found = next(line for line in text.splitlines() if line.startswith("| hindi"))
    assert [c.strip() for c in found.split("|")[2:5]] == [
        *(f"{row['bytes']:,}", f"{row['bytes_per_token']:.2f}", f"{row['chars_per_token']:.2f}")
    ]


def test_a_download_that_never_answers_is_given_up(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: over.wait())
    monkeypatch.setattr(tok_eval, "DOWNLOAD_SECONDS", 0.1)
    start = time.monotonic()
    tok_eval.main(Args())
    over.set()
    assert time.monotonic() - start < 10
    assert "no answer within" in capsys.readouterr().out


def test_max_chars_limits_the_validation_text(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    tok_eval.main(Args(max_chars=15))
    assert rows(base)["validation", "ours"]["bytes"] == len("The river. éThe".encode())
    with pytest.raises(UserError, match="--max_chars=0"):
        tok_eval.main(Args(max_chars=0))


def test_samples_are_of_many_kinds() -> None:
    assert set(SAMPLES) == {"news", "code", "math"}
    assert len(LANGUAGES) == 9
    assert all(len(text.encode()) > 250 for text in (SAMPLES | LANGUAGES).values())
    for name, text in LANGUAGES.items():  # each in its own letters
        assert sum(c.isascii() for c in text) < 0.98 * len(text), name


def test_cores() -> None:
    assert 1 <= tok_eval.cores() <= (os.cpu_count() or 1)
