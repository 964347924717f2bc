"""Folders as transformers' save_pretrained writes them: tiny random models with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.hf import config_to_hf
from nanochat.models import Config
from nanochat.tokenizer import Tokenizer
from tests.models_for_tests import TINY, randomise
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer


def register_turbo() -> None:
    """Lets this process's transformers know our class for Turbo, as it knows its own: else it would
    ask to run a copy from the folder. That it can is tested in test_hf_export.py."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from nanochat.hf_code import modeling_nanochat_turbo as code

    config = code.NanochatTurboConfig
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoModelForCausalLM.register(config, code.NanochatTurboForCausalLM, exist_ok=True)


def tokenizer_of(arch: str) -> Tokenizer:
    """400 ids: one like Qwen2.5's for Qwen, ours for the others."""
    return tiny_qwen() if arch == "qwen2.5" else tiny_tokenizer()


def config_of(arch: str, **changes: Any) -> Config:
    """TINY's, with rows for the tokenizer and a few more, as Qwen has, made for 64 positions."""
    return type(TINY[arch])(
        **{**vars(TINY[arch]), "vocab_size": 416, "sequence_len": 64, **changes}
    )


def save_hf(
    folder: Path,
    arch: str = "qwen2.5",
    dtype: str = "float32",
    shard: str = "5GB",
    eos: str = "<|bos|>",
    **changes: Any,
) -> Any:
    """Writes model and tokenizer.json; returns transformers' model, with those weights.

    `eos` is the special token that generation_config.json names."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    register_turbo()
    tokenizer = tokenizer_of(arch)
    end = tokenizer.encode_special(eos)
    data = config_to_hf(config_of(arch, **changes), end, None, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = randomise(model).to(getattr(torch, dtype)).eval()
    model.tie_weights()
    model.generation_config.eos_token_id = [end, tokenizer.get_bos_token_id()]
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save(folder)
    file = str(folder / "tokenizer.json")  # which it writes anew, in its own words
    transformers.PreTrainedTokenizerFast(tokenizer_file=file).save_pretrained(folder)
    (folder / "tokenizer.pkl").unlink()
    return model
