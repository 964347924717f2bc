"""
How causal attention is computed: the back ends, and which of them is taken.

    choose_attention("cuda", torch.bfloat16, head_dim=128)                # before compiling: probes
    choose_attention("cuda", torch.bfloat16, head_dim=128, window=1024)   # once for each window
    y = attend(q, k, v, window)                                           # layers.attention does

A back end is taken if it runs here and its outputs and gradients are those of plain arithmetic in
float32. Heads that nobody chose for get PyTorch's own scaled_dot_product_attention (SDPA), which
every device has. Layout of all tensors: (B, T, H or K, E); letters: see layers.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.common import UserError, print0, warn0

# Of SDPA's kernels the fastest first (on Hopper cuDNN's is as fast as FA3). One that cannot take
# some shape later on leaves it to those after it.
SDPA_ORDER = {
    "cudnn": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "math": [SDPBackend.MATH],
}
WANTED = ("auto", "fa3", "sdpa", "flex", "math")

# What was chosen, by (device type, dtype, head width, window). Read while compiling, so plain data.
_chosen: dict[tuple[str, torch.dtype, int, int | None], str] = {}


def choose_attention(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None = None,
    groups: int = 1,
    wanted: str = "auto",
) -> str:
    """Chooses the back end for such heads, says so once, and returns its name.

    dtype is that of the matmuls (autocast's); `groups` is query heads to a key head. `wanted` other
    than "auto" must work: UserError with the reason if it does not. Call it before torch.compile:
    probing cannot be part of a graph."""
    if wanted not in WANTED:
        raise UserError(f"--attention={wanted} is not known; choose one of {', '.join(WANTED)}")
    device = torch.device(device)
    key = (device.type, dtype, head_dim, window)
    if key in _chosen and wanted == "auto":
        return _chosen[key]
    names = _candidates(device.type, window, wanted)
    if not names:
        raise UserError(
            f"--attention={wanted} needs CUDA, the device is {device.type}; use --attention=auto"
        )
    missing = []
    for name in names:
        reason = _why_not(name, device, dtype, head_dim, window, groups)
        if reason is None:
            break
        missing.append(f"{name}: {reason}")
    else:
        if wanted != "auto":
            raise UserError(
                f"--attention={wanted} does not work here ({'; '.join(missing)}); "
                "use --attention=auto"
            )
        name = "sdpa"
    _chosen[key] = name
    what = f"heads of {head_dim}" + (f", window {window}" if window else "")
    line = f"attention: {name} for {str(dtype).removeprefix('torch.')}, {what}"
    failed = [m for m in missing if not m.endswith(NOT_INSTALLED)]
    if failed:
        warn0(f"{line} (failed its probe: {'; '.join(failed)})")
    elif device.type == "cuda":
        print0(line + (f" ({'; '.join(missing)})" if missing else ""))
    return name


def choose_for(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Chooses a back end for each attention window that a model of ours has."""
    config = model.config
    windows = {m.window for m in model.modules() if isinstance(getattr(m, "window", None), int)}
    groups = config.n_head // config.n_kv_head
    for window in [None, *sorted(windows)]:
        choose_attention(device, dtype, config.n_embd // config.n_head, window, groups)


def _candidates(device_type: str, window: int | None, wanted: str) -> list[str]:
    """Names to try, best first. "sdpa" is PyTorch's own choice, with a mask for a window."""
    if device_type != "cuda":
        return {"auto": ["sdpa"], "sdpa": ["sdpa"], "math": ["math"]}.get(wanted, [])
    sdpa = ["cudnn", "flash", "efficient", "math"] if window is None else ["sdpa", "math"]
    if wanted == "auto":
        return ["fa3", *sdpa] if window is None else ["fa3", "flex", *sdpa]
    return sdpa if wanted == "sdpa" else [wanted]


# ---- probing

NOT_INSTALLED = "not installed"
# A window that is one too long or too short changes an output by about 1/sqrt(window) of itself: 3%
# at 1,024. Rounding to bfloat16 changes it by less than 1%.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 0.015, 0.05


def _why_not(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None,
    groups: int,
) -> str | None:
    """None if the back end works, else the reason in a few words."""
    if name == "sdpa":
        return None  # PyTorch's own choice: there is nothing to fall back to
    if name == "fa3" and importlib.util.find_spec("flash_attn_interface") is None:
        return NOT_INSTALLED
    try:
        return _difference(_for_probe(name), device, dtype, head_dim, window, groups)
    except Exception as e:  # a foreign kernel may raise anything, and the next one is tried
        text = str(e).strip()
        return f"{type(e).__name__} {text.splitlines()[0][:120]}" if text else type(e).__name__


def _for_probe(name: str) -> Callable[..., Tensor]:
    """The back end as it will be used: FA3 and flex in a compiled model, SDPA's kernels alone."""
    if name in ("fa3", "flex"):
        return torch.compile(partial(_run, name), fullgraph=True, dynamic=False)
    return partial(_run, name, alone=True)


def _difference(
    run: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None,
    groups: int,
) -> str | None:
    """Compares outputs and gradients on a small input that is longer than the window."""
    T = 256 if window is None else 128 * (window // 128 + 2)
    generator = torch.Generator().manual_seed(0)  # leaves the run's own stream alone
    q, k, v, above = (
        torch.randn(1, T, heads, head_dim, generator=generator).to(device, dtype)
        for heads in (2 * groups, 2, 2, 2 * groups)
    )
    results = []
    for function, wide in ((partial(_run, "math"), torch.float32), (run, dtype)):
        leaves = [t.detach().to(wide).requires_grad_() for t in (q, k, v)]
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            y = function(*leaves, window)
            grads = torch.autograd.grad(y, leaves, above.to(y.dtype))
        results.append([t.detach().float() for t in (y, *grads)])
    (expected, *expected_grads), (found, *found_grads) = results
    off = (found - expected).norm(dim=-1) / expected.norm(dim=-1)  # (1, T, H): of each output
    if not float(off.max()) <= OUTPUT_TOLERANCE:  # `not <=` catches NaN too
        return f"wrong outputs, off by {float(off.max()):.2g} of themselves"
    # With a window of 1 nothing depends on q and k: what is left there is rounding, beside v's.
    least = 0.01 * expected_grads[2].norm()
    for which, a, b in zip("qkv", found_grads, expected_grads):
        error = float((a - b).norm() / torch.maximum(b.norm(), least))
        if not error <= GRADIENT_TOLERANCE:
            return f"wrong gradient in {which}, off by {error:.2g} of itself"
    return None


# ---- the back ends


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention from the start of the rows, grouped when K < H: (B, T, H, E), (B, T, K, E)
    twice -> (B, T, H, E). `window`: how many positions a token sees, its own included."""
    if window is not None and window >= q.size(1):
        window = None
    device = q.device.type
    dtype = autocast_dtype(device) or q.dtype
    name = _chosen.get((device, dtype, q.size(3), window), "sdpa")
    if name in ("fa3", "flex"):  # autocast does not know these
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return _run(name, q, k, v, window)


def _run(
    name: str, q: Tensor, k: Tensor, v: Tensor, window: int | None, alone: bool = False
) -> Tensor:
    """One back end. `alone`: no other of SDPA's kernels may step in, else it fails."""
    if name == "fa3":
        return _fa3(q, k, v, window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, E)
    grouped = q.size(1) != k.size(1)
    if name == "flex" and window is not None and torch.compiler.is_compiling():
        # Not compiled, flex makes all scores, so a plain module (evaluation) takes SDPA below.
        return _flex(q, k, v, window, grouped).transpose(1, 2)
    if name == "efficient" and grouped:  # this kernel wants as many key heads as query heads
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
        grouped = False
    if window is None:
        sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=grouped)
    elif q.size(2) > 2 * window:
        sdpa = partial(_in_blocks, q, k, v, window, grouped)
    else:
        mask = window_mask(q.size(2), window, q.device)
        sdpa = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, enable_gqa=grouped)
    if name not in SDPA_ORDER:
        return sdpa().transpose(1, 2)
    order = SDPA_ORDER[name]
    with sdpa_kernel(order[:1] if alone else order, set_priority=True):
        return sdpa().transpose(1, 2)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast multiplies in here; None if it is off, or unknown to the device (meta)."""
    if device_type not in ("cpu", "cuda", "mps", "xpu") or not torch.is_autocast_enabled(
        device_type
    ):
        return None
    return torch.get_autocast_dtype(device_type)


def window_mask(T: int, window: int, device: torch.device | str | None = None) -> Tensor:
    """(T, T): True where the token of a row may look at that of a column, itself included."""
    at = torch.arange(T, device=device)
    distance = at[:, None] - at  # (T, T): how far back
    return (distance >= 0) & (distance < window)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, grouped: bool) -> Tensor:
    """A window as blocks of its length: queries of one block meet the keys of their own and of the
    one before, so the work grows with T * 2 * window and not with T * T. (B, H or K, T, E)"""
    B, T = q.size(0), q.size(2)
    n = -(-T // window)  # blocks; the last one is filled up with zeros, which nobody sees
    q, k, v = (F.pad(t, (0, 0, 0, n * window - T)) for t in (q, k, v))

    def blocks(t: Tensor) -> Tensor:  # (B, K, n * W, E) -> (B * n, K, W, E)
        return t.unflatten(2, (n, window)).transpose(1, 2).flatten(0, 1)

    def with_previous(t: Tensor) -> Tensor:  # (B, K, n * W, E) -> (B * n, K, 2 * W, E)
        before = F.pad(t, (0, 0, window, 0))[:, :, :-window]
        return torch.cat((blocks(before), blocks(t)), dim=2)

    at = torch.arange(window, device=q.device)[:, None]
    other = torch.arange(2 * window, device=q.device)  # window is at the block's beginning
    visible = (other > at) & (other <= at + window)  # (W, 2W)
    first = torch.arange(n, device=q.device)[:, None, None] == 0
    mask = visible & ~(first & (other < window))  # (n, W, 2W): nothing stands before the first
    mask = mask.repeat(B, 1, 1).unsqueeze(1)  # (B * n, 1, W, 2W)
    y = F.scaled_dot_product_attention(
        blocks(q), with_previous(k), with_previous(v), attn_mask=mask, enable_gqa=grouped
    )  # (B * n, H, W, E)
    return y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]


def _fa3(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """FlashAttention-3 (arXiv 2407.08608), from its own package. Its window counts what is to the
    left of a token, without itself."""
    from flash_attn_interface import flash_attn_func

    left_right = (-1, -1) if window is None else (window - 1, 0)
    out: Any = flash_attn_func(q, k, v, causal=True, window_size=left_right)
    return out[0] if isinstance(out, tuple) else out  # older versions return the log-sum-exp too


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int, grouped: bool) -> Tensor:
    """Flex attention: blocks of keys that no query of a block sees are never read."""
    # Imported here: it makes torch load its compiler.
    from torch.nn.attention.flex_attention import flex_attention

    blocks = window_blocks(q.size(2), window, q.device)
    out: Any = flex_attention(q, k, v, block_mask=blocks, enable_gqa=grouped)
    return out


def window_blocks(T: int, window: int, device: torch.device | str, size: int = 128) -> Any:
    """Flex attention's map of the blocks (BlockMask) that a window sees in part, and as a whole.

    Worked out, not by create_block_mask, which asks about every pair of positions and changes what
    calls do while it does: the compiler cannot have that in what is recomputed (checkpoint)."""
    from torch.nn.attention.flex_attention import BlockMask

    def visible(_b: Tensor, _h: Tensor, at: Tensor, other: Tensor) -> Tensor:
        return (other <= at) & (other > at - window)

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:  # how many for each query block, which
        blocks = blocks.int()[None, None]
        order = blocks.argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32), order.int()

    first = torch.arange(-(-T // size), device=device) * size  # position of each block
    at, other = first[:, None], first
    some = (other <= at) & (other + size - 1 > at - window)
    whole = (other + size - 1 <= at) & (other > at + size - 1 - window)
    return BlockMask.from_kv_blocks(
        *ordered(some & ~whole), *ordered(whole), BLOCK_SIZE=size, mask_mod=visible,
        seq_lengths=(T, T),
    )  # fmt: skip
