"""
The chat template that Qwen2.5's instruct models are published with: the interface to be matched.

`published(messages)` and `oracle(tokenizer)` turn conversations into what transformers makes of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanochat.common import write_json
from nanochat.conversation import as_parts
from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer_files import tokenizer_json

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'SYSTEM' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nSYSTEM<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501


def template(system: str = SYSTEM) -> str:
    """The published text with that default system prompt, spelled as in a Jinja string."""
    return TEMPLATE.replace("SYSTEM", system)


def oracle(tokenizer: Tokenizer, folder: Path) -> Any:
    """The same vocabulary as transformers runs it, with the published template."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("jinja2")
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer.vocabulary))
    twin = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    twin.chat_template = template()
    return twin


def published(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our messages as the template wants them: calls as tool_calls, output as messages of a tool.

    Text after output is a message of its own, as the model wrote it in a turn of its own."""
    result: list[dict[str, Any]] = []
    for message in messages:
        result.append({"role": message["role"], "content": ""})
        for part in as_parts(message["content"]):
            if part["type"] == "python_output":
                result.append({"role": "tool", "content": part["text"]})
                continue
            if result[-1]["role"] == "tool":
                result.append({"role": "assistant", "content": ""})
            if part["type"] == "text":
                result[-1]["content"] += part["text"]
            else:
                call = {"name": "python", "arguments": {"code": part["text"]}}
                calls = result[-1].setdefault("tool_calls", [])
                calls.append({"type": "function", "function": call})
    return result
