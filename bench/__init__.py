"""One runnable file a claim; results as JSON with date, machine and versions."""

from __future__ import annotations

import time
from typing import Any

from nanochat.machine import machine_info, versions


def surroundings(load_before: float | None = None) -> dict[str, Any]:
    """What each result file ends with: when, on what machine, with which versions, and with what
    else going on (a load of other work above 0.5 makes times doubtful)."""
    load = {} if load_before is None else {"load_before": round(load_before, 2)}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **load,
        "machine": machine_info(),
        "versions": versions(),
    }
