"""
Every measured passage of our documents, from the result files: no number is typed by hand.

    python -m bench.render

A passage stands between two marks that name it; tests/test_render.py holds that each is what the
result files say, so a new result is not committed without its page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import bpe_table, finetune_rates, learning_scales, learning_trials, speedrun_cpu
from bench import learning as learning_bench
from nanochat import flags
from nanochat.budget import share_of_peak
from nanochat.cluster import Cluster, find_gpu
from nanochat.common import UserError, atomic_write, print0, read_json
from nanochat.dataset import PrepareArgs
from nanochat.models import make_config
from nanochat.prepare import estimate
from nanochat.traffic import Work, step_time, transfers

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "bench" / "results"
Result = dict[str, Any]


@dataclass
class Args:
    """Put the recorded results into README.md and the other pages that show them."""


def load(name: str) -> Result:
    """A result file; UserError with the command that makes it if it is not there."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise UserError(f"{path} is missing: `python -m bench.{name}` measures it")
    return read_json(path)


# -------------------------------------------------------------------------------------------------
# The README's table of performance: (what, ours, beside, times)

Row = tuple[str, str, str, str]


def times(value: float) -> str:
    return f"{value:.3g}×"


def bpe_training(result: Result) -> Row:
    ours = find(result["trainers"], package="rustbpe", texts="str")
    peer = next(r for r in result["trainers"] if r["package"].startswith("rustbpe 0.1.0"))
    return (
        f"BPE training, {result['corpus']['mb']:.0f} MB, {result['vocab_size']:,} tokens",
        f"{ours['seconds']:.1f} s", f"{peer['seconds']:.1f} s, rustbpe 0.1.0",
        times(peer["seconds"] / ours["seconds"]),
    )  # fmt: skip


def bpe_encoding(result: Result) -> Row:
    ours = find(
        result["encoders"], package="rustbpe", texts="str", pattern="ours",
        threads=result["threads"],
    )  # fmt: skip
    peer = find(result["encoders"], package="tiktoken", pattern="ours", threads=1)
    return (
        f"BPE encoding, {result['corpus']['mb']:.0f} MB", f"{ours['mb_per_s']:.0f} MB/s",
        f"{peer['mb_per_s']:.1f} MB/s, one thread of tiktoken",
        times(ours["times_one_tiktoken_thread"]),
    )  # fmt: skip


def train_speed(result: Result) -> Row:
    rows = {row["name"]: row for row in result["table"]}
    peer = next(row for name, row in rows.items() if name.startswith("peer"))
    ours = rows["turbo-d4 compiled"]
    return (
        "training d4, T 512, vocabulary 8,192", f"{ours['tokens_per_second']:,} tokens/s",
        f"{peer['tokens_per_second']:,} tokens/s, karpathy/nanochat's model",
        times(ours["times_the_peer"][peer["name"]]),
    )  # fmt: skip


def learning(result: Result) -> Row:
    tokens, figure = list(result["peer"].items())[-1]
    run = find(result["peer_runs"], depth=4)
    ours, theirs = result["summary"]["turbo d4"], min(figure, run["final"])  # its better one
    return (
        f"learning: bits per byte after {int(tokens) / 1e6:.2f}M tokens, d4", f"{ours['bpb']:.3f}",
        f"{theirs:.3f}, karpathy/nanochat's model", "",
    )  # fmt: skip


def decoding(depth: int, result: Result) -> Row:
    asked = {"arch": "gpt", "depth": depth, "step": "compiled", "weights": "bfloat16"}
    rows = [find(result["rows"], **asked, batch=batch) for batch in (1, 16)]
    ours, theirs = (
        " and ".join(f"{row[f'{who}_tokens_per_second']:,.0f}" for row in rows)
        for who in ("ours", "transformers")
    )
    return (
        f"decoding d{depth}, vocabulary {rows[0]['vocab_size']:,}, 1 and 16 rows",
        f"{ours} tokens/s", f"{theirs} tokens/s, transformers",
        " and ".join(times(row["times"]) for row in rows),
    )  # fmt: skip


def core_speed(result: Result) -> Row:
    total = result["total"]
    return (
        f"CORE, {total['items']} items, d4", f"{total['ours_seconds']:.0f} s",
        f"{total['loop_seconds']:.0f} s, one item at a time", times(total["times"]),
    )  # fmt: skip


def rl_speed(result: Result) -> Row:
    ours, peer = result["tokens_per_second"]["ours"], result["tokens_per_second"]["trl"]
    return (
        "reinforcement learning, tokens sampled and trained a second",
        f"{ours['sampled']:,.0f}, {ours['trained']:,.0f}",
        f"{peer['sampled']:,.0f}, {peer['trained']:,.0f}, TRL {result['peer_versions']['trl']}",
        ", ".join(times(result["ours_over_trl"][k]) for k in ("sampled", "trained")),
    )  # fmt: skip


def memory(result: Result) -> Row:
    how = result["device"]
    if result.get("kernels_left_out"):  # see hollow_gpu.py
        step = "compiled" if result["compiled"] else "plain"
        how = f"as PyTorch's CUDA allocator counts it, {step}, without a GPU"
    return (
        f"memory of a step ({how}), estimated over measured, {len(result['rows'])} cases",
        f"{min(r['ratio'] for r in result['rows']):.2f} to "
        f"{max(r['ratio'] for r in result['rows']):.2f}", "", "",
    )  # fmt: skip


def kill_resume(result: Result) -> Row:
    different = sum(len(stage["differences"]) for stage in result["stages"].values())
    return (
        "runs killed anywhere and resumed", f"{result['kills']} kills, {different} differences",
        "", "",
    )  # fmt: skip


def lm_eval(result: Result) -> Row:
    return (
        f"CORE's log-likelihoods beside lm-eval's, {result['loglikelihoods']:,} of them",
        f"largest difference {result['max_diff']:.0e}",
        f"{len(result['disagreements'])} predictions differ", "",
    )  # fmt: skip


PERFORMANCE: list[tuple[str, Callable[[Result], Row]]] = [
    ("bpe_training", bpe_training),
    ("bpe_encoding", bpe_encoding),
    ("train_speed", train_speed),
    ("learning", learning),
    ("decode_speed", partial(decoding, 3)),
    ("decode_speed", partial(decoding, 4)),
    ("decode_speed", partial(decoding, 8)),
    ("core_speed", core_speed),
    ("rl_speed", rl_speed),
    ("memory", memory),
    ("memory_cuda", memory),
    ("memory_cuda_eager", memory),
    ("kill_resume", kill_resume),
    ("lm_eval", lm_eval),
]


def performance(load: Callable[[str], Result] = load) -> str:
    """The table, and on which machines and when its rows were measured."""
    lines = ["| | ours | beside it | | machine, date |", "|---|---|---|---|---|"]
    for name, row_of in PERFORMANCE:
        result = load(name)
        lines.append(f"| {' | '.join(row_of(result))} | {machine(result)}, {result['date']} |")
    return "\n".join(lines)


def machine(result: Result) -> str:
    """The machine of a result in few words."""
    info = result["machine"]
    gpus = info.get("gpus") or []
    if gpus:
        return f"{len(gpus)} × {gpus[0]}"
    cores = f"{info['cores']} core{'s' if info['cores'] > 1 else ''}"
    return f"{cores}, {info.get('cpu', 'a CPU').replace('(R)', '').replace(' Processor', '')}"


def find(rows: list[Result], **fields: Any) -> Result:
    """The row with these fields."""
    row = bpe_table.find(rows, **fields)
    if row is None:
        raise UserError(f"no row with {fields} was measured")
    return row


# -------------------------------------------------------------------------------------------------
# Pages


def speedrun() -> str:
    return speedrun_cpu.table(load("speedrun_cpu"))


def plan() -> str:
    """From `python -m scripts.plan --json > bench/results/plan.json`, which is arithmetic."""
    plans = read_json(RESULTS / "plan.json")
    first = plans[0]
    lines = [
        f"| {first['gpus']} × {first['gpu']} | parameters | tokens | shards | disk | a GPU | hours "
        "| dollars |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in plans:
        enough = "" if row["shards"] <= row["shards_there_are"] else ", more than there are"
        lines.append(
            f"| {row['name']} | {row['num_params'] / 1e6:,.0f}M | {row['tokens'] / 1e9:.1f}B "
            f"| {row['shards']:,}{enough} | {sum(row['disk_bytes'].values()) / 1e9:.0f} GB "
            f"| {row['gb_a_gpu']:.0f} GB, {row['shard']} | {row['hours']:,.1f} "
            f"| {row['dollars']:,.0f} |"
        )
    share = first["share_of_peak"]
    lines += [
        "",
        f"Assumed: {share['value']:.0%} of the GPUs' peak ({share['source']}), "
        f"${first['price']:g} for a GPU and hour; `--mfu`, `--price` and more say otherwise.",
    ]
    return "\n".join(lines)


def bpe() -> str:
    return bpe_table.passage(*map(load, ("bpe_training_50mb", "bpe_training", "bpe_encoding")))


def learned() -> str:
    (short,) = load("learning_short")["runs"]
    (tokens,) = map(int, short["bpb"])
    seeds = load("learning_seeds")["summary"]["turbo d4"]
    return (
        learning_bench.table([load(name) for name in ("learning", "learning_d6")])
        + f"\n\nTurbo at d{short['depth']} in a run of {tokens / 1e6:.2f} M tokens: "
        f"{short['final']:.3f} after {short['minutes']:.1f} minutes on {short['threads']} threads. "
        f"{seeds['seeds']} seeds of 2.46 M tokens at d4: {seeds['bpb']:.3f} on average, with a "
        f"standard deviation of {seeds['bpb_stdev']:.3f}."
    )


def trials() -> str:
    return learning_trials.table(load("learning_trials"))


def long_trials() -> str:
    return learning_trials.table(load("learning_trials_long"))


def scales() -> str:
    return learning_scales.table(load("learning_scales"))


def rates() -> str:
    return finetune_rates.rates_table(load("finetune_rates"))


def identities() -> str:
    return finetune_rates.identity_table(load("finetune_rates"))


def prepare() -> str:
    flags = PrepareArgs()
    return f"```\n{estimate(flags.cores, flags.core_hour_price)}\n```"


# What docs/many_machines.md shows: model, flag of scripts.plan, --shard, tokens a step
TWO_NODES = [
    ("d20", ("gpt", 20, 65_536), "zero", 2**19),
    ("7B", ("qwen2.5-7b", 0, 151_665), "fsdp", 2**20),
    ("7B", ("qwen2.5-7b", 0, 151_665), "hsdp", 2**20),
]
LENGTH, MICRO_BATCH = 2048, 4  # tokens of a row, rows
WAYS_OUT = [("8 × 400 Gb/s", 50e9), ("1 × 100 Gb/s", 100e9 / 8 / 8)]  # a node's, bytes/s of a GPU


def two_nodes() -> str:
    """A step's time on two nodes, by nanochat/traffic.py."""
    gpu = find_gpu("h100")
    clusters = [Cluster(gpu, 8, 2, network) for _, network in WAYS_OUT]
    lines = [
        f"| {clusters[0]} | tokens a step | computing | out of each node "
        + "".join(f"| waiting, {name} " for name, _ in WAYS_OUT) + "|",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, (arch, depth, vocab_size), shard, tokens in TWO_NODES:
        config = make_config(arch, depth, vocab_size, LENGTH)[0]
        micro = tokens // (clusters[0].gpus * MICRO_BATCH * LENGTH)
        work = Work.of(config, tokens, micro)
        params = sum(shape.numel() for unit in work.units for shape in unit)
        share = share_of_peak(gpu.name, params, -1)
        steps = [step_time(work, shard, cluster, share.value) for cluster in clusters]
        left = sum(t.leaves_node(clusters[0]) for t in transfers(work, shard, clusters[0]))
        waiting = [step.total - step.passes - step.update for step in steps]
        lines.append(
            f"| {name}, {params / 1e9:.2f}B, {shard} | {tokens / 1e6:.2f}M "
            f"| {steps[0].passes + steps[0].update:.2f} s | {left / 1e9:.1f} GB "
            + "".join(f"| {seconds:.2f} s " for seconds in waiting) + "|"
        )  # fmt: skip
    said = (
        f"{share.value:.0%} of the GPUs' peak ({share.source}), micro-batches of {MICRO_BATCH} rows"
    )
    return "\n".join([*lines, "", f"Assumed: {said} of {LENGTH:,} tokens."])


# (page, name of the passage) -> what stands there
PASSAGES: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "speedrun"): speedrun,
    ("README.md", "plan"): plan,
    ("README.md", "performance"): performance,
    ("rustbpe/README.md", "BPE"): bpe,
    ("bench/LEARNING.md", "learned"): learned,
    ("bench/LEARNING.md", "trials"): trials,
    ("bench/LEARNING.md", "long trials"): long_trials,
    ("bench/LEARNING.md", "scales"): scales,
    ("docs/03-data.md", "prepare"): prepare,
    ("docs/06-finetuning.md", "rates"): rates,
    ("docs/identity.md", "identities"): identities,
    ("docs/many_machines.md", "two nodes"): two_nodes,
}


def marks(name: str) -> tuple[str, str]:
    """Where a passage begins and ends."""
    return (
        f"<!-- {name}: made by `python -m bench.render`, do not edit -->",
        f"<!-- end of {name} -->",
    )


def rendered(page: str, name: str, text: str) -> str:
    """The page's text with the passage as the results have it."""
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{page} must have once each: {begin} and {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{PASSAGES[page, name]()}\n{end}{rest.split(end)[1]}"


def main(_: Args) -> None:
    for page, name in PASSAGES:
        path = REPO / page
        text = rendered(page, name, path.read_text(encoding="utf-8"))
        with atomic_write(path, "w") as file:
            file.write(text)
        print0(f"{page}: {name}")


if __name__ == "__main__":
    flags.run(main, Args)
