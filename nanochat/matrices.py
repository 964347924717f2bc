"""
Matrices of which every rank has a part, though Muon must see each of them whole.

Every rank keeps and updates the momentum of its parts. Each matrix then comes together with one
rank, its owner, which orthogonalizes it, and goes back in parts: two exchanges a bucket.

    ShardedMatrices   with fsdp and hsdp, which leave some rows of each matrix on each rank
    CutMatrices       with zero, where there are too few matrices of a shape to give every rank one:
                      communication.Owned would fill up the stretches of the others with padding

Floor 1.75.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.communication import (
    Bucket,
    Divided,
    Held,
    Ranks,
    Sharded,
    flat,
    grad_of,
    row_parts,
    whole_slots,
)
from nanochat.distributed import shard_rows


class Matrices(Divided):
    """Matrices of one shape (R, C), of which every rank holds a stretch, and each of which has an
    owner that sees it whole. `bounds`: first element and one past the last of each rank's stretch.

    to_owners() and to_shards() start a transfer of the stretches of all n matrices that this rank
    holds, or of the (k, R, C) whole ones that it owns; at_owner() and at_shards() wait for it."""

    def __init__(
        self,
        params: dict[str, Tensor],
        ranks: Ranks,
        load: list[int],
        bounds: Callable[[torch.Size], list[tuple[int, int]]],
    ) -> None:
        sizes = {name: p.numel() for name, p in params.items()}
        slots = whole_slots(sizes, ranks.size, load)
        order = [name for slot in slots for name, _, _ in slot]  # what an owner gets is together
        super().__init__({name: params[name] for name in order}, ranks)
        self.names = order
        self.owner = {name: rank for rank, slot in enumerate(slots) for name, _, _ in slot}
        self.owned = [name for name in order if self.owner[name] == ranks.rank]
        self.shape = next(iter(params.values())).shape
        self._bounds = bounds(self.shape)
        self._lengths = [high - low for low, high in self._bounds]
        self._sent = [len(slot) * self._lengths[ranks.rank] for slot in slots]
        self._received = [len(self.owned) * length for length in self._lengths]
        self._buffers = (torch.empty(0), torch.empty(0))

    def to_owners(self, parts: Tensor) -> None:
        self.grads = []  # parts are made of them
        self._move(parts.reshape(-1), self._received, self._sent)

    def at_owner(self) -> Tensor:
        """(k, R, C): the whole matrices that this rank owns; k may be 0."""
        pieces = self._come().split(self._received)
        of_rank = [p.view(len(self.owned), length) for p, length in zip(pieces, self._lengths)]
        return torch.cat(of_rank, dim=1).view(len(self.owned), *self.shape)

    def to_shards(self, whole: Tensor) -> None:
        pieces = whole.flatten(1).split(self._lengths, dim=1)
        self._move(torch.cat([piece.reshape(-1) for piece in pieces]), self._sent, self._received)

    def at_shards(self) -> Tensor:
        """(n, ...): this rank's stretches of all matrices, shaped and in order as its weights."""
        return self._come().view(len(self.names), *self.weights[0].shape)

    def _move(self, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        received = sent.new_empty(sum(received_sizes))
        self._buffers = (sent, received)  # held until it is over
        self._works = [self.ranks.all_to_all(received, sent, received_sizes, sent_sizes)]

    def _come(self) -> Tensor:
        Bucket.wait(self)
        received = self._buffers[1]
        self._buffers = (torch.empty(0), torch.empty(0))
        return received

    def num_held(self) -> list[int]:
        return [len(self.names) * length for length in self._lengths]

    def held(self, name: str, entry: str, shape: Sequence[int]) -> list[Held]:
        if entry == "neuron_moment":
            return [Held(self.owner[name], 0, math.prod(shape))]
        return [Held(rank, *bounds) for rank, bounds in enumerate(self._bounds)]


class ShardedMatrices(Matrices, Sharded):
    """Those of which FSDP leaves some rows on each rank."""

    def __init__(self, params: dict[str, Tensor], ranks: Ranks, load: list[int]) -> None:
        Matrices.__init__(
            self, params, ranks, load,
            lambda shape: [(h.start, h.stop) for h in row_parts(shape, ranks.size)],
        )  # fmt: skip

    def local_shape(self, name: str, part: Held, shape: Sequence[int]) -> list[int]:
        if part.stop - part.start == math.prod(shape):
            return list(shape)
        return super().local_shape(name, part, shape)


class CutMatrices(Matrices):
    """Those that are whole on every rank (zero), cut into as many equal stretches as there are
    ranks, wherever these end: nothing is padded but for the last element or so."""

    def __init__(self, params: dict[str, Tensor], ranks: Ranks, load: list[int]) -> None:
        size = ranks.size
        super().__init__(
            params, ranks, load,
            lambda shape: [shard_rows(shape.numel(), rank, size) for rank in range(size)],
        )  # fmt: skip
        low, high = self._bounds[ranks.rank]
        self.weights = [flat(p)[low:high] for p in self.params.values()]
        self._each = self._lengths[0]  # the longest
        self._buffer = self._arrived = torch.empty(0)

    def reduce(self) -> None:
        grads = torch.stack([grad_of(p).reshape(-1) for p in self.params.values()])
        for p in self.params.values():
            p.grad = None
        n, size = len(grads), self.ranks.size
        padded = F.pad(grads, (0, size * self._each - grads.size(1)))
        self._buffer = padded.view(n, size, self._each).transpose(0, 1).flatten()
        self._arrived = self._buffer.new_empty(n * self._each)
        self._works = [self.ranks.reduce_scatter(self._arrived, self._buffer)]

    def wait(self) -> None:
        super().wait()
        self._buffer = torch.empty(0)
        mine = self._arrived.view(-1, self._each)[:, : self._lengths[self.ranks.rank]]
        self.grads = list(mine.unbind())
        self._arrived = torch.empty(0)

    def give_back(self) -> None:
        mine = torch.stack(self.weights)
        mine = F.pad(mine, (0, self._each - mine.size(1))).flatten()
        self._buffer = mine.new_empty(self.ranks.size * len(mine))
        self._works = [self.ranks.all_gather(self._buffer, mine)]

    def finish(self) -> None:
        super().wait()
        pieces = self._buffer.view(self.ranks.size, -1, self._each)
        whole = pieces.transpose(0, 1).flatten(1)[:, : self.shape.numel()]
        torch._foreach_copy_([flat(p) for p in self.params.values()], list(whole.unbind()))
        self._buffer = torch.empty(0)


def pays_to_cut(num_matrices: int, ranks: int) -> bool:
    """Whether matrices of one shape are to be cut (CutMatrices) instead of each going whole to its
    owner (Owned): if the busiest rank sends a quarter less. Below that two transfers more, each of
    which takes its time however little it carries, are not worth it. Never with one rank."""
    most = -(-num_matrices // ranks)
    whole = 2 * ranks * most  # matrices, padding included: to the owners and back
    # What is cut travels once more, from all ranks to the owners, which send it back
    cut = 2 * num_matrices + num_matrices / ranks + most
    return whole > 1.25 * cut
