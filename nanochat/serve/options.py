"""
The flags of a chat server, and what they mean: who may ask, how much, on which devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import torch

from nanochat import flags
from nanochat.common import UserError, warn0
from nanochat.serve.guard import LOOPBACK_NAMES, Access
from nanochat.serve.limits import Limits


@dataclass
class ServeFlags(Limits, flags.PrecisionFlags):
    """What scripts.chat_web may be told."""

    source: Annotated[flags.Source, flags.alias("-i")] = "sft"
    """Stage whose checkpoint is served."""
    model_tag: Annotated[str | None, flags.alias("-g")] = None
    """Which model of that stage, for example d20; default: the newest."""
    step: Annotated[int | None, flags.alias("-s")] = None
    """Which checkpoint of that model; default: the last."""
    host: str = "127.0.0.1"
    """Address to listen on. The default answers this machine alone, 0.0.0.0 everyone."""
    port: Annotated[int, flags.alias("-p")] = 8000
    """Port to listen on; 0 picks a free one."""
    shutdown_timeout: float = 30.0
    """Seconds that replies under way get after Ctrl-C."""
    workers: int = 0
    """Copies of the model, each with a thread; 0: one on each GPU, one on a CPU."""
    quantize: Literal["none", "bfloat16", "int8"] = "none"
    """Round weights for memory and speed. bfloat16: all matrices to 16 bits (on a CPU, computing in
    float32; what was 16 bits already is held so anyway). int8: those of the layers to 8 bits."""
    decoding: Literal["auto", "plain", "compiled", "graph"] = "auto"
    """How a step of decoding is run: as it is written, compiled, for which the first start with a
    model takes longer (README says what it is worth on a CPU), or compiled and captured as a CUDA
    graph. auto: graph on CUDA, else plain."""
    tools: Literal["calculator", "python", "none"] = "calculator"
    """What the model's tool calls may do. python: programs, in a sandbox."""
    api_key: str = ""
    """Key that requests must carry. Others on this machine can see it: --api_key_file hides it."""
    api_key_file: str = ""
    """File with that key."""
    cors_origins: list[str] = field(default_factory=list)
    """Web pages elsewhere that may use the API, as https://example.org."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Names that the server answers to. Default: on a loopback address its names, else any."""


def access_of(args: ServeFlags) -> Access:
    """Who may ask: the key, the names of this server, pages elsewhere."""
    key = args.api_key
    if args.api_key_file:
        if key:
            raise UserError("--api_key and --api_key_file: give one of them")
        try:
            key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--api_key_file={args.api_key_file}: {e}") from e
        if not key:
            raise UserError(f"--api_key_file={args.api_key_file} is empty; write the key into it")
    if not key.isascii():
        raise UserError("the API key must be ASCII: it travels in a header")
    is_loopback = args.host in LOOPBACK_NAMES or args.host.startswith("127.")
    if not is_loopback and not key:
        warn0(
            f"--host={args.host}: whoever reaches this machine may use the model; "
            "--api_key_file=FILE asks for a key"
        )
    hosts = [*args.allowed_hosts, *((*LOOPBACK_NAMES, args.host) if is_loopback else ())]
    origins = [origin.rstrip("/").lower() for origin in args.cors_origins]
    return Access(key or None, [h.lower() for h in hosts] or None, origins)


def devices_of(args: ServeFlags, first: torch.device) -> list[torch.device]:
    """Where the workers compute. UserError if there are not as many."""
    if args.workers < 0:
        raise UserError(f"--workers={args.workers}: use a positive number, or 0 for one a GPU")
    if first.type != "cuda":
        return [first] * max(1, args.workers)
    there = torch.cuda.device_count()
    if args.workers > there:
        raise UserError(f"--workers={args.workers}: this machine shows {there} GPUs")
    return [torch.device("cuda", i) for i in range(args.workers or there)]


def limits_of(args: ServeFlags, context: int) -> Limits:
    """How much may be asked of a model with that context, in tokens."""
    if args.max_context > context:
        raise UserError(f"--max_context={args.max_context}: the model's is {context} tokens")
    limits = Limits(**{flag.name: getattr(args, flag.name) for flag in fields(Limits)})
    limits.max_context = args.max_context or context
    return limits


def step_of(args: ServeFlags, device: torch.device) -> str:
    """How Engine is to run a step of decoding."""
    usual = "graph" if device.type == "cuda" else "plain"
    return usual if args.decoding == "auto" else args.decoding
