"""
A base directory small enough to train in within seconds: a sliver of the primer, its tokenizer.

Everything that runs a stage in the tests starts from here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from nanochat.dataset import iter_texts, train_files
from nanochat.primer.write import write_primer
from nanochat.tokenizer import Tokenizer

REPO = Path(__file__).resolve().parent.parent

BASE_FLAGS = [
    "--depth=2", "--max_seq_len=64", "--device_batch_size=2", "--total_batch_size=256",
    "--num_iterations=6", "--eval_tokens=512", "--core_metric_every=-1", "--device_type=cpu",
    "--sample_prompts=The",
]  # fmt: skip
MID_FLAGS = [
    "--mixture=primer-arithmetic@60|primer-facts@60", "--val_mixture=primer-facts",
    "--device_batch_size=2", "--num_iterations=6", "--device_type=cpu", "--sample_prompts=Hello!",
]  # fmt: skip
RL_FLAGS = [
    "--task=primer-math", "--examples_per_step=2", "--num_samples=4", "--max_new_tokens=12",
    "--num_iterations=4", "--eval_examples=4", "--device_type=cpu", "--init_lr_frac=0.5",
    "--source=mid",
]  # fmt: skip


def make_world(base_dir: Path) -> None:
    """Writes data and tokenizer. NANOCHAT_BASE_DIR must point to base_dir already."""
    write_primer(base_dir, seed=1, scale=0.01)
    tokenizer = Tokenizer.train(iter_texts(train_files()), 500)
    tokenizer.save(base_dir / "tokenizer")


@contextmanager
def new_world(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new base directory with data and tokenizer, which is everybody's within the block."""
    folder = factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        make_world(folder)
        yield folder


def run_stage(name: str, *argv: str) -> None:
    """Runs scripts.<name> in this process, as its command line would."""
    module = __import__(f"scripts.{name}", fromlist=["Args"])
    main: Any = module.main
    main(flags.parse(module.Args, list(argv)))


def torchrun_command(ranks: int, name: str) -> list[str]:
    """The words before the flags of scripts.<name>."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
        "-m", f"scripts.{name}", "--",
    ]  # fmt: skip


def torchrun(ranks: int, name: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Runs scripts.<name> under torchrun with that many gloo ranks on this machine."""
    command = [*torchrun_command(ranks, name), *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=REPO, env=env, capture_output=True, text=True, encoding="utf-8",
        timeout=240, check=False,
    )  # fmt: skip
