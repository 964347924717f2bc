"""
Trains the same recipe at several sizes, fits a scaling law to the results, and draws it.

    python -m scripts.miniseries --depths=4,6,8,10 --max_seq_len=512 --total_batch_size=32768
    python -m scripts.miniseries --depths=4,6,8 --target_flops=1e16,3e16,1e17 --series=isoflop

Every flag that is not listed here goes to scripts.base_train. Without --target_flops each depth
trains on --target_param_data_ratio tokens a parameter, and bits per byte are fitted by
E + A C^-alpha over the FLOPs C. With it each depth trains at each budget, and the best size at each
is the bottom of a parabola (see nanochat/scaling.py).

The runs are <series>-d4 and so on, in base_checkpoints/. The same command goes on where it was
stopped: every run resumes, one that has ended is compared with its flags and data and not trained
again. Results go to report/<series>.json and .png.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nanochat import flags
from nanochat.checkpoint import LOG, run_dir
from nanochat.common import UserError, get_base_dir, print0, write_json
from nanochat.launch import command, launch, shown
from nanochat.machine import machine_info, versions
from nanochat.report.runs import Run, read_run
from nanochat.report.series import Point, draw_isoflop, draw_series, point_of
from nanochat.report.tables import table
from nanochat.scaling import Optimum, fit_exponent, fit_power_law, isoflop_optimum

OURS = {
    "depth": "--depths", "model_tag": "--series", "target_flops": "--target_flops",
    "num_iterations": "--target_flops or --target_param_data_ratio", "resume": "nothing",
    "resume_from_step": "nothing", "preview": "scripts.base_train", "dry_run": "nothing",
}  # fmt: skip


@dataclass
class Args:
    """Train a series of sizes and fit a scaling law. Other flags go to scripts.base_train."""

    depths: str = "4,6,8,10"
    """Sizes to train, joined by commas."""
    target_flops: str = ""
    """Training FLOPs of each run, joined by commas: every depth at every budget. Empty: one run a
    depth, as long as the next flag says."""
    target_param_data_ratio: float = 20.0
    """Tokens per parameter of each run, where --target_flops does not say."""
    series: str = "miniseries"
    """Name of the series: the first part of the runs' tags, and of the results' files."""
    nproc_per_node: int = 1
    """Ranks of each run on this machine (torchrun); 1: none."""

    passed_on = ()  # flags for scripts.base_train (see flags.parse)


def main(args: Args) -> None:
    refuse_ours(list(args.passed_on))
    depths = numbers("--depths", args.depths, int)
    budgets = numbers("--target_flops", args.target_flops, float) if args.target_flops else []
    plan = [(depth, budget) for budget in budgets or [None] for depth in depths]
    points = []
    for n, (depth, budget) in enumerate(plan, 1):
        tag = f"{args.series}-d{depth}" + (f"-{budget:g}".replace("+", "") if budget else "")
        words = [*args.passed_on, f"--depth={depth}", f"--model_tag={tag}", "--resume"]
        if budget:
            words.append(f"--target_flops={budget!r}")
        else:
            words.append(f"--target_param_data_ratio={args.target_param_data_ratio!r}")
        print0(f"\n{tag}, run {n} of {len(plan)}")
        points.append(point_of(train(tag, words, args.nproc_per_node), budget))
    result: dict[str, Any] = {"points": points}
    print0("\n" + "\n".join(point_table(points)))
    folder = get_base_dir() / "report"
    picture = folder / f"{args.series}.png"
    if budgets:
        result |= fit_isoflop(points, budgets)
        draw_isoflop(points, result, picture)
    else:
        result |= fit_series(points)
        draw_series(points, result.get("law"), picture)
    result |= {"typed": flags.typed(args), "machine": machine_info(), "versions": versions()}
    write_json(folder / f"{args.series}.json", plain(result))
    print0(f"\nwrote {picture} and {picture.with_suffix('.json').name} beside it")


def refuse_ours(words: list[str]) -> None:
    """Flags of base_train that a series sets itself would be overruled in silence."""
    for word in words:
        name = word.split("=")[0].lstrip("-").replace("-", "_").removeprefix("no_")
        if word.startswith("--") and name in OURS:
            raise UserError(f"{word}: a series sets --{name} by itself; use {OURS[name]} instead")


def numbers(flag: str, text: str, kind: type) -> list[Any]:
    """The values of a flag that are joined by commas, each once, ascending."""
    try:
        values = sorted({kind(part) for part in text.split(",")})
    except ValueError as e:
        raise UserError(f"{flag}={text}: give numbers joined by commas, like 4,6,8") from e
    if values[0] <= 0:
        raise UserError(f"{flag}={text}: {values[0]} is not above 0")
    return values


def train(tag: str, words: list[str], ranks: int) -> Run:
    """Trains one size, or sees that it has been trained, in a process of its own."""
    run_command = command("base_train", words, ranks)
    status = launch(run_command)
    if status != 0:
        raise UserError(
            f"{tag} failed with status {status}; its own message is above. It was started by "
            f"`{shown(run_command)}`. Mend it and give the same command: it goes on from there"
        )
    run = read_run(run_dir("base", tag) / LOG, "base", tag)
    if run.end is None:  # a signal reached it: it saved, and ended with status 0
        raise UserError(f"{tag} was stopped; the same command goes on from there")
    return run


def point_table(points: list[Point]) -> list[str]:
    """What was trained, one line a run."""
    head = ["run", "parameters", "matrix + head", "tokens", "FLOPs", "val_bpb"]
    rows = ([p.tag, p.num_params, p.scaling_params, p.tokens, f"{p.flops:.3e}", p.val_bpb]
            for p in points)  # fmt: skip
    return table(head, rows)


def fit_series(points: list[Point]) -> dict[str, Any]:
    """The law over FLOPs; what cannot be fitted is said, and the rest written all the same."""
    try:
        law = fit_power_law([p.flops for p in points], [p.val_bpb for p in points])
    except UserError as e:
        print0(f"no law: {e}")
        return {"problems": [str(e)]}
    print0(
        f"val_bpb = {law.E:.4f} + {law.A:.4f} (C / {law.x0:.3e})^-{law.alpha:.4f}, "
        f"off by {law.rms:.4f} (rms)"
    )
    if law.alpha_interval and law.E_interval:
        low, high = law.alpha_interval
        print0(
            f"95%: alpha {low:.4f} to {high:.4f}, "
            f"E {law.E_interval[0]:.4f} to {law.E_interval[1]:.4f}"
        )
    if law.note:
        print0(f"note: {law.note}")
    return {"law": law}


def fit_isoflop(points: list[Point], budgets: list[float]) -> dict[str, Any]:
    """The best size at each budget, and how size and tokens grow with the budget."""
    optima: list[Optimum] = []
    problems: list[str] = []
    result: dict[str, Any] = {}
    for budget in budgets:
        of_budget = [p for p in points if p.target_flops == budget]
        sizes = [p.scaling_params for p in of_budget]
        try:
            optima.append(
                isoflop_optimum(
                    budget, sizes, [p.tokens for p in of_budget], [p.val_bpb for p in of_budget]
                )
            )
        except UserError as e:
            problems.append(str(e))
    for best in optima:
        print0(
            f"{best.flops:.3g} FLOPs: best at {best.params:.3e} matrix and head parameters, "
            f"{best.tokens:.3e} tokens ({best.tokens / best.params:.1f} a parameter), "
            f"val_bpb {best.loss:.4f}"
        )
    try:
        flops = [best.flops for best in optima]
        for name, values in (("params", [b.params for b in optima]),
                             ("tokens", [b.tokens for b in optima])):  # fmt: skip
            law = result[f"{name}_exponent"] = fit_exponent(flops, values)
            interval = law.interval
            within = f", 95%: {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
            print0(f"best {name} ~ C^{law.exponent:.3f}{within}")
    except UserError as e:
        problems.append(str(e))
    for problem in problems:
        print0(f"note: {problem}")
    return {"optima": optima, "problems": problems, **result}


def plain(value: Any) -> Any:
    """Ready for JSON: dataclasses as dicts, without the laws that only a drawing needs."""
    if hasattr(value, "__dataclass_fields__"):
        value = {k: v for k, v in asdict(value).items() if k != "family"}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    flags.run(main, Args)
