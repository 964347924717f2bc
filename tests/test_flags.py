"""Command lines: one dataclass, any spelling of its flags, errors a user can read."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest

from nanochat import flags
from nanochat.common import UserError


@dataclass
class Args(flags.FinetuneFlags):
    """Say what this stage does."""

    batch_size: Annotated[int, flags.alias("-b")] = 8
    """Rows at once."""
    top_k: Annotated[int | None, flags.alias("-k")] = None
    """Choose among so many."""
    source: flags.Source = "base"
    """Where to start."""
    data: str | None = None
    """A file."""


@pytest.mark.parametrize(
    "argv",
    [
        ["--batch_size=3"],
        ["--batch-size=3"],
        ["--batch_size", "3"],
        ["--batch-size", "3"],
        ["-b", "3"],
        ["--", "--batch_size=3"],  # torchrun's separator
    ],
)
def test_every_spelling_of_a_flag(argv: list[str]) -> None:
    assert flags.parse(Args, argv) == Args(batch_size=3)


def test_negative_numbers_none_and_switches() -> None:
    args = flags.parse(Args, ["--seed", "-1", "--save_every=-1", "--top_k", "None", "--resume"])
    assert (args.seed, args.save_every, args.top_k, args.resume) == (-1, -1, None, True)
    assert not flags.parse(Args, ["--no-resume"]).resume
    assert flags.parse(Args, ["--data=-"]).data == "-"


def test_a_home_folder_behind_the_equals_sign_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As zsh does, and bash does not."""
    monkeypatch.setenv("HOME", "/home/ada")
    assert flags.parse(Args, ["--data=~/texts"]).data == "/home/ada/texts"
    assert flags.parse(Args, ["--data=~"]).data == "/home/ada"
    for kept in ("~bob/x", "a~/b", "~~"):
        assert flags.parse(Args, [f"--data={kept}"]).data == kept


def test_argv_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", "--", "-b", "5"])
    assert flags.parse(Args).batch_size == 5
    assert sys.argv == ["prog", "--", "-b", "5"]  # read, not changed


def test_help_shows_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        flags.parse(Args, ["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "Say what this stage does.", "Rows at once.", "-b", "cuda, cpu or mps", "--debug shows",
        "usage: python -m ",
    ):  # fmt: skip
        assert words in text


def test_run_calls_main_with_the_flags() -> None:
    seen: list[Args] = []
    flags.run(seen.append, Args, ["-b", "2"])
    assert seen == [Args(batch_size=2)]


@pytest.mark.parametrize(("rank", "who"), [("0", "error"), ("3", "error (rank 3)")])
def test_a_user_error_is_one_message_on_whatever_rank_it_happens(
    rank: str, who: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(args: Args) -> None:
        raise UserError("--batch_size=8 is too large; use 4")

    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        flags.run(main, Args, [])
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.err == f"{who}: --batch_size=8 is too large; use 4\n"
    assert captured.out == ""


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: Args) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        flags.run(interrupted, Args, [])
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_the_process_ends_with_status_1_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nanochat.dataset", "-n", "0"],
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: -n 0")
    assert "Traceback" not in done.stderr


def test_stages_share_their_flags_by_inheritance() -> None:
    args = flags.parse(Args, ["--step=3", "--matrix_lr=0.1", "--device_type=cpu"])
    assert (args.step, args.matrix_lr, args.device_type) == (3, 0.1, "cpu")
    with pytest.raises(UserError, match="--step=3 is not a flag"):
        flags.parse(flags.TrainFlags, ["--step=3"])  # only stages that start from a checkpoint


@dataclass
class PassingArgs:
    """Flags of a program that starts another."""

    depths: str = "1"
    """Ours."""

    passed_on = ()


def test_flags_for_another_program_are_passed_on_as_they_were_typed() -> None:
    argv = ["--eval-tokens=5", "--depths=4,5", "--stream", "--val_data", "a_b-c", "--data=x_y-z"]
    args = flags.parse(PassingArgs, argv)
    assert args.depths == "4,5"
    assert list(args.passed_on) == [argv[0], *argv[2:]]
    assert flags.typed(args) == argv


def test_what_was_typed_is_kept_beside_what_came_of_it() -> None:
    argv = ["-b", "3", "--resume"]
    args = flags.parse(Args, ["--", *argv])
    assert flags.typed(args) == argv and args == Args(batch_size=3, resume=True)
    assert flags.typed(Args()) is None
