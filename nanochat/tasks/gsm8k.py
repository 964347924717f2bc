"""
GSM8K (arXiv 2110.14168): 8.5K grade-school word problems, with calculator calls.

Answers are worked solutions with annotations like <<48/2=24>>. What is in them becomes a call of
the calculator tool and what it says, so that the model learns to call it. The last line is "####
72".
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import Conversation, Part
from nanochat.tasks.common import Hub, Row, RowTask, field, load_rows

_ANNOTATION = re.compile(r"<<([^<>]*)=([^<>=]*)>>")

# -----------------------------------------------------------------------------
# Reading an answer. tests/tasks/answers_for_tests.py shows hundreds of spellings and what they mean

# Hyphens and dashes that people, word processors and models write for a minus; not the em dash,
# which is punctuation.
_MINUS = "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
_SIGN = rf"[{_MINUS}+\uff0b]"  # the hyphen first, or it would make a range
# What may stand before a number without being a part of it: spaces, currency, emphasis, brackets,
# quotes, LaTeX around it. Words may not: "#### about 70" is no answer. (All repetitions here have a
# bound: what a model babbles must not take time that grows with the square of its length.)
_BEFORE = (
    r"(?:\\(?:boxed|text|textbf|mathbf|mathrm)\s{0,2}\{|\\[(\[$]|"
    r"[\s\u200b\ufeff:=≈~*_`\"'“‘(\[{$€£¥₹]){0,24}"
)
# Between groups of digits: 1,200  1{,}200  1\,200  1'200  1_200, and the spaces that do not break
# (an ordinary one does: "5 100" is two numbers)
_GROUPED = r"(?:,(?:\\!)?|\{,\}|\\[,!]|['’_\u00a0\u2009\u202f])"
# Groups of three; those of two are Indian: 1,00,000. "3,4" is two numbers, "1,50" too: 1.
_WHOLE = rf"(?:\d{{1,3}}(?:{_GROUPED}\d{{2,3}}){{0,20}}{_GROUPED}\d{{3}}(?!\d)|\d+)"
_SIZE = rf"""
    (?:
        (?:(?P<mixed>\d{{1,18}})[ \t]{{1,3}})?
        (?P<top>\d{{1,18}})[ \t]{{0,2}}[/\u2044\u2215][ \t]{{0,2}}(?P<bottom>\d{{1,18}})
      | (?P<mixed2>\d{{1,18}})?[ \t]{{0,2}}\\[dt]?frac[ \t]{{0,2}}
        \{{[ ]?(?P<top2>\d{{1,18}})[ ]?\}}[ ]?\{{[ ]?(?P<bottom2>\d{{1,18}})[ ]?\}}
      | (?P<mixed3>\d{{1,18}})?[ \t]{{0,2}}(?P<vulgar>[¼½¾⅐-⅞])
      | (?P<decimal>{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE](?P<exponent>[-+]?\d{{1,2}})(?!\w|\.\d))?
    )
"""
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN}?)\s{{0,2}}{_BEFORE}(?P<sign2>{_SIGN}?)\s{{0,2}}{_SIZE}", re.VERBOSE
)
# In running text a number does not begin within a word (H2O), and a dash after a digit or a letter,
# or before a space, is no minus (9-5, 9 - 5)
_ANYWHERE = re.compile(
    rf"(?<![\w.])(?P<sign>{_SIGN}?)[$€£¥₹]?(?P<sign2>{_SIGN}?){_SIZE}", re.VERBOSE
)
_FINAL = re.compile(rf"####+{_BEFORE}")
_BOXED = re.compile(rf"\\boxed\s{{0,2}}\{{\s{{0,2}}(?:[a-zA-Z]\s{{0,2}}=)?{_BEFORE}")
_SAID = re.compile(rf"\banswer(?:\s{{1,2}}is)?[:=\s]{{1,3}}(?:(?:about|only)\s)?{_BEFORE}", re.I)


def _value(match: re.Match[str]) -> str | None:
    """The number that _NUMBER found, in one spelling; None for a fraction over zero.

    Decimals without zeros at either end ("0.5", "1200"); a fraction as a decimal where it has one,
    else in its lowest terms ("2/3")."""
    found = match.groupdict()
    negative = any(found[name] and found[name] in _MINUS for name in ("sign", "sign2"))
    minus = "-" if negative else ""
    if found["decimal"] is not None and found["exponent"] is None:
        # As strings: a model may write thousands of digits
        digits = "".join(
            c if c == "." else str(unicodedata.decimal(c))
            for c in found["decimal"]
            if c == "." or c.isdecimal()
        )
        whole, _, decimals = digits.partition(".")
        number = whole.lstrip("0") or "0"
        number += f".{decimals.rstrip('0')}" if decimals.strip("0") else ""
        return number if number == "0" else minus + number
    if found["decimal"] is not None:
        plain = "".join(c for c in found["decimal"] if c == "." or c.isdecimal())[:40]
        return _spelled(Fraction(plain) * Fraction(10) ** int(found["exponent"]), minus)
    mixed = found["mixed"] or found["mixed2"] or found["mixed3"] or "0"
    if found["vulgar"] is not None:
        part = Fraction(unicodedata.numeric(found["vulgar"])).limit_denominator(10)
    else:
        top, bottom = found["top"] or found["top2"], found["bottom"] or found["bottom2"]
        if int(bottom) == 0:
            return None
        part = Fraction(int(top), int(bottom))
    return _spelled(int(mixed) + part, minus)


def _spelled(value: Fraction, minus: str) -> str:
    left = value.denominator
    for prime in (2, 5):
        while left % prime == 0:
            left //= prime
    sign = minus if value else ""
    if left > 1:
        return f"{sign}{value.numerator}/{value.denominator}"
    places = value.denominator.bit_length() * 4  # more than enough: 2^n needs n of them
    digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    decimals = digits[-places:].rstrip("0")
    return sign + digits[:-places] + (f".{decimals}" if decimals else "")


def extract_answer(text: str) -> str | None:
    """The number after the first "####", in one spelling: "#### $1,200.50." -> "1200.5".

    None if there is no such number. The first one counts, what follows an answer is babble: of
    "#### 3 + 4 = 7" that is 3. Currency, emphasis, brackets and \\boxed{} around it are passed
    over, units after it (percent signs, too) are not read, fractions are worth what they are."""
    for match in _FINAL.finditer(text):
        number = _NUMBER.match(text, match.end())
        value = _value(number) if number else None
        if value is not None:
            return value
    return None


def extract_lenient(text: str) -> str | None:
    """What a reply that does not know of "####" gives as its answer, in extract_answer's spelling.

    The first of these that there is: the number after "####"; in the last \\boxed{}; after the
    last "answer is" or "answer:"; the last number of all. For models from elsewhere."""
    strict = extract_answer(text)
    if strict is not None:
        return strict
    for pattern in (_BOXED, _SAID):
        for match in reversed(list(pattern.finditer(text))):
            number = _NUMBER.match(text, match.end())
            value = _value(number) if number else None
            if value is not None:
                return value
    last = None
    for number in _ANYWHERE.finditer(text):
        last = _value(number) or last
    return last


# -----------------------------------------------------------------------------
# The task


def solution_parts(answer: str) -> list[Part]:
    """A GSM8K solution as parts: text, python calls of the calculator, and their outputs."""
    parts: list[Part] = []
    end = 0
    for match in _ANNOTATION.finditer(answer):
        expression, result = match.groups()
        parts += [
            {"type": "text", "text": answer[end : match.start()]},
            {"type": "python", "text": expression},
            {"type": "python_output", "text": result},
        ]
        end = match.end()
    parts.append({"type": "text", "text": answer[end:]})
    return [part for part in parts if part["text"]]


class GSM8K(RowTask):
    """Rows of {"question", "answer"}; the conversation's "expected" is the final number."""

    def convert(self, row: Row, where: str) -> Conversation:
        question = field(row, "question", str, where)
        answer = field(row, "answer", str, where)
        expected = extract_answer(answer)
        if expected is None:
            raise UserError(f'{where}: the answer does not end in "#### NUMBER": {answer[-80:]!r}')
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": solution_parts(answer)},
            ],
            "expected": expected,
        }

    def evaluate(self, conversation: Conversation, reply: str) -> bool:
        return extract_answer(reply) == conversation["expected"]


def load(split: str, **slicing: Any) -> GSM8K:
    """GSM8K's "train" (7,473) or "test" (1,319)."""
    hub = Hub("openai/gsm8k", "main", split)
    return GSM8K(load_rows(["gsm8k", "gsm8k/main"], split, hub), **slicing)
