"""
Many training runs on 1 to 4 ranks in four processes, which stay: to start one takes seconds.

Every run is a script's own main(args), in a process group of its own as under torchrun, whose store
is the test's process. What each rank trained on is written down as it goes into the step.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat.checkpoint import LOG, run_dir, step_dir
from nanochat.common import read_jsonl
from nanochat.dataloader import IGNORE
from tests.tiny_world import run_stage

PROCESSES = 4
PATIENCE = 120  # seconds that a rank waits for others, in a run and before it


@dataclass(frozen=True)
class Run:
    """A stage on so many ranks, with its flags, in which {base} is the base directory. `name` is
    its tag."""

    name: str
    stage: str  # of the checkpoints: base, mid, sft, rl, dpo
    ranks: int
    argv: tuple[str, ...]
    nodes: int = 1  # the ranks are spread over so many pretended machines
    after: str = ""  # the run that must have ended: "stage name"
    resumes: str = ""  # the run of the same stage whose checkpoint of step 2 it goes on from

    @property
    def key(self) -> str:
        return f"{self.stage} {self.name}"


SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl",
           "dpo": "chat_dpo"}  # fmt: skip


# -------------------------------------------------------------------------------------------------
# What a run left


def log_of(run: Run) -> list[dict[str, Any]]:
    """The rows of its log."""
    return [row for _, row in read_jsonl(run_dir(run.stage, run.name) / LOG)]


def values_of(run: Run, event: str, name: str) -> list[float]:
    """One number of each row of a kind in its log."""
    return [row[name] for row in log_of(run) if row["event"] == event]


def seen_by(folder: Path, run: Run, what: str) -> list[list[list[Any]]]:
    """What each rank saw in each step: [rank][step][...]. `what`: rows or problems."""
    files = [folder / "seen" / f"{run.key}.{rank}.json" for rank in range(run.ranks)]
    return [json.loads(path.read_text(encoding="utf-8"))[what] for path in files]


def failures_of(folder: Path, run: Run) -> str:
    """What its ranks raised."""
    found = sorted((folder / "failed").glob(f"{run.key}.*"))
    return "\n".join(f"{path.name}: {path.read_text(encoding='utf-8')}" for path in found)


# -------------------------------------------------------------------------------------------------
# In the processes


class Seen:
    """Stands between a script and its Trainer while a run lasts, and writes down what it gets."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.problems: list[list[int]] = []

    def __enter__(self) -> Seen:
        from nanochat.train import Trainer
        from scripts import chat_rl

        self.undo = [(Trainer, "step", Trainer.step)]
        self.undo += [(chat_rl, "sample_rollouts", chat_rl.sample_rollouts)]
        (_, _, step), (_, _, sample) = self.undo

        def seeing_step(trainer: Trainer, batches: Any, *args: Any, **kwargs: Any) -> None:
            self.rows.append([row for batch in batches for row in rows_of(batch)])
            step(trainer, batches, *args, **kwargs)

        def seeing_sample(engine: Any, task: Any, problems: Any, **kwargs: Any) -> Any:
            self.problems.append(list(problems))
            return sample(engine, task, problems, **kwargs)

        Trainer.step = seeing_step  # type: ignore[method-assign]
        chat_rl.sample_rollouts = seeing_sample
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, value in self.undo:
            setattr(owner, name, value)


def rows_of(batch: Any) -> list[Any]:
    """[ids, targets] of each row, without the padding that depends on its neighbours."""
    result = []
    for ids, targets in zip(batch.idx.tolist(), batch.targets.tolist()):
        end = 1 + max((i for i, t in enumerate(targets) if t != IGNORE), default=-1)
        result.append([ids[:end], targets[:end]])
    return result


def work(process: int, ports: list[int], folder: Path, runs: Sequence[Run]) -> None:
    """One of the processes: it takes its part in the runs, in their order. `ports`: of the store
    of all of them, and of each run's own."""
    torch.set_num_threads(1)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    init = dist.init_process_group
    limit = timedelta(seconds=PATIENCE)
    dist.init_process_group = lambda *args, **kwargs: init(*args, **{**kwargs, "timeout": limit})
    remember_plans()
    with open(folder / f"process_{process}.txt", "w", buffering=1, encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        store = dist.TCPStore("127.0.0.1", ports[0], is_master=False, timeout=limit)
        for port, run in zip(ports[1:], runs):
            # The last process has the least to do: it takes the runs of one rank.
            rank = process if run.ranks > 1 else process - PROCESSES + 1
            if not 0 <= rank < run.ranks:
                continue
            faulthandler.dump_traceback_later(2 * PATIENCE, exit=True, file=out)
            for other in filter(None, [run.after, run.resumes and f"{run.stage} {run.resumes}"]):
                store.wait([f"done {other}"])
            print(f"=== {run}", flush=True)
            take_part(run, rank, port, folder, store)
            if rank == 0:
                store.set(f"done {run.key}", "")
        faulthandler.cancel_dump_traceback_later()
        print(f"=== done after {time.process_time():.0f} s of a core", flush=True)


def remember_plans() -> None:
    """A third of such a short run is the estimate of its memory, which decides nothing here, as
    micro-batch and --shard are typed: one for each model is enough."""
    from nanochat.plan import Planner

    memory, found = Planner.memory, dict[Any, Any]()

    def remembered(planner: Any, batch: int, mode: Any = "none", length: int | None = None) -> Any:
        if planner.config not in found:
            found[planner.config] = memory(planner, batch, mode, length)
        return replace(found[planner.config], batch=batch, mode=mode)

    Planner.memory = remembered  # type: ignore[method-assign]


def take_part(run: Run, rank: int, port: int, folder: Path, store: Any) -> None:
    per_node = run.ranks // run.nodes
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(run.ranks), "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node), "GROUP_RANK": str(rank // per_node),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # as with torchrun, it is another process's
    }  # fmt: skip
    argv = [word.format(base=folder) for word in (*run.argv, f"--model_tag={run.name}")]
    if run.resumes:
        if rank == 0:
            copy_beginning(run)
            store.set(f"copied {run.key}", "")
        store.wait([f"copied {run.key}"])
        argv.append("--resume")
    with Seen() as seen:
        try:
            run_stage(SCRIPTS[run.stage], *argv)
        except BaseException:
            path = folder / "failed" / f"{run.key}.{rank}"
            path.write_text(traceback.format_exc(), encoding="utf-8")
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
    path = folder / "seen" / f"{run.key}.{rank}.json"
    path.write_text(json.dumps(vars(seen), default=str), encoding="utf-8")


def copy_beginning(run: Run) -> None:
    """The other run as it was when it was killed after its save of step 2."""
    shutil.copytree(step_dir(run.stage, run.resumes, 2), step_dir(run.stage, run.name, 2))
    shutil.copy(run_dir(run.stage, run.resumes) / LOG, run_dir(run.stage, run.name) / LOG)


# -------------------------------------------------------------------------------------------------
# In the test


def do_runs(folder: Path, runs: Sequence[Run]) -> None:
    """Does them all. A run that fails leaves a file, see failures_of."""
    for name in ("seen", "failed"):
        (folder / name).mkdir()
    stores = [
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for _ in range(1 + len(runs))
    ]
    ports = [store.port for store in stores]
    # The server imports torch once, and its children begin with it
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", __name__])
    processes = [
        context.Process(target=work, args=(process, ports, folder, runs))
        for process in range(PROCESSES)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    for number, process in enumerate(processes):
        if process.exitcode != 0:
            said = (folder / f"process_{number}.txt").read_text(encoding="utf-8")
            print(
                f"process {number} ended with {process.exitcode}: {said[-3000:]}", file=sys.stderr
            )
