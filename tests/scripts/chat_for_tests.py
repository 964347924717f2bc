"""
chat_cli with an engine that repeats what it heard, for the tests that run it as a program.

    python -m tests.scripts.chat_for_tests [the flags of chat_cli]

Its reply to the second question, "Hi", is `2. 'Hi'`, and the system message if there is one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from nanochat import flags
from nanochat.sampling import Sampling
from scripts import chat_cli
from tests.engines_for_tests import script_of
from tests.tokenizers_for_tests import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FOR_EVER = "for ever"  # a question with this gets a reply that never ends


class EchoEngine:
    """Has the signature of Engine, as far as chat_cli uses it."""

    def __init__(self, model: Any, tokenizer: Any, tools: str, step: str) -> None:
        pass

    def generate(
        self, tokens: list[int], num_samples: int, seed: int, sampling: Sampling
    ) -> Iterator[tuple[list[int], list[int]]]:
        asked = re.findall(r"<\|user_start\|>(.*?)<\|user_end\|>", TOKENIZER.decode(tokens), re.S)
        reply = f"{len(asked)}. {asked[-1]!r}"
        if len(asked) > 1 and asked[0].startswith("SYSTEM"):
            reply += " with a system message"
        steps = script_of(TOKENIZER, reply)
        if FOR_EVER in asked[-1]:
            steps = steps[:-1]
        for token, mask in steps:
            yield [token], [mask]
        while FOR_EVER in asked[-1]:
            time.sleep(0.02)
            yield [TOKENIZER.encode(" and")[0]], [1]


def load_echo(*_: Any, **__: Any) -> tuple[Any, Any, dict[str, Any]]:
    model = SimpleNamespace(config=SimpleNamespace(sequence_len=4096))
    return model, TOKENIZER, {"tag": "echo", "step": 3}


def main() -> None:
    """chat_cli, but for the model."""
    chat_cli.load_model = load_echo
    chat_cli.make_ready = lambda model, *_: model
    chat_cli.Engine = EchoEngine  # type: ignore[assignment,misc]
    flags.run(chat_cli.main, chat_cli.Args)


if __name__ == "__main__":
    main()
