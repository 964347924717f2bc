"""bench/loss.py: all ways compute the same thing, and a row of its table is a measurement."""

from __future__ import annotations

import pytest
import torch

from bench import loss
from nanochat.models.loss import MIN_CHUNK_ROWS

ARGS = loss.Args(rows=300, width=8, vocab_size=50, chunks="7 100 300", rounds=1)


def test_every_way_is_the_same_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(300, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (300,), generator=generator)
    ways = loss.ways(ARGS, "cpu")
    assert [way for way, _, _ in ways].count("plain") == 2
    chunks = {chunk for _, chunk, _ in ways}
    assert {0, 7, 100} <= chunks and max(chunks) < 300 and MIN_CHUNK_ROWS < 300
    for way, chunk, softcap in ways:
        results = []
        for name, rows in ((way, chunk), ("plain", 0)):
            function = loss.function_of(name, rows, softcap)
            leaves = [x.clone().requires_grad_(), head.clone().requires_grad_()]
            value = function(*leaves, targets)
            results.append([value, *torch.autograd.grad(2 * value, leaves)])
        for found, expected in zip(*results):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), (way, chunk, softcap)


def test_a_row_is_a_measurement() -> None:
    row = loss.measure(ARGS, "cpu", "sum", 100, 15.0)
    assert 0 < row["fastest_ms"] <= row["median_ms"] and row["extra_peak_mb"] >= 0
    assert (row["way"], row["chunk"], row["softcap"]) == ("sum", 100, 15.0)


@pytest.mark.gpu
def test_a_row_on_a_gpu() -> None:
    plain = loss.measure(ARGS, "cuda", "plain", 0, 15.0)
    chunked = loss.measure(ARGS, "cuda", "sum", 100, 15.0)
    assert 0 < chunked["extra_peak_mb"] < plain["extra_peak_mb"]
