"""
Our DPO loss against TRL's, on the same models and the same pairs.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl transformers torch
    python -m bench.dpo_trl --peer_python=/tmp/trl/bin/python

Two tiny random models of each architecture, the one that is trained and the reference, are exported
and loaded by TRL through transformers. TRL renders the pairs by the exported chat template and
tokenizes them itself. Compared are the tokens, which of them are learned from, the loss, and its
gradient in every parameter.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench import surroundings
from bench.bpe_common import RESULTS
from nanochat import flags
from nanochat.common import UserError, print0, read_json, write_json
from nanochat.distributed import DistInfo
from nanochat.dpo import encode_pairs, make_batch, reference_log_probs
from nanochat.hf import to_hf_name
from nanochat.hf_export import export_model
from nanochat.models import ARCHITECTURES, build_model
from nanochat.tasks.common import Rows
from nanochat.tokenizer import Tokenizer

REPO = Path(__file__).resolve().parent.parent
ARCHS = ("gpt", "qwen2.5")  # those that transformers has
CLOSE = 1e-4  # two programs add the same float32 numbers in different orders


@dataclass
class Args:
    """Compare our DPO loss with TRL's."""

    peer_python: str
    """Python of an environment with trl."""
    pairs: int = 8
    """Pairs in the batch."""
    beta: float = 0.1
    """As of scripts.chat_dpo."""
    out: str = str(RESULTS / "dpo_trl.json")
    """Where the result goes."""


def rows_of(count: int) -> list[dict[str, str]]:
    """Pairs of different lengths."""
    return [
        {
            "prompt": f"How many are {i} and {i * i}?" + " Take your time." * (i % 3),
            "chosen": f"They are {i + i * i}." + " That is easy." * (i % 4),
            "rejected": "I cannot count." + " Sorry!" * (i % 5),
        }
        for i in range(count)
    ]


def random_model(arch: str, vocab_size: int, seed: int) -> Any:
    """Two layers, every parameter random: at the start some are zero, and would hide errors."""
    config = ARCHITECTURES[arch][1].from_depth(2, vocab_size, 256)
    model = build_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p += 0.5 * noise * (p.size(-1) ** -0.5 if p.ndim == 2 else 0.3)
    return model


def compare(arch: str, args: Args, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(agreement, versions of the peer) for one architecture."""
    rows = rows_of(args.pairs)
    tokenizer = Tokenizer.train([" ".join(row.values()) for row in rows], 320)
    model, start = (random_model(arch, tokenizer.get_vocab_size(), seed) for seed in (1, 2))
    for name, which in (("model", model), ("reference", start)):
        export_model(folder / name, which, tokenizer, chat=True, card="", dtype="float32")
    spec = {"folder": str(folder), "rows": rows, "beta": args.beta}
    command = [args.peer_python, "bench/dpo_trl_worker.py", json.dumps(spec)]
    try:
        subprocess.run(
            command, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            check=True, capture_output=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except FileNotFoundError as e:
        raise UserError(f"--peer_python={args.peer_python} does not exist") from e
    except subprocess.CalledProcessError as e:
        raise UserError(f"the worker failed:\n{e.stderr.strip()[-3000:]}") from e
    found = read_json(folder / "found.json")

    cpu, pad = torch.device("cpu"), tokenizer.get_bos_token_id()
    pairs = encode_pairs(Rows([("rows", rows, None)]), range(len(rows)), tokenizer, 256)
    numbers = range(len(rows))
    info = DistInfo(0, 0, 1, cpu)
    reference = reference_log_probs(start, pairs, len(rows), pad, info, nullcontext)
    batch = make_batch(pairs, numbers, reference, pad, cpu, args.beta)
    loss = batch.loss(model) / batch.count()
    loss.backward()
    gradients = load_file(folder / "gradients.safetensors")
    errors = {}
    for name, p in model.named_parameters():
        theirs = gradients[to_hf_name(arch, name)]
        errors[name] = float((p.grad - theirs).norm() / theirs.norm())
    ours = [pairs.replies[i][side] for side in (0, 1) for i in numbers]
    result = {
        "pairs": len(rows),
        "loss": loss.item(),
        "trl_loss": found["loss"],
        "loss_difference": abs(loss.item() - found["loss"]),
        "same_tokens": [ids for ids, _ in ours] == found["ids"],
        "same_learned": [learned for _, learned in ours] == found["learned"],
        "parameters_compared": len(errors),
        "largest_gradient_error": max(errors.values()),  # norm of the difference over the norm
    }
    return result, found["versions"]


def main(args: Args) -> None:
    load_before = os.getloadavg()[0]
    results: dict[str, Any] = {}
    for arch in ARCHS:
        with tempfile.TemporaryDirectory() as folder:
            results[arch], peer = compare(arch, args, Path(folder))
        print0(f"{arch}: {json.dumps(results[arch])}")
    agree = all(
        r["same_tokens"]
        and r["same_learned"]
        and r["loss_difference"] < CLOSE
        and r["largest_gradient_error"] < CLOSE
        for r in results.values()
    )
    write_json(
        Path(args.out),
        {"agree": agree, **results, "beta": args.beta, "peer": peer, **surroundings(load_before)},
    )
    print0(f"{'agree' if agree else 'DIFFER'}; wrote {args.out}")


if __name__ == "__main__":
    flags.run(main, Args)
