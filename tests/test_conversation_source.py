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
from nanochat.conversation_source import ConversationSource
from nanochat.dataloader import IGNORE, RowReader
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

TOKENIZERS = [tiny_tokenizer(), tiny_qwen()]


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


def documents_of(source: ConversationSource) -> list[tuple[list[int], list[int]]]:
    """(ids, trained) of every conversation that was kept."""
    ids, trained = source.documents.ids, source.documents.trained
    assert trained is not None
    ranges = itertools.pairwise(source.documents.offsets)
    return [(ids[a:b].tolist(), trained[a:b].tolist()) for a, b in ranges]


def expected_of(tokenizer: Any, c: dict[str, Any], end: int | None = None) -> Any:
    ids, mask = tokenizer.render_conversation(c)
    return ids[:end], tokenizer.trained_mask(ids, mask)[:end]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["ours", "qwen"])
def test_every_conversation_is_accounted_for(tokenizer: Any, own_base_dir: Path) -> None:
    """A long question leaves nothing to learn; of a long first reply the beginning is kept."""
    long_question = conversation("word " * 200, "Never seen.")
    long_answer = conversation("Hi", "word " * 200)
    silent = {"messages": [{"role": "user", "content": "Is anybody there?"}]}
    task = [*CONVERSATIONS[:5], long_question, long_answer, silent, long_question]
    row_len = 180
    source = ConversationSource(task, tokenizer, row_len)
    account = source.account()
    assert account.startswith("conversations: 6 kept, 3 dropped; of those kept, 1 are cut to 180 ")
    assert ": 0 after a reply, 1 in their first; " in account
    assert "(2: the assistant's first word comes after the cut; 1: it says nothing)" in account
    assert source.counts[:, 1].tolist() == [*source.counts[:5, 0], 0, row_len, 0, 0]
    kept = documents_of(source)
    assert len(kept) == 6 and all(any(trained) for _, trained in kept)  # alone, a row is never 0/0
    assert kept[-1] == expected_of(tokenizer, long_answer, row_len)
    trainable = sum(sum(expected_of(tokenizer, c)[1]) for c in task)
    unseen = trainable - source.counts[:, 2].sum()
    assert unseen == source.num_unseen > 0
    assert f"{unseen / trainable:.1%} of what the assistant says has no room" in account


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["ours", "qwen"])
def test_a_long_conversation_is_cut_after_a_reply(tokenizer: Any, own_base_dir: Path) -> None:
    """Wherever the row ends: what is kept are the turns before, each reply with its end."""
    tool = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"},
            {"type": "text", "text": "Two."}]  # fmt: skip
    long: dict[str, Any] = {**conversation("What is it?", "It is one.", "It is two.", "Three.")}
    long["messages"] = [{"role": "system", "content": "Be brief."}, *long["messages"]]
    long["messages"][4] = {"role": "assistant", "content": tool}
    beginnings = [{"messages": long["messages"][:n]} for n in (3, 5, 7)]
    ends = [len(tokenizer.render_conversation(c)[0]) for c in beginnings]
    first = len(tokenizer.render_for_completion({"messages": long["messages"][:2]}))
    for row_len in range(first + 1, ends[-1] + 2):
        source = ConversationSource([long], tokenizer, row_len)
        fitting = [end for end in ends if end <= row_len]
        end = max(fitting, default=row_len)
        assert documents_of(source) == [expected_of(tokenizer, long, end)], row_len
        assert source.cut_in_turn.tolist() == [not fitting]
        assert source.counts[0].tolist() == [ends[-1], end, sum(documents_of(source)[0][1])]
        said = f"{1 if fitting else 0} after a reply, {0 if fitting else 1} in their first"
        assert (said in source.account()) == (row_len < ends[-1])
    with pytest.raises(UserError, match="none of 1 conversations"):
        ConversationSource([long], tokenizer, first)  # not a word of the first reply


def test_nothing_is_said_of_cuts_where_there_are_none(own_base_dir: Path) -> None:
    source = ConversationSource(CONVERSATIONS, tiny_tokenizer(), 129)
    assert source.account() == "conversations: 40 kept, 0 dropped"


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
