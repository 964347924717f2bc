"""
How a conversation is written as tokens: our own format, ChatML for Qwen2.5, or not at all.

Each format is a function from checked messages to `Segment`s: special tokens and stretches of plain
text, each with a mask that says whether the assistant wrote it. No ids here; nanochat/tokenizer.py
encodes the segments.

    <|bos|><|user_start|>What is 2+2?<|user_end|><|assistant_start|>4<|assistant_end|>
                                                                    ^ the only mask of 1

Floor 1, beneath tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from nanochat.common import UserError
from nanochat.conversation import Message, as_parts, reply_text

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class Segment(NamedTuple):
    """A stretch of a rendered conversation: either one special token, or plain text."""

    text: str
    special: bool
    mask: int  # 1 where the assistant wrote it


def _special(name: str, mask: int = 0) -> Segment:
    return Segment(name, True, mask)


def _plain(text: str, mask: int = 0) -> Segment:
    return Segment(text, False, mask)


@dataclass(frozen=True)
class ChatFormat:
    """One way of writing conversations, and its special tokens by their function."""

    name: str
    bos: str
    """Begins every document."""
    end: str
    """Closes an assistant turn; a model is trained to produce it."""
    openers: tuple[str, ...]
    """What may come next after a turn that was cut off before its end."""
    aliases: dict[str, str]
    """Our names of special tokens -> what this format uses in their place."""
    render: Callable[[Sequence[Message]], Iterator[Segment]]
    """Checked messages -> segments."""
    reply_opening: tuple[Segment, ...]
    """What comes before an assistant's first word."""
    tool_output: Callable[[str], list[Segment]]
    """What a tool printed -> what follows the call, before the assistant goes on."""


def _assistant(message: Message, tool_output: Callable[[str], list[Segment]]) -> Iterator[Segment]:
    """The parts of an assistant turn: its words and tool calls have mask 1, tool output has 0."""
    for part in as_parts(message["content"]):
        if part["type"] == "text":
            yield _plain(part["text"], 1)
        elif part["type"] == "python":
            yield _special("<|python_start|>", 1)
            yield _plain(part["text"], 1)
            yield _special("<|python_end|>", 1)
        else:
            yield from tool_output(part["text"])


# ---- ours ----------------------------------------------------------------------------------------


def _render_nanochat(messages: Sequence[Message]) -> Iterator[Segment]:
    """<|bos|>, then every turn between its start and end token."""
    yield _special("<|bos|>")
    system = ""  # there is no system turn: it is said at the head of the first user turn
    for message in messages:
        role = message["role"]
        if role == "system":
            system = reply_text(message["content"]) + "\n\n"
            continue
        yield _special(f"<|{role}_start|>")
        if role == "user":
            yield _plain(system + reply_text(message["content"]))
            system = ""
        else:
            yield from _assistant(message, _tool_output_nanochat)
        yield _special(f"<|{role}_end|>")


def _tool_output_nanochat(text: str) -> list[Segment]:
    return [_special("<|output_start|>"), _plain(text), _special("<|output_end|>")]


NANOCHAT = ChatFormat(
    name="nanochat",
    bos="<|bos|>",
    end="<|assistant_end|>",
    openers=("<|bos|>", "<|user_start|>", "<|assistant_start|>"),
    aliases={},
    render=_render_nanochat,
    reply_opening=(_special("<|assistant_start|>"),),
    tool_output=_tool_output_nanochat,
)


# ---- ChatML --------------------------------------------------------------------------------------


def _render_chatml(messages: Sequence[Message]) -> Iterator[Segment]:
    """<|im_start|>role, newline, what is said, <|im_end|>, newline. Without a system message a
    default one is put first, as in the chat template that Qwen publishes."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": QWEN_SYSTEM}, *messages]
    for message in messages:
        role = message["role"]
        if role == "assistant":
            # The role line is encoded apart from the reply, which in generation comes as new tokens
            yield from _REPLY_OPENING_CHATML
            yield from _assistant(message, _tool_output_chatml)
        else:
            yield _special("<|im_start|>")
            yield _plain(f"{role}\n{reply_text(message['content'])}")
        yield _special("<|im_end|>")
        yield _plain("\n")


def _tool_output_chatml(text: str) -> list[Segment]:
    # Qwen2.5 has single tokens for a tool call but none for its output: the tags are plain text
    return [_plain(f"\n<tool_response>\n{text}\n</tool_response>\n")]


_REPLY_OPENING_CHATML = (_special("<|im_start|>"), _plain("assistant\n"))

CHATML = ChatFormat(
    name="qwen2.5",
    bos="<|endoftext|>",  # there is no beginning-of-text token: this one separates documents
    end="<|im_end|>",
    openers=("<|endoftext|>", "<|im_start|>"),
    aliases={
        "<|bos|>": "<|endoftext|>",
        "<|assistant_end|>": "<|im_end|>",
        "<|python_start|>": "<tool_call>",
        "<|python_end|>": "</tool_call>",
    },
    render=_render_chatml,
    reply_opening=_REPLY_OPENING_CHATML,
    tool_output=_tool_output_chatml,
)


# ---- none ----------------------------------------------------------------------------------------


def _no_chat(_: object) -> NoReturn:
    raise UserError(
        "this tokenizer has no special tokens for conversations and serves for plain text only "
        "(tok_eval, base_train, base_eval). For chat, train a base model with one that has them: "
        "from scripts.tok_train, or --tokenizer=qwen2.5"
    )


def plain_format(bos: str) -> ChatFormat:
    """For vocabularies such as GPT-2's: `bos` separates documents, conversations are refused."""
    return ChatFormat(
        name="plain",
        bos=bos,
        end=bos,
        openers=(bos,),
        aliases={"<|bos|>": bos, "<|assistant_end|>": bos},
        render=_no_chat,
        reply_opening=(),
        tool_output=_no_chat,
    )
