"""
Our CORE evaluation against lm-eval (EleutherAI), on the same model and the same rows.

    python -m venv /tmp/lmeval && /tmp/lmeval/bin/pip install "lm-eval[hf]==0.4.13"
    python -m bench.lm_eval_scores --peer_python=/tmp/lmeval/bin/python --bundle=eval_bundle

The recorded result is of the tasks and steps that its "settings" name (--tasks, --steps).

A tiny model of each architecture is trained on the very rows that it is asked about, so that it is
right more often than chance: its scores say nothing about a model, only whether two programs agree.
It is exported by scripts.hf_export and loaded by lm-eval through transformers. lm-eval gets each
row as a task of its own making: the text before the answer, the options, the right one.

Compared are, row by row: the tokens and where the answer begins in them, the log-likelihood of
every option and whether it is what greedy decoding would write; and from these lm-eval's acc,
acc_norm and perplexity, and CORE's prediction. PIQA is asked besides in the words of lm-eval's own
task (bench/lm_eval_piqa.py); where the bundle lacks it, rows of ours stand in for it.

Three things must be set for the numbers to be the same: lm-eval's add_bos_token, since every text
begins with <|bos|> in training; max_length one less than the context, since lm-eval keeps one
token more of a text that is too long; float32. And CORE scores an option by its mean loss over the
tokens that differ between the options, which lm-eval has no metric for: where all options begin
with the same tokens, the row is given to lm-eval a second time, cut there. Where that is within a
word the text cannot be cut so that the tokens stay the same: lm-eval's scoring gets such rows
besides as tokens, cut where CORE begins ("by_tokens" counts them).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench import surroundings
from bench.bpe_common import RESULTS
from bench.lm_eval_chat import chat_disagreement, measure_chat
from bench.lm_eval_piqa import NAME as PIQA
from bench.lm_eval_piqa import compare_piqa, piqa_task, write_piqa
from bench.lm_eval_rows import document, pairs_of, probes_of, recut, write_task
from nanochat import flags
from nanochat.checkpoint import load_model
from nanochat.common import UserError, get_base_dir, print0, read_json, write_json
from nanochat.evals.core import (
    CoreTask,
    Item,
    Probe,
    evaluated_rows,
    fewshot_indices,
    find_spans,
    gold,
    predict_task,
    read_bundle,
    read_items,
    render_prompts,
)
from nanochat.evals.scoring import crop, score_sequences

OUT = RESULTS / "lm_eval.json"
REPO = Path(__file__).resolve().parent.parent
ARCHS = ("gpt", "qwen2.5")
# Two programs add the same float32 numbers in different orders.
CLOSE = 1e-3


@dataclass
class Args:
    """Compare our evaluation with lm-eval's."""

    peer_python: str
    """Python of an environment with lm-eval."""
    bundle: str = ""
    """The CORE bundle; default: $NANOCHAT_BASE_DIR/eval_bundle."""
    items: int = 20
    """Rows of each task."""
    tasks: str = ""
    """Tasks by their label, joined by |; empty: all of the bundle."""
    steps: int = 200
    """Training steps of each model."""
    batch_size: int = 16
    """Rows in one of lm-eval's batches."""
    base_dir: str = ""
    """Folder to keep the models in; those that are there from an earlier call are used again."""
    out: str = str(OUT)
    """Where the result goes."""


# -------------------------------------------------------------------------------------------------
# Both sides of one task


class Row(NamedTuple):
    """One row, ours and as a document."""

    item: Item
    document: Item
    again: Item | None  # cut where CORE begins to score, if that is elsewhere
    spans: list[Probe] | None  # the tokens to ask about, where that is within a word


@dataclass
class Test:
    """One task of the bundle with a number of examples, and its rows."""

    task: CoreTask
    items: list[Item]
    indices: list[int]
    rows: list[Row]

    @property
    def name(self) -> str:
        return f"{self.task.label}_{self.task.num_fewshot}shot"


def make_test(task: CoreTask, max_items: int, tokenizer: Any) -> Test:
    """Turns the rows that CORE would evaluate into documents."""
    items = read_items(task)
    indices = evaluated_rows(task.label, len(items), max_items)
    rows = []
    for index in indices:
        item = items[index]
        shots = fewshot_indices(task.label, index, len(items), task.num_fewshot)
        prompts = render_prompts(task, item, [items[i] for i in shots])
        cut = document(task, item, prompts)
        ours = find_spans(
            task.kind, tokenizer.encode(prompts, prepend=tokenizer.get_bos_token_id())
        )
        same = ours == probes_of(tokenizer, pairs_of(cut))
        again = None if same else recut(tokenizer, task.kind, ours, item.get("gold", 0))
        askable = again is None or ours == probes_of(tokenizer, pairs_of(again))
        rows.append(Row(item, cut, again, None if askable else ours))
    return Test(task, items, indices, rows)


def best(values: Sequence[float]) -> int:
    """The index of the highest, the first of several."""
    return max(range(len(values)), key=values.__getitem__)


def core_prediction(kind: str, found: Item) -> int:
    """CORE's prediction from what lm-eval found: the option of the lowest mean loss."""
    if kind == "language_modeling":
        return int(found["greedy"][0])
    lengths = [len(ids) - start for ids, start in zip(found["ids"], found["starts"])]
    return best([ll / n for ll, n in zip(found["lls"], lengths)])


def our_row(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Item:
    """What the worker finds for a row, by our own code."""
    found = our_scores(model, probes_of(tokenizer, pairs))
    return {"pairs": [list(pair) for pair in pairs], **found}


def our_scores(model: Any, probes: Sequence[Probe]) -> Item:
    """Log-likelihoods of tokens, and whether they are what greedy decoding would write."""
    scores = score_sequences(model, [crop(p, model.config.sequence_len) for p in probes])
    return {
        "ids": [probe.ids for probe in probes],
        "starts": [probe.start for probe in probes],
        "lls": [-s.loss * (len(p.ids) - p.start) for s, p in zip(scores, probes)],
        "greedy": [score.greedy for score in scores],
    }


def metrics_of(test: Test, found: Sequence[Item]) -> dict[str, float]:
    """lm-eval's metrics, by our own code."""
    kind, n = test.task.kind, len(found)
    if kind == "language_modeling":
        acc = sum(row["greedy"][0] for row in found) / n
        return {"acc": acc, "perplexity": math.exp(-sum(row["lls"][0] for row in found) / n)}
    golds = [row.item["gold"] for row in test.rows]
    metrics = {"acc": sum(best(row["lls"]) == g for row, g in zip(found, golds)) / n}
    if kind == "multiple_choice":
        normed = [
            best([ll / len(choice) for ll, choice in zip(row["lls"], of.item["choices"])])
            for row, of in zip(found, test.rows)
        ]
        metrics["acc_norm"] = sum(p == g for p, g in zip(normed, golds)) / n
    return metrics


def compare(test: Test, theirs: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """The agreement on one task. `theirs` is the worker's result by task name."""
    kind = test.task.kind
    found = theirs[test.name]["rows"]
    ours = [our_row(model, tokenizer, pairs_of(row.document)) for row in test.rows]
    again = iter(theirs.get(f"{test.name}_again", {"rows": []})["rows"])
    recuts = [next(again) if row.again else None for row in test.rows]
    our_recuts = [
        our_row(model, tokenizer, pairs_of(row.again)) if row.again else None for row in test.rows
    ]
    tokens = iter(theirs.get(f"{test.name}_tokens", {"rows": []})["rows"])
    by_tokens = [next(tokens) if row.spans else None for row in test.rows]
    our_spans = [our_scores(model, row.spans) if row.spans else None for row in test.rows]
    pairs = [
        (a, b)
        for a, b in zip([*ours, *our_recuts, *our_spans], [*found, *recuts, *by_tokens])
        if a is not None and b is not None
    ]
    lls = [(x, y) for a, b in pairs for x, y in zip(a["lls"], b["lls"])]
    chosen = [core_prediction(kind, c or b or a) for a, b, c in zip(found, recuts, by_tokens)]
    predicted = predict_task(test.task, test.items, test.indices, model, tokenizer)
    golds = [gold(test.task, row.item) for row in test.rows]
    limit = model.config.sequence_len
    return {
        "task": test.task.label,
        "kind": kind,
        "shots": test.task.num_fewshot,
        "rows": len(test.rows),
        "cropped": sum(max(map(len, row["ids"])) > limit for row in ours),
        "cut_again": sum(row.again is not None for row in test.rows),
        "chance": round(test.task.baseline / 100, 4),
        "loglikelihoods": len(lls),
        "max_diff": max(abs(x - y) for x, y in lls),
        "by_tokens": len(by_tokens) - by_tokens.count(None),
        "other_texts": sum(a.get("pairs") != b.get("pairs") for a, b in pairs),
        "other_tokens": sum((a["ids"], a["starts"]) != (b["ids"], b["starts"]) for a, b in pairs),
        "other_greedy": sum(a["greedy"] != b["greedy"] for a, b in pairs),
        "other_predictions": sum(p != c for p, c in zip(predicted, chosen)),
        "core": {
            "ours": sum(p == g for p, g in zip(predicted, golds)) / len(golds),
            "lm_eval": sum(c == g for c, g in zip(chosen, golds)) / len(golds),
        },
        "metrics": {"ours": metrics_of(test, ours), "lm_eval": theirs[test.name]["metrics"]},
    }


def disagreement(row: dict[str, Any]) -> str:
    """What differs on a task; empty if nothing does."""
    wrong = [
        f"{key} {row[key]}"
        for key in ("other_texts", "other_tokens", "other_greedy", "other_predictions")
        if row[key]
    ]
    if row["max_diff"] > CLOSE:
        wrong.append(f"log-likelihoods by up to {row['max_diff']:.2g}")
    ours, theirs = row["metrics"]["ours"], row["metrics"]["lm_eval"]
    if set(ours) != set(theirs):
        wrong.append(f"metrics {sorted(ours)} and {sorted(theirs)}")
    wrong += [
        f"{key} {ours[key]:.6g} and {theirs[key]:.6g}"
        for key in sorted(set(ours) & set(theirs))
        if not math.isclose(ours[key], theirs[key], rel_tol=CLOSE)
    ]
    core = row.get("core")  # not where lm-eval's words are its own
    if core and core["ours"] != core["lm_eval"]:
        wrong.append(f"CORE's accuracy {core}")
    return ", ".join(wrong)


def all_disagreements(model: dict[str, Any]) -> list[str]:
    """What differs on all that a model was asked."""
    found = {f"{row['task']} {row['shots']} shots": disagreement(row) for row in model["tasks"]}
    found["chat"] = chat_disagreement(model["chat"], CLOSE)
    if "piqa" in model:
        found[PIQA] = disagreement(model["piqa"])
    return [f"{model['arch']} {name}: {wrong}" for name, wrong in found.items() if wrong]


# -------------------------------------------------------------------------------------------------
# The run


def run(*command: str, base_dir: Path) -> None:
    """A command as a user would give it, in a base directory of its own."""
    # One thread: a model this small gains nothing from more, and loses much on a busy machine
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run(
            command, cwd=REPO, env=env, check=True, capture_output=True, text=True, encoding="utf-8"
        )
    except FileNotFoundError as e:
        raise UserError(f"--peer_python: {command[0]} does not exist") from e
    except subprocess.CalledProcessError as e:
        raise UserError(f"{' '.join(command)[:200]} failed:\n{e.stderr.strip()[-3000:]}") from e


def write_texts(tasks: Sequence[CoreTask], max_items: int, folder: Path) -> None:
    """The rows that will be asked about, with the right answers, as text to train on."""
    texts = []
    for task in tasks:
        items = read_items(task)
        for index in evaluated_rows(task.label, len(items), max_items):
            prompts = render_prompts(task, items[index], [])
            at = 1 if task.kind == "language_modeling" else items[index]["gold"]
            texts.append(prompts[at])
    for name, part in (("train", texts), ("val", texts[:10])):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in part)


def train(arch: str, steps: int, folder: Path) -> None:
    """A tiny model of that architecture, trained and exported to folder/ARCH; once."""
    if (folder / arch).exists():
        return
    data = [f"--data={folder / 'train.jsonl'}", f"--val_data={folder / 'val.jsonl'}"]
    python = [sys.executable, "-m"]
    if not (folder / "tokenizer").exists():  # one for both
        run(*python, "scripts.tok_train", *data, "--vocab_size=2048", base_dir=folder)
    run(
        *python, "scripts.base_train", *data, f"--arch={arch}", f"--model_tag={arch}", "--depth=2",
        "--max_seq_len=256", "--device_type=cpu", "--device_batch_size=8",
        "--total_batch_size=2048", f"--num_iterations={steps}", "--eval_tokens=4096",
        "--core_metric_every=-1", "--sample_prompts=The", base_dir=folder,
    )  # fmt: skip
    run(
        *python, "scripts.hf_export", "--source=base", f"--model_tag={arch}", "--dtype=float32",
        f"--out={folder / arch}", base_dir=folder,
    )  # fmt: skip


def measure(arch: str, args: Args, tasks: Sequence[CoreTask], folder: Path) -> dict[str, Any]:
    """Trains, exports, asks both, compares."""
    train(arch, args.steps, folder)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    model, tokenizer, _ = load_model("base", "cpu", arch)
    tests = []
    for task in tasks:
        for shots in dict.fromkeys((task.num_fewshot, 0)):
            tests.append(make_test(replace(task, num_fewshot=shots), args.items, tokenizer))
    peer = folder / f"lm_eval_{arch}"
    shutil.rmtree(peer, ignore_errors=True)
    peer.mkdir()
    calls: tuple[list[str], list[str]] = ([], [])
    for test in tests:
        again = [row.again for row in test.rows if row.again]
        first = [row.document for row in test.rows]
        for names, name, documents in zip(calls, (test.name, f"{test.name}_again"), (first, again)):
            if documents:
                write_task(peer, name, test.task.kind, documents)
                names.append(name)
    used = [names for names in calls if names]
    piqa = next(
        (t for t in tests if t.task.path.parent == folder and t.task.num_fewshot == 0), None
    )
    own = [write_piqa(peer, piqa.indices)] if piqa else []
    used += [[PIQA]] if piqa else []

    def ask(**spec: Any) -> dict[str, Any]:
        return ask_lm_eval(args, max_length=model.config.sequence_len - 1, **spec)

    tokens = {test.name: [row.spans for row in test.rows if row.spans] for test in tests}
    theirs = ask(
        folder=peer, model=folder / arch, calls=used, chat=False, own=own,
        tokens={name: spans for name, spans in tokens.items() if spans},
    )  # fmt: skip
    rows = []
    for test in tests:
        rows.append(compare(test, theirs["tasks"], model, tokenizer))
        core, metrics = rows[-1]["core"], rows[-1]["metrics"]["lm_eval"]
        print0(
            f"{arch} {test.name:40} CORE {core['ours']:.3f} {core['lm_eval']:.3f}  acc "
            f"{metrics['acc']:.3f}  max diff {rows[-1]['max_diff']:.1e}  {disagreement(rows[-1])}"
        )
    chat_items = next(test.items for test in tests if test.task.kind == "multiple_choice")
    (peer / "chat").mkdir()
    chat = measure_chat(peer / "chat", chat_items[: 5 * args.items], model, tokenizer, ask)
    print0(f"{arch} chat: max diff {chat['max_diff']:.1e}  {chat_disagreement(chat, CLOSE)}")
    result = {"arch": arch, "peer_versions": theirs["versions"], "tasks": rows, "chat": chat}
    if piqa:
        ours = [our_row(model, tokenizer, pairs_of(row.document)) for row in piqa.rows]
        result["piqa"] = compare_piqa(ours, metrics_of(piqa, ours), theirs["tasks"][PIQA])
        print0(f"{arch} {PIQA}: {disagreement(result['piqa'])}")
    return result


def ask_lm_eval(args: Args, folder: Path, **spec: Any) -> dict[str, Any]:
    """Runs the worker on the tasks in `folder`; what it found."""
    spec = {key: str(v) if isinstance(v, Path) else v for key, v in spec.items()}
    write_json(folder / "spec.json", {**spec, "batch_size": args.batch_size})
    worker = str(Path(__file__).with_name("lm_eval_worker.py"))
    # -I: without the worker's own folder on the path, and so without our modules
    run(args.peer_python, "-I", worker, str(folder), base_dir=folder)
    return read_json(folder / "found.json")


def chosen_tasks(args: Args, tasks: list[CoreTask]) -> list[CoreTask]:
    """Those of --tasks."""
    names = args.tasks.split("|") if args.tasks else [task.label for task in tasks]
    unknown = set(names) - {task.label for task in tasks}
    if unknown:
        raise UserError(f"--tasks: the bundle has no {', '.join(sorted(unknown))}")
    return [task for task in tasks if task.label in names]


def main(args: Args) -> None:
    """Compares on both architectures, and ends in an error where the two disagree."""
    load_before = os.getloadavg()[0]
    bundle = read_bundle(Path(args.bundle or get_base_dir() / "eval_bundle"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.base_dir or name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if all(task.label != "piqa" for task in bundle):
            bundle.append(piqa_task(folder))
        tasks = chosen_tasks(args, bundle)
        write_texts(tasks, args.items, folder)
        models = [measure(arch, args, tasks, folder) for arch in ARCHS]
    wrong = [text for model in models for text in all_disagreements(model)]
    result = {
        "settings": {"rows": args.items, "steps": args.steps, "tasks": [t.label for t in tasks]},
        "max_diff": max(row["max_diff"] for model in models for row in model["tasks"]),
        "loglikelihoods": sum(r["loglikelihoods"] for model in models for r in model["tasks"]),
        "disagreements": wrong,
        "models": models,
        **surroundings(load_before),
    }
    write_json(args.out, result)
    print0(f"wrote {args.out}")
    if wrong:
        raise UserError("our evaluation and lm-eval's disagree:\n" + "\n".join(wrong))


if __name__ == "__main__":
    flags.run(main, Args)
