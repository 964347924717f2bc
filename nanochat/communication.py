"""
How gradients reach the ranks that update, and how weights come back: the optimizer's other half.

A bucket is some parameters that travel together. The optimizer starts the reductions of all of
them, waits for each in turn, updates this rank's parts and starts their way back, and waits once at
the end. What a rank's parts are is what --shard chooses:

    Bucket    every rank has all of every parameter (none; one rank alone)
    Owned     weights are everywhere, each element is updated by one rank (zero): a bucket is laid
              out as one stretch of memory for each rank, equally long, padded with zeros, so that
              one reduce-scatter and one all-gather move it. Matrices go whole to one rank, anything
              else is cut wherever the stretches end: exactly balanced.
    Sharded   a rank holds some rows of each parameter and its gradient (fsdp, hsdp; see shard.py):
              nothing is reduced or spread

Matrices of which every rank has a part, though one must see them whole: nanochat/matrices.py.

Who has what is a pure function of shapes and ranks, so all agree without a word. Floor 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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
        self.grads = [grad_of(p) for p in self.params.values()]
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
            self._slots = whole_slots(sizes, ranks.size, load)
        else:
            self._slots = _cut_slots(sizes, ranks.size)
        lengths = self.num_held()
        self._chunk = max(lengths)  # elements of a rank's stretch
        # One parameter that fills the stretches travels as it lies
        self._direct = len(params) == 1 and min(lengths) == self._chunk
        mine = self._slots[ranks.rank]
        self.names = [name for name, _, _ in mine]
        self.weights = [
            params[n].detach() if stop - start == sizes[n] else flat(params[n])[start:stop]
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
        grads = {name: grad_of(p).reshape(-1) for name, p in self.params.items()}
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
        mine = self._laid_out([self._slots[self.ranks.rank]], lambda n: flat(self.params[n]))
        if self._direct:
            self._buffer = next(flat(p) for p in self.params.values())
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
                    into.append(flat(self.params[name])[start:stop])
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


def whole_slots(sizes: dict[str, int], num_ranks: int, load: list[int]) -> list[Any]:
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

    def reduce(self) -> None:
        # At every step: FSDP of torch 2.9 moves weights of uneven shares at the first pass
        self.weights = [local(p.detach()) for p in self.params.values()]
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


def flat(p: Tensor) -> Tensor:
    return p.detach().view(-1)


def grad_of(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad
