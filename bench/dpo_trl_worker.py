"""TRL's DPO loss on a batch of pairs, in a process of its own: the worker of bench/dpo_trl.py.

Imports nothing of this repository, so that it runs under the Python of an environment that has trl.
TRL renders, tokenizes and pads the pairs itself, and takes its own loss of the exported models. No
network is used.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path


def main(spec: dict) -> None:
    folder = Path(spec["folder"])
    # Before the imports, which read them
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(folder / "cache"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    from datasets import Dataset
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model, reference = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("model", "reference")
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in spec["rows"]
    ]
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(folder / "trl"), beta=spec["beta"], loss_type="sigmoid", max_length=None,
            per_device_train_batch_size=len(rows), use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    save_file({n: g.contiguous() for n, g in grads.items()}, folder / "gradients.safetensors")
    lengths = batch["attention_mask"].sum(1).tolist()
    found = {
        "loss": loss.item(),
        "ids": [row[:n].tolist() for row, n in zip(batch["input_ids"], lengths)],
        "learned": [row[:n].tolist() for row, n in zip(batch["completion_mask"], lengths)],
        "versions": {n: importlib.metadata.version(n) for n in ("trl", "transformers", "torch")},
    }
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
