"""The report card: what is in it, and that it can be made of whatever there is."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from nanochat.checkpoint import LOG, STAGE_FOLDERS
from nanochat.common import UserError
from nanochat.report.__main__ import Args, main
from nanochat.report.card import write_report
from nanochat.report.tables import duration, literal, percent, show, table


@pytest.fixture
def folder(own_base_dir: Path) -> Path:
    (own_base_dir / "report").mkdir(parents=True)
    return own_base_dir / "report"


def log_of(folder: Path, stage: str) -> Path:
    """The log of the run d4, in the base directory of this report."""
    return folder.parent / STAGE_FOLDERS[stage] / "d4" / LOG


def append(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def training(folder: Path, stage: str, num_steps: int = 3, **end: Any) -> None:
    """A run's file. Without `end` the run is still going."""
    start = {
        "event": "start", "step": 0, "time": 1.0, "num_params": 1234567, "num_steps": 3,
        "args": {"depth": 4, "matrix_lr": 0.02}, "model": {"n_layer": 4},
        "machine": {"cpu": "Some CPU", "cores": 2, "gpus": ["G", "G"]}, "versions": {"torch": "9"},
    }  # fmt: skip
    steps = [
        {"event": "step", "step": i, "loss": 4.0 / i, "tokens": 100 * i, "seconds": 20.0 * i,
         "tokens_per_second": 5000.0, "mfu": None}
        for i in range(1, num_steps + 1)
    ]  # fmt: skip
    append(log_of(folder, stage), start, *steps)
    if end:
        append(log_of(folder, stage), {"event": "end", "step": num_steps, **end})


def task(source: str, accuracy: float, tag: str = "d4", **more: Any) -> dict[str, Any]:
    about = {"source": source, "model_tag": tag, "step": 3, "task": "gsm8k"}
    return {**about, "accuracy": accuracy, "n": 100, "stderr": 0.05, "chance": 0.0, **more}


def test_a_whole_run(folder: Path) -> None:
    training(folder, "base", seconds=61.0, final={})
    append(log_of(folder, "base"), {"event": "eval", "step": 0, "val_bpb": 3.0})
    append(log_of(folder, "base"), {"event": "eval", "step": 3, "val_bpb": 1.25})
    sample = {"event": "sample", "step": 3, "text": "<|bos|>Hi |\nyou"}
    append(log_of(folder, "base"), sample)
    training(folder, "rl", seconds=30.0, final={})
    append(
        log_of(folder, "rl"),
        {"event": "eval", "step": 0, "pass1": 0.3, "pass1_stderr": 0.02, "problems": 500},
        {"event": "eval", "step": 3, "pass1": 0.4, "pass1_stderr": 0.03, "problems": 500},
        *({"event": "rl", "step": i, "reward": 0.5, "ended": 1.0} for i in range(3)),
    )
    append(folder / "chat_eval.jsonl", task("sft", 0.5), task("rl", 0.6, ended=0.9))
    append(folder / "chat_eval.jsonl", {**task("rl", 0.8), "task": "mmlu", "chance": 0.25})
    append(folder / "tok_train.jsonl", {"vocab_size": 1}, {"vocab_size": 4096})
    core = {"lambada": {"results": 0.5, "centered": 0.5, "n": 10, "stderr": 0.1}}
    about = {"source": "base", "model_tag": "d4", "step": 3}
    append(folder / "base_eval.jsonl", {**about, "val_bpb": 1.5}, {**about, "core_tasks": core})

    shown = write_report(folder, folder / "report.md")
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| machine | 2 x G, Some CPU, 2 cores |" in lines
    assert "| torch | 9 |" in lines
    assert "| training time | 1m 31s |" in lines
    assert "- **1.2500** bits per byte, validation" in lines
    assert "- **40.0 ± 3.0** % of unseen problems solved (rl)" in lines
    base = "| base | d4 | 1,234,567 | 3 | 300 | 1m 1s | 5,000 | val_bpb 3.0000 -> 1.2500 |"
    assert base in lines
    assert base in [" ".join(line.split()) for line in shown.splitlines()]
    assert any("pass1 0.3000 ± 0.0200 -> 0.4000 ± 0.0300" in line for line in lines)
    assert "| gsm8k | 100 | 0.0 | 50.0 ± 5.0 | 60.0 ± 5.0 |" in lines
    assert "| mmlu | 100 | 25.0 | | 80.0 ± 5.0 |" in lines
    assert "| replies that end by themselves | | | | 90.0 |" in lines
    assert "| vocab_size | 4,096 |" in lines and "| vocab_size | 1 |" not in lines
    assert "| lambada | 10 | 50.0 ± 10.0 | 50.0 |" in lines
    assert "| val_bpb | 1.5 |" in lines  # an older row of the same step adds what the newer lacks
    assert "    <|bos|>Hi | you" in text  # as code: markup in it stays text
    assert "| matrix_lr | 0.02 |" in lines
    assert "In `base_checkpoints/d4/`; `python -m scripts.rerun base/d4` repeats it." in lines


def test_a_run_under_way_says_so(folder: Path) -> None:
    training(folder, "mid", num_steps=2)
    shown = write_report(folder, folder / "report.md")
    assert "2 of 3" in shown and "40s so far" in shown and "loss 2.0000" in shown
    assert "has not ended" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_run_that_has_only_begun(folder: Path) -> None:
    training(folder, "base", num_steps=0)
    assert "0 of 3" in write_report(folder, folder / "report.md")
    assert not (folder / "loss.png").exists()
    assert "loss.png" not in (folder / "report.md").read_text(encoding="utf-8")


def test_nothing_but_a_tokenizer(folder: Path) -> None:
    """The texts in lines, the tokenizers in columns, the last measurement of each."""
    append(folder / "tok_train.jsonl", {"vocab_size": 4096, "max_chars": 10**9})
    for text, ours in (("validation", 9.0), ("validation", 4.0), ("german", 2.0)):
        for name, size in (("ours", ours), ("GPT-4", 4.5)):
            row = {"text": text, "tokenizer": name, "bytes": 1000, "bytes_per_token": size}
            append(folder / "tok_eval.jsonl", {**row, "chars_per_token": 1.5, "vocab": 512})
    write_report(folder, folder / "report.md")
    text = (folder / "report.md").read_text(encoding="utf-8")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| text | bytes | ours | GPT-4 | characters, ours |" in lines
    assert "| validation | 1,000 | 4.00 | 4.50 | 1.50 |" in lines
    assert "| german | 1,000 | 2.00 | 4.50 | 1.50 |" in lines
    assert "    python -m scripts.tok_train --max_chars=1000000000 --vocab_size=4096" in text
    assert "## Curves" not in text and "## Stages" not in text
    assert "4,096" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_it_cost(folder: Path) -> None:
    """Two GPUs, for as long as the run held them: evaluations too, but no pause before a resume."""
    start = {"event": "start", "step": 0, "machine": {"gpus": ["G", "G"]}, "world_size": 2}
    append(
        log_of(folder, "base"), {**start, "time": 1000.0},
        {"event": "step", "step": 1, "loss": 1.0, "seconds": 900.0, "time": 2000.0},
        {"event": "eval", "step": 1, "val_bpb": 1.0, "time": 2800.0},
        {**start, "step": 1, "time": 90_000.0},
        {"event": "step", "step": 2, "loss": 1.0, "seconds": 1800.0, "time": 91_800.0},
    )  # fmt: skip
    write_report(folder, folder / "report.md", gpu_hour_price=2.5)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "2 GPU-hours, $5.00 at $2.50 each" in text
    assert "30m 0s, 1h 0m with evaluations and saving in between" in text
    write_report(folder, folder / "report.md")
    assert "--gpu_hour_price" in (folder / "report.md").read_text(encoding="utf-8")


def test_data_shares_of_a_mixture(folder: Path) -> None:
    training(folder, "mid", seconds=1.0)
    shares = [{"name": "a", "rows": 10, "epochs": 2, "tokens": 300, "trained": 60},
              {"name": "b", "rows": 5, "epochs": 1, "tokens": 100, "trained": 100}]  # fmt: skip
    start = {"event": "start", "step": 3, "mixture": "a*2 | b", "shares": shares}
    append(log_of(folder, "mid"), {**start, "args": {"mixture": "a*2 | b"}})
    write_report(folder, folder / "report.md")
    text = (folder / "report.md").read_text(encoding="utf-8")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| a | 10 | 2 | 300 | 20.0 | 75.0 |" in lines
    assert "| b | 5 | 1 | 100 | 100.0 | 25.0 |" in lines
    assert "| data | mid: a, b |" in lines


def test_the_commands_that_were_typed(folder: Path) -> None:
    append(
        log_of(folder, "base"),
        {"event": "start", "step": 0, "typed": ["--depth=4", "--sample_prompts=A|B c"],
         "world_size": 8, "nodes": 2, "versions": {"git": "abc123-dirty"},
         "code": {"changes": "code-1.diff"}},
    )  # fmt: skip
    append(folder / "base_eval.jsonl", {"source": "base", "model_tag": "d4", "step": 0})
    append(folder / "chat_eval.jsonl", task("base", 0.5))
    append(folder.parent / STAGE_FOLDERS["base"] / "d2" / LOG, {"event": "start", "step": 0})
    write_report(folder, folder / "report.md", "d4")
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "    git checkout abc123\n    git apply base_checkpoints/d4/code-1.diff\n" in text
    code = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    words = shlex.split("\n".join(code).replace("\\\n", " "))
    at = words.index("torchrun")
    assert words[at + 1 : at + 5] == [
        *("--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=FIRST_NODE:29400"),
        "--nproc_per_node=4",
    ]
    assert "--sample_prompts=A|B c" in words
    assert "python -m scripts.base_eval -i base -g d4" in code
    assert "python -m scripts.chat_eval -i base -g d4 -a gsm8k" in code
    assert "`python -m scripts.compare base/d4 base/d2`" in text


def test_evaluations_as_they_were_typed(folder: Path) -> None:
    append(log_of(folder, "base"), {"event": "start", "step": 0, "typed": []})
    base = {"source": "base", "model_tag": "d4", "step": 0, "typed": ["--eval=bpb"]}
    append(folder / "base_eval.jsonl", base)
    words = ["-i", "base", "-x", "50", "-m", "64", "-a", "gsm8k|mmlu"]
    rows = [{**task("base", 0.5), "task": name, "typed": words} for name in ("gsm8k", "mmlu")]
    named = {**task("base", 0.5), "task": "arc-easy", "typed": ["-i", "base", "--model_tag=d4"]}
    append(folder / "chat_eval.jsonl", *rows, named)
    write_report(folder, folder / "report.md")
    text = (folder / "report.md").read_text(encoding="utf-8")
    commands = [line.strip() for line in text.splitlines() if line.startswith("    python")]
    assert commands[-3:] == [
        "python -m scripts.base_eval --eval=bpb -g d4",
        "python -m scripts.chat_eval -i base -x 50 -m 64 -a 'gsm8k|mmlu' -g d4",
        "python -m scripts.chat_eval -i base --model_tag=d4",
    ]


def test_evaluations_alone_make_a_report(folder: Path) -> None:
    old = {**task("sft", 0.2), "step": 1, "task": "mmlu"}  # of another checkpoint
    append(folder / "chat_eval.jsonl", old, task("sft", 0.1), task("sft", 0.5))
    text = write_report(folder, folder / "report.md")
    assert "50.0 ± 5.0" in text and "10.0" not in text and "mmlu" not in text


def test_the_tag_chooses_runs_and_results(folder: Path) -> None:
    append(folder / "chat_eval.jsonl", task("sft", 0.5), task("sft", 0.7, tag="d8"))
    assert "50.0" in write_report(folder, folder / "report.md", "d4")
    text = write_report(folder, folder / "report.md", "d8")
    assert "70.0" in text and "50.0" not in text


def test_nothing_to_report_is_an_error_with_the_way_out(folder: Path) -> None:
    with pytest.raises(UserError, match="speedrun"):
        write_report(folder, folder / "report.md")
    training(folder, "base")
    with pytest.raises(UserError, match="--model_tag=d9"):
        write_report(folder, folder / "report.md", "d9")
    assert not (folder / "report.md").exists()


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training(folder, "base")
    out = tmp_path / "else" / "card.md"
    main(flags.parse(Args, [f"--out={out}", "--model-tag=d4"]))
    assert out.exists() and out.with_name("loss.png").exists()
    assert "<svg" in out.with_suffix(".html").read_text(encoding="utf-8")
    assert "1,234,567" in capsys.readouterr().out


def test_importing_does_not_load_the_plotting_library() -> None:
    import subprocess

    code = "import sys, nanochat.report.card; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (True, "yes"), (1234567, "1,234,567"), (0.123456, "0.1235"), (0.0, "0"),
        (12345.6, "12,346"), (float("nan"), "nan"), ("a|b\nc", "a\\|b c"), ([1], "[1]"),
        ("a*2|b", "`a*2\\|b`"), ("<b>", "`<b>`"), (literal("x"), "`x`"),
    ],
)  # fmt: skip
def test_show(value: Any, text: str) -> None:
    assert show(value) == text


def test_durations_and_percentages() -> None:
    assert [duration(s) for s in (None, 9.4, 75, 3600 * 3 + 125)] == ["", "9s", "1m 15s", "3h 2m"]
    assert percent(0.8125, 0.0101) == "81.2 ± 1.0" and percent(None) == ""


def test_tables_align_numbers_to_the_right() -> None:
    assert table(["name", "n"], [["a", 1000], ["bcdef", 2]]) == [
        "| name  |     n |",
        "|-------|------:|",
        "| a     | 1,000 |",
        "| bcdef |     2 |",
        "",
    ]


def test_the_commands_lead_from_the_data_through_every_run_before(folder: Path) -> None:
    """As the speedrun on a CPU has it: base starts from a run of its own stage. What is printed is
    parsed by the Args of the command it names."""
    base_dir = folder.parent
    (base_dir / "primer.json").write_text('{"seed": 7, "scale": 0.5}', encoding="utf-8")
    append(folder / "tok_train.jsonl", {"typed": ["--vocab_size=500", "--data=my texts"]})
    for number, (stage, tag, start, *typed) in enumerate(
        [
            ("base", "lists", None, "--model_tag=lists", "--depth=3"),
            ("base", "d3", "base lists step_000340 (abc)", "--source_tag=lists", "--depth=3"),
            ("mid", "d3", "base d3 step_000400 (abc)", "--mixture=a@5 | b*2"),
        ]
    ):
        row = {"event": "start", "step": 0, "time": number + 1, "typed": typed, "args": {}}
        log = base_dir / STAGE_FOLDERS[stage] / tag / LOG
        append(log, {**row, "started_from": start})
    append(folder / "chat_eval.jsonl", {**task("mid", 0.5, tag="d3"), "step": 0})
    write_report(folder, folder / "report.md")
    commands = commands_of((folder / "report.md").read_text(encoding="utf-8"))
    assert [words[2] for words in commands] == [
        "nanochat.primer", "scripts.tok_train", "scripts.base_train", "scripts.base_train",
        "scripts.mid_train", "scripts.chat_eval",
    ]  # fmt: skip
    primer, tokenizer, lists, base, mid, _ = map(parsed, commands)
    assert (primer.seed, primer.scale) == (7, 0.5) and tokenizer.data == "my texts"
    assert lists.model_tag == base.source_tag == "lists" and mid.mixture == "a@5 | b*2"


def test_the_commands_begin_with_a_download_or_an_import(folder: Path) -> None:
    base_dir = folder.parent
    pin = {"file": "shard_00009.parquet", "repo": "me/texts"}
    (base_dir / "validation_files.json").write_text(json.dumps({"base_data": pin}))
    (base_dir / "base_data").mkdir()
    for index in (0, 1, 9):
        (base_dir / "base_data" / f"shard_{index:05d}.parquet").touch()
    row = {"event": "start", "step": 0, "args": {}}
    append(log_of(folder, "base"), {**row, "typed": ["--depth=4"]})
    imported = base_dir / STAGE_FOLDERS["sft"] / "qwen" / "step_000000"
    imported.mkdir(parents=True)
    meta = {"imported": {"from": "Qwen/Qwen2.5-0.5B"}}
    (imported / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    began = {"typed": ["--source_tag=qwen"], "started_from": "sft qwen step_000000 (abc)"}
    append(log_of(folder, "rl"), {**row, **began})
    write_report(folder, folder / "report.md")
    commands = commands_of((folder / "report.md").read_text(encoding="utf-8"))
    data, base, imports, rl = map(parsed, commands)
    assert (data.num_files, data.repo) == (2, "me/texts") and base.depth == 4
    assert (imports.from_, imports.model_tag, imports.stage) == ("Qwen/Qwen2.5-0.5B", "qwen", "sft")
    assert rl.source_tag == "qwen"


def commands_of(text: str) -> list[list[str]]:
    """The commands of the last section, as a shell would split them; git's left out."""
    code = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    lines = "\n".join(code).replace("\\\n", " ").splitlines()
    return [words for words in map(shlex.split, lines) if words and words[0] != "git"]


def parsed(words: list[str]) -> Any:
    """The flags of `python -m NAME ...`, as that program reads them."""
    assert words[:2] == ["python", "-m"]
    try:
        module = importlib.import_module(f"{words[2]}.__main__")
    except ModuleNotFoundError:
        module = importlib.import_module(words[2])
    return flags.parse(module.Args, words[3:])
