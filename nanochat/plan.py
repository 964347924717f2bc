"""
What a training step takes in memory, and the micro-batch that fits.

    settle()          before anything large is allocated: estimate, table, choice, or refusal
    memory_advice()   what would fit instead, each with the memory it takes

An estimate is a training step of the real code without numbers (nanochat/training_trace.py), so it
holds for an architecture, loss or optimizer that was added since. The micro-batch decides speed and
memory only: results do not depend on it. Floor 2.5.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nanochat.common import UserError, print0
from nanochat.communication import PretendRanks, PretendShare
from nanochat.compiling import choose_compile
from nanochat.distributed import DistInfo, sum_over_ranks
from nanochat.flags import TrainFlags
from nanochat.lora import add_lora, lora_optimizer
from nanochat.machine import free_memory
from nanochat.models import ARCHITECTURES, Config, arch_of
from nanochat.optim import MuonAdamW, ParamGroup, make_optimizer
from nanochat.precision import choose_precision
from nanochat.recompute import MODES, Mode, blocks_of, recompute
from nanochat.shard import shard_size
from nanochat.training_trace import TrainingTrace

# What a CUDA process takes besides its tensors: context and kernels (0.3 to 0.5 GB on recent
# drivers), cuBLAS's workspaces, and what the allocator cannot use of its blocks.
CUDA_RESERVE = 900_000_000
# Without a GPU a micro-batch of this many tokens keeps the activations of a layer in the caches,
# and is enough for the matrix products to run at full speed.
CPU_MICRO_BATCH_TOKENS = 2048
# More than this many tokens make a GPU no faster, and evaluations take as many.
GPU_MICRO_BATCH_TOKENS = 65_536
# With fewer, a GPU's matrix products are too thin: recomputing activations costs less than that.
SENSIBLE_TOKENS = 4096

# Rows of the table, and the parts of the trace that each of them adds up.
ROWS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "optimizer state": ("optimizer",),
    "activations": ("activations", "bf16 copies of weights"),
    "logits and loss": ("logits",),
    "workspace": ("workspace", "workspace of the optimizer"),
}


@dataclass(frozen=True)
class Setup:
    """Where and how a step runs, as far as memory depends on it."""

    device_type: str = "cuda"
    bf16: bool = True  # autocast
    compiled: bool = True
    world_size: int = 1
    lora_rank: int = 0
    shard: str = "zero"
    shard_size: int = 1  # ranks over which fsdp and hsdp share out one copy


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, at the fullest moment of the micro-batch and of the optimizer's step."""

    batch: int
    length: int
    mode: Mode
    micro_batch: dict[str, int]
    optimizer_step: dict[str, int]

    @property
    def fullest(self) -> dict[str, int]:
        """Bytes by part at the fuller of the two moments."""
        return max(self.micro_batch, self.optimizer_step, key=lambda parts: sum(parts.values()))

    @property
    def total(self) -> int:
        """Peak in bytes."""
        return sum(self.fullest.values())

    def table(self) -> str:
        """Rows for people, in GB (10^9 bytes)."""
        moments = (self.micro_batch, self.optimizer_step)
        lines = [f"{'memory of one rank, GB':<24}{'micro-batch':>12}{'optimizer':>12}"]
        for name, parts in ROWS.items():
            sizes = [sum(moment.get(part, 0) for part in parts) for moment in moments]
            lines.append(f"  {name:<22}" + "".join(f"{gb(size):>12}" for size in sizes))
        sums = [gb(sum(moment.values())) for moment in moments]
        lines.append(f"  {'together':<22}" + "".join(f"{text:>12}" for text in sums))
        return "\n".join(lines)


def gb(size: float) -> str:
    """Bytes as GB, with as many digits as matter."""
    return f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.2f}"


@dataclass
class Planner:
    """Estimates for one model in one setup; what was computed once is kept."""

    config: Config
    setup: Setup
    rows: int  # of a step on one rank
    _found: dict[Any, Memory] = field(default_factory=dict, init=False)
    _trace: TrainingTrace | None = field(default=None, init=False)

    def memory(self, batch: int, mode: Mode = "none", length: int | None = None) -> Memory:
        """Of a step with `batch` rows in a micro-batch. About a second for 20 layers."""
        key = (batch, mode, length)
        if key not in self._found:
            length = length or self.config.sequence_len
            trace = self._trace = self._trace or self._start()
            trace.accumulates = self.rows > batch
            recompute(trace.model, mode)
            parts = trace.micro_batch(batch, length)
            if self.is_sharded:
                parts = {**parts, **self._come_and_go(trace)}
                parts["optimizer"] = trace.optimizer_parts.get("optimizer", 0)
            self._found[key] = Memory(batch, length, mode, parts, trace.optimizer_parts)
        return self._found[key]

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds shares of the weights."""
        return self.setup.shard in ("fsdp", "hsdp") and self.setup.shard_size > 1

    def _start(self) -> TrainingTrace:
        with torch.device("meta"):
            model = ARCHITECTURES[arch_of(self.config)][0](self.config)
        frozen = list(model.parameters()) if self.setup.lora_rank else []
        if self.setup.lora_rank:
            add_lora(model, self.setup.lora_rank, alpha=1.0)
            groups = lora_optimizer(model, 1.0).groups
        else:
            groups = make_optimizer(model, 1.0, 1.0, 1.0).groups  # rates take no memory
        setup, shares = self.setup, []
        if self.is_sharded:
            shares = [PretendShare(p, setup.shard_size) for p in frozen]
            for group in [] if frozen else groups:  # LoRA's matrices are whole on every rank
                of_group: Any = {
                    n: PretendShare(p, setup.shard_size) for n, p in group.params.items()
                }
                group.params = of_group
                shares += of_group.values()
        if self.is_sharded and setup.bf16:  # so rounded come those together that FSDP holds
            shared = {id(p) for p in frozen or model.parameters()}
            for p in [p for block in blocks_of(model) for p in block.parameters()]:
                if id(p) in shared:
                    p.data = p.data.to(torch.bfloat16)
        if self.is_sharded and not frozen:
            optimizer = MuonAdamW(groups, ranks=PretendRanks(0, setup.shard_size))
        else:
            optimizer = _of_fullest_rank(groups, setup.shard, setup.world_size)
        return TrainingTrace(
            model,
            optimizer,
            bf16=setup.bf16,
            on_cuda=setup.device_type == "cuda",
            compiled=setup.compiled,
            shares=shares,
        )

    def _come_and_go(self, trace: TrainingTrace) -> dict[str, int]:
        """Bytes of sharded weights and gradients in a micro-batch: a rank's own rows, and what is
        whole at the fullest moment. Embedding and head are so from the first block to the end, a
        block's weights while it computes and the next one's come, each from a buffer of its own."""
        blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(trace.model)]
        outside = sum(p.nbytes for p in trace.model.parameters()) - sum(blocks)
        # Gradients are as their weights, and are summed over the ranks in float32
        summed = [
            sum(4 * p.numel() for p in block.parameters()) for block in blocks_of(trace.model)
        ]
        own = sum(share.held.nbytes for share in trace.shares)
        held = {"weights": own + outside + 3 * max(blocks)}
        if not self.setup.lora_rank:  # whose gradients are whole on every rank
            held["gradients"] = own + 2 * outside + max(blocks) + max(summed)
        return held

    def weights(self) -> int:
        """Bytes of a copy of the weights on one rank."""
        with torch.device("meta"):
            model = ARCHITECTURES[arch_of(self.config)][0](self.config)
        size = self.setup.shard_size if self.is_sharded else 1
        return sum(p.nbytes for p in model.parameters()) // size

    def sizes(self, most_tokens: int, length: int | None = None) -> list[int]:
        """Micro-batches that divide the rows of a step, up to that many tokens; at least 1."""
        most = max(1, most_tokens // (length or self.config.sequence_len))
        return [size for size in range(1, min(most, self.rows) + 1) if self.rows % size == 0]

    def largest(
        self, limit: int, most_tokens: int, mode: Mode, length: int | None = None
    ) -> Memory | None:
        """The largest of those sizes that fits into `limit` bytes; None if none does."""
        sizes = self.sizes(most_tokens, length)
        if (memory := self.memory(sizes[-1], mode, length)).total <= limit:
            return memory  # nearly always on a CPU
        low, high = 0, len(sizes) - 1  # sizes[:low] fit, sizes[high:] do not
        while low < high:
            middle = (low + high) // 2
            fits = self.memory(sizes[middle], mode, length).total <= limit
            low, high = (middle + 1, high) if fits else (low, middle)
        return self.memory(sizes[low - 1], mode, length) if low else None

    def choose(
        self, limit: int, most_tokens: int, modes: tuple[Mode, ...], length: int | None = None
    ) -> Memory | None:
        """The first mode in which a micro-batch fits that keeps the device busy, and the largest
        micro-batch then; if there is none, the mode that fits the largest. None: nothing fits."""
        best: Memory | None = None
        for mode in modes:
            found = self.largest(limit, most_tokens, mode, length)
            if found is not None and (best is None or found.batch > best.batch):
                best = found
            if best and best.batch * best.length >= min(
                SENSIBLE_TOKENS, self.sizes(most_tokens, length)[-1] * best.length
            ):
                break
        return best


def _of_fullest_rank(groups: list[ParamGroup], shard: str, world_size: int) -> MuonAdamW:
    """The optimizer as that rank has it which owns the most among so many."""
    optimizer = MuonAdamW(groups, shard, PretendRanks(0, world_size))
    held = [sum(of_rank) for of_rank in zip(*(b.num_held() for _, b in optimizer.buckets))]
    return MuonAdamW(groups, shard, PretendRanks(held.index(max(held)), world_size))


# -------------------------------------------------------------------------------------------------
# What fits


def setup_of(info: DistInfo, args: TrainFlags, fixed_rows: bool = True) -> Setup:
    """The setup of this process: how --dtype and --compile will have it compute. `fixed_rows`: of
    one length, unlike RL's."""
    half = choose_precision(args.dtype, info.device).dtype != torch.float32
    compiled = choose_compile(args.compile, info.device, 0.0, fixed_rows).on
    rank = getattr(args, "lora_rank", 0)  # not every stage has it
    return Setup(info.device.type, half, compiled, info.world_size, rank)


def usable_memory(info: DistInfo) -> int:
    """Bytes that tensors may take on this rank's device: the least over all ranks, so that all of
    them choose alike. What this process holds already counts as free: the estimate includes it."""
    device = info.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        usable = free - CUDA_RESERVE
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks on this machine
        room = free_memory()
        usable = sys.maxsize if room is None else room // here  # None: it cannot be known
    of_rank = [0] * info.world_size
    of_rank[info.rank] = usable
    return int(min(sum_over_ranks(*of_rank, device=device)))


def candidates(args: TrainFlags, setup: Setup, node: int | None = None) -> list[Setup]:
    """What --shard may mean, in order: what was asked for; or all copies whole, and then, for
    models that do not fit, weights in shares over the ranks of a node or of the only one. `node`:
    ranks of a node; None: as torchrun has it here."""
    world = setup.world_size
    if world == 1:
        return [replace(setup, shard="none")]
    wanted: list[str] = [args.shard]
    if args.shard == "auto":
        here = node or int(os.environ.get("LOCAL_WORLD_SIZE", world))
        wanted = ["zero", "fsdp" if here == world else "hsdp"]
    asked = args.shard_size if args.shard_size > 0 else node or -1
    return [
        replace(setup, shard=name, shard_size=shard_size(name, world, asked)) for name in wanted
    ]


def settle(
    args: TrainFlags,
    config: Config,
    info: DistInfo,
    rows_per_step: int,
    length: int,
    setup: Setup | None = None,
    copies: int = 1,
    fixed_rows: bool = True,
) -> tuple[int, Mode]:
    """(rows of a micro-batch, mode of recompute) for this run, before it allocates, and in
    args.shard what the ranks share out.

    rows_per_step over all ranks, rows of `length` tokens (`fixed_rows`: all of them, else at most);
    `copies` of the weights are kept. Prints the table of the estimate. A UserError says what there
    is, what is missing and what would fit. All ranks must call it."""
    setup = setup or setup_of(info, args, fixed_rows)
    rows = max(1, rows_per_step // info.world_size)
    whole = replace(config, sequence_len=max(length, config.sequence_len))
    planners = [Planner(whole, each, rows) for each in candidates(args, setup)]
    modes = modes_of(args)
    most = GPU_MICRO_BATCH_TOKENS if setup.device_type == "cuda" else CPU_MICRO_BATCH_TOKENS
    limit = usable_memory(info)
    asked = args.device_batch_size if args.device_batch_size != "auto" else None
    for planner in planners:
        room = limit - (copies - 1) * planner.weights()
        memory = fitting(planner, args, room, most, length)
        if memory is not None:
            break
    else:
        raise UserError(refusal(planner, room, asked, modes, length))
    print0(
        f"{memory.table()}\n{gb(limit)} GB can be used; micro-batch: {memory.batch} row(s) of "
        f"{length} tokens, --activation_checkpointing={memory.mode}"
    )
    if info.world_size > 1:
        why = "as it says" if args.shard != "auto" else "all fits on each rank"
        if len(planners) > 1 and planner is not planners[0]:
            least = planners[0].memory(1, modes[-1], length).total
            why = f"--shard={planners[0].setup.shard} would take at least {gb(least)} GB"
        print0(f"--shard={planner.setup.shard}: {why}")
    args.shard = planner.setup.shard  # type: ignore[assignment]
    return memory.batch, memory.mode


def modes_of(args: TrainFlags) -> tuple[Mode, ...]:
    """What --activation_checkpointing lets be recomputed, the least first."""
    asked = args.activation_checkpointing
    return MODES if asked == "auto" else (asked,)


def fitting(
    planner: Planner, args: TrainFlags, limit: int, most_tokens: int, length: int
) -> Memory | None:
    """What fits into `limit` bytes with the micro-batch and recomputing that the flags ask for, or
    leave open; None if nothing does."""
    modes = modes_of(args)
    if args.device_batch_size == "auto":
        return planner.choose(limit, most_tokens, modes, length)
    found = (planner.memory(args.device_batch_size, mode, length) for mode in modes)
    return next((memory for memory in found if memory.total <= limit), None)


# -------------------------------------------------------------------------------------------------
# What would fit instead


def refusal(
    planner: Planner, limit: int, asked: int | None, modes: tuple[Mode, ...], length: int
) -> str:
    """Why a run cannot start, with the table, and what would."""
    memory = planner.memory(asked or 1, modes[-1], length)
    return (
        f"--device_batch_size={memory.batch} of --max_seq_len={length} takes "
        f"{gb(memory.total)} GB on each rank, with --activation_checkpointing={memory.mode}; "
        f"{gb(limit)} GB can be used\n{memory.table()}\n" + _advice(planner, limit, memory)
    )


def memory_advice(
    config: Config,
    setup: Setup,
    rows: int,
    batch: int,
    length: int,
    mode: Mode,
    limit: int,
) -> str:
    """What would fit into `limit` bytes in place of a step that did not (`rows` on a rank, `batch`
    in a micro-batch), in order of cost, each with its memory. For a run that ran out in its midst
    give the bytes that it held: what it needed was more."""
    planner = Planner(replace(config, sequence_len=max(length, config.sequence_len)), setup, rows)
    return _advice(planner, limit, planner.memory(batch, mode, length))


def _advice(planner: Planner, limit: int, now: Memory) -> str:
    changes = []
    for flags, memory in alternatives(planner, now):
        fits = memory.total <= min(limit, now.total - 1)
        changes.append(
            (fits, f"  {flags}: {gb(memory.total)} GB{'' if fits else ', still too much'}")
        )
    if not any(fits for fits, _ in changes):
        return "nothing would fit; tried were\n" + "\n".join(text for _, text in changes)
    return "what would fit, the cheapest first:\n" + "\n".join(t for fits, t in changes if fits)


def alternatives(planner: Planner, now: Memory) -> Iterator[tuple[str, Memory]]:
    """(flags, what they take) in order of their cost: a smaller micro-batch costs next to nothing,
    recomputing costs time, shorter rows and fewer layers cost quality, GPUs cost money."""
    for batch in reversed([d for d in range(1, now.batch) if planner.rows % d == 0]):
        yield f"--device_batch_size={batch}", planner.memory(batch, now.mode, now.length)
    for mode in MODES[MODES.index(now.mode) + 1 :]:
        flags = f"--device_batch_size=1 --activation_checkpointing={mode}"
        yield flags, planner.memory(1, mode, now.length)
    small = "--device_batch_size=1 --activation_checkpointing=block"
    world = planner.setup.world_size
    if world > 1 and not planner.is_sharded:
        shared = replace(planner, setup=_shared(planner.setup, "fsdp", world, world))
        yield f"{small} --shard=fsdp", shared.memory(1, "block", now.length)
    length = now.length // 2
    while length >= 256:
        yield f"{small} --max_seq_len={length}", planner.memory(1, "block", length)
        length //= 2
    for ranks in (2, 4, 8) if planner.setup.device_type == "cuda" else ():
        world = planner.setup.world_size * ranks
        wider = Planner(planner.config, planner.setup, max(1, planner.rows // ranks))
        for shard, over in (("zero", 1), ("fsdp", world)):
            wider = replace(wider, setup=_shared(planner.setup, shard, world, over))
            flags = f"{small} --shard={shard}, on {world} GPUs (torchrun --nproc_per_node)"
            yield flags, wider.memory(1, "block", now.length)
    for depth in smaller_depths(planner.config):
        config = type(planner.config).from_depth(
            depth, planner.config.vocab_size, planner.config.sequence_len
        )
        smaller = Planner(config, planner.setup, planner.rows)
        yield f"{small} --depth={depth}", smaller.memory(1, "block", now.length)


def _shared(setup: Setup, shard: str, world_size: int, size: int) -> Setup:
    return replace(setup, shard=shard, world_size=world_size, shard_size=size)


def smaller_depths(config: Config) -> list[int]:
    """Some depths below this model's, if --depth made it."""
    c = config
    if c != type(c).from_depth(c.n_layer, c.vocab_size, c.sequence_len):
        return []
    return sorted({c.n_layer * share // 4 for share in (3, 2, 1)} - {0}, reverse=True)
