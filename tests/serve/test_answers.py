"""Tool calls as Markdown, which no text of theirs can break out of."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from nanochat.serve.answers import show_parts, show_tool


def test_a_short_call_stands_in_the_line() -> None:
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "27+15"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "42."},
    ]
    assert show_parts(parts) == "It is `27+15` → `42` 42."


@pytest.mark.parametrize(
    "text", ["print(1)\nprint(2)", "a ``` b", "````", "```\n# head", "`x`", "a\n" + "`" * 9 + "\nb"]
)
@pytest.mark.parametrize("kind", ["python", "python_output"])
def test_anything_else_is_fenced(kind: str, text: str) -> None:
    (fence,) = [t for t in MarkdownIt().parse("It is" + show_tool(kind, text)) if t.type == "fence"]
    assert fence.content == text + "\n"
    assert fence.info == ("python" if kind == "python" else "text")
