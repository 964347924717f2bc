"""
How fast replies are written, beside transformers' generate with the same exported model.

    python -m bench.decode_speed
    python -m bench.decode_speed --models=8/8192 --batches 1 4
    python -m bench.decode_speed --device_type=cuda --size=qwen2.5-0.5b --steps graph

A random model of each architecture is exported and loaded by transformers (NanoChatForCausalLM,
Qwen2ForCausalLM); both write the same number of tokens, always the likeliest, from the same
prompts, and the share of equal tokens is told. Ours is a scheduler (nanochat/scheduler.py) over the
model made ready to serve (nanochat/serving.py), once for each of --steps. In float32 on a CPU,
in bfloat16 on a GPU. The rounds alternate, the medians count. What int8 weights cost is told in
bits per byte, beside the same rows in float32: of a model that has learned this repository's texts
for a minute. The matrix products of a token are timed alone too: an engine that did nothing else
would be "most" times as fast as transformers, which is what the same weights in the same precision
allow. The result goes to bench/results/decode_speed.json.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import surroundings
from bench.bpe_common import RESULTS
from nanochat import flags
from nanochat.common import UserError, print0, write_json
from nanochat.engine import Engine
from nanochat.hf_export import export_model
from nanochat.models import ARCHITECTURES, build_model, make_config
from nanochat.sampling import Sampling
from nanochat.scheduler import Scheduler
from nanochat.serving import make_ready
from nanochat.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parent.parent


@dataclass
class Args:
    """Compare our speed of decoding with transformers'."""

    device_type: str = "cpu"
    """cpu or cuda."""
    models: str = "3/1536, 4/8192, 8/8192"
    """Depth and vocabulary of each, of both architectures; the first is what speedrun.sh trains on
    a CPU. The tokenizers are trained on this repository's texts."""
    size: str = ""
    """A named size (qwen2.5-0.5b, vocabulary 8,192) in place of --models."""
    prompt_tokens: int = 48
    """Length of the prompts."""
    new_tokens: int = 128
    """Length of the replies."""
    weights: list[str] = field(default_factory=lambda: ["bfloat16", "float32"])
    """What the exported weights are: scripts.hf_export writes bfloat16 unless told otherwise. On a
    CPU both engines compute in float32."""
    batches: list[int] = field(default_factory=lambda: [1, 16])
    """Rows that are written at once."""
    rounds: int = 5
    """Alternating rounds; the first is not counted."""
    threads: int = 0
    """Threads of a CPU, theirs and ours; 0: one for each core."""
    steps: list[str] = field(default_factory=lambda: ["plain", "compiled"])
    """How ours decodes a token: plain, compiled, or on CUDA graph; a line for each."""
    quality_steps: int = 150
    """Training steps of the model that int8 is judged by; 0: int8 is not judged."""
    peer: bool = True
    """Whether transformers runs too."""
    out: str = str(RESULTS / "decode_speed.json")
    """File for the result; empty: none."""


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """Learned from this repository's own texts."""
    paths = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/**/*.py")])
    return Tokenizer.train((p.read_text(encoding="utf-8") for p in paths), vocab_size)


def random_model(
    arch: str, depth: int, args: Args, vocab_size: int, device: torch.device, weights: str
) -> Any:
    """A model in which every parameter matters: none is zero or one."""
    length = max(1024, args.prompt_tokens + args.new_tokens)
    config, _ = make_config(arch, depth, vocab_size, length)
    model = build_model(config, device, seed=1).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, device=device)
            if weights == "bfloat16":
                p.copy_(p.bfloat16())
    return model


def peer_of(folder: Path, device: torch.device) -> Any:
    """transformers' generate for the exported folder: (B, T) prompts -> new ids."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    twin.generation_config.eos_token_id = None  # every reply runs to its full length

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        idx = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            out = twin.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=new_tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return out[:, idx.size(1) :].tolist()

    return generate


def seconds(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    gc.collect()
    started = time.perf_counter()
    ids = run()  # lists on the host: the device has finished
    return time.perf_counter() - started, ids


def ours_of(engine: Engine, batch: int, new_tokens: int) -> Callable[[Any], list[list[int]]]:
    """A scheduler for that many rows: prompts -> new ids."""
    scheduler = Scheduler(engine, max_batch=batch)
    sampling = Sampling(max_tokens=new_tokens, temperature=0.0)

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        requests = [scheduler.add(prompt, sampling)[0] for prompt in prompts]
        while scheduler.running or scheduler.waiting:
            scheduler.step()
        return [request.tokens for request in requests]

    return generate


def products_of(model: Any, batch: int, new_tokens: int) -> Callable[[Any], list[list[int]]]:
    """The matrix products of so many tokens in each row, and nothing else."""
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if getattr(model, "lm_head", None) is None:  # the embedding is the head
        weights.append(model.head_weight)
    inputs = [weight.new_ones(batch, weight.size(1)) for weight in weights]

    @torch.inference_mode()
    def run(prompts: Any) -> list[list[int]]:
        for _ in range(new_tokens):
            for x, weight in zip(inputs, weights):
                torch.nn.functional.linear(x, weight)
        if weights[0].is_cuda:
            torch.cuda.synchronize()
        return []

    return run


def compare(
    arch: str, depth: int, weights: str, args: Args, tokenizer: Tokenizer, folder: Path
) -> list[dict[str, Any]]:
    """A line for each batch size and step of one model."""
    device = torch.device(args.device_type)
    model = random_model(arch, depth, args, tokenizer.get_vocab_size(), device, weights)
    peer = None
    if args.peer:
        export_model(folder, model, tokenizer, chat=True, card="", dtype=weights)
        peer = peer_of(folder, device)
    ready = make_ready(model, torch.bfloat16 if device.type == "cuda" else None)
    engines = {}
    for step in args.steps:
        engines[step] = Engine(ready, tokenizer, tools="none", step=step)
        engines[step].stops = set()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch in args.batches:
        prompts = torch.randint(
            0, 256, (batch, args.prompt_tokens), generator=generator
        ).tolist()  # bytes: any text begins like this
        writers = {step: ours_of(e, batch, args.new_tokens) for step, e in engines.items()}
        if peer is not None:
            writers["transformers"] = lambda prompts, peer=peer: peer(prompts, args.new_tokens)
            writers["products"] = products_of(model, batch, args.new_tokens)
        taken: dict[str, list[float]] = {name: [] for name in writers}
        ids: dict[str, list[list[int]]] = {}
        for _ in range(args.rounds):
            for name, write in writers.items():
                once, ids[name] = seconds(lambda write=write, prompts=prompts: write(prompts))
                taken[name].append(once)
        for step in args.steps:
            row = {
                "arch": arch,
                "depth": depth,
                "vocab_size": tokenizer.get_vocab_size(),
                "weights": weights,
                "batch": batch,
                "step": step,
                "parameters": sum(p.numel() for p in model.parameters()),
                "ours_tokens_per_second": _rate(batch, args, taken[step]),
            }
            if peer is not None:
                theirs = taken["transformers"]
                pairs = zip(ids[step], ids["transformers"])
                same = [a == b for x, y in pairs for a, b in zip(x, y)]
                row |= {
                    "transformers_tokens_per_second": _rate(batch, args, theirs),
                    "times": statistics.median(theirs[1:]) / statistics.median(taken[step][1:]),
                    "most": statistics.median(theirs[1:])
                    / statistics.median(taken["products"][1:]),
                    "equal_tokens": sum(same) / len(same),
                }
            said = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print0(" ".join(said))
            rows.append(row)
    return rows


def int8_quality(arch: str, depth: int, args: Args, tokenizer: Tokenizer) -> dict[str, Any]:
    """Bits per byte of float32 and int8 weights on the same rows, which training did not see."""
    device, T = torch.device(args.device_type), 128
    config, _ = make_config(arch, depth, tokenizer.get_vocab_size(), T)
    model = build_model(config, device, seed=1)
    paths = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/**/*.py")])
    documents = tokenizer.encode([p.read_text(encoding="utf-8") for p in paths])
    train, held_out = (
        torch.tensor([id for i, ids in enumerate(documents) if (i % 10 == 0) == last for id in ids])
        for last in (False, True)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(args.quality_steps):
        at = torch.randint(0, len(train) - T - 1, (8, 1), generator=generator)
        rows = train[at + torch.arange(T + 1)].to(device)
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = held_out[: len(held_out) // (T + 1) * (T + 1)].view(-1, T + 1)[:200].to(device)
    size = int(torch.as_tensor(tokenizer.token_bytes)[rows[:, 1:].cpu()].sum())
    bits = {}
    for name in ("none", "int8"):
        ready = make_ready(model, quantize=name, pack=False)  # what is packed has no losses
        with torch.inference_mode():
            nats = sum(float(ready(r[:, :-1], r[:, 1:], reduction="sum")) for r in rows.split(20))
        bits[name] = nats / size / math.log(2)
    found = {
        "arch": arch,
        "float32_bits_per_byte": bits["none"],
        "int8_bits_per_byte": bits["int8"],
        "increase": bits["int8"] / bits["none"] - 1,
        "rows": len(rows),
    }
    print0(f"{arch}: {bits['none']:.4f} bits per byte in float32, {bits['int8']:.4f} in int8")
    return found


def _rate(batch: int, args: Args, taken: list[float]) -> float:
    """Tokens per second, of the median of the rounds that count."""
    return batch * args.new_tokens / statistics.median(taken[1:])


def main(args: Args) -> None:
    load = os.getloadavg()[0]
    if args.rounds < 2:
        raise UserError(f"--rounds={args.rounds} must be at least 2: the first is not counted")
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    elif args.device_type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    sizes = [tuple(map(int, words.split("/"))) for words in args.models.split(",")]
    tokenizer = functools.cache(tokenizer_of)
    models = [("gpt", *size) for size in sizes] + [("qwen2.5", *size) for size in sizes]
    rows: list[dict[str, Any]] = []
    for arch, depth, vocab_size in [(args.size, 0, 8192)] if args.size else models:
        for weights in args.weights:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "model"
                rows += compare(arch, depth, weights, args, tokenizer(vocab_size), out)
    quality = [
        int8_quality(arch, 4, args, tokenizer(8192))
        for arch in (ARCHITECTURES if args.quality_steps else ())
    ]
    if args.out:
        asked = {k: v for k, v in vars(args).items() if k != "out"}
        about = {"args": asked, "threads": torch.get_num_threads()}
        write_json(args.out, {**about, "rows": rows, "int8": quality, **surroundings(load)})
        print0(f"wrote {args.out}")


if __name__ == "__main__":
    flags.run(main, Args)
