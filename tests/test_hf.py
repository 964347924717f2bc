"""
Names and config.json, both ways: transformers' own classes are the oracle.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.common import UserError
from nanochat.hf import MODEL_TYPES, config_from_hf, config_to_hf, from_hf_name, to_hf_name
from nanochat.models import SIZES
from tests.hf_for_tests import register_turbo
from tests.models_for_tests import TINY, tiny_model

CONFIGS = {
    **TINY,
    "untied": replace(TINY["qwen2.5"], tied=False, n_kv_head=4, norm_eps=1e-5, rope_theta=5e5),
    **SIZES,
}


def arch_of(name: str) -> str:
    return name if name in TINY else "qwen2.5"


def hf_config(name: str) -> dict[str, Any]:
    return config_to_hf(CONFIGS[name], eos_token_id=2, bos_token_id=1, dtype="float32")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_there_and_back(name: str) -> None:
    data = json.loads(json.dumps(hf_config(name)))
    assert config_from_hf(data, "config.json") == CONFIGS[name]


@pytest.mark.parametrize("name", ["gpt", "turbo", "qwen2.5", "untied"])
def test_transformers_builds_our_model_from_it(name: str, tmp_path: Path) -> None:
    """Same tensors under the same names, same logits; and what it writes reads as ours."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    register_turbo()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(name)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    twin = transformers.AutoModelForCausalLM.from_config(config).eval()
    arch, tensors = arch_of(name), twin.state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    fields = {k: v for k, v in vars(CONFIGS[name]).items() if v != getattr(TINY[arch], k)}
    model = tiny_model(arch, **fields)
    own = model.state_dict()
    assert {from_hf_name(arch, n): t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in own.items()
    }
    twin.load_state_dict({to_hf_name(arch, n): t for n, t in own.items()}, strict=False)
    idx = torch.arange(40).view(2, 20)
    assert (twin(input_ids=idx).logits - model(idx)).abs().max() < 1e-4
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config_from_hf(again, "config.json") == CONFIGS[name]


@pytest.mark.parametrize("name", ["gpt", "turbo", "qwen2.5", "untied"])
def test_names_there_and_back(name: str) -> None:
    arch = arch_of(name)
    config = replace(CONFIGS[name], n_layer=12)
    own = list(tiny_model(arch, **vars(config)).state_dict())
    there = [to_hf_name(arch, n) for n in own]
    assert [from_hf_name(arch, n) for n in there] == own and len(set(there)) == len(own)
    assert to_hf_name("gpt", "transformer.h.11.attn.c_proj.weight") == (
        "model.layers.11.self_attn.o_proj.weight"
    )


@pytest.mark.parametrize("arch", MODEL_TYPES)
@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "lm_head.bias", "model.layers.N.mlp", ""]
)
def test_unknown_names_are_refused(arch: str, name: str) -> None:
    for renamed in (to_hf_name, from_hf_name):
        with pytest.raises(UserError, match=f"has no tensor {name}"):
            renamed(arch, name)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2.5", {"model_type": "llama"}, "model_type is 'llama'"),
    ("qwen2.5", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ("qwen2.5", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "rope_parameters"),
    ("qwen2.5", {"rope_parameters": {"rope_type": "default", "factor": 2}}, "rope_parameters"),
    ("qwen2.5", {"rope_theta": 10_000.0}, "rope_theta has two values"),
    ("gpt", {"rope_theta": 5e5, "rope_parameters": None}, "rope_theta is 500000"),
    ("qwen2.5", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("qwen2.5", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2.5", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("qwen2.5", {"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
    ("qwen2.5", {"use_mrope": True}, "use_mrope is True"),
    ("qwen2.5", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("gpt", {"hidden_act": "silu"}, "hidden_act is 'silu'; only 'relu2'"),
    ("gpt", {"attention_bias": True}, "attention_bias is True"),
    ("gpt", {"qkv_bias": True}, "qkv_bias is True"),
    ("qwen2.5", {"attention_bias": False}, "attention_bias is False"),
    ("gpt", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("gpt", {"final_logit_softcapping": None}, "final_logit_softcapping is None; only 15.0"),
    ("gpt", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
    ("gpt", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ("gpt", {"intermediate_size": 100}, "intermediate_size is 100; only 128"),
    ("qwen2.5", {"head_dim": 16}, "head_dim must be"),
    ("qwen2.5", {"num_attention_heads": 3}, "head_dim must be"),
    ("qwen2.5", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ("qwen2.5", {"hidden_size": None}, "hidden_size is None"),
    ("qwen2.5", {"vocab_size": "96"}, "vocab_size is '96'"),
    ("qwen2.5", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    ("qwen2.5", {"rope_theta": None, "rope_parameters": {"rope_theta": -1}}, "rope_theta is -1"),
    ("qwen2.5", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    ("gpt", {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ("gpt", {"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
    ("turbo", {"rope_theta": 5e5, "rope_parameters": None}, "rope_theta is 500000"),
    ("turbo", {"attention_windows": [5, 5, 5]}, r"attention_windows is \[5, 5, 5\]; only"),
    ("turbo", {"value_embedding_layers": [0]}, r"value_embedding_layers is \[0\]"),
    ("turbo", {"backout_layer": -1}, "backout_layer is -1; only 0"),
    ("turbo", {"short_window": None}, "short_window is None"),
    ("turbo", {"qk_scale": 0.5}, "qk_scale is 0.5"),
    ("turbo", {"gate_channels": 7}, "gate_channels is 7"),
    ("turbo", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
]


@pytest.mark.parametrize("name, changes, complaint", REFUSALS)
def test_what_our_models_do_not_do_is_refused_by_key(
    name: str, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as e:
        config_from_hf({**hf_config(name), **changes}, "somewhere/config.json")
    assert "somewhere/config.json" in str(e.value)


def test_a_published_config_is_read() -> None:
    """The keys and values of Qwen/Qwen2.5-0.5B's config.json, as transformers 4 wrote them."""
    published = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "use_cache": True, "use_mrope": False,
        "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    config = config_from_hf(published, "config.json")
    assert config == replace(SIZES["qwen2.5-0.5b"], sequence_len=32_768)
