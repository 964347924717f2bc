"""karpathy/nanochat's training step, when it is told to: the other worker of bench/train_speed.py.

Imports a checkout of that project, whose package has the name of ours: so this file imports nothing
of ours. Model, optimizer and step are that checkout's own, put together as its own base_train.py
does: compiled model, passes, fused optimizer. Same argument, questions and answers as
bench/train_speed_worker.py, but for parts and profile.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time

import numpy as np
import torch


class PeerRun:
    """The peer's training, step by step."""

    def __init__(self, spec: dict) -> None:
        sys.path.insert(0, spec["peer"])
        gpt = importlib.import_module("nanochat.gpt")
        if not str(gpt.__file__).startswith(spec["peer"]):
            raise SystemExit(f"--peer={spec['peer']} has no nanochat/gpt.py")
        torch.manual_seed(1)
        config = gpt.GPTConfig(
            sequence_len=spec["seq_len"], vocab_size=spec["vocab_size"], n_layer=spec["depth"],
            n_head=spec["n_head"], n_kv_head=spec["n_head"], n_embd=spec["n_embd"],
            window_pattern=spec["window_pattern"],
        )  # fmt: skip
        with torch.device("meta"):
            self.model = gpt.GPT(config)
        self.model.to_empty(device="cpu")
        self.model.init_weights()
        self.optimizer = self.model.setup_optimizer()
        self.forward = torch.compile(self.model, dynamic=False)
        ids = np.load(spec["ids"]).astype(np.int64)
        length, self.rows = spec["seq_len"], spec["rows"]
        count = (len(ids) - 1) // length
        self.x = torch.from_numpy(ids[: count * length]).view(count, length)
        self.y = torch.from_numpy(ids[1 : count * length + 1]).view(count, length)
        self.rows_per_step, self.row = spec["tokens_per_step"] // length, 0

    def facts(self) -> dict:
        return {
            "num_params": sum(p.numel() for p in self.model.parameters()),
            "flops_per_token": self.model.estimate_flops(),
            "peak_flops": None,
            "computing": "float32, compiled (as it always is)",
            "threads": torch.get_num_threads(),
        }

    def step(self) -> float:
        passes, loss_value = self.rows_per_step // self.rows, 0.0
        if self.row + self.rows_per_step > len(self.x):
            self.row = 0
        for _ in range(passes):
            rows = slice(self.row, self.row + self.rows)
            loss = self.forward(self.x[rows], self.y[rows]) / passes
            loss.backward()
            loss_value, self.row = loss.detach(), self.row + self.rows
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * 0.125  # its rule for 8,192 tokens a step
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return float(loss_value)

    def take(self, count: int) -> dict:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        started = time.perf_counter()
        for _ in range(count):
            self.step()
        seconds = time.perf_counter() - started
        usage = resource.getrusage(resource.RUSAGE_SELF)
        faults, peak = usage.ru_minflt - before, usage.ru_maxrss / 2**20
        return {"seconds": seconds, "faults": faults, "peak_gib": peak}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    run = PeerRun(json.loads(sys.argv[1]))
    print(json.dumps(run.facts()), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run.take(json.loads(line)["steps"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
