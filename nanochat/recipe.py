"""
The depth dial: batch, rates and length of a pretraining run that nobody typed.

All of them follow from the model's size, by way of the tokens that a model of that size wants
(schedule.py has the formulas and their sources). What was typed is taken as it is. Floor 3.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanochat import schedule
from nanochat.common import print0
from nanochat.flags import HorizonFlags


def num_scaling_params(model: Any) -> int:
    """Parameters that tokens are counted against: all but value embeddings, which are looked up and
    hardly trained by any one token."""
    groups = model.param_groups()
    return sum(p.numel() for kind in groups if kind != "value_embedding" for p in groups[kind])


def settle_horizon(
    args: HorizonFlags, model: Any, tokens_per_round: int, say: Callable[[str], None] = print0
) -> int:
    """Fills in batch and rates that were not typed, says with what, and returns the number of
    optimizer steps. tokens_per_round: what a batch must be a multiple of."""
    sizes = {
        "flops_per_token": model.flops_per_token(),
        "num_scaling_params": num_scaling_params(model),
    }
    horizons = (args.target_flops, args.target_tokens, args.target_param_data_ratio)
    if args.total_batch_size > 0 and args.num_iterations > 0:
        tokens = float(args.num_iterations * args.total_batch_size)
    else:  # so many steps of a batch that is not typed: the batch of a run of full length
        tokens = schedule.num_tokens(*horizons, **sizes)
    chosen: list[str] = []
    if args.total_batch_size < 0:
        args.total_batch_size = schedule.batch_size(tokens, tokens_per_round)
        chosen.append(f"--total_batch_size={args.total_batch_size}")
    # The same on any number of ranks: a round of theirs may be more than the batch
    rates = schedule.base_rates(args.total_batch_size / schedule.batch_size(tokens, 1))
    for flag, value in rates.items():
        if getattr(args, flag) < 0:
            setattr(args, flag, value)
            chosen.append(f"--{flag}={value:g}")
    if chosen:
        say(f"for {tokens:,.0f} tokens: {' '.join(chosen)}")
    return schedule.num_iterations(
        args.num_iterations, *horizons, **sizes, total_batch_size=args.total_batch_size
    )
