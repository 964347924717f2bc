"""
The leaves that the architectures share: norms, rotary positions, attention, the loss.

Shape legend, used at line ends in every model file:
B batch rows, T positions, D model width (n_embd), H query heads, K key/value heads,
E width of a head, V vocabulary, S cached positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.models.attention import attend
from nanochat.models.loss import losses_of_rows, rows_of_chunk, sum_of_losses


class KVCacheLike(Protocol):
    """What attention needs of a key/value cache (engine.KVCache is the one we use)."""

    def positions(self, T: int) -> Tensor: ...  # (B, T): where the T new tokens of each row stand
    def end(self, T: int) -> int: ...  # one more than the largest of them, known without a sync
    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...
    # (B, 1, T, S): True = visible to a token that sees `window` positions; None = plain causal,
    # and where T is 1 all that is held
    def mask(self, T: int, window: int | None = None) -> Tensor | None: ...
    def previous(self, idx: Tensor) -> Tensor: ...  # (B, T) ids -> ids of the tokens before them
    def advance(self, T: int) -> None: ...


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Root mean square norm over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467), in
    the dtype of x: autocast on CUDA would leave normalised keys in float32 beside other values."""
    return F.rms_norm(x, (x.size(-1),), weight, eps).to(x.dtype)


def empty_embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without values yet. nn.Embedding(rows, width) would draw some, which on the meta
    device, where models are built, makes torch load its compiler: seconds at every start."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Rotary(nn.Module):
    """Rotary position table (Su et al. 2021, arXiv 2104.09864), half-rotation layout.

    `direction` is +1 for the usual rotation and -1 for the original nanochat's, which turns the
    other way (attention scores are the same; the weights of the two are not interchangeable)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, theta: float, length: int, direction: int = 1) -> None:
        super().__init__()
        self.head_dim, self.theta, self.direction = head_dim, theta, direction
        # Not persistent: a checkpoint holds weights, and these are arithmetic.
        self.register_buffer("cos", torch.empty(length, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(length, head_dim // 2), persistent=False)

    def fill(self, length: int | None = None) -> None:
        """Computes the table for `length` positions, on the device where it lives."""
        length = length or self.cos.size(0)
        device = self.cos.device
        # A table that grows while the engine samples must still serve training afterwards, and
        # autograd refuses tensors that were made in inference mode.
        with torch.inference_mode(False):
            channel = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
            inv_freq = 1.0 / self.theta ** (channel / self.head_dim)  # (E/2,)
            angle = torch.outer(torch.arange(length, device=device).float(), inv_freq)  # (S, E/2)
            self.cos, self.sin = angle.cos(), angle.sin() * self.direction

    def forward(self, T: int, cache: KVCacheLike | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, (B or 1, T, 1, E/2), of positions 0..T-1 or of the next T of a cache's rows;
        for one token of a cache (B, 1, 1, E), see apply_rotary.

        A longer text than ever seen makes the table grow, it does not fail."""
        needed = T if cache is None else cache.end(T)
        if needed > self.cos.size(0):
            self.fill(max(needed, 2 * self.cos.size(0)))
        if cache is None:
            return self.cos[None, :T, None, :], self.sin[None, :T, None, :]
        positions = cache.positions(T)  # (B, T)
        cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        if T == 1:  # as wide as a head, for apply_rotary's short way
            return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos, sin


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the two halves of each head by the position's angle: (B, T, H, E) -> same.

    With tables as wide as a head (cos twice, -sin and sin) it takes fewer operations: in decoding
    a step is so short that their number is what counts."""
    if cos.size(-1) == x.size(-1):
        return x * cos.to(x.dtype) + x.roll(x.size(-1) // 2, dims=-1) * sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)  # (B, T, H, E/2)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def products(x: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """What several linear layers make of the same input; in one product where the weights were
    joined for serving (serving.py)."""
    joined = getattr(linears[0], "joined", None)
    if joined is None:
        return [linear(x) for linear in linears]
    return joined(x).split([linear.out_features for linear in linears], dim=-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCacheLike | None = None,
    layer: int = 0,
    window: int | None = None,
) -> Tensor:
    """Causal attention, grouped when K < H: (B, T, H, E), (B, T, K, E) twice -> (B, T, H * E).

    With a cache the new keys and values are appended to it first, and each new token sees all that
    stands before it in its own row. `window` is how many positions a token sees, its own included
    (None: all); ValueError if that is none at all."""
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a token must at least see itself")
    B, T, H, E = q.shape
    if cache is not None:
        mask = cache.mask(T, window)
        held = cache.insert(layer, k.transpose(1, 2), v.transpose(1, 2))  # (B, K, S, E) each
        one_on_cpu = T == 1 and q.device.type == "cpu" and q.dtype == torch.float32
        if one_on_cpu and (torch.compiler.is_compiling() or k.size(2) != H):
            return getattr(cache, "one_query", one_query)(q, *held, mask)
        if mask is not None or T == 1:  # a single token without a mask sees all that is held
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), *held, attn_mask=mask, enable_gqa=k.size(2) != H
            )
            return y.transpose(1, 2).reshape(B, T, H * E)
    return attend(q, k, v, window).reshape(B, T, H * E)


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one token as two products: (B, 1, H, E), (B, K, S, E) twice, (B, 1, 1, S) ->
    (B, 1, H * E). On a CPU SDPA's kernel is made for many queries, and copies grouped keys."""
    B, _, H, E = q.shape
    K, S = k.size(1), k.size(2)
    q = (q * E**-0.5).reshape(B * K, H // K, E)
    assert B == 1 or k.stride(0) == K * k.stride(1), "rows of a cache follow one another"
    # flatten() would have a compiled program ask whether S is all that there is memory for
    k, v = (t.as_strided((B * K, S, E), t.stride()[1:]) for t in (k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, K, H // K, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.bmm(scores.softmax(dim=-1).flatten(0, 1), v).view(B, 1, H * E)


def token_losses(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    reduction: str,
    softcap: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of the next token, from hidden states: (B, T, D), (V, D), (B, T) -> loss.

    reduction "none" gives (B, T) in nats with 0 where the target is -1; "sum" and "mean" are over
    the other positions. A batch without one gives 0, never NaN. Logits exist for `chunk` positions
    at a time (None: as many as suit the device, see loss.py)."""
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: use 'none', 'sum' or 'mean'")
    flat = targets.reshape(-1)  # (B*T,); targets are a shifted view and need not be contiguous
    x = x.flatten(0, 1)  # (B*T, D)
    kept, all_kept = None, False
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # In conversations most positions have no target, and the head is a quarter of a small
        # model's work. On a GPU finding them would cost a sync and static shapes.
        at = (flat != -1).nonzero().squeeze(1)  # (N,)
        if at.numel() < flat.numel():
            kept, x, flat = at, x.index_select(0, at), flat[at]
        all_kept = True
    if chunk is None:
        chunk = rows_of_chunk(x, head, reduction)
    if reduction == "none":
        if x.size(0) > chunk:
            nll = losses_of_rows(x, head, flat, softcap, chunk)
        else:  # so few that computing their logits twice would save nothing
            logits = lm_logits(x, head, softcap)
            nll = F.cross_entropy(logits, flat, ignore_index=-1, reduction="none")
        if kept is not None:
            nll = nll.new_zeros(targets.numel()).index_put((kept,), nll)
        return nll.view(targets.shape)
    total = sum_of_losses(x, head, flat, softcap, chunk, all_kept)
    return total if reduction == "sum" else total / (targets != -1).sum().clamp(min=1)


def lm_logits(x: Tensor, head: Tensor | nn.Module, softcap: float = 0.0) -> Tensor:
    """Logits in float32, softly capped to +-softcap if it is set: (..., D) -> (..., V), by the
    head's layer, or its matrix.

    The cap is taken in float32: tanh in bfloat16 loses the differences that decide."""
    logits = (F.linear(x, head) if isinstance(head, Tensor) else head(x)).float()
    if not softcap:
        return logits
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return softcap * torch.tanh(logits / softcap)
    return logits.div_(softcap).tanh_().mul_(softcap)  # in place: in decoding memory is the time


def matmul_flops_per_token(
    num_matmul_params: int, n_layer: int, attn_width: int, seq_len: int
) -> int:
    """Training FLOPs of one token, forward and backward: 6 per matmul weight, and for attention
    12 * n_layer * (heads * head width) * seq_len (PaLM, arXiv 2204.02311, appendix B; the causal
    half is not subtracted, as is customary in MFU figures)."""
    return 6 * num_matmul_params + 12 * n_layer * attn_width * seq_len
