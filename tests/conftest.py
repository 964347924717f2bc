"""
What every test gets: a base directory of its own, one CPU thread, and skips that say their reason.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before torch is imported: on few cores, tiny tensors are faster on one thread than on two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell without job control makes what stands before an & deaf to Ctrl-C, and its children too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent
SHARED_DATA = REPO.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def own_base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$NANOCHAT_BASE_DIR of this test: nobody's models are read or overwritten."""
    folder = tmp_path / "nanochat"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


@pytest.fixture
def base(world: Path, own_base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base directory that the module's own fixture `world` has made, in place of the empty one.
    Its tests share it: their runs use tags of their own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    return world


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, which a user's clone does not have."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data: this test reads real data")
    return SHARED_DATA


@pytest.fixture
def kernels() -> None:
    """Decoding's own kernels, which need a compiler and a processor that they are for."""
    from nanochat.cpu_kernels import problem  # loads torch

    if problem():
        pytest.skip(problem())


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch  # seconds, so only where a test asks for it

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
