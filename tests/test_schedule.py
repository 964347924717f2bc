"""
The arithmetic of a run: end points, shapes, and error messages whose advice works.
"""

from __future__ import annotations

import itertools
import random
import re

import pytest

from nanochat.common import UserError
from nanochat.schedule import (
    base_rates,
    batch_size,
    decay_multiplier,
    grad_accum_steps,
    is_due,
    lr_multiplier,
    muon_momentum,
    num_iterations,
    width_lr_scale,
)

# ---- learning rate -------------------------------------------------------------------------------


def curve(num_steps: int, **settings: float) -> list[float]:
    """The multiplier of every step, and last the one that step num_steps would have."""
    return [lr_multiplier(step, num_steps, **settings) for step in range(num_steps + 1)]  # type: ignore[arg-type]


def test_a_trapezoid_by_hand() -> None:
    values = curve(10, warmup_steps=2, warmdown_ratio=0.4, final_frac=0.2)
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100, 1001])
@pytest.mark.parametrize("warmdown_ratio", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("final_frac", [0.0, 0.05, 1.0])
def test_the_rate_never_rises_without_warm_up(
    num_steps: int, warmdown_ratio: float, final_frac: float
) -> None:
    """Also for a run that is all descent, as finetuning is: it begins at the peak, and falls."""
    values = curve(num_steps, warmdown_ratio=warmdown_ratio, final_frac=final_frac)
    assert values[0] == 1.0 and values[-1] == pytest.approx(final_frac)
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert all(final_frac <= v <= 1.0 for v in values)
    if final_frac < 1 and warmdown_ratio == 1.0:
        assert all(a > b for a, b in itertools.pairwise(values)), "not a plateau anywhere"


def test_warm_up_rises_evenly_and_the_first_step_moves() -> None:
    values = curve(100, warmup_steps=10, warmdown_ratio=0.3)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10:71] == [1.0] * 61
    assert values[71] < 1.0 and values[99] > values[100] == 0.0


def test_a_step_past_the_end_is_clamped() -> None:
    assert lr_multiplier(120, 100, warmdown_ratio=0.2, final_frac=0.1) == 0.1


def test_momentum_rises_to_its_end_point_and_stays() -> None:
    values = [muon_momentum(step) for step in range(400)]
    assert values[0] == pytest.approx(0.85) and values[300:] == pytest.approx([0.95] * 100)
    assert values[150] == pytest.approx(0.90)
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert muon_momentum(5, warmup_steps=0) == pytest.approx(0.95)


def test_rates_fall_with_the_root_of_the_width() -> None:
    assert width_lr_scale(768) == 1.0
    assert width_lr_scale(4 * 768) == pytest.approx(0.5)


def test_decay_falls_from_all_to_nothing() -> None:
    assert [decay_multiplier(step, 4) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert decay_multiplier(0, 0) == 1


# ---- batch ---------------------------------------------------------------------------------------


def test_the_batch_of_a_model_at_the_scale_where_it_was_measured() -> None:
    """d12's tokens want half a million, twice the depth twice that: 8 times the tokens, 2.2 times
    the batch. A power of two, whole rows on all ranks."""
    assert batch_size(3.7e9, 2048) == 2**19
    assert batch_size(8 * 3.7e9, 2048) == 2**20
    assert batch_size(8 * 3.7e9, 2048 * 7) == round(2**20 / 14_336) * 14_336


def test_a_short_run_gets_steps_rather_than_a_large_batch() -> None:
    assert batch_size(2_457_600, 512) == 4096  # 600 steps
    assert batch_size(1_000, 512) == 512  # a row is the least
    sizes = [batch_size(10.0**e, 1) for e in range(3, 13)]
    assert sizes == sorted(sizes)
    assert all(10.0**e / size > 350 for e, size in zip(range(3, 13), sizes, strict=True))


def test_rates_go_with_the_root_of_a_smaller_batch() -> None:
    one, quarter = base_rates(1), base_rates(0.25)
    assert one["matrix_lr"] == 0.02 and one["weight_decay"] == quarter["weight_decay"]
    for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr"):
        assert quarter[name] == pytest.approx(one[name] / 2)
    assert base_rates(100) == one, "a few steps of a large batch must not blow up"


def test_accumulation_by_hand() -> None:
    assert grad_accum_steps(524_288, 32, 2048, 8) == 1
    assert grad_accum_steps(524_288, 32, 2048, 1) == 8
    assert grad_accum_steps(96, 3, 4, 2) == 4


def test_advice_in_the_error_really_works() -> None:
    """Every value that the message offers is tried, over many random settings."""
    rng = random.Random(0)
    refused = 0
    for _ in range(3000):
        settings = {
            "total_batch_size": rng.choice([rng.randint(-5, 3000), 64 * rng.randint(1, 60)]),
            "device_batch_size": rng.randint(1, 12),
            "max_seq_len": rng.choice([1, 7, 16, 64]),
            "world_size": rng.choice([1, 1, 2, 3, 8]),
        }
        per_round = settings["device_batch_size"] * settings["max_seq_len"] * settings["world_size"]
        try:
            steps = grad_accum_steps(**settings)
            assert steps >= 1 and steps * per_round == settings["total_batch_size"]
        except UserError as e:
            refused += 1
            found, advice = str(e).split(" Use ")
            for flag in ("total_batch_size", "device_batch_size", "max_seq_len"):
                assert f"--{flag}={settings[flag]} " in found + " "
            offers = re.findall(r"--(\w+)=(-?\d+)", advice)
            assert offers, f"no advice: {e}"
            for flag, value in offers:
                assert grad_accum_steps(**{**settings, flag: int(value)}) >= 1
    assert refused > 1000


@pytest.mark.parametrize("flag", ["device_batch_size", "max_seq_len"])
def test_sizes_below_one_are_refused(flag: str) -> None:
    settings = {
        "total_batch_size": 64, "device_batch_size": 1, "max_seq_len": 8, "world_size": 1
    }  # fmt: skip
    with pytest.raises(UserError, match=f"--{flag}=0"):
        grad_accum_steps(**{**settings, flag: 0})


# ---- length --------------------------------------------------------------------------------------


def steps_of(iterations: int, flops: float, tokens: float, ratio: float) -> int:
    return num_iterations(
        iterations, flops, tokens, ratio,
        flops_per_token=6e9, num_scaling_params=1_000_000_000, total_batch_size=500_000,
    )  # fmt: skip


def test_the_first_horizon_that_is_set_decides() -> None:
    assert steps_of(77, 6e18, 5e8, 20) == 77
    assert steps_of(-1, 6e18, 5e8, 20) == 2000  # 6e18 / (6e9 * 5e5)
    assert steps_of(-1, -1, 5e8, 20) == 1000  # 5e8 / 5e5
    assert steps_of(-1, -1, -1, 20) == 40_000  # 20 * 1e9 / 5e5
    assert steps_of(0, 0, 0, 1e-9) == 1  # never none
    with pytest.raises(UserError, match=r"--num_iterations, --target_flops, --target_tokens, --ta"):
        steps_of(-1, -1, -1, -1)


# ---- events --------------------------------------------------------------------------------------


def due(every: int, num_steps: int = 10, **settings: bool) -> list[int]:
    return [s for s in range(num_steps + 1) if is_due(s, every, num_steps, **settings)]


def test_events_come_at_their_interval_and_at_the_end() -> None:
    assert due(4) == [4, 8, 10]
    assert due(5) == [5, 10]
    assert due(4, at_start=True) == [0, 4, 8, 10]
    assert due(100) == [10]


@pytest.mark.parametrize("every", [-1, 0])
def test_an_event_that_is_off_comes_at_the_end_all_the_same(every: int) -> None:
    """A finished run has its final evaluation and its checkpoint, whatever the intervals."""
    assert due(every) == due(every, at_start=True) == [10]
