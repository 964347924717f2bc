"""
Multiple choice: how the question is put, and how the letter is judged. MMLU, ARC and own rows use
it.

The letter stands after its choice with no space before it ("- dog=A"): " A" would be another token
than the bare letter that the assistant replies with, and answering should be as near as possible to
copying, which even a small model can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from nanochat.common import UserError
from nanochat.conversation import Conversation
from nanochat.tasks.common import Row, RowTask, field

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choice_line(choice: str, letter: str) -> str:
    """One choice with its letter; the one place that decides how they are written."""
    return f"- {choice}={letter}"


def render_choice(question: str, choices: Sequence[str], restate: bool = False) -> str:
    """The prompt: the question, one line a choice, and what form of answer is wanted."""
    lines = [choice_line(choice, letter) for choice, letter in zip(choices, LETTERS)]
    wanted = "Answer with the line." if restate else "Answer with the letter only."
    return "\n".join([question, *lines, wanted])


class MultipleChoice(RowTask):
    """Rows of {"question", "choices": [...], "answer": index or letter}."""

    eval_type: Literal["categorical", "generative"] = "categorical"
    restate = False

    def convert(self, row: Row, where: str) -> Conversation:
        question = field(row, "question", str, where)
        choices = field(row, "choices", (list, tuple), where)
        if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(c, str) for c in choices):
            raise UserError(
                f'{where}: "choices" must be 2 to {len(LETTERS)} strings, found {choices!r:.120}'
            )
        return choice_conversation(question, choices, row.get("answer"), where, self.restate)

    def evaluate(self, conversation: Conversation, reply: str) -> bool:
        return reply.strip() == conversation["expected"]


class RestatedChoice(MultipleChoice):
    """The same rows with "restate": true. The reply is the whole line of the right choice, which
    has to be generated: first the answer, then its letter. For models that are too small to say
    the letter at once."""

    eval_type = "generative"
    restate = True


def choice_conversation(
    question: str, choices: Sequence[str], answer: object, where: str, restate: bool = False
) -> Conversation:
    """The conversation of one question; `answer` is an index from 0 or a letter.

    Beside the messages it has "letters", what may be answered, and "expected", what is right: the
    letter, or with `restate` the choice's line."""
    letters = list(LETTERS[: len(choices)])
    if isinstance(answer, str) and answer.strip().upper() in letters:
        expected = answer.strip().upper()
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        expected = letters[answer]
    else:
        raise UserError(
            f'{where}: "answer" must be an index below {len(letters)} or one of '
            f"{', '.join(letters)}, found {answer!r}"
        )
    if restate:
        expected = choice_line(choices[letters.index(expected)], expected)
    return {
        "messages": [
            {"role": "user", "content": render_choice(question, choices, restate)},
            {"role": "assistant", "content": expected},
        ],
        "letters": letters,
        "expected": expected,
    }
