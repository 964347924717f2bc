"""
Conversations: facts asked, the model itself, and free talk of one to four turns that mixes it all.

Every conversation carries `expected`: a string, or several, one of which the last reply must say.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from nanochat.primer.persona import SORRY, TRAITS, outside_question
from nanochat.primer.relation import Relation, forms
from nanochat.primer.relations import FACTS, RELATIONS, about, question
from nanochat.primer.split import held_out_chat
from nanochat.primer.stories import story
from nanochat.primer.sums import arithmetic, arithmetic_parts
from nanochat.primer.world import ANIMALS, COUNTRIES, DAYS, JOBS, MONTHS, capitalised
from nanochat.tasks.identity_words import GREETINGS

Content = str | list[dict[str, str]]
# What was asked, what is replied, what must appear in the reply
Turn = tuple[str, Content, str | list[str]]

_FOLLOW_UPS = {
    "capital": ("And what is its capital?", "What is its capital?", "Which capital does it have?"),
    "continent": ("And where is it?", "On which continent is it?"),
    "language": ("And which language do people speak there?", "What do people speak there?"),
    "sound": ("And what does it say?", "What sound does it make?"),
    "home": ("And where does it live?", "Where does it live?"),
    "food": ("And what does it eat?", "What does it eat?"),
    "young": ("And what is a young one called?", "What is a young one called?"),
    "workplace": ("And where is the work place?", "Where is the work done?"),
    "product": ("And what is made?", "What comes out of the work?"),
    "tool": ("And which tool is needed?", "Which tool is used?"),
}
_YES_NO = {
    "capital": "Is {v} the capital of {x}?",
    "continent": "Is {x} in {v}?",
    "language": "Do people in {x} speak {v}?",
    "sound": "Does {a} say {v}?",
    "food": "Does {a} eat {v}?",
    "colour": "Is {x} {v}?",
    "opposite": "Is {v} the opposite of {x}?",
    "product": "Does {a} make {v}?",
}
_ABOUT = (
    "Tell me about {a}.",
    "What do you know about {a}?",
    "Tell me something about {a}.",
    "What can you tell me about {a}?",
    "Please tell me about {a}.",
    "Write about {a}.",
    "I want to hear about {a}.",
    "Tell me all about {a}.",
)
_STORY = (
    "Tell me a story about {a}.",
    "Please tell me a story about {a}.",
    "Write a story about {a}.",
    "I would like a story about {a}.",
    "Can you tell me a story about {a}?",
    "Do you know a story about {a}?",
    "Write a short story about {a}.",
    "Tell a short story about {a}.",
)
_THINGS = {"country": tuple(COUNTRIES), "animal": tuple(ANIMALS), "job": tuple(JOBS)}


_PLURALS = {"animals": "animal", "countries": "country", "jobs": "job"}


def conversation(*turns: Turn) -> dict[str, Any]:
    """The turns as a conversation; `expected` is what the last one must say."""
    messages: list[dict[str, Any]] = []
    for ask, reply, _ in turns:
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "expected": turns[-1][2]}


def fact_turn(rng: Random, relation: Relation, x: str, test: bool = False) -> Turn:
    """A fact asked, in a training wording or with `test` in a held-out one."""
    answer = relation.state(relation.answer, x)
    return question(rng, relation, x, test), answer, relation.facts[x]


def fact_conversation(rng: Random, test: bool = False) -> dict[str, Any]:
    """One question about one fact of the world."""
    relation, x = rng.choice(FACTS)
    return conversation(fact_turn(rng, relation, x, test))


def self_conversation(rng: Random, test: bool = False) -> dict[str, Any]:
    """A question about the model, or one about something outside its world (half of each).

    Tests ask about the model in held-out wordings, and about held-out names and topics."""
    if rng.random() < 0.5:
        return conversation((outside_question(rng, test), rng.choice(SORRY), "sorry"))
    trait = rng.choice(TRAITS)
    ask = rng.choice(trait.new_asks if test else trait.asks)
    greeting = rng.choice(("", "", "Hello! ", "Hi! ", "Good morning! ", "Please: "))
    return conversation((greeting + ask, rng.choice(trait.replies), "nanochat"))


def thing(rng: Random) -> tuple[str, str, str]:
    """A country, animal or job: (kind, name, name with its article where it takes one)."""
    kind = rng.choice(("country", "animal", "animal", "job"))
    x = rng.choice(_THINGS[kind])
    return kind, x, x if kind == "country" else forms(x)["a"]


def _about_turn(rng: Random) -> list[Turn]:
    """ "Tell me about France.": all that is known, in the canonical sentences."""
    kind, x, a = thing(rng)
    relations = about(kind, x)
    reply = " ".join(r.state(r.answer, x) for r in relations)
    ask = rng.choice(_ABOUT).format(a=a)
    return [(ask, reply, relations[0].facts[x])]


def _story_turn(rng: Random) -> list[Turn]:
    animal = rng.choice(list(ANIMALS))
    return [(rng.choice(_STORY).format(a=forms(animal)["a"]), story(rng, animal), animal)]


def _follow_up_turns(rng: Random) -> list[Turn]:
    """A fact, then another one about "it"."""
    kind, x, _ = thing(rng)
    first, second = rng.sample(about(kind, x), 2)
    ask = rng.choice(_FOLLOW_UPS[second.name])
    answer = second.state(second.answer, x)
    return [fact_turn(rng, first, x), (ask, answer, second.facts[x])]


def _check_turn(rng: Random) -> list[Turn]:
    """ "Is Paris the capital of Spain?": yes or no, and the fact as it is."""
    relation = rng.choice([r for r in RELATIONS if r.name in _YES_NO])
    x = rng.choice(list(relation.facts))
    true = relation.facts[x]
    false = rng.choice([v for v in dict.fromkeys(relation.facts.values()) if v != true])
    said, word = (true, "Yes") if rng.random() < 0.5 else (false, "No")
    ask = capitalised(_YES_NO[relation.name].format(**forms(x), v=said))
    return [(ask, f"{word}. {relation.state(relation.answer, x)}", word)]


def _sum_turn(rng: Random) -> list[Turn]:
    ask, expression, result, reply = arithmetic(rng)
    return [(ask, arithmetic_parts(expression, result, reply), str(result))]


def _list_turn(rng: Random) -> list[Turn]:
    """Counting, days, months, and three of a kind."""
    pick = rng.random()
    if pick < 0.5:
        start = rng.randint(1, 30)
        end = start + rng.randint(2, 7)
        ask = rng.choice(("Count from {} to {}.", "Please count from {} to {}."))
        numbers = ", ".join(map(str, range(start, end + 1)))
        return [(ask.format(start, end), numbers, numbers)]
    if pick < 0.6:
        what, names = rng.choice((("days of the week", DAYS), ("months of the year", MONTHS)))
        ask = rng.choice(("Say the {}.", "What are the {}?", "Tell me the {}.", "List the {}."))
        return [(ask.format(what), ", ".join(names) + ".", ", ".join(names))]
    plural = rng.choice(list(_PLURALS))
    things = _THINGS[_PLURALS[plural]]
    ask = rng.choice(("Name three {}.", "Tell me three {}.", "Can you name three {}?"))
    three = rng.sample(things, 3)
    reply = capitalised(f"{three[0]}, {three[1]} and {three[2]}.")
    return [(ask.format(plural), reply, list(things))]


def _greeting_turn(rng: Random, which: int) -> Turn:
    asks, replies = GREETINGS[which]
    # A word that every reply to this greeting has
    sign = ("hello", "well", "welcome", "goodbye")[which]
    return rng.choice(asks), rng.choice(replies), sign


_MIDDLES: tuple[tuple[Callable[[Random], list[Turn]], int], ...] = (
    (_about_turn, 20),
    (_story_turn, 15),
    (_follow_up_turns, 25),
    (_check_turn, 20),
    (_list_turn, 10),
    (_sum_turn, 5),
)


def chat_conversation(rng: Random, test: bool = False) -> dict[str, Any]:
    """Free talk. What the user says between greetings is in training or in tests, never in both."""
    makers = [(m, w) for m, w in _MIDDLES if not (test and m is _sum_turn)]  # sums have own tests
    while True:
        turns = rng.choices([m for m, _ in makers], [w for _, w in makers])[0](rng)
        if held_out_chat([ask for ask, _, _ in turns]) == test:
            break
    if rng.random() < 0.3:
        turns.insert(0, _greeting_turn(rng, rng.choice((0, 0, 1))))
    if not test and rng.random() < 0.25:
        turns.append(_greeting_turn(rng, rng.choice((2, 3))))
    if not test and rng.random() < 0.1:
        turns = [_greeting_turn(rng, rng.randrange(4))]
    return conversation(*turns)
