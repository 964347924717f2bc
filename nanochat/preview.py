"""
What would be trained on, before anything is: `--preview` of every training script.

A few decoded rows with what is trained on marked (green on a terminal, between ⟦ and ⟧ elsewhere),
and where the data goes: the shares of a mixture, what is kept, cut and dropped, and why. Floor 4.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import filesize

from nanochat.common import print0
from nanochat.conversation_source import ConversationSource
from nanochat.dataloader import IGNORE, RowReader
from nanochat.dataset import TextFiles, iter_texts
from nanochat.packing import Documents, Plan
from nanochat.tasks.common import Task
from nanochat.tasks.mixture import TaskMixture

NUM_ROWS = 3
MOST_FILES = 10  # whose share is shown
LONGEST = 400  # characters of a stretch that are shown; of a longer one, beginning and end


# -------------------------------------------------------------------------------------------------
# Rows


def mark(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> str:
    """The text of a row, with the stretches marked that are trained on; every document begins on a
    line of its own, and long stretches are shortened."""
    bos = tokenizer.get_bos_token_id()
    end = len(ids)
    while end > 1 and ids[end - 1] == bos and not trained[end - 1]:
        end -= 1  # padding
    padding = f"\n[{len(ids) - end} tokens of padding]" if end < len(ids) else ""
    ids, trained = ids[:end], trained[:end]
    document = itertools.accumulate(id == bos for id in ids)  # which one a token belongs to
    text, at = "", 0
    for (_, is_trained), stretch in itertools.groupby(zip(document, trained)):
        length = len(list(stretch))
        piece = ids[at : at + length]
        at += length
        if piece[0] == bos and text:
            text += "\n"
        shown = shorten(tokenizer.decode(list(piece)))
        text += marked(shown) if is_trained else shown
    return text + padding


def marked(text: str) -> str:
    """Text that is trained on, so that one sees it."""
    return f"\x1b[32m{text}\x1b[0m" if sys.stdout.isatty() else f"⟦{text}⟧"


def shorten(text: str) -> str:
    """Beginning and end of a text, without control characters, which a terminal would obey."""
    if len(text) > LONGEST:
        begin, end = LONGEST * 2 // 3, LONGEST // 3
        text = f"{text[:begin]} […{len(text) - begin - end:,} characters…] {text[-end:]}"
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: f"\\x{ord(m[0]):02x}", text)


def print_rows(reader: RowReader, tokenizer: Any, num_rows: int = NUM_ROWS) -> None:
    """The first rows of the run, as the model will see them."""
    tokens, targets = reader.read(0, num_rows)
    for row in range(num_rows):
        # targets[t] is the token at t + 1: trained on is what comes next, so a row's first is not
        trained = [False, *(targets[row, :-1] != IGNORE).tolist()]
        share = float((targets[row] != IGNORE).mean())
        print0(f"\n--- row {row}: {len(trained):,} tokens, {share:.0%} trained on")
        print0(mark(tokenizer, tokens[row].tolist(), trained))


# -------------------------------------------------------------------------------------------------
# Accounts


def text_account(documents: Documents, plan: Plan, row_len: int) -> str:
    """What became of the documents of a shard: kept whole, cut, or in no row, and why."""
    lengths = documents.lengths
    docs, shown = plan.pieces[:, 0], plan.pieces[:, 2]  # (pieces,): whose it is, its tokens
    num_pieces = np.bincount(docs, minlength=len(lengths))
    whole = (num_pieces == 1) & (np.bincount(docs, shown, minlength=len(lengths)) == lengths)
    dropped = num_pieces == 0
    cut = len(lengths) - whole.sum() - dropped.sum()
    packed = plan.summary(row_len)
    return (
        f"{len(lengths):,} documents of {lengths.sum():,} tokens fill {len(plan):,} rows:\n"
        f"  kept     {whole.sum():>9,}  whole, in one row\n"
        f"  cropped  {cut:>9,}  where a row of {row_len:,} tokens (--max_seq_len) is full; "
        "what is left goes on in another row\n"
        f"  dropped  {dropped.sum():>9,}  the last row that they began could not be filled\n"
        f"  tokens: {packed['cropped']:.2%} in no row, {packed['continued']:.1%} in a row that "
        "does not show their document's beginning"
    )


def preview_text(files: TextFiles, reader: RowReader, tokenizer: Any) -> None:
    """Of pretraining: files and validation, the account of the first shard, the first rows."""
    sizes = [path.stat().st_size for path in files.train]
    print0(f"text: {len(files.train)} files, {filesize.decimal(sum(sizes))} on disk")
    for path, size in zip(files.train[:MOST_FILES], sizes):
        print0(f"  {size / max(1, sum(sizes)):>6.1%}  {path.name}")
    if len(files.train) > MOST_FILES:
        print0(f"  and {len(files.train) - MOST_FILES} more")
    print0(f"validation: {files.validation}")
    print0("the shard that is read first: " + text_account(*reader.plan(0), reader.row_len))
    print_rows(reader, tokenizer)


def preview_conversations(
    mixture: TaskMixture,
    source: ConversationSource,
    reader: RowReader,
    tokenizer: Any,
    validation: str,
) -> None:
    """Of mid and SFT: the mixture's shares, the account of its conversations, the first rows."""
    print0(mixture.describe(source.counts))
    print0(f"{source.account()}\nvalidation: {validation}")
    _, plan = reader.plan(0)
    filled = source.counts[:, 1].sum() / (len(plan) * reader.row_len)
    print0(f"rows: {len(plan):,} of {reader.row_len:,} tokens, {1 - filled:.1%} padding")
    print_rows(reader, tokenizer)


def preview_problems(
    task: Task, val_task: Task | None, tokenizer: Any, seq_len: int, max_new_tokens: int
) -> None:
    """Of RL: how many problems, how long they are, and a few of them with a right answer."""
    prompts = [tokenizer.render_for_completion(task[i]) for i in range(len(task))]
    lengths = np.array([len(prompt) for prompt in prompts])
    long = int((lengths + max_new_tokens > seq_len).sum())
    held_out = len(val_task) if val_task is not None else 0
    print0(f"problems: {task.name} 100%; {len(task):,} kept, 0 dropped, {held_out:,} held out")
    print0(
        f"prompts: {np.median(lengths):.0f} tokens in the middle, {lengths.max()} at most; with "
        f"--max_new_tokens={max_new_tokens} replies, {long:,} are longer than the {seq_len:,} "
        "tokens of the model's rows"
    )
    for i in range(min(NUM_ROWS, len(task))):
        print0(f"\n--- problem {i}: {lengths[i]} tokens, none of them trained on")
        print0(shorten(tokenizer.decode(prompts[i])) + marked("what the model itself replies"))
        ids, _ = tokenizer.render_conversation(task[i])
        print0(f"--- a right answer: {shorten(tokenizer.decode(ids[len(prompts[i]) :]))}")


def preview_corpus(files: TextFiles, doc_cap: int, max_chars: int) -> None:
    """Of tokenizer training, which knows no rows: the documents that it counts, the first few."""
    docs = cut = chars = 0
    for text in iter_texts(files.train, keep=files.keep_train):
        if chars >= max_chars:
            break
        taken = text[: min(doc_cap, max_chars - chars)]
        docs, cut, chars = docs + 1, cut + (len(taken) < len(text)), chars + len(taken)
        if docs <= NUM_ROWS:
            print0(f"\n--- document {docs - 1}: {len(text):,} characters\n{marked(shorten(taken))}")
    print0(f"\ntext: {len(files.train)} files; validation, never read: {files.validation}")
    print0(
        f"{docs:,} documents of {chars:,} characters are kept, {cut:,} of them cropped to "
        f"--doc_cap={doc_cap:,} characters; what comes after --max_chars={max_chars:,} is dropped"
    )
