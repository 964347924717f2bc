"""
Measures the tokenizer: how much text a token holds, beside GPT-2's and GPT-4's.

    python -m scripts.tok_eval
    python -m scripts.tok_eval --tokenizer=qwen2.5

More bytes a token means fewer steps for the same text, in training and in generation. Measured on
the validation text and on samples of other kinds and languages; on the validation text also the
share of tokens that it ever uses, and the speed, of one text after the other (tiktoken) and of all
at once (rustbpe, which prepares the training data so). The other vocabularies come from tiktoken,
which downloads them once; without a network the table has our column only.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nanochat import flags
from nanochat.common import UserError, append_jsonl, get_base_dir, print0
from nanochat.dataset import iter_texts, split_files
from nanochat.tokenizer import Tokenizer, get_tokenizer, without_surrogates

OTHERS = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
DOWNLOAD_SECONDS = 30.0

SAMPLES = {
    "news": (
        "The city council voted 7-2 on Tuesday evening to replace the old swing bridge, which was "
        "closed to lorries in March after inspectors found cracks in two of its main girders. The "
        "new crossing will cost an estimated $41.5 million, about a third more than was expected "
        'last year. "Nobody likes the price," said the mayor, "but a detour of twenty miles isn\'t '
        'free either." Work is due to begin in the autumn and to last for eighteen months.\n'
    ),
    "code": (
        "def moving_average(values: list[float], width: int) -> list[float]:\n"
        '    """Mean of each window of `width` values."""\n'
        "    if width < 1:\n"
        '        raise ValueError(f"width must be positive, got {width}")\n'
        "    total = sum(values[:width])\n"
        "    means = [total / width]\n"
        "    for i in range(width, len(values)):\n"
        "        total += values[i] - values[i - width]\n"
        "        means.append(total / width)\n"
        "    return means\n\n"
        "static int by_count(const void *a, const void *b) {\n"
        "    const struct entry *x = a, *y = b;\n"
        "    return (x->count < y->count) - (x->count > y->count);  /* frequent ones first */\n"
        "}\n\n"
        "for (const [name, rows] of Object.entries(groups)) {\n"
        "  const mean = rows.reduce((sum, row) => sum + row.value, 0) / rows.length;\n"
        "  console.log(`${name}: ${mean.toFixed(2)}`);\n"
        "}\n"
    ),
    "math": (
        "Let $f(x) = x^3 - 6x^2 + 11x - 6$. Then $f(1) = 1 - 6 + 11 - 6 = 0$, so $x - 1$ divides "
        "$f$, and $f(x) = (x - 1)(x^2 - 5x + 6) = (x - 1)(x - 2)(x - 3)$. Hence "
        "\\[ \\int_1^3 f(x)\\,dx = \\left[ \\tfrac{x^4}{4} - 2x^3 + \\tfrac{11x^2}{2} - 6x "
        "\\right]_1^3 = 0, \\] and 12,345 + 67,890 = 80,235. For every $n \\ge 1$, by induction, "
        "$\\sum_{k=1}^{n} k^2 = \\frac{n(n+1)(2n+1)}{6}$: the step adds $(n+1)^2$ to both sides. "
        "A matrix $A \\in \\mathbb{R}^{n \\times n}$ is invertible iff $\\det A \\neq 0$; about "
        "68.27% of a normal distribution lies within $\\mu \\pm \\sigma$.\n"
    ),
}
LANGUAGES = {
    "german": (
        "Der Zug nach Lübeck hatte wieder einmal Verspätung, und auf dem Bahnsteig wurde es "
        "allmählich ungemütlich. Eine ältere Dame verschenkte Apfelkuchen an die Wartenden; der "
        "Schaffner, der sonst so streng war, nahm zwei Stücke und erzählte Geschichten aus der "
        "Zeit der Dampflokomotiven.\n"
    ),
    "french": (
        "Le boulanger de la rue des Tilleuls ouvre à six heures, bien avant les autres commerces "
        "du quartier. Ce matin-là, il n'avait plus de farine : le camion, retardé par la neige, "
        "n'était pas arrivé. Il proposa donc aux clients du café et des biscuits de la veille, et "
        "personne ne se plaignit.\n"
    ),
    "spanish": (
        "Cuando el tren se detuvo en la estación, ya era de noche y llovía sin parar. Mi tía nos "
        "esperaba bajo el reloj con un paraguas enorme y una bolsa llena de naranjas. «¿Tenéis "
        "hambre?», preguntó, y sin esperar la respuesta empezó a contarnos las noticias del "
        "pueblo.\n"
    ),
    "russian": (
        "В субботу утром на рынке было непривычно тихо. Старый мастер чинил часы у окна и "
        "рассказывал внуку, почему маятник всегда возвращается назад. Мальчик слушал внимательно, "
        "но больше всего его интересовало, когда они наконец пойдут кататься на лодке.\n"
    ),
    "arabic": (
        "في صباح يوم الجمعة خرج الصيادون إلى البحر قبل شروق الشمس. كانت الريح هادئة والماء صافيا، "
        "فعادوا عند الظهر بسلال مليئة بالسمك. جلس الأطفال على الرصيف يستمعون إلى الحكايات القديمة "
        "ويشربون الشاي بالنعناع.\n"
    ),
    "hindi": (
        "गाँव के पुराने कुएँ के पास एक बड़ा आम का पेड़ है। गर्मियों में बच्चे वहाँ खेलते हैं और बुज़ुर्ग "
        "छाया में बैठकर बातें करते हैं। इस साल बारिश देर से आई, इसलिए किसानों ने बीज बोने से पहले दो "
        "हफ़्ते तक इंतज़ार किया।\n"
    ),
    "chinese": (
        "清晨的菜市场已经很热闹了。卖豆腐的老人一边招呼客人，一边给邻居讲昨天夜里下大雨的事。我买了两斤土豆和"
        "一把青菜，准备回家做一顿简单的午饭。到了下午，雨又下了起来，孩子们只好在屋里下棋。\n"
    ),
    "japanese": (
        "駅前の小さな本屋は、今年で創業五十年を迎えた。店主は毎朝七時にシャッターを開け、新聞を並べながら常連客と"
        "天気の話をする。最近は若い人も増え、古い地図や料理の本がよく売れるそうだ。\n"
    ),
    "korean": (
        "오늘 아침에는 안개가 짙어서 강 건너편이 보이지 않았다. 할머니는 시장에서 사 온 배추를 "
        "씻으시고, 나는 마당에 떨어진 감나무 잎을 쓸었다. 점심때가 되자 해가 나왔고 우리는 함께 "
        "국수를 먹었다.\n"
    ),
}


@dataclass
class Args:
    """Measure a tokenizer on validation text and on samples, beside GPT-2's and GPT-4's."""

    tokenizer: str | None = None
    """qwen2.5 or a folder with a tokenizer.json; default: what tok_train made."""
    data: str | None = None
    """A file, folder or glob of text; default: $NANOCHAT_BASE_DIR/base_data/."""
    max_chars: int = 10_000_000
    """Characters of validation text to measure on."""


def load_others() -> dict[str, tiktoken.Encoding]:
    """GPT-2's and GPT-4's encodings, as far as they can be had."""
    loaded: dict[str, tiktoken.Encoding] = {}
    problems: list[str] = []

    def load() -> None:
        for label, name in OTHERS.items():
            try:
                loaded[label] = tiktoken.get_encoding(name)
            except Exception as e:  # whatever a download can raise
                problems.append(f"{label} ({type(e).__name__})")

    # tiktoken downloads without a time limit; a network that swallows packets must not stop us
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if thread.is_alive():
        problems.append(f"no answer within {DOWNLOAD_SECONDS:.0f} s")
    if problems:
        print0(f"compared without what could not be downloaded: {', '.join(problems)}")
    return dict(loaded)


def validation_text(args: Args) -> list[str]:
    """The first `max_chars` characters of the validation documents."""
    files = split_files(args.data)
    documents: list[str] = []
    left = args.max_chars
    for text in iter_texts([files.val], keep="val" if files.by_hash else "all"):
        documents.append(without_surrogates(text[:left]))
        left -= len(documents[-1])
        if left <= 0:
            break
    if not any(documents):
        raise UserError(f"the validation text {files.val} is empty; name other text by --data")
    return documents


class Candidate(NamedTuple):
    """A tokenizer to be measured."""

    label: str
    size: int  # how many ids text can become
    batch: Callable[[list[str]], Any]  # texts -> the ids of all of them, an array
    one: Callable[[str], list[int]]


def candidates(label: str, tokenizer: Tokenizer) -> list[Candidate]:
    """The tokenizer in question, and the others as far as they can be had."""

    def batch(encoding: tiktoken.Encoding, texts: list[str]) -> Any:
        return np.concatenate([np.zeros(0, int), *encoding.encode_ordinary_batch(texts)])

    size = int((tokenizer.token_bytes > 0).sum())
    made = [Candidate(label, size, lambda t: tokenizer.encode_batch(t)[0], tokenizer.encode)]
    for other, e in load_others().items():
        size = len(e.token_byte_values())
        made.append(Candidate(other, size, partial(batch, e), e.encode_ordinary))
    return made


def measure(candidate: Candidate, name: str, documents: list[str]) -> dict[str, Any]:
    """The row of one tokenizer on one text; of the validation text also speed and tokens used."""
    num_bytes = sum(len(text.encode()) for text in documents)
    candidate.batch(documents[:1])  # the first call makes what the later ones use
    start = time.perf_counter()
    ids = candidate.batch(documents)
    batch_seconds = time.perf_counter() - start
    row: dict[str, Any] = {
        "text": name,
        "tokenizer": candidate.label,
        "bytes_per_token": round(num_bytes / max(1, len(ids)), 3),
        "chars_per_token": round(sum(map(len, documents)) / max(1, len(ids)), 3),
        "bytes": num_bytes,
        "tokens": len(ids),
    }
    if name == "validation":  # the samples are too short for these
        start = time.perf_counter()
        for text in documents:
            candidate.one(text)
        seconds = time.perf_counter() - start
        row["vocab"] = candidate.size
        row["used_share"] = round(len(np.unique(ids)) / candidate.size, 4)
        row["mb_per_second"] = round(num_bytes / 1e6 / seconds, 1)
        row["batch_mb_per_second"] = round(num_bytes / 1e6 / batch_seconds, 1)
    return row


def table(title: str, *heads: str) -> Table:
    """An empty table; all columns but the first hold numbers."""
    made = Table(heads[0], title=title, title_justify="left", box=SIMPLE_HEAD)
    for head in heads[1:]:
        made.add_column(head, justify="right")
    return made


def print_tables(rows: list[dict[str, Any]]) -> None:
    """How much a token holds, a line for each text; then the tokenizers, a line for each."""
    by_text: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_text.setdefault(row["text"], []).append(row)
    labels = [row["tokenizer"] for row in by_text["validation"]]
    held = table("Bytes a token holds", "text", "bytes", *labels, f"characters, {labels[0]}")
    for name, of_text in by_text.items():
        best = max(row["bytes_per_token"] for row in of_text)
        cells = []
        for row in of_text:
            cell = f"{row['bytes_per_token']:.2f}"
            # The best stands out, where there is something to compare
            is_best = len(of_text) > 1 and row["bytes_per_token"] == best
            cells.append(f"[bold]{cell}[/]" if is_best else cell)
        cells.append(f"{of_text[0]['chars_per_token']:.2f}")
        ends = name in ("validation", [*SAMPLES][-1])
        held.add_row(name, f"{of_text[0]['bytes']:,}", *cells, end_section=ends)
    speed = table(
        "On the validation text",
        *("tokenizer", "tokens", "of them used", "MB/s, text by text", f"batch, {cores()} cores"),
    )
    for row in by_text["validation"]:
        speeds = (f"{row[key]:,.1f}" for key in ("mb_per_second", "batch_mb_per_second"))
        speed.add_row(row["tokenizer"], f"{row['vocab']:,}", f"{row['used_share']:.1%}", *speeds)
    console = Console()
    console.print(held)
    console.print(speed)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main(args: Args) -> None:
    if args.max_chars < 1:
        raise UserError(f"--max_chars={args.max_chars}: must be at least 1")
    tokenizer = get_tokenizer(args.tokenizer)
    samples = {name: [text] for name, text in (SAMPLES | LANGUAGES).items()}
    texts = {"validation": validation_text(args), **samples}
    label = Path(args.tokenizer).resolve().name if args.tokenizer else "ours"
    compared = candidates(label, tokenizer)
    rows = [measure(c, name, documents) for name, documents in texts.items() for c in compared]
    for row in rows:
        append_jsonl(get_base_dir() / "report" / "tok_eval.jsonl", {**row, "time": time.time()})
    print_tables(rows)


if __name__ == "__main__":
    flags.run(main, Args)
