"""
A Hugging Face folder (or model of the hub) as something to evaluate, without importing it first.

    model, tokenizer, meta = load_hf("openai-community/gpt2-xl", "cuda")

One of our architectures becomes our model, in memory. Any other, GPT-2 for one (whose CORE is what
nanochat's runs are held against), runs in `transformers`, if that is installed, from safetensors
and without code of the folder's; it can be scored (CORE, bits per byte) and go on with a text, not
be talked to. The tokenizer is always ours, reading the folder's tokenizer.json. Floor 4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nanochat.common import UserError, read_json
from nanochat.hf import MODEL_TYPES, TWIN
from nanochat.hf_import import check_tensors, locate, open_checkpoint, read_weights
from nanochat.models import build_model
from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer_files import read_default_system, read_vocabulary


def load_hf(
    where: str, device: torch.device | str, max_seq_len: int = 2048
) -> tuple[Any, Tokenizer, dict[str, Any]]:
    """(model, tokenizer, meta) of a folder or hub id, in evaluation mode, in float32.

    meta["tag"] is its name, meta["step"] 0. Contexts have `max_seq_len` tokens, or what the model
    was made for if that is less. Raises UserError for what can be had in neither way."""
    try:
        folder, name = locate(where)
    except UserError as e:
        raise UserError(str(e).replace("--from=", "--hf=")) from e
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"--hf={where}: {folder} holds no tokenizer.json, which is needed")
    tokenizer = Tokenizer(read_vocabulary(folder), read_default_system(folder))
    config_file = folder / "config.json"
    kind = read_json(config_file).get("model_type") if config_file.exists() else None
    if kind is None or kind in (*MODEL_TYPES.values(), TWIN):
        model = _as_ours(folder, device, max_seq_len)
        rows = model.config.vocab_size
    else:
        model = TransformersModel(folder, device, max_seq_len)
        rows = model.rows
    if tokenizer.get_vocab_size() > rows:
        raise UserError(
            f"--hf={where}: the tokenizer has {tokenizer.get_vocab_size()} ids, and the model only "
            f"{rows} rows: it is another model's"
        )
    return model, tokenizer, {"tag": name, "step": 0, "folder": str(folder)}


def _as_ours(folder: Path, device: torch.device | str, max_seq_len: int) -> Any:
    """Our model with the folder's weights."""
    found = open_checkpoint(folder)
    shape = check_tensors(found)
    length = min(max_seq_len, found.config.sequence_len)
    model = build_model(replace(found.config, sequence_len=length), device)
    model.load_state_dict(read_weights(found, shape))
    return model.eval()


class TransformersModel:
    """As much of a model of ours as scoring asks for, by transformers.

    The head is applied apart from the trunk, since only a few positions go through it; a model for
    which that is not the whole truth is refused."""

    training = False

    def __init__(self, folder: Path, device: torch.device | str, max_seq_len: int) -> None:
        try:
            import transformers
        except ImportError as e:
            raise UserError(
                f"{folder} is not of an architecture of ours, and running it needs transformers: "
                "uv pip install transformers"
            ) from e
        try:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"transformers cannot load {folder}: {e}") from e
        self.model = self.model.to(device).eval()
        self.rows = self.model.get_output_embeddings().weight.size(0)
        made_for = getattr(self.model.config, "max_position_embeddings", max_seq_len)
        self.config = SimpleNamespace(sequence_len=min(max_seq_len, made_for))
        idx = torch.arange(8, device=self.get_device())[None] % self.rows
        with torch.inference_mode():
            whole, parts = self.model(idx).logits.float(), self.logits(self.hidden(idx))
        if (whole - parts).abs().max() > 1e-3 * whole.abs().max():
            raise UserError(
                f"{folder}: {type(self.model).__name__} does more to its logits than its head says"
            )

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, D), ready for the head."""
        x: torch.Tensor = self.model.base_model(idx, use_cache=False).last_hidden_state
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V) in float32."""
        logits: torch.Tensor = self.model.get_output_embeddings()(x).float()
        return logits

    def __call__(
        self, idx: torch.Tensor, targets: torch.Tensor, reduction: str = "mean"
    ) -> torch.Tensor:
        """The loss in nats, (B, T) for "none", of targets that are not -1."""
        logits = self.logits(self.hidden(idx)).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(
            logits, targets.flatten(), ignore_index=-1, reduction=reduction
        )
        return loss.view(targets.shape) if reduction == "none" else loss

    def generate_batch(
        self, prompts: list[list[int]], num_samples: int, max_tokens: int, temperature: float
    ) -> list[list[int]]:
        """The prompts as transformers goes on with them, `num_samples` times each, prompt-major,
        without the token that ends a text. Greedy at temperature 0."""
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or [])
        how: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0}
        found = []
        for prompt in prompts:
            room = min(max_tokens, self.config.sequence_len - len(prompt))
            idx = torch.tensor([prompt], device=self.get_device())
            rows = self.model.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=room, pad_token_id=0,
                num_return_sequences=num_samples, **how,
            )  # fmt: skip
            for ids in rows.tolist():
                new = ids[len(prompt) :]
                stop = next((at for at, token in enumerate(new) if token in ends), len(new))
                found.append(prompt + new[:stop])
        return found

    def eval(self) -> TransformersModel:
        return self

    def train(self, mode: bool = True) -> TransformersModel:
        return self

    def get_device(self) -> torch.device:
        device: torch.device = self.model.device
        return device
