"""
Conversations as numbers: every id and every mask, in both formats, with nothing computed.

A change of a format, a template, a mask or what is trained on shows here, whatever the helpers of
other tests make of it. The ids are those of the small tokenizers in tokenizers_for_tests.py, whose
merges are fixed; beside each the text is told by test_chat_format.py. Stretches are (first, end).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from nanochat.conversation_source import ConversationSource
from nanochat.evals.chat import letter_ids
from nanochat.tasks.choice import choice_conversation
from tests.test_chat_format import SUM, SYSTEM, TOOL, TWO_TURNS
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

CHOICE = choice_conversation("What barks?", ["a cat", "a dog"], 1, "here")


class Golden(NamedTuple):
    """A rendered conversation: where the assistant wrote, and what is trained on."""

    ids: list[int]
    written: list[tuple[int, int]]
    trained: list[tuple[int, int]]


# fmt: off
# The system turn: "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN_SYSTEM_TURN = [
    396, 115, 121, 115, 116, 101, 109, 10, 89, 280, 354, 32, 81, 119, 275, 44, 290, 260,
    270, 292, 265, 121, 336, 108, 105, 98, 97, 98, 97, 32, 67, 108, 280, 100, 46, 32, 89,
    280, 354, 256, 32, 257, 108, 112, 102, 117, 108, 256, 349, 279, 116, 276, 116, 46, 397,
    10,
]
OURS = {
    "plain": Golden(
        [
            391, 392, 372, 289, 32, 50, 43, 50, 63, 393, 394, 52, 395,
        ],
        [(11, 12)],
        [(11, 13)],
    ),
    "turns": Golden(
        [
            391, 392, 372, 289, 32, 50, 43, 50, 63, 393, 394, 52, 395, 392, 372, 289, 32,
            50, 43, 50, 63, 393, 394, 52, 289, 395,
        ],
        [(11, 12), (23, 25)],
        [(11, 13), (23, 26)],
    ),
    "system": Golden(
        [
            391, 392, 66, 101, 265, 114, 346, 102, 334, 372, 289, 32, 50, 43, 50, 63, 393,
            394, 52, 395,
        ],
        [(18, 19)],
        [(18, 20)],
    ),
    "tool": Golden(
        [
            391, 392, 372, 289, 32, 50, 43, 50, 63, 393, 394, 73, 116, 289, 396, 50, 43,
            50, 397, 398, 52, 399, 52, 395,
        ],
        [(11, 19), (22, 23)],
        [(11, 19), (22, 24)],
    ),
    "choice": Golden(
        [
            391, 392, 372, 265, 277, 107, 115, 63, 10, 45, 256, 290, 270, 61, 65, 10, 45,
            256, 278, 111, 103, 61, 66, 10, 65, 110, 350, 259, 268, 360, 264, 273, 293,
            308, 331, 378, 46, 393, 394, 66, 395,
        ],
        [(39, 40)],
        [(39, 41)],
    ),
}
QWEN = {
    "plain": Golden(
        [
            *QWEN_SYSTEM_TURN, 396, 117, 115, 259, 10, 370, 289, 32, 50, 43, 50, 63, 397,
            10, 396, 301, 115, 279, 116, 276, 116, 10, 52, 397, 10,
        ],
        [(78, 79)],
        [(78, 80)],
    ),
    "turns": Golden(
        [
            *QWEN_SYSTEM_TURN, 396, 117, 115, 259, 10, 370, 289, 32, 50, 43, 50, 63, 397,
            10, 396, 301, 115, 279, 116, 276, 116, 10, 52, 397, 10, 396, 117, 115, 259,
            10, 370, 289, 32, 50, 43, 50, 63, 397, 10, 396, 301, 115, 279, 116, 276, 116,
            10, 52, 289, 397, 10,
        ],
        [(78, 79), (103, 105)],
        [(78, 80), (103, 106)],
    ),
    "system": Golden(
        [
            396, 115, 121, 115, 116, 101, 109, 10, 66, 101, 265, 114, 346, 102, 46, 397,
            10, 396, 117, 115, 259, 10, 370, 289, 32, 50, 43, 50, 63, 397, 10, 396, 301,
            115, 279, 116, 276, 116, 10, 52, 397, 10,
        ],
        [(39, 40)],
        [(39, 41)],
    ),
    "tool": Golden(
        [
            *QWEN_SYSTEM_TURN, 396, 117, 115, 259, 10, 370, 289, 32, 50, 43, 50, 63, 397,
            10, 396, 301, 115, 279, 116, 276, 116, 10, 73, 116, 289, 10, 398, 10, 123, 34,
            110, 97, 109, 101, 34, 58, 32, 34, 112, 121, 328, 282, 34, 44, 32, 34, 277,
            103, 117, 109, 275, 303, 34, 58, 32, 123, 34, 99, 378, 101, 34, 58, 32, 34,
            50, 43, 50, 34, 125, 125, 10, 399, 397, 10, 396, 117, 115, 259, 10, 60, 116,
            111, 111, 108, 95, 260, 115, 112, 282, 115, 101, 62, 10, 52, 10, 60, 47, 116,
            111, 111, 108, 95, 260, 115, 112, 282, 115, 101, 62, 397, 10, 396, 301, 115,
            279, 116, 276, 116, 10, 52, 397, 10,
        ],
        [(78, 128), (175, 176)],
        [(78, 129), (175, 177)],
    ),
    "choice": Golden(
        [
            *QWEN_SYSTEM_TURN, 396, 117, 115, 259, 10, 370, 265, 277, 107, 115, 63, 10,
            45, 256, 290, 270, 61, 65, 10, 45, 256, 278, 111, 103, 61, 66, 10, 65, 110,
            350, 259, 394, 264, 273, 293, 308, 331, 376, 46, 397, 10, 396, 301, 115, 279,
            116, 276, 116, 10, 66, 397, 10,
        ],
        [(105, 106)],
        [(105, 107)],
    ),
}
# fmt: on

CONVERSATIONS = {
    "plain": SUM, "turns": TWO_TURNS, "system": SYSTEM, "tool": TOOL, "choice": CHOICE,
}  # fmt: skip
FORMATS = [
    pytest.param(tiny_tokenizer(), OURS, id="ours"),
    pytest.param(tiny_qwen(), QWEN, id="qwen"),
]


def stretches(stretch: list[tuple[int, int]], length: int) -> list[int]:
    """0 and 1 for each of `length` tokens: 1 within the stretches."""
    mask = [0] * length
    for first, end in stretch:
        mask[first:end] = [1] * (end - first)
    return mask


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(("tokenizer", "golden"), FORMATS)
def test_ids_and_masks(tokenizer: Any, golden: dict[str, Golden], name: str) -> None:
    expected = golden[name]
    ids, mask = tokenizer.render_conversation(CONVERSATIONS[name])
    assert ids == expected.ids
    assert mask == stretches(expected.written, len(ids))
    assert tokenizer.trained_mask(ids, mask) == stretches(expected.trained, len(ids))


# (row length, tokens kept, what of them is trained on, whether the cut is within a reply) of turns
TRUNCATED = {
    "ours": [
        (26, 26, [(11, 13), (23, 26)], False),  # all of it
        (25, 13, [(11, 13)], False),  # the second reply would lack its end: it is left out
        (13, 13, [(11, 13)], False),
        (12, 12, [(11, 12)], True),  # not even the first is whole
    ],
    "qwen": [
        (107, 107, [(78, 80), (103, 106)], False),
        (106, 81, [(78, 80)], False),
        (81, 81, [(78, 80)], False),
        (79, 79, [(78, 79)], True),
    ],
}


@pytest.mark.parametrize(
    ("name", "row_len", "kept", "trained", "in_turn"),
    [(name, *case) for name, cases in TRUNCATED.items() for case in cases],
)
def test_truncated_to_a_row(
    name: str, row_len: int, kept: int, trained: list[tuple[int, int]], in_turn: bool
) -> None:
    tokenizer, golden = (tiny_tokenizer(), OURS) if name == "ours" else (tiny_qwen(), QWEN)
    source = ConversationSource([TWO_TURNS], tokenizer, row_len)
    documents = source.documents
    assert documents.ids.tolist() == golden["turns"].ids[:kept]
    assert np.asarray(documents.trained).tolist() == stretches(trained, kept)
    assert source.cut_in_turn.tolist() == [in_turn]


@pytest.mark.parametrize(("tokenizer", "golden"), FORMATS)
def test_the_letter_is_one_token_and_the_one_that_stands_beside_its_choice(
    tokenizer: Any, golden: dict[str, Golden]
) -> None:
    """Answering is copying: the reply's one token is also the last of the right choice's line, and
    the one whose logit chat_eval looks at."""
    ids, written, _ = golden["choice"]
    ((first, end),) = written
    assert ids[first:end] == [66] == letter_ids(tokenizer, ["B"])  # "B" is one byte
    assert letter_ids(tokenizer, list("ABCD")) == [65, 66, 67, 68]
    line = tokenizer.encode("- a dog=B\n")
    assert line[-2:] == [66, 10] and ids[:first].count(66) == 1
    at = ids.index(66)
    assert ids[at - len(line) + 2 : at + 2] == line
