"""Looking at the data: marks, shortened texts, and accounts in which every document occurs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat import preview
from nanochat.dataloader import RowReader
from nanochat.dataset import TextFiles
from nanochat.packing import Documents, pack
from nanochat.preview import LONGEST, mark, preview_corpus, preview_text, shorten, text_account
from nanochat.text_source import TextSource
from tests.tokenizers_for_tests import tiny_tokenizer

CONVERSATION = {
    "messages": [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "It is 4."},
    ]
}
TURN = "<|bos|><|user_start|>What is 2+2?<|user_end|><|assistant_start|>"


def rendered(tokenizer: Any) -> tuple[list[int], list[bool]]:
    ids, mask = tokenizer.render_conversation(CONVERSATION)
    return ids, [bool(t) for t in tokenizer.trained_mask(ids, mask)]


def test_what_is_trained_on_is_marked() -> None:
    tokenizer = tiny_tokenizer()
    ids, trained = rendered(tokenizer)
    assert mark(tokenizer, ids, trained) == f"{TURN}⟦It is 4.<|assistant_end|>⟧"
    # Two in a row, and what is left of it: not one line for every token of padding
    bos = tokenizer.get_bos_token_id()
    text = mark(tokenizer, [*ids, *ids, *[bos] * 9], [*trained, *trained, *[False] * 9])
    assert text.splitlines() == [
        f"{TURN}⟦It is 4.<|assistant_end|>⟧",
        f"{TURN}⟦It is 4.<|assistant_end|>⟧",
        "[9 tokens of padding]",
    ]


def test_on_a_terminal_it_is_green(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tokenizer = tiny_tokenizer()
    assert mark(tokenizer, *rendered(tokenizer)) == (
        f"{TURN}\x1b[32mIt is 4.<|assistant_end|>\x1b[0m"
    )


def test_documents_of_text_begin_on_their_own_lines() -> None:
    tokenizer = tiny_tokenizer()
    bos = tokenizer.get_bos_token_id()
    ids = [bos, *tokenizer.encode("first"), bos, *tokenizer.encode("second"), bos]
    trained = [False, *[True] * (len(ids) - 1)]  # as targets they are trained on, but the first
    assert mark(tokenizer, ids, trained) == "<|bos|>⟦first⟧\n⟦<|bos|>second⟧\n⟦<|bos|>⟧"


def test_long_texts_show_their_two_ends_and_terminals_are_not_obeyed() -> None:
    assert shorten("short\n\ttext") == "short\n\ttext"
    text = "a" * 1000 + "b" * 1000
    assert shorten(text).startswith("a" * 200) and shorten(text).endswith("b" * 100)
    assert "[…1,601 characters…]" in shorten(text)
    assert len(shorten(text)) < LONGEST + 40
    assert shorten("\x1b[2Jgone\x00\r\x9b") == r"\x1b[2Jgone\x00\x0d\x9b"


def test_every_document_is_in_the_account() -> None:
    lengths = np.array([10, 4, 6, 7, 3, 9, 25])
    offsets = np.cumsum([0, *lengths])
    documents = Documents(np.zeros(offsets[-1], dtype=np.uint16), offsets)
    plan = pack(lengths, np.arange(7), 10, True)
    text = text_account(documents, plan, 10)
    counted = [int(line.split()[1]) for line in text.splitlines()[1:4]]
    assert sum(counted) == 7 and counted[0] >= 3 and counted[1] >= 1
    assert text.startswith(f"7 documents of 64 tokens fill {len(plan)} rows:")
    assert f"tokens: {plan.summary(10)['cropped']:.2%} in no row" in text


def text_files(folder: Path) -> TextFiles:
    for name in ("a", "b"):
        lines = [f'{{"text": "document {i} of {name} goes on and on"}}\n' for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return TextFiles([folder / "a.jsonl"], folder / "b.jsonl")


def test_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    files = text_files(tmp_path)
    source = TextSource(files.train, tokenizer)
    preview_text(files, RowReader(source, 33, 0, tokenizer.get_bos_token_id()), tokenizer)
    out = capsys.readouterr().out
    assert out.startswith("text: 1 files, 2.6 kB on disk\n  100.0%  a.jsonl\nvalidation: b.jsonl\n")
    assert "read first: 60 documents of" in out
    assert "--- row 2: 32 tokens, 100% trained on\n<|bos|>⟦document" in out


def test_of_the_tokenizers_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview_corpus(text_files(tmp_path), doc_cap=20, max_chars=105)
    out = capsys.readouterr().out
    assert "--- document 0: 30 characters\n⟦document 0 of a goes⟧\n" in out
    assert "6 documents of 105 characters are kept, 6 of them cropped to --doc_cap=20" in out
    assert "validation, never read: b.jsonl" in out
    assert out.count("--- document") == preview.NUM_ROWS
