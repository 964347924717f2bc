"""
Decoding's own operations on a CPU, of cpu_kernels.cpp: compiled when they are first needed.

    if not problem():
        layer = PackedLinear(linear, torch.bfloat16)    # linear(x), from half of the memory
        y = one_query(q, k, v, visible)                 # attention of one token

The library is kept in ~/.cache, under a name that says what it was made of and for which machine.
Eager code calls it directly or as the operations torch.ops.nanochat.*, a compiled program by the
functions that shims() names, without Python. Floor 0.9.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.int8 import rounded

# As in cpu_kernels.cpp
COLUMNS = 32  # outputs whose weights lie side by side
LANES = 16  # of which a head's width must be a multiple
SOURCE = Path(__file__).with_name("cpu_kernels.cpp")

# What machines have, as torch names it; there are no kernels for others.
FLAGS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}


def folder() -> Path:
    """Where what was compiled is kept. Not beside torch's own: to ask torch where that is loads its
    compiler, for seconds, and what lies in /tmp under a known name may be somebody else's."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "nanochat" / "compiled"


# ---- the library


def for_this_processor() -> bool:
    """Whether there are kernels for such machines at all."""
    return torch.backends.cpu.get_cpu_capability() in FLAGS


@functools.cache
def problem() -> str:
    """Why there are no kernels here; empty if there are."""
    try:
        x = torch.linspace(-1, 1, 3 * 5).view(3, 5)
        weight = torch.linspace(2, -1, 40 * 5).view(40, 5)
        found = _packed_linear(x, pack(weight), 40, 32)
        return (
            "" if torch.allclose(found, x @ weight.t(), atol=1e-5) else "a product came out wrong"
        )
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        # No compiler, one that fails, nowhere to keep what it makes
        said = (getattr(e, "stderr", "") or str(e)).strip().splitlines()
        telling = [line for line in said if "error: " in line or "cannot find" in line]
        return (telling or said)[-1][:200]


@functools.cache
def _library() -> Any:
    """The compiled library, whose functions programs find by their names."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not for_this_processor():
        raise OSError(f"no kernels for this processor ({capability}), for {' and '.join(FLAGS)}")
    # Not clang, whose OpenMP would run threads of its own beside torch's
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise OSError("no C++ compiler: install g++")
    home = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O3", "-ffast-math", "-fopenmp", "-fPIC", f"-I{home}/include"]
    flags += FLAGS[capability]
    made_of = (torch.__version__, compiler, flags, SOURCE.read_text(encoding="utf-8"))
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
    path = folder() / f"{name}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as made:
            _run(compiler, *flags, "-c", str(SOURCE), "-o", f"{made}/kernels.o")
            # Linked without -ffast-math: with it GCC 12 makes the whole process round small numbers
            # to zero
            libraries = ("-fopenmp", f"-L{home}/lib", "-ltorch_cpu")
            _run(compiler, "-shared", f"{made}/kernels.o", *libraries, "-o", f"{made}/kernels.so")
            os.replace(f"{made}/kernels.so", path)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.nanochat_packed_linear.argtypes = [pointer] * 3 + [number] * 4
    library.nanochat_one_query.argtypes = [pointer] * 7
    return library


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)


# ---- its operations

_OPS = torch.library.Library("nanochat", "FRAGMENT")
_OPS.define("packed_linear(Tensor x, Tensor packed, int out, int bits) -> Tensor")
_OPS.define("one_query(Tensor q, Tensor k, Tensor v, Tensor visible) -> Tensor")


def _packed_linear(x: Tensor, packed: Tensor, out: int, bits: int) -> Tensor:
    y = x.new_empty(x.size(0), out)
    _library().nanochat_packed_linear(
        x.data_ptr(), packed.data_ptr(), y.data_ptr(), x.size(0), x.size(1), out, bits
    )
    return y


def _one_query(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    B, _, H, E = q.shape
    y = q.new_empty(B, 1, H * E)
    sizes = (ctypes.c_int64 * 5)(B, H, k.size(1), E, k.size(2))
    strides = (ctypes.c_int64 * 6)(*k.stride()[:3], *v.stride()[:3])
    pointers = (t.data_ptr() for t in (q, k, v, visible, y))
    _library().nanochat_one_query(*pointers, sizes, strides)
    return y


_OPS.impl("packed_linear", _packed_linear, "CPU")
_OPS.impl("one_query", _one_query, "CPU")
torch.library.register_fake(
    "nanochat::packed_linear", lambda x, packed, out, bits: x.new_empty(x.size(0), out), lib=_OPS
)
torch.library.register_fake(
    "nanochat::one_query",
    lambda q, k, v, visible: q.new_empty(q.size(0), 1, q.size(2) * q.size(3)),
    lib=_OPS,
)


def shims() -> dict[Any, list[str]]:
    """What a compiled program calls in the place of each operation, for
    aot_inductor.custom_ops_to_c_shims."""
    tensor = "AtenTensorHandle"
    ops = torch.ops.nanochat
    return {
        ops.packed_linear.default: [
            f"AOTITorchError aoti_torch_cpu_packed_linear({tensor}, {tensor}, int64_t, int64_t, "
            f"{tensor}*)"
        ],
        ops.one_query.default: [
            f"AOTITorchError aoti_torch_cpu_one_query({tensor}, {tensor}, {tensor}, {tensor}, "
            f"{tensor}*)"
        ],
    }


def attends(head_width: int) -> bool:
    """Whether one_query is to be had for such heads."""
    return head_width % LANES == 0 and not problem()


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one token: (B, 1, H, E), (B, K, S, E) twice, (B, 1, 1, S) -> (B, 1, H * E).
    float32, each head's numbers side by side."""
    B, S = q.size(0), k.size(2)
    visible = q.new_ones((B, S), dtype=torch.bool) if mask is None else mask.reshape(B, S)
    return torch.ops.nanochat.one_query(q.contiguous(), k, v, visible.contiguous())


# ---- matrices as they are read


def pack(weight: Tensor) -> Tensor:
    """(out, in) -> (out / COLUMNS, in, COLUMNS), filled up with zeros. In bfloat16 output 0 of a
    block is followed by 16, then come 1 and 17: pairs of the size of a float."""
    out, width = weight.shape
    blocks = -(-out // COLUMNS)
    padded = weight.new_zeros(blocks * COLUMNS, width)
    padded[:out] = weight
    side = 2 if weight.dtype == torch.bfloat16 else 1
    halves = padded.view(blocks, side, COLUMNS // side, width)
    return halves.permute(0, 3, 2, 1).contiguous().view(blocks, width, COLUMNS)


class PackedLinear(nn.Module):
    """A linear layer for inference, with its weights in bfloat16, int8 or float32.

    Activations and sums are float32 whatever the weights are; int8 has a scale for each output."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """`weight`: (out, in) float32."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = None
        if dtype == torch.int8:
            weight, scale = rounded(weight)
        self.bits = 8 * dtype.itemsize  # of a weight
        self.register_buffer("weight", pack(weight.detach().to(dtype)))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()  # (R, in)
        # By way of torch's dispatcher the call takes as long as a small product
        traced = torch.compiler.is_compiling()
        product = torch.ops.nanochat.packed_linear if traced else _packed_linear
        y = product(rows, self.weight, self.out_features, self.bits)
        y = y.view(*x.shape[:-1], self.out_features)
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias
