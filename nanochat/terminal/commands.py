"""
What begins with a slash: the commands of the chat in the terminal.

    outcome = run_command(chat, "/temp 0.9")      # Outcome(note="temperature 0.9")

A command is one row of COMMANDS. Text that begins with something else, `/etc/passwd` or `//clear`,
is said to the model (`message_of`). Floor 4.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from nanochat.common import UserError
from nanochat.sampling import Sampling
from nanochat.terminal.chat import Chat
from nanochat.terminal.keyboard import unwrap

KEYS = """\
Enter sends. Alt+Enter (or Esc, then Enter) begins a new line; so does Enter after a backslash, and
between \"\"\" and \"\"\". Up and down go through what was typed before, Ctrl-R searches it. Ctrl-C
stops a reply or clears the line, on an empty line it ends the program; so do Ctrl-D and /quit.
A message that begins with a slash is typed with two."""

# What /set changes, and how it is read; `stop` is text as it stands.
SETTINGS: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_tokens": int,
    "seed": int,
    "stop": str,
}
assert SETTINGS.keys() <= {field.name for field in fields(Sampling)}


@dataclass(frozen=True)
class Outcome:
    """What a command comes to: a note for the user, and what is to be asked of the model now."""

    note: str = ""
    ask: str = ""


@dataclass(frozen=True)
class Command:
    """One command: what it takes, what it does, and the function, called with the rest of the line.
    It raises EOFError to end the program."""

    takes: str
    help: str
    run: Callable[[Chat, str], Outcome]


def is_command(text: str) -> bool:
    """Whether a message is for us rather than for the model: /word, alone or with more behind."""
    return re.match(r"/[A-Za-z]+(\s|$)|/\?\s*$", text) is not None


def message_of(text: str) -> str:
    """What is said to the model: without the marks of a block, without the second slash."""
    text = unwrap(text)
    return text[1:] if text.startswith("//") else text


def run_command(chat: Chat, text: str) -> Outcome:
    """Runs a command. UserError if there is none of that name, or if it cannot be done."""
    name, *rest = text.strip().split(maxsplit=1)
    name = {"/exit": "/quit", "/?": "/help"}.get(name.lower(), name.lower())
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"did you mean {near[0]}?" if near else "/help lists those there are."
        raise UserError(f"there is no command {name}; {meant} // begins a message with a slash")
    return COMMANDS[name].run(chat, rest[0] if rest else "")


def _clear(chat: Chat, _: str) -> Outcome:
    chat.clear()
    kept = "; the system message stays" if chat.system else ""
    return Outcome(f"(a new conversation{kept})")


def _save(chat: Chat, name: str) -> Outcome:
    return Outcome(f"(saved in {chat.save(name)})")


def _load(chat: Chat, name: str) -> Outcome:
    if not name:
        raise UserError("which file? /load FILE")
    question = chat.load(name)
    n = len(chat.turns) // 2
    count = f"{n} exchange{'' if n == 1 else 's'}"
    more = ", and a question without a reply" if question else ""
    return Outcome(f"(loaded {count}{more} from {chat.file})", question)


def _system(chat: Chat, text: str) -> Outcome:
    chat.system = unwrap(text)
    return Outcome("(the system message is set)" if chat.system else "(no system message)")


def _temp(chat: Chat, value: str) -> Outcome:
    return _set(chat, f"temperature {value}")


def _set(chat: Chat, rest: str) -> Outcome:
    """Without a value the setting is shown, without a name all of them."""
    name, *value = rest.split(maxsplit=1) or [""]
    name = {"max_new_tokens": "max_tokens"}.get(name.replace("-", "_"), name.replace("-", "_"))
    if name and name not in SETTINGS:
        raise UserError(f"there is no setting {name}; there are {', '.join(SETTINGS)}")
    if value:
        chat.sampling = _changed(chat.sampling, name, value[0])
    names = [name] if name else list(SETTINGS)
    return Outcome("\n".join(f"({n} {_shown(chat.sampling, n)})" for n in names))


def _changed(sampling: Sampling, name: str, value: str) -> Sampling:
    kind = SETTINGS[name]
    try:
        read: Any = (value,) if kind is str else kind(value)
    except ValueError as e:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} {value}: this must be {wanted}") from e
    changed = replace(sampling, **{name: read})
    changed.check()
    return changed


def _shown(sampling: Sampling, name: str) -> str:
    value = getattr(sampling, name)
    if name == "stop":
        return " ".join(map(repr, value)) or "none"
    return str(value or 0) if name == "top_k" else str(value)


def _retry(chat: Chat, _: str) -> Outcome:
    return Outcome(ask=chat.take_back())


def _help(_: Chat, __: str) -> Outcome:
    rows = [(f"{name} {command.takes}", command.help) for name, command in COMMANDS.items()]
    return Outcome("\n".join(f"{usage:<20}{text}" for usage, text in rows) + f"\n\n{KEYS}")


def _quit(_: Chat, __: str) -> Outcome:
    raise EOFError


COMMANDS = {
    "/clear": Command("", "forgets the conversation; a system message stays", _clear),
    "/retry": Command("", "asks the last question again, for another reply", _retry),
    "/save": Command("[FILE]", "writes the conversation to a jsonl file", _save),
    "/load": Command("FILE", "goes on with a saved conversation", _load),
    "/system": Command("[TEXT]", "sets the system message; without a text, removes it", _system),
    "/temp": Command("[X]", "sets the temperature; 0: always the likeliest", _temp),
    "/set": Command("[NAME X]", "sets top_p, max_tokens, ...; alone, shows them all", _set),
    "/help": Command("", "shows this", _help),
    "/quit": Command("", "ends the program", _quit),
}
