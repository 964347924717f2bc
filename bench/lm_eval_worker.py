"""
lm-eval on an exported model, in a process of its own: the worker of bench/lm_eval_scores.py.

Imports nothing of this repository, so that it runs under the Python of an environment that has
lm-eval (`pip install "lm-eval[hf]"`). Runs tasks that lie in a folder as YAML files with their
rows beside them, and writes what lm-eval made of every row: the texts it was asked about, the
tokens it made of them, log-likelihoods, and its own metrics. No network is used.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path


def main(folder: Path) -> None:
    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    # Before the imports, which read them
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(folder / "cache"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(
        pretrained=spec["model"],
        dtype="float32",
        device="cpu",
        batch_size=spec["batch_size"],
        add_bos_token=True,
        max_length=spec["max_length"],
    )
    for own in spec.get("own", []):
        borrow(folder, **own)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    out: dict = {"tasks": {}}
    # A call for each list: in one call lm-eval 0.4.13 takes two requests of the same tokens, cut at
    # different places, for one, and gives the shorter continuation the wrong positions' logits
    for names in spec["calls"]:
        found = simple_evaluate(
            model=model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0,
            apply_chat_template=spec["chat"],
        )  # fmt: skip
        for name in names:
            metrics = {
                key.removesuffix(",none"): value
                for key, value in found["results"][name].items()
                if key.endswith(",none") and "stderr" not in key
            }
            rows = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
            out["tasks"][name] = {"metrics": metrics, "rows": [row_of(model, row) for row in rows]}
    for name, rows in spec.get("tokens", {}).items():
        found = [scores_of(model, probes) for probes in rows]
        out["tasks"][f"{name}_tokens"] = {"rows": found}
    packages = ("lm_eval", "transformers", "tokenizers", "torch", "datasets")
    out["versions"] = {name: importlib.metadata.version(name) for name in packages}
    (folder / "found.json").write_text(json.dumps(out), encoding="utf-8")


def borrow(folder: Path, task: str, name: str, rows: str) -> None:
    """A task as lm-eval itself describes it, with our rows in place of its data set."""
    import lm_eval.tasks
    import yaml

    path = Path(lm_eval.tasks.__file__).parent / task / f"{task}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config |= {"task": name, "dataset_path": "json", "dataset_name": None, "training_split": None}
    config["dataset_kwargs"] = {"data_files": {config["validation_split"]: rows}}
    config["num_fewshot"] = 0
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def scores_of(model, probes: list) -> dict:
    """What lm-eval's scoring makes of one row's tokens, each option with where it begins."""
    requests = [(("", ""), ids[:start], ids[start:]) for ids, start in probes]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    return {
        "ids": [ids for ids, _ in probes],
        "starts": [start for _, start in probes],
        "lls": [float(ll) for ll, _ in found],
        "greedy": [bool(greedy) for _, greedy in found],
    }


def row_of(model, sample: dict) -> dict:
    """What lm-eval asked about one row, and what it found."""
    arguments = sample["arguments"]
    if isinstance(arguments, dict):  # as log_samples tidies them up: gen_args_0: {arg_0, arg_1}
        arguments = [[a["arg_0"], a["arg_1"]] for a in arguments.values()]
    encoded = [model._encode_pair(context, continuation) for context, continuation in arguments]
    results = [response[0] for response in sample["resps"]]
    return {
        "pairs": [list(pair) for pair in arguments],
        "ids": [context + continuation for context, continuation in encoded],
        "starts": [len(context) for context, _ in encoded],
        "lls": [float(ll) for ll, _ in results],
        "greedy": [str(greedy) == "True" for _, greedy in results],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
