"""
Multiple choice in a chat, ours against lm-eval's: the part of bench/lm_eval_scores.py that is about
nanochat/evals/chat.py.

lm-eval puts the question into the exported chat template by itself (apply_chat_template) and asks
for the log-likelihood of each letter where the reply would begin. Ours takes the likeliest letter
after `render_for_completion`. The model was never trained on conversations: its answers are bad,
the same bad ones on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.lm_eval_rows import write_task
from nanochat.conversation import Conversation, reply_text
from nanochat.evals.chat import letter_ids, run_chat_eval
from nanochat.evals.core import Item
from nanochat.hf_export import export_model
from nanochat.tasks.choice import MultipleChoice
from nanochat.tasks.common import Rows

NAME = "chat_multiple_choice"


def chat_task(items: Sequence[Item], tokenizer: Any, limit: int) -> MultipleChoice:
    """Rows of a CORE task as a task to chat about. Prompts of more than `limit` tokens are left
    out: cut, ours keep <|bos|>, and lm-eval's do not."""
    rows = [
        {"question": item["query"], "choices": item["choices"], "answer": item["gold"]}
        for item in items
    ]
    whole = MultipleChoice(Rows([("rows", rows, None)]))
    kept = [
        row
        for row, conversation in zip(rows, whole)  # type: ignore[call-overload]
        if len(tokenizer.render_for_completion(conversation)) <= limit
    ]
    return MultipleChoice(Rows([("rows", kept, None)]))


def chat_document(conversation: Conversation) -> Item:
    """The row for lm-eval: what the user says, and the letters."""
    letters = conversation["letters"]
    return {
        "context": reply_text(conversation["messages"][0]["content"]),
        "choices": letters,
        "gold": letters.index(conversation["expected"]),
    }


@torch.inference_mode()
def our_letters(model: Any, tokenizer: Any, conversation: Conversation) -> Item:
    """What the worker finds for a row: prompt and letter as tokens, and the log-likelihoods."""
    prompt = tokenizer.render_for_completion(conversation)
    letters = letter_ids(tokenizer, conversation["letters"])
    logprobs = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    return {
        "ids": [[*prompt, letter] for letter in letters],
        "starts": [len(prompt)] * len(letters),
        "lls": [float(logprobs[letter]) for letter in letters],
    }


def compare_chat(
    task: MultipleChoice, found: dict[str, Any], model: Any, tokenizer: Any
) -> dict[str, Any]:
    """The agreement. `found` is the worker's result for the task."""
    result = run_chat_eval(task, model, tokenizer)
    conversations = [task[i] for i in range(len(task))]
    ours = [our_letters(model, tokenizer, conversation) for conversation in conversations]
    theirs = found["rows"]
    chosen = [
        conversation["letters"][row["lls"].index(max(row["lls"]))]
        for conversation, row in zip(conversations, theirs)
    ]
    predicted = [item["reply"] for item in result.items]
    diffs = [abs(x - y) for a, b in zip(ours, theirs) for x, y in zip(a["lls"], b["lls"])]
    return {
        "rows": len(task),
        "letters_chosen": len(set(predicted)),
        "loglikelihoods": len(diffs),
        "max_diff": max(diffs),
        "other_tokens": sum(
            (a["ids"], a["starts"]) != (b["ids"], b["starts"]) for a, b in zip(ours, theirs)
        ),
        "other_predictions": sum(p != c for p, c in zip(predicted, chosen)),
        "accuracy": {"ours": result.accuracy, "lm_eval": found["metrics"]["acc"]},
    }


def chat_disagreement(row: dict[str, Any], close: float) -> str:
    """What differs; empty if nothing does."""
    wrong = [f"{key} {row[key]}" for key in ("other_tokens", "other_predictions") if row[key]]
    if row["max_diff"] > close:
        wrong.append(f"log-likelihoods by up to {row['max_diff']:.2g}")
    if row["accuracy"]["ours"] != row["accuracy"]["lm_eval"]:
        wrong.append(f"accuracy {row['accuracy']}")
    return ", ".join(wrong)


def measure_chat(
    folder: Path,
    items: Sequence[Item],
    model: Any,
    tokenizer: Any,
    ask: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """Exports the model as one that chats, asks both, compares. `ask` runs the worker."""
    task = chat_task(items, tokenizer, model.config.sequence_len - 1)
    export_model(folder / "model", model, tokenizer, chat=True, card="", dtype="float32")
    documents = [chat_document(task[i]) for i in range(len(task))]
    write_task(folder, NAME, "multiple_choice", documents)
    found = ask(folder=folder, model=folder / "model", calls=[[NAME]], chat=True)
    return compare_chat(task, found["tasks"][NAME], model, tokenizer)
