"""
Turbo: the GPT of gpt.py plus what measurably learns more from the same tokens.

What is added, and what each was worth, is in bench/LEARNING.md: value embeddings on every other
layer, scalars on the residual stream and on a way back to the embedding, a look at the token before
("smear"), the middle of the network taken out of its end ("backout"), short attention windows on
three layers of four, sharper attention, a longer rotary base. The ideas are modded-nanogpt's and
nanochat's; each is named where it stands. Shape letters: see layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.models.gpt import MLP
from nanochat.models.layers import (
    KVCacheLike,
    Rotary,
    apply_rotary,
    attention,
    empty_embedding,
    lm_logits,
    products,
    rms_norm,
    token_losses,
)

ROPE_THETA = 100_000.0
LOGIT_SOFTCAP = 15.0
# Queries and keys of norm sqrt(E) each, times this: the softmax begins sharper by its square.
QK_SCALE = 1.2
GATE_CHANNELS = 32  # gates look at the first channels only: cheap, and the network learns to use it


@dataclass(frozen=True)
class TurboConfig:
    """Shape of the model: all that is needed to rebuild it."""

    sequence_len: int = 2048
    vocab_size: int = 65_536
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    window: int = 512  # positions that a token sees in the layers with short windows

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, sequence_len: int) -> TurboConfig:
        """The one dial: width 64 per layer, heads of 128 (64 below d8, or if 128 does not fit);
        short windows are a quarter of a row, in whole blocks of 128 as attention kernels like."""
        n_embd = 64 * depth
        n_head = n_embd // (128 if depth >= 8 and n_embd % 128 == 0 else 64)
        window = -(-sequence_len // 4 // 128) * 128
        return cls(sequence_len, vocab_size, depth, n_head, n_head, n_embd, max(128, window))

    def layer_window(self, layer: int) -> int | None:
        """Short, short, short, long, and so on; the last layer always sees everything."""
        return None if layer % 4 == 3 or layer == self.n_layer - 1 else self.window

    def has_value_embedding(self, layer: int) -> bool:
        """Every other layer, the last one included."""
        return layer % 2 == (self.n_layer - 1) % 2


class Attention(nn.Module):
    def __init__(self, config: TurboConfig, layer: int) -> None:
        super().__init__()
        D, E = config.n_embd, config.n_embd // config.n_head
        self.layer, self.head_dim, self.window = layer, E, config.layer_window(layer)
        self.c_q = nn.Linear(D, config.n_head * E, bias=False)
        self.c_k = nn.Linear(D, config.n_kv_head * E, bias=False)
        self.c_v = nn.Linear(D, config.n_kv_head * E, bias=False)
        self.c_proj = nn.Linear(D, D, bias=False)
        self.value_gate: nn.Linear | None = None
        if config.has_value_embedding(layer):
            self.value_gate = nn.Linear(GATE_CHANNELS, config.n_kv_head, bias=False)

    def forward(
        self,
        x: Tensor,
        value: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: KVCacheLike | None,
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = products(x, self.c_q, self.c_k, self.c_v)
        q = q.view(B, T, -1, self.head_dim)  # (B, T, H, E)
        k = k.view(B, T, -1, self.head_dim)  # (B, T, K, E)
        v = v.view(B, T, -1, self.head_dim)  # (B, T, K, E)
        if self.value_gate is not None and value is not None:
            # The token's own value vector (Zhou et al., arXiv 2410.17897; a table a layer as in
            # modded-nanogpt), in each head as much as its gate says: 0 to 2, 1 at the start.
            gate = 2 * torch.sigmoid(self.value_gate(x[..., :GATE_CHANNELS]))  # (B, T, K)
            v = v + gate.unsqueeze(-1) * value.view(B, T, -1, self.head_dim)
        q = QK_SCALE * rms_norm(apply_rotary(q, *rotary))
        k = QK_SCALE * rms_norm(apply_rotary(k, *rotary))
        return self.c_proj(attention(q, k, v, cache, self.layer, self.window))  # (B, T, D)


class Block(nn.Module):
    def __init__(self, config: TurboConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)  # type: ignore[arg-type]  # of the GPT's config it reads n_embd

    def forward(
        self,
        x: Tensor,
        value: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: KVCacheLike | None,
    ) -> Tensor:
        x = x + self.attn(rms_norm(x), value, rotary, cache)
        return x + self.mlp(rms_norm(x))


class Turbo(nn.Module):
    """The language model. Build it on any device (meta too), then init_weights()."""

    def __init__(self, config: TurboConfig) -> None:
        super().__init__()
        self.config = config
        V, D, N = config.vocab_size, config.n_embd, config.n_layer
        head_dim = D // config.n_head
        self.wte = empty_embedding(V, D)
        self.value_embeds = nn.ModuleDict(
            {
                str(i): empty_embedding(V, config.n_kv_head * head_dim)
                for i in range(N)
                if config.has_value_embedding(i)
            }
        )
        self.h = nn.ModuleList(Block(config, i) for i in range(N))
        self.lm_head = nn.Linear(D, V, bias=False)
        self.residual_scale = nn.Parameter(torch.empty(N))  # of the stream, before each block
        self.embedding_scale = nn.Parameter(torch.empty(N))  # of what is added of the embedding
        self.smear_gate = nn.Linear(GATE_CHANNELS, 1, bias=False)
        self.smear_scale = nn.Parameter(torch.empty(1))
        self.backout_scale = nn.Parameter(torch.empty(1))
        self.rotary = Rotary(head_dim, ROPE_THETA, config.sequence_len)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Writes every parameter and buffer. Needed after to_empty(): the memory holds anything."""
        bound = (3 / self.config.n_embd) ** 0.5  # a uniform of standard deviation 1/sqrt(D)
        block: Any
        table: Any
        for block in self.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                linear.weight.uniform_(-bound, bound, generator=generator)
            block.mlp.c_fc.weight.uniform_(-0.4 * bound, 0.4 * bound, generator=generator)
            block.attn.c_proj.weight.zero_()  # each block begins as the identity
            block.mlp.c_proj.weight.zero_()
            if block.attn.value_gate is not None:
                block.attn.value_gate.weight.zero_()
        for table in self.value_embeds.values():
            table.weight.uniform_(-bound, bound, generator=generator)
        self.wte.weight.normal_(0.0, 0.8, generator=generator)
        self.lm_head.weight.normal_(0.0, 0.001, generator=generator)
        self.residual_scale.fill_(1.0)
        self.embedding_scale.fill_(0.1)
        self.smear_gate.weight.zero_()
        self.smear_scale.zero_()
        self.backout_scale.fill_(0.2)
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
        x = embedding = self._smeared(idx, kv_cache)  # (B, T, D)
        middle = torch.zeros_like(x)
        for i, block in enumerate(self.h):
            x = self.residual_scale[i] * x + self.embedding_scale[i] * embedding
            value = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = block(x, value, rotary, kv_cache)
            if i == self.config.n_layer // 2 - 1:
                middle = x
        if kv_cache is not None:
            kv_cache.advance(T)
        # What the first half worked out for the second is not all of use to the head ("backout").
        return rms_norm(x - self.backout_scale * middle)

    def _smeared(self, idx: Tensor, kv_cache: KVCacheLike | None) -> Tensor:
        """Embeddings, each with some of the one before it: pairs of tokens are known from the first
        layer on, which else would take an attention head ("smear", modded-nanogpt)."""
        x = rms_norm(self.wte(idx))  # (B, T, D)
        if kv_cache is None:
            before = F.pad(x[:, :-1], (0, 0, 1, 0))  # (B, T, D), zeros before the first
        else:
            ids = kv_cache.previous(idx)  # (B, T), -1 before the first
            before = rms_norm(self.wte(ids.clamp(min=0))) * (ids >= 0).unsqueeze(-1)
        gate = torch.sigmoid(self.smear_gate(x[..., :GATE_CHANNELS]))  # (B, T, 1)
        return x + self.smear_scale * gate * before

    def logits(self, x: Tensor) -> Tensor:
        """The head: (..., D) -> (..., V) float32."""
        return lm_logits(x, self.lm_head, LOGIT_SOFTCAP)

    def get_device(self) -> torch.device:
        return self.lm_head.weight.device

    def param_groups(self) -> dict[str, list[Tensor]]:
        """Parameters by how they are optimized; every parameter is in exactly one group."""
        return {
            "matrix": list(self.h.parameters()),
            "embedding": [self.wte.weight],
            "value_embedding": list(self.value_embeds.parameters()),
            "head": [self.lm_head.weight],
            "residual_scale": [self.residual_scale],
            "embedding_scale": [self.embedding_scale],
            "gate": [self.smear_gate.weight, self.smear_scale, self.backout_scale],
        }

    def flops_per_token(self) -> int:
        """Training FLOPs per token at the full sequence length; see matmul_flops_per_token. A layer
        with a short window attends to no more than that."""
        c = self.config
        matmul = sum(p.numel() for p in self.h.parameters())
        matmul += self.lm_head.weight.numel() + self.smear_gate.weight.numel()
        spans = (c.layer_window(i) or c.sequence_len for i in range(c.n_layer))
        attended = sum(min(span, c.sequence_len) for span in spans)
        return 6 * matmul + 12 * c.n_embd * attended
