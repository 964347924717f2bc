"""
Our own operations on a CPU: what torch computes, from weights of every width, row by row the same.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat import cpu_kernels
from nanochat.cpu_kernels import PackedLinear, one_query, pack
from nanochat.int8 import rounded
from tests.decoding_for_tests import assert_close


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about this machine is found out anew, before and after."""
    functions = cpu_kernels.problem, cpu_kernels._library
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def test_packed_weights_lie_side_by_side_by_input() -> None:
    weight = torch.arange(40.0 * 3).view(40, 3)
    packed = pack(weight)
    assert packed.shape == (2, 3, 32)
    assert packed[0, 1].tolist() == weight[:32, 1].tolist()
    assert packed[1, 2].tolist() == weight[32:, 2].tolist() + [0.0] * 24
    pairs = pack(weight.bfloat16())[0, 1].tolist()
    assert pairs[::2] + pairs[1::2] == packed[0, 1].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("out", [7, 32, 100])
def test_a_packed_layer_is_the_linear_one(out: int, dtype: torch.dtype, kernels: None) -> None:
    """Whatever the number of rows: of a part of a tile, of one, of several."""
    generator = torch.Generator().manual_seed(out)
    weight, bias = (torch.randn(*size, generator=generator) for size in ((out, 24), (out,)))
    layer = PackedLinear(weight, bias, dtype)
    assert layer.weight.dtype == dtype
    held = weight.to(dtype).float()
    if dtype == torch.int8:
        integers, scale = rounded(weight)
        held = integers.float() * scale[:, None]
    x = torch.randn(60, 24, generator=generator)
    for rows in (1, 2, 3, 4, 11, 12, 13, 60):
        assert_close(layer(x[:rows, None]), F.linear(x[:rows, None], held, bias), rows)
    assert layer(x[:0]).shape == (0, out)
    assert layer(x[None, :4].transpose(1, 2).contiguous().transpose(1, 2)).shape == (1, 4, out)


def test_a_row_does_not_depend_on_the_others(kernels: None) -> None:
    """To the last bit."""
    x, layer = torch.randn(60, 24), PackedLinear(torch.randn(50, 24), None, torch.bfloat16)
    for rows in (1, 5, 12, 25, 60):
        assert torch.equal(layer(x[-rows:]), layer(x)[-rows:])


@pytest.mark.parametrize("width", [16, 64, 80, 128])
def test_attention_of_one_token(width: int, kernels: None) -> None:
    """Grouped heads, rows of unequal length, windows, memory longer than what it holds."""
    generator = torch.Generator().manual_seed(width)
    q = torch.randn(3, 1, 6, width, generator=generator)
    memory = torch.randn(2, 3, 2, 40, width, generator=generator)
    k, v = memory[0][:, :, :21], memory[1][:, :, :21]
    places, at = torch.arange(21), torch.tensor([[20], [3], [0]])
    causal, window = places <= at, (places <= at) & (places > at - 2)
    for visible in (None, causal, window):
        mask = None if visible is None else visible[:, None, None]
        wanted = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
        )
        assert_close(one_query(q, k, v, mask), wanted.transpose(1, 2).reshape(3, 1, -1))
    large = torch.full_like(q, 60.0), torch.full_like(k, 60.0)  # scores that overflow exp()
    assert torch.isfinite(one_query(*large, v, None)).all()


def test_loading_them_changes_nothing_else(kernels: None) -> None:
    """-ffast-math at the wrong place makes a process round small numbers to zero; and torch's
    compiler, which takes seconds to load, is not."""
    code = (
        "import sys, torch; from nanochat import cpu_kernels; cpu_kernels.problem(); "
        "print(float(torch.tensor(1e-40) * 0.5) > 0, 'torch._inductor' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.split() == ["True", "False"]


def test_without_a_compiler_there_are_none(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with one that fails, whose last word is told; nothing half-made stays."""
    monkeypatch.setattr(cpu_kernels, "folder", lambda: tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(cpu_kernels.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert cpu_kernels.problem() == "no C++ compiler: install g++"
    assert not cpu_kernels.attends(64)
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'first'; echo 'no space left' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    cpu_kernels.problem.cache_clear()
    assert cpu_kernels.problem() == "no space left"
    broken.write_text("#!/bin/sh\necho 'ld: cannot find -lomp' >&2; echo 'gave up' >&2; exit 1\n")
    cpu_kernels.problem.cache_clear()
    assert cpu_kernels.problem() == "ld: cannot find -lomp"
    assert list(tmp_path.iterdir()) == [broken]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    cpu_kernels.problem.cache_clear()
    assert cpu_kernels.problem() == "no kernels for this processor (DEFAULT), for AVX2 and AVX512"
