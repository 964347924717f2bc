"""
The files that a vocabulary is kept in: tokenizer.json, and a lone tokenizer.pkl of somebody else's.

A `tokenizer.json` is Hugging Face's format, which the rest of the world loads. Ours is written so
that `tokenizers` gives the same ids; another's (Qwen2.5's, GPT-2's, Llama 3's, conversions of GPT-4
and GPT-4o) is read where tiktoken will give the ids that `tokenizers` gives, and refused by the
name of what stands in the way where it would not. In one thing we differ on purpose: a special
token's name inside a text is an ordinary text here, and becomes the special token there. What a
post-processor adds (Llama 3's <|begin_of_text|>) is for callers to add.

A `tokenizer.pkl` is read without running anything it contains. Floor 0, above vocabulary.py.
"""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path
from typing import Any

from nanochat.common import UserError, read_json
from nanochat.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN, Vocabulary, merge_pair


def read_vocabulary(directory: str | Path) -> Vocabulary:
    """Reads a folder's tokenizer.json, or, if there is none, its tokenizer.pkl."""
    directory = Path(directory)
    if (directory / "tokenizer.json").exists():
        return read_tokenizer_json(directory / "tokenizer.json")
    if (directory / "tokenizer.pkl").exists():
        return read_tokenizer_pkl(directory / "tokenizer.pkl")
    raise UserError(f"{directory} holds no tokenizer.json")


def read_default_system(directory: str | Path) -> str | None:
    """What a folder's ChatML template (chat_template.jinja, or in tokenizer_config.json) says where
    a conversation has no system message; None if there is none. Qwen2.5's base, instruct and math
    models differ in it."""
    path, own_file = (Path(directory) / n for n in ("tokenizer_config.json", "chat_template.jinja"))
    template = read_json(path).get("chat_template") if path.exists() else None
    if own_file.exists():  # where transformers 5 puts it
        template = own_file.read_text(encoding="utf-8")
    found = isinstance(template, str) and _SYSTEM_LITERAL.search(template)
    return (
        ast.literal_eval(found[0]).split("\n", 1)[1].removesuffix("<|im_end|>\n") if found else None
    )


# A Jinja string, which is spelled as Python's; up to the end of the turn, else it is not all of it
_SYSTEM_LITERAL = re.compile(
    r"""(['"])<\|im_start\|>system\\n(?:(?!\1)[^\\\n]|\\[^\n])+?<\|im_end\|>\\n\1"""
)


# ---- how bytes are spelled -----------------------------------------------------------------------


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in tokenizer.json.

    JSON cannot hold raw bytes. GPT-2's convention (openai/gpt-2, encoder.py): the printable
    Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def _spell(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[b] for b in token)


def _unspell(spelled: str) -> bytes:
    try:
        return bytes(CHAR_TO_BYTE[char] for char in spelled)
    except KeyError as e:
        raise UserError(f"the token {spelled!r} does not spell bytes: no byte-level BPE") from e


# ---- writing -------------------------------------------------------------------------------------


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The vocabulary in Hugging Face's format, ready for json.dump."""
    ranks = vocabulary.ranks
    tokens = sorted(ranks, key=ranks.__getitem__)
    pairs = [merge_pair(token, ranks) for token in tokens if len(token) > 1]
    specials = sorted(vocabulary.specials.items(), key=lambda item: item[1])
    vocab = {_spell(token): ranks[token] for token in tokens}
    if vocabulary.size > len(tokens) + len(specials):
        # `tokenizers` numbers added tokens one after the other; only those it finds here may skip
        vocab |= dict(specials)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": name, **plain, "special": True} for name, id in specials
        ],
        "normalizer": vocabulary.normalization and {"type": vocabulary.normalization},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, {**byte_level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # Whether a piece that is a token is looked up first. Older readers do not know it, so
            # it is asked for only where it matters: if there are tokens that merges never make
            "ignore_merges": None in pairs,
            "vocab": vocab,
            # Not ["a", "b"], which older readers do not know; a spelled token has no space
            "merges": [f"{_spell(pair[0])} {_spell(pair[1])}" for pair in pairs if pair],
        },
    }


# ---- reading -------------------------------------------------------------------------------------


def read_tokenizer_json(path: Path) -> Vocabulary:
    """Reads a byte-level BPE from a Hugging Face tokenizer.json, ours or another's.

    UserError, by the name of the feature, for what would give other ids here than there."""
    config = read_json(path)
    try:
        return _parse(config)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path} is not the tokenizer.json of a byte-level BPE: {e!r}") from e


def _parse(config: dict[str, Any]) -> Vocabulary:
    model = config["model"]
    if model.get("type", "BPE") != "BPE":  # GPT-2's file is older than the field
        raise UserError(f"the model is {model['type']!r}, only BPE can be read")
    # unk_token, fuse_unk and byte_fallback may be what they like: with a token for every byte,
    # which Vocabulary asks for, nothing is ever unknown
    for where, option in (
        (model, "dropout"),
        (model, "continuing_subword_prefix"),
        (model, "end_of_word_suffix"),
        (config, "truncation"),
        (config, "padding"),
    ):
        if where.get(option):
            raise UserError(f"{option} is {where[option]!r}, which cannot be followed")
    specials = _parse_added_tokens(config.get("added_tokens") or [], model["vocab"])
    # Some files list the special tokens in the vocabulary too, unspelled
    spelled = {token: id for token, id in model["vocab"].items() if token not in specials}
    vocabulary = Vocabulary(
        _parse_pattern(config.get("pre_tokenizer") or {"type": "null"}),
        {_unspell(token): id for token, id in spelled.items()},
        specials,
        _parse_normalizer(config.get("normalizer")),
    )
    _check_merges(model, spelled)
    return vocabulary


def _parse_added_tokens(added: list[dict[str, Any]], vocab: dict[str, int]) -> dict[str, int]:
    """Names and ids of the added tokens, special or not: no text becomes one of them here."""
    specials: dict[str, int] = {}
    for token in added:
        name, id = token["content"], token["id"]
        # Qwen2.5's <tool_call> is not "special" there, but no text either
        if not token["special"] and not re.fullmatch(r"<[^\s<>]+>", name):
            raise UserError(f"the added token {name!r} is not special: text would become it")
        if token["lstrip"] or token["rstrip"]:
            raise UserError(f"the added token {name!r} swallows white space (lstrip, rstrip)")
        theirs = vocab.get(name, max([len(vocab) - 1, *specials.values()]) + 1)
        if id != theirs:
            raise UserError(
                f"the added token {name!r} has the id {id}, but `tokenizers` numbers it {theirs}; "
                "an id after a gap must be in the model's vocab too"
            )
        specials[name] = id
    return specials


def _check_merges(model: dict[str, Any], spelled: dict[str, int]) -> None:
    """Raises UserError unless the merges of the file give the ids that tiktoken gives.

    `tokenizers` merges the pairs of a list, the first in the list first; tiktoken any neighbours
    that together are a token, the one of the lowest id first. There is only one pair that can come
    to make a token (see merge_pair), so both do the same if these pairs are in the list, in the
    order of the ids. What else is listed never comes up (Llama 3's file has every way to cut a
    token in two). Left are the tokens that no merge makes, which tiktoken and `ignore_merges` find
    where a whole piece is such a token."""
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    places = {merge: place for place, merge in enumerate(merges)}
    last = -1
    for token in sorted(spelled, key=spelled.__getitem__):
        if len(token) == 1:
            continue
        pair = merge_pair(token, spelled)
        if pair is None:
            if not model.get("ignore_merges"):
                raise UserError(f"no merges make the token {token!r}, and ignore_merges is off")
            continue
        place = places.get(" ".join(pair))
        if place is None:
            raise UserError(f"the merges lack {pair}, of which tiktoken makes a token")
        if place < last:
            raise UserError(f"the merges are not in the order of the ids: {pair} comes too early")
        last = place


# ---- the split pattern ---------------------------------------------------------------------------

# As OpenAI published it; what ByteLevel does by itself
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT4_PATTERN = (  # Llama 3's too
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_PATTERN = GPT4_PATTERN.replace("{1,3}", "")
GPT4O_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTION
    + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _CONTRACTION + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip

# Their matches together are the text, whatever it is: nothing lies between them
KNOWN_PATTERNS = {SPLIT_PATTERN, GPT2_PATTERN, GPT4_PATTERN, QWEN_PATTERN, GPT4O_PATTERN}

# What means the same to `tokenizers` (Oniguruma, Ruby's syntax) and to tiktoken (Rust's). Not so,
# for example, $ (end of a line or of the text), {1,3}+ (greedy or possessive), \w, most of (?i:...)
_CHARACTER = r"\\[rntsS.\-/\\] | \\[pP]\{[LMNPSZC][a-z]?\}"
_SAME_PATTERN = re.compile(
    rf"""(?x) (?: (?: {re.escape(_CONTRACTION)} | {re.escape("'(?i:[sdmt]|ll|ve|re)")}
    | \(\?[:=!] | \) | \| | {_CHARACTER} | [^\\\[\](){{}}^$.|?*+]
    | \[\^? (?: {_CHARACTER} | \\[\[\]] | (?!--) [^\\\[\]&^~] )+ \]
    ) (?: [?*+][?+]? | \{{\d+(?:,\d*)?\}} (?![?+]) )? )*"""
)


def _parse_pattern(pre_tokenizer: dict[str, Any]) -> str:
    """The split pattern of a pre-tokenizer that is a regular expression and then bytes."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise UserError(
            f"the pre_tokenizer is {' and '.join(kinds)}, only ByteLevel, or Split and ByteLevel, "
            "can be followed"
        )
    byte_level = steps[-1]
    own_split = byte_level.get("use_regex", True)  # ByteLevel by itself splits as GPT-2 does
    if byte_level["add_prefix_space"]:
        raise UserError("add_prefix_space is on: a space before every text cannot be followed")
    if own_split != (len(steps) == 1):
        raise UserError(f"ByteLevel's use_regex is {own_split} in {' and '.join(kinds)}")
    return GPT2_PATTERN if own_split else _parse_split(steps[0])


def _parse_split(split: dict[str, Any]) -> str:
    """The pattern of a Split, such that its matches are the pieces that `tokenizers` makes."""
    pattern = split["pattern"].get("Regex")
    if not pattern or not (pattern in KNOWN_PATTERNS or _SAME_PATTERN.fullmatch(pattern)):
        raise UserError(f"the split pattern {split['pattern']} may mean another thing to tiktoken")
    if split["behavior"] == "Isolated":
        # What lies between the matches is a piece there, and nothing to tiktoken: we match it too
        end = r")[\s\S])+"
        covers = pattern in KNOWN_PATTERNS or pattern.endswith(end)
        return pattern if covers else rf"{pattern}|(?:(?!{pattern}{end}"
    if (split["behavior"], split["invert"]) == ("Removed", True) and pattern in KNOWN_PATTERNS:
        return pattern  # what lies between the matches, which is nothing, is removed
    raise UserError(f"Split's behavior {split['behavior']}, invert {split['invert']}")


def _parse_normalizer(normalizer: dict[str, Any] | None) -> str | None:
    steps = [normalizer] if normalizer else []
    if normalizer and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    kinds = [step["type"] for step in steps]
    if kinds not in ([], ["NFC"]):
        raise UserError(
            f"the normalizer is {' and '.join(kinds)}, only NFC or none can be followed"
        )
    return "NFC" if kinds else None


# ---- a lone tokenizer.pkl ------------------------------------------------------------------------


class _PickledEncoding:
    """Stands in for tiktoken.Encoding while unpickling: keeps its state, runs none of its code."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    """Admits the one name that a pickled tiktoken.Encoding contains, and nothing else.

    Since protocol 3 (Python's default is higher) such a pickle is that class, made without
    arguments, and a state of plain str, bytes, int and dict. Any other name, os.system say, is
    refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _PickledEncoding
        raise UserError(f"it wants to load {module}.{name}, and only a tiktoken.Encoding is let in")


def read_tokenizer_pkl(path: Path) -> Vocabulary:
    """Takes the vocabulary out of a pickled tiktoken.Encoding; UserError for anything else."""
    try:
        with open(path, "rb") as f:
            encoding = _EncodingUnpickler(f).load()
        if not isinstance(encoding, _PickledEncoding) or not isinstance(encoding.state, dict):
            raise UserError("it does not hold a tiktoken.Encoding")
        state = encoding.state
        ranks = {bytes(token): int(rank) for token, rank in state["mergeable_ranks"].items()}
        specials = {str(name): int(id) for name, id in state["special_tokens"].items()}
        if not set(SPECIAL_TOKENS) <= specials.keys():
            # A Qwen tokenizer would need NFC, and an Encoding cannot say so
            raise UserError("its special tokens are not nanochat's; other tokenizers need a .json")
        return Vocabulary(str(state["pat_str"]), ranks, specials)
    except Exception as e:  # a broken pickle can raise nearly anything
        raise UserError(f"{path} is refused: {e}") from e
