"""
Text files as a source of documents: the cache, the background, streaming, one process for all.

Rows and their order are tested in test_dataloader.py, folders of the cache in test_token_cache.py.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import text_source
from nanochat.common import UserError, get_base_dir
from nanochat.dataloader import IGNORE, RowReader
from nanochat.dataset import is_val_document
from nanochat.packing import Documents
from nanochat.text_source import TextSource, prepare_shards
from tests.conftest import REPO
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

TEXTS = [f"The boat number {i} comes back before sunrise, isn't it?" for i in range(120)]


class Counting:
    """A tokenizer that counts the texts it encodes, and may pretend to be another one."""

    def __init__(self, fingerprint: str = "") -> None:
        self.inner = tiny_tokenizer()
        self.fingerprint = fingerprint or self.inner.fingerprint
        self.vocabulary = self.inner.vocabulary
        self.encoded = 0

    def get_bos_token_id(self) -> int:
        return self.inner.get_bos_token_id()

    def get_vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    def encode_batch(self, texts: list[str], prepend: int) -> tuple[np.ndarray, np.ndarray]:
        self.encoded += len(texts)
        return self.inner.encode_batch(texts, prepend=prepend)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def parquet(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    return path


def texts_of(documents: Documents) -> list[str]:
    tokenizer = tiny_tokenizer()
    offsets = documents.offsets
    return [tokenizer.decode(documents.ids[a:b].tolist()) for a, b in itertools.pairwise(offsets)]


def load(files: list[Path], tokenizer: Any, **kwargs: Any) -> Documents:
    source = TextSource(files, tokenizer, **kwargs)
    assert source.num_shards() == 1
    return source.load(0)


def shards_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> list[Path]:
    """Files that are a shard each, with different texts."""
    monkeypatch.setattr(text_source, "MIN_SHARD", 1)
    return [jsonl(tmp_path / f"{i}.jsonl", [f"{i} {t}" for t in TEXTS]) for i in range(n)]


def cached() -> list[Path]:
    """What lies in the cache, but for its notes on files."""
    cache = get_base_dir() / "token_cache"
    return [path for path in cache.iterdir() if path.suffix != ".json"] if cache.exists() else []


# ---- text


def test_documents_begin_with_bos_and_are_the_texts(tmp_path: Path) -> None:
    documents = load([jsonl(tmp_path / "a.jsonl", TEXTS)], tiny_tokenizer())
    assert texts_of(documents) == [f"<|bos|>{text}" for text in TEXTS]
    assert documents.trained is None
    assert documents.lengths.sum() == len(documents.ids) == documents.offsets[-1]
    assert not documents.ids.flags.owndata  # a shard need not fit into memory


def test_rows_of_a_text_source_begin_with_bos(tmp_path: Path) -> None:
    tokenizer = tiny_qwen()
    source = TextSource([jsonl(tmp_path / "a.jsonl", TEXTS)], tokenizer)
    bos = tokenizer.get_bos_token_id()
    reader = RowReader(source, 65, seed=0, bos=bos)
    tokens, targets = reader.read(0, reader.rows_per_epoch())
    assert (tokens[:, 0] == bos).all()
    assert (targets != IGNORE).all()
    assert (tokens == bos).sum() > len(tokens)  # more documents follow within the rows


def test_the_hash_splits_a_lone_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    parts = [texts_of(load([path], tiny_tokenizer(), keep=keep)) for keep in ("train", "val")]
    assert sorted(parts[0] + parts[1]) == sorted(f"<|bos|>{text}" for text in TEXTS)
    assert parts[1] and all(is_val_document(text.removeprefix("<|bos|>")) for text in parts[1])


def test_too_few_documents_to_split_is_an_error_with_the_flag(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [t for t in TEXTS if not is_val_document(t)])
    with pytest.raises(UserError, match=r"a\.jsonl has too few documents.*--val_data"):
        load([path], tiny_tokenizer(), keep="val")


def test_an_empty_file_is_named_even_among_others(tmp_path: Path) -> None:
    files = [parquet(tmp_path / "a.parquet", TEXTS), parquet(tmp_path / "empty.parquet", [])]
    with pytest.raises(UserError, match=r"empty\.parquet holds no documents"):
        load(files, tiny_tokenizer())
    assert not cached()


# ---- many small files


def test_small_files_share_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{i:03}.txt" for i in range(50)]
    for i, path in enumerate(files):
        path.write_text(TEXTS[i], encoding="utf-8")
    source = TextSource(files, tiny_tokenizer())
    assert source.num_shards() == 1
    assert len(source.load(0).lengths) == 50
    # Each alone would not fill a row of 128 tokens: together they do.
    assert RowReader(source, 128, 0, 0).rows_per_epoch() > 3

    monkeypatch.setattr(text_source, "MIN_SHARD", 10 * files[0].stat().st_size)
    source = TextSource(files, tiny_tokenizer())
    assert 4 <= source.num_shards() <= 6
    found = [text for i in range(source.num_shards()) for text in texts_of(source.load(i))]
    assert found == [f"<|bos|>{text}" for text in TEXTS[:50]]  # in order, none lost


# ---- the cache


def test_a_file_is_tokenized_once(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenizer = Counting()
    first = load([path], tokenizer)
    again = load([path], tokenizer)
    assert tokenizer.encoded == len(TEXTS)
    assert np.array_equal(first.ids, again.ids)
    assert np.array_equal(first.offsets, again.offsets)


@pytest.mark.parametrize("make", [jsonl, parquet])
def test_another_content_or_tokenizer_or_part_is_tokenized_anew(tmp_path: Path, make: Any) -> None:
    many = [f"{i:04} {text}" for i in range(20) for text in TEXTS]  # more than head and tail
    path = make(tmp_path / "a", many).rename(tmp_path / f"a.{make.__name__}")
    prints = set()

    def tokenized(tokenizer: Counting, **kwargs: Any) -> int:
        source = TextSource([path], tokenizer, **kwargs)
        prints.add(source.fingerprint)
        source.load(0)
        return tokenizer.encoded

    assert tokenized(Counting()) == len(many)
    assert tokenized(Counting()) == 0
    assert tokenized(Counting(fingerprint="another")) == len(many)
    assert 0 < tokenized(Counting(), keep="train") < len(many)
    size = path.stat().st_size
    many[len(many) // 2] = "x" + many[len(many) // 2][1:]  # one letter in the middle, same length
    make(path, many)
    assert make is parquet or path.stat().st_size == size
    assert tokenized(Counting()) == len(many)
    assert len(prints) == 4  # and a resume would notice each of them


def test_a_torn_cache_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = np.array(load([path], Counting()).ids)
    (folder,) = cached()
    damaged = bytearray((folder / "ids.bin").read_bytes())
    damaged[1000:1010] = bytes(10)  # as a full disk may leave it
    (folder / "ids.bin").write_bytes(damaged)
    tokenizer = Counting()
    documents = load([path], tokenizer)
    assert tokenizer.encoded == len(TEXTS)
    assert np.array_equal(documents.ids, whole)
    assert cached() == [folder]  # nothing temporary is left
    assert f"{folder} is damaged" in capsys.readouterr().err


def test_a_failure_while_tokenizing_leaves_nothing(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    with open(path, "a", encoding="utf-8") as f:
        f.write("{\n")
    with pytest.raises(UserError, match=r"a\.jsonl:121"):
        load([path], tiny_tokenizer())
    assert not cached()


@pytest.mark.parametrize("stream", [True, False])
def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, stream: bool) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    source = TextSource([path], tiny_tokenizer(), stream=stream)
    jsonl(path, TEXTS[1:])  # its shard comes up an hour later, perhaps in the background
    with pytest.raises(UserError, match=r"a\.jsonl has changed"):
        source.load(0)
    assert not cached()


def test_ids_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    at_once = load([path], tiny_tokenizer(), cache=tmp_path / "at_once")
    monkeypatch.setattr(text_source, "BATCH_CHARS", 300)
    batches = list(TextSource([path], tiny_tokenizer())._encode(0))
    assert len(batches) > 15 and max(len(lengths) for _, lengths in batches) < 10
    documents = load([path], tiny_tokenizer(), cache=str(tmp_path / "in_batches"))
    assert np.array_equal(documents.ids, at_once.ids)
    assert np.array_equal(documents.offsets, at_once.offsets)
    assert (tmp_path / "in_batches").is_dir() and not cached()  # where it was told to


def test_one_tokenizes_and_the_others_wait(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    results: list[list[str]] = []

    class Slow(Counting):
        def encode_batch(self, texts: list[str], prepend: int) -> tuple[np.ndarray, np.ndarray]:
            time.sleep(0.3)  # seconds: the others come meanwhile
            return super().encode_batch(texts, prepend)

    tokenizer = Slow()

    def work() -> None:
        results.append(texts_of(TextSource([path], tokenizer).load(0)))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [[f"<|bos|>{text}" for text in TEXTS]] * 6
    assert tokenizer.encoded == len(TEXTS)
    assert len(cached()) == 1


# ---- room on the disk


def test_too_small_a_disk_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = TextSource(shards_of(tmp_path, monkeypatch, 3), tiny_tokenizer())
    source.load(1)
    in_use = cached()[0] / "ids.bin"
    source.check_disk([0, 1, 2])
    out = capsys.readouterr().out
    assert "2 of this run's 3 shards" in out and str(source.cache) in out
    assert f"{in_use.stat().st_size / 1e6:.1f} MB" in out
    monkeypatch.setattr(text_source, "free_bytes", lambda folder: 5000)
    with pytest.raises(
        UserError, match=r"token_cache has 0\.0 MB free.*--token_cache_dir.*--stream"
    ):
        source.check_disk([0, 1, 2])
    source.check_disk([1])  # needs no more
    TextSource(source.files, tiny_tokenizer(), stream=True).check_disk([0, 1, 2])
    assert "no token cache" in capsys.readouterr().out


def test_how_large_a_shard_will_be_is_known_roughly(tmp_path: Path) -> None:
    texts = [" ".join(TEXTS[i : i + 50]) for i in range(70)]
    for make in (jsonl, parquet):
        source = TextSource([make(tmp_path / f"a.{make.__name__}", texts)], tiny_tokenizer())
        estimate = source.tokens(0)
        assert len(source.load(0).ids) == source.tokens(0) == pytest.approx(estimate, rel=0.1)


def test_a_disk_that_fills_up_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    number = errno.ENOSPC

    def write(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(text_source, "write_folder", write)
    assert texts_of(load([path], tiny_tokenizer())) == [f"<|bos|>{text}" for text in TEXTS]
    assert "No space left" in capsys.readouterr().err
    number = errno.EROFS
    with pytest.raises(UserError, match=r"Read-only.*--token_cache_dir.*--stream"):
        load([path], tiny_tokenizer())


def test_streaming_gives_the_same_rows_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = shards_of(tmp_path, monkeypatch, 3)
    rows = []
    for stream in (True, False):
        source = TextSource(files, tiny_tokenizer(), stream=stream)
        reader = RowReader(source, 33, seed=0, bos=0)
        reader.expect(100)
        rows.append(reader.read(0, 3 * reader.rows_per_epoch())[0])
        assert len(cached()) == (0 if stream else 3)
    assert np.array_equal(rows[0], rows[1])


# ---- the background


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_shards_are_prepared_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = shards_of(tmp_path, monkeypatch, 5)
    files[2].write_text("{\n", encoding="utf-8")
    tokenizer = Counting()
    source = TextSource(files, tokenizer)
    source.load(0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    source.prepare_ahead([0, 1])
    assert source._background is None  # one process of a node is enough
    monkeypatch.setenv("LOCAL_RANK", "0")
    source.prepare_ahead([0, 3, 2, 1])
    assert source._background is not None
    wait_for(lambda: source._background.poll() is not None)
    assert source._background.returncode == 0
    assert len(cached()) == 3
    before = tokenizer.encoded
    for shard in (3, 1):
        assert texts_of(source.load(shard)) == [f"<|bos|>{shard} {text}" for text in TEXTS]
    assert tokenizer.encoded == before
    # What is wrong is said at once, and ends the run when it comes there.
    assert "2.jsonl:1: not valid JSON" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"2\.jsonl:1: not valid JSON"):
        source.load(2)
    source.prepare_ahead([3])
    assert source._background.returncode == 0  # nothing to do: no other process


def test_the_background_stops_before_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TextSource(shards_of(tmp_path, monkeypatch, 4), tiny_tokenizer())
    free = [10**9, 10**9, 100, 10**9]
    monkeypatch.setattr(text_source, "free_bytes", lambda folder: free.pop(0))
    with pytest.raises(UserError, match="--token_cache_dir"):
        prepare_shards(json.loads(json.dumps(source._job([3, 1, 2, 0]))))
    assert [source._missing([k]) for k in range(4)] == [[0], [], [2], []]


def test_every_vocabulary_reaches_the_background_whole(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*TEXTS, "ı̈ ü 東京 \ud800 <|bos|>"])
    for tokenizer in (tiny_tokenizer(), tiny_qwen()):
        source = TextSource([path], tokenizer)
        prepare_shards(json.loads(json.dumps(source._job([0]))))
        assert source._missing([0]) == []  # under the same fingerprint
        at_hand = TextSource([path], tokenizer, stream=True).load(0)
        assert np.array_equal(source.load(0).ids, at_hand.ids)


PARENT = """
import sys, time
from pathlib import Path
from nanochat.text_source import TextSource
from tests.tokenizers_for_tests import tiny_tokenizer
source = TextSource([Path(sys.argv[1])], tiny_tokenizer())
source.prepare_ahead([0])
print(source._background.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_the_background_ends_with_the_program(tmp_path: Path, sent: signal.Signals) -> None:
    path = jsonl(tmp_path / "a.jsonl", [" ".join(TEXTS * 20)] * 1200)  # a second of work
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(path)], cwd=REPO, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert parent.stdout is not None
    background = int(parent.stdout.readline())
    wait_for(lambda: any(folder.suffix == ".tmp" for folder in cached()))
    os.kill(background, signal.SIGSTOP)  # not done before we are, however slow we are
    if sys.platform == "linux":
        assert os.getpriority(os.PRIO_PROCESS, background) == 19
    parent.send_signal(sent)
    os.kill(background, signal.SIGCONT)
    parent.wait(60)

    def is_over() -> bool:
        try:
            os.kill(background, 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{background}/stat")  # without an init to reap it, it stays a zombie
        return status.exists() and status.read_text(encoding="utf-8").split()[2] == "Z"

    started = time.monotonic()
    wait_for(is_over)
    assert time.monotonic() - started < 30
    assert not cached()  # neither a shard (it was not done) nor half of one


THREAD = """
import sys, time
from pathlib import Path
from nanochat import text_source
from nanochat.threads import in_thread
from tests.tokenizers_for_tests import tiny_tokenizer
tokenizer = tiny_tokenizer()
encode_batch = tokenizer.encode_batch
def slow(texts, prepend):
    time.sleep(0.1)
    return encode_batch(texts, prepend=prepend)
tokenizer.encode_batch = slow
text_source.BATCH_CHARS = 1
source = text_source.TextSource([Path(sys.argv[1])], tokenizer, stream=sys.argv[2] == "stream")
in_thread(source.load, 0)
time.sleep(0.3)
"""


@pytest.mark.parametrize("how", ["stream", "cache"])
def test_a_thread_that_tokenizes_does_not_hold_up_the_exit(tmp_path: Path, how: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS * 10)  # 1,200 times 0.1 s
    command = [sys.executable, "-c", THREAD, str(path), how]
    assert subprocess.run(command, cwd=REPO, timeout=60, check=False).returncode == 0
    assert not cached()
