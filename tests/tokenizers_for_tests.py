"""
Small tokenizers for everybody's tests, made in memory, without rustbpe and without files.

`tiny_tokenizer()` is ours, `tiny_qwen()` has Qwen2.5's split pattern, special tokens and chat
format. Both are trained on TEXT by `naive_bpe`, the slow twin of rustbpe: it recounts every pair
after each merge, and is too simple to be wrong. Below them, texts on which tokenizers go wrong.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter

import pytest
import regex

from nanochat.tokenizer import Tokenizer
from nanochat.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN, Vocabulary
from tests.conftest import SHARED_DATA

TEXT = """
The harbour town of Selby lies where the river meets the sea. Every morning the fishing boats come
back before sunrise, and the market opens at six o'clock. Anna sells bread, Tom sells apples, while
Mr. Fenwick sells clocks that are never quite right. "What time is it?" people ask him, and he says,
"It's later than you think, isn't it? They're all slow, I'll admit; we've all been slow at times."

A train leaves the station with 12 passengers. At the next stop 5 people get off and 8 get on, so
12 - 5 + 8 = 15 people are on the train now. How many will there be when 7 more get on? 15 + 7 = 22.
What is 2+2? The answer is 4. What is 27 + 15? The answer is 42. Half of 100 is 50, and 3 * 4 = 12.

The word apple is spelled a-p-p-l-e and has five letters. The word river has two times the letter r.
Question: what is the capital of France? A) London B) Paris C) Rome D) Madrid. The answer is B.

def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

Water boils at 100 degrees and freezes at 0 degrees. Plants need light, water and air to grow. The
moon moves round the earth, and the earth moves round the sun once a year, in about 365 days. In
winter the days are short and the nights are long; in summer it is the other way round.

Long ago a blacksmith named Oswin built an iron bridge across the narrow valley behind the village.
His neighbours laughed, because nobody had ever wanted to visit the opposite hill. But when a
great flood washed away every lower road, hundreds of frightened families walked safely over it,
carrying blankets, lanterns, chickens and sleeping children. Afterwards they planted an orchard,
cherry trees mostly, and each spring white blossoms drift down upon the dark water like late snow.

Recipes often begin with butter, flour, sugar, eggs and a pinch of salt. Whisk everything together
until smooth, pour the mixture into a shallow pan, then bake for thirty minutes in a moderate oven.
Doctors recommend vegetables, regular exercise, plenty of sleep and fewer cigarettes. The committee
published its annual report on Thursday: exports increased by 17 per cent, unemployment decreased
slightly, and the government promised 2,450 additional apartments before December 1987. Scientists
measured temperature, pressure and humidity; their results, although preliminary, confirm previous
observations. Musicians from Brazil, Egypt, Japan and Norway performed together yesterday evening.

Die Stadt liegt am Meer, und im Hafen riecht es nach Fisch und Käse. "Schön, daß du da bist!" rief
der alte Müller. Où est le café? C'est là-bas, près de l'église. Привет, мир! 안녕하세요, 서울은 큰
도시입니다. 東京は日本の首都です。 🙂 🎉

Hello! I am a small assistant. I can help you with sums, spelling and questions about the town. I am
sorry, I do not know that; it is outside of my small world. Thank you, and have a nice day! Goodbye.
"""

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The first three and the tool tags are what we use; their ids follow the ordinary tokens as in Qwen
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")


def naive_bpe(text: str, learned: int, pattern: str = SPLIT_PATTERN) -> list[bytes]:
    """The first `learned` tokens of a BPE on `text`, 256 bytes included: the most frequent pair is
    merged, ties go to the smaller pair of ids. Fewer if there is nothing left to merge."""
    tokens = [bytes([b]) for b in range(256)]
    words = Counter(tuple(word.encode()) for word in regex.findall(pattern, text))
    while len(tokens) < learned:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged: Counter[tuple[int, ...]] = Counter()
        for word, count in words.items():
            merged[_merge(word, best, len(tokens))] += count
        words = merged
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def _merge(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """`word` with every occurrence of `pair`, from the left, replaced by `new`."""
    out: list[int] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


@functools.cache
def tiny_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """Our tokenizer with exactly `vocab_size` tokens (265 to 1,200), trained on TEXT. Shared
    within the process, do not change it."""
    tokens = naive_bpe(TEXT, vocab_size - len(SPECIAL_TOKENS))
    tokenizer = Tokenizer(Vocabulary.from_merges(tokens))
    assert tokenizer.get_vocab_size() == vocab_size, "TEXT is too short for so many tokens"
    return tokenizer


@functools.cache
def tiny_qwen(vocab_size: int = 400) -> Tokenizer:
    """A tokenizer like Qwen2.5's (NFC, single digits, ChatML) with exactly `vocab_size` tokens."""
    tokens = naive_bpe(TEXT, vocab_size - len(QWEN_SPECIALS), QWEN_PATTERN)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(QWEN_SPECIALS)}
    return Tokenizer(Vocabulary(QWEN_PATTERN, ranks, specials, "NFC"))


@functools.cache
def big_qwen() -> Tokenizer:
    """As many ids as two bytes cannot hold, in Qwen's manner: all bytes, and all pairs of bytes."""
    pairs = (bytes(pair) for pair in itertools.product(range(256), repeat=2))
    tokens = [*(bytes([b]) for b in range(256)), *pairs]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    specials = {name: len(ranks) + i for i, name in enumerate(QWEN_SPECIALS)}
    return Tokenizer(Vocabulary(QWEN_PATTERN, ranks, specials, "NFC"))


# ---- texts ---------------------------------------------------------------------------------------

ODD_TEXTS = [
    "",
    " ",
    "\n",
    "   leading and trailing   ",
    "tabs\tand\r\nline ends\r\rof\n\n\nall kinds \n \n",
    "I'm, you'RE, we'Ll, it'S, she'd, they'Ve, rock'n'roll, 'ſ",
    "1 12 123 1234 12345678 3.14159 1,000,000 ²³ ½ Ⅻ ٣٤٥",
    "def f(x):\n    return x**2  # square\n\n\tif x: pass",
    "naïve café, e\u0301 and é, ﬁ ligature, Å and Å",
    "안녕하세요 세계! 東京タワー Привет мир مرحبا שלום",
    "🙂👩‍👩‍👧‍👦🇩🇪 zero\u200bwidth \u00a0nbsp\u3000wide \u2028line",
    "a" * 1000 + " " * 1000 + "!" * 1000,
    "<|bos|><|user_start|>Hi<|user_end|> <|im_start|>system\n<|endoftext|>",
    "\x00\x01\x1f\x7f\x85",
    "\ufffd\ufeff\uffff",
]


def random_texts(seed: int, count: int) -> list[str]:
    """Texts from all over Unicode (no surrogates), with much white space and many apostrophes."""
    rng = random.Random(seed)
    pools = [range(0x20, 0x7F), range(0x250), range(0x3000, 0xD800), range(0xE000, 0x110000)]
    common = [ord(c) for c in " \n\r\t'slSLreVE0123\u00a0\u017f"]
    texts = []
    for _ in range(count):
        pool = rng.choice(pools)
        length = rng.randrange(40)
        texts.append("".join(chr(rng.choice(rng.choice([pool, common]))) for _ in range(length)))
    return texts


def real_texts(count: int) -> list[str]:
    """Documents of the validation shard of the real data; skips where it is not there."""
    path = SHARED_DATA / "fineweb_like" / "shard_00004.parquet"
    if not path.exists():
        pytest.skip("the real data is not in ../shared/data")
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(0)["text"].to_pylist()[:count]
