"""
What the four training stages share: the step, the meter, saving and resuming, the log.

A stage's script holds its recipe and drives a Trainer:

    for step in trainer.steps():        # resumed step .. num_steps
        if is_due(step, ...): evaluate, sample, trainer.save()
        if step == num_steps: continue
        trainer.step(loader.step(step), lr_multiplier(...))

Floor 4.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint import (
    checkpoint_tokenizer,
    find_checkpoint,
    list_tags,
    load_weights,
    optim_reader,
    read_meta,
    save_checkpoint,
    set_aside,
    warn_if_unfinished,
)
from nanochat.common import UserError, append_jsonl, get_base_dir, print0
from nanochat.dataloader import IGNORE, MicroBatch, StepLoader
from nanochat.distributed import DistInfo, all_reduce_sum, sum_over_ranks
from nanochat.flags import FinetuneFlags, TrainFlags
from nanochat.machine import machine_info, versions
from nanochat.models import build_model, config_from_dict, config_to_dict
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import Tokenizer

# Dense bfloat16 peak of one GPU in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass
class TrainState:
    """Where a run stands. Everything else that a resume needs follows from it and the files."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # positions seen, over all ranks
    seconds: float = 0.0  # spent in steps
    smooth_loss: float = 0.0  # exponential mean of the logged loss, bias not corrected


class Trainer:
    """Runs one stage's optimization. `meta` describes the run in its checkpoints:

    tokenizer (name), tokenizer_fingerprint, data (fingerprints by role) and what the stage adds."""

    def __init__(
        self,
        stage: str,
        tag: str,
        args: TrainFlags,
        info: DistInfo,
        model: Any,
        optimizer: MuonAdamW,
        num_steps: int,
        meta: dict[str, Any],
        loader: StepLoader | None = None,
    ) -> None:
        self.stage, self.tag, self.args, self.info = stage, tag, args, info
        self.model, self.optimizer, self.num_steps, self.meta = model, optimizer, num_steps, meta
        self.loader = loader  # of data in fixed rows; RL has none
        self.state = TrainState()
        self.metrics: dict[str, Any] = {}  # the last evaluation of each kind
        # Evaluation and sampling use the plain module: other shapes would compile again.
        compiles = info.device.type == "cuda"
        self.step_model = torch.compile(model, dynamic=False) if compiles else model
        self.log_path = get_base_dir() / "report" / f"train_{stage}_{tag}.jsonl"
        self.wandb: Any = None
        self._saved_before = False
        self._stop_signal = 0
        self._printed = 0.0

    # ---------------------------------------------------------------------------------------------
    # Life of a run

    def steps(self) -> Iterator[int]:
        """Yields each step number from the first (or resumed) one to num_steps, which is the end.

        SIGTERM and Ctrl-C let the step under way finish, save, and end the process with status
        0."""
        self._resume()
        self._start_log()
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            while True:
                step = self.state.step
                yield step
                if step >= self.num_steps:  # the last one was for final evaluations only
                    break
                if self._stop_requested():
                    self.save()
                    print0(f"stopped by a signal at step {self.state.step}; continue with --resume")
                    sys.exit(0)
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        self.log("end", final=self.metrics, seconds=self.state.seconds)
        if self.wandb is not None:
            self.wandb.finish()

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self._stop_signal == signum == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self._stop_signal = signum

    def _stop_requested(self) -> bool:
        """Whether any rank got a signal: all must agree, or they would wait for each other."""
        return sum_over_ranks(float(self._stop_signal > 0), device=self.info.device)[0] > 0

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it continues."""
        return {
            "architecture and shape": config_to_dict(self.model.config),
            "tokenizer": self.meta["tokenizer_fingerprint"],
            "data": self.meta["data"],
            "--seed": self.args.seed,
            "--total_batch_size": getattr(self.args, "total_batch_size", None),
            "number of steps": self.num_steps,
            "--max_seq_len": self.loader and self.loader.reader.row_len - 1,
        }

    def _resume(self) -> None:
        if not self.args.resume and self.args.resume_from_step < 0:
            return
        wanted = self.args.resume_from_step if self.args.resume_from_step >= 0 else None
        folder = find_checkpoint(self.stage, self.tag, wanted)
        warn_if_unfinished(self.stage, self.tag)
        meta = read_meta(folder)
        now = self._identity()
        for name, saved in meta["identity"].items():
            if saved != now[name]:
                raise UserError(
                    f"cannot resume {folder}: its {name} was {saved}, now it is {now[name]}. Use "
                    "the same as then, or start a new run with another --model_tag"
                )
        self._saved_before = True
        load_weights(folder, self.model)
        self.optimizer.load_state_dict(optim_reader(folder), meta["optimizer_steps"])
        self.state = TrainState(**meta["state"])
        self.metrics = meta["metrics"]
        if self.loader is not None:
            self.loader.load_state(meta["loader"])
        print0(f"resumed {folder} at step {self.state.step}")

    def save(self) -> None:
        """Writes a checkpoint of the present step. All ranks must call it.

        A new run of an old tag moves the old one aside at its first save: its later steps would
        else pass for this run's."""
        if not self._saved_before and self.info.rank == 0:
            set_aside(self.stage, self.tag)
        self._saved_before = True
        folder = save_checkpoint(
            self.stage,
            self.tag,
            self.state.step,
            self.model,
            self.optimizer.state_dict(),
            {
                "stage": self.stage,
                "step": self.state.step,
                **self.meta,
                "args": asdict(self.args),
                "identity": self._identity(),
                "state": asdict(self.state),
                "optimizer_steps": self.optimizer.num_steps,
                "metrics": self.metrics,
                "loader": self.loader and self.loader.state(self.state.step),
            },
            self.args.keep_last,
        )
        print0(f"saved {folder}")

    # ---------------------------------------------------------------------------------------------
    # The step

    def step(self, batches: list[MicroBatch], lr_mul: float, momentum: float = 0.95) -> float:
        """One optimizer step over this rank's micro-batches. Returns the mean loss over all ranks.

        The loss is the sum over trained tokens divided by their number in the whole step, on all
        ranks: how the batch is cut into micro-batches does not matter. With weights, each token's
        loss is multiplied by its own before the sum. A step without a trained token changes
        nothing."""
        started = time.perf_counter()
        count = torch.zeros((), device=self.info.device)
        for batch in batches:
            count += (batch.targets != IGNORE).sum()
        all_reduce_sum(count)
        loss_sum = torch.zeros((), device=self.info.device)
        for batch in batches:
            with autocast(self.info.device):
                if batch.weights is None:
                    loss = self.step_model(batch.idx, batch.targets, reduction="sum")
                else:
                    nll = self.step_model(batch.idx, batch.targets, reduction="none")
                    loss = (nll * batch.weights).sum()
            (loss / count.clamp(min=1)).backward()
            loss_sum += loss.detach()
        mean_loss = float(all_reduce_sum(loss_sum) / count.clamp(min=1))
        norm = 0.0
        if count > 0:
            norm = self.optimizer.step(lr_mul, momentum, self.args.grad_clip)
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        tokens = int(
            sum_over_ranks(sum(b.idx.numel() for b in batches), device=self.info.device)[0]
        )
        self._account(mean_loss, norm, lr_mul, tokens, seconds)
        return mean_loss

    def _account(
        self, loss: float, norm: float, lr_mul: float, tokens: int, seconds: float
    ) -> None:
        s = self.state
        s.step += 1
        s.tokens += tokens
        s.seconds += seconds
        s.smooth_loss = 0.9 * s.smooth_loss + 0.1 * loss
        smooth = s.smooth_loss / (1 - 0.9**s.step)
        rate = tokens / seconds
        mfu = self.mfu(rate)
        self.log(
            "step", loss=loss, lr_mul=lr_mul, grad_norm=norm, tokens=s.tokens,
            tokens_per_second=rate, mfu=mfu, seconds=s.seconds,
        )  # fmt: skip
        eta = (self.num_steps - s.step) * s.seconds / s.step
        line = f"{self.stage} step {s.step}/{self.num_steps} | loss {smooth:.4f}"
        for name in ("val_bpb", "val_loss", "reward"):
            if name in self.metrics:
                line += f" | {name} {self.metrics[name]:.4f}"
        line += f" | {rate:,.0f} tok/s"
        line += f" | mfu {100 * mfu:.1f}%" if mfu is not None else ""
        self._print_progress(line + f" | {s.seconds / 60:.1f} min, {eta / 60:.1f} to go")

    def _print_progress(self, line: str) -> None:
        """A live line on a terminal; elsewhere one line about every ten seconds."""
        now, last = time.monotonic(), self.state.step >= self.num_steps
        if sys.stdout.isatty():
            print0(f"\r\x1b[2K{line}", end="\n" if last else "")
        elif last or self.state.step <= 3 or now - self._printed > 10:
            print0(line)
            self._printed = now

    def mfu(self, tokens_per_second: float) -> float | None:
        """Share of the GPUs' peak that the model's FLOPs use; None where the peak is unknown."""
        if self.info.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.info.device)
        peak = next((v for k, v in PEAK_FLOPS.items() if k in name), None)
        if peak is None:
            return None
        return self.model.flops_per_token() * tokens_per_second / (peak * self.info.world_size)

    # ---------------------------------------------------------------------------------------------
    # The log

    def _start_log(self) -> None:
        if self.args.run != "dummy" and self.info.rank == 0:
            try:
                import wandb
            except ImportError as e:
                raise UserError("--run needs wandb: `uv pip install wandb`, or drop --run") from e
            self.wandb = wandb.init(
                project="nanochat", name=self.args.run, config=asdict(self.args)
            )
        num_params = sum(p.numel() for p in self.model.parameters())
        print0(
            f"{self.stage}: {self.tag}, {num_params:,} parameters, {self.num_steps} steps, "
            f"{self.info.world_size} rank(s) on {self.info.device.type}"
        )
        if self.info.rank == 0 and self.state.step == 0:
            self.log_path.unlink(missing_ok=True)  # a new run of this tag
        self.log(
            "start", args=asdict(self.args), model=config_to_dict(self.model.config),
            num_params=num_params, num_steps=self.num_steps, machine=machine_info(),
            versions=versions(), data=self.meta["data"],
        )  # fmt: skip

    def log(self, event: str, **values: Any) -> None:
        """One row in the run's JSONL file (rank 0), and in wandb if --run names a run."""
        if self.info.rank != 0:
            return
        row = {"event": event, "stage": self.stage, "step": self.state.step, **values}
        append_jsonl(self.log_path, {**row, "time": time.time()})
        if self.wandb is not None and event not in ("start", "end"):
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self.wandb.log({f"{event}/{k}": v for k, v in numbers.items()}, step=self.state.step)

    def record(self, event: str = "eval", **metrics: Any) -> None:
        """Logs an evaluation, shows it, and keeps it for the checkpoint."""
        self.metrics.update(metrics)
        self.log(event, **metrics)
        shown = ", ".join(
            f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()
        )
        lead = "\r\x1b[2K" if sys.stdout.isatty() else ""
        print0(f"{lead}{self.stage} step {self.state.step}: {shown}")


def autocast(device: torch.device) -> Any:
    """bfloat16 where it is native; float32 elsewhere (on some CPUs bfloat16 is slow or dies)."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


# -------------------------------------------------------------------------------------------------
# Beginnings


@dataclass
class Start:
    """What a finetuning stage starts from."""

    model: Any
    tokenizer: Any
    meta: dict[str, Any]  # of the checkpoint
    tag: str  # of the checkpoint
    folder: Path


def start_from(
    source: str, source_tag: str | None, args: FinetuneFlags, device: torch.device
) -> Start:
    """Loads a stage's checkpoint, ready to train on: source_tag's, or --model_tag's if the stage
    has one of that name, or the newest."""
    tag = source_tag or (args.model_tag if args.model_tag in list_tags(source) else None)
    folder = find_checkpoint(source, tag, args.step)
    meta = read_meta(folder)
    tokenizer = checkpoint_tokenizer(meta, folder)
    model = build_model(config_from_dict(meta["config"], str(folder)), device)
    load_weights(folder, model)
    print0(f"starting from {folder}")
    return Start(model, tokenizer, meta, folder.parent.name, folder)


def load_base(tag: str, model: Any, tokenizer: Tokenizer) -> None:
    """Continued pretraining: fills `model` with the base weights of that tag.

    Only the row length may differ. UserError for another shape or another tokenizer."""
    folder = find_checkpoint("base", tag)
    meta = read_meta(folder)
    if checkpoint_tokenizer(meta, folder).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--source_tag={tag}: {folder} was trained with --tokenizer={meta['tokenizer']}"
        )
    there = config_from_dict(meta["config"], str(folder))
    if replace(there, sequence_len=model.config.sequence_len) != model.config:
        raise UserError(
            f"--source_tag={tag}: {folder} holds {there}, but --arch and --depth ask for "
            f"{model.config}"
        )
    load_weights(folder, model)
    print0(f"starting from {folder}")
