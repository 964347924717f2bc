"""
The CUDA paths on a machine without a GPU: all of PyTorch's own work for one, and no kernel.

    python -m bench.hollow_gpu scripts.base_train --depth=12 --num_iterations=3
    HOLLOW_GPU_COUNT=2 python -m bench.hollow_gpu torchrun --standalone --nproc_per_node=2 \
        -m bench.hollow_gpu scripts.base_train -- --depth=12 --shard=fsdp
    HOLLOW_GPU_MIB=24564 HOLLOW_GPU_CAPABILITY=89 python -m bench.hollow_gpu bench.memory --depth=20

CUDA's runtime, driver, cuBLAS and NCCL are replaced by hollow_gpu.cpp, which is compiled here and
comes before them (LD_PRELOAD). PyTorch's allocator, its compiler with Triton, streams, events,
graphs and its checks for waiting are real. So it is seen whether the code for GPUs runs, what it
allocates (to the byte, but for what a product's algorithm might want), whether it waits for the
device, whether it can be captured as a graph, and how many kernels it launches. Numbers are
whatever lies in memory, mostly zeros, and times mean nothing. Where ours compares results before it
uses something (precision, attention, compilation, float8) it takes the comparison for good; errors
stay errors.

What it is taken for: HOLLOW_GPU_NAME, HOLLOW_GPU_MIB (memory), HOLLOW_GPU_CAPABILITY (90 for 9.0)
and HOLLOW_GPU_COUNT; by default one of an H200's size.

Needs Linux, g++, and PyTorch for CUDA 13 from PyPI, whose packages bring the headers. cuDNN and the
like are as without a GPU: cuDNN's attention fails its probe. Ranks exchange small tensors only.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat.common import UserError

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARY = "libcuda.so.1"  # the name under which Triton asks for it
INSIDE = "HOLLOW_GPU"  # set where the library is loaded
ENTRY = re.compile(r"\b(?:__cuda|cuda|cublas|nccl|cu)[A-Z]\w*")


def problem() -> str | None:
    """Why it cannot be had here, or None."""
    if sys.platform != "linux" or not (torch.version.cuda or "").startswith("13."):
        return "it stands in for CUDA 13 on Linux"
    if not shutil.which("g++") or not shutil.which("nm"):
        return "it is compiled by g++"
    missing = [str(path) for path in _headers() if not path.is_dir()]
    return f"no CUDA headers in {', '.join(missing)}" if missing else None


def build(folder: Path) -> Path:
    """Compiles the library into the folder, and returns its path."""
    written = set(ENTRY.findall(SOURCE.read_text(encoding="utf-8")))
    # What PyTorch and Triton ask for besides only has to succeed
    stub = 'asm(".globl {0}\\n.type {0}, @function\\n{0}:\\n xorl %eax, %eax\\n ret\\n");\n'
    rest = "".join(stub.format(name) for name in sorted(_asked_for() - written))
    (folder / "hollow_gpu_rest.inc").write_text(rest, encoding="utf-8")
    library = folder / LIBRARY
    includes = [f"-I{path}" for path in (*_headers(), folder)]
    command = [
        "g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", *includes, str(SOURCE), "-o",
        str(library), f"-Wl,-soname,{LIBRARY}", "-ldl",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{SOURCE} does not compile: {done.stderr.strip()[:2000]}")
    return library


def is_inside() -> bool:
    """Whether this process has it."""
    return bool(os.environ.get(INSIDE))


def environment(library: Path) -> dict[str, str]:
    """Of a process that has the hollow GPU."""
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        INSIDE: "1",
    }


def counts() -> dict[str, int]:
    """Kernels launched, waits for the device and graphs launched so far, in such a process.
    Products are not among the kernels."""
    library: Any = ctypes.CDLL(LIBRARY)
    names = ("kernels", "waits", "graphs")
    for name in names:
        getattr(library, f"hollow_{name}").restype = ctypes.c_long
    return {name: getattr(library, f"hollow_{name}")() for name in names}


def _headers() -> list[Path]:
    """Folders of CUDA's headers; Triton's has those that PyTorch's packages lack."""
    packages = Path(torch.__file__).parent.parent
    return [
        packages / "nvidia" / "cu13" / "include",
        packages / "triton" / "backends" / "nvidia" / "include",
    ]


def _asked_for() -> set[str]:
    """Functions of CUDA and cuBLAS that PyTorch and Triton call."""
    found: set[str] = set()
    for library in sorted((Path(torch.__file__).parent / "lib").glob("lib*.so")):
        undefined = ["nm", "-D", "--undefined-only", str(library)]
        done = subprocess.run(undefined, capture_output=True, text=True, check=True)
        words = [line.split()[-1].split("@")[0] for line in done.stdout.splitlines()]
        found.update(filter(ENTRY.fullmatch, words))
    spec = importlib.util.find_spec("triton.backends.nvidia")
    assert spec is not None and spec.origin is not None
    driver = Path(spec.origin).with_name("driver.c").read_text(encoding="utf-8")
    return found | {name for name in ENTRY.findall(driver) if not name.endswith("_t")}


# -------------------------------------------------------------------------------------------------
# In a process that has it


def believe() -> None:
    """Lets probes find what they look for wherever they run without an error."""
    from nanochat import compiling, fp8, precision
    from nanochat.models import attention

    def without(probe: Callable[..., str | None], said: str) -> Callable[..., str | None]:
        def wrapped(*args: Any) -> str | None:
            found = probe(*args)
            return None if found and said in found else found

        return wrapped

    for module, name, said in (
        (precision, "_fails_here", "differs by"),
        (attention, "_difference", "wrong"),
        (compiling, "probe_compile", "another result"),
        (fp8, "try_fp8", "differ by"),
    ):
        setattr(module, name, without(getattr(module, name), said))
    torch.backends.cuda.enable_cudnn_sdp(False)  # PyTorch's own choice would be cuDNN


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    if is_inside():
        believe()
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    if reason := problem():
        sys.exit(f"there is no hollow GPU here: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        module = "torch.distributed.run" if sys.argv[1] == "torchrun" else "bench.hollow_gpu"
        arguments = sys.argv[2:] if sys.argv[1] == "torchrun" else sys.argv[1:]
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, env=environment(library), check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
