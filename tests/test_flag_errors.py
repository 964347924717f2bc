"""A command line that cannot be is one sentence: what is wrong with it, and what to type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from nanochat import dataset, flags
from nanochat.common import UserError
from scripts import base_train


@dataclass
class Kinds:
    """Flags of every kind that a value may be wrong for."""

    layers: int | None = None
    rate: Annotated[float, flags.alias("-r")] = 0.1
    embedding_rate: float = 0.2
    rows: int | Literal["auto"] = "auto"
    mode: Literal["plain", "fast", "graph"] = "plain"
    name: Annotated[str, flags.alias("-n")] = ""
    resume: bool = False


@dataclass
class Required:
    """Flags without a default."""

    a: tyro.conf.Positional[str]
    """One run."""
    b: tyro.conf.Positional[str]
    """The other: base/d4 or its folder."""
    from_: Annotated[str, tyro.conf.arg(name="from")]
    """A folder, or a model of the hub (Qwen/Qwen2.5-0.5B)."""
    out_dir: str
    """Where to. It must be empty."""


def said_of(args_class: type, argv: list[str]) -> str:
    with pytest.raises(UserError) as e:
        flags.parse(args_class, argv)
    return str(e.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--layers=four"], "--layers=four must be a whole number"),
        (["--layers", "4.5"], "--layers=4.5 must be a whole number"),
        (["--rows=all"], "--rows=all must be a whole number or auto"),
        (["-r", "big"], "--rate=big must be a number"),
        (["--mode=slow"], "--mode=slow must be plain, fast or graph"),
        (["--mode"], "--mode has no value: write --mode=VALUE, which is plain, fast or graph"),
        (["-r"], "--rate has no value: write --rate=VALUE, which is a number"),
        (["--layers", "--resume"], "--layers has no value: .* a whole number"),
        (["-n", "-x"], "--name has no value: write --name=VALUE, with the = if VALUE begins"),
        (["--layer=4"], "--layer=4 is not a flag of this command; the nearest is --layers"),
        (["--lairs", "4"], "--lairs is not a flag of this command; the nearest is --layers"),
        (["--rat=2"], "the nearest is --rate"),
        (["--embed-rate=2"], "the nearest is --embedding_rate"),
        (["--mod=a", "--nam=b"], "--mod=a is not .* is --mode; --nam=b is not .* is --name"),
        (["-z", "-1"], "-z is not a flag of this command. `python -m .* --help` shows all flags"),
        (["-layers=4"], "-layers=4 is written with two dashes: --layers=4"),
        (["layers=4"], "layers=4 is written with two dashes: --layers=4"),
        (["--resume=true"], r"--resume takes no value \(true\): it switches on, --no_resume"),
        (["--no-resume", "1"], r"--resume takes no value \(1\)"),
        (["lonely"], "lonely belongs to no flag; flags are written --name=value"),
    ],
)
def test_what_cannot_be_is_one_sentence(argv: list[str], said: str) -> None:
    text = said_of(Kinds, argv)
    assert re.match(f".*{said}", text) and "\n" not in text, text


@dataclass
class Numbers:
    """Flags whose numbers cannot be just any."""

    seed: int = 42
    eval_every: int = 250
    grad_clip: float = 1.0
    matrix_lr: float = -1.0
    mfu: float = -1.0
    timeout: float = 60.0
    num_epochs: float = 1.0
    num_iterations: int = -1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--eval_every=-7", "--eval_every=-7 must be 0 or more, or -1; the default is 250"),
        ("--grad_clip=-1", "--grad_clip=-1 must be 0 or more; the default is 1.0"),
        ("--matrix_lr=-5", "--matrix_lr=-5 must be 0 or more; the default is -1.0"),
        ("--mfu=45", "--mfu=45 must be a share, from 0 to 1; the default is -1.0"),
        ("--timeout=0", "--timeout=0 must be above 0; the default is 60.0"),
        ("--num_epochs=-1", "--num_epochs=-1 must be above 0; the default is 1.0"),
        ("--num_iterations=-2", "--num_iterations=-2 must be at least 1; the default is -1"),
    ],
)
def test_a_number_that_means_nothing_is_refused(word: str, said: str) -> None:
    assert said_of(Numbers, [word]) == said


def test_minus_one_is_never_or_the_default() -> None:
    argv = ["--seed=-9", "--eval_every=-1", "--matrix_lr=-1", "--num_iterations=-1"]
    assert flags.parse(Numbers, argv) == Numbers(seed=-9, eval_every=-1)


def test_a_part_of_a_name_leads_to_all_that_have_it() -> None:
    said = said_of(base_train.Args, ["--batch_size=4"])
    assert "the nearest are --total_batch_size and --device_batch_size" in said


@pytest.mark.parametrize("columns", [40, 200])  # the width to which tyro folds its box
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "missing: A (One run), B (The other: base/d4 or its folder), --from=... (A folder, "),
        (["x", "--from=m"], "missing: B (The other: base/d4 or its folder), --out_dir=... (Where"),
        (["x", "y", "--out-dir=o"], "missing: --from=... (A folder, or a model of the hub (Qwen/"),
        (["x", "y", "--form", "m", "--out_dir=o"], "--form is not a flag of this command; the nea"),
    ],
)
def test_what_is_missing_is_named_with_what_it_is_for(
    argv: list[str], said: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = said_of(Required, argv)
    assert text.startswith(said) and text.endswith("--help` shows all flags"), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["prepar"], "prepar is none of the commands prepare, download. "),
        (["--cores=3", "prepare"], "--cores=3 is a flag of `python -m nanochat.dataset prepare`: "),
        (["prepare", "--core=3"], "--core=3 is not a flag of this command; the nearest are "),
        (["prepare", "--cores=all"], "--cores=all must be a whole number"),
        (["prepare", "--cores"], "--cores has no value"),
    ],
)
def test_subcommands_have_flags_of_their_own(argv: list[str], said: str) -> None:
    assert said_of(dataset.Args, argv).startswith(said)


def test_what_nobody_foresaw_is_shown_as_tyro_has_it() -> None:
    @dataclass
    class Odd:
        pair: tuple[int, int] = (1, 2)

    said = said_of(Odd, ["--pair", "1", "x"])
    assert said.startswith("this command line is not understood:\n╭─") and "pair" in said


def test_values_of_the_right_kind_pass() -> None:
    argv = ["--layers=4", "-r", "1e-3", "--rows", "8", "--mode=fast", "--name", "--", "four"]
    right = Kinds(layers=4, rate=1e-3, rows=8, mode="fast", name="four", resume=True)
    assert flags.parse(Kinds, [*argv, "--resume"]) == right
    assert flags.parse(Kinds, ["--layers=None", "--rows", "-1"]) == Kinds(rows=-1)
