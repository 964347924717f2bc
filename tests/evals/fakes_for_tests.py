"""Models and engines for the evaluation tests."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from nanochat.tokenizer import Tokenizer
from tests.models_for_tests import tiny_model as make_tiny_model


def tiny_model(vocab_size: int, sequence_len: int = 256, arch: str = "gpt") -> Any:
    """A random model with a context long enough for conversations."""
    return make_tiny_model(arch, vocab_size=vocab_size, sequence_len=sequence_len)


class LetterModel:
    """A model of which one knows what it answers: the letter for a prompt's number of tokens.

    At every position the logits point to the letter `answer(ids up to there)`."""

    def __init__(self, tokenizer: Tokenizer, answers: dict[tuple[int, ...], str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.config = SimpleNamespace(sequence_len=512)
        self.training = False
        self.batches: list[int] = []

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V): one-hot where a known prompt ends, and nonsense elsewhere."""
        self.batches.append(len(idx))
        x = torch.zeros(*idx.shape, self.tokenizer.get_vocab_size())
        x[..., self.tokenizer.encode("?")[0]] = 9.0  # no letter: must not be looked at
        for row, ids in zip(x, idx.tolist()):
            for prompt, letter in self.answers.items():
                if tuple(ids[: len(prompt)]) == prompt:
                    row[len(prompt) - 1, self.tokenizer.encode(letter)[0]] = 1.0
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return x


class ReplyEngine:
    """generate_batch of an engine that replies what it is told, by prompt.

    A reply is a list of contents, one for each sample; a content without an end is cut off."""

    def __init__(self, tokenizer: Tokenizer, replies: dict[tuple[int, ...], list[Any]]) -> None:
        self.tokenizer, self.replies = tokenizer, replies
        self.calls: list[dict[str, Any]] = []

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], num_samples: int = 1, **options: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        self.calls.append({"prompts": prompts, "num_samples": num_samples, **options})
        sequences, masks = [], []
        for prompt in prompts:
            for content in self.replies[tuple(prompt)][:num_samples]:
                ended = not (isinstance(content, str) and content.endswith("..."))
                ids, mask = self._tokens(content, ended)
                ids, mask = ids[: options["max_tokens"]], mask[: options["max_tokens"]]
                sequences.append([*prompt, *ids])
                masks.append([0] * len(prompt) + mask)
        return sequences, masks

    def _tokens(self, content: Any, ended: bool) -> tuple[list[int], list[int]]:
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
        ids, mask = self.tokenizer.render_conversation({"messages": messages})
        start = len(self.tokenizer.render_for_completion({"messages": messages}))
        stop = self.tokenizer.encode_special("<|assistant_end|>")
        end = max(i for i, id in enumerate(ids) if id == stop)  # ChatML has a newline after it
        mask[end] = 1  # the engine's mask: what was sampled
        return ids[start : end + ended], mask[start : end + ended]
