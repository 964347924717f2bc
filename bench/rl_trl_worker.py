"""
TRL's GRPO on an exported model and given replies, in a process of its own: the worker of
bench/rl_trl.py and bench/rl_speed.py.

Imports nothing of this repository, so that it runs under the Python of an environment that has
TRL. The replies and rewards come from a file; TRL makes advantages, reference log-probabilities,
loss and gradient of them. No network is used.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path


def make_trainer(spec: dict, case: dict, folder: Path):
    """GRPOTrainer on the model of the first step, with our replies in place of its own."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    rows = spec["rows"]
    num_samples = spec["num_samples"]
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    def replies(prompts, trainer):
        return {
            "prompt_ids": [row["prompt"] for row in rows],
            "completion_ids": [row["reply"] for row in rows],
            "logprobs": [row["log_probs"] for row in rows],
            "env_mask": [row["mask"] for row in rows],
        }

    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=not spec.get("cuda"), report_to=[],
        bf16=bool(spec.get("cuda")), per_device_train_batch_size=spec.get("batch", len(rows)),
        gradient_accumulation_steps=len(rows) // spec.get("batch", len(rows)),
        num_generations=num_samples, max_completion_length=spec["max_new_tokens"],
        temperature=1.0, loss_type="dapo", beta=case["kl"], epsilon=case["clip"] or 1e9,
        epsilon_high=case["clip"] or 1e9, scale_rewards="group" if case["by_std"] else "none",
        mask_truncated_completions=False, use_bias_correction_kl=True,
        gradient_checkpointing=False, max_steps=spec.get("steps", 1),
        learning_rate=0.0 if "batch" not in spec else 1e-6, disable_dropout=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    prompts = [f"problem {i}" for i in range(len(rows) // num_samples)]
    return GRPOTrainer(
        model=spec["model"], args=config, processing_class=tokenizer,
        reward_funcs=lambda **_: [row["reward"] for row in rows],
        train_dataset=Dataset.from_dict({"prompt": prompts}), rollout_func=replies,
    )  # fmt: skip


def measure(spec: dict, case: dict, folder: Path) -> dict:
    """Loss and gradient of one case."""
    import torch
    from safetensors.torch import load_file, save_file

    trainer = make_trainer(spec, case, folder)
    model = trainer.model
    model.train()
    inputs = [{"prompt": f"problem {i}"} for i in range(len(spec["rows"]) // spec["num_samples"])]
    inputs = [row for row in inputs for _ in range(spec["num_samples"])]
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(inputs)
    if case["moved"]:  # as after further steps on the same replies
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with torch.no_grad():
            batch["old_per_token_logps"] = trainer._get_per_token_logps_and_entropies(
                model, ids, mask, batch["completion_ids"].size(1)
            )[0]
        model.load_state_dict(load_file(spec["moved_weights"]), strict=False)
        if getattr(model.config, "tie_word_embeddings", False):
            model.tie_weights()
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    save_file({n: g.contiguous() for n, g in gradients.items()}, folder / f"{case['name']}.grad")
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
    return {
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "advantages": batch["advantages"].flatten().tolist(),
        "tokens": int(batch["num_items_in_batch"]),
    }


def train(spec: dict, case: dict, folder: Path) -> dict:
    """Seconds of the last training step by Trainer.train: the ones before warm up."""
    trainer = make_trainer(spec, case, folder)
    begun = {"calls": 0}
    original = trainer.training_step
    before = (spec["steps"] - 1) * trainer.args.gradient_accumulation_steps

    def timed(*args, **kwargs):
        if begun["calls"] == before:
            begun["at"] = time.perf_counter()
        begun["calls"] += 1
        return original(*args, **kwargs)

    trainer.training_step = timed
    trainer.train()
    return {"seconds": time.perf_counter() - begun["at"]}


def generate(spec: dict) -> dict:
    """Seconds that transformers' generate, which TRL samples with, takes for new replies."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if spec.get("cuda") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype).eval()
    if spec.get("cuda"):
        model.cuda()
    prompts = [row["prompt"] for row in spec["rows"]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(0)
    with torch.inference_mode():
        for n in (4, spec["max_new_tokens"]):  # the first warms up
            begun = time.perf_counter()
            out = model.generate(
                ids, attention_mask=mask.to(ids.device), do_sample=True, temperature=1.0, top_k=0,
                min_new_tokens=n, max_new_tokens=n, pad_token_id=0,
            )  # fmt: skip
            out = out.cpu()
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "tokens": (out.size(1) - longest) * len(prompts)}


def main(folder: Path) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(folder / "cache"))
    os.environ.update(TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    import torch

    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    if threads := spec.get("threads"):
        torch.set_num_threads(threads)
    if spec["task"] == "loss":
        found = {case["name"]: measure(spec, case, folder) for case in spec["cases"]}
    else:
        case = {"name": "speed", "by_std": False, "clip": 0.0, "kl": 0.0}
        found = {"train": train(spec, case, folder)}
        if spec["generate"]:
            found["generate"] = generate(spec)
    packages = ("trl", "transformers", "torch", "accelerate")
    versions = {name: importlib.metadata.version(name) for name in packages}
    out = {"found": found, "versions": versions}
    (folder / "found.json").write_text(json.dumps(out), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
