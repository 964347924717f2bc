"""rustbpe.Encoder against tiktoken: token for token, on everything.

The patterns in `PATTERNS` have hand-written scanners; each is also tried in a spelling that the
crate does not know, which goes through its regex engine.
"""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

import rustbpe
from nanochat.vocabulary import SPLIT_PATTERN
from tests.rustbpe.corpora_for_tests import GPT4_PATTERN, make_texts

if not hasattr(rustbpe, "Encoder"):
    pytest.skip("PyPI's rustbpe 0.1.0 has no Encoder", allow_module_level=True)

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTION
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTION
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
PATTERNS = {
    "nanochat": SPLIT_PATTERN,
    "nanochat, 1 digit": SPLIT_PATTERN.replace("{1,2}", "{1,1}"),
    "nanochat, 3 digits": GPT4_PATTERN,
    "gpt2": GPT2_PATTERN,
    "cl100k": CL100K_PATTERN,
    "o200k": O200K_PATTERN,
    "qwen2.5": QWEN_PATTERN,
    "letters": r"\p{L}+|\s+",  # drops what it does not match
}
DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(make_texts(1, "ascii", 400, 60), 3000, pattern=SPLIT_PATTERN)
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


@pytest.fixture(scope="module", params=PATTERNS, ids=str)
def pair(request: pytest.FixtureRequest, ranks: dict[bytes, int]):  # type: ignore[no-untyped-def]
    """(ours, tiktoken's) of one pattern."""
    pattern = PATTERNS[request.param]
    judge = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return rustbpe.Encoder(ranks, pattern), judge


def assert_same(pair, texts: list[str]) -> None:  # type: ignore[no-untyped-def]
    ours, judge = pair
    ids, offsets = ours.encode_batch(texts)
    assert ids.dtype == np.uint16 and offsets.dtype == np.int64 and len(offsets) == len(texts) + 1
    for i, text in enumerate(texts):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == judge.encode_ordinary(text), text[:200]


def test_every_code_point_alone_and_in_company(pair) -> None:  # type: ignore[no-untyped-def]
    texts = []
    for start in range(0, 0x110000, 512):
        chars = [chr(c) for c in range(start, start + 512) if not 0xD800 <= c < 0xE000]
        texts += [f"{before}{after}".join(chars)
                  for before, after in [("", ""), ("a", "b"), ("1", "2"), (" ", " "), ("\n", "!")]
                  if start < 0x3400 or start % 0x1000 == 0]  # fmt: skip
        texts.append("".join(f"{c}a {c}1\n" for c in chars))
    assert_same(pair, texts)


def test_random_texts(pair) -> None:  # type: ignore[no-untyped-def]
    rng = Random(1)
    alphabet = "aZsStTdDlLvVrReEmM''''   \t\n\n\r/!.-19٣½é漢ǅʰ\u0301\xa0\u2028ſK🙂\u200d"
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(4000)]
    assert_same(pair, texts)
    noise = [rng.randbytes(rng.randint(0, 300)).decode("utf-8", "replace") for _ in range(500)]
    assert_same(pair, [*noise, *make_texts(1, "ascii", 50, 60)])


@pytest.mark.parametrize("unit", ["a", " ", "!", "\n", "1", "é", " \n", "ab ", "\u0301"])
def test_a_megabyte_of_one_character(ranks: dict[bytes, int], unit: str) -> None:
    """No quadratic time, and what comes out decodes to what went in."""
    text = unit * (1_000_000 // len(unit))
    tokens = sorted(ranks, key=ranks.__getitem__)
    for pattern in (SPLIT_PATTERN, O200K_PATTERN, GPT2_PATTERN):
        encoder = rustbpe.Encoder(ranks, pattern)
        start = time.perf_counter()
        ids, _ = encoder.encode_batch([text])
        assert time.perf_counter() - start < 10  # minutes if it were quadratic
        assert b"".join(tokens[i] for i in ids) == text.encode()


def test_lone_surrogates_and_empty_texts(pair) -> None:  # type: ignore[no-untyped-def]
    ours, judge = pair
    for text in ("\ud800", "a\udfffb \ud83d", "\ud83d\ude42", ""):
        assert ours.encode(text) == judge.encode_ordinary(text)
    assert_same(pair, ["", "\udc00x", "", "plain"])
    ids, offsets = ours.encode_batch([])
    assert len(ids) == 0 and offsets.tolist() == [0]


def test_prepend_and_dtype(ranks: dict[bytes, int]) -> None:
    encoder = rustbpe.Encoder(ranks, SPLIT_PATTERN)
    texts = ["one two", "", "three"]
    ids, offsets = encoder.encode_batch(iter(texts), prepend=65_535)
    assert ids.dtype == np.uint16
    for i, text in enumerate(texts):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == [65_535, *encoder.encode(text)]
    wide, _ = encoder.encode_batch(texts, prepend=65_536)
    assert wide.dtype == np.uint32 and wide[0] == 65_536
    assert encoder.vocab_size == len(ranks)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_arrow_arrays(ranks: dict[bytes, int], kind: pa.DataType) -> None:
    encoder = rustbpe.Encoder(ranks, SPLIT_PATTERN)
    texts = make_texts(1, "ascii", 60, 60)
    array = pa.array(["cut off", *texts], kind)[1:]  # an array may begin anywhere in its buffers
    chunked = pa.chunked_array([array[:10], array[10:]])
    for given in (array, chunked):
        ids, offsets = encoder.encode_batch(given)
        expected, bounds = encoder.encode_batch(texts)
        assert np.array_equal(ids, expected) and np.array_equal(offsets, bounds)
    assert encoder.encode_batch(pa.array([], kind))[1].tolist() == [0]
    with pytest.raises(TypeError, match="item 1 of texts is null"):
        encoder.encode_batch(pa.array(["a", None], kind))
    with pytest.raises(TypeError, match="must hold strings, found an Arrow array of int64"):
        encoder.encode_batch(pa.array([1, 2]))

    plain, mixed = rustbpe.Tokenizer(), rustbpe.Tokenizer()
    plain.train_from_iterator(texts, 400)
    mixed.train_from_iterator([array[:20], *texts[20:30], chunked[30:]], 400)
    assert mixed.get_mergeable_ranks() == plain.get_mergeable_ranks()
    with pytest.raises(TypeError, match="item 61 of iterator is null"):
        mixed.train_from_iterator([array, pa.array(["a", None], kind)], 400)


def test_bad_arguments(ranks: dict[bytes, int]) -> None:
    with pytest.raises(ValueError, match="invalid split pattern"):
        rustbpe.Encoder(ranks, "(")
    with pytest.raises(ValueError, match="rank 9999: there are only"):
        rustbpe.Encoder({**ranks, b"new token": 9999}, SPLIT_PATTERN)
    with pytest.raises(ValueError, match="no token for the single byte 0x7a"):
        rustbpe.Encoder({bytes([b]): b for b in range(122)}, SPLIT_PATTERN)
    with pytest.raises(TypeError, match="is not bytes"):
        rustbpe.Encoder({"a": 0}, SPLIT_PATTERN)  # type: ignore[dict-item]
    encoder = rustbpe.Encoder(ranks, SPLIT_PATTERN)
    with pytest.raises(TypeError, match="item 1 of texts must be str, not int"):
        encoder.encode_batch(["a", 1])
    with pytest.raises(TypeError, match="not one str"):
        encoder.encode_batch("abc")


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_real_text(pair) -> None:  # type: ignore[no-untyped-def]
    shard = min((DATA / "fineweb_like").glob("*.parquet"))
    assert_same(pair, pq.read_table(shard)["text"].to_pylist()[:1000])
