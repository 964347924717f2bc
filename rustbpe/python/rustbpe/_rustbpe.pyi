from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Encoder", "Tokenizer", "__version__"]

__version__: str

@final
class Tokenizer:
    """A byte-level BPE tokenizer that can be trained.

    Ids 0 to 255 are the bytes; each merge adds one id. Before training the vocabulary is the
    bytes alone and the pattern is empty. Threads may share a tokenizer.
    """

    def __init__(self) -> None: ...
    def train_from_iterator(
        self,
        iterator: Iterable[Any],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        progress: Callable[[str, int, int], object] | None = None,
    ) -> None:
        """Learns up to ``vocab_size - 256`` merges from the texts of ``iterator``.

        An item is a ``str``, or an Arrow array of strings (pyarrow), which is many texts and costs
        no Python object for each.

        ``buffer_size`` strings are taken at a time, then counted on all cores with the GIL
        released. ``pattern`` cuts the text into pieces (default: GPT-4's); text that it does not
        match is dropped. A vocabulary smaller than asked for comes out of a corpus that has no
        more pairs. Ctrl-C works throughout, and after any exception the tokenizer is as before.

        ``progress(phase, done, total)`` is called about once a second and at the end of each phase,
        on the calling thread: ``("count", bytes counted so far, 0)``, then ``("merge", merges
        learned, merges wanted)``. What it raises stops the training and comes through.

        Raises ``ValueError`` (vocab_size below 256, buffer_size below 1, an invalid pattern, a
        lone surrogate), ``TypeError`` (an item that is no str; its index is named), and whatever
        the iterator raises.
        """

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``; the same as tiktoken's with our ranks and pattern."""

    def batch_encode(self, texts: Iterable[str]) -> list[list[int]]:
        """The token ids of every text, in order, computed on all cores."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``.

        Raises ``ValueError`` for an unknown id, and its subclass ``UnicodeDecodeError`` where the
        bytes are no UTF-8 (a character cut in half).
        """

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """Every token's bytes and id, by id: ``dict()`` of it is what ``tiktoken`` wants."""

    def get_pattern(self) -> str:
        """The split pattern; empty before training."""

    @property
    def vocab_size(self) -> int:
        """256 plus the number of merges."""

@final
class Encoder:
    """A fixed vocabulary: token for token what tiktoken gives, in batches, on all cores.

    ``mergeable_ranks`` and ``pattern`` are what ``tiktoken.Encoding`` takes. The patterns of
    GPT-2, cl100k, o200k, Qwen2.5 and nanochat are cut by hand-written scanners, any other by a
    regex engine. Special tokens are ordinary text here. Threads may share an encoder.

    Raises ``ValueError`` for an invalid pattern, ranks that are not 0, 1, 2, ..., or a byte without
    a token, and ``TypeError`` for a key that is not bytes.
    """

    def __init__(self, mergeable_ranks: dict[bytes, int], pattern: str) -> None: ...
    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``. A lone surrogate becomes U+FFFD."""

    def encode_batch(
        self, texts: Any, prepend: int | None = None
    ) -> tuple[NDArray[np.uint16] | NDArray[np.uint32], NDArray[np.int64]]:
        """``(ids, offsets)`` of an iterable of ``str`` or of an Arrow array of strings.

        Text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``, ``prepend`` first if given. ids is uint16
        where all ids fit, else uint32. Both arrays are read-only. Raises ``TypeError`` (an item
        that is no str, or a null; its index is named).
        """

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
