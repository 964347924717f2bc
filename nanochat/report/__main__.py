"""
Writes the report card, as Markdown and as a page:

    python -m nanochat.report [--model_tag=d4] [--out=report.md] [--gpu_hour_price=2.5]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat import flags
from nanochat.common import get_base_dir
from nanochat.report.card import write_report


@dataclass
class Args:
    """Writes the report card of a run from its metrics files."""

    out: str | None = None
    """The file to write; default: $NANOCHAT_BASE_DIR/report/report.md. The page, report.html, and
    loss.png go beside it."""
    model_tag: str | None = None
    """The run to report on; default: the newest of every stage."""
    gpu_hour_price: float | None = None
    """Dollars for an hour of one GPU, to say what the run cost."""


def main(args: Args) -> None:
    """Writes the report and prints its summary."""
    folder = get_base_dir() / "report"
    out = Path(args.out) if args.out else folder / "report.md"
    print(write_report(folder, out, args.model_tag, args.gpu_hour_price))
    print(f"\nwrote {out} and {out.with_suffix('.html')}")


if __name__ == "__main__":
    flags.run(main, Args)
