"""
How a token is chosen: what a request may ask for, and the choice itself, many rows at once.

    choice = Choice([Sampling(temperature=0.7, top_p=0.9), Sampling(temperature=0)], vocab_size)
    tokens = choice(logits, uniforms)                 # (R, V), R numbers in [0, 1) -> (R,)

A row's token depends on its logits, its own settings and its own random number, never on who shares
the batch: the choice inverts the cumulative distribution. Rows that choose in the same way are
computed together; nothing is read back from the device here. The order of the steps, and what each
does, is that of Hugging Face's generate: repetition penalty (Keskar et al. 2019, arXiv 1909.05858),
temperature, top-k, top-p (Holtzman et al. 2020, arXiv 1904.09751), min-p (Nguyen et al. 2024,
arXiv 2407.01082). Floor 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.common import UserError

MAX_ALTERNATIVES = 20  # likeliest tokens that a request may ask to see at each place
NUCLEUS = 1024  # tokens that top-p looks at before it sorts a whole vocabulary


@dataclass(frozen=True)
class Sampling:
    """What a request may choose. check() before use."""

    max_tokens: int = 256
    """Tokens of the reply at most, tool output included."""
    temperature: float = 1.0
    """Logits are divided by it; 0: always the likeliest."""
    top_k: int | None = None
    """Only among the k likeliest; None or 0: all."""
    top_p: float = 1.0
    """Only among the likeliest that together have this probability."""
    min_p: float = 0.0
    """Only tokens at least this many times as probable as the likeliest."""
    repetition_penalty: float = 1.0
    """Makes every token of prompt and reply less likely if above 1, in transformers' way."""
    seed: int = 42
    stop: tuple[str, ...] = ()
    """The reply ends before the first of these; they are not part of it."""
    logprobs: int | None = None
    """None: none; n: each token's log-probability, and the n likeliest tokens with theirs."""

    def check(self) -> None:
        """UserError that names the field whose value means nothing."""
        wrong = {
            "max_tokens": self.max_tokens < 1,
            "temperature": not 0 <= self.temperature < math.inf,
            "top_k": self.top_k is not None and self.top_k < 0,
            "top_p": not 0 < self.top_p <= 1,
            "min_p": not 0 <= self.min_p <= 1,
            "repetition_penalty": not 0 < self.repetition_penalty < math.inf,
            "logprobs": self.logprobs is not None and not 0 <= self.logprobs <= MAX_ALTERNATIVES,
            "stop": not all(isinstance(s, str) and s for s in self.stop),
        }
        allowed = {
            "max_tokens": "at least 1",
            "temperature": "0 (always the likeliest) or more",
            "top_k": "0 (all) or more",
            "top_p": "above 0 and at most 1",
            "min_p": "from 0 to 1",
            "repetition_penalty": "above 0; 1 changes nothing",
            "logprobs": f"from 0 to {MAX_ALTERNATIVES}",
            "stop": "strings that are not empty",
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise UserError(f"{name}={getattr(self, name)!r} must be {allowed[name]}")


@dataclass(frozen=True)
class _Group:
    """Rows that choose in the same way."""

    kind: str  # "greedy", "all", "likeliest k", "nucleus"
    k: int
    rows: Tensor | None  # (r,) or None: all of them
    temperature: Tensor | None  # (r, 1); None: 1 for all
    top_p: Tensor | None
    min_p: Tensor | None


class Choice:
    """Chooses a token for each row of a batch, each by its own settings."""

    def __init__(
        self,
        rows: Sequence[Sampling],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = device
        kinds: dict[tuple[str, int], list[int]] = {}
        for i, row in enumerate(rows):
            kinds.setdefault(_kind(row, vocab_size), []).append(i)
        self.groups = [self._group(kind, k, at, rows) for (kind, k), at in kinds.items()]
        penalties = [row.repetition_penalty for row in rows]
        self.penalty = self._column(penalties) if any(p != 1 for p in penalties) else None
        self.plainly_likeliest = self.penalty is None and set(kinds) == {("greedy", 0)}
        wanted = [row.logprobs for row in rows if row.logprobs is not None]
        self.alternatives = min(max(wanted), vocab_size) if wanted else None

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

    def _group(self, kind: str, k: int, at: list[int], rows: Sequence[Sampling]) -> _Group:
        mine = [rows[i] for i in at]

        def column(values: list[float], nothing: float) -> Tensor | None:
            return None if all(v == nothing for v in values) else self._column(values)

        return _Group(
            kind,
            k,
            None if len(at) == len(rows) else torch.tensor(at, device=self.device),
            column([row.temperature for row in mine], 1.0),
            column([row.top_p for row in mine], 1.0),
            column([row.min_p for row in mine], 0.0),
        )

    def __call__(
        self, logits: Tensor, uniforms: Sequence[float], seen: Tensor | None = None
    ) -> Tensor:
        """(R, V) logits -> (R,) tokens. `uniforms` are R numbers in [0, 1); `seen`, (R, V), is
        True where a row's text has the token, and is needed if a row has a repetition penalty."""
        if self.penalty is not None and seen is not None:
            logits = penalised(logits.float(), seen, self.penalty)
        if len(self.groups) == 1 and self.groups[0].kind == "greedy":
            return _likeliest(logits)
        # float32 rounds a number close to 1 up to 1, which would point past the last token.
        u = torch.tensor(uniforms, dtype=torch.float32).clamp_(max=1 - 2**-24)[:, None]
        u = u.to(self.device, non_blocking=True)
        if len(self.groups) == 1:
            return _choose(self.groups[0], logits, u)
        tokens = torch.empty(logits.size(0), dtype=torch.int64, device=logits.device)
        for group in self.groups:
            tokens[group.rows] = _choose(group, logits[group.rows], u[group.rows])
        return tokens

    def on_host(
        self, logits: Tensor, uniforms: Sequence[float], seen: Tensor | None = None
    ) -> list[int]:
        """The same as numbers. On a CPU every operation between two steps of a small model is felt,
        so the likeliest tokens take a short way."""
        if self.plainly_likeliest and logits.device.type == "cpu":
            return logits.numpy().argmax(-1).tolist()
        return self(logits, uniforms, seen).tolist()


def _kind(row: Sampling, vocab_size: int) -> tuple[str, int]:
    if row.temperature <= 0:
        return "greedy", 0
    if row.top_k is not None and 0 < row.top_k < vocab_size:
        return "likeliest k", row.top_k
    return ("all" if row.top_p >= 1 else "nucleus"), 0


def penalised(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Logits of seen tokens made smaller: positive ones divided, negative ones multiplied."""
    less = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, less, logits)


def _likeliest(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":  # NumPy finds it ten times as fast; ties: the first, too
        return torch.from_numpy(logits.float().numpy().argmax(-1))
    return logits.argmax(-1)


def _choose(group: _Group, logits: Tensor, u: Tensor) -> Tensor:
    """The choice of one group: (r, V) logits, (r, 1) uniform numbers -> (r,) tokens."""
    if group.kind == "greedy":
        return _likeliest(logits)
    logits, ids = logits.float(), None
    if group.temperature is not None:
        logits = logits / group.temperature
    if group.kind == "likeliest k":
        logits, ids = logits.topk(group.k, dim=-1)  # (r, k): from here on nothing else exists
    probs = logits.softmax(-1)
    if group.kind == "nucleus":
        probs, ids = _nucleus(probs, group.top_p)
    if ids is not None and group.top_p is not None:
        # Kept while those before have less than top_p; so the likeliest is always kept.
        probs = probs * (probs.cumsum(-1) - probs < group.top_p)
    if group.min_p is not None:
        probs = probs * (probs >= group.min_p * probs.amax(-1, keepdim=True))
    cdf = probs.cumsum(-1)  # (r, V or k)
    # right=True finds the first entry above u: never a token of probability zero.
    chosen = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)  # (r, 1)
    chosen = chosen.clamp(max=cdf.size(-1) - 1)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


def _nucleus(probs: Tensor, top_p: Tensor | None) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, falling, with their ids: at least as many as top-p keeps."""
    if probs.device.type != "cpu" or top_p is None or probs.size(-1) <= NUCLEUS:
        return probs.sort(dim=-1, descending=True, stable=True)
    # Sorting everything takes ten times as long. (On a GPU it is asking that costs a sync.)
    best, ids = probs.topk(NUCLEUS, dim=-1)
    enough = best.cumsum(-1)[:, -1:] >= top_p  # (r, 1)
    if bool(enough.all()):
        return best, ids
    best, sorted_ids = probs.sort(dim=-1, descending=True, stable=True)
    # Among equals topk has an order of its own, which must not depend on the other rows
    sorted_ids[:, :NUCLEUS] = ids.where(enough, sorted_ids[:, :NUCLEUS])
    return best, sorted_ids


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of one token for each row: (R, V), (R,) -> (R,), at temperature 1 and
    among all V: what a model that is trained on the token is told, whatever it was sampled with."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def likeliest(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(R, n) log-probabilities, falling, and the tokens that have them."""
    values, ids = logits.float().topk(n, dim=-1)
    return values - logits.float().logsumexp(-1, keepdim=True), ids
