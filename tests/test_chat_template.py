"""The Jinja templates: transformers renders a conversation to the ids that we render it to."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nanochat.hf_export import write_tokenizer
from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer_files import read_default_system
from tests.qwen_template_for_tests import oracle, published
from tests.tokenizers_for_tests import ODD_TEXTS, random_texts, tiny_qwen, tiny_tokenizer

TOKENIZERS = {"nanochat": tiny_tokenizer, "qwen2.5": tiny_qwen}


def exported(tokenizer: Tokenizer, folder: Path, chat: bool = True) -> Any:
    """The tokenizer as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    write_tokenizer(folder, tokenizer, chat, sequence_len=128)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    tokenizer = TOKENIZERS[request.param]()
    return tokenizer, exported(tokenizer, tmp_path_factory.mktemp("exported") / "it")


def theirs(twin: Any, messages: Any, **options: Any) -> list[int]:
    return twin.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


def assert_same(pair: tuple[Tokenizer, Any], messages: list[dict[str, Any]]) -> None:
    """The ids of the conversation, and of the prompt of its last reply."""
    tokenizer, twin = pair
    conversation = {"messages": messages}
    ids, _ = tokenizer.render_conversation(conversation)
    assert theirs(twin, messages) == ids
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    prompt = tokenizer.render_for_completion(conversation)
    assert theirs(twin, asked, add_generation_prompt=True) == prompt


def clean(text: str) -> str:
    """A text that the template can carry: no special tokens' names, no lone seams to cross."""
    return "" if "<|" in text else text


def reply(text: str) -> str:
    """A reply that opens with a letter: see `test_the_seam_...` for the others."""
    return "A" + text


def test_a_plain_conversation(pair: tuple[Tokenizer, Any]) -> None:
    assert_same(pair, [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3+3?\n\n"},
        {"role": "assistant", "content": "It is 6, isn't it?\n"},
    ])  # fmt: skip
    assert_same(pair, [{"role": "user", "content": " Hi "}])


def test_a_system_message(pair: tuple[Tokenizer, Any]) -> None:
    for system in ("Be brief.", "\n x\n", [{"type": "text", "text": "Be "}]):
        assert_same(pair, [
            {"role": "system", "content": system},
            {"role": "user", "content": "\nHello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Bye"},
        ])  # fmt: skip


def test_parts(pair: tuple[Tokenizer, Any]) -> None:
    parts = [
        {"type": "text", "text": "Let me see: "},
        {"type": "python", "text": "12 * 7\n"},
        {"type": "python_output", "text": "84"},
        {"type": "text", "text": "It is 84."},
    ]
    asked = [{"type": "text", "text": "What is "}, {"type": "text", "text": "12 * 7?"}]
    turn = [{"role": "user", "content": asked}, {"role": "assistant", "content": parts}]
    assert_same(pair, turn)
    assert_same(pair, [*turn, *turn])
    assert_same(pair, [turn[0], {"role": "assistant", "content": parts[1:]}])


def test_many_random_conversations(pair: tuple[Tokenizer, Any]) -> None:
    rng = random.Random(0)
    texts = [t for t in map(clean, [*ODD_TEXTS, *random_texts(1, 300)]) if t]
    for _ in range(150):
        system = [{"role": "system", "content": rng.choice(texts)}] * rng.randrange(2)
        turns = []
        for _ in range(rng.randrange(1, 4)):
            turns += [
                {"role": "user", "content": rng.choice(texts)},
                {"role": "assistant", "content": reply(rng.choice(texts))},
            ]
        assert_same(pair, system + turns[: len(turns) - rng.randrange(2)])


def test_real_conversations(pair: tuple[Tokenizer, Any], shared_data: Path) -> None:
    import pyarrow.parquet as pq

    path = shared_data / "smoltalk_like" / "test-00000-of-00001.parquet"
    for messages in pq.read_table(path)["messages"].to_pylist()[:60]:
        assert_same(pair, [{key: m[key] for key in ("role", "content")} for m in messages])


def test_the_seam_before_a_chatml_reply(pair: tuple[Tokenizer, Any]) -> None:
    """What the docstring of chat_template.py says of replies that open with white space."""
    tokenizer, twin = pair
    texts = [t for t in map(clean, [*ODD_TEXTS, *random_texts(2, 500)]) if t]
    differ = []
    for text in [*texts, "\nx", " \nx", "\t\r\n", " x", "\n"]:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        ids, _ = tokenizer.render_conversation({"messages": messages})
        opening = text[: len(text) - len(text.lstrip())]
        crosses = tokenizer.chat_format == "qwen2.5" and {"\n", "\r"} & set(opening)
        if theirs(twin, messages) != ids:
            assert crosses, repr(text)
            differ.append(text)
        assert twin.decode(theirs(twin, messages)) == twin.decode(ids)
    assert ("\nx" in differ) == (tokenizer.chat_format == "qwen2.5")


def test_a_special_tokens_name_is_the_token_there_and_text_here(
    pair: tuple[Tokenizer, Any],
) -> None:
    tokenizer, twin = pair
    for name in tokenizer.vocabulary.specials:
        messages = [{"role": "user", "content": f"a{name}b"}]
        ids, _ = tokenizer.render_conversation({"messages": messages})
        own = tokenizer.vocabulary.specials[name]
        assert theirs(twin, messages).count(own) == ids.count(own) + 1


def test_our_format_refuses_what_is_no_conversation(pair: tuple[Tokenizer, Any]) -> None:
    """ChatML, as published, writes whatever roles it is given."""
    import jinja2

    if pair[0].chat_format != "nanochat":
        return
    hello = {"role": "user", "content": "Hi"}
    for wrong in ([hello, {"role": "tool", "content": "4"}], [hello, {**hello, "role": "system"}]):
        with pytest.raises(jinja2.TemplateError, match=wrong[1]["role"]):
            pair[1].apply_chat_template(wrong)


# ---- ChatML beside the template that Qwen2.5 is published with -----------------------------------

TOOLS = [{"type": "function", "function": {"name": "clock", "description": "It's <now> & 1 è"}}]


def text_of(twin: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return twin.apply_chat_template(messages, tokenize=False, **options)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any, Any]:
    """(ours, transformers with our template, transformers with the published one)"""
    folder = tmp_path_factory.mktemp("chatml")
    tokenizer = tiny_qwen()
    return tokenizer, exported(tokenizer, folder / "it"), oracle(tokenizer, folder)


def random_reply(rng: random.Random, texts: list[str]) -> list[dict[str, str]]:
    """Parts in any order, a text first so that the seam is not met."""
    kinds = ["text", *(rng.choice(["text", "python", "python_output"]) for _ in range(5))]
    return [{"type": kind, "text": reply(rng.choice(texts))} for kind in kinds]


def test_chatml_in_parts_is_our_rendering(chatml: tuple[Tokenizer, Any, Any]) -> None:
    tokenizer, twin, _ = chatml
    rng = random.Random(3)
    texts = ["", "x y", "12\n", *filter(None, map(clean, random_texts(3, 100)))]
    for _ in range(100):
        parts = random_reply(rng, texts)
        turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": parts}]
        assert_same((tokenizer, twin), turn + turn)
        system = [{"role": "system", "content": "Be brief."}] * rng.randrange(2)
        ids, _ = tokenizer.render_conversation({"messages": system + turn, "tools": TOOLS})
        assert theirs(twin, system + turn, tools=TOOLS) == ids


def test_chatml_is_the_published_template(chatml: tuple[Tokenizer, Any, Any]) -> None:
    """For what both take: text, calls, tool messages, offered tools, a second system message."""
    _, twin, original = chatml
    rng = random.Random(4)
    texts = ["x y", " 12\n", "\n'\\", *filter(None, random_texts(4, 100))]
    for _ in range(100):
        messages = [{"role": "system", "content": rng.choice(texts)}] * rng.randrange(2)
        for _ in range(3):
            messages += [
                {"role": "user", "content": rng.choice(texts)},
                {"role": "assistant", "content": random_reply(rng, texts)},
            ]
        messages = published(messages)
        messages.insert(rng.randrange(1, 4), {"role": "system", "content": "Later."})
        for options in ({}, {"tools": TOOLS}, {"add_generation_prompt": True}):
            assert text_of(twin, messages, **options) == text_of(original, messages, **options)


@pytest.mark.parametrize(
    "system", ["You are a helpful assistant.", 'Don\'t say \\n.\nSay "\u2028{}".']
)
def test_the_default_system_prompt_comes_along_and_back(system: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_qwen().vocabulary, system)
    twin = exported(tokenizer, tmp_path / "it")
    assert_same((tokenizer, twin), [{"role": "user", "content": "Hi"}])
    ids, _ = tokenizer.render_conversation({"messages": [{"role": "user", "content": "Hi"}]})
    assert system in tokenizer.decode(ids)
    assert read_default_system(tmp_path / "it") == system
