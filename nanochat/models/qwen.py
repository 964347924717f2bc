"""
Qwen2.5: norms with weights, SwiGLU, biases on queries, keys and values, grouped-query attention.

Parameter names are Hugging Face's own, so that import and export are renamings of nothing.
Architecture: Qwen2.5 technical report (arXiv 2412.15115). Shape letters: see layers.py.
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


@dataclass(frozen=True)
class QwenConfig:
    """Shape of the model: all that is needed to rebuild it. Defaults are Qwen2.5-0.5B's."""

    sequence_len: int = 2048
    vocab_size: int = 151_936
    n_layer: int = 24
    n_head: int = 14
    n_kv_head: int = 2
    n_embd: int = 896
    n_mlp: int = 4864
    tied: bool = True
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, sequence_len: int) -> QwenConfig:
        """The dial: the GPT's width and heads at that depth, about 4 query heads to a key head."""
        n_embd = 64 * depth
        n_head = n_embd // (128 if depth >= 8 and n_embd % 128 == 0 else 64)
        n_kv_head = max(k for k in range(1, max(1, n_head // 4) + 1) if n_head % k == 0)
        n_mlp = -(-8 * n_embd // 3 // 128) * 128  # 8/3 of the width, rounded up to 128
        return cls(sequence_len, vocab_size, depth, n_head, n_kv_head, n_embd, n_mlp)


# The published sizes (config.json of Qwen/Qwen2.5-*): the four that one node trains.
SIZES: dict[str, QwenConfig] = {
    "qwen2.5-0.5b": QwenConfig(2048, 151_936, 24, 14, 2, 896, 4864, tied=True),
    "qwen2.5-1.5b": QwenConfig(2048, 151_936, 28, 12, 2, 1536, 8960, tied=True),
    "qwen2.5-3b": QwenConfig(2048, 151_936, 36, 16, 2, 2048, 11_008, tied=True),
    "qwen2.5-7b": QwenConfig(2048, 152_064, 28, 28, 4, 3584, 18_944, tied=False),
}


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: QwenConfig, layer: int) -> None:
        super().__init__()
        D, E = config.n_embd, config.n_embd // config.n_head
        self.layer, self.head_dim = layer, E
        self.q_proj = nn.Linear(D, config.n_head * E, bias=True)
        self.k_proj = nn.Linear(D, config.n_kv_head * E, bias=True)
        self.v_proj = nn.Linear(D, config.n_kv_head * E, bias=True)
        self.o_proj = nn.Linear(config.n_head * E, D, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCacheLike | None
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = products(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(B, T, -1, self.head_dim)  # (B, T, H, E)
        k = k.view(B, T, -1, self.head_dim)  # (B, T, K, E)
        v = v.view(B, T, -1, self.head_dim)  # (B, T, K, E)
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        return self.o_proj(attention(q, k, v, cache, self.layer))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.down_proj = nn.Linear(config.n_mlp, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = products(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)  # (B, T, D)


class Block(nn.Module):
    def __init__(self, config: QwenConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCacheLike | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks and final norm: the part Hugging Face calls `model`."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.embed_tokens = empty_embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)


class Qwen(nn.Module):
    """The language model. Build it on any device (meta too), then init_weights()."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        # Tied: the embedding serves as the head, and no second matrix exists.
        self.lm_head = (
            None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        )
        head_dim = config.n_embd // config.n_head
        self.rotary = Rotary(head_dim, config.rope_theta, config.sequence_len)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output head, which is the embedding when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Writes every parameter and buffer. Needed after to_empty(): the memory holds anything."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
        for module in self.modules():
            if isinstance(module, Block):  # each begins as the identity
                module.self_attn.o_proj.weight.zero_()
                module.mlp.down_proj.weight.zero_()
        self.model.embed_tokens.weight.normal_(0.0, 0.02, generator=generator)
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
        return token_losses(x, self.head_weight, targets, reduction)

    def hidden(self, idx: Tensor, kv_cache: KVCacheLike | None = None) -> Tensor:
        """The trunk: (B, T) ids -> (B, T, D), normalised, ready for the head."""
        T = idx.size(1)
        rotary = self.rotary(T, kv_cache)
        x = self.model.embed_tokens(idx)  # (B, T, D)
        for block in self.model.layers:
            x = block(x, rotary, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(T)
        return self.model.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """The head: (..., D) -> (..., V) float32."""
        return lm_logits(x, self.lm_head or self.head_weight)

    def get_device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def param_groups(self) -> dict[str, list[Tensor]]:
        """Parameters by how they are optimized; every parameter is in exactly one group.

        A tied embedding goes with the head: an output layer tolerates only the smaller rate."""
        embedding = self.model.embed_tokens.weight
        inner = [*self.model.layers.parameters(), self.model.norm.weight]
        head = [embedding] if self.lm_head is None else [self.lm_head.weight]
        return {
            "matrix": [p for p in inner if p.ndim == 2],
            "embedding": [] if self.lm_head is None else [embedding],
            "head": head,
            "vector": [p for p in inner if p.ndim != 2],
        }

    def flops_per_token(self) -> int:
        """Training FLOPs per token at the full sequence length (a tied head is multiplied once)."""
        c = self.config
        matmul = sum(p.numel() for p in self.param_groups()["matrix"]) + c.vocab_size * c.n_embd
        return matmul_flops_per_token(matmul, c.n_layer, c.n_embd, c.sequence_len)
