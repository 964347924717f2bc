"""Bits per byte against a count by hand, and the loss of conversations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.dataloader import RowReader, eval_batches
from nanochat.evals.bpb import evaluate_bpb, evaluate_loss
from nanochat.text_source import TextSource
from tests.models_for_tests import tiny_model
from tests.tokenizers_for_tests import TEXT, tiny_qwen, tiny_tokenizer

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Table(torch.nn.Module):
    """A model whose loss for a target is in a table, whatever came before."""

    def __init__(self, nats: list[float]) -> None:
        super().__init__()
        self.nats = torch.tensor(nats)
        self.modes: list[bool] = []

    def get_device(self) -> torch.device:
        return self.nats.device

    def forward(self, idx: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        self.modes.append(self.training)
        nll = torch.where(targets >= 0, self.nats[targets.clamp(min=0)], 0.0)
        return nll if reduction == "none" else nll.sum()


def batch(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(idx, targets); this model does not look at idx."""
    targets = torch.tensor(rows)
    return torch.zeros_like(targets), targets


# Token:     a    bb   ccc  bos
NATS = [1.0, 2.0, 4.0, 64.0]
BYTES = np.array([1, 2, 3, 0], dtype=np.int32)


def test_against_a_count_by_hand() -> None:
    # a bb ccc a: 8 nats over 7 bytes
    bpb = evaluate_bpb(Table(NATS), [batch([0, 1], [2, 0])], BYTES).bpb
    assert bpb == pytest.approx(8 / 7 / math.log(2), rel=1e-6)


def test_special_and_ignored_tokens_count_neither_as_loss_nor_as_bytes() -> None:
    plain = evaluate_bpb(Table(NATS), [batch([0, 1])], BYTES).bpb
    assert evaluate_bpb(Table(NATS), [batch([0, 3, 1, -1, 3])], BYTES).bpb == pytest.approx(plain)
    # A batch of nothing else does no harm beside others.
    assert evaluate_bpb(Table(NATS), [batch([3, -1]), batch([0, 1])], BYTES).bpb == pytest.approx(
        plain
    )


@pytest.mark.parametrize("batches", [[], [batch([3, 3])], [batch([-1, -1])]])
def test_no_bytes_is_an_error_not_infinity(batches: Batches) -> None:
    with pytest.raises(UserError, match="no bytes"):
        evaluate_bpb(Table(NATS), batches, BYTES)


def test_bits_are_weighted_by_token_not_averaged_by_batch() -> None:
    uneven = [batch([0, 0, 0, 0]), batch([2, -1, -1, -1])]
    expected = (4 * 1.0 + 4.0) / (4 * 1 + 3) / math.log(2)
    assert evaluate_bpb(Table(NATS), uneven, BYTES).bpb == pytest.approx(expected, rel=1e-6)


def test_the_standard_error_is_that_of_a_ratio_over_rows() -> None:
    """Against the spread that is seen when samples of rows are drawn again and again."""
    rng = np.random.default_rng(0)
    nats = [float(x) for x in rng.gamma(2.0, size=50)]
    sizes = rng.integers(1, 6, 50).astype(np.int32)

    def measured() -> Any:
        rows = rng.integers(0, 50, (200, 4)).tolist()
        return evaluate_bpb(Table(nats), [batch(*rows)], sizes)

    found = [measured() for _ in range(300)]
    spread = np.std([one.bpb for one in found], ddof=1)
    assert np.mean([one.stderr for one in found]) == pytest.approx(spread, rel=0.15)
    one = evaluate_bpb(Table(NATS), [batch([0, 1])], BYTES)
    assert math.isnan(one.stderr) and one.num_bytes == 3, "one row has no spread"


def test_many_batches_are_summed_in_double_precision() -> None:
    # In float32 a sum stops at 2**24 when ones are added: here that would halve the result.
    class Large(Table):
        def forward(self, idx: torch.Tensor, targets: torch.Tensor, reduction: str) -> Any:
            return super().forward(idx, targets, reduction) * float(2**24 if first.pop() else 1)

    first = [False] * 1000 + [True]
    bpb = evaluate_bpb(Large(NATS), (batch([0]) for _ in range(1001)), BYTES).bpb
    assert bpb * math.log(2) * 1001 == 2**24 + 1000


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_put_back_and_nothing_is_differentiated(training: bool) -> None:
    model = Table(NATS)
    model.nats.requires_grad_(True)
    model.train(training)
    evaluate_bpb(model, [batch([0])], BYTES)
    evaluate_loss(model, [batch([0])])
    assert model.modes == [False, False]
    assert model.training is training
    assert model.nats.grad is None


# ---- with a model, text and the loader


@pytest.fixture(scope="module", params=["nanochat", "qwen2.5"])
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, tokenizer, reader's source)."""
    tokenizer = tiny_tokenizer() if request.param == "nanochat" else tiny_qwen()
    folder = tmp_path_factory.mktemp("bpb")
    path = folder / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    source = TextSource([path], tokenizer, cache=folder / "cache")
    # A model may have more rows than the tokenizer has ids.
    model = tiny_model("gpt", vocab_size=tokenizer.get_vocab_size() + 7, sequence_len=32)
    return model, tokenizer, source


def batches_of(
    source: TextSource, batch_size: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    reader = RowReader(source, 33, 0, 0)
    return eval_batches(reader, 20 * 32, batch_size, rank, ranks, "cpu")


def test_against_the_logits_and_the_bytes_of_the_text(world: Any) -> None:
    model, tokenizer, source = world
    nats, num_bytes = 0.0, 0
    with torch.no_grad():
        for idx, targets in batches_of(source, 1):
            log_probs = model(idx).double().log_softmax(-1)
            for t, target in enumerate(targets[0].tolist()):
                if target == tokenizer.get_bos_token_id():
                    continue
                nats -= float(log_probs[0, t, target])
                num_bytes += len(tokenizer.decode_bytes([target]))
    expected = nats / math.log(2) / num_bytes
    assert expected > 1
    bpb = evaluate_bpb(model, batches_of(source, 4), tokenizer.token_bytes).bpb
    assert bpb == pytest.approx(expected, rel=1e-5)


def test_the_same_at_any_batch_size_and_over_ranks(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, source = world
    whole = evaluate_bpb(model, batches_of(source, 20), tokenizer.token_bytes).bpb
    for size in (1, 3, 7):
        bpb = evaluate_bpb(model, batches_of(source, size), tokenizer.token_bytes).bpb
        assert bpb == pytest.approx(whole, rel=1e-6)

    # Three ranks, one after the other: sums come first, the division last.
    sums = np.zeros(6)

    def add_up(*values: float, device: Any) -> list[float]:
        nonlocal sums
        sums = sums + np.array(values)
        return sums.tolist()

    monkeypatch.setattr("nanochat.evals.bpb.sum_over_ranks", add_up)
    for rank in range(3):
        bpb = evaluate_bpb(model, batches_of(source, 2, rank, 3), tokenizer.token_bytes).bpb
    assert bpb == pytest.approx(whole, rel=1e-6)


# ---- the loss of conversations


def test_loss_is_the_mean_over_trained_tokens_of_all_batches() -> None:
    batches = [batch([0, -1, -1]), batch([2, 2, 3]), batch([-1, -1, -1])]
    assert evaluate_loss(Table(NATS), batches) == pytest.approx((1 + 4 + 4 + 64) / 4)


def test_loss_of_nothing_is_zero_not_nan() -> None:
    assert evaluate_loss(Table(NATS), [batch([-1, -1])]) == 0.0
    assert evaluate_loss(Table(NATS), []) == 0.0
