"""
Tiny models for everybody's tests.

`randomise` matters: freshly initialised models have zero output projections and unit norm weights,
so that half of the code could be wrong and nothing would show.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nanochat.models import GPTConfig, QwenConfig, TurboConfig, build_model

TINY: dict[str, Any] = {
    "gpt": GPTConfig(16, 96, n_layer=3, n_head=4, n_kv_head=2, n_embd=32),
    # 64 channels, since gates look at the first 32; windows of 5, so that short texts exceed them
    "turbo": TurboConfig(16, 96, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window=5),
    "qwen2.5": QwenConfig(16, 96, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_mlp=40),
}


def randomise(model: Any, seed: int = 0) -> Any:
    """Every parameter random, of a size that makes every one of them matter in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and not ("wte" in name or "embed" in name or "lm_head" in name):
                p.normal_(0.0, p.size(1) ** -0.5, generator=generator)
            elif "norm" in name:
                p.normal_(1.0, 0.3, generator=generator)
            else:
                p.normal_(0.0, 0.7, generator=generator)  # embeddings, heads, biases
    return model


def tiny_model(arch: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of that architecture; `changes` are config fields, vocab_size for one."""
    return randomise(build_model(replace(TINY[arch], **changes), seed=seed), seed)


def tokens_of(model: Any, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids of that shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator)
