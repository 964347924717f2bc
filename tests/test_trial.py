"""A trial step leaves everything as it was, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanochat.distributed import DistInfo
from nanochat.flags import TrainFlags
from nanochat.optim import make_optimizer
from nanochat.step import TrainStep
from nanochat.trial import trial_step
from tests.models_for_tests import tiny_model, tokens_of

HERE = DistInfo(0, 0, 1, torch.device("cpu"))


def make_step(**rates: float) -> TrainStep:
    model = tiny_model("gpt")
    return TrainStep(TrainFlags(), HERE, model, make_optimizer(model, 0.1, 0.01, 0.01, **rates))


@pytest.mark.parametrize("under_way", [False, True])
def test_a_trial_step_leaves_nothing_behind(under_way: bool) -> None:
    step = make_step(weight_decay=0.1)
    model, optimizer = step.model, step.optimizer
    idx = tokens_of(model, 2, 16)
    if under_way:  # state that came from a checkpoint
        model(idx, idx).backward()
        optimizer.step(1.0)
        optimizer.zero_grad()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = {
        (k, e): v.clone() for k, entries in optimizer.state.items() for e, v in entries.items()
    }
    steps, rng = optimizer.num_steps, torch.get_rng_state()
    ran = []
    model.register_forward_hook(lambda *_: ran.append(1))
    peak = trial_step(step, 2, 16, 8)
    assert peak is not None and len(ran) == 4  # of two steps, each with two micro-batches
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    after = {(k, e): v for k, entries in optimizer.state.items() for e, v in entries.items()}
    assert after.keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in after.items())
    assert optimizer.num_steps == steps and torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


def test_a_trial_that_runs_out_of_memory_says_so() -> None:
    step = make_step()

    def too_much(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    plain, step.forward = step.forward, too_much
    assert trial_step(step, 2, 16, 8) is None
    step.forward = plain
    assert trial_step(step, 2, 16, 8) is not None
