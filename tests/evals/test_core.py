"""CORE: batched code against a slow twin that takes one item at a time; prompts to the letter."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from nanochat.common import UserError, read_jsonl
from nanochat.evals import core, scoring
from nanochat.evals.control import majority_accuracy, shuffled_accuracy
from nanochat.evals.core import (
    CoreTask,
    Item,
    evaluate_core,
    evaluated_rows,
    fewshot_indices,
    find_spans,
    predict_task,
    read_bundle,
    read_items,
    render_prompts,
)
from nanochat.evals.scoring import (
    Probe,
    crop,
    score_groups,
    score_sequences,
    shared_length,
    token_batches,
)
from tests.evals.fakes_for_tests import tiny_model
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

BUNDLE = Path(__file__).parents[3] / "shared" / "data" / "eval_bundle"
ROWS: dict[str, list[Item]] = {
    "multiple_choice": [
        {"query": "A dog says", "choices": ["meow.", "woof."], "gold": 1},
        {"query": "The sky is", "choices": ["blue", "blue and green", "a dog"], "gold": 0},
        {"query": "Water is", "choices": ["dry", "wet", "the sea", "a clock"], "gold": 1},
        {"query": "One and one is", "choices": ["two", "ten"], "gold": 0},
        {"query": "Bread is sold by", "choices": ["Anna", "Tom"], "gold": 0},
    ],
    "schema": [
        {"context_options": ["Tom met Anna and Tom", "Tom met Anna and Anna"],
         "continuation": "was glad.", "gold": 0},
        {"context_options": ["The dog saw the cat, the dog", "The dog saw the cat, the cat"],
         "continuation": "ran away.", "gold": 1},
        {"context_options": ["It", "They"], "continuation": "was slow.", "gold": 0},
    ],
    "language_modeling": [
        {"context": "The capital of France is", "continuation": "Paris"},
        {"context": " Half of 100 is ", "continuation": "50"},
        {"context": "In winter the days are", "continuation": "short"},
    ],
}  # fmt: skip


def write_bundle(folder: Path, shots: int = 2, delimiters: dict[str, str] | None = None) -> Path:
    """A bundle of one task of each kind."""
    (folder / "eval_data" / "kinds").mkdir(parents=True)
    entries, csv = [], "Eval Task,Task Category,Random baseline\n"
    for kind, rows in ROWS.items():
        path = folder / "eval_data" / "kinds" / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        entry = {"label": f"my_{kind}", "dataset_uri": f"kinds/{kind}.jsonl",
                 "num_fewshot": [shots], "icl_task_type": kind}  # fmt: skip
        if kind in (delimiters or {}):
            entry["continuation_delimiter"] = (delimiters or {})[kind]
        entries.append(entry)
        csv += f"my_{kind},x,{0 if kind == 'language_modeling' else 50}\n"
    # JSON is YAML
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}), encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text(csv, encoding="utf-8")
    return folder


def task_of(kind: str, shots: int = 0, delimiter: str = " ") -> CoreTask:
    return CoreTask("t", kind, Path("x"), shots, delimiter, 0.0)


# -----------------------------------------------------------------------------
# The slow twin


def naive_losses(model: Any, ids: list[int]) -> tuple[list[float], list[bool]]:
    """Loss of, and greedy agreement with, every token but the first, by one plain pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    losses = [float(-logits[t - 1].log_softmax(-1)[ids[t]]) for t in range(1, len(ids))]
    greedy = [int(logits[t - 1].argmax()) == ids[t] for t in range(1, len(ids))]
    return losses, greedy


def naive_predict(task: CoreTask, items: list[Item], index: int, model: Any, tokenizer: Any) -> int:
    """One item, one sequence at a time, everything spelled out."""
    examples = [items[i] for i in fewshot_indices(task.label, index, len(items), task.num_fewshot)]
    item, text = items[index], ""
    for e in examples:
        if task.kind == "multiple_choice":
            text += e["query"] + task.delimiter + e["choices"][e["gold"]] + "\n\n"
        elif task.kind == "schema":
            text += e["context_options"][e["gold"]] + task.delimiter + e["continuation"] + "\n\n"
        else:
            text += e["context"].strip() + task.delimiter + e["continuation"] + "\n\n"

    def encode(end: str) -> list[int]:
        return tokenizer.encode(text + end, prepend=tokenizer.get_bos_token_id())

    limit = model.config.sequence_len
    if task.kind == "language_modeling":
        context = item["context"].strip() + task.delimiter
        without, ids = encode(context.rstrip()), encode(context + item["continuation"])
        n = 0
        while n < len(without) and without[n] == ids[n]:
            n += 1
        n_scored = min(len(ids) - n, min(limit, len(ids)) - 1)
        _, greedy = naive_losses(model, ids[-limit:])
        return int(all(greedy[-n_scored:]))
    if task.kind == "multiple_choice":
        rows = [encode(item["query"] + task.delimiter + choice) for choice in item["choices"]]
        n = 0
        while n < min(map(len, rows)) - 1 and len({row[n] for row in rows}) == 1:
            n += 1
        scored = [len(row) - n for row in rows]
    else:
        rows = [encode(c + task.delimiter + item["continuation"]) for c in item["context_options"]]
        n = 1
        while n < min(map(len, rows)) and len({row[-n] for row in rows}) == 1:
            n += 1
        scored = [max(1, n - 1)] * len(rows)
    means = []
    for row, count in zip(rows, scored):
        count = min(count, min(limit, len(row)) - 1)
        losses, _ = naive_losses(model, row[-limit:])
        means.append(sum(losses[-count:]) / count)
    return means.index(min(means))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("sequence_len", [256, 24])
@pytest.mark.parametrize("arch", ["gpt", "turbo", "qwen2.5"])
def test_batched_is_the_slow_twin(
    kind: str, sequence_len: int, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MAX_BATCH_TOKENS", 200)  # several batches
    monkeypatch.setattr(scoring, "MAX_HEAD_TOKENS", 7)  # spans cut in the middle
    monkeypatch.setattr(core, "CHUNK", 2)
    tokenizer = tiny_qwen() if arch == "qwen2.5" else tiny_tokenizer()
    model = tiny_model(tokenizer.get_vocab_size(), sequence_len, arch)
    for shots, delimiter in ((0, " "), (2, "\nAnswer: "), (9, " ")):
        task, items = task_of(kind, shots, delimiter), ROWS[kind]
        indices = list(range(len(items)))
        fast = predict_task(task, items, indices, model, tokenizer)
        slow = [naive_predict(task, items, i, model, tokenizer) for i in indices]
        assert fast == slow


def test_losses_are_the_slow_twins() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.get_vocab_size())
    texts = ["The market opens", "A train leaves the station with 12 passengers", "Tom"]
    probes = [Probe(tokenizer.encode(t, prepend="<|bos|>"), 2) for t in texts]
    for probe, score in zip(probes, score_sequences(model, probes)):
        losses, greedy = naive_losses(model, probe.ids)
        assert score.loss == pytest.approx(sum(losses[1:]) / len(losses[1:]), abs=1e-5)
        assert score.greedy == all(greedy[1:])


@pytest.mark.parametrize("arch", ["gpt", "turbo", "qwen2.5"])
def test_what_options_share_is_run_once(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scores from fewer tokens, whatever the batches and the lengths in them."""
    monkeypatch.setattr(scoring, "MAX_BATCH_TOKENS", 300)
    model = tiny_model(400, arch=arch)
    rng = Random(1)

    def ids(n: int) -> list[int]:
        return [rng.randrange(400) for _ in range(n)]

    groups = []
    for shared, tails in ((40, (3, 9, 1)), (3, (5, 5)), (70, (1, 1)), (25, (4,)), (40, (8, 2))):
        prefix = ids(shared)
        groups.append([Probe(prefix + ids(n), shared) for n in tails])
    same = ids(30)
    groups.append([Probe(same, 29), Probe([*same, 7], 29)])  # one option begins the other
    groups.append([Probe(ids(40), 30), Probe(ids(40), 20)])  # nothing in common, as in a schema
    assert [shared_length(g) for g in groups] == [39, 0, 69, 0, 39, 28, 0]

    tokens = []
    real = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda idx, *cache: tokens.append(idx.numel()) or real(idx, *cache)
    )
    fast = score_groups(model, groups)
    few, tokens[:] = sum(tokens), []
    slow = [score_sequences(model, group) for group in groups]
    assert few < 0.8 * sum(tokens)
    for ours, theirs in zip(fast, slow, strict=True):
        assert [s.loss for s in ours] == pytest.approx([s.loss for s in theirs], abs=1e-5)
        assert [s.greedy for s in ours] == [s.greedy for s in theirs]


def test_greedy_is_true_for_what_the_model_would_write() -> None:
    """Without this a language-modeling score of 0 everywhere would look fine."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.get_vocab_size())
    ids = tokenizer.encode("The capital of", prepend="<|bos|>")
    start = len(ids)
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    good, bad = score_sequences(model, [Probe(ids, start), Probe([*ids[:-1], ids[-1] ^ 1], start)])
    assert good.greedy
    assert not bad.greedy


# -----------------------------------------------------------------------------
# Pieces


def test_prompts_to_the_letter() -> None:
    mc, lm, sc = ROWS["multiple_choice"], ROWS["language_modeling"], ROWS["schema"]
    assert render_prompts(task_of("multiple_choice", delimiter="\nAnswer: "), mc[0], [mc[2]]) == [
        "Water is\nAnswer: wet\n\nA dog says\nAnswer: meow.",
        "Water is\nAnswer: wet\n\nA dog says\nAnswer: woof.",
    ]
    assert render_prompts(task_of("schema"), sc[1], [sc[2]]) == [
        "It was slow.\n\nThe dog saw the cat, the dog ran away.",
        "It was slow.\n\nThe dog saw the cat, the cat ran away.",
    ]
    assert render_prompts(task_of("language_modeling"), lm[1], [lm[0]]) == [
        "The capital of France is Paris\n\nHalf of 100 is",
        "The capital of France is Paris\n\nHalf of 100 is 50",
    ]


def test_spans() -> None:
    assert find_spans("multiple_choice", [[1, 2, 3], [1, 2, 4, 5]]) == [
        Probe([1, 2, 3], 2), Probe([1, 2, 4, 5], 2),
    ]  # fmt: skip
    # One choice is the beginning of the other, and equal choices: something is scored all the same
    assert [p.start for p in find_spans("multiple_choice", [[1, 2], [1, 2, 3]])] == [1, 1]
    assert [p.start for p in find_spans("multiple_choice", [[1, 2], [1, 2]])] == [1, 1]
    assert [p.start for p in find_spans("schema", [[1, 2, 8, 9], [1, 2, 3, 8, 9]])] == [2, 3]
    assert [p.start for p in find_spans("schema", [[1, 2], [1, 3]])] == [1, 1]  # nothing in common
    assert [p.start for p in find_spans("schema", [[1, 2], [1, 2]])] == [1, 1]  # everything
    assert find_spans("language_modeling", [[1, 2], [1, 2, 3, 4]]) == [Probe([1, 2, 3, 4], 2)]
    # The tokenizer may join the end of the context with the continuation
    assert find_spans("language_modeling", [[1, 2], [1, 7, 4]]) == [Probe([1, 7, 4], 1)]


def test_crop_keeps_the_end() -> None:
    assert crop(Probe([1, 2, 3, 4, 5], 3), 9) == Probe([1, 2, 3, 4, 5], 3)
    assert crop(Probe([1, 2, 3, 4, 5], 3), 3) == Probe([3, 4, 5], 1)
    assert crop(Probe([1, 2, 3, 4, 5], 1), 3) == Probe([3, 4, 5], 1)  # longer than the context


def test_fewshot_examples() -> None:
    for index in range(8):
        drawn = fewshot_indices("t", index, 8, 3)
        assert len(set(drawn)) == 3
        assert index not in drawn
        assert all(0 <= i < 8 for i in drawn)
        assert drawn == fewshot_indices("t", index, 8, 3)
        assert sorted(fewshot_indices("t", index, 8, 7)) == [i for i in range(8) if i != index]
        assert len(fewshot_indices("t", index, 8, 10)) == 7  # fewer rows than wanted examples
    assert fewshot_indices("t", 0, 1, 10) == []
    assert fewshot_indices("t", 1, 1000, 5) != fewshot_indices("u", 1, 1000, 5)
    assert {i for n in range(200) for i in fewshot_indices("t", n, 8, 3)} == set(range(8))


def test_rows_taken_are_nested_and_fixed() -> None:
    assert evaluated_rows("t", 5, -1) == list(range(5))
    assert evaluated_rows("t", 5, 9) == list(range(5))
    few, more = evaluated_rows("t", 1000, 10), evaluated_rows("t", 1000, 20)
    assert few == more[:10]
    assert few != list(range(10))


def test_token_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MAX_BATCH_TOKENS", 10)
    lengths = [3, 12, 5, 5, 1, 2]
    batches = list(token_batches(lengths))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert batches[0] == [1]  # too long for any company
    for batch in batches[1:]:
        assert len(batch) * max(lengths[i] for i in batch) <= 10


# -----------------------------------------------------------------------------
# The whole


def test_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.get_vocab_size()).train()
    said: list[str] = []
    outcome = evaluate_core(model, tokenizer, bundle, say=said.append)
    assert model.training
    assert len(said) == 3
    assert outcome["n"] == {"my_multiple_choice": 5, "my_schema": 3, "my_language_modeling": 3}
    for label, accuracy in outcome["results"].items():
        b = 0.0 if "language" in label else 0.5
        assert outcome["centered"][label] == pytest.approx((accuracy - b) / (1 - b))
    assert outcome["core_metric"] == pytest.approx(sum(outcome["centered"].values()) / 3)
    assert evaluate_core(model, tokenizer, bundle, say=said.append) == outcome
    # Half of each task, from two ranks that add up
    sums: list[float] = []
    monkeypatch.setattr(core, "sum_over_ranks", lambda right, device: [sums.append(right) or right])
    for rank in (0, 1):
        monkeypatch.setattr(core, "rank_and_world", lambda rank=rank: (rank, 2))
        evaluate_core(model, tokenizer, bundle, say=said.append)
    for i, (label, n) in enumerate(outcome["n"].items()):
        assert sums[i] + sums[i + 3] == round(outcome["results"][label] * n)
    monkeypatch.undo()
    few = evaluate_core(model, tokenizer, bundle, max_per_task=1, say=said.append)
    assert set(few["n"].values()) == {1}  # fewer rows than few-shot examples


def test_what_was_asked_and_predicted_is_kept(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.get_vocab_size())
    said: list[str] = []
    outcome = evaluate_core(model, tokenizer, bundle, say=said.append, items_dir=tmp_path / "items")
    for kind, items in ROWS.items():
        rows = [row for _, row in read_jsonl(tmp_path / "items" / f"my_{kind}.jsonl")]
        assert [row["index"] for row in rows] == list(range(len(items)))
        right = sum(row["correct"] for row in rows) / len(rows)
        assert right == pytest.approx(outcome["results"][f"my_{kind}"])
        assert all(len(row["examples"]) == 2 and row["question"] for row in rows)
    row = [row for _, row in read_jsonl(tmp_path / "items" / "my_multiple_choice.jsonl")][2]
    assert row["options"] == ROWS["multiple_choice"][2]["choices"]
    assert row["prediction"] == row["loss"].index(min(row["loss"]))
    assert (row["gold"], row["correct"]) == (1, row["prediction"] == 1)
    assert outcome["majority"]["my_multiple_choice"] == 3 / 5
    assert outcome["chance"]["my_schema"] == 0.5
    assert all(0 <= share <= 1 for share in outcome["control"].values())
    assert all("+-" in line and "control" in line and "chance" in line for line in said)


def test_two_ranks_keep_what_one_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 writes all rows; here rank 1 goes first, and its rows are what rank 0 gathers."""
    bundle = write_bundle(tmp_path / "bundle")
    model = tiny_model(400)
    quiet: Any = {"say": lambda line: None}
    alone = evaluate_core(model, tiny_tokenizer(), bundle, items_dir=tmp_path / "one", **quiet)
    others: list[list[Item]] = []

    def gather(rows: list[Item], device: Any) -> list[Item]:
        if core.rank_and_world()[0] == 1:
            others.append(rows)
            return rows
        return [*rows, *others.pop(0)]

    monkeypatch.setattr(core, "gather_rows", gather)
    for rank in (1, 0):
        monkeypatch.setattr(core, "rank_and_world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(core, "is_rank0", lambda rank=rank: rank == 0)
        two = evaluate_core(model, tiny_tokenizer(), bundle, items_dir=tmp_path / "two", **quiet)
    assert (two["control"], two["majority"]) == (alone["control"], alone["majority"])
    for kind in ROWS:
        one, both = (tmp_path / name / f"my_{kind}.jsonl" for name in ("one", "two"))
        assert one.read_text(encoding="utf-8") == both.read_text(encoding="utf-8")


def test_habits_score_no_better_than_their_control() -> None:
    keys = [0, 0, 1, 2]
    assert shuffled_accuracy([0, 0, 0, 0], keys) == 0.5  # always the same: the score it gets
    assert shuffled_accuracy(keys, keys) == pytest.approx((2 * 2 + 1 + 1) / 16)
    assert shuffled_accuracy([None, 1, None, None], keys) == pytest.approx(1 / 16)
    assert majority_accuracy(keys) == 0.5
    assert shuffled_accuracy([], []) == majority_accuracy([]) == 0
    # Against brute force over all orders of the keys
    answers = [1, 0, 2, 1]
    orders = list(permutations(keys))
    brute = sum(a == k for order in orders for a, k in zip(answers, order)) / len(orders) / 4
    assert shuffled_accuracy(answers, keys) == pytest.approx(brute)


def test_it_ends_soon_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an error, and on the same path: other ranks wait for this one's sums."""
    monkeypatch.setattr(core, "CHUNK", 2)
    scored: list[int] = []
    real = core.score_groups

    def score(model: Any, sequences: Any) -> Any:
        scored.append(len(sequences))
        return real(model, sequences)

    sums: list[float] = []
    monkeypatch.setattr(core, "sum_over_ranks", lambda right, device: [sums.append(right) or right])
    monkeypatch.setattr(core, "score_groups", score)
    said: list[str] = []
    evaluate_core(
        tiny_model(400), tiny_tokenizer(), write_bundle(tmp_path), say=said.append,
        stopped=lambda: bool(scored),
    )  # fmt: skip
    assert len(scored) == 1 and len(sums) == 3 and said == []


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("core.yaml", "multiple_choice", "multiple", "'multiple' is not one of"),
        ("core.yaml", "kinds/schema", "kinds/none", "none.jsonl are missing"),
        ("eval_meta_data.csv", "my_schema", "other", "no random baseline"),
        ("core.yaml", "icl_tasks", "tasks", "lists no icl_tasks"),
        ("eval_data/kinds/schema.jsonl", "continuation", "ending", "schema.jsonl:1: a schema row"),
    ],
)
def test_broken_bundles(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    path = write_bundle(tmp_path) / file
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        evaluate_core(tiny_model(400), tiny_tokenizer(), tmp_path, say=lambda line: None)


def test_missing_bundle_says_where_and_how(tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        read_bundle(tmp_path / "eval_bundle")
    assert str(tmp_path / "eval_bundle" / "core.yaml") in str(e.value)
    assert "eval_bundle.zip" in str(e.value)


def test_the_real_bundle() -> None:
    if not BUNDLE.exists():
        pytest.skip(f"needs the real bundle in {BUNDLE}")
    tasks = read_bundle(BUNDLE)
    assert len(tasks) == 20
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.get_vocab_size())
    for task in tasks:
        items = read_items(task)
        for index in (0, len(items) - 1):
            shots = [
                items[i] for i in fewshot_indices(task.label, index, len(items), task.num_fewshot)
            ]
            prompts = render_prompts(task, items[index], shots)
            assert all(prompt.strip() for prompt in prompts)
            if task.label not in ("hellaswag", "hellaswag_zeroshot"):
                continue
            fast = predict_task(task, items, [index], model, tokenizer)
            assert fast == [naive_predict(task, items, index, model, tokenizer)]
    outcome = evaluate_core(model, tokenizer, BUNDLE, max_per_task=2, say=lambda line: None)
    assert set(outcome["n"].values()) == {2}
    assert -1 < outcome["core_metric"] < 1
