"""
The depth dial: what is not typed follows from the size of the model, what is typed stays.
"""

from __future__ import annotations

import pytest

from nanochat.flags import HorizonFlags
from nanochat.models import build_model, make_config
from nanochat.recipe import num_scaling_params, settle_horizon
from nanochat.schedule import base_rates, batch_size


def model_of(arch: str, depth: int = 2) -> object:
    config, _ = make_config(arch, depth, vocab_size=512, sequence_len=64)
    return build_model(config, "meta")


def test_an_untyped_run_is_the_one_its_size_wants(capsys: pytest.CaptureFixture[str]) -> None:
    args, model = HorizonFlags(), model_of("gpt")
    steps = settle_horizon(args, model, 64)
    tokens = 20 * sum(p.numel() for p in model.parameters())  # type: ignore[attr-defined]
    assert args.total_batch_size == batch_size(tokens, 64)
    assert steps == round(tokens / args.total_batch_size)
    assert {name: getattr(args, name) for name in base_rates(1)} == base_rates(1)
    assert (
        f"--total_batch_size={args.total_batch_size} --embedding_lr=0.3" in capsys.readouterr().out
    )


def test_what_is_typed_stays_and_a_smaller_batch_lowers_the_rates() -> None:
    model = model_of("gpt")
    best = HorizonFlags()
    settle_horizon(best, model, 1)
    args = HorizonFlags(total_batch_size=best.total_batch_size // 4, matrix_lr=0.5)
    settle_horizon(args, model, 1)
    assert args.total_batch_size == best.total_batch_size // 4 and args.matrix_lr == 0.5
    assert args.embedding_lr == pytest.approx(best.embedding_lr / 2)


def test_rates_do_not_depend_on_the_number_of_ranks() -> None:
    """A run that is resumed on more ranks, whose rounds are larger, is the same run."""
    model, found = model_of("gpt"), []
    for tokens_per_round in (64, 128, 192, 1 << 20):
        args = HorizonFlags(num_iterations=6, total_batch_size=64)
        settle_horizon(args, model, tokens_per_round)
        found.append([getattr(args, name) for name in base_rates(1)])
    assert all(rates == found[0] for rates in found)


def test_a_few_steps_are_steps_of_the_batch_of_a_whole_run() -> None:
    """--num_iterations=5, to see whether it runs, is not to change what a step is."""
    model = model_of("gpt")
    whole, few = HorizonFlags(), HorizonFlags(num_iterations=5)
    settle_horizon(whole, model, 64)
    assert settle_horizon(few, model, 64) == 5
    assert few.total_batch_size == whole.total_batch_size
    assert few.matrix_lr == whole.matrix_lr


def test_steps_and_batch_typed_are_a_horizon_of_their_own() -> None:
    """The rates are those of the tokens that are trained on, not of a run of full length."""
    args = HorizonFlags(num_iterations=500, total_batch_size=256)
    assert settle_horizon(args, model_of("gpt"), 64) == 500
    assert args.matrix_lr == base_rates(256 / batch_size(500 * 256, 1))["matrix_lr"]


@pytest.mark.parametrize(
    ("horizon", "tokens"), [({"target_tokens": 100_000.0}, 100_000), ({"target_flops": 1e11}, None)]
)
def test_the_horizon_is_met_within_one_step(horizon: dict[str, float], tokens: int | None) -> None:
    model = model_of("qwen2.5")
    args = HorizonFlags(**horizon)  # type: ignore[arg-type]
    steps = settle_horizon(args, model, 64)
    wanted = tokens or 1e11 / model.flops_per_token()  # type: ignore[attr-defined]
    assert abs(steps * args.total_batch_size - wanted) <= args.total_batch_size


def test_tokens_are_not_counted_against_value_embeddings() -> None:
    model = model_of("turbo")
    tables = sum(p.numel() for p in model.value_embeds.parameters())  # type: ignore[attr-defined]
    everything = sum(p.numel() for p in model.parameters())  # type: ignore[attr-defined]
    assert tables > 0 and num_scaling_params(model) == everything - tables
