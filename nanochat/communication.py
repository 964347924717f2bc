"""
How gradients reach the ranks that update, and how weights come back: the optimizer's other half.

A bucket is some parameters that travel together. The optimizer starts the reductions of all of
them, waits for each in turn, updates this rank's parts and starts their way back, and waits once at
the end. What a rank's parts are is what --shard chooses:

    Bucket    every rank has all of every parameter (none; one rank alone)
    Owned     weights are everywhere, each element is updated by one rank (zero): a bucket is laid
              out as one stretch of memory for each rank, equally long, padded with zeros, so that
              one reduce-scatter and one all-gather move it. Matrices go whole to one rank, anything
              else is cut wherever the stretches end: exactly balanced. Where ranks would get
              padding in the place of matrices, these are cut too (CutMatrices).
    Sharded   a rank holds some rows of each parameter and its gradient (fsdp, hsdp; see shard.py):
              nothing is reduced or spread (ShardedMatrices)

Of Cut- and ShardedMatrices every rank updates the momentum of its part. Each matrix then comes
together with one rank, its owner, which orthogonalizes it, and goes back in parts.

Who has what is a pure function of shapes and ranks, so all agree without a word. Floor 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nanochat.distributed import local, rank_and_world, shard_group, shard_rows


@dataclass(frozen=True)
class Held:
    """Elements start..stop of a flat tensor, which that rank holds."""

    rank: int
    start: int
    stop: int


class _Nothing:
    """A transfer that is over."""

    def wait(self) -> None:
        pass


@dataclass(frozen=True)
class Ranks:
    """The ranks that share out one copy of the training state, and our place among them. Transfers
    are started, not awaited; with one rank they are not called."""

    rank: int = 0
    size: int = 1
    group: Any = None  # a process group; None: all ranks
    has_rank0: bool = True  # whether rank 0 of the run is in it (hsdp has several such groups)

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> Ranks:
        """Those over which the first parameter is sharded, or all."""
        group = shard_group(params[0]) if params else None
        if group is None:
            return cls(*rank_and_world())
        return cls(group.rank(), group.size(), group, dist.get_global_rank(group, 0) == 0)

    def all_reduce(self, tensor: Tensor) -> Any:
        return dist.all_reduce(tensor, group=self.group, async_op=True)

    def reduce_scatter(self, mine: Tensor, all_of_it: Tensor) -> Any:
        return dist.reduce_scatter_tensor(mine, all_of_it, group=self.group, async_op=True)

    def all_gather(self, all_of_it: Tensor, mine: Tensor) -> Any:
        return dist.all_gather_into_tensor(all_of_it, mine, group=self.group, async_op=True)

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> Any:
        return dist.all_to_all_single(
            received, sent, received_sizes, sent_sizes, group=self.group, async_op=True
        )

    def to_rank0(
        self, mine: Tensor | None, held: Sequence[Held], shape: Sequence[int], like: Tensor
    ) -> Tensor | None:
        """A whole tensor of that shape, on rank 0, from the parts `held` of which `mine` is this
        rank's; None elsewhere. `like` has its type and device. All ranks of the group must call."""
        whole = like.new_empty(math.prod(shape) if self.rank == 0 else 0)
        for part in held:
            if part.start == part.stop or self.rank not in (0, part.rank):
                continue
            if part.rank == self.rank:
                assert mine is not None
                if self.rank == 0:
                    whole[part.start : part.stop] = mine.reshape(-1)
                else:
                    dist.send(mine.reshape(-1), group=self.group, group_dst=0)
            else:
                dist.recv(whole[part.start : part.stop], group=self.group, group_src=part.rank)
        return whole.view(list(shape)) if self.rank == 0 else None


class PretendRanks(Ranks):
    """Ranks that are not there: to plan what one of so many would hold."""

    def all_reduce(self, tensor: Tensor) -> Any:
        return _Nothing()

    def reduce_scatter(self, mine: Tensor, all_of_it: Tensor) -> Any:
        return _Nothing()

    def all_gather(self, all_of_it: Tensor, mine: Tensor) -> Any:
        return _Nothing()

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> Any:
        return _Nothing()


class PretendShare:
    """A parameter of which this rank would hold its first rows: as much of a DTensor as the
    optimizer asks for, without other ranks."""

    def __init__(self, p: Tensor, size: int) -> None:
        self.shape, self.ndim, self.requires_grad = p.shape, p.ndim, p.requires_grad
        self.grad: Any = None
        self.device_mesh = self
        first, last = shard_rows(len(p), 0, size)
        self.held = p.detach().new_empty((last - first, *p.shape[1:]))

    def get_group(self, dim: int) -> Any:
        return "pretended"

    def numel(self) -> int:
        return math.prod(self.shape)

    def detach(self) -> PretendShare:
        return self

    def to_local(self) -> Tensor:
        return self.held


class Bucket:
    """Parameters that are whole on every rank, which updates all of them: see the module."""

    sees_all = True  # whether every rank gets the whole gradient

    def __init__(self, params: dict[str, Tensor], ranks: Ranks) -> None:
        self.params, self.ranks = params, ranks
        self.names = list(params)  # those of which this rank updates something, in order
        self.weights = [p.detach() for p in params.values()]  # and what: views, updated in place
        self.grads: list[Tensor] = []  # the same parts of the gradients, between wait and give_back
        self._works: list[Any] = []

    def reduce(self) -> None:
        """Starts to sum the gradients over the ranks. Those that are missing are 0."""
        self.grads = [_grad(p) for p in self.params.values()]
        if self.ranks.size > 1:
            self._works = [self.ranks.all_reduce(g) for g in self.grads]

    def wait(self) -> None:
        """Until `grads` are there."""
        for work in self._works:
            work.wait()
        self._works = []

    def give_back(self) -> None:
        """Starts to send the weights that were updated to the ranks that lack them."""
        self.grads = []

    def finish(self) -> None:
        """Until all weights are there."""

    def num_held(self) -> list[int]:
        """How many elements each rank updates."""
        return [sum(p.numel() for p in self.params.values())] * self.ranks.size

    def held(self, name: str, entry: str, shape: Sequence[int]) -> list[Held]:
        """Which ranks hold what of an entry, of that shape, of the parameter's state."""
        return [Held(0, 0, math.prod(shape))]

    def part(self, name: str, entry: str, shape: Sequence[int]) -> Held | None:
        """What this rank holds of it."""
        return Held(self.ranks.rank, 0, math.prod(shape))

    def local_shape(self, name: str, part: Held, shape: Sequence[int]) -> list[int]:
        """The shape in which a rank keeps a part of an entry of that shape."""
        whole = part.stop - part.start == math.prod(shape)
        return list(shape) if whole else [part.stop - part.start]


class Divided(Bucket):
    """Parameters of which each rank updates a part."""

    sees_all = False

    def part(self, name: str, entry: str, shape: Sequence[int]) -> Held | None:
        for part in self.held(name, entry, shape):
            if part.rank == self.ranks.rank:
                return part
        return None


class Owned(Divided):
    """Parameters that are whole on every rank, each element updated by one. `load` counts the
    elements that each rank has been given so far; matrices go to those that have least."""

    def __init__(
        self, params: dict[str, Tensor], ranks: Ranks, whole: bool, load: list[int]
    ) -> None:
        super().__init__(params, ranks)
        sizes = {name: p.numel() for name, p in params.items()}
        if whole:
            self._slots = _whole_slots(sizes, ranks.size, load)
        else:
            self._slots = _cut_slots(sizes, ranks.size)
        lengths = self.num_held()
        self._chunk = max(lengths)  # elements of a rank's stretch
        # One parameter that fills the stretches travels as it lies
        self._direct = len(params) == 1 and min(lengths) == self._chunk
        mine = self._slots[ranks.rank]
        self.names = [name for name, _, _ in mine]
        self.weights = [
            params[n].detach() if stop - start == sizes[n] else _flat(params[n])[start:stop]
            for n, start, stop in mine
        ]
        self._buffer = self._arrived = torch.empty(0)

    def _laid_out(self, slots: list[Any], flat: Callable[[str], Tensor]) -> Tensor:
        """The ranks' stretches one after the other, of what `flat` gives for a name."""
        pieces = []
        for slot in slots:
            pieces += [flat(name)[start:stop] for name, start, stop in slot]
            missing = self._chunk - sum(stop - start for _, start, stop in slot)
            if missing:
                pieces.append(next(iter(self.params.values())).new_zeros(missing))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def reduce(self) -> None:
        grads = {name: _grad(p).reshape(-1) for name, p in self.params.items()}
        if self._direct:
            self._buffer = next(iter(grads.values()))
        else:
            self._buffer = self._laid_out(self._slots, grads.__getitem__)
        for p in self.params.values():
            p.grad = None  # it is in the buffer now: there must not be room for both of all buckets
        self._arrived = self._buffer.new_empty(self._chunk)
        self._works = [self.ranks.reduce_scatter(self._arrived, self._buffer)]

    def wait(self) -> None:
        super().wait()
        self._buffer = torch.empty(0)
        sizes = [w.numel() for w in self.weights]
        pieces = self._arrived[: sum(sizes)].split(sizes)
        self.grads = [piece.view(w.shape) for piece, w in zip(pieces, self.weights)]

    def give_back(self) -> None:
        self.grads, self._arrived = [], torch.empty(0)
        mine = self._laid_out([self._slots[self.ranks.rank]], lambda n: _flat(self.params[n]))
        if self._direct:
            self._buffer = next(_flat(p) for p in self.params.values())
        else:
            self._buffer = mine.new_empty(self.ranks.size * self._chunk)
        self._works = [self.ranks.all_gather(self._buffer, mine)]

    def finish(self) -> None:
        super().wait()
        if not self._direct:
            into, come = [], []
            for r, slot in enumerate(self._slots):
                at = r * self._chunk
                for name, start, stop in slot if r != self.ranks.rank else []:
                    into.append(_flat(self.params[name])[start:stop])
                    come.append(self._buffer[at : at + stop - start])
                    at += stop - start
            if into:
                torch._foreach_copy_(into, come)
        self._buffer = torch.empty(0)

    def num_held(self) -> list[int]:
        return [sum(stop - start for _, start, stop in slot) for slot in self._slots]

    def held(self, name: str, entry: str, shape: Sequence[int]) -> list[Held]:
        whole, size = self.params[name].numel(), math.prod(shape)
        # An entry that is smaller than its parameter (one number a neuron) is a whole matrix's
        return [
            Held(rank, start, stop if stop - start < whole else size)
            for rank, slot in enumerate(self._slots)
            for n, start, stop in slot
            if n == name
        ]


def _whole_slots(sizes: dict[str, int], num_ranks: int, load: list[int]) -> list[Any]:
    """(name, start, stop) for each rank, parameters of one size whole: at most one more on a rank
    than on another."""
    slots: list[Any] = [[] for _ in range(num_ranks)]
    most = -(-len(sizes) // num_ranks)
    for name, size in sizes.items():
        free = [rank for rank in range(num_ranks) if len(slots[rank]) < most]
        rank = min(free, key=load.__getitem__)
        slots[rank].append((name, 0, size))
        load[rank] += size
    return slots


def _cut_slots(sizes: dict[str, int], num_ranks: int) -> list[Any]:
    """The same, cut where the ranks' equal shares of all elements end."""
    share = -(-sum(sizes.values()) // num_ranks)
    slots: list[Any] = [[] for _ in range(num_ranks)]
    offset = 0
    for name, size in sizes.items():
        for rank in range(offset // share, num_ranks):
            start, stop = max(rank * share, offset), min((rank + 1) * share, offset + size)
            if start >= stop:
                break
            slots[rank].append((name, start - offset, stop - offset))
        offset += size
    return slots


class Sharded(Divided):
    """Parameters of which each rank holds some rows, and gets those rows of the summed gradient."""

    def __init__(self, params: dict[str, Tensor], ranks: Ranks) -> None:
        super().__init__(params, ranks)
        self.weights = [local(p.detach()) for p in params.values()]

    def reduce(self) -> None:
        self.grads = [
            torch.zeros_like(w) if p.grad is None else local(p.grad)
            for p, w in zip(self.params.values(), self.weights)
        ]

    def held(self, name: str, entry: str, shape: Sequence[int]) -> list[Held]:
        return row_parts(shape, self.ranks.size)

    def local_shape(self, name: str, part: Held, shape: Sequence[int]) -> list[int]:
        rows = (part.stop - part.start) // max(1, math.prod(shape[1:]))
        return [rows, *shape[1:]]


def row_parts(shape: Sequence[int], size: int) -> list[Held]:
    """What each of `size` ranks holds of a tensor whose rows are shared out."""
    of_row = math.prod(shape[1:])
    bounds = [shard_rows(shape[0], rank, size) for rank in range(size)]
    return [Held(rank, low * of_row, high * of_row) for rank, (low, high) in enumerate(bounds)]


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
        slots = _whole_slots(sizes, ranks.size, load)
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
        self.weights = [_flat(p)[low:high] for p in self.params.values()]
        self._each = self._lengths[0]  # the longest
        self._buffer = self._arrived = torch.empty(0)

    def reduce(self) -> None:
        grads = torch.stack([_grad(p).reshape(-1) for p in self.params.values()])
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
        torch._foreach_copy_([_flat(p) for p in self.params.values()], list(whole.unbind()))
        self._buffer = torch.empty(0)


def pays_to_cut(num_matrices: int, ranks: int) -> bool:
    """Whether matrices of one shape are to be cut (CutMatrices) instead of each going whole to its
    owner (Owned): if the busiest rank sends a quarter less. Below that two transfers more, each of
    which takes its time however little it carries, are not worth it."""
    most = -(-num_matrices // ranks)
    whole = 2 * ranks * most  # matrices, padding included: to the owners and back
    # What is cut travels once more, from all ranks to the owners, which send it back
    cut = 2 * num_matrices + num_matrices / ranks + most
    return whole > 1.25 * cut


def _flat(p: Tensor) -> Tensor:
    return p.detach().view(-1)


def _grad(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad
