"""One file a stage. Each runs as `python -m scripts.<stage> --flag=value`."""

import nanochat  # noqa: F401  # before anything that may be missing: it can say what is
