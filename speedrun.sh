#!/usr/bin/env bash
# From text to a model you talk to: tokenizer, base, mid, SFT, RL, evaluations, report.
#
#     bash speedrun.sh             # the scale of the hardware it finds
#     bash speedrun.sh my-run      # logs to wandb under that name as well
#
# Everything lands in $NANOCHAT_BASE_DIR (default ~/.cache/nanochat). Then talk to it:
#
#     source .venv/bin/activate
#     python -m scripts.chat_cli -p "What is 27 + 15?"
#     python -m scripts.chat_web
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
RUN="${1:-dummy}"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
NPROC="$(python -c 'import torch; print(torch.cuda.device_count())')"

if [ "$NPROC" -eq 0 ]; then
    # ---------------------------------------------------------------------------------------------
    # CPU: the primer, a small closed world that the package itself writes. d3 is 192 wide: 1.9M
    # parameters, 12 MFLOP a token forward and backward. Two cores see 5,000 to 14,000 tokens a
    # second: 1.5M tokens of text, 2.3M of conversations, and a little for RL.
    # Idle threads sleep instead of spinning: anything else that runs would slow us tenfold.
    export OMP_WAIT_POLICY=PASSIVE
    # 2,048 tokens a step is a 256th of what the default rates are for: smaller batch, smaller rates.
    LR="--embedding_lr=0.02 --unembedding_lr=0.002"
    MID="primer-choice@6000 | primer-letters@2000 | primer-facts@6000 | primer-spelling*3"
    MID="$MID | primer-chat@5000 | primer-arithmetic@2500 | primer-self@5000 | primer-math@300"
    SFT="primer-choice@2000 | primer-facts@4000 | primer-spelling | primer-self@4000"
    SFT="$SFT | primer-chat@3000 | primer-arithmetic@2000 | primer-math@150"
    TASKS="primer-arithmetic|primer-spelling|primer-facts|primer-choice|primer-math"
    TASKS="$TASKS|primer-self|primer-chat"
    echo "No GPU: training on the embedded primer data"
    python -m nanochat.primer
    python -m scripts.tok_train --vocab_size=1536
    python -m scripts.tok_eval
    # First how to look something up in the text before: a small model finds that out within half
    # a million tokens if nothing distracts it (short rows of lists), and else not in four million.
    python -m scripts.base_train --data="$NANOCHAT_BASE_DIR/primer_lists" --model_tag=lists \
        --depth=3 --max_seq_len=48 --device_batch_size=40 --total_batch_size=1920 \
        --num_iterations=340 --eval_every=170 --eval_tokens=9600 --core_metric_every=-1 \
        --sample_every=-1 --run="$RUN" $LR --matrix_lr=0.008
    # A smaller rate, and lists among the texts: with a larger one it forgets how.
    python -m scripts.base_train --source_tag=lists --depth=3 --max_seq_len=256 \
        --device_batch_size=8 --total_batch_size=2048 --num_iterations=400 --eval_every=200 \
        --eval_tokens=65536 --core_metric_every=-1 \
        --sample_prompts="The capital of France is|A dog says" --run="$RUN" $LR --matrix_lr=0.006
    LR="$LR --matrix_lr=0.01"
    python -m scripts.base_eval --split_tokens=65536
    python -m scripts.mid_train --mixture="$MID" --val_mixture=primer-chat \
        --max_seq_len=128 --device_batch_size=16 --num_iterations=1000 --eval_every=500 \
        --run="$RUN" $LR
    python -m scripts.chat_eval -i mid -a "$TASKS" -b 128 -m 100
    python -m scripts.chat_sft --mixture="$SFT" --val_mixture=primer-chat \
        --device_batch_size=8 --total_batch_size=2048 --num_iterations=150 --init_lr_frac=0.3 \
        --run="$RUN" $LR
    python -m scripts.chat_eval -i sft -a "$TASKS" -b 128 -m 100
    python -m scripts.chat_rl --task=primer-math --num_iterations=30 --num_samples=8 \
        --device_batch_size=32 --max_new_tokens=100 --init_lr_frac=0.15 --eval_every=-1 \
        --eval_examples=500 --eval_samples=0 --run="$RUN" $LR
    python -m scripts.chat_eval -i rl -a "$TASKS" -b 128 -m 100
else
    # ---------------------------------------------------------------------------------------------
    # GPU: d20, 561M parameters. Chinchilla's 20 tokens a parameter: 11.2B tokens. At 4.8 characters
    # a token that is 54B characters; a shard holds 0.25B: 216 shards, and a few to spare: 240.
    # 11.2B tokens x 6 x 477M matmul parameters (all but the embedding) and attention: 4e19 FLOPs,
    # 3.4 hours on 8 H100 at 40% of their 989 TFLOP/s; `python -m scripts.plan --depth=20` has more.
    train() { torchrun --standalone --nproc_per_node="$NPROC" -m "$@"; }
    python -m nanochat.dataset -n 8
    python -m nanochat.dataset -n 240 &   # the rest, while the tokenizer trains on 2B characters
    DOWNLOAD=$!
    python -m scripts.tok_train --max_chars=2000000000
    python -m scripts.tok_eval
    wait "$DOWNLOAD"
    train scripts.base_train -- --depth=20 --run="$RUN"
    train scripts.base_eval
    train scripts.mid_train -- --run="$RUN"
    train scripts.chat_eval -- -i mid
    train scripts.chat_sft -- --run="$RUN"
    train scripts.chat_eval -- -i sft
    train scripts.chat_rl -- --run="$RUN"
    train scripts.chat_eval -- -i rl -a gsm8k
fi
python -m nanochat.report
