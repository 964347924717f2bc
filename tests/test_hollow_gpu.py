"""
The code for GPUs on a machine without one: that it runs, what it takes, and where it would wait.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import hollow_gpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(hollow_gpu.problem() is not None, reason=str(hollow_gpu.problem())),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hollow_gpu.build(tmp_path_factory.mktemp("hollow_gpu"))


def on_gpu(library: Path, part: str, num_ranks: int = 1) -> dict[str, Any]:
    """What rank 0 prints."""
    command = ["-m", "bench.hollow_gpu", "tests.on_hollow_gpu", part]
    env = hollow_gpu.environment(library)
    if num_ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                   str(num_ranks), *command]  # fmt: skip
        env |= {"HOLLOW_GPU_COUNT": str(num_ranks), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return min(told, key=lambda found: found.get("rank", 0))


def test_a_compiled_step_is_whole_and_is_not_waited_for(library: Path) -> None:
    """The trial compiles what the run takes, in float8 and recomputed; no graph breaks, and the
    second step runs while waiting is an error."""
    found = on_gpu(library, "train")
    assert "bfloat16" in found["computing"] and "in float8, compiled" in found["computing"]
    assert found["micro_batch"] == 4
    assert found["breaks"] == 0 and found["compiled_again"] == 0
    assert 100 < found["kernels"] < 1000


def test_estimates_are_what_the_allocator_counts(library: Path) -> None:
    found = on_gpu(library, "memory")
    assert len(found) == 4
    assert all(0.9 < ratio < 1.1 for ratio in found.values()), found


def test_rows_of_different_lengths_are_decoded_under_autocast(library: Path) -> None:
    """As RL's rollouts and chat evaluations are. On CUDA, unlike on a CPU, it takes norms to
    float32, and a cache that began with such keys could not take the values."""
    found = on_gpu(library, "autocast")
    assert list(found) == ["gpt", "qwen2.5", "turbo"]
    assert all(of_model == [["torch.bfloat16"], [4, 41]] for of_model in found.values())


def test_a_step_of_decoding_is_captured_by_length(library: Path) -> None:
    """Two graphs, for texts up to 256 and up to 512; replayed they launch nothing else. In int8
    each layer has 4 products, a kernel each, and 7 kernels besides."""
    found = on_gpu(library, "decode")
    assert found["graphs"] == [[1, 256], [1, 512]]
    first, second, third, fourth = found["steps"]
    assert second == fourth == {"kernels": 0, "waits": 0, "graphs": 1, "programs": 0}
    assert first["programs"] == 1 and third["programs"] == 0
    a_step = third["kernels"] // 4  # three trials and the capture
    assert a_step <= 12 * found["layers"] + 6


def test_ranks_train_over_nccl(library: Path) -> None:
    """Which takes tensors of the GPU alone."""
    found = on_gpu(library, "ranks", num_ranks=2)
    assert found == {"zero": ["cuda"], "fsdp": ["cuda"], "sum": [3.0], "rank": 0}


def test_what_a_gpu_refuses_is_refused(library: Path) -> None:
    found = on_gpu(library, "refuse")
    memory, waiting = found["said"]
    assert "out of memory" in memory.lower()
    assert "captur" in waiting
    assert found["waited"] == [2] * 4, "while one GPU's graph is captured, another's worker goes on"
