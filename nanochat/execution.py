"""
What a model may have computed for it: the calculator tool, and Python in a sandbox.

`calculate` is the tool behind <|python_start|> ... <|python_end|>: arithmetic, and counting letters
in a string. It walks a syntax tree and knows a dozen node types; nothing is ever eval'ed.

`run_python` runs model-written programs (HumanEval) in a fresh process with no environment, no
network, no files but its own temporary folder, and bounds on time, memory and output. The walls are
put up inside the child by execution_child.py; which of them this machine allows is in
`ExecutionResult.isolation`. Where the kernel's are not to be had (macOS, some containers),
`run_python` refuses, unless `allow_weak_sandbox()` was called.

    >>> calculate("1,200 * 3 / 4"), calculate('"strawberry".count("r")'), calculate("import os")
    ('900', '3', None)
    >>> run_python("print(6 * 7)").stdout
    '42\\n'

Floor 0.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from nanochat.common import UserError

# -----------------------------------------------------------------------------
# The calculator

MAX_EXPRESSION = 400  # characters; a tool call is a line, not a program
MAX_BITS = 512  # of any whole number on the way, about 150 digits
MAX_EXPONENT = 256

Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # the comma of 1,200, not the one of f(1,2)


class _NotUnderstood(Exception):
    """The expression is outside the little language."""


def calculate(expression: str) -> str | None:
    """Evaluates an arithmetic expression or `"text".count("t")`; None when it is not understood.

    Numbers with + - * / // % **, parentheses, unary signs and thousands commas. Whole results are
    written as integers (7.0 -> "7"), others with up to ten significant digits and no exponent."""
    text = expression.strip()
    if not text or len(text) > MAX_EXPRESSION:
        return None
    if '"' not in text and "'" not in text:  # a comma inside a string is text
        text = _THOUSANDS.sub("", text)
    try:
        # MemoryError and RecursionError: how different Pythons refuse deep nesting
        return _show(_value(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError, _NotUnderstood):
        return None


def _value(node: ast.expr) -> Number:
    """The number a node stands for. Raises _NotUnderstood for any node not listed here."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left), _value(right)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return text.count(part)
    raise _NotUnderstood


def _power(base: Number, exponent: Number) -> Number:
    """base ** exponent, refused before it is computed where the result would be huge."""
    if abs(exponent) > MAX_EXPONENT:
        raise _NotUnderstood
    if isinstance(base, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise _NotUnderstood
    return _bounded(base**exponent)


def _bounded(value: Number) -> Number:
    """`value`, if it is a real, finite number of sane size (a root of -1 is complex)."""
    if isinstance(value, int) and value.bit_length() <= MAX_BITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise _NotUnderstood


def _show(value: Number) -> str:
    """The number as one would write it: no ".0", no exponent, no noise in the last bits."""
    if isinstance(value, float):
        # Ten digits hide 0.1 + 0.2 = 0.30000000000000004; large amounts keep their cents
        rounded = Decimal(format(value, ".10g" if abs(value) < 1e8 else ".15g"))
        text = format(rounded, "f")
        if "." in text:
            text = text.rstrip("0").rstrip(".")
        return "0" if text == "-0" else text
    return str(value)


# -----------------------------------------------------------------------------
# The sandbox, seen from outside

MAX_OUTPUT = 64 * 1024  # characters kept of stdout and of stderr
FILE_MB = 1  # the most one file, and so each of the two outputs, may grow to
_CHILD = Path(__file__).with_name("execution_child.py")
_REFUSED = " refused"  # what the child adds to its secret word where walls are missing
_weak_allowed = False


def allow_weak_sandbox(allowed: bool = True) -> None:
    """From now on programs run even where the kernel cannot wall them in (--weak_sandbox).

    CPython's own hooks then keep accidents out, but not a program that means harm."""
    global _weak_allowed  # noqa: PLW0603  # a decision of the process, as deep as tasks' rewards
    _weak_allowed = allowed


@dataclass(frozen=True)
class ExecutionResult:
    """What became of a program. `success`: it ran to its end, or called exit with 0."""

    success: bool
    stdout: str
    stderr: str
    timed_out: bool = False
    memory_exceeded: bool = False
    isolation: tuple[str, ...] = ()
    """The walls that stood: of "limits", "namespaces", "mounts", "landlock", "seccomp", "audit"."""
    finished: bool = False
    """Whether it ran to its very end: no exit of any kind, and not only a claim of the program."""


def run_python(
    code: str, timeout: float = 5.0, memory_mb: int = 256, input: str | None = None
) -> ExecutionResult:
    """Runs `code` as a program of its own, with `input` on its stdin. Safe to call from threads.

    timeout: wall-clock seconds. memory_mb: MiB of address space, about 20 of which are Python's.
    The program sees the standard library, an empty environment, and its temporary folder, which is
    removed afterwards. Never raises for what the program does; UserError, before it does anything,
    where isolation cannot be had and has not been waived by allow_weak_sandbox()."""
    with tempfile.TemporaryDirectory(prefix="nanochat-run-", ignore_cleanup_errors=True) as root:
        outside, inside = Path(root, "io"), Path(root, "work")
        outside.mkdir()
        inside.mkdir()
        files = {name: outside / name for name in ("code", "stdin", "stdout", "stderr", "end")}
        # surrogatepass: a model may write any string, and the program may then fail on it
        files["code"].write_bytes(code.encode("utf-8", "surrogatepass"))
        files["stdin"].write_bytes((input or "").encode("utf-8", "surrogatepass"))
        end = secrets.token_bytes(16)  # what the child writes back when the program has ended
        files["end"].write_bytes(end)
        limits: dict[str, int | str] = {
            "cpu_s": math.ceil(timeout) + 1,  # a second wall, in case the clock's is climbed
            "memory": memory_mb << 20,
            "file": FILE_MB << 20,
            "code": str(files["code"]),
            "end": str(files["end"]),
            "refused": "" if _weak_allowed else _REFUSED,
        }
        timed_out, returncode = _run_child(limits, inside, files, timeout)
        stdout, stderr = (_read_output(files[name]) for name in ("stdout", "stderr"))
        told = _head(files["end"], 64)
    # The child's first line on stderr is its own: which walls it could put up
    walls, newline, rest = stderr.partition("\n")
    if newline and walls.startswith("isolation:"):
        isolation, stderr = tuple(walls.removeprefix("isolation:").split()), rest
    else:
        isolation = ()
    if told == end + _REFUSED.encode():
        raise UserError(
            "model-written code is not run: this machine offers no isolation that the kernel "
            f"enforces, only {', '.join(isolation) or 'none'}. Use Linux 5.13 or newer (in a "
            "container: one that permits landlock and seccomp), leave out the tasks that run "
            "programs (humaneval), or say --weak_sandbox if you trust the model"
        )
    # The interpreter says MemoryError where it can, and dies in malloc where it cannot
    last_line = stderr.rstrip().rpartition("\n")[2]
    memory_exceeded = returncode != 0 and last_line.startswith("MemoryError")
    success = returncode == 0 and not timed_out and bool(isolation)
    finished = success and told == end
    return ExecutionResult(success, stdout, stderr, timed_out, memory_exceeded, isolation, finished)


def _run_child(
    limits: dict[str, int | str], cwd: Path, files: dict[str, Path], timeout: float
) -> tuple[bool, int]:
    """Starts the child, waits, kills its whole process group. Returns (timed out, exit status)."""
    # Outputs are files, not pipes: the kernel bounds them (RLIMIT_FSIZE), and nobody can block on
    # a pipe that a forgotten grandchild holds open.
    with (
        open(files["stdin"], "rb") as stdin,
        open(files["stdout"], "wb") as stdout,
        open(files["stderr"], "wb") as stderr,
    ):
        process = subprocess.Popen(
            # -I: no user site, no PYTHON* variables; -S: no site-packages; -B: writes no .pyc
            [sys.executable, "-I", "-S", "-B", str(_CHILD), json.dumps(limits)],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env={},
            close_fds=True,
            start_new_session=True,  # a process group of its own, to be killed as one
        )
        try:
            return False, process.wait(timeout)
        except subprocess.TimeoutExpired:
            return True, -signal.SIGKILL
        finally:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and whatever it started. The group outlives its leader, so no race."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nobody left
    except PermissionError:  # macOS says this of a group of zombies
        process.kill()
    process.wait()


def _read_output(path: Path) -> str:
    """The beginning of what the program wrote, whatever bytes it wrote."""
    text = _head(path, 4 * MAX_OUTPUT).decode("utf-8", "replace")
    return text if len(text) <= MAX_OUTPUT else text[:MAX_OUTPUT] + "\n[output cut here]\n"


def _head(path: Path, size: int) -> bytes:
    with open(path, "rb") as f:
        return f.read(size)
