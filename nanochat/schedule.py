"""
Arithmetic of a run: how long, how large a batch, how fast to learn at which step.

Pure functions of numbers, so that a test can check end points and a plan can be printed without a
model. Floor 0.
"""

from __future__ import annotations

import math

from nanochat.common import UserError

# Where batch and rates were measured (nanochat's dev/LOG.md): d12, 20 tokens a parameter.
REF_TOKENS = 3.7e9
REF_BATCH = 2**19
MIN_STEPS = 500


def lr_multiplier(
    step: int,
    num_steps: int,
    warmup_steps: int = 0,
    warmdown_ratio: float = 0.2,
    final_frac: float = 0.0,
) -> float:
    """Share of the peak learning rate at `step` in [0, num_steps): trapezoid.

    Linear warm-up over `warmup_steps` (the first step already moves), a plateau, and a linear
    descent over the last `warmdown_ratio` of the run to `final_frac`, which step num_steps would
    reach exactly."""
    warmdown_steps = round(warmdown_ratio * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step < num_steps - warmdown_steps:
        return 1.0
    progress = (num_steps - step) / max(1, warmdown_steps)  # 1 -> 0
    return final_frac + (1.0 - final_frac) * min(1.0, max(0.0, progress))


def muon_momentum(step: int, warmup_steps: int = 300) -> float:
    """Muon's momentum rises from 0.85 to 0.95 over the first steps (as in modded-nanogpt):
    early gradients turn fast, and a long memory of them would mislead."""
    frac = min(step / max(1, warmup_steps), 1.0)
    return (1 - frac) * 0.85 + frac * 0.95


def decay_multiplier(step: int, num_steps: int) -> float:
    """Share of the weight decay at `step`: linear from 1 to 0, so that nothing is forgotten when
    there is no time left to learn it again (nanochat's dev/LOG.md, 2026)."""
    return max(0.0, 1.0 - step / max(1, num_steps))


def width_lr_scale(n_embd: int) -> float:
    """AdamW rates are quoted at width 768 and fall with 1/sqrt(width)."""
    return (n_embd / 768) ** -0.5


# -------------------------------------------------------------------------------------------------
# What follows from the depth dial, by way of the tokens that a model of that size wants


def batch_size(num_tokens: float, tokens_per_round: int) -> int:
    """Tokens in one optimizer step for a run over `num_tokens`, a multiple of tokens_per_round
    (the rows of one pass on all ranks).

    The batch that is just not wasteful grows with the tokens as D^0.383 (Power Lines, arXiv
    2505.13738), 2^19 at d12's D. Short runs want less than that: with fewer than MIN_STEPS steps it
    is steps that they lack (measured at d4, bench/LEARNING.md)."""
    wanted = min(REF_BATCH * (num_tokens / REF_TOKENS) ** 0.383, num_tokens / MIN_STEPS)
    power_of_two = 2 ** round(math.log2(max(1.0, wanted)))
    return max(1, round(power_of_two / tokens_per_round)) * tokens_per_round


def base_rates(batch_ratio: float) -> dict[str, float]:
    """Learning rates and weight decay of pretraining, by flag. batch_ratio: the batch in units of
    the one that batch_size() gives.

    At that batch the same rates serve from d4 (measured, bench/LEARNING.md) to d26 (nanochat's
    dev/LOG.md). A smaller one has noisier gradients and wants rates by its square root (Malladi et
    al., arXiv 2205.10287, for Adam). A larger one keeps them: a run that short is one to look at,
    and 1.6 times the rates learned no more where that was tried."""
    scale = min(1.0, batch_ratio) ** 0.5
    return {
        "embedding_lr": 0.3 * scale,
        "unembedding_lr": 0.008 * scale,
        "matrix_lr": 0.02 * scale,
        "scalar_lr": 0.1 * scale,
        "weight_decay": 0.28,
    }


def grad_accum_steps(
    total_batch_size: int, device_batch_size: int, max_seq_len: int, world_size: int
) -> int:
    """Micro-batches per optimizer step on each rank.

    total_batch_size is in tokens over all ranks. Raises UserError with working values when it is
    not a multiple of one round of micro-batches."""
    if device_batch_size < 1 or max_seq_len < 1:
        raise UserError(
            f"--device_batch_size={device_batch_size} and --max_seq_len={max_seq_len} must be >= 1"
        )
    per_round = device_batch_size * max_seq_len * world_size
    if total_batch_size >= per_round and total_batch_size % per_round == 0:
        return total_batch_size // per_round
    below = max(0, total_batch_size // per_round * per_round)
    choices = [f"--total_batch_size={v}" for v in (below, below + per_round) if v > 0]
    rows = total_batch_size // (max_seq_len * world_size)
    if rows * max_seq_len * world_size == total_batch_size and rows > 0:
        fit = max(d for d in range(1, min(rows, device_batch_size) + 1) if rows % d == 0)
        choices.append(f"--device_batch_size={fit}")
    raise UserError(
        f"--total_batch_size={total_batch_size} tokens is not a multiple of "
        f"--device_batch_size={device_batch_size} x --max_seq_len={max_seq_len} x {world_size} "
        f"rank(s) = {per_round}. Use {' or '.join(choices)}."
    )


def num_iterations(
    num_iterations: int,
    target_flops: float,
    target_tokens: float,
    target_param_data_ratio: float,
    *,
    flops_per_token: float,
    num_scaling_params: int,
    total_batch_size: int,
) -> int:
    """Length of the run in optimizer steps, by the first of four horizons that is set (> 0)."""
    if num_iterations > 0:
        return num_iterations
    tokens = num_tokens(
        target_flops,
        target_tokens,
        target_param_data_ratio,
        flops_per_token=flops_per_token,
        num_scaling_params=num_scaling_params,
    )
    return max(1, round(tokens / total_batch_size))


def num_tokens(
    target_flops: float,
    target_tokens: float,
    target_param_data_ratio: float,
    *,
    flops_per_token: float,
    num_scaling_params: int,
) -> float:
    """Tokens to train on, by the first of three horizons that is set (> 0)."""
    if target_flops > 0:
        return target_flops / flops_per_token
    if target_tokens > 0:
        return target_tokens
    if target_param_data_ratio > 0:
        return target_param_data_ratio * num_scaling_params
    raise UserError(
        "no training horizon: set one of --num_iterations, --target_flops, --target_tokens, "
        "--target_param_data_ratio"
    )


def is_due(step: int, every: int, num_steps: int, *, at_start: bool = False) -> bool:
    """Whether something that happens each `every` steps happens now.

    Always at the last step (step == num_steps, after it was taken), whatever the interval, so that
    a finished run has its final evaluation and checkpoint; at step 0 only when asked."""
    if step == num_steps:
        return True
    if step == 0:
        return at_start and every > 0
    return every > 0 and step % every == 0
