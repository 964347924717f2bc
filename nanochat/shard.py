"""
Models that do not fit on one device: weights, gradients and optimizer state in shares, with FSDP2.

PyTorch's fully_shard (Zhao et al. 2023, arXiv 2304.11277; docs.pytorch.org, torch.distributed.fsdp)
leaves each rank some rows of every parameter. A block's weights come together just before it
computes, and are given up after it; its gradients are summed to the ranks that hold the rows. With
--shard=fsdp the rows are shared out over all ranks; with hsdp over the ranks of a node, whose links
are fast, and every node has a copy, so that only gradients cross the network between them; each
node then takes the optimizer's step by itself, on its own copy of the state.

Shares are float32, as are the sums of gradients over ranks and micro-batches. Where products are
computed in bfloat16 (or float16), a block's weights are rounded before they travel instead of after
it, which halves what is sent and leaves the products what they are. Embedding and head travel in
float32: what is looked up is not rounded, nor are sums over all tokens.

    model = build_sharded(config, info, "fsdp")      # no values yet: load_weights or init_sharded
    init_sharded(model, seed)                        # the values that one process would draw
    with gathered(model):                            # whole on every rank, for evaluations
        ...

The model keeps its class, names and methods. Its losses are divided by the tokens of all ranks, so
gradients are summed, not averaged. Floor 1.5.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.overrides import TorchFunctionMode

from nanochat.common import UserError
from nanochat.distributed import DistInfo, local, local_rows
from nanochat.flags import TrainFlags
from nanochat.models import ARCHITECTURES, Config, arch_of, build_model
from nanochat.precision import choose_precision
from nanochat.recompute import Mode, blocks_of, recompute


def shard_size(shard: str, world_size: int, asked: int = -1) -> int:
    """Over how many ranks --shard shares out the weights. `asked` is --shard_size; -1: for hsdp the
    ranks of a node. UserError if copies of that size do not fill the world."""
    if shard not in ("fsdp", "hsdp"):
        return 1
    if shard == "fsdp":
        return world_size
    size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if asked < 1 else asked
    if world_size % size:
        raise UserError(
            f"--shard=hsdp: {world_size} ranks are no whole number of copies shared out over "
            f"{size}; set --shard_size to a divisor, or use --shard=fsdp"
        )
    return size


def build_for(
    args: TrainFlags, config: Config, info: DistInfo, mode: Mode, seed: int | None = None
) -> Any:
    """A model to train as --shard says (settled: not auto), with recompute's `mode`; with a seed
    new weights, else none yet. All ranks must call it."""
    size = shard_size(args.shard, info.world_size, args.shard_size)
    if size == 1:
        return build_model(config, info.device, seed=seed)
    dtype = choose_precision(args.dtype, info.device).dtype
    model = build_sharded(config, info, size, mode, dtype)
    if seed is not None:
        init_sharded(model, seed)
    return model


def make_mesh(device_type: str, world_size: int, size: int) -> DeviceMesh:
    """All ranks in one row; or, if weights are shared out over fewer, a row for each copy of them:
    consecutive ranks, as torchrun numbers those of a node."""
    if size == world_size:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device_type, (world_size // size, size), mesh_dim_names=("replicate", "shard")
    )


def build_sharded(
    config: Config,
    info: DistInfo,
    size: int,
    mode: Mode = "none",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A model whose weights are shared out over `size` ranks, without values: no rank ever holds
    all of it. `mode` of recompute cannot be changed later. `dtype`: what matrix products are
    computed in. All ranks must call it."""
    mesh = make_mesh(info.device.type, info.world_size, size)
    return _build(config, mesh, info.device, mode, dtype)


def _build(
    config: Config, mesh: DeviceMesh, device: torch.device, mode: Mode, dtype: torch.dtype
) -> Any:
    # Here, as importing it takes a second that runs without it need not spend
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Of losses by token, which are views: nothing here changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    with torch.device("meta"):
        model = ARCHITECTURES[arch_of(config)][0](config)
    recompute(model, mode)
    rounded = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the residual stream stays float32, as in one process
    )
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=rounded)
    fully_shard(model, mesh=mesh)
    model.gathered_dtype = dtype
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        # Without this the factor 1 is a kind of reduction of its own, which gloo lacks
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    model.rotary.fill()
    return model


def sharded_modules(model: nn.Module) -> list[Any]:
    """The parts of a model whose weights come together at once, itself first; [] if it is whole."""
    return [m for m in model.modules() if hasattr(m, "unshard")]


def twin(model: Any) -> Any:
    """A sharded model of the same weights."""
    p = next(model.parameters())
    copy = _build(model.config, p.device_mesh, local(p).device, "none", model.gathered_dtype)
    with torch.no_grad():
        for new, old in zip(copy.parameters(), model.parameters()):
            local(new.detach()).copy_(local(old.detach()))
    return copy


class _Whole(TorchFunctionMode):
    """What fills a sharded tensor fills a whole one on the CPU, of which this rank's rows are kept:
    the same draws in the same order as in one process, with one tensor at a time in memory."""

    FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        target: Any = args[0] if args else None
        if func not in self.FILLS or not hasattr(target, "device_mesh"):
            return func(*args, **(kwargs or {}))
        whole = torch.empty(target.shape, dtype=target.dtype)
        func(whole, *args[1:], **(kwargs or {}))
        local(target.detach()).copy_(whole[slice(*local_rows(target))])
        return target


def init_sharded(model: Any, seed: int) -> None:
    """New weights: to the bit those of build_model(config, seed=seed)."""
    with torch.no_grad(), _Whole():
        model.init_weights(torch.Generator().manual_seed(seed))


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Within it the model is whole on every rank, which may run any number of forward passes, or
    none: nothing is sent. No training step and no save in here. A model that is not sharded, or
    gathered already, stays as it is. All ranks must enter it."""
    parts = sharded_modules(model)
    if not parts or getattr(model, "is_gathered", False):
        yield
        return
    # FSDP's hooks would take note of each forward pass, and fetch weights ahead by those notes in
    # the next backward pass: which hangs where ranks have run unequal numbers of them
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    model.is_gathered = True
    try:
        for part in parts:
            part.unshard()
            part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for part, (before, after) in zip(parts, hooks):
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()
        model.is_gathered = False
