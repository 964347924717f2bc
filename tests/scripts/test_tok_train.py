"""The first stage: text in, three files and a row of metrics out."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError, read_jsonl
from nanochat.dataset import text_size
from nanochat.progress import Progress
from nanochat.tokenizer import get_tokenizer
from scripts import tok_train
from scripts.tok_train import Args, Corpus, Meter
from tests.tokenizers_for_tests import TEXT, tiny_tokenizer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def base(own_base_dir: Path) -> Path:
    """A base directory whose base_data/ holds TEXT by lines, and other text for validation."""
    data = own_base_dir / "base_data"
    data.mkdir(parents=True)
    for name, texts in (("a.jsonl", TEXT.splitlines()), ("b.jsonl", ["validation words"] * 99)):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (data / name).write_text(rows, encoding="utf-8")
    return own_base_dir


def metrics(base: Path) -> dict[str, Any]:
    *_, (_, row) = read_jsonl(base / "report" / "tok_train.jsonl")
    return row


def test_a_tokenizer_is_trained_written_and_measured(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tok_train.main(Args(vocab_size=600))
    tokenizer = get_tokenizer()
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert b"validation" not in tokenizer.vocabulary.ranks  # 99 times in the validation file
    names = sorted(p.name for p in (base / "tokenizer").iterdir())
    assert names == ["token_bytes.pt", "tokenizer.json", "tokenizer.pkl"]
    row = metrics(base)
    lengths = [len(token) for token in tokenizer.vocabulary.ranks]
    assert row["vocab_size"] == 600
    assert row["docs"] == len(TEXT.splitlines())
    assert row["chars"] == sum(map(len, TEXT.splitlines()))
    assert (row["token_bytes_min"], row["token_bytes_max"]) == (1, max(lengths))
    assert row["token_bytes_mean"] == pytest.approx(sum(lengths) / len(lengths), abs=1e-3)
    assert row["seconds"] >= 0
    assert "600 tokens from" in capsys.readouterr().out


def test_max_chars_and_doc_cap_limit_what_is_read(base: Path) -> None:
    tok_train.main(Args(vocab_size=300, max_chars=1000))
    assert metrics(base)["chars"] == 1000
    tok_train.main(Args(vocab_size=300, doc_cap=10))
    assert metrics(base)["chars"] == sum(min(10, len(line)) for line in TEXT.splitlines())


def parquet(path: Path, texts: list[str], **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, **options)}), path, row_group_size=40)
    return path


def cut_slowly(texts: list[str], max_chars: int, doc_cap: int) -> list[str]:
    """What counts of the texts, one by one."""
    kept: list[str] = []
    for text in texts:
        kept.append(text[:doc_cap][: max_chars - sum(map(len, kept))])
        if sum(map(len, kept)) >= max_chars:
            break
    return kept


NASTY = [
    "",
    "naïve é",
    "안녕하세요 세계",
    "🙂👩‍👩‍👧🇩🇪",
    "e\u0301" * 9,
    "plain text",
    "\n",
    "",
    "x" * 30,
] * 3


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_arrow_arrays_are_cut_as_their_texts_are(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    monkeypatch.setattr(dataset, "PARQUET_BATCH", 8)
    folder = tmp_path / "arrow"
    parquet(folder / "a.parquet", NASTY[:11], type=kind)
    parquet(folder / "b.parquet", NASTY[11:], type=kind)
    parquet(folder / "c.parquet", ["validation"])
    total = sum(map(len, NASTY))
    for doc_cap in (1, 7, 10_000):
        for max_chars in (1, 2, 8, 9, 50, 77, 78, total - 1, total, total + 1):
            corpus = Corpus(Args(max_chars=max_chars, doc_cap=doc_cap, data=str(folder)))
            items = list(corpus)
            texts = [t for item in items for t in ([item] if isinstance(item, str) else item)]
            texts = [str(text) for text in texts]
            expected = cut_slowly(NASTY, max_chars, doc_cap)
            assert (texts, corpus.checked) == (expected, expected)
            assert (corpus.docs, corpus.chars) == (len(expected), sum(map(len, expected)))
    assert all(isinstance(item, pa.Array) for item in items)  # where nothing ended early


def test_parquet_gives_the_same_tokenizer_as_lines_of_json(base: Path, tmp_path: Path) -> None:
    parquet(tmp_path / "arrow" / "a.parquet", TEXT.splitlines())
    parquet(tmp_path / "arrow" / "b.parquet", ["validation words"])
    for limits in ({}, {"max_chars": 2000}, {"doc_cap": 50}):
        trained = []
        for data in (None, str(tmp_path / "arrow")):
            tok_train.main(Args(vocab_size=500, data=data, **limits))
            row = {k: v for k, v in metrics(base).items() if k not in ("seconds", "time")}
            trained.append((get_tokenizer().fingerprint, row))
        assert trained[0] == trained[1]


PEAK = """
import sys
from nanochat.tokenizer import Tokenizer
from scripts.tok_train import Args, Corpus
corpus = Corpus(Args(data=sys.argv[1]))
Tokenizer.train(corpus, 500)
status = dict(line.split(":") for line in open("/proc/self/status"))
print(corpus.chars, int(status["VmHWM"].split()[0]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    peaks = {}
    for copies in (2, 16):
        texts = [TEXT[:1000] for _ in range(8192)] * copies  # 8 MB a copy
        folder = tmp_path / str(copies)
        parquet(folder / "b.parquet", ["validation"])
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet", use_dictionary=False)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder)], cwd=ROOT, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        chars, peaks[copies] = map(int, done.stdout.split())
        assert chars == 8_192_000 * copies
    assert peaks[16] - peaks[2] < 40, "MiB, of 115 MB more text"


def test_where_rustbpe_is_the_older_one_it_gets_strings(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyPI's 0.1.0 knows neither Arrow nor progress. (tests/test_setup.py runs it where it is.)"""
    import rustbpe

    class Old:
        def __init__(self) -> None:
            self.real = rustbpe.Tokenizer()
            self.get_mergeable_ranks = self.real.get_mergeable_ranks

        def train_from_iterator(self, iterator: Any, vocab_size: int, pattern: str) -> None:
            texts = list(iterator)
            assert all(type(text) is str for text in texts)
            self.real.train_from_iterator(texts, vocab_size, pattern=pattern)

    parquet(tmp_path / "arrow" / "a.parquet", TEXT.splitlines())
    parquet(tmp_path / "arrow" / "b.parquet", ["validation words"])
    tok_train.main(Args(vocab_size=400, data=str(tmp_path / "arrow")))
    ours = get_tokenizer().fingerprint
    monkeypatch.setitem(sys.modules, "rustbpe", types.SimpleNamespace(Tokenizer=Old))  # type: ignore[arg-type]
    tok_train.main(Args(vocab_size=400, data=str(tmp_path / "arrow")))
    assert get_tokenizer().fingerprint == ours


def test_progress_tells_of_reading_and_of_merging(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    corpus = Corpus(Args(data=None, max_chars=1000))
    with Progress(1.0, "reading", clock=lambda: clock[0]) as bar:
        meter = Meter(corpus, bar)
        for _ in zip(corpus, range(3)):
            pass
        clock[0] += 20
        meter("count", 12345, 0)
        share = max(corpus.chars / 1000, corpus.chars / text_size(base / "base_data" / "a.jsonl"))
        left = round(20 / share - 20)
        for done in (100, 200, 400):
            clock[0] += 10
            meter("merge", done, 400)
    assert capsys.readouterr().err.splitlines() == [
        f"reading: {corpus.docs} documents, 0M characters, {share:.0%}, {left} s left",
        "merging: 100 of 400 tokens, 30 s so far",
        "merging: 200 of 400 tokens, 10.0/s, 20 s left",
        "merging: 400 of 400 tokens, 20.0/s, 0 s left",
        "merging: 400 of 400 tokens in 50 s",
    ]


def test_own_data_of_one_file_keeps_its_validation_part_out(base: Path, tmp_path: Path) -> None:
    lines = [f"line {i} of the file" for i in range(2000)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines), encoding="utf-8")
    tok_train.main(Args(vocab_size=300, data=str(path)))
    assert 1800 < metrics(base)["docs"] < 2000


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (Args(max_chars=0), "--max_chars=0"),
        (Args(doc_cap=-1), "--doc_cap=-1"),
        (Args(vocab_size=100), "--vocab_size=100 must be from 265"),
        (Args(data="nowhere"), "no text files in nowhere"),
    ],
)
def test_bad_flags_are_named_and_nothing_is_written(base: Path, args: Args, told: str) -> None:
    with pytest.raises(UserError, match=told):
        tok_train.main(args)
    assert not (base / "tokenizer").exists()


def test_damaged_or_empty_text_leaves_the_old_tokenizer(base: Path, tmp_path: Path) -> None:
    tiny_tokenizer().save(base / "tokenizer")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "b.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    (damaged / "a.jsonl").write_text('{"text": "x"}\n{"tex', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        tok_train.main(Args(vocab_size=300, data=str(damaged)))
    (damaged / "a.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="the training text is empty"):
        tok_train.main(Args(vocab_size=300, data=str(damaged)))
    assert get_tokenizer().fingerprint == tiny_tokenizer().fingerprint


def test_the_command_line(base: Path) -> None:
    command = [sys.executable, "-m", "scripts.tok_train", "--vocab-size=300", "--max_chars=2000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "300 tokens from 2,000 characters" in done.stdout
    assert get_tokenizer().get_vocab_size() == 300
