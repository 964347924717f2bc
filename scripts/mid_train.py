"""
Midtraining: the base model meets conversations, multiple choice and tools.

    python -m scripts.mid_train
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --run=d20
    python -m scripts.mid_train --data=my_conversations.jsonl --preview

Starts from the newest base model (or --source_tag), sees the mixture once, and saves to
mid_checkpoints/<tag>/. Row length, batch, rates and optimizer state are those of the base model
unless given; where that is fewer than 100 steps, the batch is smaller and so are the rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat import flags
from nanochat.finetune import ConversationFlags, finetune

# 460K conversations; 100K questions whose answer is a letter; 7K problems with calculator calls;
# words to spell and letters to count; who the model is (docs/identity.md), twice.
MIXTURE = "smoltalk | mmlu-aux | gsm8k | spelling@200000 | spellingbee@80000 | identity*2"
VAL_MIXTURE = "smoltalk@5000 | mmlu@5000 | gsm8k@400"
CHAT_TASKS = "mmlu | gsm8k"


@dataclass
class Args(ConversationFlags):
    """Midtrain a base model on conversations."""

    eval_every: int = 150
    """Steps between evaluations; -1: only at the end."""


def main(args: Args) -> None:
    finetune(args, "mid", MIXTURE, VAL_MIXTURE, CHAT_TASKS)


if __name__ == "__main__":
    flags.run(main, Args)
