"""The model card: true, of this checkpoint, and its program runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nanochat.checkpoint import load_model, save_checkpoint, step_dir, weights_id
from nanochat.hf_export import export_model
from nanochat.models import config_to_dict
from nanochat.report.model_card import model_card
from nanochat.tokenizer import Tokenizer
from tests.models_for_tests import tiny_model
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer


def save(source: str, base_dir: Path, tokenizer: Tokenizer, arch: str = "gpt", **meta: Any) -> str:
    """Saves a tiny checkpoint of that stage; returns the name that the next one starts from."""
    tokenizer.save(base_dir / "tokenizer")
    model = tiny_model(arch, vocab_size=tokenizer.get_vocab_size(), sequence_len=64)
    about = {"tokenizer": None, "tokenizer_fingerprint": tokenizer.fingerprint}
    save_checkpoint(source, "tiny", 7, model, {}, {**about, **meta})
    return f"{source} tiny step_000007 ({weights_id(step_dir(source, 'tiny', 7))})"


def card_of(source: str, base_dir: Path) -> tuple[str, Any, Tokenizer]:
    model, tokenizer, meta = load_model(source, "cpu")
    return (
        model_card(source, meta, model, tokenizer, "float32", base_dir / "report"),
        model,
        tokenizer,
    )


def test_what_it_was_trained_on_stage_by_stage(own_base_dir: Path) -> None:
    state = {"tokens": 123_456}
    args = {"data": "books.jsonl"}
    base = save(
        "base", own_base_dir, tiny_tokenizer(), state=state, args=args, metrics={"val_bpb": 1.25}
    )
    mid = save("mid", own_base_dir, tiny_tokenizer(), started_from=base, mixture="smoltalk | gsm8k")
    save("sft", own_base_dir, tiny_tokenizer(), started_from=mid, metrics={"val_loss": 0.75})
    card, model, _ = card_of("sft", own_base_dir)
    rows = {line.split("|")[1].strip(): line for line in card.splitlines() if line.startswith("| ")}
    assert "val_loss 0.75" in rows["sft"]
    assert "smoltalk \\| gsm8k" in rows["mid"]
    assert "books.jsonl" in rows["base"]
    assert "123,456" in rows["base"]
    assert "val_bpb 1.25" in rows["base"]
    assert f"{sum(p.numel() for p in model.parameters()):,}" in rows["parameters"]
    assert "float32" in rows["stored as"]


def test_what_is_gone_is_named_only(own_base_dir: Path) -> None:
    save("base", own_base_dir, tiny_tokenizer(), metrics={"val_bpb": 1.25})
    other = "base tiny step_000007 (0123456789abcdef)"  # the same name, other weights
    save("sft", own_base_dir, tiny_tokenizer(), started_from=other)
    card, *_ = card_of("sft", own_base_dir)
    assert f"It began with: {other}." in card
    assert "val_bpb" not in card


@pytest.mark.parametrize("source", ["base", "sft"])
@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_qwen])
def test_the_program_in_it_runs(
    source: str, make: Any, own_base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    save(source, own_base_dir, make())
    card, model, tokenizer = card_of(source, own_base_dir)
    export_model(own_base_dir / "tiny", model, tokenizer, source != "base", card, "float32")
    (program,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(own_base_dir)
    capsys.readouterr()
    exec(program.replace("max_new_tokens=64", "max_new_tokens=8"), {})  # noqa: S102 (our own)
    assert capsys.readouterr().out


def test_an_imported_model_is_not_claimed(own_base_dir: Path) -> None:
    imported = {"from": "Qwen/Qwen2.5-0.5B-Instruct"}
    save("base", own_base_dir, tiny_tokenizer(), imported=imported)
    base = f"base tiny step_000007 ({weights_id(step_dir('base', 'tiny', 7))})"
    assert "It was imported with nanochat" in card_of("base", own_base_dir)[0]
    save("sft", own_base_dir, tiny_tokenizer(), started_from=base)
    card, *_ = card_of("sft", own_base_dir)
    assert "It was trained with nanochat" in card
    assert "It began with: Qwen/Qwen2.5-0.5B-Instruct." in card


def test_what_differs_from_nanochat_is_said(own_base_dir: Path) -> None:
    save("sft", own_base_dir, tiny_qwen())
    card, *_ = card_of("sft", own_base_dir)
    assert "`<|im_end|>`" in card
    assert "`<tool_call>`" in card
    assert "white space holding a line break" in card
    save("sft", own_base_dir, tiny_tokenizer())
    card, *_ = card_of("sft", own_base_dir)
    assert "`<|python_start|>`" in card
    assert "white space holding a line break" not in card
    save("base", own_base_dir, tiny_tokenizer())
    card, _, tokenizer = card_of("base", own_base_dir)
    assert "since version 5" in card
    assert "seed_oss" not in card
    twin = tiny_model("qwen2.5", vocab_size=400)
    meta = {"tag": "t", "step": 1, "config": config_to_dict(twin.config)}
    assert "seed_oss" in model_card("sft", meta, twin, tokenizer, "float32", own_base_dir)
    assert "every document began with `<|bos|>`" in card
    assert "Licence" in card
