"""
GPT: the original nanochat transformer, small enough to hold in the head.

Rotary positions, normalised queries and keys, squared-ReLU MLP, norms without weights (one right
after the embedding too), no biases, an output head of its own, logits softly capped at 15. It is
the architecture that Hugging Face transformers knows as NanoChatForCausalLM.
Shape letters: see layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.models.layers import (
    KVCacheLike,
    Rotary,
    apply_rotary,
    attention,
    empty_embedding,
    lm_logits,
    matmul_flops_per_token,
    products,
    rms_norm,
    token_losses,
)

ROPE_THETA = 10_000.0
LOGIT_SOFTCAP = 15.0


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model: all that is needed to rebuild it."""

    sequence_len: int = 2048
    vocab_size: int = 65_536
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, sequence_len: int) -> GPTConfig:
        """The one dial: width 64 per layer, heads of 128 (64 below d8, or if 128 does not fit)."""
        n_embd = 64 * depth
        n_head = n_embd // (128 if depth >= 8 and n_embd % 128 == 0 else 64)
        return cls(sequence_len, vocab_size, depth, n_head, n_head, n_embd)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        D, E = config.n_embd, config.n_embd // config.n_head
        self.layer, self.head_dim = layer, E
        self.c_q = nn.Linear(D, config.n_head * E, bias=False)
        self.c_k = nn.Linear(D, config.n_kv_head * E, bias=False)
        self.c_v = nn.Linear(D, config.n_kv_head * E, bias=False)
        self.c_proj = nn.Linear(D, D, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCacheLike | None
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = products(x, self.c_q, self.c_k, self.c_v)
        q = q.view(B, T, -1, self.head_dim)  # (B, T, H, E)
        k = k.view(B, T, -1, self.head_dim)  # (B, T, K, E)
        v = v.view(B, T, -1, self.head_dim)  # (B, T, K, E)
        # QK norm keeps attention scores bounded, whatever the weights do.
        q, k = rms_norm(apply_rotary(q, *rotary)), rms_norm(apply_rotary(k, *rotary))
        return self.c_proj(attention(q, k, v, cache, self.layer))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.c_fc(x))  # (B, T, 4D)
        return self.c_proj(h * h)  # (B, T, D); autocast would take square() to float32


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCacheLike | None
    ) -> Tensor:
        x = x + self.attn(rms_norm(x), rotary, cache)
        return x + self.mlp(rms_norm(x))


class Trunk(nn.Module):
    """Embedding and blocks, under the names that nanochat's checkpoints know."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = empty_embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))


class GPT(nn.Module):
    """The language model. Build it on any device (meta too), then init_weights()."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Trunk(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        head_dim = config.n_embd // config.n_head
        self.rotary = Rotary(head_dim, ROPE_THETA, config.sequence_len, direction=-1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Writes every parameter and buffer. Needed after to_empty(): the memory holds anything."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                # Spectral condition (arXiv 2310.17813): narrow outputs start smaller.
                std = fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5)
                module.weight.normal_(0.0, std, generator=generator)
        for module in self.modules():
            if isinstance(module, Attention | MLP):
                module.c_proj.weight.zero_()  # each block begins as the identity
        self.transformer.wte.weight.normal_(0.0, 1.0, generator=generator)
        self.lm_head.weight.normal_(0.0, 0.001, generator=generator)
        self.rotary.fill()

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: KVCacheLike | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """(B, T) token ids -> (B, T, V) float32 logits, or the loss when targets (B, T) are given.

        targets of -1 are ignored. With kv_cache, idx continues what the cache holds."""
        x = self.hidden(idx, kv_cache)
        if targets is None:
            return self.logits(x)
        return token_losses(x, self.lm_head.weight, targets, reduction, LOGIT_SOFTCAP)

    def hidden(self, idx: Tensor, kv_cache: KVCacheLike | None = None) -> Tensor:
        """The trunk: (B, T) ids -> (B, T, D), normalised, ready for the head."""
        T = idx.size(1)
        rotary = self.rotary(T, kv_cache)
        x = rms_norm(self.transformer.wte(idx))  # (B, T, D)
        for block in self.transformer.h:
            x = block(x, rotary, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(T)
        return rms_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """The head: (..., D) -> (..., V) float32."""
        return lm_logits(x, self.lm_head, LOGIT_SOFTCAP)

    def get_device(self) -> torch.device:
        return self.lm_head.weight.device

    def param_groups(self) -> dict[str, list[Tensor]]:
        """Parameters by how they are optimized; every parameter is in exactly one group."""
        return {
            "matrix": list(self.transformer.h.parameters()),
            "embedding": [self.transformer.wte.weight],
            "head": [self.lm_head.weight],
            "vector": [],
        }

    def flops_per_token(self) -> int:
        """Training FLOPs per token at the full sequence length."""
        c = self.config
        matmul = sum(p.numel() for p in self.parameters()) - c.vocab_size * c.n_embd
        return matmul_flops_per_token(matmul, c.n_layer, c.n_embd, c.sequence_len)
