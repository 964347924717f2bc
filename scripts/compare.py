"""
Compares two training runs: what is different about them, where each got to, what it took.

    python -m scripts.compare base/d4 base/d4-again
    python -m scripts.compare base/d6 somewhere/else/d6 --out=d6.png

A run is named as stage/tag, or by its folder or log. Prints a table and draws loss and validation
over steps, tokens and seconds; all of it goes to a page like the report's, too. Runs that have not
ended are compared as far as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from nanochat import flags
from nanochat.common import get_base_dir
from nanochat.report.compare import compare_text, load_run, write_comparison


@dataclass
class Args:
    """Compare two training runs."""

    a: tyro.conf.Positional[str]
    """One run: stage/tag (base/d4), or a folder with a log.jsonl."""
    b: tyro.conf.Positional[str]
    """The other."""
    out: str | None = None
    """The picture to write, with the text beside it as .md and .html; default: into report/."""


def main(args: Args) -> None:
    a, b = load_run(args.a), load_run(args.b)
    name = f"compare_{a.stage}_{a.tag}_{b.stage}_{b.tag}.png"
    out = Path(args.out) if args.out else get_base_dir() / "report" / name
    print(compare_text(a, b))
    print(f"\nwrote {', '.join(map(str, write_comparison(a, b, out)))}")


if __name__ == "__main__":
    flags.run(main, Args)
