"""hf_export as one runs it: a checkpoint becomes a folder, and its card says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from nanochat.common import UserError, read_json
from nanochat.hf_import import import_model
from scripts import hf_export
from scripts.hf_export import Args
from tests.scripts.checkpoints_for_tests import save_tiny

FILES = [
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip


def run(*argv: str) -> None:
    hf_export.main(flags.parse(Args, argv))


def test_a_chat_model(own_base_dir: Path, tmp_path: Path, capsys: Any) -> None:
    save_tiny(own_base_dir, "sft")
    run(f"--out={tmp_path / 'out'}")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    out = capsys.readouterr().out
    assert "exporting sft tiny, step 7, as bfloat16" in out
    assert "model.safetensors: 20 tensors" in out
    assert "AutoModelForCausalLM" in out


def test_a_turbo_takes_its_code_along(own_base_dir: Path, tmp_path: Path, capsys: Any) -> None:
    save_tiny(own_base_dir, "sft", arch="turbo")
    run(f"--out={tmp_path / 'out'}")
    code = "modeling_nanochat_turbo.py"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*FILES, code])
    assert "trust_remote_code=True" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'from_pretrained("tiny", trust_remote_code=True)' in card
    assert f"`{code}`" in card


def test_flags(own_base_dir: Path, tmp_path: Path) -> None:
    save_tiny(own_base_dir, "base", "old", 3)
    save_tiny(own_base_dir, "base", "old", 5)
    save_tiny(own_base_dir, "base", "new")
    out = tmp_path / "out"
    options = ["--dtype=float32", "--max_shard_size=50KB"]
    run("-i", "base", "-g", "old", "-s", "3", f"--out={out}", *options)
    assert (out / "model.safetensors.index.json").exists()
    assert read_json(out / "config.json")["dtype"] == "float32"
    assert "# old (base), step 3" in (out / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="is not empty"):
        run("-i", "base", f"--out={out}")
    run("-i", "base", f"--out={out}", "--overwrite")
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert "# new (base), step 7" in (out / "README.md").read_text(encoding="utf-8")


def test_an_imported_model_keeps_what_it_is_made_for(own_base_dir: Path, tmp_path: Path) -> None:
    """Its rows here may be shorter."""
    save_tiny(own_base_dir, "sft")
    run(f"--out={tmp_path / 'out'}")
    import_model(str(tmp_path / "out"), "again", max_seq_len=16)
    run(f"--out={tmp_path / 'two'}", "--model_tag=again")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert read_json(tmp_path / "two" / name) == read_json(tmp_path / "out" / name)
    card = (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    assert f"It began with: {tmp_path / 'out'}." in card


def test_the_target_is_looked_at_before_the_model(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is not empty"):  # not: no sft checkpoint
        run(f"--out={tmp_path / 'out'}")
    with pytest.raises(UserError, match="no sft checkpoint"):
        run(f"--out={tmp_path / 'new'}")


def test_the_card_tells_the_report_of_this_step(own_base_dir: Path, tmp_path: Path) -> None:
    save_tiny(own_base_dir, "sft")
    report = own_base_dir / "report"
    report.mkdir()
    about = {"source": "sft", "model_tag": "tiny", "chance": 0.25, "n": 50, "stderr": 0.05}
    rows = [
        {**about, "step": 7, "task": "ARC-Easy", "accuracy": 0.625},
        {**about, "step": 6, "task": "MMLU", "accuracy": 0.5},  # of another step
        {**about, "step": 7, "model_tag": "d4", "task": "GSM8K", "accuracy": 0.4},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (report / "chat_eval.jsonl").write_text(text, encoding="utf-8")
    run(f"--out={tmp_path / 'out'}")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "ARC-Easy" in card
    assert "62.5 ± 5.0" in card
    assert "MMLU" not in card
    assert "GSM8K" not in card


def test_gguf(own_base_dir: Path, tmp_path: Path, capsys: Any) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: uv sync")
    save_tiny(own_base_dir, "sft", arch="qwen2.5")
    out = tmp_path / "out"
    run(f"--out={out}", "--gguf", "--dtype=float16")
    assert sorted(p.name for p in out.iterdir()) == sorted([*FILES, "model.gguf"])
    reader = gguf.GGUFReader(out / "model.gguf")
    assert reader.fields["general.name"].contents() == "tiny (sft)"
    assert "tokenizer.chat_template" in reader.fields
    assert reader.tensors[0].tensor_type == gguf.GGMLQuantizationType.F16
    assert "llama-bpe" in capsys.readouterr().err  # its tokenizer is ours
    run(f"--out={out}", "--overwrite")
    assert sorted(p.name for p in out.iterdir()) == FILES


@pytest.mark.parametrize("arch", ["gpt", "turbo"])
def test_ours_have_no_gguf(arch: str, own_base_dir: Path, tmp_path: Path) -> None:
    save_tiny(own_base_dir, "sft", arch=arch)
    with pytest.raises(UserError, match=rf"--arch={arch}\), and llama\.cpp has no such archit"):
        run(f"--out={tmp_path / 'out'}", "--gguf")
    assert not (tmp_path / "out").exists()
