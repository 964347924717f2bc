"""
Our models under Hugging Face's names: parameter names and config.json, both ways, as tables.

The GPT is transformers' NanoChatForCausalLM and Qwen is its Qwen2ForCausalLM; Turbo, which it does
not have, brings a class of its own (hf_code/). So a checkpoint changes sides by being renamed; no
value is computed. A config.json that asks for anything our
models do not do is refused with the key's name: a model that loads is the model that was saved.
scripts/hf_import.py and scripts/hf_export.py use it. Floor 3.
"""

from __future__ import annotations

import re
from typing import Any

from nanochat.common import UserError
from nanochat.models import Config, GPTConfig, QwenConfig, TurboConfig, arch_of, turbo
from nanochat.models.gpt import LOGIT_SOFTCAP, ROPE_THETA

MODEL_TYPES = {"gpt": "nanochat", "turbo": "nanochat_turbo", "qwen2.5": "qwen2"}
CLASSES = {
    "gpt": "NanoChatForCausalLM",
    "turbo": "NanochatTurboForCausalLM",
    "qwen2.5": "Qwen2ForCausalLM",
}
# Where transformers finds classes it does not have: "<module of hf_code/>.<class>". The module
# goes into the exported folder.
AUTO_MAP = {
    "turbo": {
        "AutoConfig": "modeling_nanochat_turbo.NanochatTurboConfig",
        "AutoModelForCausalLM": "modeling_nanochat_turbo.NanochatTurboForCausalLM",
    }
}

# Our parameter names -> transformers'. N is a layer's number.
GPT_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.h.N.attn.c_q.weight": "model.layers.N.self_attn.q_proj.weight",
    "transformer.h.N.attn.c_k.weight": "model.layers.N.self_attn.k_proj.weight",
    "transformer.h.N.attn.c_v.weight": "model.layers.N.self_attn.v_proj.weight",
    "transformer.h.N.attn.c_proj.weight": "model.layers.N.self_attn.o_proj.weight",
    "transformer.h.N.mlp.c_fc.weight": "model.layers.N.mlp.fc1.weight",
    "transformer.h.N.mlp.c_proj.weight": "model.layers.N.mlp.fc2.weight",
    "lm_head.weight": "lm_head.weight",
}
QWEN_NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.N.self_attn.{x}_proj.{part}" for x in "qkv" for part in ("weight", "bias")),
    "model.layers.N.self_attn.o_proj.weight",
    *(f"model.layers.N.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    "model.layers.N.input_layernorm.weight",
    "model.layers.N.post_attention_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]
TURBO_NAMES = [
    "wte.weight",
    "value_embeds.N.weight",
    *(f"h.N.attn.{x}.weight" for x in ("c_q", "c_k", "c_v", "c_proj", "value_gate")),
    *(f"h.N.mlp.{x}.weight" for x in ("c_fc", "c_proj")),
    *("residual_scale", "embedding_scale", "smear_scale", "backout_scale", "smear_gate.weight"),
    "lm_head.weight",
]
TO_HF = {
    "gpt": GPT_NAMES,
    "turbo": {name: name for name in TURBO_NAMES},
    "qwen2.5": {name: name for name in QWEN_NAMES},
}
FROM_HF = {arch: {hf: own for own, hf in names.items()} for arch, names in TO_HF.items()}
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def to_hf_name(arch: str, name: str) -> str:
    """transformers' name of one of our parameters. Raises UserError naming an unknown one."""
    return _renamed(TO_HF[arch], name, f"{arch} has no tensor")


def from_hf_name(arch: str, name: str) -> str:
    """Our name of one of transformers' parameters. Raises UserError naming an unknown one."""
    return _renamed(FROM_HF[arch], name, f"{CLASSES[arch]} has no tensor")


def _renamed(table: dict[str, str], name: str, complaint: str) -> str:
    layer = LAYER.search(name)
    other = table.get(LAYER.sub("N", name, count=1))
    if other is None:
        raise UserError(f"{complaint} {name}")
    return other.replace("N", layer.group()) if layer else other


# -------------------------------------------------------------------------------------------------
# config.json

THETAS = {"gpt": ROPE_THETA, "turbo": turbo.ROPE_THETA}  # Qwen's is in its config
# Keys whose value is the architecture itself. A key that is absent has this value in transformers.
FIXED: dict[str, dict[str, Any]] = {
    "gpt": {
        "hidden_act": "relu2",
        "final_logit_softcapping": LOGIT_SOFTCAP,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "turbo": {
        "hidden_act": "relu2",
        "final_logit_softcapping": turbo.LOGIT_SOFTCAP,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "qk_scale": turbo.QK_SCALE,
        "gate_channels": turbo.GATE_CHANNELS,
    },
    "qwen2.5": {"hidden_act": "silu", "use_sliding_window": False},
}
# Keys that other models of the family set, and what they must say if they are there.
REFUSED: dict[str, Any] = {
    "quantization_config": None,
    "compression_config": None,
    "auto_map": None,  # code of its own
    "attention_bias": True,  # Qwen's queries, keys and values have it
    "qkv_bias": True,
    "attention_out_bias": False,
    "mlp_bias": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
}
SHAPE = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
]


def config_to_hf(
    config: Config, eos_token_id: int, bos_token_id: int | None, dtype: str
) -> dict[str, Any]:
    """The whole config.json of a model whose tensors are stored as `dtype` ("bfloat16", ...).

    The rotary base is written twice, as transformers 5 has it and as 4 and vLLM read it."""
    arch = arch_of(config)
    theta = config.rope_theta if isinstance(config, QwenConfig) else THETAS[arch]
    data: dict[str, Any] = {
        "architectures": [CLASSES[arch]],
        "model_type": MODEL_TYPES[arch],
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,  # an id here would cut that row's gradient off
        "dtype": dtype,
        **FIXED[arch],
    }
    if isinstance(config, GPTConfig):
        return {**data, "intermediate_size": 4 * config.n_embd}
    if isinstance(config, TurboConfig):
        own = {"auto_map": AUTO_MAP[arch], "short_window": config.window, **turbo_layers(config)}
        return {**data, "intermediate_size": 4 * config.n_embd, **own}
    return {
        **data,
        "intermediate_size": config.n_mlp,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "sliding_window": None,
        "max_window_layers": config.n_layer,
    }


def turbo_layers(config: TurboConfig) -> dict[str, Any]:
    """The keys that tell what is in which layer of a Turbo."""
    layers = range(config.n_layer)
    return {
        "attention_windows": [config.layer_window(i) for i in layers],
        "value_embedding_layers": [i for i in layers if config.has_value_embedding(i)],
        "backout_layer": config.n_layer // 2 - 1,
    }


TWIN = "seed_oss"  # a model_type that is Qwen's architecture under another name


def with_own_tokenizer(data: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a Qwen model whose tokenizer is not Qwen's, such that transformers uses
    that tokenizer.

    Whatever else the files say, transformers 5 gives a "qwen2" model Qwen's split pattern: numbers
    and line breaks become other ids than in training. SeedOssForCausalLM computes the same of the
    same tensors and brings no tokenizer of its own."""
    heads, width = data["num_attention_heads"], data["hidden_size"]
    qwens_only = ("use_sliding_window", "sliding_window", "max_window_layers")
    return {
        **{key: value for key, value in data.items() if key not in qwens_only},
        "architectures": ["SeedOssForCausalLM"],
        "model_type": TWIN,
        "head_dim": width // heads,
        "attention_bias": True,  # of queries, keys and values
        "attention_out_bias": False,
        "mlp_bias": False,
        "residual_dropout": 0.0,
    }


def config_from_hf(data: dict[str, Any], where: str) -> Config:
    """Our config for a config.json's content. `where` names the file in errors.

    Raises UserError with the key's name for whatever our models do not do."""
    archs = {model_type: arch for arch, model_type in MODEL_TYPES.items()} | {TWIN: "qwen2.5"}
    arch = archs.get(str(data.get("model_type")))
    if arch is None:
        raise UserError(
            f"{where}: model_type is {data.get('model_type')!r}; what can be imported is "
            f"{' and '.join(map(repr, archs))}"
        )
    _check_values(data, arch, where)
    theta = _rope_theta(data, where)
    shape = {key: _whole(data, key, where) for key in SHAPE}
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    kv_heads = heads
    if data.get("num_key_value_heads") is not None:
        kv_heads = _whole(data, "num_key_value_heads", where)
    if width % heads or data.get("head_dim") not in (None, width // heads):
        raise UserError(
            f"{where}: head_dim must be hidden_size / num_attention_heads = {width} / {heads}, "
            f"and is {data.get('head_dim')}"
        )
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}"
        )
    common = (shape["max_position_embeddings"], shape["vocab_size"], shape["num_hidden_layers"])
    if arch in THETAS:
        _must_be(data, "intermediate_size", 4 * width, where)
        if theta != THETAS[arch]:
            raise UserError(f"{where}: rope_theta is {theta}; that of {arch} is {THETAS[arch]}")
    if arch == "gpt":
        return GPTConfig(*common, heads, kv_heads, width)
    if arch == "turbo":
        config = TurboConfig(*common, heads, kv_heads, width, _whole(data, "short_window", where))
        for key, value in turbo_layers(config).items():
            _must_be(data, key, value, where)
        return config
    return QwenConfig(
        *common,
        heads,
        kv_heads,
        width,
        n_mlp=shape["intermediate_size"],
        tied=bool(data.get("tie_word_embeddings", False)),
        rope_theta=theta,
        norm_eps=_number(data.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
    )


def _check_values(data: dict[str, Any], arch: str, where: str) -> None:
    """Refuses every key that asks for another model than ours."""
    wanted = {**REFUSED, **FIXED[arch]}
    if arch in THETAS:
        wanted["qkv_bias"] = False
    if arch in AUTO_MAP:
        del wanted["auto_map"]  # the code that we gave it, which nobody runs here
    for key, value in wanted.items():
        unset = data.get(key) is None
        if unset and (key not in data or not value or key in REFUSED):
            continue  # no softcap is not the same as transformers' default of it
        _must_be(data, key, value, where)
    layers = set(data.get("layer_types") or ["full_attention"])
    if layers != {"full_attention"}:
        raise UserError(f"{where}: layer_types has {sorted(layers)}; only full_attention is known")


def _must_be(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    if data.get(key) != value:
        need = f"only {value!r} can be imported" if value is not None else "it cannot be imported"
        raise UserError(f"{where}: {key} is {data.get(key)!r}; {need}")


def _whole(data: dict[str, Any], key: str, where: str) -> int:
    value = data.get(key)
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {key} is {value!r} and must be a whole number above 0")
    return value


def _rope_theta(data: dict[str, Any], where: str) -> float:
    """The rotary base; transformers 5 keeps it in rope_parameters, 4 beside rope_scaling."""
    thetas = [data["rope_theta"]] if data.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        rope = data.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{where}: {key} is {rope!r} and must be an object")
        if rope.get("rope_theta") is not None:
            thetas.append(rope["rope_theta"])
        kind = rope.get("rope_type", rope.get("type", "default"))
        odd = set(rope) - {"rope_type", "type", "rope_theta"}
        if kind != "default" or odd:
            raise UserError(
                f"{where}: {key} is {rope}; rotary positions that are scaled or partial "
                "(rope_type other than default) cannot be imported"
            )
    values = {_number(theta, "rope_theta", where) for theta in thetas}
    if len(values) > 1:
        raise UserError(f"{where}: rope_theta has two values, {thetas}")
    return values.pop() if values else 10_000.0  # transformers' own default


def _number(value: Any, key: str, where: str) -> float:
    if type(value) not in (int, float) or value <= 0:
        raise UserError(f"{where}: {key} is {value!r} and must be a number above 0")
    return float(value)
