"""
Supervised finetuning: the last polish on the conversations we want most.

    python -m scripts.chat_sft
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --run=d20

Starts from the newest midtrained model (--source=base: straight from the base model) and saves to
chatsft_checkpoints/<tag>/. Row length, batch, rates and optimizer state are those of that model
unless given; where that is fewer than 100 steps, the batch is smaller and so are the rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat import flags
from nanochat.finetune import ConversationFlags, finetune

# 23K conversations: choices, word problems, talk, a little spelling, who the model is
MIXTURE = (
    "arc-easy | arc-challenge | gsm8k | smoltalk@10000 | spelling@300 | spellingbee@300 | identity"
)
VAL_MIXTURE = "smoltalk@2000"
CHAT_TASKS = "arc-easy | mmlu | gsm8k"


@dataclass
class Args(ConversationFlags):
    """Finetune a model on a small set of good conversations."""

    source: flags.Source = "mid"
    """Stage to start from: base, mid or sft."""
    init_lr_frac: float = 0.2
    """Learning rates start at this share of the values above."""
    warmdown_ratio: float = 1.0
    """Share of the run over which the learning rate falls: all of it."""
    eval_every: int = 100
    """Steps between evaluations; -1: only at the end."""
    sample_every: int = 100
    """Steps between samples; -1: only at the end."""
    chat_eval_every: int = 100
    """Steps between evaluations of --chat_eval_tasks, the first before training; -1: never."""


def main(args: Args) -> None:
    finetune(args, "sft", MIXTURE, VAL_MIXTURE, CHAT_TASKS)


if __name__ == "__main__":
    flags.run(main, Args)
