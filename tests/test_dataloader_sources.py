"""
Where the loader's documents come from: text files with their cache, and conversations.

Rows and their order are tested in test_dataloader.py.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataloader
from nanochat.common import UserError, get_base_dir
from nanochat.dataloader import IGNORE, ConversationSource, RowReader, TextSource
from nanochat.dataset import is_val_document
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

TEXTS = [f"The boat number {i} comes back before sunrise, isn't it?" for i in range(120)]


class Counting:
    """A tokenizer that counts the texts it encodes, and may pretend to be another one."""

    def __init__(self, fingerprint: str = "") -> None:
        self.inner = tiny_tokenizer()
        self.fingerprint = fingerprint or self.inner.fingerprint
        self.encoded = 0

    def get_bos_token_id(self) -> int:
        return self.inner.get_bos_token_id()

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


def texts_of(documents: dataloader.Documents) -> list[str]:
    tokenizer = tiny_tokenizer()
    offsets = documents.offsets
    return [tokenizer.decode(documents.ids[a:b].tolist()) for a, b in itertools.pairwise(offsets)]


def load(files: list[Path], tokenizer: Any, **kwargs: Any) -> dataloader.Documents:
    source = TextSource(files, tokenizer, **kwargs)
    assert source.num_shards() == 1
    return source.load(0)


# ---- text


def test_documents_begin_with_bos_and_are_the_texts(tmp_path: Path) -> None:
    documents = load([jsonl(tmp_path / "a.jsonl", TEXTS)], tiny_tokenizer())
    assert texts_of(documents) == [f"<|bos|>{text}" for text in TEXTS]
    assert documents.trained is None
    assert documents.lengths.sum() == len(documents.ids) == documents.offsets[-1]
    assert isinstance(documents.ids, np.memmap)  # a shard need not fit into memory


def test_rows_of_a_text_source_begin_with_bos(tmp_path: Path) -> None:
    tokenizer = tiny_qwen()
    source = TextSource([jsonl(tmp_path / "a.jsonl", TEXTS)], tokenizer)
    bos = tokenizer.get_bos_token_id()
    reader = RowReader(source, 65, seed=0, pad_id=bos)
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
    assert not list((get_base_dir() / "token_cache").glob("*"))


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

    monkeypatch.setattr(dataloader, "MIN_SHARD", 10 * files[0].stat().st_size)
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


@pytest.mark.parametrize(
    "tear",
    [
        lambda folder: (folder / "ids.npy").unlink(),
        lambda folder: (folder / "ids.npy").write_bytes(b""),
        lambda folder: (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-8]),
        lambda folder: (folder / "offsets.npy").write_bytes(b"\x93NUMPY"),
        lambda folder: np.save(folder / "offsets.npy", np.zeros(121, dtype=np.int64)),
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "meta.json").write_text("", encoding="utf-8"),
        lambda folder: (folder / "meta.json").write_text("[]", encoding="utf-8"),
        lambda folder: (folder / "meta.json").write_text('{"tokens": 1}', encoding="utf-8"),
        lambda folder: [p.unlink() for p in folder.iterdir()],
        shutil.rmtree,
    ],
)
def test_a_torn_cache_is_made_again(tmp_path: Path, tear: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = np.array(load([path], Counting()).ids)
    (folder,) = (get_base_dir() / "token_cache").iterdir()
    tear(folder)
    tokenizer = Counting()
    documents = load([path], tokenizer)
    assert tokenizer.encoded == len(TEXTS)
    assert np.array_equal(documents.ids, whole)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # nothing temporary is left


def test_a_failure_while_tokenizing_leaves_nothing(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    with open(path, "a", encoding="utf-8") as f:
        f.write("{\n")
    with pytest.raises(UserError, match=r"a\.jsonl:121"):
        load([path], tiny_tokenizer())
    cache = get_base_dir() / "token_cache"
    assert not cache.exists() or not list(cache.iterdir())


def test_many_may_prepare_the_same_shard_at_once(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    together = threading.Barrier(6)
    results: list[list[str]] = []

    class Waiting(Counting):
        def encode_batch(self, texts: list[str], prepend: int) -> tuple[np.ndarray, np.ndarray]:
            together.wait(20)  # all six have found the cache empty
            return super().encode_batch(texts, prepend)

    tokenizer = Waiting()
    source = TextSource([path], tokenizer)  # one object, as in a process with a thread ahead
    threads = [
        threading.Thread(target=lambda: results.append(texts_of(source.load(0)))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [[f"<|bos|>{text}" for text in TEXTS]] * 6
    assert len(list((get_base_dir() / "token_cache").iterdir())) == 1


# ---- conversations


def conversation(question: str, *answers: str) -> dict[str, Any]:
    messages = []
    for answer in answers:
        messages += [
            {"role": "user", "content": question}, {"role": "assistant", "content": answer},
        ]  # fmt: skip
    return {"messages": messages}


CONVERSATIONS = [
    conversation(f"What is {i}+{i}?", f"The answer is {2 * i}.", "It's later than you think.")
    for i in range(40)
]


def test_conversations_are_kept_whole_and_their_targets_are_what_is_trained(
    own_base_dir: Path,
) -> None:
    tokenizer = tiny_tokenizer()
    bos = tokenizer.get_bos_token_id()
    source = ConversationSource(CONVERSATIONS, tokenizer, 129)
    assert (source.counts[:, 0] == source.counts[:, 1]).all() and source.counts.all()
    reader = RowReader(source, 129, seed=0, pad_id=bos)
    tokens, targets = reader.read(0, reader.rows_per_epoch())
    assert 129 * len(tokens) < 1.3 * len(source.documents.ids)  # best fit: little padding
    found: list[list[int]] = []
    num_trained = 0
    for c in CONVERSATIONS:
        ids, mask = tokenizer.render_conversation(c)
        num_trained += sum(tokenizer.trained_mask(ids, mask))
    for row, last in zip(tokens.tolist(), targets[:, -1].tolist()):
        row.append(last if last != IGNORE else bos)
        starts = [at for at, token in enumerate(row) if token == bos]
        pieces = [row[a:b] for a, b in zip(starts, [*starts[1:], len(row)])]
        found += [piece for piece in pieces if len(piece) > 1]  # a lone bos is padding
    expected = [tokenizer.render_conversation(c)[0] for c in CONVERSATIONS]
    assert sorted(found) == sorted(expected)  # every one, whole, once
    assert (targets != IGNORE).sum() == num_trained
    assert not (targets == bos).any()  # neither padding nor the next conversation is a target


def test_every_conversation_is_accounted_for(own_base_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    long_question = conversation("word " * 200, "Never seen.")
    long_answer = conversation("Hi", "word " * 200)
    task = [*CONVERSATIONS[:5], long_question, long_answer, long_question]
    source = ConversationSource(task, tokenizer, 65)
    assert "6 kept, of which 1 cut to 65 tokens" in source.account()
    assert "2 dropped" in source.account() and "(2: the assistant's first" in source.account()
    assert source.counts[:, 1].tolist() == [*source.counts[:5, 0], 0, 65, 0]
    assert source.documents.lengths.max() == 65
    trained = source.documents.trained
    assert trained is not None
    for a, b in itertools.pairwise(source.documents.offsets):
        assert trained[a:b].any()  # a row of these alone can never give 0/0
    rendered, mask = tokenizer.render_conversation(long_answer)
    assert source.documents.ids[-65:].tolist() == rendered[:65]
    assert trained[-65:].tolist() == tokenizer.trained_mask(rendered, mask)[:65]


def test_the_end_token_is_trained(own_base_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    source = ConversationSource(CONVERSATIONS, tokenizer, 129)
    end = tokenizer.encode_special("<|assistant_end|>")
    assert source.documents.trained is not None
    assert (source.documents.trained[source.documents.ids == end] == 1).all()


def test_nothing_to_learn_from_is_an_error(own_base_dir: Path) -> None:
    with pytest.raises(UserError, match=r"none of 1 conversations .* first 9; raise --max_seq_len"):
        ConversationSource([conversation("word " * 50, "x")], tiny_tokenizer(), 9)
    with pytest.raises(UserError, match="none of 0 conversations"):
        ConversationSource([], tiny_tokenizer(), 9)


def test_fingerprint_of_conversations_is_their_content(own_base_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    prints = [
        ConversationSource(task, tokenizer, row_len).fingerprint
        for task, row_len in [
            (CONVERSATIONS, 129),
            (CONVERSATIONS[:-1], 129),
            (CONVERSATIONS[::-1], 129),
            (CONVERSATIONS, 33),  # some are cut
            (CONVERSATIONS, 129),
        ]
    ]
    assert prints[0] == prints[4]
    assert len(set(prints)) == 4
