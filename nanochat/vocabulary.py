"""
What a byte-level BPE tokenizer is, as data.

A `Vocabulary` holds the four things that decide every id: the split pattern, the byte string of
every token with its rank (its id; a lower rank is merged earlier), the special tokens, and whether
text is normalized first. Text becomes ids by tiktoken's rule: a piece that is a token is that
token; in any other piece, of all neighbours that together are a token, those of the lowest rank
become one, the leftmost first, until there are none.

Floor 0: imports only common. The files it is kept in: nanochat/tokenizer_files.py. What runs it:
nanochat/tokenizer.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import AnyStr

from nanochat.common import UserError, fingerprint

# GPT-4's pattern, with at most 2 digits in a group instead of 3: fewer tokens are spent on numbers,
# which matters in a small vocabulary. The one place where it is written: training hands it on.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# The highest ids of the vocabulary, in this order. Text never encodes to them.
SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document, the only separator in pretraining
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the python tool ...
    "<|python_end|>",
    "<|output_start|>",  # ... and this is what the tool printed
    "<|output_end|>",
)


@dataclass(frozen=True)
class Vocabulary:
    """Everything that decides which ids a text becomes."""

    pattern: str
    """The regular expression that cuts text into pieces; no token crosses a cut."""
    ranks: dict[bytes, int]
    """Bytes of every ordinary token -> its id, which is also its merge priority."""
    specials: dict[str, int]
    """Special tokens -> their ids, all above the ordinary ones."""
    normalization: str | None = None
    """"NFC" if text is brought into that Unicode form first (Qwen), else None."""

    def __post_init__(self) -> None:
        if missing := [b for b in range(256) if bytes([b]) not in self.ranks]:
            raise UserError(
                f"not a byte-level vocabulary: {len(missing)} of the 256 bytes have no token"
            )
        if sorted(self.ranks.values()) != list(range(len(self.ranks))):
            raise UserError("the ids of the vocabulary's ordinary tokens are not 0, 1, 2, ...")
        ids = sorted(self.specials.values())
        if len(set(ids)) != len(ids) or (ids and ids[0] < len(self.ranks)):
            raise UserError(f"the special tokens' ids are not unique and above {len(self.ranks)}")

    @property
    def size(self) -> int:
        """Number of ids, special tokens included."""
        return max([len(self.ranks) - 1, *self.specials.values()]) + 1

    def fingerprint(self) -> str:
        """A hex string that changes whenever any text could encode differently."""
        tokens = sorted(self.ranks, key=self.ranks.__getitem__)
        specials = sorted(self.specials.items(), key=lambda item: item[1])
        header = json.dumps([self.pattern, self.normalization, specials])
        return fingerprint(header, *tokens)

    @classmethod
    def from_merges(cls, tokens: list[bytes]) -> Vocabulary:
        """Our own vocabulary: learned tokens in order of rank, then SPECIAL_TOKENS."""
        ranks: dict[bytes, int] = {}
        for token in tokens:
            # In theory two merges can spell the same bytes; only the first would ever be used
            ranks.setdefault(token, len(ranks))
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        return cls(SPLIT_PATTERN, ranks, specials)


def merge_pair(token: AnyStr, ranks: dict[AnyStr, int]) -> tuple[AnyStr, AnyStr] | None:
    """The two tokens whose merge makes `token`; None if merges never make it.

    There is one such pair at most, wherever the token's bytes stand: what is merged inside of them
    does not depend on what is around, as long as nothing merges across their ends. Bytes may be
    spelled as characters, one for each."""
    never = len(ranks)
    parts = [token[i : i + 1] for i in range(len(token))]
    made = [ranks.get(token[i : i + 2], never) for i in range(len(token) - 1)]  # by parts i, i + 1
    while len(parts) > 2:
        rank = min(made)
        if rank == never:
            return None
        at = made.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del made[at]
        for i in (at - 1, at):
            if 0 <= i < len(made):
                made[i] = ranks.get(parts[i] + parts[i + 1], never)
    return parts[0], parts[1]
