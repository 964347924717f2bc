"""
How well a chat model does on a task, generated or by the letter.

    result = run_chat_eval(get_task("gsm8k", "test"), model, tokenizer, engine, max_problems=200)
    print(result.accuracy, "+-", result.stderr)

categorical tasks (multiple choice) take one pass: of the letters on offer, which has the highest
logit where the reply would begin. generative tasks let the model write `num_samples` replies; a
problem is solved if any of them is right. Under torch.distributed the problems are shared out, and
what is returned is the same on every rank. Floor 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from nanochat.common import UserError, is_rank0, seed_from
from nanochat.conversation import reply_text
from nanochat.distributed import barrier, rank_and_world
from nanochat.evals.control import shuffled_accuracy
from nanochat.evals.items import Item, gather_rows, write_jsonl
from nanochat.progress import Progress
from nanochat.reply import split_reply
from nanochat.tasks.common import Task


@dataclass
class EvalResult:
    """One task's outcome. Shares are 0 to 1."""

    name: str
    accuracy: float  # share of problems solved
    n: int  # problems
    stderr: float  # standard error of the accuracy
    chance: float  # accuracy of guessing
    ended_share: float | None  # replies that ended by themselves; None if none were written
    items: list[Item] = field(default_factory=list)  # every problem with its replies
    control: float | None = None
    """What the same replies score on other problems, see control.py; None if not asked for."""

    @property
    def centered(self) -> float:
        """0 at chance, 1 when everything is right."""
        return (self.accuracy - self.chance) / (1 - self.chance)


def run_chat_eval(
    task: Task,
    model: Any,
    tokenizer: Any,
    engine: Any = None,
    *,
    batch_size: int = 8,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = 50,
    max_problems: int | None = None,
    seed: int = 42,
    items_path: Path | None = None,
    control: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """Evaluates `task`, or a fixed random part of it with at most `max_problems`.

    The result depends neither on batch_size nor on the number of ranks. `items_path` gets a jsonl
    of all problems and replies. `control` judges every reply by the next problem, too. When
    `stopped()` turns true on any rank the result comes soon, and is worthless. Raises UserError for
    a task that has no right answers."""
    problems = pick_problems(len(task), max_problems, seed)
    if not problems:
        raise UserError(f"{task.name} has no problems to evaluate")
    task.evaluate(task[problems[0]], "")  # raises now, not after an hour of generation
    rank, world = rank_and_world()
    mine = [(i, task[i]) for i in problems[rank::world]]
    was_training = model.training
    model.eval()
    with Progress(len(mine), task.name, "problems") as bar:
        run = _Run(task, model, tokenizer, batch_size, bar.advance, stopped)
        if control and len(problems) > 1:
            run.other = dict(zip(problems, [*problems[1:], problems[0]]))
        if task.eval_type == "categorical":
            items = run.categorical(mine)
        else:
            longest = max(len(tokenizer.render_for_completion(task[i])) for i in problems)
            sampling = {"temperature": temperature, "top_k": top_k, "num_samples": num_samples}
            items = run.generative(
                mine,
                engine,
                longest=longest,
                max_new_tokens=max_new_tokens,
                seed=seed,
                sampling=sampling,
            )
    model.train(was_training)
    return _result(task.name, items, model.get_device(), items_path)


def pick_problems(total: int, max_problems: int | None, seed: int) -> list[int]:
    """All indices, or `max_problems` drawn by the seed (published sets are sorted by subject)."""
    if max_problems is None or max_problems < 0 or max_problems >= total:
        return list(range(total))
    return sorted(Random(seed_from("problems", seed)).sample(range(total), max_problems))


# -----------------------------------------------------------------------------
# The two ways


@dataclass
class _Run:
    """What both ways need. `done(n)` hears of n finished problems; when `stopped()` turns true no
    further batch is begun."""

    task: Task
    model: Any
    tokenizer: Any
    batch_size: int
    done: Any
    stopped: Callable[[], bool]
    other: dict[int, int] = field(default_factory=dict)  # by problem: the one of its control

    def _batches(self, problems: Sequence[tuple[int, Any]], limit: int) -> list[list[Any]]:
        """Batches of (index, conversation, prompt ids), prompts of like length together."""
        rows = []
        for index, conversation in problems:
            ids = self.tokenizer.render_for_completion(conversation)
            # A prompt that is too long loses its beginning, but not the bos before it
            rows.append(
                (index, conversation, ids if len(ids) <= limit else ids[:1] + ids[1 - limit :])
            )
        rows.sort(key=lambda row: len(row[2]), reverse=True)
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    @torch.inference_mode()
    def categorical(self, problems: Sequence[tuple[int, Any]]) -> list[Item]:
        """One item a problem, by the logits of the letters after the prompt."""
        items = []
        device = self.model.get_device()
        for batch in self._batches(problems, self.model.config.sequence_len):
            prompts = [prompt for _, _, prompt in batch]
            # Padding on the right: causal attention keeps it out of sight
            idx = torch.zeros(len(batch), len(prompts[0]), dtype=torch.int64)  # (B, T)
            for row, prompt in zip(idx, prompts):
                row[: len(prompt)] = torch.tensor(prompt)
            x = self.model.hidden(idx.to(device))  # (B, T, D)
            ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
            # Only these positions go through the head: (B, V) instead of (B, T, V)
            logits = self.model.logits(x[torch.arange(len(batch), device=device), ends]).cpu()
            for (index, conversation, _), row in zip(batch, logits):
                letters = conversation["letters"]
                best = int(row[letter_ids(self.tokenizer, letters)].argmax())
                correct = self.task.evaluate(conversation, letters[best])
                key = [letter for letter in letters if self.task.evaluate(conversation, letter)]
                answer = {"reply": letters[best], "gold": "".join(key), "correct": correct}
                items.append({**_item(index, conversation), **answer})
            self.done(len(batch))
            if self.stopped():
                break
        return items

    def generative(
        self,
        problems: Sequence[tuple[int, Any]],
        engine: Any,
        *,
        longest: int,
        max_new_tokens: int,
        seed: int,
        sampling: dict[str, Any],
    ) -> list[Item]:
        """One item a problem, with the replies that the engine wrote."""
        # Prompt and reply share the context; the longest prompt may claim half of it
        context = self.model.config.sequence_len
        max_tokens = min(max_new_tokens, context - min(longest, context // 2))
        samples = sampling["num_samples"]
        items = []
        for batch in self._batches(problems, context - max_tokens):
            # A seed of its own for each problem: who shares the batch does not matter
            seeds = [seed_from("reply", seed, index) for index, _, _ in batch]
            sequences, masks = engine.generate_batch(
                [prompt for _, _, prompt in batch], max_tokens=max_tokens, seed=seeds,
                stopped=self.stopped, **sampling,
            )  # fmt: skip
            for b, (index, conversation, prompt) in enumerate(batch):
                rows = range(b * samples, (b + 1) * samples)
                replies = [
                    self._reply(conversation, sequences[r][len(prompt) :], masks[r][len(prompt) :])
                    for r in rows
                ]
                solved = any(reply["correct"] for reply in replies)
                item = {**_item(index, conversation), "replies": replies, "correct": solved}
                if self.other:
                    item["control"] = self._control(index, sequences, masks, rows, len(prompt))
                items.append(item)
            self.done(len(batch))
            if self.stopped():
                break
        return items

    def _reply(self, conversation: Any, ids: list[int], mask: list[int]) -> Item:
        """One sampled reply, judged. ids and mask are without the prompt."""
        ended = bool(ids) and ids[-1] in self.tokenizer.stop_token_ids and mask[-1] == 1
        text, parts = split_reply(self.tokenizer, ids, mask)
        correct = self.task.evaluate(conversation, text)
        shown = parts if any(part["type"] != "text" for part in parts) else text
        return {"reply": shown, "correct": correct, "ended": ended}

    def _control(
        self, index: int, sequences: Any, masks: Any, rows: range, prompt_len: int
    ) -> bool:
        """Whether one of the replies would have solved another problem."""
        other = self.task[self.other[index]]
        texts = (
            split_reply(self.tokenizer, sequences[r][prompt_len:], masks[r][prompt_len:])[0]
            for r in rows
        )
        return any(self.task.evaluate(other, text) for text in texts)


def letter_ids(tokenizer: Any, letters: Sequence[str]) -> list[int]:
    """The token of each letter. Raises UserError where a letter is more than one token."""
    ids = [tokenizer.encode(letter) for letter in letters]
    for letter, tokens in zip(letters, ids):
        if len(tokens) != 1:
            raise UserError(f"the tokenizer has no single token for {letter!r}: it makes {tokens}")
    return [tokens[0] for tokens in ids]


def _item(index: int, conversation: Any) -> Item:
    """The problem as it is saved: what was asked and, where it is known, what was expected."""
    asked = [m for m in conversation["messages"] if m["role"] == "user"][-1]["content"]
    item = {"index": index, "prompt": reply_text(asked)}
    if "expected" in conversation:
        item["expected"] = conversation["expected"]
    if "letters" in conversation:
        item["choices"] = len(conversation["letters"])
    return item


# -----------------------------------------------------------------------------
# Adding up


def _result(
    name: str, items: list[Item], device: torch.device, items_path: Path | None
) -> EvalResult:
    """Brings the ranks' items together, counts, and saves them."""
    items = sorted(gather_rows(items, device), key=lambda item: item["index"])
    if items_path is not None:
        if is_rank0():
            write_jsonl(items_path, items)
        barrier()
    n = len(items)
    accuracy = sum(item["correct"] for item in items) / n
    ended = [reply["ended"] for item in items for reply in item.get("replies", ())]
    return EvalResult(
        name=name,
        accuracy=accuracy,
        n=n,
        stderr=math.sqrt(accuracy * (1 - accuracy) / n),
        chance=sum(1 / item["choices"] for item in items if "choices" in item) / n,
        ended_share=sum(ended) / len(ended) if ended else None,
        items=items,
        control=_control_of(items),
    )


def _control_of(items: Sequence[Item]) -> float | None:
    """By the letters all pairings with other problems' keys, else the pairing that was tried."""
    if all("gold" in item for item in items):
        answers = [(item["choices"], item["reply"]) for item in items]
        return shuffled_accuracy(answers, [(item["choices"], item["gold"]) for item in items])
    if all("control" in item for item in items):
        return sum(item["control"] for item in items) / len(items)
    return None
