"""A run of ours that takes steps when it is told to: the worker of bench/train_speed.py.

A Trainer with loader and optimizer as scripts.base_train makes them, on made-up documents. Its
argument is JSON (bench/train_speed.py makes it). One line of JSON when it is ready; then, for each
line of JSON on standard input, what that asks for and an answer in a line:

    {"steps": 2, "part": "whole"}    takes steps; seconds, page faults, peak memory
    {"profile": "FILE"}              takes two steps under torch.profiler, writes its table
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from nanochat import distributed
from nanochat.dataloader import RowReader, Source, StepLoader
from nanochat.models import build_model, make_config
from nanochat.optim import make_optimizer
from nanochat.packing import Documents
from nanochat.recipe import settle_horizon
from nanochat.schedule import decay_multiplier, lr_multiplier, muon_momentum
from nanochat.step import TrainStep
from nanochat.train import Trainer
from scripts.base_train import Args

BOS = 0
NUM_IDS = 2**21
MEAN_LENGTH = 700  # tokens of a document, about as on the web
PARTS = ("whole", "passes", "trunk")


def make_ids(vocab_size: int, count: int = NUM_IDS) -> np.ndarray:
    """Made-up text, the same every time: (count,) ids, the frequent ones as frequent as words are
    (Zipf), since what an embedding's gradient costs depends on it."""
    weights = 1.0 / (10 + np.arange(vocab_size))
    drawn = np.random.default_rng(0).choice(vocab_size, count, p=weights / weights.sum())
    return drawn.astype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class MadeUp(Source):
    """One shard of made-up documents, each of which begins with bos."""

    fingerprint, cut = "made up", True

    def __init__(self, vocab_size: int) -> None:
        ids = make_ids(vocab_size)
        lengths = 2 + np.random.default_rng(1).geometric(
            1 / MEAN_LENGTH, 2 * NUM_IDS // MEAN_LENGTH
        )
        ends = np.cumsum(lengths)
        offsets = np.concatenate(([0], ends[ends <= len(ids)])).astype(np.int64)
        ids[offsets[:-1]] = BOS
        self.documents = Documents(ids[: offsets[-1]], offsets)

    def num_shards(self) -> int:
        return 1

    def load(self, shard: int) -> Documents:
        return self.documents

    def tokens(self, shard: int) -> int:
        return len(self.documents.ids)


class Run:
    """Training that can be taken step by step, whole or in part."""

    def __init__(self, spec: dict[str, Any], info: distributed.DistInfo) -> None:
        self.info, length = info, spec["seq_len"]
        args = Args(
            arch=spec["arch"], depth=spec["depth"], max_seq_len=length, num_iterations=100_000,
            total_batch_size=spec["tokens_per_step"], device_batch_size=spec["rows"],
            compile="on" if spec["compile"] else "off", model_tag="speed",
        )  # fmt: skip
        config, _ = make_config(spec["arch"], spec["depth"], spec["vocab_size"], length)
        self.model = build_model(config, info.device, seed=1)
        self.num_steps = settle_horizon(args, self.model, length)
        optimizer = make_optimizer(
            self.model, args.embedding_lr, args.unembedding_lr, args.matrix_lr, args.weight_decay,
            1.0, args.scalar_lr,
        )  # fmt: skip
        reader = RowReader(MadeUp(config.vocab_size), length + 1, 1, BOS)
        rows = args.total_batch_size // length
        self.loader = StepLoader(reader, rows, args.device_batch_size, 0, 1, info.device)
        meta: dict[str, Any] = {
            "tokenizer": None,
            "tokenizer_fingerprint": "",
            "data": {},
            "started_from": None,
        }
        step = TrainStep(args, info, self.model, optimizer, self.num_steps * args.total_batch_size)
        self.trainer = Trainer("base", "speed", step, self.num_steps, meta, self.loader)
        self.whole = (step.forward, optimizer.step)
        self.trunk: Any = None
        self.steps: Any = self.trainer.steps()

    def facts(self) -> dict[str, Any]:
        """What the table says of the run beside its time."""
        return {
            "num_params": sum(p.numel() for p in self.model.parameters()),
            "flops_per_token": self.model.flops_per_token(),
            "peak_flops": self.trainer.train_step.peak_flops,
            "computing": str(self.trainer.train_step),
            "threads": torch.get_num_threads(),
        }

    def switch(self, part: str) -> None:
        """What the next steps do: all of it, no move of the weights, or nothing but the trunk's
        passes (no logits, no loss, no move)."""
        step, optimizer = self.trainer.train_step, self.trainer.optimizer
        step.forward, optimizer.step = self.whole  # type: ignore[method-assign]
        if part != "whole":
            optimizer.step = lambda *_: 0.0  # type: ignore[method-assign, assignment]
        if part == "trunk":
            if self.trunk is None:
                hidden = self.model.hidden
                compiled = self.trainer.train_step.compiled.on
                self.trunk = torch.compile(hidden, dynamic=False) if compiled else hidden
            step.forward = self._only_trunk

    def _only_trunk(self, idx: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return self.trunk(idx).float().sum()

    def take(self, count: int, part: str = "whole") -> dict[str, Any]:
        """Takes `count` steps, from a device that has nothing to do to one that is done."""
        self.switch(part)
        self.trainer.flush()
        faults, started = page_faults(), time.perf_counter()
        for _ in range(count):
            at = next(self.steps)
            batches = self.loader.step(at)
            rates = (lr_multiplier(at, self.num_steps, 40), muon_momentum(at))
            self.trainer.step(batches, *rates, decay_multiplier(at, self.num_steps))
        self.trainer.flush()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "faults": page_faults() - faults, "peak_gib": self.peak_gib()}

    def peak_gib(self) -> float:
        """The most memory held so far: a GPU's by tensors, else the process's."""
        if self.info.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux

    def profile(self, path: str) -> dict[str, Any]:
        """Two steps under torch.profiler; its table of operations goes to `path`."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.info.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
        with profile(activities=activities) as found:
            self.take(2)
        order = f"self_{'cuda' if cuda else 'cpu'}_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70)
        Path(path).write_text(table, encoding="utf-8")
        return {"profile": path}


def page_faults() -> int:
    """New pages that this process has had from the kernel."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def serve(run: Run, questions: IO[str], answers: IO[str]) -> None:
    """Answers until there are no more questions."""
    say(answers, run.facts())
    for line in questions:
        asked = json.loads(line)
        if "profile" in asked:
            say(answers, run.profile(asked["profile"]))
        else:
            say(answers, run.take(asked["steps"], asked.get("part", "whole")))
    run.steps.close()


def say(answers: IO[str], value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def main() -> None:
    spec = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # what training prints is for the log
    if not spec["keep_memory"]:
        distributed.keep_memory = lambda: None
    with distributed.session(spec["device_type"], seed=1) as info:
        serve(Run(spec, info), sys.stdin, answers)


if __name__ == "__main__":
    main()
