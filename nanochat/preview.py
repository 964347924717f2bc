"""
What would be trained on, before anything is: `--preview` of every training script.

A few decoded rows with what is trained on marked (green on a terminal, between ⟦ and ⟧ elsewhere),
and where the data goes: shares of a mixture, what is kept, cropped and dropped, and why. Floor 4.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nanochat.common import print0
from nanochat.dataloader import IGNORE, ConversationSource, RowReader, TextSource
from nanochat.dataset import TextFiles
from nanochat.tasks.common import Task
from nanochat.tasks.mixture import TaskMixture

NUM_ROWS = 3
LONGEST = 400  # characters of a stretch that are shown; the middle of longer ones is left out
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


# -------------------------------------------------------------------------------------------------
# Rows


def mark(tokenizer: Any, ids: Sequence[int], trained: Sequence[int]) -> str:
    """The text of a row in which the stretches that are trained on are marked.

    A stretch ends where a document does: `bos` begins the next."""
    bos = tokenizer.get_bos_token_id()
    color = sys.stdout.isatty()
    start, end = (GREEN, PLAIN) if color else ("⟦", "⟧")
    shown = []
    document = 0  # number of the document that a token belongs to
    kinds = []
    for id, is_trained in zip(ids, trained, strict=True):
        document += id == bos
        kinds.append((document, bool(is_trained) and id != bos))
    at = 0
    for (_, is_trained), stretch in itertools.groupby(kinds):
        length = len(list(stretch))
        text = shorten(tokenizer.decode(ids[at : at + length]))
        shown.append(f"{start}{text}{end}" if is_trained else text)
        at += length
    return "".join(shown)
