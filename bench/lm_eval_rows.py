"""
The rows of a CORE task as lm-eval takes them: documents, and the YAML that says how to read them.

A document is a row with its few-shot examples already before it, cut in two where the answer
begins; lm-eval puts nothing of its own around it. For bench/lm_eval_scores.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from nanochat.evals.core import CoreTask, Item, Probe


def document(task: CoreTask, item: Item, prompts: Sequence[str]) -> Item:
    """The row with its examples, cut where the answer begins. The delimiter stays at the end of the
    context: lm-eval moves trailing white space to the answer by itself."""
    if task.kind == "multiple_choice":
        context = prompts[0].removesuffix(item["choices"][0])
        return {"context": context, "choices": item["choices"], "gold": item["gold"]}
    end = item["continuation"]
    if task.kind == "schema":
        contexts = [prompt.removesuffix(end) for prompt in prompts]
        return {"contexts": contexts, "continuation": end, "gold": item["gold"]}
    return {"context": prompts[1].removesuffix(end), "continuation": end}


def recut(tokenizer: Any, kind: str, probes: Sequence[Probe], gold: int) -> Item:
    """The same texts as a row that is cut where CORE begins to score."""
    befores = [tokenizer.decode(ids[1:start]) for ids, start in probes]  # without bos
    afters = [tokenizer.decode(ids[start:]) for ids, start in probes]
    if kind == "multiple_choice":
        return {"context": befores[0], "choices": afters, "gold": gold}
    if kind == "schema":
        return {"contexts": befores, "continuation": afters[0], "gold": gold}
    return {"context": befores[0], "continuation": afters[0]}


def pairs_of(document: Item) -> list[tuple[str, str]]:
    """(context, continuation) of every option: what lm-eval asks a model about."""
    if "choices" in document:
        return [(document["context"], choice) for choice in document["choices"]]
    contexts = document.get("contexts") or [document["context"]]
    return [(context, document["continuation"]) for context in contexts]


def probes_of(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Probe]:
    """The tokens of context and continuation, and where the latter begins: after as many tokens as
    the context alone has, less the white space at its end."""
    bos = tokenizer.get_bos_token_id()
    whole = tokenizer.encode([context + end for context, end in pairs], prepend=bos)
    contexts = tokenizer.encode([context.rstrip() for context, _ in pairs], prepend=bos)
    return [Probe(ids, len(context)) for ids, context in zip(whole, contexts)]


def config_of(name: str, kind: str, rows: Path) -> dict[str, Any]:
    """lm-eval's description of a task."""
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "num_fewshot": 0,  # the examples are in the context already
        "target_delimiter": "",  # so is the delimiter
    }
    metrics = ["acc"]
    if kind == "multiple_choice":
        config |= {"output_type": kind, "doc_to_text": "context", "doc_to_choice": "choices"}
        config["doc_to_target"] = "gold"
        metrics.append("acc_norm")
    elif kind == "schema":  # one continuation for several contexts, as its winogrande has it
        config |= {"output_type": "multiple_choice", "doc_to_text": "gold"}
        config |= {"doc_to_choice": "contexts", "doc_to_target": "continuation"}
    else:
        config |= {"output_type": "loglikelihood", "doc_to_text": "context"}
        config["doc_to_target"] = "continuation"
        metrics.append("perplexity")
    config["metric_list"] = [
        {
            "metric": metric,
            "aggregation": "perplexity" if metric == "perplexity" else "mean",
            "higher_is_better": metric != "perplexity",
        }
        for metric in metrics
    ]
    return config


def write_task(folder: Path, name: str, kind: str, documents: Sequence[Item]) -> None:
    """Writes NAME.yaml and NAME.jsonl."""
    rows = folder / f"{name}.jsonl"
    with open(rows, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(document) + "\n" for document in documents)
    text = yaml.safe_dump(config_of(name, kind, rows))
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
