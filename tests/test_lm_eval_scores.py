"""
bench/lm_eval_scores.py: rows become lm-eval's documents without loss, our numbers for them are
those of transformers on the exported model, and what was recorded is agreement.

The slow twin does for one option what lm-eval does: it lets the exported tokenizer encode context
and continuation, and adds up transformers' log-probabilities.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import lm_eval_scores as bench
from bench.lm_eval_chat import chat_disagreement, chat_document, chat_task, compare_chat
from bench.lm_eval_piqa import compare_piqa, core_item, piqa_task, read_rows, write_piqa
from bench.lm_eval_rows import document, pairs_of, probes_of
from nanochat.common import UserError, read_jsonl
from nanochat.evals.core import (
    CoreTask,
    Item,
    find_spans,
    predict_task,
    read_bundle,
    read_items,
    render_prompts,
)
from nanochat.evals.scoring import Probe, score_sequences
from nanochat.hf_export import export_model
from tests.evals import test_core
from tests.models_for_tests import tiny_model
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

# With a row of each kind whose options have more in common than the cut leaves out
ROWS: dict[str, list[Item]] = {
    "multiple_choice": [
        *test_core.ROWS["multiple_choice"],
        {"query": "Tom sells", "choices": ["the apples", "the clocks"], "gold": 0},
    ],
    "schema": [
        *test_core.ROWS["schema"],
        {"context_options": ["Tom and the cat", "Anna and the cat"], "continuation": "slept.",
         "gold": 1},
    ],
    "language_modeling": test_core.ROWS["language_modeling"],
}  # fmt: skip


def make_test(folder: Path, kind: str, shots: int, tokenizer: Any) -> bench.Test:
    """All rows of that kind."""
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]), encoding="utf-8")
    return bench.make_test(CoreTask(kind, kind, path, shots, " ", 0.0), -1, tokenizer)


def found_by_us(test: bench.Test, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the worker would return if lm-eval agreed in everything."""
    rows = [bench.our_row(model, tokenizer, pairs_of(row.document)) for row in test.rows]
    again = [bench.our_row(model, tokenizer, pairs_of(row.again)) for row in test.rows if row.again]
    return {
        test.name: {"rows": rows, "metrics": bench.metrics_of(test, rows)},
        f"{test.name}_again": {"rows": again, "metrics": {}},
        f"{test.name}_tokens": {
            "rows": [bench.our_scores(model, row.spans) for row in test.rows if row.spans]
        },
    }


def test_documents_to_the_letter() -> None:
    items: dict[str, Item] = {kind: rows[0] for kind, rows in ROWS.items()}
    wanted = {
        "multiple_choice": [("A dog says: ", "meow."), ("A dog says: ", "woof.")],
        "schema": [
            ("Tom met Anna and Tom: ", "was glad."),
            ("Tom met Anna and Anna: ", "was glad."),
        ],
        "language_modeling": [("The capital of France is: ", "Paris")],
    }
    for kind, item in items.items():
        task = CoreTask("t", kind, Path("x"), 0, ": ", 0.0)
        cut = document(task, item, render_prompts(task, item, []))
        assert pairs_of(cut) == wanted[kind]
        assert cut.get("gold") == item.get("gold")


@pytest.mark.parametrize("kind", ROWS)
def test_texts_and_spans_are_those_that_core_scores(kind: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for shots in (0, 2):
        test = make_test(tmp_path, kind, shots, tokenizer)
        for row in test.rows:
            cut = row.again or row.document
            spans = probes_of(tokenizer, pairs_of(cut))
            texts = [context + end for context, end in pairs_of(row.document)]
            ids = tokenizer.encode(texts, prepend=tokenizer.get_bos_token_id())
            assert [span.ids for span in spans] == ids
            prompts = ids
            if kind == "language_modeling":
                context = row.document["context"].rstrip()
                bos = tokenizer.get_bos_token_id()
                prompts = [tokenizer.encode(context, prepend=bos), *ids]
            assert spans == find_spans(kind, prompts)
    # A continuation is cut off at the same place by both
    assert any(row.again for row in test.rows) == (kind != "language_modeling")


@pytest.mark.parametrize("arch", ["gpt", "turbo", "qwen2.5"])
@pytest.mark.parametrize("kind", ROWS)
def test_agreement_is_seen_and_so_is_each_difference(arch: str, kind: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(arch, vocab_size=400, sequence_len=64).eval()
    test = make_test(tmp_path, kind, 2, tokenizer)
    theirs = found_by_us(test, model, tokenizer)
    row = bench.compare(test, theirs, model, tokenizer)
    assert bench.disagreement(row) == ""
    assert row["rows"] == len(ROWS[kind]) and row["core"]["ours"] == row["core"]["lm_eval"]

    def spoilt(key: str, value: Any) -> str:
        changed = copy.deepcopy(theirs)
        changed[test.name]["rows"][0][key] = value
        return bench.disagreement(bench.compare(test, changed, model, tokenizer))

    found = theirs[test.name]["rows"][0]
    assert "log-likelihoods by up to" in spoilt("lls", [ll - 0.01 for ll in found["lls"]])
    assert "other_tokens 1" in spoilt("starts", [start - 1 for start in found["starts"]])
    assert "other_texts 1" in spoilt("pairs", [["a", "b"]])
    assert "other_greedy 1" in spoilt("greedy", [not greedy for greedy in found["greedy"]])
    changed = copy.deepcopy(theirs)
    changed[test.name]["metrics"]["acc"] += 0.01
    assert "acc " in bench.disagreement(bench.compare(test, changed, model, tokenizer))


def test_rows_that_part_within_a_character_are_asked_by_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These letters share their first byte of two: no text ends there."""
    rows: list[Item] = [{"query": "Tom writes", "choices": ["\u010c", "\u0106"], "gold": 0}]
    monkeypatch.setitem(ROWS, "multiple_choice", rows)
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt", vocab_size=400, sequence_len=64).eval()
    test = make_test(tmp_path, "multiple_choice", 0, tokenizer)
    (row,) = test.rows
    assert row.spans is not None and [len(ids) - start for ids, start in row.spans] == [1, 1]
    theirs = found_by_us(test, model, tokenizer)
    compared = bench.compare(test, theirs, model, tokenizer)
    assert bench.disagreement(compared) == "" and compared["by_tokens"] == 1
    found = theirs[f"{test.name}_tokens"]["rows"][0]
    found["lls"] = found["lls"][::-1]
    noticed = bench.disagreement(bench.compare(test, theirs, model, tokenizer))
    assert "other_predictions 1" in noticed and "CORE's accuracy" in noticed


def naive_row(folder: Path, pairs: list[tuple[str, str]], add_bos: bool) -> Item:
    """What lm-eval does, one option at a time, by transformers alone."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    row: Item = {
        "pairs": [list(p) for p in pairs],
        "ids": [],
        "starts": [],
        "lls": [],
        "greedy": [],
    }
    first = [tokenizer.bos_token_id] if add_bos else []
    for context, end in pairs:
        ids = first + tokenizer.encode(context + end)
        start = len(first + tokenizer.encode(context.rstrip()))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        logprobs = logits.log_softmax(-1)
        row["ids"].append(ids)
        row["starts"].append(start)
        row["lls"].append(sum(float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids))))
        row["greedy"].append(
            all(int(logits[t - 1].argmax()) == ids[t] for t in range(start, len(ids)))
        )
    return row


@pytest.mark.parametrize("arch, qwen", [("gpt", False), ("qwen2.5", False), ("qwen2.5", True)])
def test_our_numbers_are_those_of_transformers_on_the_export(
    arch: str, qwen: bool, tmp_path: Path
) -> None:
    tokenizer = tiny_qwen() if qwen else tiny_tokenizer()
    model = tiny_model(arch, vocab_size=400, sequence_len=128).eval()
    export_model(tmp_path / "out", model, tokenizer, chat=False, card="", dtype="float32")
    for kind in ROWS:
        test = make_test(tmp_path, kind, 1, tokenizer)
        rows = []
        for row in test.rows:
            pairs = pairs_of(row.again or row.document)
            # Our tokenizer puts <|bos|> before a text after export too; Qwen's does not
            naive = naive_row(tmp_path / "out", pairs, add_bos=qwen)
            ours = bench.our_row(model, tokenizer, pairs)
            assert (naive["ids"], naive["starts"]) == (ours["ids"], ours["starts"])
            assert naive["greedy"] == ours["greedy"]
            assert naive["lls"] == pytest.approx(ours["lls"], abs=1e-3)
            rows.append(naive)
        predictions = [bench.core_prediction(kind, naive) for naive in rows]
        assert predictions == predict_task(test.task, test.items, test.indices, model, tokenizer)


def test_a_greedy_continuation_counts() -> None:
    """Random models are never right on the rows above: here one is, and one token off is not."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt", vocab_size=400, sequence_len=64).eval()
    context = "The capital of France is"
    ids = tokenizer.encode(context, prepend=tokenizer.get_bos_token_id())
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    order = logits.argsort(descending=True).tolist()
    likeliest, second = order[:2]
    for token, wanted in ((likeliest, True), (second, False)):
        probe = Probe([*ids, token], len(ids))
        assert score_sequences(model, [probe])[0].greedy is wanted


def test_what_was_recorded_is_agreement() -> None:
    result = json.loads(bench.OUT.read_text(encoding="utf-8"))
    assert result["disagreements"] == []
    assert [model["arch"] for model in result["models"]] == list(bench.ARCHS)
    for model in result["models"]:
        names = {row["task"] for row in model["tasks"]}
        assert {"arc_easy", "piqa", "boolq", "hellaswag", "lambada_openai", "winogrande"} <= names
        assert len(names) == 21  # all of CORE that could be had, and PIQA
        assert bench.all_disagreements(model) == [] and model["piqa"]["rows"] >= 20
        assert any(row["by_tokens"] for row in model["tasks"])
        # The models know something: agreement on guesses would say little
        right = [row["core"]["ours"] - row["chance"] for row in model["tasks"]]
        assert sum(right) / len(right) > 0.1
    rows = [row for model in result["models"] for row in model["tasks"]]
    assert sum(row["loglikelihoods"] for row in rows) == result["loglikelihoods"] > 1000
    assert any(row["cropped"] for row in rows) and any(row["cut_again"] for row in rows)


def test_piqa_is_asked_as_lm_eval_asks_it(tmp_path: Path) -> None:
    """Its piqa.yaml: "Question: {{goal}}\\nAnswer:", a space, and the solution; acc_norm by the
    solution's length without the space."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt", vocab_size=400, sequence_len=256).eval()
    rows, task = read_rows(), piqa_task(tmp_path)
    assert 24 <= len(rows) <= 40 and {row["label"] for row in rows} == {0, 1}
    assert read_items(task)[3] == core_item(rows[3])
    test = bench.make_test(replace(task, num_fewshot=0), 8, tokenizer)
    spec = write_piqa(tmp_path, test.indices)
    chosen = [row for _, row in read_jsonl(Path(spec["rows"]))]
    theirs = []
    for row in chosen:
        context = f"Question: {row['goal']}\nAnswer:"
        pairs = [(context, f" {row[key]}") for key in ("sol1", "sol2")]
        theirs.append(bench.our_row(model, tokenizer, pairs))
    ours = [bench.our_row(model, tokenizer, pairs_of(row.document)) for row in test.rows]
    metrics = bench.metrics_of(test, ours)
    normed = [
        bench.best([ll / len(row[key]) for ll, key in zip(found["lls"], ("sol1", "sol2"))])
        for row, found in zip(chosen, theirs)
    ]
    right = [row["label"] for row in chosen]
    assert metrics["acc_norm"] == sum(p == g for p, g in zip(normed, right)) / len(right)
    found = {"rows": theirs, "metrics": metrics}
    assert bench.disagreement(compare_piqa(ours, metrics, found)) == ""
    theirs[0]["pairs"][0][0] += "!"
    theirs[1]["starts"] = [0, 0]
    theirs[2]["lls"] = theirs[2]["lls"][::-1]
    theirs[3]["greedy"] = [True, True]
    noticed = bench.disagreement(compare_piqa(ours, metrics, found))
    for word in ("other_texts 1", "other_tokens 1", "other_predictions 1", "other_greedy 1"):
        assert word in noticed


def test_unknown_tasks_are_refused(tmp_path: Path) -> None:
    bundle = str(test_core.write_bundle(tmp_path))
    with pytest.raises(UserError, match="the bundle has no nonsense"):
        bench.main(bench.Args("python", bundle=bundle, tasks="my_schema|nonsense"))
    assert read_items(read_bundle(Path(bundle))[0]) == test_core.ROWS["multiple_choice"]


# ---- chats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, qwen", [("gpt", False), ("qwen2.5", False), ("qwen2.5", True)])
def test_letters_in_a_chat_are_those_of_transformers(arch: str, qwen: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    tokenizer = tiny_qwen() if qwen else tiny_tokenizer()
    model = tiny_model(arch, vocab_size=400, sequence_len=256).eval()
    export_model(tmp_path / "out", model, tokenizer, chat=True, card="", dtype="float32")
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    task = chat_task(ROWS["multiple_choice"], tokenizer, 255)
    assert len(task) == len(ROWS["multiple_choice"])
    rows = []
    for i in range(len(task)):
        said = chat_document(task[i])
        message = [{"role": "user", "content": said["context"]}]
        text = hf_tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        prompt = hf_tokenizer.encode(text, add_special_tokens=False)
        row: Item = {"ids": [], "starts": [], "lls": []}
        for letter in said["choices"]:
            ids = hf_tokenizer.encode(text + letter, add_special_tokens=False)
            with torch.no_grad():
                logprobs = hf_model(torch.tensor([ids])).logits[0, -2].log_softmax(-1)
            row["ids"].append(ids)
            row["starts"].append(len(prompt))
            row["lls"].append(float(logprobs[ids[-1]]))
        rows.append(row)
    best = [row["lls"].index(max(row["lls"])) for row in rows]
    golds = [chat_document(task[i])["gold"] for i in range(len(task))]
    accuracy = sum(b == g for b, g in zip(best, golds)) / len(golds)
    found = {"rows": rows, "metrics": {"acc": accuracy}}
    compared = compare_chat(task, found, model, tokenizer)
    assert chat_disagreement(compared, 1e-3) == "" and compared["loglikelihoods"] == 15

    rows[0]["lls"] = rows[0]["lls"][::-1]
    rows[1]["starts"] = [0, 0, 0]
    found["metrics"]["acc"] += 0.1
    noticed = chat_disagreement(compare_chat(task, found, model, tokenizer), 1e-3)
    for word in ("other_tokens 1", "other_predictions 1", "log-likelihoods", "accuracy"):
        assert word in noticed


def test_chat_prompts_that_do_not_fit_are_left_out() -> None:
    tokenizer = tiny_tokenizer()
    rows = ROWS["multiple_choice"]
    lengths = [
        len(tokenizer.render_for_completion(chat_task([row], tokenizer, 10**6)[0])) for row in rows
    ]
    limit = sorted(lengths)[2]
    assert len(chat_task(rows, tokenizer, limit)) == sum(n <= limit for n in lengths) < len(rows)
