"""
Programs of the step of decoding say what the model says: exported for every architecture, and one
compiled for good.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat import cpu_kernels, step_program
from nanochat.compiling import probe_compile
from nanochat.kv_cache import KVCache
from nanochat.serving import make_ready
from nanochat.static_step import Step
from nanochat.step_program import RANGES, Programs
from tests.decoding_for_tests import assert_close
from tests.models_for_tests import TINY, tiny_model, tokens_of

every_architecture = pytest.mark.parametrize("arch", TINY)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Exported programs are run as they are, without a compiler: which were made."""
    made: list[tuple[int, int]] = []

    def program(exported: Any, rows: tuple[int, int]) -> tuple[Callable[..., list[Tensor]], Any]:
        made.append(rows)
        module = exported.module(check_guards=False)  # which fail where ids are None

        def run(tensors: list[Tensor]) -> list[Tensor]:
            idx, at, *rest = tensors
            places = rest.pop()
            ids = rest.pop() if len(rest) % 2 else None
            return [module(idx, at, list(zip(rest[::2], rest[1::2])), ids, places)]

        return run, None

    monkeypatch.setattr(step_program, "_program", program)
    return made


@torch.inference_mode()
def follows(model: Any, step: Step, rows: int, start: int = 9, end: int = 12) -> None:
    """That the step goes on with texts as the whole model would."""
    idx = tokens_of(model, rows, end, seed=rows)
    cache = KVCache(model.config.n_layer, batch=rows)
    model(idx[:, :start], kv_cache=cache)
    for i in range(start, end):
        assert_close(step(idx[:, i : i + 1], cache), model(idx[:, : i + 1])[:, i], (rows, i))
        cache.set_lengths([i + 1] * rows)
    assert isinstance(step.decode, Programs), "it went on plainly"


@every_architecture
def test_one_program_serves_a_range_of_rows_and_any_memory(
    arch: str, interpreted: list[tuple[int, int]]
) -> None:
    """Past growths of the memory; with weights that are joined for serving, and large ones."""
    model = make_ready(tiny_model(arch, sequence_len=160))
    step = Step(model)
    for rows in (1, 3, 2, 20, 1, 12):
        follows(model, step, rows)
    assert interpreted == [*RANGES]
    follows(model, step, 1, end=130)
    follows(model, step, 3, end=130)
    assert len(interpreted) == 2


def test_a_table_that_grows_makes_new_programs(interpreted: list[tuple[int, int]]) -> None:
    model = tiny_model("gpt", n_layer=1)  # its table knows 16 positions
    step = Step(model)
    follows(model, step, 2, end=16)
    assert len(interpreted) == 1
    follows(model, step, 2, end=36)
    assert len(interpreted) > 1


def test_a_program_that_a_grown_table_needs_may_fail_too(
    interpreted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step goes on plainly, as it does when the first one fails."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("no space left")

    model = tiny_model("gpt", n_layer=1)
    step = Step(model)
    follows(model, step, 2, end=16)
    monkeypatch.setattr(step_program, "_program", broken)
    with pytest.raises(AssertionError, match="plainly"):
        follows(model, step, 2, end=36)


def name_of(model: Any, rows: tuple[int, int] = RANGES[1]) -> str:
    cache = KVCache(model.config.n_layer, batch=2)
    with torch.no_grad():
        model(tokens_of(model, 2, 3), kv_cache=cache)
        exported = step_program._export(model, rows, Step(model, "off").prepare(cache, 2))
    return step_program._name(exported, {**exported.state_dict, **exported.constants}, {})


def changed(model: Any, *names: str) -> Any:
    with torch.no_grad():
        for name in names or dict(model.named_parameters()):
            model.get_parameter(name).mul_(1.5)
    return model


def test_a_program_is_found_by_what_it_computes() -> None:
    """Not by the values of weights, which are the model's own; but for those few that a compiler
    makes constants of."""
    model = tiny_model("turbo", n_layer=1)
    name = name_of(model)
    assert name_of(changed(model, "lm_head.weight", "wte.weight")) == name
    others = [
        name_of(changed(model, "residual_scale")),
        name_of(make_ready(model)),
        name_of(model, RANGES[0]),
        name_of(tiny_model("qwen2.5", n_layer=1)),
        name_of(tiny_model("qwen2.5", n_layer=1, norm_eps=1e-3)),
    ]
    assert len({name, *others}) == 6


def test_a_compiled_program_has_the_models_own_weights_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one test that compiles: a row, of a model of one layer, which calls our own kernels."""
    problem = probe_compile(torch.device("cpu"))
    if problem:
        pytest.skip(problem)
    monkeypatch.setattr(cpu_kernels, "folder", lambda: tmp_path / "programs")
    plain = tiny_model("gpt", n_layer=1, n_embd=64)
    model = make_ready(plain)
    step = Step(model)
    follows(model, step, 1)
    said = capsys.readouterr()  # not where a reply is printed
    assert "compiling the step for one row" in said.err and said.out == ""
    for layer in (vars(m).get("joined", m) for m in model.modules()):
        if isinstance(layer, cpu_kernels.PackedLinear):
            layer.weight.mul_(1.5)
    follows(model, step, 1)  # by the new values
    model = make_ready(changed(plain))
    follows(model, Step(model), 1)  # another model's
    (kept,) = (tmp_path / "programs").glob("*.pt2")
    assert kept.stat().st_size < 10 * 2**20

    def never(*_: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(step_program, "_compile", never)
    follows(model, Step(model), 1)


def test_what_cannot_be_compiled_goes_on_plainly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """At any number of rows, and nothing half-made stays."""

    def broken(exported: Any, **kwargs: Any) -> str:
        Path(kwargs["package_path"]).write_bytes(b"half")
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(cpu_kernels, "folder", lambda: tmp_path)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
    model = tiny_model("gpt", n_layer=1)
    step = Step(model)
    with pytest.raises(AssertionError, match="plainly"):
        follows(model, step, 1)
    out = capsys.readouterr()
    assert "not compiled: RuntimeError: no C++ compiler" in out.out + out.err
    assert not list(tmp_path.iterdir())
