"""
Imports a checkpoint of Hugging Face's, or of the original nanochat, as one of ours.

    python -m scripts.hf_import --from=Qwen/Qwen2.5-0.5B-Instruct
    python -m scripts.hf_import --from=my_models/qwen-coder --model_tag=coder --stage=base
    python -m scripts.hf_import --from=old_base_dir/chatsft_checkpoints/d20

Qwen2.5 of any kind and NanoChat, as transformers saves them (safetensors, one file or many), and
model_000650.pt with meta_000650.json. The tokenizer comes along. Every stage goes on from it:

    python -m scripts.base_train --source_tag=coder                     # imported as base
    python -m scripts.chat_sft --source=base --source_tag=coder
    python -m scripts.chat_cli --source=sft --model_tag=Qwen2.5-0.5B-Instruct
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from nanochat import flags
from nanochat.hf_import import import_model


@dataclass
class Args:
    """Import a checkpoint with its tokenizer."""

    from_: Annotated[str, tyro.conf.arg(name="from")]
    """A folder, or a model of the hub (Qwen/Qwen2.5-0.5B)."""
    model_tag: str | None = None
    """Tag to give it; default: the name of the folder or model."""
    stage: Annotated[flags.Source | None, flags.alias("--source")] = None
    """Stage to give it. Default: sft if its replies end with an end-of-turn token, else base."""
    tokenizer: str | None = None
    """Folder of its tokenizer.json or tokenizer.pkl; default: the model's own folder."""
    max_seq_len: int = 2048
    """Row length of later stages and context of chats, where it was made for more; attention and
    training rows that long are dear. Weights do not depend on it."""


def main(args: Args) -> None:
    import_model(args.from_, args.model_tag, args.stage, args.tokenizer, args.max_seq_len)


if __name__ == "__main__":
    flags.run(main, Args)
