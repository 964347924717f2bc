"""
Reinforcement learning on problems whose answers can be checked (GSM8K, or rows of that form).

    python -m scripts.chat_rl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --run=d20

Each step takes a few problems, samples several replies to each, rewards the right ones, and makes
what did better than its group's mean more likely. Starts from the newest SFT model and saves to
chatrl_checkpoints/<tag>/. Rates and optimizer are its own: gradients of rewards are unlike those of
text. With --lora_rank little memory is needed beside the weights. See nanochat/rollout.py
for the method, nanochat/policy.py for the loss, and nanochat/rewards.py for rewards of your own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat import distributed, flags, lora
from nanochat.common import UserError, fingerprint, seed_from, warn0
from nanochat.distributed import max_over_ranks, sum_over_ranks
from nanochat.engine import Engine
from nanochat.evals.chat import run_chat_eval
from nanochat.evals.pass_at_k import interval, sampled_passes
from nanochat.plan import settle
from nanochat.policy import Policy, PolicyBatch, compared, frozen_copy
from nanochat.preview import preview_problems
from nanochat.rewards import Reward, get_reward
from nanochat.rollout import Rollouts, problem_order, sample_rollouts, spare_problems, to_batches
from nanochat.schedule import lr_multiplier
from nanochat.start import Start, optimizer_of, start_from
from nanochat.step import TrainStep
from nanochat.tasks.common import Task, get_task
from nanochat.tasks.custom import load_own
from nanochat.train import Trainer
from nanochat.trial import confirm


@dataclass
class Args(lora.LoraFlags, flags.FinetuneFlags):
    """Improve a chat model by rewarding right answers."""

    source: flags.Source = "sft"
    """Stage to start from: mid, sft or rl."""
    source_tag: str | None = None
    """Tag to start from; default: --model_tag if that exists there, else the newest run."""
    task: str = "gsm8k"
    """Problems: gsm8k, or a name or folder of own rows that has a train and a test split."""
    data: str | None = None
    """Own problems, in place of --task: a file, folder or glob of parquet or jsonl(.gz, .zst) with
    `question` and `answer` (ending in #### NUMBER)."""
    val_data: str | None = None
    """Validation file; default: some of --data, pinned at first use."""
    reward: str = "task"
    """What a reply earns: task (1 if the task finds it right, else 0), lenient (the same, with the
    answer wherever the reply gives it), or module:function of your own, called with problem and
    reply. Evaluation goes by the task."""
    num_iterations: int = -1
    """Optimizer steps; -1: --num_epochs over the problems."""
    num_epochs: float = 1.0
    """Times the problems are seen, where --num_iterations does not say."""
    examples_per_step: int = 16
    """Problems in one optimizer step, over all ranks."""
    num_samples: int = 16
    """Replies sampled for each problem."""
    device_batch_size: int | Literal["auto"] = "auto"
    """Replies in one micro-batch of training on one rank. auto: as many as have the tokens that fit
    and keep the device busy. Results do not depend on it."""
    max_new_tokens: int = 256
    """Longest reply, in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_k: int = 50
    """Sample among this many tokens; 0: all."""
    advantage_std: bool = False
    """Divide a group's advantages by the standard deviation of its rewards (GRPO): problems that
    are nearly always or nearly never solved then weigh as much as the others."""
    refill_rounds: int = 0
    """Groups whose replies all earn the same teach nothing and are dropped; as often as this, a
    step samples further problems in their place."""
    inner_steps: int = 1
    """Optimizer steps on the same replies."""
    clip: float = 0.0
    """How far the ratio of a token's probability to what it was when sampled may carry it: PPO's
    epsilon, 0.2 for one; 0: any distance. With --inner_steps=1 every ratio is 1."""
    kl: float = 0.0
    """Weight of the KL divergence from the model that training started with, of which a frozen copy
    is kept (with --lora_rank on one device, without memory of its own); 0: none."""
    init_lr_frac: float = 0.05
    """Learning rates start at this share of the values above, and fall to 0."""
    lora_lr: float = 1e-4
    """AdamW learning rate of LoRA's matrices at the start, whatever --init_lr_frac says."""
    eval_every: int = 60
    """Steps between evaluations on held-out problems; -1: only before and after."""
    eval_examples: int = 400
    """Held-out problems of an evaluation."""
    eval_samples: int = 4
    """Replies sampled for each problem of an evaluation, at --temperature and --top_k, for pass@1
    to pass@k beside the pass@1 of the one most likely reply; 0: none."""
    save_every: int = 60
    """Steps between checkpoints; -1: only at the end."""


# Share of replies broken off by --max_new_tokens above which a warning is due: they are rewarded as
# they stand, mostly as wrong, whatever they were about to say.
MANY_TRUNCATED = 0.1
# Mean |difference| of the engine's and the trainer's log-probabilities, in nats, above which what
# is trained is no longer what was sampled from. bfloat16 alone makes about 0.01.
LARGE_DIFFERENCE = 0.1


def main(args: Args) -> None:
    # Looking at data needs no GPU
    device_type = "cpu" if args.preview else args.device_type
    with distributed.session(device_type, args.seed, args.deterministic, args.rank_timeout) as info:
        start = start_from(args.source, args.source_tag, args, info.device)
        train(args, start, info)


def problems_of(args: Args) -> tuple[Task, Task | None, str]:
    """Problems to learn from, those held out (None if there are too few), and which these are."""
    # A lone file as --task has no splits: it is own data
    data = args.data or (args.task if Path(args.task).is_file() else None)
    if data is not None:
        own = load_own(data, args.val_data, answers=True)
        return own.train, own.val, own.validation
    if args.val_data:
        raise UserError(f"--val_data={args.val_data} belongs to --data; --task has a test split")
    return get_task(args.task, "train"), get_task(args.task, "test"), f"test split of {args.task}"


def check(args: Args, world_size: int) -> None:
    """UserError for flags that contradict each other, or leave nothing to do."""
    if args.examples_per_step < 1:
        raise UserError(f"--examples_per_step={args.examples_per_step} must be at least 1")
    if args.examples_per_step < world_size:
        warn0(
            f"--examples_per_step={args.examples_per_step} leaves some of {world_size} ranks "
            "without a problem: they wait"
        )
    if args.num_samples < 2:
        raise UserError(
            f"--num_samples={args.num_samples}: a group's mean needs at least 2 replies"
        )
    if args.inner_steps < 1:
        raise UserError(f"--inner_steps={args.inner_steps} must be at least 1")
    for name in ("num_iterations", "eval_every", "save_every"):
        value = getattr(args, name)
        if value > 0 and value % args.inner_steps:
            raise UserError(
                f"--{name}={value} is no multiple of --inner_steps={args.inner_steps}: between the "
                "steps on the same replies nothing is evaluated or saved"
            )
    if not 0 <= args.clip < 1 or args.kl < 0:
        raise UserError(f"--clip={args.clip} must be in [0, 1), --kl={args.kl} at least 0")


def train(args: Args, start: Start, info: distributed.DistInfo) -> None:
    model, tokenizer = start.model, start.tokenizer
    check(args, info.world_size)
    task, val_task, validation = problems_of(args)
    reward = get_reward(args.reward, task)
    if args.preview:
        seq_len = model.config.sequence_len
        return preview_problems(task, val_task, tokenizer, seq_len, args.max_new_tokens)
    num_steps = args.num_iterations
    if num_steps <= 0:
        num_steps = max(1, round(args.num_epochs * len(task) / args.examples_per_step))
        num_steps *= args.inner_steps
    rows_per_step = args.examples_per_step * args.num_samples
    # The longest reply that a row may hold, after a question
    length = model.config.sequence_len
    one_copy = not args.kl or (args.lora_rank and info.world_size == 1)
    settled = settle(
        args, model.config, info, rows_per_step, length, copies=1 if one_copy else 2,
        fixed_rows=False,
    )  # fmt: skip
    model = start.place(args, info, settled[1])
    # Before LoRA, and before the Trainer, which may load a resumed run's weights
    reference = frozen_copy(model, args.lora_rank > 0) if args.kl else None
    optimizer = optimizer_of(args, start, info)
    train_step = TrainStep(args, info, model, optimizer)
    micro_batch = confirm(settled, train_step, rows_per_step, length)
    problems = fingerprint(*(json.dumps(task[i]) for i in range(len(task))))
    trainer = Trainer(
        "rl", args.model_tag or start.tag, train_step, num_steps,
        start.describe(problems, validation),
    )  # fmt: skip
    engine = Engine(model, tokenizer)
    policy = Policy(
        model, train_step.forward, engine.vocab_size, clip=args.clip, kl=args.kl,
        reference=reference,
    )  # fmt: skip
    train_step.forward = policy
    warned: set[str] = set()

    for step in trainer.steps():
        if val_task is not None and (trainer.is_due(args.eval_every) or step == 0):
            trainer.record(**evaluate(args, val_task, trainer, engine))
        if trainer.is_due(args.save_every):
            trainer.save()
        if step == num_steps:
            continue  # nothing more to train on; the Trainer ends the run

        with trainer.autocast():
            rollouts = replies_of(step, args, task, reward, engine, trainer)
        trainer.end_if_stopped()  # the replies may have been broken off
        n, reward_sum = sum_over_ranks(
            rollouts.rewards.size, rollouts.rewards.sum(), device=info.device
        )
        trainer.metrics["reward"] = reward_sum / n  # for the line of the step
        batches = to_batches(
            rollouts, micro_batch, tokenizer.get_bos_token_id(), info.device, args.advantage_std,
            max_tokens=micro_batch * length if args.device_batch_size == "auto" else None,
        )  # fmt: skip
        with trainer.autocast():
            policy.begin(batches)
        for inner in range(args.inner_steps):
            # The rate falls linearly over the whole run
            trainer.step([*batches], lr_multiplier(step + inner, num_steps, warmdown_ratio=1.0))
            if inner == 0:
                log_replies(args, rollouts, batches, trainer, warned)


def replies_of(
    step: int, args: Args, task: Task, reward: Reward, engine: Engine, trainer: Trainer
) -> Rollouts:
    """This rank's replies of a step, with further problems for groups that teach nothing."""
    rank, world = trainer.info.rank, trainer.info.world_size
    seed = seed_from(args.seed, "rollouts", step)

    def sample(problems: list[int]) -> Rollouts:
        return sample_rollouts(
            engine, task, problems[rank::world], reward=reward,
            num_samples=args.num_samples, max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, top_k=args.top_k or None,
            seed=seed, stopped=trainer.stopping,
        )  # fmt: skip

    first = step // args.inner_steps * args.examples_per_step
    used = problem_order(len(task), args.seed, first, args.examples_per_step)
    rollouts = sample(used)
    for _ in range(args.refill_rounds):
        # The same on all ranks: they go round as often
        (useful,) = sum_over_ranks(rollouts.useful.sum(), device=trainer.info.device)
        further = spare_problems(len(task), seed, used, args.examples_per_step - int(useful))
        if not further:
            break
        rollouts, used = rollouts + sample(further), used + further
    return rollouts


def log_replies(
    args: Args, rollouts: Rollouts, batches: list[PolicyBatch], trainer: Trainer, warned: set[str]
) -> None:
    """Logs what all ranks' replies earned and how they ended, and how the first step on them saw
    what the engine had sampled; warns once of what is wrong."""
    device, seen = trainer.info.device, compared(batches)
    n, reward, tokens, ended, groups, useful, looked_at, diff, kl = sum_over_ranks(
        rollouts.rewards.size, rollouts.rewards.sum(), rollouts.lengths.sum(),
        rollouts.ended.sum(), len(rollouts.rewards), rollouts.useful.sum(),
        seen["tokens"], seen["diff"], seen["kl"], device=device,
    )  # fmt: skip
    diff_max = max_over_ranks(seen["diff_max"], device)
    mean_diff, truncated = diff / max(1.0, looked_at), 1 - ended / n
    extra = {"kl": kl / max(1.0, looked_at)} if args.kl else {}
    trainer.log(
        "rl", of_step=True, reward=reward / n, completion_tokens=tokens / n, ended=ended / n,
        truncated=truncated, groups=int(groups), useful_groups=int(useful),
        logp_diff_mean=mean_diff, logp_diff_max=diff_max, **extra,
    )  # fmt: skip
    if truncated > MANY_TRUNCATED and "truncated" not in warned:
        warned.add("truncated")
        warn0(
            f"{truncated:.0%} of the replies were broken off at --max_new_tokens="
            f"{args.max_new_tokens}, and are mostly rewarded as wrong; allow them more"
        )
    if mean_diff > LARGE_DIFFERENCE and "difference" not in warned:
        warned.add("difference")
        warn0(
            f"the engine's log-probabilities are {mean_diff:.2f} nats off the trainer's in the "
            f"mean, {diff_max:.2f} at most: what is trained is not what was sampled; try "
            "--dtype=float32"
        )


def evaluate(args: Args, task: Task, trainer: Trainer, engine: Engine) -> dict[str, Any]:
    """pass@1 of the most likely reply, and pass@k of --eval_samples sampled ones, on held-out
    problems, with 95% confidence intervals."""
    limits: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens, "max_problems": args.eval_examples,
        "stopped": trainer.stopping,
    }  # fmt: skip
    with trainer.autocast():
        result = run_chat_eval(
            task, engine.model, engine.tokenizer, engine, batch_size=128, temperature=0.0, **limits
        )
        low, high = interval(result.accuracy, result.n)
        found: dict[str, Any] = {
            "pass1": result.accuracy, "pass1_stderr": result.stderr, "pass1_low": low,
            "pass1_high": high, "problems": result.n,
        }  # fmt: skip
        if args.eval_samples > 0 and task.eval_type == "generative":
            result = run_chat_eval(
                task, engine.model, engine.tokenizer, engine,
                batch_size=max(1, 128 // args.eval_samples), num_samples=args.eval_samples,
                temperature=args.temperature, top_k=args.top_k or None, **limits,
            )  # fmt: skip
            if not trainer.stopping():
                found |= sampled_passes(result.items)
    return found


if __name__ == "__main__":
    flags.run(main, Args)
