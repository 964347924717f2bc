"""When the step is compiled, that it was tried, and what happens where it does not work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanochat import compiling
from nanochat.common import UserError
from nanochat.compiling import choose_compile, cpu_seconds, probe_compile

CPU, GPU, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
LONG, SHORT = 1e17, 1e10  # FLOPs


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "probe_compile", lambda device: None)


@pytest.mark.parametrize(
    "wanted, device, flops, static, on, why",
    [
        ("off", GPU, LONG, True, False, "--compile"),
        ("auto", GPU, SHORT, True, True, "trial"),
        ("auto", GPU, LONG, False, False, "differ in length"),
        ("on", GPU, LONG, False, True, "trial"),
        ("auto", MPS, LONG, True, False, "--compile=on"),
        ("auto", CPU, SHORT, True, False, r"about 0 s .* pays from 343"),
        ("auto", CPU, LONG, True, True, "trial"),
        ("on", CPU, SHORT, True, True, "trial"),
    ],
)
def test_it_is_compiled_where_it_pays(
    works: None, wanted: str, device: torch.device, flops: float, static: bool, on: bool, why: str
) -> None:
    choice = choose_compile(wanted, device, flops, static)
    assert choice.on == on
    assert re.search(why, str(choice))


def test_where_it_fails_the_run_goes_on_without_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiling, "probe_compile", lambda device: "no Triton")
    assert str(choose_compile("auto", GPU, LONG)) == "eager (no Triton)"
    with pytest.raises(UserError, match="--compile=on: no Triton; use --compile=auto"):
        choose_compile("on", GPU, LONG)


def test_seconds_follow_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    flops = 3.3e3 * 37e6  # a second's work of the 2 cores that the constants are from
    assert cpu_seconds(10 * flops) == pytest.approx(10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert cpu_seconds(10 * flops) == pytest.approx(2.5)


def pretend(monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Any]) -> str:
    """The verdict if torch.compile made `compiled` of the trial."""
    monkeypatch.setattr(compiling, "_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled)
    return probe_compile(CPU) or "works"


def test_a_trial_comes_to_the_right_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> torch.Tensor:
        raise RuntimeError("\n  g++: not today\nand 300 lines more")

    assert pretend(monkeypatch, compiling._trial) == "works"
    said = pretend(monkeypatch, fails)
    assert said == "compilation fails here (RuntimeError: g++: not today)"
    said = pretend(monkeypatch, lambda x, w: 1.1 * compiling._trial(x, w))
    assert "another result" in said
    # A value that is right with a gradient that is not
    said = pretend(monkeypatch, lambda x, w: compiling._trial(x, w.detach()) + 0 * w.sum())
    assert "another result" in said


def test_without_a_cpp_compiler_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch, "compile", None)  # calling it would fail
    assert "C++ compiler" in (probe_compile(CPU) or "")


@pytest.mark.slow
def test_the_trial_works_or_says_why() -> None:
    if compiling._cpp_compiler() is None:
        pytest.skip("no C++ compiler")
    assert probe_compile(CPU) is None
