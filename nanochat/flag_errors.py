"""
What is wrong with a command line, in one sentence.

    check_words(Args, words)              # before tyro: values of another kind than their flag's
    unknown(Args, command, words, rest)   # after it: words that no flag took
    refused(Args, command, words, box)    # instead: flags and values that are missing
    check_values(args)                    # at last: numbers that no command could work with

tyro shows its errors as a box of several lines, with the help of each flag that comes close. What
went wrong is in the flags' types and the words typed; only which flags are missing is read from
the box, which is shown as it is where there is something in it that nobody foresaw. Floor 0.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from nanochat.common import UserError

SHARES = ("warmdown_ratio", "final_lr_frac", "mfu")
ABOVE_ZERO = ("timeout", "rank_timeout", "network", "chars_per_token", "num_epochs")
# What a flag of these names may be, in whichever command; its default too, which may be -1
LEAST = {
    **dict.fromkeys(["num_iterations", "total_batch_size", "device_batch_size", "max_seq_len"], 1),
    **dict.fromkeys(["max_new_tokens", "num_samples", "batch_size", "vocab_size"], 1),
    **dict.fromkeys(["examples_per_step", "nproc_per_node", "eval_tokens"], 1),
    **dict.fromkeys(["temperature", "top_k", *SHARES], 0),
}


@dataclass(frozen=True)
class Flag:
    """What one flag takes."""

    name: str
    numbers: list[type] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    is_switch: bool = False
    subcommand: str = ""  # the word after which alone it is known

    @property
    def kind(self) -> str:
        """In words: "a whole number or auto"; "" if it takes any text."""
        number = "a number" if float in self.numbers else "a whole number" if self.numbers else ""
        *rest, last = [word for word in (number, *self.choices) if word] or [""]
        return f"{', '.join(rest)} or {last}" if rest else last


def _flags_of(args_class: type, subcommand: str = "") -> dict[str, Flag]:
    """Every flag by its spellings: with underscores and without dashes, or as "-n"."""
    found: dict[str, Flag] = {}
    hints = get_type_hints(args_class, include_extras=True)
    for one in fields(args_class):
        hint = hints[one.name]
        names = [] if _is_positional(hint) else [one.name]
        for more in getattr(hint, "__metadata__", ()):
            names += [*(getattr(more, "aliases", None) or ()), getattr(more, "name", None) or ""]
        numbers, choices = _accepted(hint)
        flag = Flag(one.name, numbers, choices, _bare(hint) is bool, subcommand)
        found.update({name: flag for name in names if name})
    for name, inner in _subcommands(args_class).items():
        if inner is not None:
            found = {**_flags_of(inner, name), **found}
    return found


def _subcommands(args_class: type) -> dict[str, type | None]:
    """The words that choose one, and the class whose flags it has."""
    found = {}
    for hint in get_type_hints(args_class, include_extras=True).values():
        for kind in get_args(_bare(hint)):
            for more in getattr(kind, "__metadata__", ()):
                inner = _bare(kind)
                found[more.name] = None if inner is type(None) else inner
    return found


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _is_positional(hint: Any) -> bool:
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def _accepted(hint: Any) -> tuple[list[type], list[str]]:
    """The kinds of number and the words that a flag of this type takes; none of either where it
    takes any text, or is a switch."""
    hint = _bare(hint)
    numbers: list[type] = []
    choices: list[str] = []
    for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]:
        if kind in (int, float):
            numbers.append(kind)
        elif get_origin(kind) is Literal:
            choices += map(str, get_args(kind))
        elif kind is type(None):
            continue
        else:
            return [], []
    return numbers, choices


def _split(word: str) -> tuple[str, bool, str]:
    """A flag as typed: its name as in _flags_of, whether a value is joined to it, and that."""
    flag, is_whole, value = word.partition("=")
    flag = flag[2:].replace("-", "_") if flag.startswith("--") else flag
    return flag, bool(is_whole), value


def check_words(args_class: type, words: Sequence[str]) -> None:
    """UserError where a flag's value is not of its kind."""
    known = _flags_of(args_class)
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        name, is_whole, value = _split(word)
        value = value if is_whole else after
        if name not in known or (not is_whole and value.startswith("--")):
            continue
        flag = known[name]
        reads = value in (*flag.choices, "None") or any(_reads(n, value) for n in flag.numbers)
        if flag.kind and not reads:
            raise UserError(f"--{flag.name}={value} must be {flag.kind}")


def _reads(kind: type, value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


def check_values(args: Any) -> None:
    """UserError for numbers that no command could do anything with, and tags that are paths: those
    would not be found again among the checkpoints."""
    for one in fields(args):
        name, value = one.name, getattr(args, one.name)
        if name == "model_tag" and value and (value[0] == "." or set(value) & set("/\\")):
            raise UserError(
                f"--{name}={value} must be the name of a folder, like my-model: no path"
            )
        if not isinstance(value, int | float) or value == one.default:
            continue
        if value < LEAST.get(name, value) or (name in SHARES and value > 1):
            least = "a share, from 0 to 1" if name in SHARES else f"at least {LEAST[name]}"
            raise UserError(f"--{name}={value:g} must be {least}; the default is {one.default}")
        # -1 of a whole number often stands for never, or for all, where it is no default
        whole = isinstance(value, int)
        if (value < (-1 if whole else 0) and name != "seed") or (value == 0 and name in ABOVE_ZERO):
            least = "above 0" if name in ABOVE_ZERO else f"0 or more{', or -1' * whole}"
            raise UserError(f"--{name}={value:g} must be {least}; the default is {one.default}")


def unknown(args_class: type, command: str, words: Sequence[str], rest: Sequence[str]) -> UserError:
    """The error for `rest`, those of the words typed that no flag took."""
    known = _flags_of(args_class)
    clauses = []
    after_flag = False  # then a word that stands alone is that flag's value
    for word in rest:
        is_flag = word.startswith("-") and not _reads(float, word)
        if is_flag:
            clauses.append(_unknown_flag(known, command, word))
        elif not after_flag:
            clauses.append(_lone_word(args_class, known, words, word))
        after_flag = is_flag and "=" not in word
    return UserError(f"{'; '.join(clauses)}. {_see(command)}")


def _unknown_flag(known: dict[str, Flag], command: str, word: str) -> str:
    name = _split(word)[0].lstrip("-").replace("-", "_")
    flag = known.get(name)
    if flag and flag.subcommand:
        return f"{word} is a flag of `{command} {flag.subcommand}`: write it after that word"
    if flag:
        return f"{word} is written with two dashes: -{word}"
    return f"{word} is not a flag of this command{_nearest(known, name)}"


def _nearest(known: dict[str, Flag], name: str) -> str:
    """What the sentence goes on with: flags that are spelled much alike, or whose names have all
    parts of this one (--batch_size: that of rows and that of tokens)."""
    names = dict.fromkeys([other.rstrip("_") for other in known if other[0] != "-"])
    names |= dict.fromkeys(["debug", "help"])
    parts = set(name.split("_"))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.7)
    near += [other for other in names if parts <= set(other.split("_")) and other not in near]
    if not near:
        return ""
    *others, last = [f"--{other}" for other in near[:5]]
    which = f"are {', '.join(others)} and {last}" if others else f"is {last}"
    return f"; the nearest {which}"


def _lone_word(args_class: type, known: dict[str, Flag], words: Sequence[str], word: str) -> str:
    for typed, after in zip(words, [*words[1:], ""], strict=False):
        name, is_whole, value = _split(typed)
        flag = known.get(name.removeprefix("no_"))
        if flag and flag.is_switch and word == (value if is_whole else after):
            off = f"--no_{flag.name}"
            return f"--{flag.name} takes no value ({word}): it switches on, {off} switches off"
    name, is_whole, _ = _split(word.replace("-", "_"))
    if is_whole and name in known:
        return f"{word} is written with two dashes: --{word}"
    if subcommands := _subcommands(args_class):
        return f"{word} is none of the commands {', '.join(subcommands)}"
    return f"{word} belongs to no flag; flags are written --name=value"


def refused(args_class: type, command: str, words: Sequence[str], box: str) -> UserError:
    """The error for what tyro says in `box`: that values or flags are missing."""
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", box).split())
    found = re.search(r"Missing value for argument '(?:\S*/)?(\S+)'", text)
    if found and (flag := _flags_of(args_class).get(_split(found[1])[0])):
        what = f"which is {flag.kind}" if flag.kind else "with the = if VALUE begins with a dash"
        return UserError(f"--{flag.name} has no value: write --{flag.name}=VALUE, {what}")
    unknown_too = text.partition("Unrecognized options:")[2].split()
    if rest := [word for word in words if word in unknown_too]:
        return unknown(args_class, command, words, rest)
    missing = _missing(args_class, text.partition(f"Missing from {command}:")[2])
    if missing:
        return UserError(f"missing: {', '.join(missing)}. {_see(command)}")
    return UserError(f"this command line is not understood:\n{box}")


def _missing(args_class: type, text: str) -> list[str]:
    """What is required, of "--out STR Folder to write. (required) ...", where the same without a
    flag goes by its place: the last ones are missing."""
    hints = get_type_hints(args_class, include_extras=True)
    lone = [name.upper() for name, hint in hints.items() if _is_positional(hint)]
    missing: list[str] = []
    for part in reversed(text.split("(required)")[:-1]):
        found = re.fullmatch(r"\s*(?:--(\S+) )?[^-\s]\S* (.*?)\.?\s*", part)
        if found is None:
            return []
        flag = found[1] and f"--{found[1].replace('-', '_')}=..."
        missing.insert(0, f"{flag or lone.pop()} ({found[2]})")
    return missing


def _see(command: str) -> str:
    return f"`{command} --help` shows all flags"
