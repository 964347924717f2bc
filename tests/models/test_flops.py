"""FLOPs, on which MFU rests: by hand, and by PyTorch's count of what is really multiplied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from nanochat.models import SIZES, GPTConfig, build_model
from tests.models_for_tests import tiny_model, tokens_of


def added_product(to: Any, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return mm_flop(a, b)


def test_by_hand_gpt() -> None:
    """2 layers of width 128 with an MLP of 512, one head of 128, 1,000 tokens, rows of 64.

    Two operations (multiply, add) for each weight of a matrix product, in the forward pass and in
    each of the backward pass's two; an embedding is looked up, not multiplied."""
    matrices = 2 * (4 * 128 * 128 + 2 * 128 * 512) + 1000 * 128
    # Scores and their weighted sum: 2 * 2 * 128 * 64 forward for one token, three times with
    # backward, in each of 2 layers; the causal half is not subtracted
    attention = 2 * 3 * (2 * 2 * 128 * 64)
    model = build_model(GPTConfig(64, 1000, n_layer=2, n_head=1, n_kv_head=1, n_embd=128), "meta")
    assert model.flops_per_token() == 6 * matrices + attention == 3_323_904


def test_by_hand_qwen() -> None:
    """The published 0.5B: tied, so that its 151,936 rows are multiplied once, as the head."""
    config = SIZES["qwen2.5-0.5b"]
    layer = 896 * 896 * 2 + 2 * 896 * 128 + 3 * 896 * 4864  # q and o, k and v (2 heads of 64), MLP
    matrices = 24 * layer + 151_936 * 896
    attention = 24 * 3 * (2 * 2 * 14 * 64 * config.sequence_len)
    assert build_model(config, "meta").flops_per_token() == 6 * matrices + attention


@pytest.mark.parametrize("arch", ["gpt", "qwen2.5"])
def test_as_many_are_computed(arch: str) -> None:
    """Linears and head exactly. Attention recomputes its scores in the backward pass, which MFU
    does not count as work."""
    model: Any = tiny_model(arch)
    idx = tokens_of(model, 2, model.config.sequence_len)
    in_place = {torch.ops.aten.addmm_: added_product}  # the head's gradient; PyTorch leaves it out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(idx, idx).backward()
    counts = counter.get_flop_counts()["Global"]
    linear = sum(
        n for op, n in counts.items() if "attention" not in str(op) and "bmm" not in str(op)
    )
    c = model.config
    attention = 12 * c.n_layer * c.n_embd * c.sequence_len
    assert linear == (model.flops_per_token() - attention) * idx.numel()
