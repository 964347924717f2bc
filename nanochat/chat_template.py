"""
The chat formats once more, as the Jinja templates that other programs render conversations with.

`chat_template(format)` gives one. It writes the text whose ids, encoded by Hugging Face's
`tokenizers` with special tokens recognised, are those of `Tokenizer.render_conversation`; with
add_generation_prompt those of `render_for_completion`. An export has it beside the model. It takes
what conversation.py calls a conversation: a system message first, if any, and content that is a
string or a list of parts; ChatML also what the published one takes (tool_calls, tool messages).
chat_format.py says the same in Python; tests/test_chat_template.py compares.

A template makes a text and no ids, so in two ways the ids may differ, and nothing here can help it:

- A special token's name within a message is ordinary text to us, and the special token there.
- We encode each stretch of text by itself. Where two meet without a special token between them, a
  token may reach across the seam there: in ours between neighbouring text parts of a reply, in
  ChatML after "assistant\\n" if a reply opens with white space that holds a line break.

Floor 1, above chat_format.py.
"""

from nanochat.chat_format import CHATML, NANOCHAT, QWEN_SYSTEM

# Every tag cuts the white space around it, so that the templates can be laid out; what is said is
# never touched. This macro is reply_text of conversation.py: what a reader sees of a message.
_SAID = r"""
{%- macro said(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

_WRONG_ROLE = r"""
        {{- raise_exception('after a system message, if any, only user and assistant speak; found '
            + message['role']) -}}
"""

_NANOCHAT = (
    _SAID
    + r"""
{{- '<|bos|>' -}}
{%- set head = namespace(text='') -%}
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {%- set head.text = said(content) + '\n\n' -%}
    {%- elif message['role'] == 'user' -%}
        {{- '<|user_start|>' + head.text + said(content) + '<|user_end|>' -}}
        {%- set head.text = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant_start|>' -}}
        {%- if content is string -%}
            {{- content -}}
        {%- else -%}
            {%- for part in content -%}
                {%- if part['type'] == 'python' -%}
                    {{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
                {%- elif part['type'] == 'python_output' -%}
                    {{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
                {%- else -%}
                    {{- part['text'] -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|assistant_end|>' -}}
    {%- else -%}
"""
    + _WRONG_ROLE
    + r"""
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""
)

# As published with Qwen2.5, word for word, and with content in parts besides. DEFAULT stands in for
# the system prompt, which differs between the published models. `tojson` is written out by itself,
# never joined to a string: in some programs it gives a string that escapes its neighbours.
_CHATML = (
    _SAID
    + r"""
{%- macro call(name, arguments) -%}
    {{- '<tool_call>\n{"name": "' -}}
    {{- name -}}
    {{- '", "arguments": ' -}}
    {{- arguments | tojson -}}
    {{- '}\n</tool_call>' -}}
{%- endmacro -%}
{%- set has_system = messages[0]['role'] == 'system' -%}
{%- if tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if has_system -%}
        {{- said(messages[0]['content']) -}}
    {%- else -%}
        {{- 'DEFAULT' -}}
    {%- endif -%}
    {{- '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\n' -}}
        {{- tool | tojson -}}
    {%- endfor -%}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and ' -}}
    {{- 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' -}}
{%- elif has_system -%}
    {{- '<|im_start|>system\n' + said(messages[0]['content']) + '<|im_end|>\n' -}}
{%- else -%}
    {{- '<|im_start|>system\nDEFAULT<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- set role = message['role'] -%}
    {%- if role == 'user' or (role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' + role + '\n' + said(content) + '<|im_end|>\n' -}}
    {%- elif role == 'assistant' and message['tool_calls'] -%}
        {{- '<|im_start|>assistant' -}}
        {%- if content -%}
            {{- '\n' + said(content) -}}
        {%- endif -%}
        {%- for tool_call in message['tool_calls'] -%}
            {%- if tool_call['function'] is defined -%}
                {%- set tool_call = tool_call['function'] -%}
            {%- endif -%}
            {{- '\n' + call(tool_call['name'], tool_call['arguments']) -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- elif role == 'assistant' and content is string -%}
        {{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' -}}
    {%- elif role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- set last = namespace(type='') -%}
        {%- for part in content -%}
            {%- if part['type'] == 'python_output' -%}
                {%- if last.type != 'python_output' -%}
                    {{- '<|im_end|>\n<|im_start|>user' -}}
                {%- endif -%}
                {{- '\n<tool_response>\n' + part['text'] + '\n</tool_response>' -}}
                {%- set last.type = 'python_output' -%}
            {%- elif part['type'] == 'python' or part['text'] -%}
                {%- if last.type == 'python_output' -%}
                    {{- '<|im_end|>\n<|im_start|>assistant\n' -}}
                {%- endif -%}
                {%- if part['type'] == 'python' -%}
                    {%- if last.type in ['text', 'python'] -%}{{- '\n' -}}{%- endif -%}
                    {{- call('python', {'code': part['text']}) -}}
                {%- else -%}
                    {{- part['text'] -}}
                {%- endif -%}
                {%- set last.type = part['type'] -%}
            {%- endif -%}
        {%- endfor -%}
        {%- if last.type == 'python_output' -%}
            {{- '<|im_end|>\n<|im_start|>assistant\n' -}}
        {%- endif -%}
        {{- '<|im_end|>\n' -}}
    {%- elif role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\n<tool_response>\n' + said(content) + '\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}
            {{- '<|im_end|>\n' -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
)

_TEMPLATES = {NANOCHAT.name: _NANOCHAT.strip(), CHATML.name: _CHATML.strip()}


def chat_template(chat_format: str, default_system: str = QWEN_SYSTEM) -> str | None:
    """The Jinja template of a chat format; None if it has no conversations.

    `default_system` is what ChatML says where a conversation has no system message."""
    template = _TEMPLATES.get(chat_format)
    return template and template.replace("DEFAULT", _in_quotes(default_system))


def _in_quotes(text: str) -> str:
    """As it is written inside of a Jinja string in single quotes."""
    for char, written in (("\\", r"\\"), ("'", r"\'"), ("\n", r"\n"), ("\r", r"\r")):
        text = text.replace(char, written)
    return text
