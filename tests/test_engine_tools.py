"""
The engine with models that say what a script says: stop tokens, the calculator, streams.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.engine import Engine, KVCache
from nanochat.tokenizer import Tokenizer
from tests.models_for_tests import tiny_model
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

VOCAB = 400


# ---- scripted models: what happens at a given token ----------------------------------------------


class ScriptedModel:
    """Wants, after token t, the token follows[t] (by default t again), almost surely."""

    config = SimpleNamespace(n_layer=1)

    def __init__(self, follows: dict[int, int]) -> None:
        self.follows = torch.arange(VOCAB)
        for token, wanted in follows.items():
            self.follows[token] = wanted

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def hidden(self, idx: Tensor, cache: KVCache) -> Tensor:
        cache.advance(idx.size(1))
        return self.follows[idx][..., None].float()  # (B, T, 1): the token that is to come

    def logits(self, x: Tensor) -> Tensor:
        return 100.0 * torch.nn.functional.one_hot(x[..., 0].long(), VOCAB).float()


def scripted(tokenizer: Tokenizer, *chains: Sequence[int]) -> Engine:
    """An engine whose model continues each chain from its first token to its last."""
    follows = {a: b for chain in chains for a, b in itertools.pairwise(chain)}
    return Engine(ScriptedModel(follows), tokenizer)


def test_the_stop_token_is_part_of_the_reply() -> None:
    """Else reinforcement learning could never teach a model to stop."""
    tokenizer = tiny_tokenizer(VOCAB)
    for name in ("<|assistant_end|>", "<|bos|>"):
        stop = tokenizer.encode_special(name)
        engine = scripted(tokenizer, [10, 11, stop, 12])
        assert engine.generate_batch([9, 10]) == ([[9, 10, 11, stop]], [[0, 0, 1, 1]])


def test_max_tokens_ends_a_reply_that_does_not() -> None:
    sequences, masks = scripted(tiny_tokenizer(VOCAB)).generate_batch([10], max_tokens=4)
    assert (sequences, masks) == ([[10] * 5], [[0, 1, 1, 1, 1]])


def tool_call(tokenizer: Tokenizer, expression: str) -> tuple[list[int], list[int]]:
    """(the call, what follows it if nothing is forced): both as ids, every id once."""
    start, end = tokenizer.tool_call_ids
    call = [start, *tokenizer.encode(expression), end]
    assert len(set(call)) == len(call), "a chain cannot pass a token twice"
    return call, [end, 65]


def test_the_calculator_answers_and_the_model_goes_on() -> None:
    tokenizer = tiny_tokenizer(VOCAB)
    call, without = tool_call(tokenizer, "12+30")
    output_start, output_end, stop = map(
        tokenizer.encode_special, ("<|output_start|>", "<|output_end|>", "<|assistant_end|>")
    )
    engine = scripted(tokenizer, [10, *call], without, [output_end, 11, stop])
    sequences, masks = engine.generate_batch([10])
    forced = [output_start, *tokenizer.encode("42"), output_end]
    assert sequences == [[10, *call, *forced, 11, stop]]
    assert masks == [[0, *[1] * len(call), *[0] * len(forced), 1, 1]]


@pytest.mark.parametrize("expression", ["1/0", "12 apples", "import os"])
def test_an_expression_that_is_not_understood_forces_nothing(expression: str) -> None:
    tokenizer = tiny_tokenizer(VOCAB)
    call, without = tool_call(tokenizer, expression)
    engine = scripted(tokenizer, [10, *call], without)
    sequences, masks = engine.generate_batch([10], max_tokens=len(call) + 2)
    assert sequences == [[10, *call, 65, 65]]
    assert masks == [[0, *[1] * (len(call) + 2)]]


def test_an_end_without_a_start_forces_nothing() -> None:
    tokenizer = tiny_tokenizer(VOCAB)
    _, end = tokenizer.tool_call_ids
    sequences, masks = scripted(tokenizer, [10, end, 65]).generate_batch([10], max_tokens=3)
    assert (sequences, masks) == ([[10, end, 65, 65]], [[0, 1, 1, 1]])


def test_only_the_row_that_called_is_forced() -> None:
    """Rows in one batch: one calculates, one talks, and one ends at once."""
    tokenizer = tiny_tokenizer(VOCAB)
    call, without = tool_call(tokenizer, "5*4")
    stop = tokenizer.encode_special("<|assistant_end|>")
    forced = tokenizer.tool_output_ids("20")
    room = len(call) + len(forced)
    engine = scripted(tokenizer, [10, *call], without, [12, stop])
    sequences, masks = engine.generate_batch([[9, 10], [11], [12]], max_tokens=room)
    assert sequences[0] == [9, 10, *call, *forced]
    assert masks[0] == [0, 0, *[1] * len(call), *[0] * len(forced)]
    assert (sequences[1], masks[1]) == ([11] * (1 + room), [0] + [1] * room)
    assert (sequences[2], masks[2]) == ([12, stop], [0, 1])


class Recited(ScriptedModel):
    """Says the tokens of `text` one after the other, wherever it is in the reply."""

    def __init__(self, prompt: int, text: Sequence[int]) -> None:
        self.prompt, self.text = prompt, torch.tensor([*text, *[65] * 99])

    def hidden(self, idx: Tensor, cache: KVCache) -> Tensor:
        at = cache.positions(idx.size(1)) - self.prompt + 1
        cache.advance(idx.size(1))
        return self.text[at.clamp(min=0)][..., None].float()


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(VOCAB), tiny_qwen(VOCAB)])
def test_a_reply_with_a_call_becomes_the_conversation_that_was_trained(
    tokenizer: Tokenizer,
) -> None:
    """The model writes its share of a conversation, the engine the tool's: the outcome is what the
    conversation renders to. In ChatML the tool speaks in a turn of its own, so that the end of the
    assistant's first turn ends nothing."""
    parts = [("text", "So:"), ("python", "12+30"), ("python_output", "42"), ("text", "It is 42.")]
    reply = {"role": "assistant", "content": [{"type": k, "text": t} for k, t in parts]}
    conversation = {"messages": [{"role": "user", "content": "12 + 30?"}, reply]}
    prompt = tokenizer.render_for_completion(conversation)
    ids, mask = tokenizer.render_conversation(conversation)
    end = max(i for i, id in enumerate(ids) if id == tokenizer.encode_special("<|assistant_end|>"))
    engine = Engine(Recited(len(prompt), ids[len(prompt) :]), tokenizer)
    sequences, masks = engine.generate_batch(prompt, num_samples=2, max_tokens=400)
    assert sequences == [ids[: end + 1]] * 2
    assert masks == [[*mask[:end], 1]] * 2


def test_a_call_cut_off_at_the_tools_turn_has_not_ended() -> None:
    """max_tokens may end a row at a stop token that was forced."""
    tokenizer = tiny_qwen(VOCAB)
    call, without = tool_call(tokenizer, "12+30")
    engine = scripted(tokenizer, [10, *call], without)
    sequences, masks = engine.generate_batch([10], max_tokens=len(call) + 1)
    assert sequences[0][-1] in tokenizer.stop_token_ids and masks[0][-1] == 0
    longer, _ = engine.generate_batch([10], max_tokens=len(call) + 2)
    assert longer[0] == [10, *call, *tokenizer.tool_output_ids("42")[:2]]


def test_a_tokenizer_without_tokens_for_calls_has_no_tools() -> None:
    tokenizer = tiny_tokenizer(VOCAB)
    start, end = tokenizer.tool_call_ids

    class WithoutCalls:
        stop_token_ids = tokenizer.stop_token_ids
        get_vocab_size = staticmethod(tokenizer.get_vocab_size)

        @property
        def tool_call_ids(self) -> tuple[int, int]:
            raise UserError("no such token")

    plain: Any = WithoutCalls()
    engine = scripted(plain, [10, start, *tokenizer.encode("1+1")], [end, 65])
    assert not engine.has_tools
    _, masks = engine.generate_batch([10], max_tokens=8)
    assert masks == [[0] + [1] * 8]


# ---- streaming -----------------------------------------------------------------------------------


def random_engine() -> Engine:
    return Engine(tiny_model("gpt", vocab_size=VOCAB), tiny_tokenizer(VOCAB))


def test_columns_of_a_stream() -> None:
    """A sample that has ended repeats its last token with mask 0 while others go on."""
    tokenizer = tiny_tokenizer(VOCAB)
    engine = random_engine()
    engine.has_tools = False  # a random model may call the calculator
    settings: dict[str, Any] = {"num_samples": 4, "max_tokens": 25, "seed": 5}
    whole, _ = engine.generate_batch([1, 2], **settings)
    engine.stops = {whole[0][2 + 3], whole[2][2 + 8]} | tokenizer.stop_token_ids
    sequences, masks = engine.generate_batch([1, 2], **settings)
    columns = list(engine.generate([1, 2], **settings))
    assert len(columns) == max(map(len, sequences)) - 2
    for sample_index, (sequence, mask) in enumerate(zip(sequences, masks)):
        tokens = [column[sample_index] for column, _ in columns]
        flags = [column_mask[sample_index] for _, column_mask in columns]
        reply = sequence[2:]
        pad = len(columns) - len(reply)
        assert tokens == reply + [reply[-1]] * pad
        assert flags == mask[2:] + [0] * pad
    assert len({len(s) for s in sequences}) > 1, "all samples ended together"


def test_columns_show_forced_tokens() -> None:
    tokenizer = tiny_tokenizer(VOCAB)
    call, without = tool_call(tokenizer, "12+30")
    engine = scripted(tokenizer, [10, *call], without)
    forced = tokenizer.tool_output_ids("42")
    columns = list(engine.generate([10], max_tokens=len(call) + len(forced)))
    assert columns == [*(([t], [1]) for t in call), *(([t], [0]) for t in forced)]


def test_stopped_ends_a_stream() -> None:
    asked = iter([False, False, False, True])  # before each step
    engine = scripted(tiny_tokenizer(VOCAB))
    columns = list(engine.generate([10], max_tokens=50, stopped=lambda: next(asked)))
    assert columns == [([10], [1])] * 3


def test_a_stream_may_be_left_at_any_time() -> None:
    stream: Any = random_engine().generate([1, 2], max_tokens=50)
    next(stream)
    assert not torch.is_inference_mode_enabled(), "inference mode leaked out of the generator"
    stream.close()
    assert not torch.is_inference_mode_enabled()
