"""A base directory with a tiny random checkpoint, for the scripts that load one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat.checkpoint import save_checkpoint
from tests.models_for_tests import tiny_model
from tests.tokenizers_for_tests import tiny_tokenizer


def save_tiny(
    base_dir: Path, source: str, tag: str = "tiny", step: int = 7, arch: str = "gpt"
) -> Any:
    """Saves tokenizer and model under `base_dir`, which NANOCHAT_BASE_DIR must point to."""
    tokenizer = tiny_tokenizer()
    tokenizer.save(base_dir / "tokenizer")
    model = tiny_model(arch, vocab_size=tokenizer.get_vocab_size(), sequence_len=128)
    meta = {"tokenizer": None, "tokenizer_fingerprint": tokenizer.fingerprint, "step": step}
    save_checkpoint(source, tag, step, model, {}, meta)
    return model
