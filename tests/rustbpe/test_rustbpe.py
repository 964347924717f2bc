"""The BPE trainer as Python sees it: the rules, equality with others, and its errors.

Three judges: a slow twin in Python (``naive_bpe.py``), merges recorded from PyPI's rustbpe 0.1.0
(``golden_rustbpe_0_1_0.json``; ``corpora_for_tests.py`` says how they were made), and tiktoken.

The file also runs with PyPI's rustbpe 0.1.0 installed in the place of our crate, which is the
project's fallback; what only our crate promises is then skipped.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import signal
import threading
import time
import weakref
from importlib.metadata import version

import pytest
import tiktoken

import rustbpe
from nanochat.vocabulary import SPLIT_PATTERN
from tests.rustbpe import naive_bpe
from tests.rustbpe.corpora_for_tests import (
    GOLDEN,
    GPT4_PATTERN,
    Source,
    digest,
    golden_cases,
    make_texts,
)

only_ours = pytest.mark.skipif(
    version("rustbpe") == "0.1.0", reason="PyPI's rustbpe 0.1.0 does not promise this"
)


def train(texts, vocab_size, **options) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    return tokenizer


def learned(tokenizer: rustbpe.Tokenizer) -> list[bytes]:
    """The bytes of the merged tokens; the 256 before them and the ids are checked on the way."""
    ranks = tokenizer.get_mergeable_ranks()
    assert [rank for _, rank in ranks] == list(range(tokenizer.vocab_size))
    tokens = [bytes(token) for token, _ in ranks]
    assert tokens[:256] == [bytes([value]) for value in range(256)]
    return tokens[256:]


def tiktoken_of(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    ranks = {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}
    return tiktoken.Encoding(
        "test", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={}
    )


# ------------------------------------------------------------------------------- the merges


def test_worked_by_hand() -> None:
    # aaabdaaabac: aa 4 times; then ab and (aa, a) twice each, and a < aa; then (aa, ab) twice;
    # then every pair once, of which (a, c) is the smallest.
    tokenizer = train(["aaabdaaabac"], 260)
    assert learned(tokenizer) == [b"aa", b"ab", b"aaab", b"ac"]
    assert tokenizer.encode("aaabdaaabac") == [258, ord("d"), 258, 259]
    assert tokenizer.vocab_size == 260


@pytest.mark.parametrize("name", golden_cases())
def test_same_merges_as_rustbpe_0_1_0(name: str) -> None:
    case = golden_cases()[name]
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert digest(case["texts"]) == golden["texts_sha256"], "the corpus changed: record anew"
    tokenizer = train(case["texts"], case["vocab_size"], pattern=case["pattern"])
    assert [token.hex() for token in learned(tokenizer)] == golden["tokens"]
    assert tokenizer.encode(case["texts"][0]) == golden["ids"]


@pytest.mark.parametrize("alphabet", ["ascii", "few", "unicode"])
@pytest.mark.parametrize("seed", range(4))
def test_same_merges_and_ids_as_the_slow_twin(alphabet: str, seed: int) -> None:
    texts = make_texts(100 + seed, alphabet, texts=6, words=40)
    pattern = [SPLIT_PATTERN, GPT4_PATTERN, r"\w+|\W+", r"[\s\S]+"][seed]
    merges = naive_bpe.train(texts, 400, pattern)
    tokenizer = train(texts, 400, pattern=pattern)
    assert learned(tokenizer) == naive_bpe.token_bytes(merges)[256:]
    unseen = make_texts(200 + seed, alphabet, texts=1, words=30)
    for text in texts + unseen:
        assert tokenizer.encode(text) == naive_bpe.encode(text, merges, pattern)


@pytest.mark.parametrize("buffer_size", [1, 3, 8192])
def test_buffering_does_not_change_the_merges(buffer_size: int) -> None:
    texts = make_texts(5, "ascii", texts=20, words=50)
    expected = learned(train(texts, 500))
    assert learned(train(texts, 500, buffer_size=buffer_size)) == expected
    # Nor does the order of the texts.
    assert learned(train(texts[::-1], 500, buffer_size=buffer_size)) == expected


def test_same_on_many_threads() -> None:
    # Big enough that counting really runs in parallel; each word ten times as often.
    texts = make_texts(6, "ascii", texts=20, words=200)
    assert learned(train(texts * 10, 700)) == learned(train(texts, 700))


# ------------------------------------------------------------------------- encoding and back

NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n  \r\n\t mixed \r blank\n",
    "don't DON'T we'LL it'ſ",
    "1 12 123 1234 ١٢٣ ½ Ⅷ",
    "naïve na\u0131ve e\u0301 \u200b\u200d\ufeff",
    "漢字かなカナ한글 ไทย हिन्दी ابجد",
    "😀🏳️‍🌈👩‍👩‍👧‍👦🇩🇪",
    "\x00\x01\x1c\x1f\x7f\x85\xa0\u2028\u3000",
    "\U0010ffff\ue000\u0378",
    "a" * 5000,
    "ab" * 3000 + "!" * 999,
    " " * 3000 + "x",
    "if (x[i] != '\\0') { return \"</s>\"; }",
]


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, GPT4_PATTERN], ids=["nanochat", "GPT-4"])
def test_same_ids_as_tiktoken(pattern: str) -> None:
    texts = make_texts(7, "ascii", 10, 200) + make_texts(8, "unicode", 10, 100) + NASTY
    tokenizer = train(texts, 1500, pattern=pattern)
    encoding = tiktoken_of(tokenizer)
    source = Source(9)
    pool = "".join(texts)
    mixtures = ["".join(source.pick(pool) for _ in range(source.below(300))) for _ in range(300)]
    for text in texts + mixtures:
        ids = tokenizer.encode(text)
        assert ids == encoding.encode_ordinary(text), repr(text)
        assert tokenizer.decode(ids) == text


def test_batch_encode_is_encode_of_each() -> None:
    texts = make_texts(10, "unicode", 60, 100) + NASTY
    tokenizer = train(texts, 600)
    assert tokenizer.batch_encode(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.batch_encode(tuple(texts[:3])) == tokenizer.batch_encode(texts)[:3]
    assert tokenizer.batch_encode([]) == []


def test_text_the_pattern_does_not_match_is_dropped_as_tiktoken_does() -> None:
    tokenizer = train(["ab ab"], 257, pattern="[a-z]+")
    assert tokenizer.encode("ab 12 ab!") == [256, 256]
    assert tiktoken_of(tokenizer).encode_ordinary("ab 12 ab!") == [256, 256]


def test_decode() -> None:
    tokenizer = train(["aaabdaaabac"], 260)
    assert tokenizer.decode([258, 100, 0xC3, 0xA9]) == "aaabdé"
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="260"):
        tokenizer.decode([97, 260])


@only_ours
def test_decode_of_half_a_character() -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        rustbpe.Tokenizer().decode([97, 0xC3])
    assert caught.value.start == 1


# ------------------------------------------------------------------------------ small inputs


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["a", "b"]])
def test_nothing_to_merge(texts: list[str]) -> None:
    tokenizer = train(texts, 300)
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("ab") == [97, 98]


def test_too_few_pairs_give_a_smaller_vocabulary() -> None:
    tokenizer = train(["abcd ab"], 300)
    assert learned(tokenizer) == [b"ab", b" ab", b"cd", b"abcd"]


def test_bytes_only() -> None:
    assert train(["abab"], 256).vocab_size == 256


def test_before_training() -> None:
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.vocab_size == 256
    assert learned(tokenizer) == []
    assert tokenizer.get_pattern() == ""


@only_ours
def test_before_training_text_is_bytes() -> None:
    assert rustbpe.Tokenizer().encode("é!") == [0xC3, 0xA9, 33]  # 0.1.0 returns nothing at all


def test_training_again_forgets_the_first() -> None:
    tokenizer = train(["abab"], 257)
    tokenizer.train_from_iterator(["cdcd"], 257, pattern=r"\w+")
    assert learned(tokenizer) == [b"cd"]
    assert tokenizer.get_pattern() == r"\w+"


def test_the_default_pattern_is_that_of_0_1_0() -> None:
    assert train(["a"], 256).get_pattern() == GPT4_PATTERN
    assert train(["a"], 256, pattern=SPLIT_PATTERN).get_pattern() == SPLIT_PATTERN


# ------------------------------------------------------------------------------------ errors


@only_ours
@pytest.mark.parametrize("vocab_size", [255, 0, -1, 2**32, 2**60])
def test_vocab_size_out_of_range(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size .* 256 .* got {vocab_size}"):
        train(["ab"], vocab_size)


@only_ours
@pytest.mark.parametrize("buffer_size", [0, -5])
def test_buffer_size_out_of_range(buffer_size: int) -> None:
    with pytest.raises(ValueError, match=f"buffer_size .* got {buffer_size}"):
        train(["ab"], 300, buffer_size=buffer_size)


@only_ours
def test_a_huge_buffer_size_is_fine() -> None:
    assert train(["abab"], 257, buffer_size=2**62).vocab_size == 257


@pytest.mark.parametrize("pattern", ["(", "[a-", r"\p{Nonsense}"])
def test_invalid_pattern(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        train(["ab"], 300, pattern=pattern)


@only_ours
def test_empty_pattern() -> None:
    with pytest.raises(ValueError, match="empty"):
        train(["ab"], 300, pattern="")


@only_ours
def test_a_pattern_that_backtracks_for_ever_names_the_text() -> None:
    texts = ["b", "b", "b", "b" + "a" * 60]
    with pytest.raises(ValueError, match="byte 1 of text 3"):
        train(texts, 300, pattern=r"(a|aa)+(?=c)\b|b", buffer_size=2)


@pytest.mark.parametrize("item", [3, None, b"ab", ["ab"]])
def test_an_item_that_is_no_string(item: object) -> None:
    with pytest.raises(TypeError):
        train(["ab", item], 300)


@only_ours
def test_errors_name_the_item() -> None:
    with pytest.raises(TypeError, match="item 10 of iterator must be str, not int"):
        train(["ab"] * 10 + [3], 300, buffer_size=4)
    with pytest.raises(ValueError, match=r"item 2 of iterator is not valid text.*surrogate"):
        train(["ab", "cd", "e\ud800"], 300)
    with pytest.raises(TypeError, match="item 1 of texts must be str, not NoneType"):
        rustbpe.Tokenizer().batch_encode(["a", None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="text must be str, not bytes"):
        rustbpe.Tokenizer().encode(b"ab")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"text is not valid text.*surrogate"):
        rustbpe.Tokenizer().encode("\udfff")


def test_something_that_is_no_iterable() -> None:
    with pytest.raises(TypeError, match="iterable"):
        rustbpe.Tokenizer().train_from_iterator(3, 300)  # type: ignore[arg-type]


@only_ours
def test_one_string_is_not_a_list_of_strings() -> None:
    with pytest.raises(TypeError, match="not one str"):
        rustbpe.Tokenizer().train_from_iterator("some text", 300)
    with pytest.raises(TypeError, match="not one str"):
        rustbpe.Tokenizer().batch_encode("some text")


@only_ours  # 0.1.0 keeps the old merges under the new pattern
def test_an_iterator_that_raises_leaves_the_tokenizer_as_it_was() -> None:
    class Boom(Exception):
        pass

    boom = Boom("midway")

    def texts():
        yield from ["cdcd"] * 10
        raise boom

    tokenizer = train(["abab"], 300)
    before = tokenizer.get_mergeable_ranks(), tokenizer.get_pattern()
    with pytest.raises(Boom) as caught:
        tokenizer.train_from_iterator(texts(), 300, buffer_size=3, pattern=r"\w+")
    assert caught.value is boom
    assert (tokenizer.get_mergeable_ranks(), tokenizer.get_pattern()) == before


# ------------------------------------------------------------- living together with Python


@only_ours
@pytest.mark.parametrize("phase", ["reading", "counting", "merging", "encoding"])
def test_ctrl_c(phase: str) -> None:
    class Stop(Exception):
        pass

    def stop(signum, frame):
        raise Stop

    tokenizer = train(["abab"], 257)
    texts = ["some words to count " * 100_000] * 10_000  # 20 GB of work in 2 MB of memory
    # One piece in which nearly every merge is as frequent as the next: read at once, merged long
    letters = random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=4_000_000)
    phases = []
    work = {
        "reading": lambda: tokenizer.train_from_iterator(itertools.repeat("ab"), 300),
        "counting": lambda: tokenizer.train_from_iterator(texts, 300, buffer_size=10_000),
        "merging": lambda: tokenizer.train_from_iterator(
            ["".join(letters)], 60_000, pattern=".+", progress=lambda *told: phases.append(told[0])
        ),
        "encoding": lambda: tokenizer.batch_encode(texts),
    }[phase]
    previous = signal.signal(signal.SIGINT, stop)
    timer = threading.Timer(1 if phase == "merging" else 0.3, signal.raise_signal, [signal.SIGINT])
    try:
        timer.start()
        with pytest.raises(Stop):
            work()
        assert phase != "merging" or phases[0] == "count"  # over when the signal came
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGINT, previous)
    assert learned(tokenizer) == [b"ab"]


@only_ours
def test_progress() -> None:
    heard: list[tuple[str, int, int]] = []
    texts = ["some words to count, "] * 1000
    tokenizer = train(texts, 270, progress=lambda *told: heard.append(told))
    learned_here = tokenizer.vocab_size - 256
    assert heard == [
        ("count", sum(map(len, texts)), 0),
        ("merge", learned_here, 14),
    ]


@only_ours
def test_progress_comes_about_once_a_second_and_may_stop_the_training() -> None:
    def texts():
        for _ in range(60):
            time.sleep(0.1)
            yield "a few words"

    def stop(phase: str, done: int, total: int) -> None:
        assert phase == "count" and total == 0 and done % len("a few words") == 0
        times.append(time.monotonic())
        if len(times) == 2:
            raise RuntimeError("enough")

    times = [time.monotonic()]
    tokenizer = train(["abab"], 257)
    with pytest.raises(RuntimeError, match="enough"):
        tokenizer.train_from_iterator(texts(), 300, buffer_size=1, progress=stop)
    assert 0.9 < times[1] - times[0] < 20
    assert learned(tokenizer) == [b"ab"]


def test_the_gil_is_released() -> None:
    done = threading.Event()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            time.sleep(0.001)
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    start = ticks
    train(["some words to count " * 1_000_000], 260)
    gained = ticks - start
    done.set()
    thread.join()
    assert gained > 10  # holding the GIL for the few tenths of a second would give 0 or 1


@only_ours
def test_the_iterator_may_use_the_tokenizer_it_trains() -> None:
    tokenizer = train(["abab"], 257)

    def texts():
        for text in ["cdcd", "cdcd"]:
            assert tokenizer.encode("ab") == [256]  # the old model, until training is over
            yield text

    tokenizer.train_from_iterator(texts(), 257, buffer_size=1)
    assert learned(tokenizer) == [b"cd"]


def test_no_reference_is_leaked() -> None:
    class Text(str):
        __slots__ = ("__weakref__",)

    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    most = 0

    def texts():
        nonlocal most
        for i in range(1000):
            text = Text(f"text {i}")
            alive.add(text)
            most = max(most, len(alive))
            yield text

    iterator = texts()
    ended = weakref.ref(iterator)
    rustbpe.Tokenizer().train_from_iterator(iterator, 260, buffer_size=10)
    del iterator
    gc.collect()
    assert ended() is None and len(alive) == 0
    assert most <= 12  # one buffer at a time, and the one being made
