"""
HumanEval (arXiv 2107.03374): 164 Python functions to complete, judged by running their tests.

The reply may be a whole program, in a code fence or bare, or only the function's body. It runs in
the sandbox of nanochat/execution.py.
"""

from __future__ import annotations

import re
from typing import Any

from nanochat.common import get_base_dir
from nanochat.conversation import Conversation
from nanochat.execution import run_python
from nanochat.tasks.common import Hub, Row, RowTask, field, load_rows, read_rows

_FENCE = re.compile(r"```[ \t]*(?:python|py|Python)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
TIMEOUT = 5.0  # seconds a solution and its tests may take


def extract_code(reply: str) -> str:
    """What is in the reply's first code fence (closed or not), or all of it if there is none."""
    match = _FENCE.search(reply)
    return match[1] if match else reply


def build_program(prompt: str, entry_point: str, reply: str) -> str:
    """The reply as a program that defines `entry_point`."""
    code = extract_code(reply)
    definition = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
    if not definition.search(code):
        return prompt + code  # the function's body, indented, continues the prompt
    # With the imports and helpers that the prompt gives, lest the reply left them out
    start = definition.search(prompt)
    return prompt[: start.start() if start else 0] + "\n" + code


class HumanEval(RowTask):
    """Rows of {"prompt", "test", "entry_point", "canonical_solution"}."""

    def convert(self, row: Row, where: str) -> Conversation:
        prompt = field(row, "prompt", str, where)
        solution = row.get("canonical_solution") or "    ...\n"
        return {
            "messages": [
                {"role": "user", "content": f"Complete this Python function.\n\n{prompt}"},
                {"role": "assistant", "content": f"```python\n{prompt}{solution}```"},
            ],
            "prompt": prompt,
            "test": field(row, "test", str, where),
            "entry_point": field(row, "entry_point", str, where),
        }

    def evaluate(self, conversation: Conversation, reply: str) -> bool:
        entry_point = conversation["entry_point"]
        program = build_program(conversation["prompt"], entry_point, reply)
        program += f"\n\n{conversation['test']}\n\ncheck({entry_point})\n"
        # Exit status 0 is not enough: code that calls exit() never reaches its tests
        return run_python(program, timeout=TIMEOUT).finished


def load(split: str, **slicing: Any) -> HumanEval:
    """The 164 problems, as "test"; the file may have its published name HumanEval.jsonl."""
    published = get_base_dir() / "task_data" / "humaneval" / "HumanEval.jsonl"
    if published.is_file():
        return HumanEval(read_rows([published]), **slicing)
    hub = Hub("openai/openai_humaneval", None, split)
    return HumanEval(load_rows(["humaneval"], split, hub), **slicing)
