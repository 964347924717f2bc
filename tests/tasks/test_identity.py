"""Conversations about the model itself: form, variety, and nothing that the description denies."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nanochat import flags
from nanochat.common import UserError, read_jsonl
from nanochat.conversation import check_conversation
from nanochat.primer.persona import TRAITS
from nanochat.tasks import identity
from nanochat.tasks.common import get_task
from nanochat.tasks.custom import load_own, mentions
from nanochat.tasks.identity import Description, conversation, generate, listed, sentences, topics
from nanochat.tasks.identity_words import FOLLOW_UPS, OTHERS, QUESTIONS, REPLIES
from nanochat.tasks.mixture import build_mixture
from tests.tasks.data_for_tests import write_jsonl

ADA = Description(
    "Ada", "a friendly robot voice", "the library of Selby",
    ("I am cheerful.", "I like old maps.", "My favourite colour is green."),
    ("find books", "explain words"), ("lift a shelf",),
    (("Where is the library?", "In Bridge Street 4."), ("What is your origin?", "Ada is local.")),
)  # fmt: skip
BARE = Description("Zed", "a program", "", (), (), ())


def spoken(row: dict[str, Any], role: str) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == role]


@pytest.mark.parametrize("of", [ADA, BARE, Description()], ids=["Ada", "bare", "default"])
def test_conversations_are_well_formed_and_say_what_is_expected(of: Description) -> None:
    for split in ("train", "test"):
        rows = generate(of, split, 400)
        for row in rows:
            check_conversation(row, "row")
            for message in row["messages"]:
                text = message["content"]
                assert "{" not in text and "  " not in text and text == text.strip()
                assert ".." not in text and "I can ." not in text and "cannot ." not in text
            replies = spoken(row, "assistant")
            assert 1 <= len(replies) <= 5 and all(r[0].isupper() or r[0] == "n" for r in replies)
            if "expected" in row:
                assert mentions(replies[-1], row["expected"]), row
        assert split == "train" or all("expected" in row for row in rows)


def test_they_vary(base_dir: Path) -> None:
    rows = generate(Description(), "train", 1_000)
    assert len(rows) == 1_000
    asked = ["\n".join(spoken(row, "user") + spoken(row, "system")) for row in rows]
    assert len(set(asked)) == 1_000
    turns = Counter(len(spoken(row, "user")) for row in rows)
    assert set(turns) >= {1, 2, 3, 4} and turns[1] < 700
    firsts = Counter(spoken(row, "user")[0] for row in rows)
    assert len(firsts) > 500 and firsts.most_common(1)[0][1] < 30
    assert len({reply for row in rows for reply in spoken(row, "assistant")}) > 60
    assert 10 < sum(bool(spoken(row, "system")) for row in rows) < 150
    wordings = [q for w in QUESTIONS.values() for q in w.plain + w.more if "{" not in q]
    text = "\n".join(asked)
    assert sum(q in text for q in wordings) > 0.95 * len(wordings)


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert generate(ADA, "train", 50) == generate(ADA, "train", 50)
    assert generate(ADA, "train", 50) != generate(ADA, "train", 50, seed=7)
    assert generate(ADA, "train", 50) == generate(ADA, "train", 500)[:50]


def test_what_is_tested_was_not_asked_in_training() -> None:
    for of in (ADA, Description()):
        trained = {q for row in generate(of, "train", 3_000) for q in spoken(row, "user")}
        test = [q for row in generate(of, "test", 500) for q in spoken(row, "user")]
        assert len(test) > 40 and not trained & set(test)
        assert not [q for q in test if any(q in longer for longer in trained)]
    for wordings in QUESTIONS.values():
        every = [*wordings.plain, *wordings.more, *wordings.held_out]
        assert len(every) == len(set(every)) and wordings.held_out
    follow_ups = {ask for asks in FOLLOW_UPS.values() for ask in asks}
    assert not follow_ups & {ask for w in QUESTIONS.values() for ask in w.held_out}


def test_nothing_contradicts_the_description() -> None:
    """No other name, maker, kind or skill than the one described; every reply can be told apart."""
    names = re.compile(r"(?:I am called|name is|call me|This is|I am) ([A-Z]\w+)")
    for of in (ADA, BARE):
        values = of.values()
        rng = Random(3)
        for _ in range(2_000):
            for reply in spoken(conversation(rng, of), "assistant"):
                assert set(names.findall(reply)) <= {of.name}, reply
                assert of.name == "nanochat" or "my name is nanochat" not in reply.lower()
                for made in re.findall(r"[^.,]* made me", reply):
                    assert of.maker and made.removeprefix(" and ").lower().endswith(
                        values["made"].lower()
                    )
                if of.maker:
                    assert "trained with nanochat" not in reply
                for can in re.findall(r"I can (?!be wrong)([^.]*)", reply):
                    assert can == values["can"]
                for cannot in re.findall(r"I cannot ([^.]*)", reply):
                    assert cannot == values["cannot"]
                for kind in re.findall(r"I am (a [^.,:]*)", reply):
                    assert kind in (of.kind, "a computer program"), reply
                claims = [f"I am {o}" for o in OTHERS] + [f"name is {o}" for o in OTHERS]
                assert not [c for c in claims if c in reply], reply
    assert topics(BARE) == [t for t in QUESTIONS if t not in ("can", "cannot")]


def test_the_same_question_never_gets_two_names_or_two_facts() -> None:
    rows = generate(ADA, "train", 3_000)
    for row in rows:
        for ask, reply in zip(spoken(row, "user"), spoken(row, "assistant"), strict=True):
            if ask.endswith("Where is the library?"):
                assert reply.endswith("In Bridge Street 4.")
            if ask.endswith("What is your origin?"):  # a fact goes before the templates
                assert reply.endswith("Ada is local.")
    text = json.dumps(rows)
    assert text.count("In Bridge Street 4.") > 50
    assert all(sentence in text for sentence in ADA.about)


def test_it_is_nobody_else_even_if_it_has_anothers_name() -> None:
    rows = generate(Description("Claude"), "train", 1_500)
    for row in rows:
        assert "Are you Claude?" not in spoken(row, "user")
        assert not [r for r in spoken(row, "assistant") if "not Claude" in r]


def test_every_reply_says_the_name() -> None:
    for topic, replies in REPLIES.items():
        assert all("{name}" in reply for reply in replies), topic
    assert set(REPLIES) == set(QUESTIONS) == set(FOLLOW_UPS)


def test_the_primer_asks_the_same() -> None:
    asked = [QUESTIONS[topic].plain for topic in ("name", "kind", "maker", "can", "size")]
    assert [trait.asks for trait in TRAITS] == asked


def test_words() -> None:
    assert sentences(" I am glad.  I like tea! I know 3.5 things ") == (
        "I am glad.", "I like tea!", "I know 3.5 things.",
    )  # fmt: skip
    assert sentences("") == ()
    assert [listed(x) for x in ((), ("a",), ("a", "b"), ("a", "b", "c"))] == [
        "", "a", "a and b", "a, b and c",
    ]  # fmt: skip


# ---- the task and the command


def run(*argv: str) -> None:
    identity.main(flags.parse(identity.Args, list(argv)))


def test_the_task_speaks_for_nanochat_unless_there_is_a_file(base_dir: Path) -> None:
    task = get_task("identity", "test")
    assert 40 < len(task) <= 100
    replies = [task[i]["messages"][-1]["content"] for i in range(len(task))]
    assert all(task.evaluate(task[i], reply) for i, reply in enumerate(replies))
    assert not task.evaluate(task[0], "I am ChatGPT.")
    run("--name=Ada", "--maker=the library of Selby")
    task = get_task("identity", "train")
    assert len(task) == 1_000
    assert not [c for c in task if "nanochat" in json.dumps(c["messages"])]
    assert len(build_mixture("identity*2")) == 2_000


def test_the_file_serves_as_own_data(base_dir: Path) -> None:
    out = base_dir / "ada.jsonl"
    facts = write_jsonl(base_dir / "facts.jsonl", [{"question": "Tea?", "answer": "Yes, please."}])
    described = ["--name=Ada", "--about=I like maps.", "--can=", f"--facts={facts}", "--rows=200"]
    run(*described, f"--out={out}")
    rows = [row for _, row in read_jsonl(out)]
    assert len(rows) == 200 and "Yes, please." in json.dumps(rows)
    assert len(load_own(str(out)).train) > 150 and len(build_mixture(f"{out}@50*2")) == 100
    before = out.read_bytes()
    run(*described, f"--out={out}")  # the same: nothing to overwrite
    assert out.read_bytes() == before
    with pytest.raises(UserError, match=r"ada\.jsonl holds something else; .*--overwrite"):
        run("--name=Bob", f"--out={out}")
    assert out.read_bytes() == before
    run("--name=Bob", f"--out={out}", "--overwrite", "--rows=30")
    assert len(list(read_jsonl(out))) == 30


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--name= "], "--name is empty"),
        (["--name=Ada", "--kind="], "--kind is empty"),
        (["--name=Ada", "--about=I sing. Ada likes tea."], "'Ada likes tea.' is not what .* first"),
        (["--name=Ada", "--rows=0"], "--rows=0 must be at least 1"),
    ],
)
def test_what_it_could_not_say_is_refused(argv: list[str], error: str, base_dir: Path) -> None:
    with pytest.raises(UserError, match=error):
        run(*argv)
    bad = write_jsonl(base_dir / "facts.jsonl", [{"question": "Tea?"}])
    with pytest.raises(UserError, match=r'facts\.jsonl:1: expected "question" and "answer"'):
        run("--name=Ada", f"--facts={bad}")
    assert not (base_dir / "task_data").exists()
