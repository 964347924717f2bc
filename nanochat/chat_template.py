"""
The chat formats once more, as the Jinja templates that other programs render conversations with.

`CHAT_TEMPLATES[format]` writes the text whose ids, encoded by Hugging Face's `tokenizers` with
special tokens recognised, are those of `Tokenizer.render_conversation`; with add_generation_prompt
those of `render_for_completion`. scripts/hf_export.py puts it beside a model. It takes what
conversation.py calls a conversation: a system message first, if any, and content that is a string
or a list of parts. chat_format.py says the same in Python; tests/test_chat_template.py compares.

A template makes a text and no ids, so in two ways the ids may differ, and nothing here can help it:

- A special token's name within a message is ordinary text to us, and the special token there.
- We encode each stretch of text by itself. Where two stretches meet without a special token between
  them, a token may reach across the seam there: between neighbouring text parts, and in ChatML also
  after "assistant\\n" if the reply opens with white space that holds a line break, and around what
  a tool printed.

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

_CHATML = (
    _SAID
    + rf"""
{{%- if messages[0]['role'] != 'system' -%}}
    {{{{- '<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n' -}}}}
{{%- endif -%}}
"""
    + r"""
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if message['role'] == 'user' or (message['role'] == 'system' and loop.first) -%}
        {{- '<|im_start|>' + message['role'] + '\n' + said(content) + '<|im_end|>\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if content is string -%}
            {{- content -}}
        {%- else -%}
            {%- for part in content -%}
                {%- if part['type'] == 'python' -%}
                    {{- '<tool_call>' + part['text'] + '</tool_call>' -}}
                {%- elif part['type'] == 'python_output' -%}
                    {{- '\n<tool_response>\n' + part['text'] + '\n</tool_response>\n' -}}
                {%- else -%}
                    {{- part['text'] -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|im_end|>\n' -}}
    {%- else -%}
"""
    + _WRONG_ROLE
    + r"""
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
)

CHAT_TEMPLATES = {NANOCHAT.name: _NANOCHAT.strip(), CHATML.name: _CHATML.strip()}
"""The name of a chat format -> its Jinja template. Formats without conversations have none."""
