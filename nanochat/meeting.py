"""
How ranks find one another: in a store, under a name that no earlier meeting there had.

torchrun keeps one store for all its restarts, and what earlier ranks left in it, such as the
address of a rank that is dead, misleads those that come after. So nobody trusts what is in the
store until it answers what they have just written: each rank leaves a word of its own, rank 0 lists
the words that it has seen beside the name of the meeting, and who finds its own word there has
found this rank 0 and none before it. Floor 0.75.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from nanochat.common import UserError


def connect(timeout: float, serve: bool = False) -> dist.TCPStore:
    """A connection of its own to the store at MASTER_ADDR:MASTER_PORT; with `serve` the store too,
    unless torchrun has one there. Its calls wait so many seconds."""
    serve &= os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serve,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
    )


def meet(rank: int, world_size: int, timeout: float) -> tuple[dist.Store, str]:
    """(store, name of the meeting), when all ranks have come.

    UserError if one has not after `timeout` seconds: rank 0 says which."""
    store = connect(timeout, serve=rank == 0)
    word, offer = uuid.uuid4().hex, "nanochat/offer"
    store.set(f"nanochat/word/{rank}", word)
    until = time.monotonic() + timeout
    others = range(1, world_size)
    while time.monotonic() < until:
        if rank == 0:
            coming = [r for r in others if not store.check([f"nanochat/{word}/{r}/here"])]
            if not coming:
                return store, word
            keys = [f"nanochat/word/{r}" for r in coming]
            words = [store.get(key).decode() for key in keys if store.check([key])]
            store.set(offer, json.dumps([word, words]))
        elif store.check([offer]):
            name, words = json.loads(store.get(offer))
            if word in words:
                store.set(f"nanochat/{name}/{rank}/here", "")
                return store, name
        time.sleep(0.02)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    missing = f"rank {', '.join(map(str, coming))}" if rank == 0 else "rank 0"
    raise UserError(
        f"{missing} of {world_size} did not come to {place}, where the ranks meet, within "
        f"{timeout:g} s (--rank_timeout). Look at what its host says"
    )
