"""
The architectures, and the registry that names them.

Adding one: a file beside gpt.py with a config dataclass and a model of the same contract
(forward, hidden, logits, init_weights, param_groups, flops_per_token), and a row in ARCHITECTURES.
Its kinds of parameters are in optim.ADAMW_KINDS, its names for transformers in hf.py.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

import torch

from nanochat.common import UserError
from nanochat.models.gpt import GPT, GPTConfig
from nanochat.models.qwen import SIZES, Qwen, QwenConfig
from nanochat.models.turbo import Turbo, TurboConfig

__all__ = [
    "GPT",
    "SIZES",
    "GPTConfig",
    "Qwen",
    "QwenConfig",
    "Turbo",
    "TurboConfig",
    "build_model",
    "make_config",
]

Model = GPT | Qwen | Turbo
Config = GPTConfig | QwenConfig | TurboConfig

ARCHITECTURES: dict[str, tuple[type[Any], type[Any]]] = {
    "gpt": (GPT, GPTConfig),
    "turbo": (Turbo, TurboConfig),
    "qwen2.5": (Qwen, QwenConfig),
}


def arch_of(config: Config) -> str:
    """The registry name of a config's architecture."""
    return next(name for name, (_, cls) in ARCHITECTURES.items() if type(config) is cls)


def make_config(arch: str, depth: int, vocab_size: int, sequence_len: int) -> tuple[Config, str]:
    """(config, default model tag) from --arch (an architecture or a published size) and --depth.

    A published size keeps its shape; its rows follow the tokenizer, except that Qwen's own 151,665
    ids keep the published, padded number of rows."""
    if arch in SIZES:
        size = SIZES[arch]
        own = size.vocab_size - 512 < vocab_size <= size.vocab_size  # Qwen's tokenizer
        rows = size.vocab_size if own else vocab_size
        return replace(size, sequence_len=sequence_len, vocab_size=rows), arch
    if arch not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, *SIZES])
        raise UserError(f"--arch={arch} is not known; choose one of {known}")
    if depth < 1:
        raise UserError(f"--depth={depth} must be at least 1")
    return ARCHITECTURES[arch][1].from_depth(depth, vocab_size, sequence_len), f"d{depth}"


def config_to_dict(config: Config) -> dict[str, Any]:
    """The whole dataclass and its architecture's name, ready for JSON."""
    return {"arch": arch_of(config), **asdict(config)}


def config_from_dict(data: dict[str, Any], where: str = "the checkpoint") -> Config:
    """The inverse. Unknown keys and unknown architectures are refused by name."""
    data = dict(data)
    arch = data.pop("arch", None)
    if arch not in ARCHITECTURES:
        raise UserError(f"{where} is of architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    config_class = ARCHITECTURES[arch][1]
    unknown = sorted(set(data) - {f.name for f in fields(config_class)})
    if unknown:
        raise UserError(f"{where} has config keys that {arch} does not know: {', '.join(unknown)}")
    return config_class(**data)


def build_model(config: Config, device: torch.device | str = "cpu", seed: int | None = None) -> Any:
    """Builds the model on `device`. With a seed the weights are initialised from it, the same on
    every device; without one the caller loads them (the memory is uninitialised)."""
    model_class = ARCHITECTURES[arch_of(config)][0]
    with torch.device("meta"):
        model = model_class(config)
    if seed is None:
        model = _allocated(model, device)
        model.rotary.fill()
        return model
    model = _allocated(model, "cpu")
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(device)


def _allocated(model: Any, device: torch.device | str) -> Any:
    """The model with memory on `device`. As nn.Module.to_empty, whose empty_like of meta tensors
    makes torch load sympy: seconds at every start."""
    return model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
