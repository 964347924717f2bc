"""
The documents of pretraining: plain text about the world, in many forms.

What is stated once in one way is not learned. So every fact comes in many sentences, in both
directions, in entries, lists, stories and talks, and what the chat stages will ask for
(questions, choices, spelling, sums) is met here first as plain text.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

from nanochat.primer.chat import thing
from nanochat.primer.choice import choice, letters_document
from nanochat.primer.persona import SORRY, outside_question
from nanochat.primer.relation import forms
from nanochat.primer.relations import FACTS, RELATIONS, about, question, statement
from nanochat.primer.stories import story
from nanochat.primer.sums import arithmetic, word_problem
from nanochat.primer.words import PROMPTS, made_up_word, spell, training_words
from nanochat.primer.world import ANIMALS, BOYS, DAYS, GIRLS, MONTHS, capitalised
from nanochat.tasks.choice import LETTERS, choice_line, render_choice


def _entry(rng: Random) -> str:
    """An encyclopedia entry: all that is known of one thing, each fact in one or two sentences."""
    kind, x, a = thing(rng)
    verb = {"country": "country", "animal": "animal", "job": "job"}[kind]
    facts = [r for r in about(kind, x) for _ in range(rng.choice((1, 1, 2)))]
    rng.shuffle(facts)
    start = rng.choice((f"{a} is {'an' if verb == 'animal' else 'a'} {verb}.", "", ""))
    title = rng.choice((f"{capitalised(x)}\n\n", f"About {a}\n\n", "", ""))
    if kind == "job" and start:
        start = f"The work of {a} is a job."
    return title + " ".join(
        s for s in (capitalised(start), *(statement(rng, r, x) for r in facts)) if s
    )


def _pair(rng: Random) -> str:
    """Two things of a kind side by side."""
    kind, x, _ = thing(rng)
    y = rng.choice([y for r in about(kind, x) for y in r.facts if y != x])
    both = [r for r in about(kind, x) if y in r.facts]
    lines = []
    for r in rng.sample(both, min(len(both), rng.randint(2, 4))):
        template = rng.choice(r.says)
        lines.append(f"{r.state(template, x)} {r.state(template, y)}")
    return rng.choice((" ", "\n")).join(lines)


def _mixed(rng: Random) -> str:
    """Statements about anything, as in an exercise book."""
    lines = [statement(rng, *rng.choice(FACTS)) for _ in range(rng.randint(5, 10))]
    return rng.choice((" ", "\n")).join(lines)


def _table(rng: Random) -> str:
    """One relation for several things, as a list."""
    relation = rng.choice(RELATIONS)
    names = rng.sample(list(relation.facts), min(len(relation.facts), rng.randint(5, 9)))
    mark = rng.choice((": ", " - ", " = "))
    head = {"capital": "Capitals", "colour": "Colours", "opposite": "Opposites"}.get(relation.name)
    lines = [f"{x}{mark}{relation.facts[x]}" for x in names]
    return "\n".join([head or capitalised(relation.name), *lines])


def _questions(rng: Random) -> str:
    """Questions and answers, in the wordings and the reply sentences of the chat."""
    q, a = rng.choice((("Question: ", "Answer: "), ("Q: ", "A: "), ("", "")))
    lines = []
    for _ in range(rng.randint(4, 7)):
        if rng.random() < 0.1:
            lines.append(f"{q}{outside_question(rng)}\n{a}{rng.choice(SORRY)}")
            continue
        relation, x = rng.choice(FACTS)
        reply = relation.state(relation.answer, x)
        if rng.random() < 0.4:
            reply = f"{capitalised(relation.facts[x])}."
        lines.append(f"{q}{question(rng, relation, x)}\n{a}{reply}")
    return "\n".join(lines)


def _talk(rng: Random) -> str:
    """Two children ask each other what they know."""
    n, m = rng.sample(GIRLS + BOYS, 2)
    lines = [f"{n}: Hello, {m}!", f"{m}: Hello, {n}!"] if rng.random() < 0.4 else []
    for _ in range(rng.randint(3, 5)):
        relation, x = rng.choice(FACTS)
        lines.append(f"{n}: {question(rng, relation, x)}")
        lines.append(f"{m}: {relation.state(relation.answer, x)}")
        if rng.random() < 0.3:
            n, m = m, n
    if rng.random() < 0.4:
        lines += [f"{n}: Thank you, {m}!", f"{m}: You are welcome!"]
    return "\n".join(lines)


def _story(rng: Random) -> str:
    """A short story, sometimes with a title, sometimes with what one can learn from it."""
    animal = rng.choice(list(ANIMALS))
    title = rng.choice((f"The {animal}\n\n", f"A story about {forms(animal)['a']}\n\n", "", ""))
    facts = [statement(rng, r, animal) for r in about("animal", animal)]
    lesson = "\n\n" + " ".join(rng.sample(facts, 2)) if rng.random() < 0.5 else ""
    return title + story(rng, animal) + lesson


def _choices(rng: Random) -> str:
    """A multiple-choice question with the line of the right choice."""
    row = choice(rng)
    i, choices = row["answer"], row["choices"]
    return f"{render_choice(row['question'], choices, True)}\n{choice_line(choices[i], LETTERS[i])}"


def _spelling(rng: Random) -> str:
    """Words and their letters, in one of several layouts."""
    words = [
        made_up_word(rng) if rng.random() < 0.2 else rng.choice(training_words())
        for _ in range(rng.randint(5, 9))
    ]
    layout = rng.randrange(4)
    if layout == 0:
        return "\n".join(f"The word {w} is spelled {spell(w)}." for w in words)
    if layout == 1:
        return "\n".join(f"{rng.choice(PROMPTS).format(w=w)}\n{spell(w)}" for w in words)
    if layout == 2:
        return "\n".join(f"Spell {w}: {spell(w)}" for w in words)
    return "\n".join(f"{spell(w)} spells {w}." for w in words)


def _sums(rng: Random) -> str:
    """Exercises with what one types into the calculator."""
    lines = []
    for _ in range(rng.randint(3, 6)):
        ask, expression, result, reply = arithmetic(rng)
        lines.append(f"{ask}\nThe calculator says {expression}={result}. {reply}")
    return "\n".join(lines)


def _problem(rng: Random) -> str:
    """A word problem with its solution; the calculator's notes read "12+7=19"."""
    row = word_problem(rng)
    solution = row["answer"].replace("<<", "").replace("\n#### ", " The answer is ")
    return f"{row['question']}\n{solution.replace('>>', ' so ')}."


def _calendar(rng: Random) -> str:
    """The days and months in their order, from some day on."""
    names = rng.choice((DAYS, MONTHS))
    start = rng.randrange(len(names))
    turned = names[start:] + names[:start]
    what = "days of the week" if names is DAYS else "months of the year"
    if rng.random() < 0.5:
        return f"The {what}: {', '.join(turned)}."
    return " ".join(f"After {a} comes {b}." for a, b in pairwise(turned))


def _counting(rng: Random) -> str:
    """A row of numbers."""
    start, step = rng.randint(1, 80), rng.choice((1, 1, 1, 2, 5, 10))
    return "Count: " + ", ".join(str(start + i * step) for i in range(rng.randint(6, 12)))


_MAKERS: tuple[tuple[Callable[[Random], str], int], ...] = (
    (_entry, 12),
    (_pair, 4),
    (_mixed, 4),
    (_table, 3),
    (_questions, 12),
    (_talk, 6),
    (_story, 8),
    (_choices, 10),
    (letters_document, 30),
    (_spelling, 18),
    (_sums, 2),
    (_problem, 2),
    (_calendar, 1),
    (_counting, 1),
)


def document(rng: Random) -> str:
    """One document of a random kind, some 200 to 600 characters."""
    return rng.choices([maker for maker, _ in _MAKERS], [weight for _, weight in _MAKERS])[0](rng)
