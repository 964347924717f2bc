"""
The shards of a data set on the hub: which of them to have, and which one is validation.

shard_00000.parquet, shard_00001.parquet and so on. The last one is validation; which that is gets
recorded in validation_files.json before anything is fetched, so that a data set that grows, or half
of a download, never moves it. Floor 0, above hub.py; dataset.py is the command.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nanochat.common import UserError, get_base_dir, read_json, write_json
from nanochat.download import Remote
from nanochat.hub import Hub

DEFAULT_REPO = "karpathy/fineweb-edu-100b-shuffle"
LAST_SHARD = 1822  # of the default data set: validation, by name
SHARD_NAME = re.compile(r"shard_\d{5}\.parquet")
SHARD_BYTES = 100_000_000  # about, where the server does not say
SHARD_CHARS = 250_000_000  # of the default data set, about


def pins_path() -> Path:
    """Where it is recorded which files are validation."""
    return get_base_dir() / "validation_files.json"


def read_pins() -> dict[str, dict[str, Any]]:
    """Folder or glob -> its validation file, by name; "base_data" for the downloaded text."""
    return read_json(pins_path()) if pins_path().exists() else {}


def shard_name(index: int) -> str:
    """The file name of a shard of the default data set."""
    return f"shard_{index:05d}.parquet"


def last_shard() -> str:
    """The validation shard of the default data set."""
    return shard_name(LAST_SHARD)


def check_parquet(path: Path) -> None:
    """Raises ValueError if the file has no readable parquet footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as e:
        with open(path, "rb") as f:
            raise ValueError(f"not a parquet file: {e} (it begins with {f.read(16)!r})") from e


def plan_shards(hub: Hub, num_files: int, ask: bool = True) -> tuple[dict[str, Remote], str]:
    """(the shards to have, with what is known of each; the validation shard among them).

    ask: without, no server hears of it, which serves where the layout is known: that of the default
    data set. Raises UserError for a data set without shards."""
    ours = hub.repo == DEFAULT_REPO
    listing = None
    if ask or not ours:
        try:  # of another data set, nothing else says which shard is the last
            listing = hub.list_files(min(2, hub.patience.tries) if ours else hub.patience.tries)
        except UserError:
            if not ours:
                raise
    if listing is None:  # a mirror that only serves files: taken to be laid out as the default
        listing = {shard_name(i): Remote() for i in range(LAST_SHARD + 1)}
    shards = sorted(name for name in listing if SHARD_NAME.fullmatch(name))
    pin = read_pins().get("base_data", {})
    if ours:
        val = last_shard()
    elif pin.get("repo") == hub.repo:
        val = pin["file"]  # as it was: shards that have been added since do not move it
    else:
        val = max(shards, default="")
    train = [name for name in shards if name != val]
    if not train:
        found = ", ".join(sorted(listing)[:8]) or "nothing"
        raise UserError(
            f"--repo={hub.repo} holds no files shard_00000.parquet, shard_00001.parquet and so on; "
            f"found {found}"
        )
    names = [val, *(train if num_files == -1 else train[:num_files])]
    return {name: listing.get(name, Remote()) for name in names}, val


def claim_folder(folder: Path, repo: str, files: dict[str, Remote], val: str) -> None:
    """Records which data set base_data/ holds and which of its files is validation.

    Raises UserError rather than mix two data sets."""
    pins = read_pins()
    there = [path for path in folder.glob("*.parquet") if SHARD_NAME.fullmatch(path.name)]
    owner = pins.get("base_data", {}).get("repo", DEFAULT_REPO) if there else repo
    strange = [
        path.name
        for path in there
        if path.name in files and files[path.name].size not in (None, path.stat().st_size)
    ]
    primer = get_base_dir() / "primer.json"
    sizes = read_json(primer)["files"] if there and primer.exists() else {}
    if any(sizes.get(f"{folder.name}/{path.name}") == path.stat().st_size for path in there):
        owner = "the primer"
    if owner != repo:
        raise UserError(
            f"{folder} holds shards of {owner}; those of {repo} must not mix with them. Move them "
            "away, or use another NANOCHAT_BASE_DIR"
        )
    if strange:
        raise UserError(
            f"{folder} holds {', '.join(strange[:5])} of another size than {repo} has: from "
            "elsewhere, or damaged. Move them away, or use another NANOCHAT_BASE_DIR"
        )
    pin = {"file": val, "by_hash": False, "repo": repo}
    if pins.get("base_data") != pin:  # of many tasks at once, most find it there
        pins["base_data"] = pin
        write_json(pins_path(), pins)
