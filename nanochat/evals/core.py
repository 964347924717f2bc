"""
CORE, the benchmark of base models from DCLM (arXiv 2406.11794): 22 in-context-learning tasks.

    outcome = evaluate_core(model, tokenizer, get_base_dir() / "eval_bundle", max_per_task=500)
    print(outcome["core_metric"])

The bundle is a folder: core.yaml lists the tasks, eval_meta_data.csv their random baselines,
eval_data/ holds the rows. Three kinds, in the prompt format of llm-foundry as published with the
bundle:

    multiple_choice    one context, several continuations: the one with the lowest mean loss wins
    schema             several contexts, one continuation: the context that makes it likeliest wins
    language_modeling  right if greedy decoding would write the continuation, token for token

A task's accuracy is centred, 0 at its random baseline and 1 at perfect, and CORE is the mean. Seven
runs of one recipe spread over 0.0165 (LESSONS of the original): smaller differences mean nothing.
How the losses are computed is in scoring.py.
Floor 4.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from nanochat.common import UserError, is_rank0, print0, read_jsonl, seed_from
from nanochat.distributed import rank_and_world, sum_over_ranks
from nanochat.evals.bundle import BUNDLE_URL, has_bundle
from nanochat.evals.control import majority_accuracy, shuffled_accuracy
from nanochat.evals.items import gather_rows, write_jsonl
from nanochat.evals.scoring import Probe, Score, common_length, crop, score_groups
from nanochat.progress import Progress

Item = dict[str, Any]

EXAMPLE_DELIMITER = "\n\n"  # between examples, as in karpathy/nanochat, whose CORE we compare with
CHUNK = 256  # rows tokenized at a time: with ten examples each, a task has 40M tokens

# -----------------------------------------------------------------------------
# The bundle


@dataclass(frozen=True)
class CoreTask:
    """One line of core.yaml, with its baseline."""

    label: str
    kind: str  # multiple_choice, schema or language_modeling
    path: Path
    num_fewshot: int
    delimiter: str  # between a context and its continuation
    baseline: float  # accuracy of guessing, percent


# Kind -> the keys its rows must have
KINDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


def read_bundle(bundle_dir: Path) -> list[CoreTask]:
    """The tasks of a bundle. Raises UserError with the file and entry that is not right."""
    if not has_bundle(bundle_dir):
        raise UserError(
            f"the CORE eval bundle is not in {bundle_dir}: unpack {BUNDLE_URL} there, so that "
            f"{bundle_dir / 'core.yaml'} exists, or let `python -m scripts.base_eval` fetch it"
        )
    baselines = {}
    with open(bundle_dir / "eval_meta_data.csv", encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            baselines[row.get("Eval Task")] = row.get("Random baseline") or "0"
    config = yaml.safe_load((bundle_dir / "core.yaml").read_text(encoding="utf-8"))
    entries = config.get("icl_tasks") if isinstance(config, dict) else None
    tasks = []
    for entry in entries or []:
        label, kind = entry.get("label"), entry.get("icl_task_type")
        path = bundle_dir / "eval_data" / str(entry.get("dataset_uri"))
        problem = ""
        if kind not in KINDS:
            problem = f"icl_task_type {kind!r} is not one of {', '.join(KINDS)}"
        elif not path.is_file():
            problem = f"its rows {path} are missing"
        elif label not in baselines:
            problem = "eval_meta_data.csv has no random baseline for it"
        if problem:
            raise UserError(f"{bundle_dir / 'core.yaml'}: task {label!r}: {problem}")
        shots = entry.get("num_fewshot", [0])
        shots = int(shots[0] if isinstance(shots, list) else shots)
        delimiter = entry.get("continuation_delimiter", " ")
        tasks.append(CoreTask(label, kind, path, shots, delimiter, float(baselines[label])))
    if not tasks:
        raise UserError(f"{bundle_dir / 'core.yaml'} lists no icl_tasks")
    return tasks


def read_items(task: CoreTask) -> list[Item]:
    """The task's rows, each with the keys of its kind."""
    items = []
    for line, row in read_jsonl(task.path):
        missing = [key for key in KINDS[task.kind] if key not in row]
        if missing:
            raise UserError(f"{task.path}:{line}: a {task.kind} row needs {', '.join(missing)}")
        items.append(row)
    if not items:
        raise UserError(f"{task.path} has no rows")
    return items


# -----------------------------------------------------------------------------
# Prompts


def fewshot_indices(label: str, index: int, total: int, num_fewshot: int) -> list[int]:
    """Which rows are shown as examples before row `index`, never itself; the same in every run.

    They come from all `total` rows, however few of them are evaluated."""
    rng = Random(seed_from("core few-shot", label, index))
    drawn = rng.sample(range(total - 1), min(num_fewshot, total - 1))
    return [i if i < index else i + 1 for i in drawn]


def render_prompts(task: CoreTask, item: Item, shots: Sequence[Item]) -> list[str]:
    """One prompt for each choice or context; for language modeling [without, with] continuation."""
    d = task.delimiter
    if task.kind == "multiple_choice":
        head = [f"{s['query']}{d}{s['choices'][s['gold']]}" for s in shots]
        tails = [f"{item['query']}{d}{choice}" for choice in item["choices"]]
    elif task.kind == "schema":
        head = [f"{s['context_options'][s['gold']]}{d}{s['continuation']}" for s in shots]
        tails = [f"{context}{d}{item['continuation']}" for context in item["context_options"]]
    else:
        head = [f"{s['context'].strip()}{d}{s['continuation']}" for s in shots]
        context = f"{item['context'].strip()}{d}"
        # A trailing space belongs to the next token: without it, `without` is a prefix of `with`
        # in tokens too
        tails = [context.rstrip(), f"{context}{item['continuation']}"]
    return [EXAMPLE_DELIMITER.join([*head, tail]) for tail in tails]


def find_spans(kind: str, rows: Sequence[list[int]]) -> list[Probe]:
    """The tokens of an item's prompts -> what to run, with the span that the options differ in."""
    if kind == "language_modeling":
        return [Probe(rows[1], common_length(rows))]
    if kind == "schema":
        shared = common_length(rows, from_end=True)
        # At least one token is scored, and one is left before it to predict it from
        return [Probe(ids, len(ids) - max(1, min(shared, len(ids) - 1))) for ids in rows]
    # Where one choice is the beginning of another, its last token is scored all the same
    start = min(common_length(rows), min(map(len, rows)) - 1)
    return [Probe(ids, start) for ids in rows]


def predict(kind: str, scores: Sequence[Score]) -> int:
    """The option chosen; for language modeling 1 if the continuation is what would be written."""
    if kind == "language_modeling":
        return int(scores[0].greedy)
    return min(range(len(scores)), key=lambda i: scores[i].loss)


def gold(task: CoreTask, item: Item) -> int:
    """What `predict` has to give to be right."""
    return 1 if task.kind == "language_modeling" else item["gold"]


def score_task(
    task: CoreTask,
    items: Sequence[Item],
    indices: Sequence[int],
    model: Any,
    tokenizer: Any,
    stopped: Callable[[], bool] = lambda: False,
    done: Callable[[int], None] = lambda n: None,
) -> list[list[Score]]:
    """The scores of each of the rows `indices`; of fewer when `stopped()` turns true. `done(n)`
    hears of n further rows."""
    scores: list[list[Score]] = []
    for at in range(0, len(indices), CHUNK):
        if stopped():
            break
        chunk = indices[at : at + CHUNK]
        prompts = []
        for index in chunk:
            shots = fewshot_indices(task.label, index, len(items), task.num_fewshot)
            prompts.append(render_prompts(task, items[index], [items[i] for i in shots]))
        # All texts in one call, which encodes them in parallel
        texts = [text for options in prompts for text in options]
        rows = iter(tokenizer.encode(texts, prepend=tokenizer.get_bos_token_id()))
        limit = model.config.sequence_len
        probes = [
            [crop(p, limit) for p in find_spans(task.kind, [next(rows) for _ in options])]
            for options in prompts
        ]
        scores += score_groups(model, probes)
        done(len(chunk))
    return scores


def predict_task(
    task: CoreTask,
    items: Sequence[Item],
    indices: Sequence[int],
    model: Any,
    tokenizer: Any,
    stopped: Callable[[], bool] = lambda: False,
) -> list[int]:
    """The prediction for each of the rows `indices`; of fewer when `stopped()` turns true."""
    scores = score_task(task, items, indices, model, tokenizer, stopped)
    return [predict(task.kind, of_item) for of_item in scores]


def shown(task: CoreTask, item: Item, index: int, total: int, scores: Sequence[Score]) -> Item:
    """A row of the file that people read. Losses are in nats per token, in the options' order."""
    if task.kind == "multiple_choice":
        question, options = item["query"], item["choices"]
    elif task.kind == "schema":
        question, options = item["continuation"], item["context_options"]
    else:
        question, options = item["context"], [item["continuation"]]
    prediction, key = predict(task.kind, scores), gold(task, item)
    row = {
        "index": index,
        "question": question,
        "options": options,
        "gold": key,
        "prediction": prediction,
        "correct": prediction == key,
        "loss": [round(score.loss, 5) for score in scores],
        "examples": fewshot_indices(task.label, index, total, task.num_fewshot),
    }
    if task.kind == "language_modeling":  # there is no option to choose
        del row["prediction"], row["gold"]
    return row


def yardsticks(task: CoreTask, rows: Sequence[Item]) -> tuple[float, float]:
    """(control, majority) of a task's shown rows, see control.py.

    A right continuation is an answer with a text; a wrong one's text is not known, so there the
    control is the least it can be."""
    if task.kind == "language_modeling":
        keys = [row["options"][0] for row in rows]
        answers = [key if row["correct"] else None for row, key in zip(rows, keys)]
        return shuffled_accuracy(answers, keys), majority_accuracy(keys)
    return (
        shuffled_accuracy([row["prediction"] for row in rows], [row["gold"] for row in rows]),
        majority_accuracy([row["gold"] for row in rows]),
    )


# -----------------------------------------------------------------------------
# The metric


def evaluated_rows(label: str, total: int, max_per_task: int) -> list[int]:
    """The rows that are evaluated: all for -1, else as many, drawn so that more include fewer."""
    order = list(range(total))
    if 0 < max_per_task < total:
        Random(seed_from("core rows", label)).shuffle(order)
    return order[:max_per_task] if max_per_task > 0 else order


def evaluate_core(
    model: Any,
    tokenizer: Any,
    bundle_dir: Path,
    max_per_task: int = -1,
    say: Callable[[str], None] = print0,
    stopped: Callable[[], bool] = lambda: False,
    items_dir: Path | None = None,
) -> dict[str, Any]:
    """{"core_metric", "core_stderr", and by task: "results", "centered", "n", "stderr", "chance"}.

    results are accuracies, 0 to 1; stderr is that of the accuracy. The rows are shared out over the
    ranks. `items_dir` gets a jsonl of every task's rows with what was predicted, and the outcome
    the "control" and "majority" of each task. When `stopped()` turns true on any of the ranks the
    outcome comes soon, and is worthless. Raises UserError where the bundle is not complete."""
    by_task: tuple[str, ...] = ("results", "centered", "n", "stderr", "chance")
    if items_dir is not None:
        by_task = (*by_task, "control", "majority")
    outcome: dict[str, Any] = {key: {} for key in by_task}
    was_training = model.training
    model.eval()
    tasks = read_bundle(Path(bundle_dir))
    variance = 0.0
    with Progress(_count_rows(tasks, max_per_task), "CORE", "questions") as bar:
        for number, task in enumerate(tasks, 1):
            started = time.monotonic()
            found = _evaluate_task(
                task, model, tokenizer, max_per_task, stopped, items_dir, bar.advance
            )
            for key in by_task:
                outcome[key][task.label] = found[key]
            variance += (found["stderr"] / (1 - found["chance"])) ** 2
            if stopped():
                continue  # what is said would be wrong
            beside = "".join(f"  {key} {found[key]:.4f}" for key in by_task[4:])
            say(
                f"{number:>2}/{len(tasks)} {task.label:<32} accuracy {found['results']:.4f} +- "
                f"{found['stderr']:.4f}  centred {found['centered']:+.4f}  n {found['n']:>5}"
                f"{beside}  {time.monotonic() - started:.0f}s"
            )
    model.train(was_training)
    outcome["core_metric"] = sum(outcome["centered"].values()) / len(tasks)
    outcome["core_stderr"] = math.sqrt(variance) / len(tasks)
    return outcome


def _count_rows(tasks: Sequence[CoreTask], max_per_task: int) -> int:
    """How many of the rows of all tasks this rank evaluates."""
    rank, world = rank_and_world()
    count = 0
    for task in tasks:
        with open(task.path, "rb") as f:
            total = sum(not line.isspace() for line in f)
        count += len(evaluated_rows(task.label, total, max_per_task)[rank::world])
    return count


def _evaluate_task(
    task: CoreTask,
    model: Any,
    tokenizer: Any,
    max_per_task: int,
    stopped: Callable[[], bool],
    items_dir: Path | None,
    done: Callable[[int], None],
) -> dict[str, float]:
    """One task's entries of the outcome, the same on every rank; its file, on the first."""
    items = read_items(task)
    rows = evaluated_rows(task.label, len(items), max_per_task)
    rank, world = rank_and_world()
    mine = rows[rank::world]
    scores = score_task(task, items, mine, model, tokenizer, stopped, done)
    right = sum(
        predict(task.kind, of_item) == gold(task, items[index])
        for of_item, index in zip(scores, mine)
    )
    correct = sum_over_ranks(right, device=model.get_device())[0]
    accuracy, chance = correct / len(rows), task.baseline / 100
    found = {
        "results": accuracy,
        "centered": (accuracy - chance) / (1 - chance),
        "n": len(rows),
        "stderr": math.sqrt(accuracy * (1 - accuracy) / len(rows)),
        "chance": chance,
    }
    if items_dir is not None:
        local = [
            shown(task, items[index], index, len(items), of_item)
            for of_item, index in zip(scores, mine)
        ]
        every = sorted(gather_rows(local, model.get_device()), key=lambda row: row["index"])
        found["control"], found["majority"] = yardsticks(task, every)
        if is_rank0():
            write_jsonl(items_dir / f"{task.label}.jsonl", every)
    return found
