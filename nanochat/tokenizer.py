"""
The tokenizer: text to ids and back, conversations to ids and a mask of what the assistant wrote.

Byte-level BPE, trained by rustbpe (the crate in this repository), run by tiktoken. It knows nothing
of the model; what passes from here to a model is `get_vocab_size()`.

    python -m scripts.tok_train              # makes $NANOCHAT_BASE_DIR/tokenizer/
    tokenizer = get_tokenizer()
    ids = tokenizer.encode("Hello", prepend="<|bos|>")
    ids, mask = tokenizer.render_conversation({"messages": [...]})

The data behind it: vocabulary.py, its files: tokenizer_files.py. How conversations are written:
chat_format.py; the format follows from the special tokens of the vocabulary and does not show
outside. A vocabulary without tokens for conversations (GPT-2's) serves for plain text.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import tiktoken

from nanochat.chat_format import CHATML, NANOCHAT, Segment, chatml_format, plain_format
from nanochat.common import UserError, atomic_write, get_base_dir, warn0, write_json
from nanochat.conversation import Conversation, check_conversation
from nanochat.tokenizer_files import read_default_system, read_vocabulary, tokenizer_json
from nanochat.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN, Vocabulary

# What begins documents in vocabularies without tokens for conversations: Llama 3's, GPT-2's to 4's
PLAIN_BOS = ("<|begin_of_text|>", "<|endoftext|>", "<s>")

QWEN_REPO = "Qwen/Qwen2.5-Coder-0.5B"  # all Qwen2.5 models share one tokenizer.json (7 MB)
MOST_TOKENS = 2**21  # rustbpe's ids
# tiktoken's regex engine overflows its stack on about a million white-space characters in a row
MAX_SPACE_RUN = 500_000


class Tokenizer:
    """Runs a vocabulary. Made by `get_tokenizer`, by `Tokenizer.train`, or from a Vocabulary.

    `default_system` is what ChatML says where a conversation has no system message; None: what
    Qwen2.5's instruct models were trained with."""

    def __init__(self, vocabulary: Vocabulary, default_system: str | None = None) -> None:
        self.vocabulary = vocabulary
        specials = vocabulary.specials
        formats = [NANOCHAT, CHATML, *map(plain_format, PLAIN_BOS)]
        fitting = [c for c in formats if {c.end, *c.openers} <= specials.keys()]
        if not fitting:
            raise UserError(
                "the tokenizer's special tokens are neither nanochat's (<|bos|>, <|user_start|>, "
                "...) nor Qwen's (<|endoftext|>, <|im_start|>, <|im_end|>), nor is there one to "
                f"begin documents ({', '.join(PLAIN_BOS)}), but {', '.join(specials) or 'none'}"
            )
        self._chat = fitting[0]
        if self._chat is CHATML and default_system is not None:
            self._chat = chatml_format(default_system)
        try:
            self._encoding = tiktoken.Encoding(
                self._chat.name,
                pat_str=vocabulary.pattern,
                mergeable_ranks=vocabulary.ranks,
                special_tokens=specials,
            )
        except ValueError as e:
            raise UserError(f"the tokenizer's split pattern {vocabulary.pattern!r}: {e}") from e
        self._end = specials[self._chat.end]
        self._openers = {specials[name] for name in self._chat.openers}
        self.stop_token_ids: set[int] = {self._end, specials[self._chat.bos]}
        """Generation ends when one of these is sampled."""

    @classmethod
    def train(
        cls,
        texts: Iterable[Any],
        vocab_size: int,
        progress: Callable[[str, int, int], object] | None = None,
    ) -> Tokenizer:
        """Learns a vocabulary of `vocab_size` tokens: 256 bytes, merges, 9 special tokens.

        `texts` are str, or Arrow arrays of strings, each of which is many. `progress(phase, done,
        total)` hears about once a second how far it is: ("count", bytes of text, 0), then ("merge",
        merges learned, merges wanted).

        A corpus that offers fewer merges than asked gives a smaller vocabulary and a warning:
        models take their size from the tokenizer, so everything works with it."""
        import rustbpe  # a compiled module that only training needs

        learned, least = vocab_size - len(SPECIAL_TOKENS), 256 + len(SPECIAL_TOKENS)
        if not least <= vocab_size <= MOST_TOKENS:
            raise UserError(
                f"--vocab_size={vocab_size} must be from {least} (256 bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens) to {MOST_TOKENS}"
            )
        ours = hasattr(rustbpe, "Encoder")  # PyPI's 0.1.0 takes str only, and tells no progress
        more: dict[str, Any] = {"progress": progress} if ours else {}
        items = _training_items(texts, arrow=ours)
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(items, learned, pattern=SPLIT_PATTERN, **more)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        vocabulary = Vocabulary.from_merges([bytes(token) for token, _ in ranks])
        if vocabulary.size < vocab_size:
            warn0(
                f"the text has no more pairs to merge: the vocabulary has {vocabulary.size} "
                f"tokens, not --vocab_size={vocab_size}. More text (--data, --max_chars) gives more"
            )
        return cls(vocabulary)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json (what we load), token_bytes.pt and tokenizer.pkl (for others)."""
        import pickle  # only written, for programs that expect it

        import torch  # heavy, and running a tokenizer does not need it

        directory = Path(directory)
        with atomic_write(directory / "tokenizer.pkl") as f:
            pickle.dump(self._encoding, f)
        with atomic_write(directory / "token_bytes.pt") as f:
            torch.save(torch.from_numpy(self.token_bytes), f)
        # Last, so that whoever finds it finds a complete folder
        write_json(directory / "tokenizer.json", tokenizer_json(self.vocabulary))

    def get_vocab_size(self) -> int:
        """Number of ids. A model may have more rows (Qwen's are padded), it never has fewer."""
        return self.vocabulary.size

    def get_bos_token_id(self) -> int:
        """The id that begins every document: <|bos|>, or <|endoftext|> for Qwen."""
        return self.encode_special(self._chat.bos)

    @property
    def chat_format(self) -> str:
        """The name of the format of its conversations (chat_format.py); "plain" if it has none."""
        return self._chat.name

    @property
    def default_system(self) -> str:
        """What is said where a conversation has no system message; empty if nothing is."""
        return self._chat.default_system

    def encode_special(self, name: str) -> int:
        """The id of a special token. Our names work for Qwen too where it has such a token."""
        specials = self.vocabulary.specials
        name = name if name in specials else self._chat.aliases.get(name, name)
        if name not in specials:
            raise UserError(
                f"{name!r} is not a special token of this tokenizer: {', '.join(specials)}"
            )
        return specials[name]

    @cached_property
    def fingerprint(self) -> str:
        """Hex string of everything that decides the ids; data and checkpoints remember it."""
        return self.vocabulary.fingerprint()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: bytes of text that each id stands for, 0 for special tokens.

        What bits per byte divides by. Counted on the raw bytes: by way of str, a token that is a
        piece of a character would count as the 3 bytes of U+FFFD."""
        counts = np.zeros(self.get_vocab_size(), dtype=np.int32)
        for token, id in self.vocabulary.ranks.items():
            counts[id] = len(token)
        return counts

    # ---- text ----

    @overload
    def encode(
        self,
        text: str,
        prepend: str | int | None = None,
        append: str | int | None = None,
        num_threads: int = 8,
    ) -> list[int]: ...

    @overload
    def encode(
        self,
        text: list[str],
        prepend: str | int | None = None,
        append: str | int | None = None,
        num_threads: int = 8,
    ) -> list[list[int]]: ...

    def encode(
        self,
        text: str | list[str],
        prepend: str | int | None = None,
        append: str | int | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or of each text of a list (in `num_threads` threads).

        `prepend` and `append` add a special token, by name or id. A special token's name inside
        the text is ordinary text: no input can forge a turn."""
        before = [] if prepend is None else [self._special_id(prepend)]
        after = [] if append is None else [self._special_id(append)]
        if isinstance(text, str):
            return before + self._encode_text(text) + after
        if num_threads > 1 and len(text) > 1 and max(map(len, text)) <= MAX_SPACE_RUN:
            ready = [self._normalized(t) for t in text]
            rows = self._encoding.encode_ordinary_batch(ready, num_threads=num_threads)
        else:
            rows = [self._encode_text(t) for t in text]
        return [before + row + after for row in rows] if before or after else rows

    def encode_batch(
        self, texts: Sequence[str], prepend: str | int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets) of many texts: text i is ids[offsets[i] : offsets[i + 1]].

        The same ids as `encode`, from rustbpe on all cores, without a Python object for each.
        ids is uint16 where the vocabulary allows it, else uint32; offsets is int64, (n + 1,)."""
        dtype = np.uint16 if self.get_vocab_size() <= 2**16 else np.uint32
        if self._encoder is None:
            rows = self.encode(list(texts), prepend)
            offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
            ids = np.fromiter((id for row in rows for id in row), dtype, count=int(offsets[-1]))
            return ids, offsets
        before = None if prepend is None else self._special_id(prepend)
        ids, offsets = self._encoder.encode_batch([self._normalized(t) for t in texts], before)
        return ids.astype(dtype, copy=False), offsets

    @cached_property
    def _encoder(self) -> Any:
        """The fast way to ids, where the installed rustbpe has it (PyPI's 0.1.0 has not)."""
        try:
            from rustbpe import Encoder
        except ImportError:
            return None
        return Encoder(self.vocabulary.ranks, self.vocabulary.pattern)

    def _special_id(self, token: str | int) -> int:
        return self.encode_special(token) if isinstance(token, str) else token

    def _normalized(self, text: str) -> str:
        # By Python's Unicode, which is newer than that of Hugging Face's `tokenizers` (9.0): about
        # a hundred rare combining marks may come in another order than there
        if self.vocabulary.normalization is None or text.isascii():
            return text
        return unicodedata.normalize("NFC", text)

    def _encode_text(self, text: str) -> list[int]:
        # Lone surrogates become U+FFFD: tiktoken sees to that
        text = self._normalized(text)
        if len(text) <= MAX_SPACE_RUN:
            return self._encoding.encode_ordinary(text)
        if self._encoder is not None:
            return self._encoder.encode(text)
        pieces = _cut_long_spaces(text)
        return [id for piece in pieces for id in self._encoding.encode_ordinary(piece)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes as they stand, which need be no UTF-8 (a token may be half a character)."""
        return self._encoding._encode_bytes(data)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens by their names. Bytes that are no UTF-8 (the first
        half of a character, say) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of the ids. An id past the vocabulary, which a model with padded rows
        can sample before it has learned not to, gives U+FFFD."""
        ids = [int(id) for id in ids]
        try:
            return self._encoding.decode_bytes(ids)
        except KeyError:
            return b"".join(map(self._bytes_of, ids))

    def _bytes_of(self, id: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(id)
        except KeyError:
            return "\ufffd".encode()

    # ---- conversations ----

    def render_conversation(
        self, conversation: Conversation, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of a conversation, both cut to `max_tokens`.

        mask[i] is 1 where the assistant wrote the text of token i, tool calls included: "What is
        2+2?" answered by "4" has a single 1. Trained on is a little more, see `trained_mask`."""
        messages = check_conversation(conversation, "conversation")["messages"]
        tools = conversation.get("tools") or ()
        ids, mask = self._encode_segments(self._chat.render(messages, tools))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """Ids of a conversation up to where the assistant is to speak; a final reply is dropped."""
        messages = list(check_conversation(conversation, "conversation")["messages"])
        if messages[-1]["role"] == "assistant":
            messages.pop()
        rendered = self._chat.render(messages, conversation.get("tools") or ())
        return self._encode_segments([*rendered, *self._chat.reply_opening])[0]

    def _encode_segments(self, segments: Iterable[Segment]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        mask: list[int] = []
        for text, special, written in segments:
            new = [self.encode_special(text)] if special else self._encode_text(text)
            ids += new
            mask += [written] * len(new)
        return ids, mask

    def trained_mask(self, ids: Sequence[int], mask: Sequence[int]) -> list[int]:
        """1 for every token that a model is trained to produce: the masked ones, and the end token
        of a turn that has any. Without the latter it would never learn to stop.

        `ids` may be a whole packed row, with turns that were cut off."""
        trained = [int(m) for m in mask]
        in_reply = 0  # whether the assistant has written something in this turn
        for i, id in enumerate(ids):
            if id == self._end:
                trained[i] |= in_reply
                in_reply = 0
            elif id in self._openers:
                in_reply = 0  # the turn before was cut off without its end
            else:
                in_reply |= trained[i]
        return trained

    @cached_property
    def tool_call_ids(self) -> tuple[int, int]:
        """The tokens before and after a tool call, as the assistant writes them."""
        return self.encode_special("<|python_start|>"), self.encode_special("<|python_end|>")

    def tool_output_ids(self, text: str) -> list[int]:
        """What is to follow a tool call that printed `text`, before the assistant goes on."""
        return self._encode_segments(self._chat.tool_output(text))[0]

    @property
    def tool_call_gap(self) -> str:
        """What stands between the words of a reply and a tool call: a line feed for Qwen."""
        return self._chat.call_gap

    def read_tool_call(self, text: str) -> str:
        """The code in what the assistant wrote between the tokens of `tool_call_ids`."""
        return self._chat.read_call(text)

    def read_tool_output(self, text: str) -> str:
        """What a tool printed, from the plain text of `tool_output_ids`: Qwen's has tags there."""
        marked = "".join(s.text for s in self._chat.tool_output("\0") if not s.special)
        before, _, after = marked.partition("\0")
        return text.removeprefix(before).removesuffix(after)

    def visualize(self, ids: Sequence[int], mask: Sequence[int]) -> str:
        """The tokens side by side, for a terminal: green is trained on, red is not."""
        shown = []
        for id, trained in zip(ids, self.trained_mask(ids, mask), strict=True):
            color = "\033[32m" if trained else "\033[31m"
            text = self.decode([id]).replace("\n", "\\n")
            shown.append(f"{color}{text}\033[0m")
        return "\033[90m|\033[0m".join(shown)


def without_surrogates(text: str) -> str:
    """Lone surrogates (jsonl can smuggle them in) become U+FFFD; Rust has no such strings."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _training_items(texts: Iterable[Any], arrow: bool) -> Iterator[Any]:
    """What rustbpe is to count: str that it can take, and Arrow arrays as such if it can."""
    for item in texts:
        if isinstance(item, str):
            yield without_surrogates(item)
        elif arrow:
            yield item
        else:
            yield from item.to_pylist()


def _cut_long_spaces(text: str) -> Iterator[str]:
    """Cuts `text` inside of overlong runs of white space, and nowhere else."""
    start = 0
    for run in re.finditer(r"\s+", text):
        for cut in range(run.start() + MAX_SPACE_RUN, run.end(), MAX_SPACE_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


# ---- finding one ---------------------------------------------------------------------------------


def get_tokenizer(name_or_dir: str | Path | None = None) -> Tokenizer:
    """Loads a tokenizer.

    None: the one that scripts/tok_train.py made, in $NANOCHAT_BASE_DIR/tokenizer.
    "qwen2.5": $NANOCHAT_BASE_DIR/tokenizer_qwen2.5/tokenizer.json, fetched from the hub if missing.
    Else the name of an imported one, in $NANOCHAT_BASE_DIR/tokenizers/<name>, or a folder with a
    tokenizer.json: ours, or a byte-level BPE in Hugging Face's format."""
    if not name_or_dir:
        directory = get_base_dir() / "tokenizer"
        if not any((directory / f"tokenizer.{end}").exists() for end in ("json", "pkl")):
            raise UserError(
                f"there is no tokenizer in {directory}. Train one: python -m scripts.tok_train "
                "(or set NANOCHAT_BASE_DIR to where one is)"
            )
    elif name_or_dir == "qwen2.5":
        directory = get_base_dir() / "tokenizer_qwen2.5"
        if not (directory / "tokenizer.json").exists():
            _download_qwen(directory / "tokenizer.json")
    else:
        directory = imported_dir(str(name_or_dir)) or Path(name_or_dir)
        if not directory.is_dir():
            raise UserError(
                f"--tokenizer={name_or_dir} is neither a folder with a tokenizer.json nor qwen2.5, "
                f"nor an imported one of {get_base_dir() / 'tokenizers'}. "
                "Leave the flag out for the one that python -m scripts.tok_train made"
            )
    return Tokenizer(read_vocabulary(directory), read_default_system(directory))


def imported_dir(name: str) -> Path | None:
    """Where an imported tokenizer of that name is. Checkpoints know it by its name, so that a base
    directory can be moved."""
    directory = get_base_dir() / "tokenizers" / name
    plain = Path(name).name == name  # a folder that was named is that folder
    return directory if plain and directory.is_dir() else None


def _download_qwen(path: Path) -> None:
    """Fetches Qwen2.5's tokenizer.json into the base directory."""
    from huggingface_hub import hf_hub_download

    try:
        cached = hf_hub_download(QWEN_REPO, "tokenizer.json")
    except Exception as e:  # no network, no such host, a proxy, a full disk: all mended alike
        raise UserError(
            f"--tokenizer=qwen2.5: could not fetch tokenizer.json of {QWEN_REPO} ({e}). "
            f"Put that file at {path}"
        ) from e
    with open(cached, "rb") as source, atomic_write(path) as target:
        shutil.copyfileobj(source, target)
