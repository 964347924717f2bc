"""
Who the model is: conversations about itself, made from a short description, without a network.

    python -m nanochat.tasks.identity --name=Ada --maker="the library of Selby" \
        --about="I am cheerful. I like old maps." --can="find books|explain words"

This writes task_data/identity/{train,test}.jsonl, which is what the task `identity` of the default
mixtures then reads; without such files it speaks for nanochat itself. --out=ada.jsonl writes one
file, for --data or --mixture. The same description and seed give the same bytes.

Every reply is one of a few sentences with the description filled in, so none can contradict it; the
questions, their wordings, and how a talk runs are what varies. The primer's small model is asked
the same plain questions (nanochat/primer/persona.py). docs/identity.md says how to use it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from nanochat import flags
from nanochat.common import UserError, atomic_write, get_base_dir, print0, seed_from
from nanochat.conversation import Conversation, Message
from nanochat.tasks.common import Row, Rows, read_rows, split_files
from nanochat.tasks.custom import Custom
from nanochat.tasks.identity_words import (
    FOLLOW_UPS,
    GREETINGS,
    OPENERS,
    OTHERS,
    PERSON_NAMES,
    QUESTIONS,
    REPLIES,
    SYSTEMS,
    WRONG_NAMES,
)

SIZES = {"train": 1_000, "test": 100}  # as many as karpathy/nanochat's file of identities has
FOLDER = "identity"  # in task_data/
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")  # not in a number, 3.5
_FIRST_PERSON = re.compile(r"\b(?:I|I'm|my|me|mine|we|our|us)\b", re.IGNORECASE)


# -------------------------------------------------------------------------------------------------
# The description


@dataclass(frozen=True)
class Description:
    """What is known of the model. `about` are sentences that it says of itself, word for word."""

    name: str = "nanochat"
    kind: str = "a small language model"
    maker: str = ""  # "" is honest: nobody said who
    about: tuple[str, ...] = ()
    can: tuple[str, ...] = ("answer questions", "calculate", "spell words")
    cannot: tuple[str, ...] = ("see or hear", "look things up on the internet")
    facts: tuple[tuple[str, str], ...] = ()  # (question, answer), word for word

    def __post_init__(self) -> None:
        for flag in ("name", "kind"):
            if not getattr(self, flag).strip():
                raise UserError(f"--{flag} is empty: say what the model is to call itself")
        for sentence in self.about:
            if not _FIRST_PERSON.search(sentence):
                raise UserError(
                    f"--about: {sentence!r} is not what the model can say of itself word for "
                    'word; write in the first person, as in "I like old maps."'
                )

    def values(self) -> dict[str, str]:
        """What the templates of replies are filled in with."""
        itself = "the program of that name" if self.name.lower() == "nanochat" else "nanochat"
        made = f"{self.maker} made me" if self.maker else f"I was trained with {itself}"
        return {
            "name": self.name, "kind": self.kind, "made": made, "Made": _capital(made),
            "can": listed(self.can), "cannot": listed(self.cannot, "or"),
        }  # fmt: skip


def sentences(text: str) -> tuple[str, ...]:
    """ "I am glad. I like tea!" -> its two sentences; one without an end gets a full stop."""
    found = filter(None, _SENTENCE_END.split(text.strip()))
    return tuple(s if s[-1] in ".!?\"')" else f"{s}." for s in found)


def listed(items: Sequence[str], word: str = "and") -> str:
    """("read", "write", "count") -> "read, write and count"."""
    return f" {word} ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# -------------------------------------------------------------------------------------------------
# Conversations

# What was asked, what is replied, what a right reply must say ("": nothing that could be judged)
Turn = tuple[str, str, str]


def topics(of: Description) -> list[str]:
    """What it can be asked about: of what the description does not say, nothing is made up."""
    said = {"can": of.can, "cannot": of.cannot}
    return [topic for topic in QUESTIONS if said.get(topic, True)]


def question_turn(rng: Random, of: Description, topic: str, test: bool = False) -> Turn:
    """A question about one topic. With `test`, in a wording that no training conversation has."""
    wordings = QUESTIONS[topic]
    ask = rng.choice(wordings.held_out if test else wordings.plain + wordings.more)
    values = of.values()
    if topic == "other":
        values["other"] = rng.choice([o for o in OTHERS if o.lower() != of.name.lower()])
        ask = ask.format(**values)
    for fact, answer in of.facts:
        if ask == fact:  # what is known word for word goes before what is made of templates
            return ask, answer, answer
    reply = _capital(rng.choice(REPLIES[topic]).format(**values))
    if topic == "about" and of.about:
        count = rng.randint(1, min(3, len(of.about)))
        chosen = sorted(rng.sample(range(len(of.about)), count))  # in their order
        reply = " ".join([reply, *(of.about[i] for i in chosen)])
    return ask, reply, of.name


def _opened(rng: Random, turn: Turn, of: Description) -> Turn:
    """The turn with something said before its question, and sometimes before its reply."""
    ask, reply, expected = turn
    pick = rng.random()
    if pick < 0.4:
        return turn
    if pick < 0.8:
        return rng.choice(OPENERS) + ask, reply, expected
    person = rng.choice([p for p in PERSON_NAMES if p.lower() != of.name.lower()])
    opening = rng.choice(("Hi, I am {p}. ", "Hello, my name is {p}. ", "{p} here. "))
    return opening.format(p=person) + ask, f"Hello {person}! {reply}", expected


def _greeting(rng: Random, which: int) -> Turn:
    asks, replies = GREETINGS[which]
    return rng.choice(asks), rng.choice(replies), ""


def _insisted(rng: Random, of: Description) -> Turn:
    """Somebody says that it is another, and it stays who it is."""
    other = rng.choice([o for o in OTHERS if o.lower() != of.name.lower()])
    values = {**of.values(), "other": other}
    ask = rng.choice(WRONG_NAMES).format(**values)
    return ask, rng.choice(REPLIES["other"]).format(**values), of.name


def conversation(rng: Random, of: Description, test: bool = False) -> Conversation:
    """One to five turns; `expected` is the name where the last reply must say it.

    With `test`, one question in a held-out wording: what is asked to measure it."""
    if test:
        return _row([question_turn(rng, of, rng.choice(topics(of)), test=True)], "")
    turns: list[Turn] = []
    if of.facts and rng.random() < 0.25:
        ask, reply = rng.choice(of.facts)
        turns.append(_opened(rng, (ask, reply, reply), of))
    order = rng.sample(topics(of), min(len(topics(of)), rng.choice((1, 1, 1, 2, 2, 3))))
    if rng.random() < 0.15:
        turns.insert(0, _greeting(rng, 0))
    for topic in order[: 3 - len(turns)]:
        turn = question_turn(rng, of, topic)
        if turns and FOLLOW_UPS[topic] and rng.random() < 0.5:
            turn = (rng.choice(FOLLOW_UPS[topic]), *turn[1:])
        turns.append(turn if turns else _opened(rng, turn, of))
    if rng.random() < 0.12:
        turns.append(_insisted(rng, of))
    if len(turns) < 4 and rng.random() < 0.15:
        turns.append(_greeting(rng, rng.choice((2, 3))))
    system = rng.choice(SYSTEMS) if rng.random() < 0.05 else ""
    return _row(turns, system)


def _row(turns: Sequence[Turn], system: str) -> Conversation:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for ask, reply, _ in turns:
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
    expected = turns[-1][2]
    return {"messages": messages, **({"expected": expected} if expected else {})}


def generate(of: Description, split: str, size: int, seed: int = 42) -> list[Row]:
    """Up to `size` conversations that all ask something different; fewer if there are no more.

    Those of "test" are one question each, which is not asked in training, and can be judged."""
    rng = Random(seed_from("identity", seed, split))
    found: dict[str, Row] = {}
    for _ in range(20 * size):
        row = conversation(rng, of, split == "test")
        asked = "\n".join(m["content"] for m in row["messages"] if m["role"] != "assistant")
        found.setdefault(asked, row)
        if len(found) == size:
            break
    return list(found.values())


# -------------------------------------------------------------------------------------------------
# The task


def load(split: str, **slicing: Any) -> Custom:
    """Own conversations in task_data/identity/, else generated ones that speak for nanochat."""
    files = split_files(get_base_dir() / "task_data" / FOLDER, split)
    if files:
        return Custom(read_rows(files), **slicing)
    rows = generate(Description(), split, SIZES[split])
    return Custom(Rows([(f"identity {split}", rows, None)]), **slicing)


# -------------------------------------------------------------------------------------------------
# The command


@dataclass
class Args:
    """Write conversations about the model itself, from a short description."""

    name: str
    """What the model is called."""
    about: str = ""
    """Sentences that it says of itself, in the first person."""
    kind: str = Description.kind
    """What it is, with its article."""
    maker: str = ""
    """Who made it; empty: it says that it was trained with nanochat."""
    can: str = "|".join(Description.can)
    """What it can do, as verbs, joined by |; empty: it does not say."""
    cannot: str = "|".join(Description.cannot)
    """What it cannot do, likewise."""
    facts: str | None = None
    """A jsonl file of {"question", "answer"}: what it is to answer word for word."""
    rows: int = SIZES["train"]
    """Training conversations at most: all ask something different."""
    test_rows: int = SIZES["test"]
    """Test conversations at most, where --out is a folder."""
    seed: int = 42
    """Another seed gives other conversations."""
    out: str | None = None
    """A file, or a folder for train.jsonl and test.jsonl; default: task_data/identity/ in
    $NANOCHAT_BASE_DIR, where the default mixtures find it."""
    overwrite: bool = False
    """Replace files that hold something else."""


def description_of(args: Args) -> Description:
    """The description that the flags give. UserError if the model could not say it."""

    def split(text: str) -> tuple[str, ...]:
        return tuple(item.strip() for item in text.split("|") if item.strip())

    facts: list[tuple[str, str]] = []
    if args.facts is not None:
        rows = read_rows([Path(args.facts)])
        for i in range(len(rows)):
            pair = tuple(rows[i].get(key) for key in ("question", "answer"))
            if not all(isinstance(text, str) and text.strip() for text in pair):
                raise UserError(f'{rows.where(i)}: expected "question" and "answer", found {pair}')
            facts.append((str(pair[0]), str(pair[1])))
    return Description(
        args.name.strip(), args.kind.strip(), args.maker.strip(), sentences(args.about),
        split(args.can), split(args.cannot), tuple(facts),
    )  # fmt: skip


def main(args: Args) -> None:
    """Writes the file, or both, and shows the first conversation."""
    for flag in ("rows", "test_rows"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag}={getattr(args, flag)} must be at least 1")
    of = description_of(args)
    out = Path(args.out) if args.out else get_base_dir() / "task_data" / FOLDER
    wanted = {out: ("train", args.rows)}
    if out.suffix != ".jsonl":
        wanted = {out / f"{split}.jsonl": (split, size)
                  for split, size in (("train", args.rows), ("test", args.test_rows))}  # fmt: skip
    contents = {}
    for path, (split, size) in wanted.items():
        rows = generate(of, split, size, args.seed)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if path.exists() and path.read_bytes() != text and not args.overwrite:
            raise UserError(f"{path} holds something else; name another --out, or say --overwrite")
        contents[path] = (rows, text)
    for path, (rows, text) in contents.items():
        with atomic_write(path) as f:
            f.write(text)
        print0(f"{path}: {len(rows):,} conversations")
    first = next(iter(contents.values()))[0][0]
    print0("\n".join(f"  {m['role']}: {m['content']}" for m in first["messages"]))


if __name__ == "__main__":
    flags.run(main, Args)
