"""
The rows of an evaluation: brought together from the ranks, written to a file one can read. Floor 4.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat.common import atomic_write
from nanochat.distributed import rank_and_world
from nanochat.tokenizer import without_surrogates

Item = dict[str, Any]


def write_jsonl(path: Path, rows: Sequence[Item]) -> None:
    """One row a line; the file is either whole or as it was. Lone surrogates, which a question may
    hold and a file may not, become U+FFFD."""
    with atomic_write(path, "w") as f:
        f.writelines(without_surrogates(json.dumps(r, ensure_ascii=False)) + "\n" for r in rows)


def gather_rows(rows: list[Item], device: torch.device | str = "cpu") -> list[Item]:
    """The rows of all ranks, on all ranks. They travel as JSON: nothing is unpickled."""
    _, world = rank_and_world()
    if world == 1:
        return rows
    data = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    torch.distributed.all_gather(sizes, torch.tensor([len(data)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    gathered = [torch.zeros_like(padded) for _ in range(world)]
    torch.distributed.all_gather(gathered, padded)
    return [
        row
        for part, size in zip(gathered, sizes)
        for row in json.loads(part[: int(size)].cpu().numpy().tobytes())
    ]
