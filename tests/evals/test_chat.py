"""Chat evaluation: what is right is counted right, whatever the batches and ranks."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.evals import chat, items
from nanochat.evals.chat import letter_ids, pick_problems, run_chat_eval
from nanochat.reply import split_reply
from nanochat.tasks.choice import MultipleChoice
from nanochat.tasks.common import Rows
from nanochat.tasks.custom import Custom
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.smoltalk import SmolTalk
from tests.evals.fakes_for_tests import LetterModel, ReplyEngine, tiny_model
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

CHOICES = [
    {"question": "q" * i, "choices": list("wxyz")[: 2 + i % 3], "answer": i % 2}
    for i in range(1, 8)
]
SUMS = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(7)]


def task_of(kind: type, rows: list[dict[str, Any]]) -> Any:
    return kind(Rows([("file", rows, None)]))


def prompt_of(tokenizer: Any, task: Any, i: int) -> tuple[int, ...]:
    return tuple(tokenizer.render_for_completion(task[i]))


# -----------------------------------------------------------------------------
# By the letter


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("make_tokenizer", [tiny_tokenizer, tiny_qwen])
def test_categorical(batch_size: int, make_tokenizer: Any) -> None:
    """The model knows all but two answers; what it says of non-letters does not count."""
    tokenizer, task = make_tokenizer(), task_of(MultipleChoice, CHOICES)
    answers = {}
    for i in range(len(task)):
        wrong = "B" if task[i]["expected"] == "A" else "A"
        answers[prompt_of(tokenizer, task, i)] = wrong if i in (2, 5) else task[i]["expected"]
    model = LetterModel(tokenizer, answers)
    result = run_chat_eval(task, model, tokenizer, batch_size=batch_size)
    assert result.n == 7
    assert result.accuracy == pytest.approx(5 / 7)
    assert result.stderr == pytest.approx((5 / 7 * 2 / 7 / 7) ** 0.5)
    assert result.chance == pytest.approx(sum(1 / len(row["choices"]) for row in CHOICES) / 7)
    assert result.ended_share is None
    assert [item["index"] for item in result.items] == list(range(7))
    assert [item["correct"] for item in result.items] == [i not in (2, 5) for i in range(7)]
    assert max(model.batches) <= batch_size
    assert result.centered == pytest.approx((5 / 7 - result.chance) / (1 - result.chance))


def test_categorical_is_the_slow_twin() -> None:
    """Padded batches of a real model against one whole forward pass for each problem."""
    tokenizer, task = tiny_tokenizer(), task_of(MultipleChoice, CHOICES)
    model = tiny_model(tokenizer.get_vocab_size())
    result = run_chat_eval(task, model, tokenizer, batch_size=4)
    for i, item in enumerate(result.items):
        with torch.no_grad():
            logits = model(torch.tensor([prompt_of(tokenizer, task, i)]))[0, -1]
        letters = task[i]["letters"]
        best = max(letters, key=lambda letter: float(logits[tokenizer.encode(letter)[0]]))
        assert item["reply"] == best


def test_long_prompts_lose_their_middle_not_their_end() -> None:
    tokenizer = tiny_tokenizer()
    task = task_of(MultipleChoice, [{"question": "x" * 900, "choices": ["a", "b"], "answer": 1}])
    ids = tokenizer.render_for_completion(task[0])
    cut = (ids[0], *ids[-511:])
    result = run_chat_eval(task, LetterModel(tokenizer, {cut: "B"}), tokenizer)
    assert result.accuracy == 1.0


def test_letters_must_be_single_tokens() -> None:
    assert len(letter_ids(tiny_tokenizer(), ["A", "B", "C"])) == 3
    with pytest.raises(UserError, match="no single token for 'qqq'"):
        letter_ids(tiny_tokenizer(), ["A", "qqq"])


# -----------------------------------------------------------------------------
# Generated


def tool_reply(text: str) -> list[dict[str, str]]:
    return [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": text},
    ]


def said_by_the_tool(text: str) -> list[dict[str, str]]:
    return [{"type": "python", "text": "1"}, {"type": "python_output", "text": text}]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("make_tokenizer", [tiny_tokenizer, tiny_qwen])
def test_generative(batch_size: int, make_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer, task = make_tokenizer(), task_of(GSM8K, SUMS)
    contents: list[list[Any]] = [
        ["#### 0", "no"],  # the first sample is right
        ["no", "so #### 2"],  # the second
        ["no", "never"],
        [tool_reply("so #### 6"), "x"],
        [said_by_the_tool("#### 8"), "x"],
        ["#### 10...", "x..."],  # right, but cut off
        ["x", "#### 1"],
    ]
    replies = {prompt_of(tokenizer, task, i): c for i, c in enumerate(contents)}
    engine, model = ReplyEngine(tokenizer, replies), tiny_model(400)
    path = tmp_path / "items.jsonl"
    result = run_chat_eval(
        task, model, tokenizer, engine, batch_size=batch_size, num_samples=2, max_new_tokens=150,
        temperature=0.7, top_k=9, items_path=path, control=True,
    )  # fmt: skip
    assert [item["correct"] for item in result.items] == [
        True,
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    assert (result.n, result.chance) == (7, 0.0)
    assert result.accuracy == pytest.approx(4 / 7)
    assert result.ended_share == pytest.approx(12 / 14)
    assert max(len(call["prompts"]) for call in engine.calls) <= batch_size
    assert {(c["temperature"], c["top_k"], c["max_tokens"]) for c in engine.calls} == {
        (0.7, 9, 150)
    }
    # A problem's seed is its own, whatever the batch
    seeds = {tuple(p): s for call in engine.calls for p, s in zip(call["prompts"], call["seed"])}
    assert len(set(seeds.values())) == 7
    # Each reply beside the next problem: "#### 2" would have been right for none but its own
    assert [item["control"] for item in result.items] == [False] * 7
    assert result.control == 0
    saved = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert saved == result.items
    assert saved[0]["prompt"] == "0+0?"
    assert saved[0]["expected"] == "0"
    assert saved[3]["replies"][0]["reply"][0] == {"type": "python", "text": "1+1"}
    assert saved[5]["replies"][0] == {"reply": "#### 10...", "correct": True, "ended": False}


def test_with_the_real_engine_batches_do_not_matter() -> None:
    tokenizer, task = tiny_tokenizer(), task_of(GSM8K, SUMS)
    model = tiny_model(tokenizer.get_vocab_size())
    results = [
        run_chat_eval(
            task, model, tokenizer, Engine(model, tokenizer), batch_size=batch_size, num_samples=2,
            max_new_tokens=12, temperature=1.0,
        )
        for batch_size in (1, 4)
    ]  # fmt: skip
    assert results[0].items == results[1].items
    assert len({str(item["replies"]) for item in results[0].items}) == 7


def test_prompt_and_reply_fit_the_context() -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"question": "x" * 300, "answer": "#### 1"}, {"question": "y", "answer": "#### 1"}]
    task, model = task_of(GSM8K, rows), tiny_model(400, sequence_len=64)
    engine = Engine(model, tokenizer)
    seen = []
    generate_batch = engine.generate_batch

    def watched(prompts: Any, **options: Any) -> Any:
        seen.append((max(map(len, prompts)), options["max_tokens"]))
        return generate_batch(prompts, **options)

    engine.generate_batch = watched  # type: ignore[method-assign]
    run_chat_eval(task, model, tokenizer, engine, batch_size=1, max_new_tokens=512)
    assert seen[0] == (32, 32)
    assert all(prompt + reply <= 64 for prompt, reply in seen)


def test_no_further_batch_is_begun_when_it_is_stopped() -> None:
    tokenizer = tiny_tokenizer()
    replies = {prompt_of(tokenizer, task_of(GSM8K, SUMS), i): ["x"] for i in range(len(SUMS))}
    engine = ReplyEngine(tokenizer, replies)

    def stopped() -> bool:
        return len(engine.calls) == 2

    result = run_chat_eval(
        task_of(GSM8K, SUMS), tiny_model(400), tokenizer, engine, batch_size=2, stopped=stopped
    )
    assert len(engine.calls) == 2 and result.n == 4
    assert engine.calls[0]["stopped"] is stopped  # a reply may be long
    model = LetterModel(tokenizer, {})
    task = task_of(MultipleChoice, CHOICES)
    run_chat_eval(task, model, tokenizer, batch_size=2, stopped=lambda: len(model.batches) == 3)
    assert len(model.batches) == 3


def test_problems_are_drawn_by_the_seed() -> None:
    assert (
        pick_problems(5, None, 1)
        == pick_problems(5, -1, 1)
        == pick_problems(5, 9, 1)
        == [0, 1, 2, 3, 4]
    )
    some = pick_problems(1000, 10, 1)
    assert some == sorted(set(some)) == pick_problems(1000, 10, 1)
    assert len(some) == 10
    assert some != pick_problems(1000, 10, 2)
    assert max(some) > 100  # not the first ones


def test_tasks_without_answers_are_refused_at_once() -> None:
    chat_rows = [{"messages": [{"role": "user", "content": "Hi"}]}]
    for kind, message in ((SmolTalk, "there to train on"), (Custom, "cannot be evaluated")):
        with pytest.raises(UserError, match=message):
            run_chat_eval(task_of(kind, chat_rows), None, tiny_tokenizer(), None)
    with pytest.raises(UserError, match="no problems"):
        run_chat_eval(task_of(GSM8K, []), None, tiny_tokenizer(), None)


# -----------------------------------------------------------------------------
# Replies


@pytest.mark.parametrize("make_tokenizer", [tiny_tokenizer, tiny_qwen])
def test_split_reply(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    content = [
        {"type": "text", "text": "So "},
        {"type": "python", "text": "2*3"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": "6.\n#### 6"},
    ]
    engine = ReplyEngine(tokenizer, {(1,): [content]})
    sequences, masks = engine.generate_batch([[1]], max_tokens=300)
    text, parts = split_reply(tokenizer, sequences[0][1:], masks[0][1:])
    assert (text, parts) == ("So 6.\n#### 6", content)
    if make_tokenizer is tiny_tokenizer:  # in ChatML the output is not told by special tokens
        assert split_reply(tokenizer, sequences[0][1:])[1] == content


def test_output_that_the_model_made_up_is_no_text() -> None:
    tokenizer = tiny_tokenizer()
    start, end = (tokenizer.encode_special(f"<|output_{x}|>") for x in ("start", "end"))
    ids = [start, *tokenizer.encode("#### 6"), end, *tokenizer.encode("no")]
    assert split_reply(tokenizer, ids, [1] * len(ids))[0] == "no"
    # A call that never ends is not text either; what follows a stop token is not looked at
    call = [tokenizer.encode_special("<|python_start|>"), *tokenizer.encode("6")]
    assert split_reply(tokenizer, call)[0] == ""
    stop = tokenizer.encode_special("<|assistant_end|>")
    assert split_reply(tokenizer, [*tokenizer.encode("a"), stop, *tokenizer.encode("b")])[0] == "a"


# -----------------------------------------------------------------------------
# Ranks


def test_two_ranks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks as two threads, with an all_gather that lets them meet."""
    me, meet, slots = threading.local(), threading.Barrier(2, timeout=60), [torch.empty(0)] * 2

    def all_gather(out: list[torch.Tensor], tensor: torch.Tensor) -> None:
        slots[me.rank] = tensor
        meet.wait()
        for mine, theirs in zip(out, slots, strict=True):
            assert mine.shape == theirs.shape
            mine.copy_(theirs)
        meet.wait()

    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.get_vocab_size())

    def evaluate() -> list[Any]:
        engine = Engine(model, tokenizer)
        sampling = {"max_new_tokens": 8, "temperature": 1.0}
        choice = run_chat_eval(task_of(MultipleChoice, CHOICES), model, tokenizer)
        sums = run_chat_eval(task_of(GSM8K, SUMS), model, tokenizer, engine, **sampling)
        return [(r.accuracy, r.n, r.chance, r.ended_share, r.items) for r in (choice, sums)]

    def as_rank(rank: int) -> list[Any]:
        me.rank = rank
        return evaluate()

    alone = evaluate()
    for module in (chat, items):
        monkeypatch.setattr(module, "rank_and_world", lambda: (me.rank, 2))
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(as_rank, range(2))) == [alone, alone]


def test_what_no_file_can_hold_does_not_end_an_evaluation(tmp_path: Path) -> None:
    """Half of a surrogate pair: text that was cut in the middle of an emoji, escaped in a jsonl."""
    tokenizer, path = tiny_tokenizer(), tmp_path / "items.jsonl"
    row = {"messages": [{"role": "user", "content": json.loads('"Hi \\ud83d"')}], "expected": "Ho"}
    task, model = task_of(Custom, [row]), tiny_model(tokenizer.get_vocab_size())
    engine = ReplyEngine(tokenizer, {prompt_of(tokenizer, task, 0): ["Ho"]})
    run_chat_eval(task, model, tokenizer, engine, items_path=path)
    assert json.loads(path.read_text(encoding="utf-8"))["prompt"] == "Hi \ufffd"


def test_gather_alone() -> None:
    assert items.gather_rows([{"a": 1}]) == [{"a": 1}]
