"""
What a reply is worth: plain functions `reward(problem, reply) -> float`.

A problem is the task's conversation: {"messages": [...], "expected": "72"}, its last message the
solution; a reply is the text that the model wrote, without tool calls and what they printed. A
reward of your own is such a function in a module on the path, named as module:function:

    python -m scripts.chat_rl --reward=my_rewards:short_and_right

Floor 2.5.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import traceback
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import reply_text
from nanochat.tasks.common import Task
from nanochat.tasks.gsm8k import extract_lenient

Reward = Callable[[Any, str], float]


def lenient(problem: Any, reply: str) -> float:
    """1 if the answer is right, wherever the reply gives it ("####", \\boxed{}, "the answer is",
    the last number); else 0. For models that were not taught our format."""
    return float(extract_lenient(reply) == problem["expected"])


# By the name that --reward knows. "task" is what the task itself says.
REWARDS: dict[str, Reward] = {"lenient": lenient}


def get_reward(name: str, task: Task) -> Reward:
    """The reward called `name`: "task" (1 if the task finds the reply right, else 0), one of
    REWARDS, or module:function.

    UserError if there is no such module or function, or it does not take a problem and a reply."""
    if name == "task":
        return task.reward
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    parts = [*module_name.split("."), function_name]
    if not colon or not all(part.isidentifier() for part in parts):
        known = ", ".join(["task", *REWARDS])
        raise UserError(f"--reward={name} is none of {known}, and not of the form module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as e:
        raise UserError(
            f"--reward={name}: the module {module_name} cannot be imported ({e}); start from the "
            "folder that it is in, or put that folder on PYTHONPATH"
        ) from e
    except Exception as e:  # whatever there is in a module that is not ours
        raise UserError(f"--reward={name}: {_told(e)} while {module_name} is imported") from e
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "is no function" if hasattr(module, function_name) else "does not exist"
        raise UserError(f"--reward={name}: {function_name} {found} in {module.__file__}")
    try:
        inspect.signature(function).bind({}, "")
    except TypeError as e:
        raise UserError(f"--reward={name} must take a problem and a reply: {e}") from e
    except ValueError:
        pass  # a function of C, which does not tell

    @functools.wraps(function)
    def reward(problem: Any, reply: str) -> float:
        try:
            return function(problem, reply)
        except Exception as e:
            raise UserError(f"--reward={name}: {_told(e)}, {_case(problem, reply)}") from e

    return reward


def checked(value: Any, index: int, problem: Any, reply: str) -> float:
    """The reward as a finite float. UserError, naming problem and reply, if it is anything else:
    one NaN would turn every weight of the model into NaN."""
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise UserError(
        f"the reward of problem {index} is {value!r}, not a finite number "
        f"({_case(problem, reply)}); mend the function that --reward names"
    )


def _case(problem: Any, reply: str) -> str:
    asked = [m for m in problem["messages"] if m["role"] == "user"][-1]["content"]
    return f"problem: {_short(reply_text(asked))}; reply: {_short(reply)}"


def _told(error: Exception) -> str:
    """A mistake in a function of the user's: --debug shows all of it."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error}"  # names file and line
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__}: {error} ({where}; --debug shows more)"


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
