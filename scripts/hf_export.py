"""
Exports a model for Hugging Face transformers: a folder that loads without this package.

    python -m scripts.hf_export --source=sft --out=my-model
    python -m scripts.hf_export --source=base --model_tag=d20 --out=d20-base --dtype=float32

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("my-model")
    tokenizer = AutoTokenizer.from_pretrained("my-model")

A Turbo (--arch=turbo) is an architecture that transformers does not have: its folder holds a file
with the code, which from_pretrained runs if it is told trust_remote_code=True.

The default bfloat16 is what published models have: half the size, each weight to 3 digits. With
--dtype=float32 the logits are ours to the last digits. The chat template renders a conversation to
the ids that we train and chat on; where it cannot is said in nanochat/chat_template.py, and in the
model card that is written beside the weights from the checkpoint and the report.

With --gguf there is a model.gguf too, for llama.cpp and what is built on it: for models of --arch
qwen2.5, since llama.cpp does not know ours. llama.cpp's own llama-quantize makes it smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from nanochat import flags
from nanochat.checkpoint import load_model
from nanochat.common import get_base_dir, print0
from nanochat.gguf import check_gguf, write_gguf
from nanochat.hf import AUTO_MAP
from nanochat.hf_export import check_target, export_model
from nanochat.models import arch_of
from nanochat.report.model_card import model_card


@dataclass
class Args:
    """Export a model for Hugging Face transformers."""

    out: str
    """Folder to write; it must be empty or not there."""
    source: Annotated[flags.Source, flags.alias("-i")] = "sft"
    """Stage of the model: base, mid, sft, rl or dpo."""
    model_tag: Annotated[str | None, flags.alias("-g")] = None
    """Tag of the model; default: the newest."""
    step: Annotated[int | None, flags.alias("-s")] = None
    """Step of the checkpoint; default: the last."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Type of the stored weights. float32 is exact and takes twice the space."""
    max_shard_size: str = "5GB"
    """Weights above this size are cut into several files."""
    overwrite: bool = False
    """Replace an earlier export in --out."""
    gguf: bool = False
    """Write model.gguf too, for llama.cpp; Qwen2.5-shaped models only."""


def main(args: Args) -> None:
    """Loads the checkpoint, writes the folder, says how to load it."""
    out = Path(args.out)
    check_target(out, args.overwrite)  # before a load that may take minutes
    model, tokenizer, meta = load_model(args.source, "cpu", args.model_tag, args.step)
    if args.gguf:
        check_gguf(model, tokenizer)
    print0(f"exporting {args.source} {meta['tag']}, step {meta['step']}, as {args.dtype}")
    chat = args.source != "base"
    # An imported model's rows may have been cut shorter than what it is made for
    if context := (meta.get("imported") or {}).get("max_position_embeddings"):
        model.config = replace(model.config, sequence_len=context)

    def write_also(folder: Path) -> None:
        name = f"{meta['tag']} ({args.source})"
        write_gguf(folder / "model.gguf", model, tokenizer, name, chat, args.dtype)

    card = model_card(args.source, meta, model, tokenizer, args.dtype, get_base_dir() / "report")
    export_model(
        out,
        model,
        tokenizer,
        chat,
        card,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        also=write_also if args.gguf else None,
    )
    trust = ", trust_remote_code=True" if arch_of(model.config) in AUTO_MAP else ""
    print0(f"wrote {out}; load it with AutoModelForCausalLM.from_pretrained({str(out)!r}{trust})")


if __name__ == "__main__":
    flags.run(main, Args)
