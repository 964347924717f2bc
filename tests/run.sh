#!/usr/bin/env bash
# Sets up like speedrun.sh and runs every check: Rust, lint, types, tests.
#
#     bash tests/run.sh                        # all of it
#     bash tests/run.sh tests/test_optim.py   # these only
set -eu
cd "$(dirname "$0")/.."
. ./setup.sh

if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi

# The fallback wheel of setup.sh, beside the environment, so that a test can run the tokenizer with it.
if [ ! -d .fallback/rustbpe ]; then
    python - <<'PY' || echo "tests: no fallback wheel; its test will be skipped"
import subprocess, shutil, sys
uv = shutil.which("uv") or ".uv/bin/uv"
sys.exit(subprocess.call([uv, "pip", "install", "-q", "--target", ".fallback", "--no-deps",
                          "--only-binary=rustbpe", "rustbpe==0.1.0"]))
PY
fi

if cargo --version >/dev/null 2>&1; then
    (
        cd rustbpe
        cargo fmt --check
        cargo clippy -q --all-targets --all-features -- -D warnings
        cargo test -q
    )
else
    echo "tests: no cargo, so rustbpe's own tests are skipped"
fi
ruff check -q .
ruff format -q --check .
mypy
# One process a core, two at most: more would fight over the cores that torchrun tests need.
processes=$(python -c 'import os; print(min(2, os.cpu_count() or 1))')
status=0
python -m pytest -n "$processes" --dist loadscope || status=$?
# Tests of signals and of several processes share the cores with other tests. What failed runs once
# more with the cores to itself: a fault fails again, and a test that minds its company is named.
if [ "$status" -eq 1 ]; then
    echo "tests: what failed runs again, alone; what passes now depends on timing and is a bug too"
    status=0
    python -m pytest --last-failed --last-failed-no-failures=none --exitfirst -v || status=$?
fi
exit "$status"
