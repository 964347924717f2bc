"""
The same run on any number of ranks, however they share out the model: the same rows, to the id, and
the same losses but for the order of sums. In every stage, for every architecture.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.runs_on_ranks import Run, do_runs, failures_of, log_of, seen_by, values_of
from tests.tiny_world import new_world

pytestmark = pytest.mark.slow

STEPS = 3
COMMON = [f"--num_iterations={STEPS}", "--save_every=2", "--keep_last=-1", "--device_type=cpu",
          "--compile=off"]  # fmt: skip
CONVERSATIONS = [*COMMON, "--mixture=primer-arithmetic@60|primer-facts@60",
                 "--val_mixture=primer-facts", "--eval_tokens=256", "--sample_prompts=Hi",
                 "--device_batch_size=1"]  # fmt: skip
# 12 rows a step: as many for each of 1, 2, 3 and 4 ranks; not so RL's 5 problems, DPO's 7 pairs
FLAGS = {
    "base": [*COMMON, "--depth=2", "--max_seq_len=32", "--total_batch_size=384",
             "--device_batch_size=1", "--eval_tokens=256", "--core_metric_every=-1",
             "--sample_prompts=A"],
    "mid": CONVERSATIONS,
    "sft": [*CONVERSATIONS, "--source=mid"],
    "rl": [*COMMON, "--source=mid", "--task=primer-math", "--examples_per_step=5",
           "--num_samples=3", "--max_new_tokens=8", "--eval_examples=4", "--init_lr_frac=0.5",
           "--reward=tests.scripts.rewards_for_tests:some", "--refill_rounds=1",
           "--device_batch_size=4", "--kl=0.01"],
    "dpo": [*COMMON, "--source=mid", "--pairs_per_step=7", "--device_batch_size=4",
            "--eval_every=2", "--init_lr_frac=0.1", "--data={base}/pairs.jsonl"],
}  # fmt: skip
ARCHS = ("gpt", "qwen2.5", "turbo")
# Midtraining and SFT are the same loop: one of them meets two architectures
ARCHS_OF = dict.fromkeys(FLAGS, ARCHS) | {"sft": ("gpt", "qwen2.5")}
# How ranks share out the model, with the (ranks, pretended machines) that take turns: each stage
# and each architecture meets each of them, in every mode. DPO takes turns
# with its architectures, too.
MODES = {
    "zero": [(2, 1), (3, 1), (4, 1)],
    "none": [(3, 1), (4, 1), (2, 1)],
    "fsdp": [(4, 1), (2, 1), (3, 1)],
    "hsdp": [(4, 2)],
}
Layout = tuple[str, int, int]


def make(
    name: str, stage: str, arch: str, ranks: int = 1, nodes: int = 1, flags: Sequence[str] = ()
) -> Run:
    """A run of that name, which begins where the stage before it ended alone."""
    source = f"--arch={arch}" if stage == "base" else f"--source_tag={arch}"
    before = {"base": "", "mid": f"base {arch}"}.get(stage, f"mid {arch}")
    return Run(name, stage, ranks, (*FLAGS[stage], source, *flags), nodes, before)


def shared(stage: str, arch: str, layout: Layout) -> Run:
    mode, ranks, nodes = layout
    return make(f"{arch}-{mode}{ranks}", stage, arch, ranks, nodes, [f"--shard={mode}"])


ALONE = {(stage, arch): make(arch, stage, arch) for stage in FLAGS for arch in ARCHS_OF[stage]}
SHARED = {
    (stage, arch, mode): shared(stage, arch, (mode, *turns[(i + j) % len(turns)]))
    for k, (mode, turns) in enumerate(MODES.items())
    for (i, stage), (j, arch) in product(enumerate(FLAGS), enumerate(ARCHS))
    if arch in ARCHS_OF[stage] and (stage != "dpo" or j == (k + 2) % len(ARCHS))
}
# Micro-batches of other sizes than the one or four rows above: (stage, ranks, rows)
SPLITS = [("base", 1, 12), ("base", 2, 3), ("mid", 1, 6), ("sft", 2, 2), ("rl", 1, 5),
          ("rl", 2, 2), ("dpo", 1, 14), ("dpo", 2, 2)]  # fmt: skip
SPLIT = {
    (stage, ranks, rows): make(
        f"gpt-{rows}rows{ranks}", stage, "gpt", ranks, 1, [f"--device_batch_size={rows}"]
    )
    for stage, ranks, rows in SPLITS
}
# (stage, architecture, the mode that saved, or alone, and the one that goes on with so many ranks)
CHANGES = [
    ("base", "gpt", "", ("fsdp", 3, 1)),
    ("base", "turbo", "zero", ("none", 1, 1)),
    ("base", "qwen2.5", "fsdp", ("hsdp", 4, 2)),
    ("mid", "turbo", "hsdp", ("zero", 3, 1)),
    ("mid", "gpt", "fsdp", ("none", 1, 1)),
    ("sft", "qwen2.5", "none", ("fsdp", 4, 1)),
    ("rl", "gpt", "hsdp", ("fsdp", 3, 1)),
    ("rl", "turbo", "zero", ("none", 3, 1)),
    ("dpo", "qwen2.5", "fsdp", ("zero", 3, 1)),
]


def resumed(stage: str, arch: str, saved: str, other: Layout) -> Run:
    begun = SHARED[stage, arch, saved] if saved else ALONE[stage, arch]
    run = shared(stage, arch, other)
    assert (begun.ranks, begun.argv) != (run.ranks, run.argv)
    return replace(run, name=f"{begun.name}-then-{run.name}", resumes=begun.name)


RESUMED = {change: resumed(*change) for change in CHANGES}
# Runs of other kinds, alone and on several ranks: (stage, ranks, flags)
KINDS = {
    "lora": ("mid", 3, ["--lora_rank=4", "--lora_lr=0.01"]),
    "few": ("rl", 4, ["--examples_per_step=2", f"--inner_steps={STEPS}", f"--save_every={STEPS}",
                      "--clip=0.2"]),
}  # fmt: skip
OTHERS = {
    kind: [make(f"{kind}{n}", stage, "gpt", n, 1, flags) for n in (1, ranks)]
    for kind, (stage, ranks, flags) in KINDS.items()
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base directory in which all of them were run."""
    pairs = [
        {"prompt": f"Is {i} a number?", "chosen": "Yes.", "rejected": f"Who knows what {i} is."}
        for i in range(40)
    ]
    with new_world(tmp_path_factory) as folder:
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
        others = [run for runs in OTHERS.values() for run in runs]
        do_runs(
            folder,
            [*ALONE.values(), *SPLIT.values(), *others, *SHARED.values(), *RESUMED.values()],
        )
        yield folder


def rows_of(folder: Path, run: Run) -> list[Counter[str]]:
    """The rows of each step, of all ranks together, each with how often it is there."""
    ranks = seen_by(folder, run, "rows")
    return [Counter(str(row) for rank in step for row in rank) for step in zip(*ranks)]


def assert_same(folder: Path, run: Run, alone: Run, first: int = 0) -> None:
    """The same rows in the steps from `first` on, the same losses and evaluations in all."""
    assert not failures_of(folder, alone), failures_of(folder, alone)
    assert not failures_of(folder, run), failures_of(folder, run)
    assert rows_of(folder, run) == rows_of(folder, alone)[first:]
    assert all(rows_of(folder, run)) and len(rows_of(folder, run)) == STEPS - first
    losses = values_of(run, "step", "loss")
    assert len(losses) == STEPS
    assert losses == pytest.approx(values_of(alone, "step", "loss"), rel=1e-4, abs=1e-5)
    norms = values_of(run, "step", "grad_norm")
    assert norms == pytest.approx(values_of(alone, "step", "grad_norm"), rel=1e-3)
    names = {"base": ["val_bpb"], "rl": ["pass1"], "dpo": ["val_loss", "val_margin"]}
    for name in names.get(run.stage, ["val_loss"]):
        there, here = (values_of(r, "eval", name) for r in (alone, run))
        assert here == pytest.approx(there, rel=1e-4, abs=1e-5) and there
    if run.stage == "rl":
        for name in ("reward", "completion_tokens", "ended", "groups", "useful_groups"):
            there, here = (values_of(r, "rl", name) for r in (alone, run))
            assert here == pytest.approx(there, rel=1e-9), name


@pytest.mark.parametrize(
    "key", SHARED, ids=[f"{run.stage}-{run.name}" for run in SHARED.values()]
)  # fmt: skip
def test_any_number_of_ranks_gives_the_run_of_one(key: Any, base: Path) -> None:
    stage, arch, _ = key
    run = SHARED[key]
    assert_same(base, run, ALONE[stage, arch])
    seen = seen_by(base, run, "rows")
    assert sum(any(rank) for rank in seen) == run.ranks, "a rank had nothing to do all the time"


@pytest.mark.parametrize("kind", OTHERS)
def test_so_it_is_with_lora_and_with_fewer_problems_than_ranks(kind: str, base: Path) -> None:
    """A rank without a problem waits for the others, and takes its part in the optimizer's step."""
    alone, run = OTHERS[kind]
    assert_same(base, run, alone)
    idle = sum(not any(rank) for rank in seen_by(base, run, "rows"))
    # Two of the four get no problem; a third none if the replies to its own are all alike
    assert idle == 0 if kind == "lora" else idle in (2, 3)


@pytest.mark.parametrize("key", SPLIT, ids=[f"{run.stage}-{run.name}" for run in SPLIT.values()])
def test_how_a_step_is_cut_into_micro_batches_changes_nothing(key: Any, base: Path) -> None:
    assert_same(base, SPLIT[key], ALONE[key[0], "gpt"])


@pytest.mark.parametrize(
    "key", RESUMED, ids=[f"{run.stage}-{run.name}" for run in RESUMED.values()]
)  # fmt: skip
def test_what_some_ranks_saved_others_go_on_from(key: Any, base: Path) -> None:
    stage, arch, *_ = key
    assert_same(base, RESUMED[key], ALONE[stage, arch], first=2)


def test_the_runs_learn_and_differ(base: Path) -> None:
    """Else they would be the same for no reason."""
    for stage in FLAGS:
        archs = ARCHS_OF[stage]
        losses = [values_of(ALONE[stage, arch], "step", "loss") for arch in archs]
        assert all(len({round(loss, 3) for loss in curve}) > 1 for curve in losses), stage
        assert len({round(curve[-1], 3) for curve in losses}) == len(archs), stage
        if stage in ("base", "mid", "dpo"):
            assert all(curve[-1] < curve[0] for curve in losses), stage


# ---- reinforcement learning


def problems_of(folder: Path, run: Run) -> Counter[int]:
    calls = [call for rank in seen_by(folder, run, "problems") for call in rank]
    return Counter(problem for call in calls for problem in call)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_problem_is_lost_or_sampled_twice(arch: str, base: Path) -> None:
    """Five problems on several ranks, and what is sampled in the place of groups that teach
    nothing."""
    alone = ALONE["rl", arch]
    wanted = problems_of(base, alone)
    assert wanted.total() > 5 * STEPS, "nothing was sampled in the place of something"
    for (stage, other, _), run in SHARED.items():
        if (stage, other) != ("rl", arch):
            continue
        assert problems_of(base, run) == wanted, run.name
        shares = [len(rank[0]) for rank in seen_by(base, run, "problems")]
        assert sum(shares) == 5 and max(shares) - min(shares) == 1
        assert values_of(run, "rl", "groups") == values_of(alone, "rl", "groups")


def test_every_reply_is_of_the_present_weights(base: Path) -> None:
    """The engine's log-probabilities are the trainer's, in each step, on every token: --kl looks at
    all of them. test_chat_rl.py shows what older weights would do."""
    for (stage, *_), run in SHARED.items():
        if stage == "rl":
            differences = values_of(run, "rl", "logp_diff_max")
            assert len(differences) == STEPS and max(differences) < 1e-4, run.name
            looked_at = [row for row in log_of(run) if row["event"] == "rl"]
            assert all(row["kl"] >= 0 for row in looked_at)
