"""
The model card: the README.md beside an exported model.

Every number in it comes from the checkpoint (shape, steps, what it was trained on, its last
evaluation), from the checkpoints it started from as far as they are still there, or from the
report's rows about this very step. What is not known is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.checkpoint import STAGE_FOLDERS, step_dir, weights_id
from nanochat.hf import AUTO_MAP
from nanochat.hf_export import keeps_tokenizer, puts_bos
from nanochat.report.runs import Row, read_rows
from nanochat.report.sections import base_section, evaluation_section
from nanochat.report.tables import table
from nanochat.tokenizer import Tokenizer

HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanochat
---
"""

KINDS = {
    "base": "a base model: it continues text",
    "mid": "a chat model, midtrained",
    "sft": "a chat model, after supervised finetuning",
    "rl": "a chat model, after reinforcement learning",
    "dpo": "a chat model, after preference optimization (DPO)",
}

USE = """\
## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path}{trust})
tokenizer = AutoTokenizer.from_pretrained({path})
"""
USE_CHAT = """\
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
"""
USE_BASE = """\
inputs = tokenizer("The capital of France is", return_tensors="pt", return_token_type_ids=False)
"""
USE_END = """\
ids = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:]))
```
"""

TOOLS = """\
A reply may hold calls of a Python tool between {before} and {after}. nanochat runs them and puts
in what they print; `generate` does not, and the model then makes up what follows.
"""

SPECIALS = """\
A special token's name within a message ({example}, say) becomes that token when `transformers`
renders the conversation, so a user can forge turns; nanochat takes it as ordinary text. Remove such
names from what strangers write.
"""

SEAM = """\
A reply in the history that begins with white space holding a line break may be cut into other
tokens than those the model wrote: `transformers` joins it to the line before.
"""

NANOCHAT_CLASS = """\
It is `NanoChatForCausalLM`, which `transformers` has since version 5.
"""

TWIN = """\
Its architecture is Qwen2.5's. `config.json` calls it `seed_oss`, which is the same computation:
of a model called `qwen2`, `transformers` 5 would cut text as Qwen does, not as this tokenizer.
"""

OWN_CODE = """\
`transformers` has no such architecture: the model's code is the file {file} in this folder, and
`trust_remote_code=True` lets `from_pretrained` run it. It needs `transformers` 5 or later.
"""

LICENCE = """\
## Licence

None is set: whoever publishes these weights decides, and the data (and the model that training
began with, if any) may have a say. Add `license:` to the head of this file.
"""


def model_card(
    source: str, meta: Row, model: Any, tokenizer: Tokenizer, dtype: str, report: Path
) -> str:
    """The card's text. `meta` is what load_model returns, `report` the folder of metrics files."""
    tag, step = meta["tag"], meta["step"]
    lines = [HEADER, f"# {tag} ({source}), step {step:,}", ""]
    done = "imported" if meta.get("imported") else "trained"
    lines += [f"This is {KINDS[source]}. It was {done} with nanochat.", ""]
    lines += table(["", "value"], _shape(meta["config"], model, tokenizer, dtype))
    lines += _training(source, meta)
    about = (source, tag, step)
    lines += base_section(_rows(report / "base_eval.jsonl", about), [], tag)
    lines += evaluation_section(_rows(report / "chat_eval.jsonl", about), [], tag)
    arch = meta["config"]["arch"]
    lines += _usage(source != "base", tag, tokenizer, arch in AUTO_MAP)
    if not keeps_tokenizer(model, tokenizer):
        lines.append(TWIN)
    elif arch == "gpt":
        lines.append(NANOCHAT_CLASS)
    elif arch in AUTO_MAP:
        file = AUTO_MAP[arch]["AutoModelForCausalLM"].split(".")[0]
        lines.append(OWN_CODE.format(file=f"`{file}.py`"))
    return "\n".join([*lines, LICENCE])


def _shape(config: Row, model: Any, tokenizer: Tokenizer, dtype: str) -> list[list[Any]]:
    names = {
        "arch": "architecture", "n_layer": "layers", "n_embd": "width", "n_head": "query heads",
        "n_kv_head": "key and value heads", "sequence_len": "context, tokens",
    }  # fmt: skip
    return [
        ["parameters", sum(p.numel() for p in model.parameters())],
        *([text, config[key]] for key, text in names.items()),
        ["vocabulary, ids", tokenizer.get_vocab_size()],
        ["stored as", dtype],
    ]


def _rows(path: Path, about: tuple[str, str, int]) -> list[Row]:
    """The rows of a metrics file about this checkpoint and no other."""
    keys = ("source", "model_tag", "step")
    return [row for row in read_rows(path) if tuple(row.get(key) for key in keys) == about]


def _training(source: str, meta: Row) -> list[str]:
    """What it was trained on, stage by stage, the last one first."""
    stages = list(_lineage(source, meta))
    body = []
    for stage, m in stages:
        results = [f"{k} {v:.4g}" for k, v in (m.get("metrics") or {}).items() if _number(v)]
        tokens = (m.get("state") or {}).get("tokens")
        data = m.get("mixture") or (m.get("args") or {}).get("data")
        body.append([stage, m.get("step"), tokens, data, "; ".join(results)])
    lines = ["## Training", "", *table(["stage", "steps", "tokens", "data", "results"], body)]
    last = stages[-1][1]
    if first := last.get("started_from") or (last.get("imported") or {}).get("from"):
        lines += [f"It began with: {first}.", ""]
    return lines


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _lineage(source: str, meta: Row) -> Iterator[tuple[str, Row]]:
    """(stage, metadata) of this checkpoint and of those it started from, as far as they are still
    there with the weights that it started from."""
    yield source, meta
    pattern = r"(\w+) (.+) step_(\d+) \((\w+)\)"
    while match := re.fullmatch(pattern, str(meta.get("started_from") or "")):
        stage, tag, step, weights = match.groups()
        folder = step_dir(stage, tag, int(step)) if stage in STAGE_FOLDERS else None
        try:
            if folder is None or weights_id(folder) != weights:
                return
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, LookupError):  # gone, or no longer what it was
            return
        yield stage, meta


def _usage(chat: bool, tag: str, tokenizer: Tokenizer, own_code: bool) -> list[str]:
    specials = tokenizer.vocabulary.specials
    names = {id: name for name, id in specials.items()}
    trust = ", trust_remote_code=True" if own_code else ""
    code = (
        USE.format(path=json.dumps(tag), trust=trust) + (USE_CHAT if chat else USE_BASE) + USE_END
    )
    lines = [code]
    if not chat:
        bos = names[tokenizer.get_bos_token_id()]
        puts = puts_bos(tokenizer, chat)
        then = ", as the tokenizer lets a text begin" if puts else "; put it before a text"
        return [*lines, f"In training every document began with `{bos}`{then}.\n"]
    before, after = (f"`{names[id]}`" for id in tokenizer.tool_call_ids)
    end = names[tokenizer.encode_special("<|assistant_end|>")]
    lines.append(f"A reply ends with `{end}`. The default is greedy: the same reply every time.\n")
    lines.append(TOOLS.format(before=before, after=after))
    lines.append(SPECIALS.format(example=f"`{end}`"))
    if tokenizer.chat_format == "qwen2.5":
        lines.append(SEAM)
    return lines
