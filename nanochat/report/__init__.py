"""
The report card: metrics files in, one Markdown file and one page out.

Every stage appends what it measures to files while it runs. The report reads those and nothing
else, so it can be made at any time, offline, of a run that is half done or was made elsewhere:

    python -m nanochat.report [--model_tag=d4] [--out=report.md] [--gpu_hour_price=2.5]

The page (html.py) is the same text with the curves drawn into it, in one file that needs no other.

Files: <stage>_checkpoints/<tag>/log.jsonl (the events of one training run, see runs.py), and in
$NANOCHAT_BASE_DIR/report/ chat_eval.jsonl, base_eval.jsonl, tok_train.jsonl and tok_eval.jsonl (one
row a measurement). For every stage the report shows the newest run, or the one of --model_tag.
"""
