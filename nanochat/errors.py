"""
What went wrong, in words for the one who can mend it.

    error = explain(error)   # a UserError with the command that helps, or None: a bug of ours

Our own code raises UserErrors. What Python, the operating system and torch raise where the user's
disk, network, driver or installation is at fault becomes one here, in three tables; nothing else
is. Floor 0.
"""

from __future__ import annotations

import errno
import os
import re
import select
import shutil
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nanochat.common import UserError, get_base_dir

ENVIRONMENT = Path(__file__).resolve().parent.parent / ".venv"  # which setup.sh makes
SETUP = "`source setup.sh` in nanochat's folder installs what is needed and activates it"

# Packages that only some commands need, and what installs them
INSTALL = {
    "gguf": "uv pip install 'gguf>=0.17'",
    "ray": "uv pip install 'ray>=2.40'",
    "wandb": "uv pip install wandb",
    "transformers": "uv pip install 'transformers>=5.0'",
}

# errno: what happened to {path}, and what helps besides another place
SYSTEM = {
    errno.EACCES: ("{path} may not be read or written by this user", ""),
    errno.EPERM: ("{path} may not be changed by this user", ""),
    errno.EROFS: ("{path} is on a disk that can only be read", ""),
    errno.ENOSPC: ("the disk of {path} is full", "make room there"),
    errno.EDQUOT: ("the quota on the disk of {path} is used up", "make room there"),
    errno.ENOTDIR: ("{path} is a file where a folder is needed", ""),
    errno.EEXIST: ("{path} is a file where a folder is needed", ""),
    errno.EISDIR: ("{path} is a folder where a file is needed", ""),
    errno.ENOENT: ("{path} is not there", ""),
    errno.ENAMETOOLONG: ("the name {path} is too long for its disk", ""),
    errno.EIO: ("the disk failed at {path}", "look at `dmesg`"),
}

SEE_DEBUG = "(--debug shows where it happened)"
_LOWER_MEMORY = (
    "Set a smaller --device_batch_size (training: the results stay the same; evaluation: "
    "--batch_size), --activation_checkpointing=block, or a smaller --max_seq_len or --depth; "
    "`python -m scripts.plan` says what a model needs, `nvidia-smi` what other programs hold"
)
_OTHER_BUILD = (
    "`uv pip install torch --index-url https://download.pytorch.org/whl/cu126` (or another of "
    "https://pytorch.org/get-started/locally), or --device_type=cpu"
)
# What torch (and what it stands on) says, and the words for it. The first that is found counts.
TORCH = [
    (
        r"NVIDIA driver on your system is too old|driver version is insufficient|"
        r"provided PTX was compiled with an unsupported toolchain",
        "the NVIDIA driver is older than the CUDA of PyTorch {torch}",
        f"Update the driver (`nvidia-smi` shows it), or use a build for an older CUDA: "
        f"{_OTHER_BUILD}",
    ),
    (
        r"no kernel image is available|is not compatible with the current PyTorch installation",
        "PyTorch {torch} has no code for this GPU: it is older or newer than that build",
        f"Use a build that knows it: {_OTHER_BUILD}",
    ),
    (
        r"not compiled with CUDA enabled",
        "PyTorch {torch} is a build without CUDA",
        f"Use one that has it: {_OTHER_BUILD}",
    ),
    (
        r"Found no NVIDIA driver|no CUDA GPUs are available|no CUDA-capable device",
        "PyTorch {torch} finds no NVIDIA driver or GPU",
        "See whether `nvidia-smi` and CUDA_VISIBLE_DEVICES show one, or use --device_type=cpu",
    ),
    (
        r"devices?(\(s\))? (is|are|is/are) busy or unavailable",
        "the GPU is held by another program",
        "`nvidia-smi` names it; CUDA_VISIBLE_DEVICES chooses another GPU",
    ),
    (
        r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|Unable to allocate",
        "memory has run out",
        _LOWER_MEMORY,
    ),
    (
        r"uncorrectable ECC error|fell off the bus|GPU is lost",
        "the GPU itself failed",
        "Restart the machine (`dmesg` says more), and continue with --resume",
    ),
    (
        r"No working C\+\+ compiler|InvalidCxxCompiler|Failed to find C compiler|"
        r"C\+\+ compiler.* not found",
        "torch.compile finds no C++ compiler",
        "Install one (Debian: `apt install g++`), or run with --compile=off",
    ),
    (
        r"No space left on device|os error 28|ENOSPC",
        "a disk is full",
        "Make room (`df -h` shows where), or set NANOCHAT_BASE_DIR to a folder on another disk",
    ),
    (r"Too many open files", "too many files are open", "Raise the limit: `ulimit -n 65536`"),
    (
        r"No API key configured|wandb login",
        "wandb is not logged in",
        "`wandb login` does that, WANDB_MODE=offline does without; or drop --run: log.jsonl beside "
        "the checkpoints has all of it anyway",
    ),
    (
        r"Couldn't reach .* on the Hub|Failed to resolve|Name or service not known|"
        r"Max retries exceeded|Cannot reach|Network is unreachable|offline mode is enabled|"
        r"Temporary failure in name resolution|Connection (refused|reset by peer)",
        "the network was not reached",
        "Run it again when it is there, or name files of yours (--data, task_data/: see the "
        "README); HF_ENDPOINT names a mirror of the hub",
    ),
]  # fmt: skip


def explain(error: BaseException) -> UserError | None:
    """What the user can mend, as a UserError; None if the error is none of that, so a bug."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, ImportError):
        return _missing_package(error)
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return _system_error(error)
    if isinstance(error, MemoryError):
        return UserError(f"memory has run out. {_LOWER_MEMORY}")
    said = str(error)
    # Not a KeyError or ValueError of ours which has such words in a value by chance
    if not isinstance(error, ArithmeticError | LookupError | NameError | TypeError | ValueError):
        for pattern, what, mend in TORCH:
            if re.search(pattern, said, re.IGNORECASE):
                what = what.format(torch=_version("torch"))
                return UserError(f"{what} ({_first_line(said)}). {mend}. {SEE_DEBUG}")
    return None


def _missing_package(error: ImportError) -> UserError | None:
    name = (error.name or "").partition(".")[0]
    if name in ("", "nanochat", "scripts") or not isinstance(error, ModuleNotFoundError):
        return None  # a wrong import of ours, or a package that is there and broken
    if (ENVIRONMENT / "pyvenv.cfg").exists() and Path(sys.prefix) != ENVIRONMENT:
        how = f"nanochat's environment is not active; `source {ENVIRONMENT}/bin/activate` does that"
    else:
        how = f"install it: `{INSTALL[name]}`" if name in INSTALL else SETUP
    return UserError(f"the Python package {name} is not installed in {sys.prefix}: {how}")


def _system_error(error: OSError) -> UserError | None:
    what, mend = SYSTEM[error.errno or 0]
    base = get_base_dir().absolute()
    if isinstance(error.filename, str | os.PathLike):
        path = Path(error.filename).absolute()
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):  # a write names no file
        return UserError(
            f"a disk is full: {error.strerror}. NANOCHAT_BASE_DIR={base} has {_free(base):.1f} GB "
            "free, `df -h` shows all disks. Make room, or set NANOCHAT_BASE_DIR to a folder on "
            f"another one. {SEE_DEBUG}"
        )
    else:
        return None  # of a socket or a process
    if error.errno in (errno.ENOTDIR, errno.EEXIST):  # which part of the path is in the way
        files = [p for p in (path, *path.parents) if os.path.isfile(p)]
        if not files:
            return None  # a folder that is there already: we should have looked
        path = files[0]
    if base in (path, *path.parents) or path in base.parents:
        place = f"set NANOCHAT_BASE_DIR (now {base}) to a folder on a disk that you can write to"
    else:
        flag = _flag_that_names(path)
        place = f"name another place than {flag}" if flag else "name another place"
    free = f" ({_free(path):.1f} GB free)" if error.errno == errno.ENOSPC else ""
    mend = " or ".join(filter(None, [mend, place]))
    return UserError(f"{what.format(path=path)}{free}. {mend[0].upper()}{mend[1:]}. {SEE_DEBUG}")


def _flag_that_names(path: Path) -> str:
    """The flag and value by which the command line led to `path`; empty if none did."""
    words = [word for word in sys.argv[1:] if word != "--"]
    for word, after in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        value = value if equals else after
        named = Path(value).absolute()
        if not name.startswith("-") or not value:
            continue
        if named in (path, *path.parents) or (os.sep in value and path in named.parents):
            return f"{name}={value}"
    return ""


def _free(path: Path) -> float:
    """Free GB of the disk that has `path`, which need not be there."""
    try:
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free / 1e9
    except (OSError, StopIteration):
        return 0.0


def words(
    error: BaseException, debug: bool = False, rank: int | None = None, where: str = ""
) -> str:
    """What a command line shows of an error: what the user can mend, or the sentence for a bug.

    `debug`: after its traceback. `rank`: who says it, of several. `where`: the file that has the
    traceback already; without one a bug's is written to a file of its own."""
    known = explain(error)
    shown = "".join(traceback.format_exception(error)) if debug else ""
    if known is None and not debug and not where:
        where = save_traceback(error)
        if not where:  # no disk takes it, so it must not be lost
            shown = "".join(traceback.format_exception(error))
    who = "error" if rank is None else f"error (rank {rank})"
    return f"{shown}{who}: {known or bug(error, debug, where)}"


def drop_closed_output() -> bool:
    """Whether nobody reads standard output any more; if so, what is left of it goes nowhere, or
    Python would complain of it while it ends."""
    try:
        output = sys.stdout.fileno()
        poll = select.poll()
        poll.register(output, 0)
        if not poll.poll(0):  # errors are always told: the other end is closed
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    except (OSError, ValueError, AttributeError):  # no file; Windows has no poll
        return False
    return True


def bug(error: BaseException, debug: bool, where: str) -> str:
    """The sentence for an error that nobody foresaw. `where`: the file that has its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    last = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    said = f"unexpected {type(error).__name__}: {_first_line(str(error)) or 'no message'}{last}"
    said += ". This is a bug in nanochat or in what is installed"
    if debug:
        return said
    saved = f"; {where} has it too" if where else ""
    return f"{said}: run again with --debug for the traceback{saved}"


def save_traceback(error: BaseException) -> str:
    """Writes the traceback to a file of its own, with the command line and the versions; returns
    the file's path, or "" where no file can be written."""
    text = (
        f"{' '.join(sys.argv)}\nPython {sys.version.split()[0]}, torch {_version('torch')}, "
        f"nanochat {_version('nanochat')}\n\n{''.join(traceback.format_exception(error))}"
    )
    name = f"{Path(sys.argv[0]).stem or 'python'}-{time.strftime('%Y%m%d-%H%M%S')}"
    for folder in (get_base_dir() / "rank_logs", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}-{os.getpid()}.traceback"
            path.write_text(text, encoding="utf-8")
        except OSError:
            continue
        return str(path)
    return ""


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else ""


def _version(package: str) -> str:
    if package in sys.modules and hasattr(sys.modules[package], "__version__"):
        return str(sys.modules[package].__version__)  # torch's has "+cu126"
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
