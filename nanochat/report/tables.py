"""
Numbers, texts and tables as Markdown: what every page of the report is made of.

Whatever a model or a user wrote goes through literal(): as code it stays what it is, whoever shows
the Markdown, and however many stars, pipes and angle brackets it holds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from nanochat.report.runs import Row


class Markdown(str):
    """Text for a table cell that is Markdown already, and stays as it is."""


# What Markdown would take for markup of its own, in a cell. Underscores within words are none.
_MARKUP = re.compile(r"[*`<~]|\]\(|!\[")


def show(value: Any) -> str:
    """A value for a table cell: 1,234,567 and 0.1234 and yes; text without what breaks a table."""
    if value is None:
        return ""
    if isinstance(value, Markdown):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 and math.isfinite(value) else f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if _MARKUP.search(text):
        return literal(text)
    return " ".join(text.split()).replace("|", "\\|")


def literal(text: str, limit: int | None = None) -> Markdown:
    """Text as a span of code, which no markup in it can leave, on one line and at most `limit`
    characters long; fit for a table cell."""
    text = " ".join(text.split())
    if limit is not None and len(text) > limit:
        text = text[:limit].rstrip() + " …"
    if not text:
        return Markdown("")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    edge = " " if "`" in (text[0], text[-1]) else ""
    return Markdown(f"{fence}{edge}{text}{edge}{fence}".replace("|", "\\|"))


def in_short(number: float, place: object = None) -> str:
    """1,916,928 -> "1.92M". `place`: what matplotlib tells whatever writes its ticks."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float | None) -> str:
    """75 -> "1m 15s"."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {rest}s" if minutes else f"{rest}s"


def table(head: list[str], rows: Iterable[list[Any]]) -> list[str]:
    """A Markdown table, padded so that it also reads well as plain text; numbers to the right."""
    cells = [[show(cell) for cell in row] for row in (head, *rows)]
    # A column of numbers has a digit in front everywhere, be it in "81.2 ± 1.0" or "3m 24s".
    numbers = [all(not c or c.lstrip("-+")[:1].isdigit() for c in col[1:]) for col in zip(*cells)]
    # One overlong cell (a mixture of tasks, say) must not stretch every line.
    widths = [min(60, max(3, *(len(row[i]) for row in cells))) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(*columns)) + " |"
        for columns in ((row, widths, numbers) for row in cells)
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-:"[n]) for w, n in zip(widths, numbers)) + "|"
    return [lines[0], rule, *lines[1:], ""]


def pairs(row: Row, skip: tuple[str, ...] = ()) -> list[str]:
    """A two-column table of a row's plain values."""
    shown = [[k, v] for k, v in row.items() if k not in (*skip, "time") and is_plain(v)]
    return table(["", ""], shown) if shown else []


def is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and value != ""


def percent(value: Any, stderr: Any = None) -> str:
    """0.8125, 0.0101 -> "81.2 ± 1.0"."""
    if not isinstance(value, (int, float)):
        return ""
    error = f" ± {100 * stderr:.1f}" if isinstance(stderr, (int, float)) else ""
    return f"{100 * value:.1f}{error}"
