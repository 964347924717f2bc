"""What llama.cpp makes of a GGUF file, in a process of its own: the worker of bench/gguf.py.

Imports nothing of this repository, so that it runs under the Python of any environment. The task is
in spec.json beside the file, and the answer is printed as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose gguf.py is not the package of that name

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

FLOAT32 = 0  # ggml's number of the type


def encode(llama: llama_cpp.Llama, spec: dict) -> dict:
    """Ids of every text, special tokens' names being ordinary text."""
    return {"ids": [llama.tokenize(t.encode("utf-8"), add_bos=False) for t in spec["texts"]]}


def run(llama: llama_cpp.Llama, spec: dict) -> dict:
    """Logits of the prompts (logits.npy), greedy continuations, stop tokens, chats as ids."""
    logits, continued = [], []
    for prompt in spec["prompts"]:
        llama.reset()
        llama.eval(prompt)
        logits.append(llama.scores[: len(prompt)].copy())
        row: list[int] = []
        while len(row) < spec["tokens"]:
            row.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            llama.eval(row[-1:])
        continued.append(row)
    np.save(spec["folder"] + "/logits.npy", np.stack(logits))
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    stop = [i for i in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    template = llama.metadata["tokenizer.chat_template"]
    render = Jinja2ChatFormatter(template, eos_token="", bos_token="")
    texts = [render(messages=messages).prompt for messages in spec["chats"]]
    chats = [llama.tokenize(t.encode("utf-8"), add_bos=False, special=True) for t in texts]
    return {"tokens": continued, "stop": stop, "chats": chats}


def main(spec: dict) -> None:
    spec |= json.loads(Path(spec["folder"], "spec.json").read_text(encoding="utf-8"))
    llama = llama_cpp.Llama(
        spec["folder"] + "/model.gguf",
        n_ctx=256,
        n_threads=spec["threads"],
        logits_all=spec["task"] == "run",
        # Keys and values would be kept as float16, and the logits differ by that
        type_k=FLOAT32,
        type_v=FLOAT32,
        verbose=False,
    )
    found = {"encode": encode, "run": run}[spec["task"]](llama, spec)
    print(json.dumps({"version": llama_cpp.__version__, **found}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
