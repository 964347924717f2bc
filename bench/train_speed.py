"""
How fast training is, where its time goes, and beside karpathy/nanochat.

    python -m bench.train_speed                                    # what this machine has
    python -m bench.train_speed --peer=/path/to/karpathy/nanochat  # on a CPU: the peer beside it
    python -m bench.train_speed --sizes=gpt-d12 --profile          # a table of operations, too

On a CPU: gpt and turbo at d4, rows of 512, 8,192 tokens in the vocabulary, plain and compiled, and
with memory given back after every step as the C library would (distributed.keep_memory off). The
peer is a model of equal width, layers, heads, vocabulary and tokens a step, put together as its
scripts/base_train.py does, always compiled. Each is a process of its own (train_speed_worker.py,
train_speed_peer.py), made ready first and asked in turn, round by round, so that what else the
machine does meets all alike: medians, and ratios within a round.

On a GPU: d12, 1.5 billion parameters (d30) and Qwen2.5-0.5B, one after the other, compiled: tokens
a second, share of the peak (MFU) and memory.

Where the time goes is measured by leaving parts out: whole steps, steps that do not move the
weights, and passes through the trunk alone. Results: bench/results/train_speed.json, and
train_speed_cuda.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

import numpy as np

from bench import surroundings
from bench.train_speed_worker import PARTS, make_ids
from nanochat import flags
from nanochat.common import UserError, print0, write_json
from nanochat.distributed import pick_device_type
from nanochat.models import ARCHITECTURES, SIZES, GPTConfig
from nanochat.plan import CPU_MICRO_BATCH_TOKENS
from nanochat.schedule import grad_accum_steps

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "bench" / "results"
ROUND_SECONDS = 1.5  # about what a round takes of each
OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError")


@dataclass
class Args(flags.DeviceFlags):
    """Measure training."""

    sizes: str = ""
    """gpt-d4, turbo-d12, qwen2.5-0.5b and so on, separated by commas. Default: gpt-d4,turbo-d4 on a
    CPU, gpt-d12,gpt-d30,qwen2.5-0.5b on a GPU."""
    peer: Path | None = None
    """A checkout of karpathy/nanochat of 2026, to be measured beside ours on a CPU."""
    peer_windows: str = "SSSL"
    """The peer's --window-pattern, its default; several, separated by commas, are measured each
    (its runs/runcpu.sh has L)."""
    tokens: str = ""
    """Tokens a step, separated by commas. Default: 8192,4096 on a CPU, 131072 on a GPU."""
    seq_len: int = 0
    """Tokens in a row. 0: 512 on a CPU, 1024 on a GPU."""
    vocab_size: int = 0
    """Tokens of the vocabulary, but for published sizes. 0: 8,192 on a CPU, 50,304 on a GPU."""
    device_batch_size: int = 0
    """Rows in a micro-batch of ours. 0: as auto on a CPU; on a GPU 32 (16 above a billion
    parameters), halved until it fits. The peer takes a step's rows at once, as in its runcpu.sh."""
    rounds: int = 5
    """Rounds that are measured, after two steps that are not."""
    parts: bool = True
    """Measure where the time goes."""
    profile: bool = False
    """Write torch.profiler's table of two steps of each beside the result."""
    out: str = ""
    """File for the result. Default: by device, see above."""


@dataclass(frozen=True)
class Case:
    """One thing that is measured."""

    name: str
    arch: str
    depth: int
    compile: bool = True
    keep_memory: bool = True
    window: str = ""  # the peer's; empty: ours


def parse_size(size: str) -> tuple[str, int]:
    """ "turbo-d4" -> ("turbo", 4); a published size has its depth by itself: (name, 0)."""
    if size in SIZES:
        return size, 0
    arch, _, depth = size.rpartition("-d")
    if arch in ARCHITECTURES and depth.isdecimal() and int(depth) > 0:
        return arch, int(depth)
    known = ", ".join([f"{arch}-d4" for arch in ARCHITECTURES] + list(SIZES))
    raise UserError(f"--sizes={size}: not a size; such are {known}")


def cpu_cases(sizes: Sequence[str], windows: Sequence[str]) -> list[Case]:
    """What is measured side by side on a CPU. `windows`: of the peer, at each depth, or none."""
    found = []
    for i, size in enumerate(sizes):
        arch, depth = parse_size(size)
        found.append(Case(size, arch, depth, compile=False))
        found.append(Case(f"{size} compiled", arch, depth))
        if i == 0:
            name = f"{size}, memory given back"
            found.append(Case(name, arch, depth, compile=False, keep_memory=False))
    depths = sorted({depth for _, depth in map(parse_size, sizes) if depth})
    return found + [Case(f"peer d{d} {w}", "peer", d, window=w) for d in depths for w in windows]


# -------------------------------------------------------------------------------------------------
# A process that is measured


class Ended(Exception):
    """The process is gone; what it said last."""


class Worker:
    """A process that waits for questions, and answers each by a line."""

    def __init__(self, command: list[str], base_dir: Path) -> None:
        self.log = tempfile.TemporaryFile(mode="w+", encoding="utf-8")  # noqa: SIM115 (see close)
        self.process = subprocess.Popen(
            command, cwd=REPO, env={**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def ask(self, **question: Any) -> None:
        """Sends a question; answer() has what comes of it."""
        try:
            pipe(self.process.stdin).write(json.dumps(question) + "\n")
            pipe(self.process.stdin).flush()
        except BrokenPipeError:
            pass  # answer() finds out why

    def answer(self) -> dict[str, Any]:
        """Waits for the next answer. Ended if there will be none."""
        line = pipe(self.process.stdout).readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise Ended(self.log.read()[-3000:].strip())
        return json.loads(line)

    def take(self, steps: int, part: str = "whole") -> dict[str, Any]:
        self.ask(steps=steps, part=part)
        return self.answer()

    def close(self) -> None:
        """No more questions: the process ends."""
        pipe(self.process.stdin).close()
        self.process.wait()
        pipe(self.process.stdout).close()
        self.log.close()


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def command_of(case: Case, args: Args, tokens: int, rows: int, folder: Path) -> list[str]:
    """How the process of a case is started. `rows`: of a micro-batch of ours."""
    spec: dict[str, Any] = {
        **asdict(case), "seq_len": args.seq_len, "vocab_size": args.vocab_size, "rows": rows,
        "tokens_per_step": tokens, "device_type": args.device_type,
    }  # fmt: skip
    if case.arch in SIZES:
        spec["vocab_size"] = SIZES[case.arch].vocab_size
    if not case.window:
        grad_accum_steps(tokens, rows, args.seq_len, 1)  # refuses what does not divide
        return [sys.executable, "-m", "bench.train_speed_worker", json.dumps(spec)]
    ids = folder / "ids.npy"
    if not ids.exists():
        np.save(ids, make_ids(args.vocab_size))
    shape = GPTConfig.from_depth(case.depth, args.vocab_size, args.seq_len)
    spec |= {
        "peer": str(peer_checkout(args.peer)), "window_pattern": case.window, "ids": str(ids),
        "n_embd": shape.n_embd, "n_head": shape.n_head, "rows": tokens // args.seq_len,
    }  # fmt: skip
    return [sys.executable, str(REPO / "bench" / "train_speed_peer.py"), json.dumps(spec)]


def peer_checkout(folder: Path | None) -> Path:
    """The peer's folder, if it is one."""
    assert folder is not None
    if not (folder / "nanochat" / "gpt.py").exists():
        raise UserError(f"--peer={folder} is no checkout of karpathy/nanochat: no nanochat/gpt.py")
    return folder.resolve()


# -------------------------------------------------------------------------------------------------
# Measuring


def side_by_side(cases: list[Case], args: Args, tokens: int, parts: bool) -> list[dict[str, Any]]:
    """A row of the table for each case: all made ready, then asked in turn, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        workers: list[Worker] = []
        results = []
        usual = CPU_MICRO_BATCH_TOKENS // args.seq_len  # --device_batch_size=auto
        rows = min(args.device_batch_size or usual, tokens // args.seq_len)
        for case in cases:
            command = command_of(case, args, tokens, rows, Path(folder))
            workers.append(Worker(command, Path(folder) / f"base{len(workers)}"))
        try:
            facts = [worker.answer() for worker in workers]
            for worker in workers:  # compile at the same time
                worker.ask(steps=1)
            for worker in workers:
                worker.answer()
            steps = [steps_a_round(worker.take(1)["seconds"]) for worker in workers]
            found: list[list[dict[str, Any]]] = [[] for _ in cases]
            for _ in range(args.rounds):
                for i, worker in enumerate(workers):
                    found[i].append(worker.take(steps[i]))
            for i, case in enumerate(cases):
                row = measured(case.name, tokens, steps[i], found[i], facts[i])
                if parts and not case.compile and case.keep_memory:
                    row["parts"] = time_in_parts(workers[i], args.rounds, steps[i])
                if args.profile and not case.window:
                    row["profile"] = profile(workers[i], case, args)
                results.append(row)
        finally:
            for worker in workers:
                worker.close()
    return results


def alone(case: Case, args: Args, tokens: int) -> dict[str, Any]:
    """A row of the table for a case that has the GPU to itself, with micro-batches that fit."""
    rows = args.device_batch_size or (16 if case.depth > 24 else 32)
    while True:
        with tempfile.TemporaryDirectory() as folder:
            worker = Worker(command_of(case, args, tokens, rows, Path(folder)), Path(folder))
            try:
                facts = worker.answer()
                worker.take(3)
                steps = steps_a_round(worker.take(1)["seconds"])
                found = [worker.take(steps) for _ in range(args.rounds)]
                row = measured(case.name, tokens, steps, found, {**facts, "rows": rows})
                if args.parts:
                    row["parts"] = time_in_parts(worker, args.rounds, steps)
                if args.profile:
                    row["profile"] = profile(worker, case, args)
                return row
            except Ended as e:
                too_much = any(words in str(e) for words in OUT_OF_MEMORY)
                if args.device_batch_size or rows == 1 or not too_much:
                    raise
                rows //= 2
            finally:
                worker.close()


def steps_a_round(seconds: float) -> int:
    """As many steps of that length as make a round."""
    return max(1, round(ROUND_SECONDS / seconds))


def measured(
    name: str, tokens: int, steps: int, found: list[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """A row of the table from the answers of its rounds, each over `steps` steps of `tokens`."""
    seconds = [answer["seconds"] / steps for answer in found]
    rate = tokens / median(seconds)
    peak = facts["peak_flops"]
    return {
        "name": name, **facts, "tokens_per_step": tokens, "steps_a_round": steps,
        "seconds_per_step": [round(s, 4) for s in seconds],
        "median_seconds": round(median(seconds), 4), "tokens_per_second": round(rate),
        "mfu": round(rate * facts["flops_per_token"] / peak, 4) if peak else None,
        "faults_per_step": round(median(answer["faults"] / steps for answer in found)),
        "peak_gib": round(max(answer["peak_gib"] for answer in found), 2),
    }  # fmt: skip


def time_in_parts(worker: Worker, rounds: int, steps: int) -> dict[str, Any]:
    """Where a step's time goes, by leaving parts out in turn."""
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    for part in PARTS:
        worker.take(1, part)  # the trunk alone may have to be compiled
    for _ in range(rounds):
        for part in PARTS:
            seconds[part].append(worker.take(steps, part)["seconds"] / steps)
    return shares({part: median(found) for part, found in seconds.items()})


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Shares of a whole step: the trunk's passes, head and loss, the optimizer; from the seconds of
    whole steps, of passes alone, and of the trunk's alone."""
    whole, passes, trunk = (seconds[part] for part in PARTS)
    found = {"trunk": trunk, "head and loss": passes - trunk, "optimizer": whole - passes}
    rounded = {f"{part}_seconds": round(value, 4) for part, value in seconds.items()}
    return {part: round(value / whole, 3) for part, value in found.items()} | rounded


def profile(worker: Worker, case: Case, args: Args) -> str:
    """Writes the profiler's table of a case beside the result; returns its name."""
    out = Path(args.out)
    path = out.with_name(f"{out.stem}_{case.name.replace(' ', '_').replace(',', '')}.txt")
    worker.ask(profile=str(path.resolve()))
    worker.answer()
    return path.name


# -------------------------------------------------------------------------------------------------
# What comes out


def ratio(ours: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times as many tokens a second ours does: the median over rounds, each of which
    compares what was measured one after the other."""
    pairs = zip(ours["seconds_per_step"], other["seconds_per_step"], strict=True)
    return round(median(b / a for a, b in pairs), 3)


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Compares each row of ours with each of the peer's at as many tokens a step."""
    for row in rows:
        peers = [r for r in rows if r["name"].startswith("peer ")]
        peers = [r for r in peers if r["tokens_per_step"] == row["tokens_per_step"]]
        if peers and row not in peers:
            row["times_the_peer"] = {r["name"]: ratio(row, r) for r in peers}


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'':<28}{'params':>8}{'tokens':>8}{'s/step':>9}{'fastest':>9}{'slowest':>9}"
        f"{'tok/s':>9}{'MFU':>7}{'faults':>9}{'GiB':>6}  times the peer"
    ]
    for row in rows:
        seconds = row["seconds_per_step"]
        mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] is not None else ""
        against = ", ".join(f"{value:.2f}" for value in row.get("times_the_peer", {}).values())
        lines.append(
            f"{row['name']:<28}{row['num_params'] / 1e6:>7.1f}M{row['tokens_per_step']:>8}"
            f"{row['median_seconds']:>9.3f}{min(seconds):>9.3f}{max(seconds):>9.3f}"
            f"{row['tokens_per_second']:>9,}{mfu:>7}{row['faults_per_step']:>9,}"
            f"{row['peak_gib']:>6.1f}  {against}"
        )
        if parts := row.get("parts"):
            named = [f"{k} {100 * v:.0f}%" for k, v in parts.items() if not k.endswith("_seconds")]
            lines.append(f"    of which {', '.join(named)}")
    return "\n".join(lines)


def fill_in(args: Args) -> None:
    """What was not typed, by the device."""
    cuda = args.device_type == "cuda"
    args.sizes = args.sizes or ("gpt-d12,gpt-d30,qwen2.5-0.5b" if cuda else "gpt-d4,turbo-d4")
    args.tokens = args.tokens or ("131072" if cuda else "8192,4096")
    args.seq_len = args.seq_len or (1024 if cuda else 512)
    args.vocab_size = args.vocab_size or (50_304 if cuda else 8192)
    args.out = args.out or str(RESULTS / f"train_speed{'_cuda' if cuda else ''}.json")


def main(args: Args) -> None:
    args.device_type = pick_device_type(args.device_type)
    fill_in(args)
    sizes, windows = args.sizes.split(","), args.peer_windows.split(",") if args.peer else []
    cases = cpu_cases(sizes, windows)  # refuses what is no size
    if args.peer:
        peer_checkout(args.peer)
        if args.device_type != "cpu":
            raise UserError("--peer is measured on a CPU only: add --device_type=cpu")
    rows: list[dict[str, Any]] = []
    try:
        for i, tokens in enumerate(map(int, args.tokens.split(","))):
            if args.device_type == "cpu":
                rows += side_by_side(cases, args, tokens, args.parts and i == 0)
            else:
                rows += [alone(Case(size, *parse_size(size)), args, tokens) for size in sizes]
    except Ended as e:
        raise UserError(f"a process that was to be measured ended:\n{e}") from e
    add_ratios(rows)
    print0(table_of(rows))
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}
    asked["peer"] = args.peer is not None  # not where it lies
    del asked["out"]
    write_json(
        args.out,
        {**surroundings(), "asked": asked, "table": rows},
    )
    print0(f"written to {args.out}")


if __name__ == "__main__":
    flags.run(main, Args)
