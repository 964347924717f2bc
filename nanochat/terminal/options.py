"""
The flags of the chat in the terminal, and how replies are chosen by them. Floor 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nanochat import flags
from nanochat.common import UserError
from nanochat.sampling import Sampling


@dataclass
class TerminalFlags(flags.PrecisionFlags):
    """What scripts.chat_cli may be told."""

    source: Annotated[flags.Source, flags.alias("-i")] = "sft"
    """Stage whose checkpoint is used."""
    model_tag: Annotated[str | None, flags.alias("-g")] = None
    """Which model of that stage, for example d20; default: the newest."""
    step: Annotated[int | None, flags.alias("-s")] = None
    """Which checkpoint of that model; default: the last."""
    prompt: Annotated[str, flags.alias("-p")] = ""
    """Answer this and exit; empty: what comes through a pipe, or a conversation."""
    json: bool = False
    """Print one answer as a JSON object: text, parts, tokens, seconds, reason, ..."""
    system: str = ""
    """A system message."""
    temperature: Annotated[float, flags.alias("-t")] = 0.6
    """How freely tokens are chosen; 0: always the likeliest."""
    top_k: Annotated[int, flags.alias("-k")] = 50
    """Sample among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Sample among tokens at least this many times as probable as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: what was said already becomes less likely."""
    max_new_tokens: Annotated[int, flags.alias("-m")] = 256
    """Longest reply, in tokens."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End a reply before this text; may be given several times."""
    seed: int = 42
    """Seed of the sampling: the same conversation gets the same replies."""
    tools: Literal["calculator", "python", "none"] = "calculator"
    """What the model's tool calls may do. python: programs, in a sandbox."""
    quantize: Literal["none", "bfloat16", "int8"] = "none"
    """Round weights for memory and speed. bfloat16: all matrices to 16 bits (on a CPU, computing in
    float32; what was 16 bits already is held so anyway). int8: those of the layers to 8 bits."""
    decoding: Literal["plain", "compiled"] = "plain"
    """How a step of decoding is run: as it is written, or compiled, for which the first start with
    a model takes longer. README says what it is worth on a CPU."""


def sampling_of(args: TerminalFlags) -> Sampling:
    """How replies are chosen. UserError names the flag whose value means nothing."""
    sampling = Sampling(
        max_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k or None,
        top_p=args.top_p, min_p=args.min_p, repetition_penalty=args.repetition_penalty,
        seed=args.seed, stop=args.stop,
    )  # fmt: skip
    try:
        sampling.check()
    except UserError as e:
        raise UserError("--" + str(e).replace("max_tokens", "max_new_tokens")) from e
    return sampling
