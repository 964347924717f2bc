"""Folders of Hugging Face's, evaluated as they are: the same numbers as after an import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import flags
from nanochat.checkpoint import load_model
from nanochat.common import UserError, read_jsonl, write_json
from nanochat.evals.core import evaluate_core
from nanochat.evals.hf_folder import TransformersModel, load_hf
from nanochat.evals.scoring import Probe, score_groups
from nanochat.hf_import import import_model
from nanochat.tokenizer_files import tokenizer_json
from scripts import base_eval, chat_eval
from tests.evals.test_core import write_bundle
from tests.hf_for_tests import save_hf
from tests.tokenizers_for_tests import TEXT, tiny_tokenizer


@pytest.mark.parametrize("arch", ["gpt", "turbo", "qwen2.5"])
def test_our_architectures_are_as_imported(arch: str, tmp_path: Path) -> None:
    save_hf(tmp_path / "theirs", arch)
    bundle = write_bundle(tmp_path / "eval_bundle")
    import_model(str(tmp_path / "theirs"), stage="base")
    imported, imported_tokenizer, _ = load_model("base", "cpu", "theirs")
    model, tokenizer, meta = load_hf(str(tmp_path / "theirs"), "cpu", max_seq_len=48)
    assert (meta["tag"], meta["step"], model.config.sequence_len) == ("theirs", 0, 48)
    assert not model.training
    assert tokenizer.fingerprint == imported_tokenizer.fingerprint
    for name, weight in imported.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    quiet: Any = {"say": lambda line: None}
    model, tokenizer, _ = load_hf(str(tmp_path / "theirs"), "cpu")
    ours = evaluate_core(model, tokenizer, bundle, **quiet)
    assert ours == evaluate_core(imported, imported_tokenizer, bundle, **quiet)


def save_gpt2(folder: Path, **changes: Any) -> Any:
    """A tiny random GPT-2 of transformers', with a tokenizer.json."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=416, n_positions=64, n_embd=32, n_layer=2, n_head=2, **changes
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    write_json(folder / "tokenizer.json", tokenizer_json(tiny_tokenizer().vocabulary))
    return model


def test_gpt2_is_scored_by_transformers(tmp_path: Path) -> None:
    twin = save_gpt2(tmp_path / "gpt2")
    model, tokenizer, meta = load_hf(str(tmp_path / "gpt2"), "cpu")
    assert isinstance(model, TransformersModel)
    assert (meta["tag"], model.config.sequence_len) == ("gpt2", 64)
    groups = [
        [Probe(tokenizer.encode(text, prepend="<|bos|>"), 3) for text in (TEXT[:60], "A dog")]
    ]
    with torch.no_grad():
        for probe, score in zip(groups[0], score_groups(model, groups)[0]):
            logits = twin(torch.tensor([probe.ids])).logits[0].log_softmax(-1)
            wanted = [-float(logits[t - 1, probe.ids[t]]) for t in range(3, len(probe.ids))]
            assert score.loss == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)


def test_gpt2_goes_on_with_a_text(tmp_path: Path) -> None:
    """Greedily with the likeliest token, until the context is full or a token ends the text."""
    twin = save_gpt2(tmp_path / "gpt2")
    model, tokenizer, _ = load_hf(str(tmp_path / "gpt2"), "cpu")
    model.model.generation_config.eos_token_id = None
    prompts = [tokenizer.encode(text, prepend="<|bos|>") for text in (TEXT[:40], "A dog")]
    found = model.generate_batch(prompts, 1, 5, 0.0)
    for prompt, ids in zip(prompts, found, strict=True):
        wanted = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                wanted.append(int(twin(torch.tensor([wanted])).logits[0, -1].argmax()))
        assert ids == wanted
    assert len(model.generate_batch(prompts[1:], 1, 1000, 0.0)[0]) == 64
    stop = found[1][len(prompts[1]) + 2]
    model.model.generation_config.eos_token_id = [stop]
    at = found[1].index(stop, len(prompts[1]))
    assert model.generate_batch(prompts[1:], 1, 5, 0.0) == [found[1][:at]]
    torch.manual_seed(0)
    drawn = model.generate_batch(prompts[1:], 3, 8, 1.0)
    assert len(drawn) == 3 and len(set(map(tuple, drawn))) > 1


def test_base_eval_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    write_bundle(base / "eval_bundle")
    for name in ("a", "b"):
        path = base / "base_data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": f"{name} {TEXT}"}) + "\n", encoding="utf-8")
    save_gpt2(tmp_path / "gpt2")
    save_hf(tmp_path / "qwen")
    for name in ("gpt2", "qwen"):
        argv = [f"--hf={tmp_path / name}", "--device-type=cpu", "--split_tokens=512",
                "--device_batch_size=2"]  # fmt: skip
        base_eval.main(flags.parse(base_eval.Args, argv))
    gpt2, qwen = [row for _, row in read_jsonl(base / "report" / "base_eval.jsonl")]
    assert (gpt2["source"], gpt2["model_tag"], qwen["model_tag"]) == ("hf", "gpt2", "qwen")
    for row in (gpt2, qwen):
        assert len(row["samples"]) == len(base_eval.PROMPTS) + 4
        assert row["samples"][0].startswith(base_eval.PROMPTS[0])
    assert gpt2["val_bpb"] > 1 and -1 <= gpt2["core_metric"] <= 1
    items = base / gpt2["items"]  # a report may be published: it names no folder outside
    assert items == base / "report" / "base_eval" / "hf_gpt2_0"
    assert len(list(read_jsonl(items / "my_schema.jsonl"))) == 3


def test_chat_eval_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    path = base / "task_data" / "pick" / "test.jsonl"
    path.parent.mkdir(parents=True)
    row = {"question": "q?", "choices": ["a", "b"], "answer": 1}
    path.write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    save_hf(tmp_path / "qwen", sequence_len=256)
    argv = [f"--hf={tmp_path / 'qwen'}", "-a", "pick", "--device-type=cpu"]
    chat_eval.main(flags.parse(chat_eval.Args, argv))
    (found,) = [row for _, row in read_jsonl(base / "report" / "chat_eval.jsonl")]
    assert (found["source"], found["model_tag"], found["n"]) == ("hf", "qwen", 3)
    save_gpt2(tmp_path / "gpt2")
    with pytest.raises(UserError, match="only models of our architectures can be talked to"):
        chat_eval.main(flags.parse(chat_eval.Args, [f"--hf={tmp_path / 'gpt2'}", *argv[1:]]))


def test_what_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--hf=nowhere is neither a folder nor"):
        load_hf("nowhere", "cpu")
    save_gpt2(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="transformers cannot load"):
        load_hf(str(tmp_path), "cpu")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_hf(str(tmp_path), "cpu")
