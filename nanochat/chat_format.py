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

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from nanochat.common import UserError
from nanochat.conversation import Content, Message, Tool, as_parts, reply_text

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
    render: Callable[[Sequence[Message], Sequence[Tool]], Iterator[Segment]]
    """Checked messages, and the tools that the system prompt is to offer -> segments."""
    reply_opening: tuple[Segment, ...]
    """What comes before an assistant's first word."""
    tool_output: Callable[[str], list[Segment]]
    """What a tool printed -> what follows the call, before the assistant goes on."""
    call_gap: str
    """What stands between the words of a reply and a tool call."""
    read_call: Callable[[str], str]
    """The text between the tokens of a tool call -> the code, as in a conversation's part."""
    default_system: str = ""
    """What is said where a conversation has no system message."""


# ---- ours ----------------------------------------------------------------------------------------


def _render_nanochat(messages: Sequence[Message], _: Sequence[Tool]) -> Iterator[Segment]:
    """<|bos|>, then every turn between its start and end token. There is one tool, the python tool,
    which every model of ours knows: none is announced."""
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
            yield from _assistant_nanochat(message)
        yield _special(f"<|{role}_end|>")


def _assistant_nanochat(message: Message) -> Iterator[Segment]:
    """The parts of an assistant turn: its words and tool calls have mask 1, tool output has 0."""
    for part in as_parts(message["content"]):
        if part["type"] == "text":
            yield _plain(part["text"], 1)
        elif part["type"] == "python":
            yield _special("<|python_start|>", 1)
            yield _plain(part["text"], 1)
            yield _special("<|python_end|>", 1)
        else:
            yield from _tool_output_nanochat(part["text"])


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
    call_gap="",
    read_call=str,  # the code stands there as it is
)


# ---- ChatML --------------------------------------------------------------------------------------


def chatml_format(default_system: str = QWEN_SYSTEM) -> ChatFormat:
    """What the chat template published with Qwen2.5 writes, byte for byte.

    `default_system` is said where a conversation has no system message; it differs between the
    published models. In three things our ids differ on purpose from those of apply_chat_template:
    the name of a special token inside a message is text here; the line that opens a reply is
    encoded apart from the reply, because in generation the reply comes as new tokens (it shows if
    a reply begins with a line feed); and a turn that ends with the output of a tool ends with an
    empty reply, because the engine asks for one."""

    def render(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Segment]:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": default_system}, *messages]
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "assistant":
                yield from _REPLY_OPENING_CHATML
                yield from _assistant_chatml(content)
            else:
                yield _special("<|im_start|>")
                if role == "system" and tools:
                    yield from _system_with_tools_chatml(reply_text(content), tools)
                else:
                    yield _plain(f"{role}\n{reply_text(content)}")
            yield from _TURN_END_CHATML

    return ChatFormat(
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
        render=render,
        reply_opening=_REPLY_OPENING_CHATML,
        tool_output=lambda text: [*_tool_outputs_chatml([text]), *_REPLY_OPENING_CHATML],
        call_gap=_CALL_GAP_CHATML,
        read_call=_read_call_chatml,
        default_system=default_system,
    )


_REPLY_OPENING_CHATML = (_special("<|im_start|>"), _plain("assistant\n"))
_CALL_GAP_CHATML = "\n"  # a call begins a line of its own
_TURN_END_CHATML = (_special("<|im_end|>"), _plain("\n"))


def _assistant_chatml(content: Content) -> Iterator[Segment]:
    """The parts of a reply. Tool output is said by the user: it ends the assistant's turn, and what
    follows is a new one."""
    parts = [part for part in as_parts(content) if part["type"] != "text" or part["text"]]
    grouped = itertools.groupby(parts, lambda part: part["type"])
    runs = [(kind, [part["text"] for part in run]) for kind, run in grouped]
    for i, (kind, texts) in enumerate(runs):
        if kind == "text":
            call_follows = i + 1 < len(runs) and runs[i + 1][0] == "python"
            # In one piece with the text: some tokens end in line feeds
            yield _plain("".join(texts) + (_CALL_GAP_CHATML if call_follows else ""), 1)
        elif kind == "python":
            for n, code in enumerate(texts):
                yield from [_plain(_CALL_GAP_CHATML, 1)] if n else []
                yield from _tool_call_chatml(code)
        else:
            yield from _tool_outputs_chatml(texts)
            yield from _REPLY_OPENING_CHATML


def _tool_call_chatml(code: str) -> list[Segment]:
    arguments = json.dumps({"code": code}, ensure_ascii=False)
    call = f'\n{{"name": "python", "arguments": {arguments}}}\n'
    return [_special("<tool_call>", 1), _plain(call, 1), _special("</tool_call>", 1)]


def _tool_outputs_chatml(texts: Sequence[str]) -> Iterator[Segment]:
    """From the end of a call to the end of the user turn that answers it."""
    yield from _TURN_END_CHATML
    yield _special("<|im_start|>")
    # Qwen2.5 has tokens for a tool call but none for its output: these tags are plain text
    responses = "".join(f"\n<tool_response>\n{text}\n</tool_response>" for text in texts)
    yield _plain(f"user{responses}")
    yield from _TURN_END_CHATML


def _read_call_chatml(text: str) -> str:
    """The code of a call: {"name": ..., "arguments": {"code": ...}}, or the only string among the
    arguments. What is no such JSON is taken for the code itself."""
    try:
        arguments = json.loads(text)["arguments"]
        values = [arguments["code"]] if "code" in arguments else list(arguments.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return text
    return values[0] if len(values) == 1 and isinstance(values[0], str) else text


def _system_with_tools_chatml(system: str, tools: Sequence[Tool]) -> Iterator[Segment]:
    """A system prompt that offers tools, in the words that Qwen2.5 was trained with. Its example of
    a call has the tokens of a call."""
    listed = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
    call = (_special("<tool_call>"), _special("</tool_call>"))
    yield _plain(
        f"system\n{system}\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>{listed}\n</tools>\n\nFor each function call, return a json object with function "
        "name and arguments within "
    )
    yield from (*call, _plain(" XML tags:\n"))
    example = '\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    yield from (call[0], _plain(example), call[1])


CHATML = chatml_format()


# ---- none ----------------------------------------------------------------------------------------


def _no_chat(*_: object) -> NoReturn:
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
        call_gap="",
        read_call=_no_chat,
    )
