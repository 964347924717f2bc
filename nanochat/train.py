"""
What the four training stages share: the step, saving and resuming, the log.

A stage's script holds its recipe and drives a Trainer:

    for step in trainer.steps():        # resumed step .. num_steps
        if trainer.is_due(...): evaluate, sample, trainer.save()
        if step == num_steps: continue
        trainer.step(loader.step(step), lr_multiplier(...))

A run that is killed at any moment and resumed is the run that was not: every random choice is made
from the seed and the step, and what cannot be computed again is in the checkpoint. Floor 4.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from nanochat import rank_log, schedule
from nanochat.checkpoint import (
    LOG,
    claim,
    load_weights,
    optim_reader,
    prune,
    run_dir,
    set_aside,
    set_log_aside,
    snapshot,
    step_dir,
    write_checkpoint,
)
from nanochat.common import UserError, append_jsonl, print0, warn0
from nanochat.dataloader import MicroBatch, StepLoader
from nanochat.distributed import at_step, sum_over_ranks
from nanochat.machine import peak_memory
from nanochat.meter import Meter, QuietCollector, StepRecord
from nanochat.models import config_to_dict
from nanochat.optim import refuse_divergence
from nanochat.progress import Progress, duration
from nanochat.record import find_log, first_start, run_record
from nanochat.shard import gathered
from nanochat.start import find_resumable, identity, refuse_changes
from nanochat.step import TrainStep, is_out_of_memory, out_of_memory

T = TypeVar("T")


@dataclass
class TrainState:
    """Where a run stands. Everything else that a resume needs follows from it and the files."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # positions seen, over all ranks
    seconds: float = 0.0  # spent in steps
    smooth_loss: float = 0.0  # exponential mean of the logged loss, bias not corrected


class Trainer:
    """Runs one stage's optimization. `meta` describes the run in its checkpoints:

    tokenizer (name), tokenizer_fingerprint, data (fingerprints by role), started_from (unless it
    starts from nothing) and what the stage adds."""

    def __init__(
        self,
        stage: str,
        tag: str,
        step: TrainStep,
        num_steps: int,
        meta: dict[str, Any],
        loader: StepLoader | None = None,
    ) -> None:
        self.stage, self.tag, self.num_steps, self.meta = stage, tag, num_steps, meta
        self.train_step, self.args, self.info = step, step.args, step.info
        self.model, self.optimizer = step.model, step.optimizer
        self.loader = loader  # of data in fixed rows; RL has none
        if str(meta.get("started_from")).startswith(f"{stage} {tag} "):
            raise UserError(
                f"--model_tag={tag} is what this run starts from; its checkpoints would take the "
                "place of their own beginning. Give another --model_tag"
            )
        self.state = TrainState()
        self.metrics: dict[str, Any] = {}  # the last evaluation of each kind
        # RL samples its replies between two steps: that is not the step's time, and waits anyway.
        lag = self.info.device.type == "cuda" and loader is not None
        self.meter = Meter(self._account, lag, gaps=loader is not None)
        self.collector = QuietCollector()
        self.log_path = run_dir(stage, tag) / LOG
        self.wandb: Any = None
        self._wandb_id: str | None = None
        self._events_done = False  # those of the present step, before the checkpoint we resumed
        self._saved: tuple[int, bool] | None = None  # step and events done of the newest checkpoint
        # A new run of an old tag moves the old one aside at its first save, a resumed run what
        # was saved after its checkpoint: later steps would else pass for this run's.
        self._aside_after: int | None = -1
        self._log_mark = 0  # bytes of the log before the events of the present step
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._stop_signal = 0
        self.bar = Progress(num_steps, stage)  # not begun: steps() has another

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The context to evaluate in, in the format that the run computes in. All ranks must enter
        it: see shard.gathered."""
        with gathered(self.model), self.train_step.precision.autocast():
            yield

    # ---------------------------------------------------------------------------------------------
    # Life of a run

    def steps(self) -> Iterator[int]:
        """Yields each step number from the first (or resumed) one to num_steps, which is the end.

        SIGTERM and Ctrl-C let the step under way finish, break off an evaluation or rollouts, save,
        and end the process with status 0. A second Ctrl-C does not wait."""
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._check_repeats()
            if self.args.dry_run:
                print0(f"--dry_run: {self.stage} {self.tag} could begin; nothing was trained")
                return
            if self.info.rank == 0:
                claim(self.stage, self.tag)
            self._resume()
            self._start_log()
            self.collector.start()
            with Progress(
                self.num_steps, self.stage, "steps", start=self.state.step, stdout=True,
                ticking=False,
            ) as self.bar:  # fmt: skip
                yield from self._each_step()
        finally:
            self.collector.restore()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            self._writer.shutdown()  # an error waits for the save in flight, too
            if self._writing is not None and (error := self._writing.exception()):
                warn0(str(error))
        self.log("end", final=self.metrics, seconds=self.state.seconds)
        if self.wandb is not None:
            self.wandb.finish()

    def _each_step(self) -> Iterator[int]:
        while True:
            step = self.state.step
            alone = self.info.world_size == 1
            if self.stopping() if alone else self.train_step.stop_agreed:
                self._stop()
            yield step
            self._events_done = False
            if step >= self.num_steps:  # the last one was for final evaluations only
                break
            if self._writing is not None and self._writing.done():
                self._wait_for_save()  # a full disk ends the run now, not at the next save
        self.meter.flush()
        self._wait_for_save()

    def is_due(self, every: int, *, at_start: bool = False) -> bool:
        """Whether an event of every so many steps is due now (schedule.is_due), and was not done
        before the checkpoint that was resumed. The clock of the steps stands still from then."""
        due = schedule.is_due(self.state.step, every, self.num_steps, at_start=at_start)
        if due and not self._events_done:
            self.meter.pause()
            self.collector.collect()
            return True
        return False

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._stop_signal = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # print() is not safe in a signal handler. When a rank has failed torchrun ends the others
        if self.info.rank == 0 and not rank_log.another_failed():
            os.write(2, b"\nstopping: saving after this step; Ctrl-C quits at once, unsaved\n")

    def stopping(self) -> bool:
        """Whether this rank got a signal: what it does between two steps may be broken off."""
        return self._stop_signal > 0

    def until_stopping(self, items: Iterable[T]) -> Iterator[T]:
        """The items, at least one of them, until there is a signal."""
        for item in items:
            yield item
            if self.stopping():
                return

    def end_if_stopped(self) -> None:
        """Saves and ends the process with status 0 if any rank got a signal. All ranks must call
        it, after whatever they broke off: or they would wait for each other."""
        if sum_over_ranks(float(self.stopping()), device=self.info.device)[0] > 0:
            self._stop()

    def _stop(self) -> None:
        self.save(events_done=False)
        self._wait_for_save()
        print0(f"stopped by a signal at step {self.state.step}; continue with --resume")
        sys.exit(0)

    def _identity(self) -> dict[str, Any]:
        return identity(self.args, self.model, self.num_steps, self.meta)

    def _check_repeats(self) -> None:
        """Refuses, as --repeats asks, to be another run than that one."""
        if self.args.repeats is None:
            return
        log = find_log(self.args.repeats)
        if log.resolve() == self.log_path.resolve():
            raise UserError(
                f"--model_tag={self.tag} is the run to repeat, and would be replaced by its "
                "repetition; give another --model_tag"
            )
        then, now = first_start(log)["identity"], self._identity()
        refuse_changes(log.parent, then, now, self.args.allow_changes, "repeat")

    def _resume(self) -> None:
        found = find_resumable(self.stage, self.tag, self.args, self.info)
        if found is None:
            return
        folder, meta = found
        refuse_changes(folder, meta["identity"], self._identity(), self.args.allow_changes)
        load_weights(folder, self.model)
        self.optimizer.load_state_dict(optim_reader(folder), meta["optimizer_steps"])
        self.train_step.scaler.load_state(meta.get("loss_scale", {}))
        self.state = TrainState(**meta["state"])
        self.metrics, self._events_done = meta["metrics"], meta["events_done"]
        self._saved = (self.state.step, self._events_done)
        self._aside_after = self.state.step
        self._wandb_id = meta["wandb_id"]
        place = ""
        if self.loader is not None:
            self.loader.load_state(meta["loader"])
            place = f", row {self.state.step * self.loader.rows_per_step} of the data"
        if self.info.rank == 0:
            prune(folder, self.args.keep_last)  # as the run would have, had it not been killed
            if self._log_size() > meta["log_size"]:
                os.truncate(self.log_path, meta["log_size"])  # steps that will be taken again
        print0(f"resumed {folder} at step {self.state.step}{place}")
        if self._events_done and self.state.step >= self.num_steps:
            print0("this run has ended already: nothing is left to do")

    # ---------------------------------------------------------------------------------------------
    # Saving

    def save(self, events_done: bool = True) -> None:
        """Saves the present step. All ranks must call it; training goes on while rank 0 writes.

        It takes as long as a copy to the host's memory (weights and optimizer state, once), and
        waits for the save before if that is still being written. `events_done`: the evaluations
        that are due at this step have been made, and a resumed run need not make them again."""
        this = (self.state.step, events_done)
        if self._saved is not None and self._saved >= this:
            return
        self.meter.pause()
        self._wait_for_save()
        optim_state, weights = self.optimizer.state_dict(), snapshot(self.model.state_dict())
        if self.info.rank == 0:
            meta = self._checkpoint_meta(events_done)
            self._writing = self._writer.submit(
                self._write, weights, optim_state, meta, self._aside_after
            )
        self._saved, self._aside_after = this, None

    def _write(
        self, weights: Any, optim_state: Any, meta: dict[str, Any], aside_after: int | None
    ) -> None:
        """In the thread: nothing in here may look at what training changes."""
        if aside_after is not None:
            set_aside(self.stage, self.tag, aside_after)
        folder = step_dir(self.stage, self.tag, meta["step"])
        write_checkpoint(folder, weights, optim_state, meta, self.args.keep_last)
        print0(f"saved {folder}")

    def _wait_for_save(self) -> None:
        """Until the save in flight, if there is one, is whole. Its error is raised here."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _checkpoint_meta(self, events_done: bool) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "step": self.state.step,
            "config": config_to_dict(self.model.config),
            **self.meta,
            "args": asdict(self.args),
            "identity": self._identity(),
            "state": asdict(self.state),
            "optimizer_steps": self.optimizer.num_steps,
            "loss_scale": self.train_step.scaler.state(),
            "metrics": dict(self.metrics),
            "loader": self.loader and self.loader.state(self.state.step),
            "events_done": events_done,
            # A resumed run cuts the log here: what follows will be written again.
            "log_size": self._log_size() if events_done else self._log_mark,
            "wandb_id": self.wandb and self.wandb.id,
        }

    # ---------------------------------------------------------------------------------------------
    # The step

    def step(
        self,
        batches: list[MicroBatch],
        lr_mul: float,
        momentum: float = 0.95,
        decay_mul: float = 1.0,
    ) -> None:
        """One optimizer step over this rank's micro-batches: see TrainStep.take. All ranks must
        call it. UserError if memory runs out.

        On a GPU the step is queued, not done, when this returns; flush() waits for it."""
        self.meter.begin()
        number = self.state.step + 1
        at_step(number)
        try:
            rates = (lr_mul, momentum, decay_mul)
            record = self.train_step.take(number, batches, rates, self.stopping())
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            self._wait_for_save()
            raise out_of_memory(e, number, batches, self._saved and self._saved[0]) from e
        self.state.step = number
        self.meter.end(record)
        self.collector.after_step()

    def flush(self) -> None:
        """Waits for the steps that are queued, and logs them."""
        self.meter.flush()

    def _account(self, record: StepRecord, loss: float, norm: float, seconds: float) -> None:
        """Counts and logs a step that is done."""
        s, step = self.state, record.step
        if not record.skipped:
            refuse_divergence(norm, step)
        s.tokens += record.tokens
        s.seconds += seconds
        if math.isfinite(loss):  # else float16 overflowed and the step was left out
            s.smooth_loss = 0.9 * s.smooth_loss + 0.1 * loss
        smooth = s.smooth_loss / (1 - 0.9**step)
        rate = record.tokens / seconds
        mfu = self.train_step.mfu(rate)
        skipped = (
            {"skipped": True, "loss_scale": self.train_step.scaler.scale} if record.skipped else {}
        )
        self._write_row(
            "step", step, loss=loss if math.isfinite(loss) else None, lr_mul=record.lr_mul,
            grad_norm=norm, tokens=s.tokens, tokens_per_second=rate, mfu=mfu, seconds=s.seconds,
            memory_gib=peak_memory(self.info.device.type), **skipped,
        )  # fmt: skip
        self._log_mark = self._log_size()  # what follows are events after this step
        line = f"{self.stage} step {step}/{self.num_steps} | loss {smooth:.4f}"
        for name in ("val_bpb", "val_loss", "reward"):
            if name in self.metrics:
                line += f" | {name} {self.metrics[name]:.4f}"
        line += f" | {rate:,.0f} tok/s"
        line += f" | mfu {100 * mfu:.1f}%" if mfu is not None else ""
        self.bar.advance(show=False)
        line += f" | {duration(s.seconds)}, {self.bar.rest()}"
        self.bar.show(line, now=step <= 3, last=step >= self.num_steps)

    # ---------------------------------------------------------------------------------------------
    # The log

    def _start_log(self) -> None:
        if self.args.run != "dummy" and self.info.rank == 0:
            try:
                import wandb
            except ImportError as e:
                raise UserError("--run needs wandb: `uv pip install wandb`, or drop --run") from e
            self.wandb = wandb.init(
                project="nanochat", name=self.args.run, config=asdict(self.args),
                id=self._wandb_id, resume="allow",
            )  # fmt: skip
            # Steps taken again after a kill are drawn over themselves; wandb's own count of steps
            # only goes up and would drop them.
            self.wandb.define_metric("*", step_metric="step")
        groups = self.model.param_groups()
        parts = {name: sum(p.numel() for p in params) for name, params in groups.items()}
        num_params = sum(parts.values())
        shared = f", --shard={self.args.shard}" if self.info.world_size > 1 else ""
        print0(
            f"{self.stage}: {self.tag}, {num_params:,} parameters, {self.num_steps} steps, "
            f"{self.info.world_size} rank(s) on {self.info.device.type}{shared}\n"
            f"computing in {self.train_step}"
        )
        if self.info.rank == 0 and self._saved is None:
            set_log_aside(self.stage, self.tag)  # a new run of this tag
        if self.info.rank == 0:
            self.log(
                "start", args=asdict(self.args), model=config_to_dict(self.model.config),
                num_params=num_params, params=parts, num_steps=self.num_steps,
                flops_per_token=self.model.flops_per_token(), identity=self._identity(),
                dtype=self.train_step.precision.name, compiled=self.train_step.compiled.on,
                **self.meta, **run_record(self.args, self.log_path.parent, self.info.world_size),
            )  # fmt: skip
        self._log_mark = self._log_size()

    def log(self, event: str, *, of_step: bool = False, **values: Any) -> None:
        """One row in the run's JSONL file (rank 0), and in wandb if --run names a run. Rows of the
        steps before it come first. `of_step`: it belongs to the step just taken, and is not written
        again by a run that is resumed after that."""
        self.meter.flush()
        self._write_row(event, self.state.step, **values)
        if of_step:
            self._log_mark = self._log_size()

    def _write_row(self, event: str, step: int, **values: Any) -> None:
        if self.info.rank != 0:
            return
        row = {"event": event, "stage": self.stage, "step": step, **values}
        try:
            append_jsonl(self.log_path, {**row, "time": time.time()})
        except OSError as e:  # often the first to notice that the disk is full
            raise UserError(
                f"{self.log_path} cannot be written: {e}. Mend that and continue with --resume; "
                "checkpoints are untouched"
            ) from e
        if self.wandb is not None and event not in ("start", "end"):
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self.wandb.log({f"{event}/{k}": v for k, v in numbers.items()} | {"step": row["step"]})

    def _log_size(self) -> int:
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def record(self, event: str = "eval", **metrics: Any) -> None:
        """Logs an evaluation, shows it, and keeps it for the checkpoint. All ranks must call it.

        After a signal it ends the run instead: the evaluation may have been broken off."""
        self.end_if_stopped()
        self.metrics.update(metrics)
        self.log(event, **metrics)
        shown = ", ".join(
            f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()
        )
        print0(f"{self.stage} step {self.state.step}: {shown}")
