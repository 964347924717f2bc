"""
Conversations for training: rendered, masked, and held in memory as the one shard that they are.

What is longer than a row is cut after a reply, and every conversation is accounted for: kept, cut
or dropped, and why. Floor 2.25.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.dataloader import Source
from nanochat.packing import Documents


class ConversationSource(Source):
    """Conversations of a task or mixture, rendered and masked, held in memory as one shard.

    One that is longer than a row ends with the last reply that fits as a whole; if not even the
    first does, in that reply, where the row is full. It is dropped only if no reply begins in the
    row: nothing in it would be trained on."""

    cut = False  # rows are padded

    def __init__(self, task: Any, tokenizer: Any, row_len: int) -> None:
        # (conversations, 3) int64: its tokens, those in a row (0: dropped), those trained on
        self.counts = np.zeros((len(task), 3), dtype=np.int64)
        self.cut_in_turn = np.zeros(len(task), dtype=bool)  # not between two turns, but in one
        self.num_unseen = 0  # tokens that would be trained on, had the rows room for them
        ids_list, trained_list, lengths = [], [], []
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
        for i in range(len(task)):
            conversation = task[i]
            ids, mask = tokenizer.render_conversation(conversation)
            trained = tokenizer.trained_mask(ids, mask)
            end = len(ids)
            if end > row_len:
                whole_turns = turns_that_fit(conversation, tokenizer, row_len)
                end = whole_turns or row_len
                self.cut_in_turn[i] = not whole_turns
                self.num_unseen += sum(trained[end:])
            self.counts[i, 0] = len(ids)
            ids, trained = ids[:end], trained[:end]
            if not any(trained):  # nothing to learn from: it would only take room
                continue
            self.counts[i, 1:] = len(ids), sum(trained)
            ids_list.append(np.asarray(ids, dtype=dtype))
            trained_list.append(np.asarray(trained, dtype=np.uint8))
            lengths.append(len(ids))
        if not lengths:
            raise UserError(
                f"none of {len(task)} conversations has a trained token among its first {row_len}; "
                "raise --max_seq_len or use other data"
            )
        self.documents = Documents(
            np.concatenate(ids_list),
            np.cumsum([0, *lengths], dtype=np.int64),
            np.concatenate(trained_list),
        )
        digest = hashlib.sha256(self.documents.ids.tobytes())
        digest.update(self.documents.offsets.tobytes())
        digest.update(self.documents.trained.tobytes())  # type: ignore[union-attr]
        self.fingerprint = digest.hexdigest()[:16]
        self.row_len = row_len

    def account(self) -> str:
        """How many conversations were kept, cut and dropped, and why, in a few sentences."""
        whole, shown, trained = self.counts.T
        dropped, long = shown == 0, whole > self.row_len
        cut = ~dropped & long
        in_turn = (cut & self.cut_in_turn).sum()
        said = [f"conversations: {(~dropped).sum():,} kept, {dropped.sum():,} dropped"]
        if cut.any():
            said.append(
                f"of those kept, {cut.sum():,} are cut to {self.row_len:,} tokens (--max_seq_len): "
                f"{cut.sum() - in_turn:,} after a reply, {in_turn:,} in their first"
            )
        if dropped.any():
            said.append(
                f"those dropped have nothing to learn from ({(dropped & long).sum():,}: the "
                f"assistant's first word comes after the cut; {(dropped & ~long).sum():,}: it says "
                "nothing)"
            )
        if self.num_unseen:
            share = self.num_unseen / (self.num_unseen + trained.sum())
            said.append(f"{share:.1%} of what the assistant says has no room in the rows")
        return "; ".join(said)

    def num_shards(self) -> int:
        return 1

    def load(self, shard: int) -> Documents:
        return self.documents


def turns_that_fit(conversation: Any, tokenizer: Any, room: int) -> int:
    """Tokens of a conversation up to the end of the last reply that ends within `room` tokens; 0 if
    none does. The beginning of a conversation is rendered as it is within the whole."""
    messages, fitting = conversation["messages"], 0
    for end, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        length = len(tokenizer.render_conversation({**conversation, "messages": messages[:end]})[0])
        if length > room:
            break
        fitting = length
    return fitting
