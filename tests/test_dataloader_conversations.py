"""
Conversations as a source of rows: rendered, masked, whole, each accounted for.

Rows and their order are tested in test_dataloader.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.dataloader import IGNORE, ConversationSource, RowReader
from tests.tokenizers_for_tests import tiny_tokenizer


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
    reader = RowReader(source, 129, seed=0, bos=bos)
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
