"""
nanochat's Turbo for Hugging Face transformers (5 or later): configuration and model in one file.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A GPT (rotary positions, normalised queries and keys, squared ReLU, norms without weights, softly
capped logits) with: a table of value vectors on some layers, scalars on the residual stream and on
a way back to the embedding, a look at the token before ("smear"), the middle of the network
subtracted from its end ("backout"), and short attention windows on some layers. Padding may stand
on either side; say where by attention_mask.

B batch rows, T new positions, S all positions, D width, H query heads, K key heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple


class NanochatTurboConfig(PretrainedConfig):
    """The shape. config.json says all of it; the defaults leave every addition out."""

    model_type = "nanochat_turbo"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 65_536,
        hidden_size: int = 1280,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 10,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10_000.0,
        final_logit_softcapping: float = 0.0,  # 0: none
        qk_scale: float = 1.0,
        gate_channels: int = 1,
        attention_windows: list[int | None] | None = None,  # of each layer; None: sees everything
        value_embedding_layers: tuple[int, ...] = (),
        backout_layer: int = -1,  # whose output is subtracted from the last one's; -1: none
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.final_logit_softcapping = final_logit_softcapping
        self.qk_scale = qk_scale
        self.gate_channels = gate_channels
        self.attention_windows = attention_windows or [None] * num_hidden_layers
        self.value_embedding_layers = list(value_embedding_layers)
        self.backout_layer = backout_layer
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**kwargs)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two halves of each head turned by its position's angle: (B, T, H, E) -> same."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class TurboAttention(nn.Module):
    def __init__(self, config: NanochatTurboConfig, layer: int) -> None:
        super().__init__()
        D, self.head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.layer, self.window = layer, config.attention_windows[layer]
        self.eps, self.qk_scale = config.rms_norm_eps, config.qk_scale
        self.gate_channels = config.gate_channels
        self.c_q = nn.Linear(D, D, bias=False)
        self.c_k = nn.Linear(D, config.num_key_value_heads * self.head_dim, bias=False)
        self.c_v = nn.Linear(D, config.num_key_value_heads * self.head_dim, bias=False)
        self.c_proj = nn.Linear(D, D, bias=False)
        self.value_gate = None
        if layer in config.value_embedding_layers:
            self.value_gate = nn.Linear(
                config.gate_channels, config.num_key_value_heads, bias=False
            )

    def forward(
        self,
        x: Tensor,
        value: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        masks: dict[int | None, Tensor],
        cache: DynamicCache | None,
    ) -> Tensor:
        B, T, D = x.shape
        q = rotated(self.c_q(x).view(B, T, -1, self.head_dim), *rotary)  # (B, T, H, E)
        k = rotated(self.c_k(x).view(B, T, -1, self.head_dim), *rotary)  # (B, T, K, E)
        v = self.c_v(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        if self.value_gate is not None and value is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.gate_channels]))  # (B, T, K)
            v = v + gate.unsqueeze(-1) * value.view(B, T, -1, self.head_dim)
        q, k = (self.qk_scale * F.rms_norm(t, (self.head_dim,), None, self.eps) for t in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, E)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, K, S, E)
        gqa = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[self.window], enable_gqa=gqa)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class TurboMLP(nn.Module):
    def __init__(self, config: NanochatTurboConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class TurboBlock(nn.Module):
    def __init__(self, config: NanochatTurboConfig, layer: int) -> None:
        super().__init__()
        self.width, self.eps = (config.hidden_size,), config.rms_norm_eps
        self.attn = TurboAttention(config, layer)
        self.mlp = TurboMLP(config)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.attn(F.rms_norm(x, self.width, None, self.eps), *context)
        return x + self.mlp(F.rms_norm(x, self.width, None, self.eps))


class NanochatTurboForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. It reads token ids only: value vectors and the look back need them."""

    config_class = NanochatTurboConfig
    base_model_prefix = ""
    _no_split_modules = ("TurboBlock",)
    _supports_sdpa = True

    def __init__(self, config: NanochatTurboConfig) -> None:
        super().__init__(config)
        V, D, N = config.vocab_size, config.hidden_size, config.num_hidden_layers
        kv_width = config.num_key_value_heads * (D // config.num_attention_heads)
        self.wte = nn.Embedding(V, D)
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(V, kv_width) for i in config.value_embedding_layers}
        )
        self.h = nn.ModuleList(TurboBlock(config, i) for i in range(N))
        self.lm_head = nn.Linear(D, V, bias=False)
        self.residual_scale = nn.Parameter(torch.ones(N))
        self.embedding_scale = nn.Parameter(torch.zeros(N))
        self.smear_gate = nn.Linear(config.gate_channels, 1, bias=False)
        self.smear_scale = nn.Parameter(torch.zeros(1))
        self.backout_scale = nn.Parameter(torch.zeros(1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:  # parameters of the model itself; transformers leaves loaded ones alone
            nn.init.ones_(self.residual_scale)
            for scale in (self.embedding_scale, self.smear_scale, self.backout_scale):
                nn.init.zeros_(scale)

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Not possible: the tables of value vectors have a row a token too."""
        raise NotImplementedError("nanochat_turbo: the vocabulary is fixed; train a new model")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """(B, T) ids -> (B, T, V) float32 logits, and the loss if there are labels (B, T).

        attention_mask (B, S) is 0 on padding, S being what the cache holds and the T new ones."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("nanochat_turbo reads input_ids; inputs_embeds alone do not do")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("nanochat_turbo takes a 2D attention_mask and a DynamicCache")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        ids = self._all_ids(input_ids, past_key_values)  # (B, S)
        real = torch.ones_like(ids) if attention_mask is None else attention_mask  # (B, S)
        if real.shape != ids.shape:
            raise ValueError(f"attention_mask is {tuple(real.shape)}, the text {tuple(ids.shape)}")
        x = self._hidden(input_ids, ids, real.bool(), position_ids, past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep]).float()
        if cap := self.config.final_logit_softcapping:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _all_ids(self, input_ids: Tensor, cache: DynamicCache | None) -> Tensor:
        """(B, S): the tokens so far. The cache keeps them as one more layer, so that whatever
        reorders, repeats or shortens its rows does the same to them."""
        if cache is None:
            return input_ids
        layer = self.config.num_hidden_layers
        if cache.layers and len(cache.layers) == layer:
            cache.layers.append(DynamicLayer())
        new = input_ids[:, None, :, None]  # (B, 1, T, 1), as a head of width 1
        return cache.update(new, new, layer)[0][:, 0, :, 0]

    def _hidden(
        self,
        input_ids: Tensor,
        ids: Tensor,
        real: Tensor,
        position_ids: Tensor | None,
        cache: DynamicCache | None,
    ) -> Tensor:
        """The trunk: (B, T) new ids of (B, S) -> (B, T, D), normalised, ready for the head."""
        config, T, S = self.config, input_ids.size(1), ids.size(1)
        width = (config.hidden_size,)
        if position_ids is None:  # padding does not count
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, S - T :]
        rotary = self._rotary(position_ids)
        masks = self._masks(real, T)
        x = F.rms_norm(self.wte(input_ids), width, None, config.rms_norm_eps)  # (B, T, D)
        x = embedding = x + self._smear(x, ids, real)
        middle = torch.zeros_like(x)
        for i, block in enumerate(self.h):
            x = self.residual_scale[i] * x + self.embedding_scale[i] * embedding
            value = self.value_embeds[str(i)](input_ids) if str(i) in self.value_embeds else None
            x = block(x, value, rotary, masks, cache)
            if i == config.backout_layer:
                middle = x
        return F.rms_norm(x - self.backout_scale * middle, width, None, config.rms_norm_eps)

    def _smear(self, x: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """What each token takes of the one before it; nothing where that is padding: (B, T, D)."""
        T = x.size(1)
        ids = F.pad(ids, (1, 0))[:, -T - 1 : -1]  # (B, T): the token before each
        real = F.pad(real, (1, 0))[:, -T - 1 : -1]
        before = F.rms_norm(self.wte(ids), x.shape[-1:], None, self.config.rms_norm_eps)
        gate = torch.sigmoid(self.smear_gate(x[..., : self.config.gate_channels]))  # (B, T, 1)
        return self.smear_scale * gate * before * real.unsqueeze(-1)

    def _rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions' angles, (B, T, 1, E/2), taken in float32."""
        E = self.config.hidden_size // self.config.num_attention_heads
        channel = torch.arange(0, E, 2, dtype=torch.float32, device=position_ids.device)
        inv_freq = 1.0 / self.config.rope_theta ** (channel / E)  # (E/2,)
        angle = (position_ids[..., None].float() * inv_freq).unsqueeze(2)  # (B, T, 1, E/2)
        return angle.cos().to(self.wte.weight.dtype), angle.sin().to(self.wte.weight.dtype)

    def _masks(self, real: Tensor, T: int) -> dict[int | None, Tensor]:
        """For each window that a layer has: (B, 1, T, S), True where a new token may look."""
        S = real.size(1)
        at = torch.arange(S, device=real.device)
        distance = at[S - T :, None] - at  # (T, S): how far back
        visible = (distance >= 0) & real[:, None]  # (B, T, S)
        masks: dict[int | None, Tensor] = {}
        for window in set(self.config.attention_windows):
            seen = visible if window is None else visible & (distance < window)
            # Padding sees itself, or its softmax over nothing would be NaN and spread
            masks[window] = (seen | (distance == 0))[:, None]
        return masks
