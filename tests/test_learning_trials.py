"""bench/learning_trials.py: each change changes what it says, and only differences are believed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import learning
from bench import learning_scales as scales
from bench import learning_trials as bench
from nanochat import flags
from nanochat.common import UserError
from nanochat.dataloader import _Shard
from nanochat.models import TurboConfig, build_model
from nanochat.packing import Documents, pack
from scripts import base_train

CONFIG = TurboConfig(64, 96, n_layer=5, n_head=2, n_kv_head=2, n_embd=64, window=8)


def built(trial: str) -> Any:
    with ExitStack() as stack:
        bench.TRIALS[trial].change(stack)
        model = build_model(CONFIG, seed=1)
        model.trained = {id(p) for ps in model.param_groups().values() for p in ps}  # type: ignore[attr-defined]
        model.logits_of = model(torch.arange(64)[None] % 96)  # type: ignore[attr-defined]
    return model


def test_a_part_that_is_taken_away_is_away_and_not_trained() -> None:
    whole = built("base")
    assert id(whole.backout_scale) in whole.trained and whole.backout_scale != 0
    without = built("no backout")
    assert id(without.backout_scale) not in without.trained and without.backout_scale == 0
    assert not built("no value embeddings").value_embeds and whole.value_embeds
    assert [b.attn.window for b in built("no windows").h] == [None] * 5
    assert [b.attn.window for b in whole.h].count(8) == 3


def test_every_change_is_undone_and_every_trial_parses() -> None:
    before = built("base").logits_of
    for name in bench.TRIALS:
        built(name)
        _, words = bench.command(name, 0, bench.Args(Path("data")))
        args = flags.parse(base_train.Args, words)
        tokens = args.num_iterations * args.total_batch_size
        assert tokens == bench.TOKENS or name == "batch ramp"
    assert torch.equal(built("base").logits_of, before)


def test_runs_of_another_length_have_names_of_their_own(tmp_path: Path) -> None:
    """So that none is taken for another's; what is made for one length is not run at others."""
    short, long = bench.Args(tmp_path), bench.Args(tmp_path, tokens=8192, batch=4096)
    (tag, _), (long_tag, words) = (bench.command("base", 0, args) for args in (short, long))
    assert tag != long_tag and f"--model_tag={long_tag}" in words
    assert {"--num_iterations=2", "--total_batch_size=4096"} <= set(words)
    assert not [word for word in words if word.startswith("--grad_clip")]
    long.trials = "base | reshuffled"
    with pytest.raises(UserError, match="--trials=reshuffled is made for --tokens=409600"):
        bench.main(long)


def test_the_ramp_takes_the_same_rows_in_larger_steps() -> None:
    class Loader:
        def step(self, number: int) -> list[Any]:
            return [bench.MicroBatch(torch.tensor([number]), torch.tensor([number]))]

    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(
            bench.StepLoader, "step", Loader.step
        )
        bench.batch_ramp(2, 3)(stack)
        take: Any = bench.StepLoader.step
        taken = [[int(b.idx) for b in take(Loader(), s)] for s in range(4)]
    assert taken == [[0], [1], [2, 3, 4], [5, 6, 7]]


def test_a_difference_is_believed_beyond_twice_its_error() -> None:
    def runs(*finals: float) -> list[dict[str, Any]]:
        return [{"seed": i, "final": final} for i, final in enumerate(finals)]

    rows = [
        {"trial": "base", "what": "", "runs": runs(2.0, 2.1, 2.2)},
        {"trial": "worse", "what": "", "runs": runs(2.02, 2.121, 2.219)},
        {"trial": "tie", "what": "", "runs": runs(2.02, 2.08, 2.21)},
        {"trial": "once", "what": "", "runs": runs(1.9)},
    ]
    found = {row["trial"]: row for row in bench.compared(rows)}
    assert found["worse"]["difference"] == pytest.approx(0.02)
    assert [bench.verdict(found[n]) for n in ("base", "worse", "tie", "once")] == [
        "", "worse", "tie", "one seed",
    ]  # fmt: skip


def test_a_second_epoch_has_the_rows_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(reader: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert (np.diff(rows) > 0).all()  # what a reader may be asked for
        return rows, rows

    monkeypatch.setattr(bench.RowReader, "read_rows", read)
    half = bench.TOKENS // 2 // bench.ROW
    for reshuffled in (False, True):
        with ExitStack() as stack:
            bench.second_epoch(reshuffled)(stack)
            take: Any = bench.RowReader.read_rows
            parts = [take(None, np.arange(at, at + 4))[0] for at in range(0, 2 * half, 4)]
        first, second = np.split(np.concatenate(parts), 2)
        assert (first == np.arange(half)).all() and (np.sort(second) == first).all()
        assert (first == second).all() != reshuffled


def test_beginnings_only_leaves_out_every_row_that_goes_on_with_a_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    plan = pack(rng.integers(2, 60, 300), rng.permutation(300), 20, cut=True)
    shard = _Shard(Documents(np.zeros(0), np.zeros(1)), plan, rng.permutation(len(plan)))
    monkeypatch.setattr(bench.RowReader, "_prepare", lambda reader, sequence: shard)
    for shards in (1, 2):
        reader = SimpleNamespace(source=SimpleNamespace(num_shards=lambda n=shards: n))
        with ExitStack() as stack:
            bench.beginnings_only()(stack)
            prepare: Any = bench.RowReader._prepare
            order = prepare(reader, 0).row_order
        assert len(order) == len(plan)
        if shards == 1:
            assert (order == shard.row_order).all()
            continue
        firsts = [plan.pieces[plan.starts[r] : plan.starts[r + 1], 1] for r in range(len(plan))]
        assert {*order} == {r for r, first in enumerate(firsts) if not first.any()}
        assert 0 < len({*order}) < len(plan)


def test_windows_are_others_for_as_long_as_asked() -> None:
    """And with those of the whole row the model is what the trial without windows trains."""
    model, idx = built("base"), torch.arange(64)[None] % 96
    trained = [block.attn.window for block in model.h]
    assert trained.count(8) == 3
    with scales.windows_times(model, 2.0):
        assert [block.attn.window for block in model.h].count(16) == 3
    with scales.windows_times(model, float("inf")):
        assert torch.equal(model(idx), built("no windows").logits_of)
    assert [block.attn.window for block in model.h] == trained
    assert torch.equal(model(idx), model.logits_of)


def test_scales_stand_below_one_another_and_models_side_by_side() -> None:
    rows = [
        {"tag": tag, "row": row, "windows": "half", "bpb": bpb}
        for tag, row, bpb in (("a", 512, 2.0), ("a", 1024, 1.5), ("b", 1024, 1.25))
    ]
    assert scales.table({"rows": rows}).splitlines()[2:] == [
        "| 512 | half | 2.0000 |  |",
        "| 1,024 | half | 1.5000 | 1.2500 |",
    ]


def test_a_run_with_other_flags_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bench.learning finds what is done by its name."""
    monkeypatch.setattr(learning, "run", lambda env, module, *words: None)
    tags = set()
    for more in ("", "--matrix_lr=0.01", "--matrix_lr=0.02"):
        args = learning.Args(tmp_path, tmp_path, flags=more)
        tags |= {word for word in learning.one(args, {}, "turbo", 4, 0)["flags"] if "tag" in word}
    assert len(tags) == 3
