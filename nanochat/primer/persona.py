"""
Who the model says it is, how it greets, and how it says that it does not know.

As in relation.py, what is held out for tests stands beside what is trained on: wordings of
questions about the model itself, and names and topics outside the world.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from nanochat.primer.relation import WRAPPERS, forms
from nanochat.primer.relations import RELATIONS
from nanochat.primer.split import held_out_word
from nanochat.primer.world import (
    OTHER_ANIMALS,
    OTHER_COUNTRIES,
    OTHER_JOBS,
    OTHER_TOPICS,
    SYLLABLES,
    capitalised,
)
from nanochat.tasks.identity_words import QUESTIONS


@dataclass(frozen=True)
class Trait:
    """Something people ask the model about itself. Every reply says its name."""

    asks: tuple[str, ...]
    new_asks: tuple[str, ...]
    replies: tuple[str, ...]


_REPLIES = {
    "name": (
        "I am nanochat, a small language model.",
        "My name is nanochat. I am a small language model.",
    ),
    "kind": (
        "I am nanochat, a computer program. I am not a person.",
        "I am not a person. I am nanochat, a small language model.",
    ),
    "maker": (
        "I am nanochat. Somebody trained me on this computer in a few minutes.",
        "Somebody made me on a computer with nanochat, from a small book of text.",
    ),
    "can": (
        "I am nanochat. I can calculate, spell words and tell you about my small world.",
        "I am nanochat. Ask me about countries, animals, jobs, words or numbers.",
    ),
    "size": (
        "I am nanochat, a very small model. I know only a little.",
        "I am nanochat. I am very small, and so is my world.",
    ),
}
TRAITS: tuple[Trait, ...] = tuple(
    Trait(QUESTIONS[topic].plain, QUESTIONS[topic].held_out, replies)
    for topic, replies in _REPLIES.items()
)

SORRY = (
    "I am sorry, I do not know that. My world is small.",
    "Sorry, that is outside my small world.",
    "I am sorry, I have not learned about that.",
)

_TOPIC_QUESTIONS = (
    "Tell me about {t}.",
    "What do you know about {t}?",
    "What do you think about {t}?",
    "Can you explain {t}?",
    "I have a question about {t}.",
    "Explain {t} to me.",
    "What is new about {t}?",
    "Who knows most about {t}?",
    "How does it work with {t}?",
    "Write a text about {t}.",
    "What can you tell me about {t}?",
)
_SUBJECTS = {"country": OTHER_COUNTRIES, "animal": OTHER_ANIMALS, "job": OTHER_JOBS}


def made_up_name(rng: Random, test: bool) -> str:
    """A name of nothing, "Velmor": training and test names are different."""
    while True:
        name = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3))))
        if held_out_word(name) == test:
            return name.capitalize()


def outside_question(rng: Random, test: bool = False) -> str:
    """A question about a name or a topic that is not in the world, in a training wording.

    What is new in a test question is the name itself."""
    if rng.random() < 0.3:
        topic = rng.choice(OTHER_TOPICS[1 if test else 0])
        return rng.choice(_TOPIC_QUESTIONS).format(t=topic)
    relation = rng.choice([r for r in RELATIONS if r.subject in _SUBJECTS])
    if relation.subject == "country" and rng.random() < 0.4:
        x = made_up_name(rng, test)
    else:
        x = rng.choice(_SUBJECTS[relation.subject][1 if test else 0])
    templates = [t for t in relation.asks + relation.clauses if "{xs}" not in t]
    template = rng.choice(templates)
    if rng.random() < 0.15:  # so that "Tell me about" and a name can end both ways
        return f"Tell me about {forms(x)['x' if relation.subject == 'country' else 'a']}."
    text = template.format(**forms(x))
    return capitalised(text) if template in relation.asks else rng.choice(WRAPPERS).format(c=text)
