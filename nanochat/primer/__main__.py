"""
Writes the primer data: python -m nanochat.primer [--seed=1] [--out=DIR] [--show=5]

base_data/ and primer_lists/ (pretraining shards), task_data/primer-*/ (conversations and tasks,
train and test) and eval_bundle/ appear under $NANOCHAT_BASE_DIR or --out. The same seed writes the
same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat import flags
from nanochat.common import get_base_dir, print0
from nanochat.primer.write import sample_documents, write_primer


@dataclass
class Args:
    """Write the primer: a small world in plain English, for training without a network."""

    seed: int = 1
    """Another seed gives other documents and rows; what is held out for tests stays the same."""
    out: str = ""
    """Folder to write to instead of $NANOCHAT_BASE_DIR."""
    scale: float = 1.0
    """Multiplies the number of documents and rows."""
    show: int = 0
    """Only print this many sample documents, and write nothing."""


def main(args: Args) -> None:
    """Prints samples (--show), or writes all files and says where."""
    if args.show:
        for text in sample_documents(args.seed, args.show):
            print0(f"{text}\n{'-' * 80}")
        return
    base_dir = Path(args.out) if args.out else get_base_dir()
    summary = write_primer(base_dir, args.seed, args.scale)
    total = sum(summary["files"].values())
    print0(
        f"primer (seed {args.seed}): {len(summary['files'])} files, {total / 1e6:.1f} MB "
        f"in {base_dir}"
    )


if __name__ == "__main__":
    flags.run(main, Args)
