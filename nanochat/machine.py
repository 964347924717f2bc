"""
What this machine and this installation are, for reports and benchmarks.

A number means little without the machine it was measured on. Everything here tolerates absence: a
value that cannot be learnt is left out. Nothing names the user or the host. Floor 0.

    python -c "from nanochat.machine import machine_info; print(machine_info())"
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from nanochat.common import fingerprint

_ROOT = Path(__file__).resolve().parent.parent
_CODE = ("nanochat", "scripts")  # the folders of what a run executes
_PACKAGES = ("nanochat", "torch", "tiktoken", "rustbpe", "numpy")

# Dense bfloat16 peak of one GPU in FLOP/s (float16 where there is no bfloat16), from the makers'
# data sheets. The first name that is found counts: the special before the general.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "V100": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "T4": 65e12,
    "MI300X": 1307e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def machine_info() -> dict[str, Any]:
    """CPU model, cores this process may use, memory (GiB), GPU names, platform."""
    info = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": _cores(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
    }
    return {key: value for key, value in info.items() if value}


def versions() -> dict[str, str]:
    """Versions of Python and the packages that matter, and the git revision in a checkout."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if revision := git_revision():
        found["git"] = revision
    return found


def git_revision(root: Path | None = None) -> str | None:
    """Short commit of the checkout at `root` (default: the one this package lies in), with "-dirty"
    when tracked files were changed. None outside a checkout, before a first commit, without git."""
    root = root or _ROOT
    # An installed copy may lie inside some other project's checkout: only our own root counts.
    if not (root / ".git").exists():
        return None
    revision = _output("git", "-C", str(root), "rev-parse", "--short=10", "HEAD")
    if not revision:
        return None
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{revision}-dirty" if changes else revision


def code_fingerprint(root: Path | None = None) -> str:
    """16 digits that stand for every line of Python below nanochat/ and scripts/, with or without
    git: two of the same ran the same code."""
    root = root or _ROOT
    files = sorted(path for folder in _CODE for path in (root / folder).rglob("*.py"))
    return fingerprint(
        *(part for path in files for part in (path.relative_to(root).as_posix(), path.read_bytes()))
    )


def code_changes(root: Path | None = None) -> str:
    """What was changed since the commit that git_revision names, new files included, as a patch
    for `git apply`; empty if nothing was, and outside a checkout."""
    root = root or _ROOT
    if git_revision(root) is None:
        return ""
    git = ("git", "-C", str(root))
    kept = (*_CODE, "rustbpe", "pyproject.toml", "uv.lock")
    where = [name for name in kept if (root / name).exists()]
    parts = [_output(*git, "diff", "HEAD", "--binary", "--", *where)]
    new = _output(*git, "ls-files", "--others", "--exclude-standard", "-z", "--", *where) or ""
    for name in filter(None, new.split("\0")):  # status 1: there is a difference
        add = ("diff", "--no-index", "--binary", "--", os.devnull, name)
        parts.append(_output(*git, *add, status=1))
    return "".join(f"{part}\n\n" for part in parts if part)


def _output(*command: str, status: int = 0) -> str | None:
    """What a command prints, or None if it is missing, slow or ends with another status."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)  # seconds
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode != status:
        return None
    return done.stdout.decode("utf-8", "replace").strip("\n")  # a patch's last line may be " "


def _cpu_model() -> str | None:
    """The processor's marketing name; the standard library knows it on no platform."""
    try:
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            if line.lower().startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass  # not Linux
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or None


def peak_flops(gpu: str) -> float | None:
    """The GPU's entry in PEAK_FLOPS, by the name that its driver gives; None if it has none."""
    found = (flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", gpu))
    return next(found, None)  # whole words: an L40 is no L4


def _cores() -> int | None:
    """Cores this process may use: fewer than the machine has, under taskset or in a container."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count()


def _memory_gib() -> float | None:
    """Memory in GiB: the machine's, or a container's limit where that is lower."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max": no limit
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return round(size / 2**30, 1)


def free_memory() -> int | None:
    """Bytes that this machine, or a container's limit, has left for new allocations; the whole
    memory where that is all that can be learnt (macOS), None where not even that (Windows)."""
    free = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        free.append(int(text.split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError, IndexError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        # Files that were read count as used, and are given up when memory is wanted.
        stat = (group / "memory.stat").read_text(encoding="utf-8")
        free.append(limit - used + int(stat.split("inactive_file ")[1].split()[0]))
    if free:
        return max(0, min(free))
    total = _memory_gib()
    return None if total is None else int(total * 2**30)


def peak_memory(device_type: str) -> float | None:
    """GiB that this process has held at most so far: of its GPU on CUDA, else of the machine's
    memory. None where that cannot be learnt (Windows)."""
    if device_type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but on macOS bytes
    return round(most * (1 if platform.system() == "Darwin" else 1024) / 2**30, 3)


def _gpus() -> list[str]:
    """Names of the CUDA devices PyTorch sees, with their memory; or Apple's, if that is there."""
    import torch

    if torch.backends.mps.is_available():
        return ["Apple GPU (mps)"]
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        found.append(f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    return found
