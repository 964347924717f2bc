"""
Bits per byte: how well the model compresses text, whatever the tokenizer.

The loss in nats per token depends on how long tokens are; divided by the bytes the tokens stand for
and by ln 2 it can be compared between vocabularies. Floor 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.distributed import sum_over_ranks


class BitsPerByte(NamedTuple):
    """A measurement over `num_bytes` bytes of text, with its standard error over rows."""

    bpb: float
    stderr: float
    num_bytes: int


@torch.no_grad()
def evaluate_bpb(
    model: Any,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    token_bytes: np.ndarray,
) -> BitsPerByte:
    """Bits per byte over (idx, targets) batches of (B, T), summed over all ranks.

    token_bytes[id] is the number of raw bytes of a token. Targets of 0 bytes (special tokens) and
    targets of -1 count neither as loss nor as bytes. Raises UserError if no byte is left.

    The standard error is that of a ratio of sums over rows, which are taken for a random sample of
    the text (Cochran, Sampling Techniques, 1977, section 6.4)."""
    device = model.get_device()
    bytes_of = torch.as_tensor(token_bytes, device=device, dtype=torch.int64)
    # Over rows: how many, sums of nats n and bytes b, of n^2, n b and b^2
    sums = np.zeros(6)
    was_training = model.training
    model.eval()
    for idx, targets in batches:
        nll = model(idx, targets, reduction="none")  # (B, T), 0 where ignored
        sizes = torch.where(targets >= 0, bytes_of[targets.clamp(min=0)], 0)  # (B, T)
        # float32 sums of one row, float64 across rows
        n, b = (nll * (sizes > 0)).sum(1).double().cpu().numpy(), sizes.sum(1).cpu().numpy()  # (B,)
        sums += [np.count_nonzero(b), n.sum(), b.sum(), n @ n, n @ b, b @ b]
    model.train(was_training)
    rows, nats, num_bytes, nn, nb, bb = sum_over_ranks(*sums, device=device)
    if num_bytes == 0:
        raise UserError("bits per byte needs text: the validation data holds no bytes")
    ratio = nats / num_bytes
    squares = max(0.0, nn - 2 * ratio * nb + ratio**2 * bb)  # of each row's distance from the ratio
    error = math.sqrt(squares * rows / (rows - 1)) / num_bytes if rows > 1 else math.nan
    return BitsPerByte(ratio / math.log(2), error / math.log(2), int(num_bytes))


@torch.no_grad()
def evaluate_loss(model: Any, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean loss in nats per trained token, over all ranks: for conversations, where most tokens
    are not the model's to predict."""
    nats, count = 0.0, 0
    was_training = model.training
    model.eval()
    for idx, targets in batches:
        nats += float(model(idx, targets, reduction="sum"))
        count += int((targets != -1).sum())
    model.train(was_training)
    total, n = sum_over_ranks(nats, count, device=model.get_device())
    return total / max(1.0, n)
