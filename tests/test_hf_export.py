"""Export: transformers loads the folder and computes what we compute; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanochat import hf_export
from nanochat.checkpoint import load_model
from nanochat.common import UserError, read_json
from nanochat.engine import Engine
from nanochat.hf import MODEL_TYPES, config_from_hf, from_hf_name
from nanochat.hf_export import export_model, stop_ids
from nanochat.hf_import import import_model
from nanochat.models import arch_of
from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer_files import read_tokenizer_json
from nanochat.vocabulary import Vocabulary
from tests.hf_for_tests import register_turbo
from tests.models import test_turbo
from tests.models_for_tests import tiny_model, tokens_of
from tests.tokenizers_for_tests import ODD_TEXTS, tiny_qwen, tiny_tokenizer

TOKENIZERS = {"own": tiny_tokenizer, "qwen": tiny_qwen}
# (architecture, tokenizer, what is special about the shape)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt": ("gpt", "own", {}),
    "gpt, qwen's tokenizer": ("gpt", "qwen", {"n_kv_head": 4}),
    "turbo": ("turbo", "own", {}),
    "qwen, tied, padded rows": ("qwen2.5", "qwen", {"vocab_size": 512}),
    "qwen, untied, own tokenizer": ("qwen2.5", "own", {"tied": False, "n_kv_head": 1}),
}


def make(case: str) -> tuple[Any, Tokenizer]:
    arch, name, changes = CASES[case]
    tokenizer = TOKENIZERS[name]()
    shape = {"vocab_size": tokenizer.get_vocab_size(), "sequence_len": 128, **changes}
    return tiny_model(arch, **shape).eval(), tokenizer


def export(out: Path, case: str = "gpt", chat: bool = True, **options: Any) -> Any:
    model, tokenizer = make(case)
    export_model(out, model, tokenizer, chat, "# card\n", **{"dtype": "float32", **options})
    return model


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an exported folder."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_we_compute(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    register_turbo()
    model, tokenizer = make(case)
    export(tmp_path / "out", case)
    twin, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, left over or of another shape
    where = "nanochat.hf_code." if case == "turbo" else "transformers.models."
    assert type(twin).__module__.startswith(where)
    assert twin.dtype == torch.float32
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())
    x = tokens_of(model, 2, 100)
    with torch.no_grad():
        assert (twin(x).logits - model(x)).abs().max() < 1e-4

    lengths = set()
    for text in ("What is the capital of the town?", "12", "A train"):
        prompt = tokenizer.encode(text, prepend="<|bos|>")
        (ours,), _ = Engine(model, tokenizer).generate_batch(prompt, max_tokens=64, temperature=0)
        ids = torch.tensor([prompt])
        theirs = twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64)[0]
        assert theirs.tolist() == ours
        lengths.add(len(ours) - len(prompt))
    assert max(lengths) == 64  # no stop token came in between


@pytest.mark.parametrize("case", CASES)
def test_the_tokenizer_gives_our_ids(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    _, tokenizer = make(case)
    export(tmp_path / "chat", case)
    export(tmp_path / "base", case, chat=False)
    chat = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")
    base = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    bos = [tokenizer.get_bos_token_id()] if tokenizer.chat_format == "nanochat" else []
    for text in [t for t in ODD_TEXTS if "<|" not in t]:
        ids = tokenizer.encode(text)
        assert chat(text)["input_ids"] == ids
        assert chat.decode(ids) == tokenizer.decode(ids)
        assert base(text)["input_ids"] == bos + ids
        assert base.decode(ids) == tokenizer.decode(ids)
    assert (chat.eos_token_id, base.eos_token_id) == (
        stop_ids(tokenizer, True)[0], stop_ids(tokenizer, False)[0],
    )  # fmt: skip
    assert chat.pad_token_id == base.pad_token_id == tokenizer.get_bos_token_id()
    assert chat.pad_token_id != chat.eos_token_id
    assert chat.bos_token_id == tokenizer.get_bos_token_id()
    assert chat.model_max_length == 128
    assert chat.chat_template
    assert not base.chat_template
    assert len(chat) == tokenizer.get_vocab_size()
    fingerprints = {
        Tokenizer(read_tokenizer_json(tmp_path / kind / "tokenizer.json")).fingerprint
        for kind in ("chat", "base")
    }
    assert fingerprints == {tokenizer.fingerprint}


def test_where_generation_ends(tmp_path: Path) -> None:
    ends = {"chat": (True, "<|assistant_end|>"), "base": (False, "<|bos|>")}
    for kind, (chat, first) in ends.items():
        for case in CASES:
            _, tokenizer = make(case)
            out = tmp_path / f"{kind} {case}"
            export(out, case, chat=chat)
            generation = read_json(out / "generation_config.json")
            assert set(generation["eos_token_id"]) == tokenizer.stop_token_ids
            assert generation["eos_token_id"][0] == tokenizer.encode_special(first)
            assert read_json(out / "config.json")["eos_token_id"] == generation["eos_token_id"][0]
            assert not {"temperature", "top_k", "top_p", "do_sample"} & generation.keys()


def test_tool_tags_stay_readable(tmp_path: Path) -> None:
    """As in Qwen's published tokenizer; ours hides them, with the rest of its special tokens."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    export(tmp_path / "out", "qwen, tied, padded rows")
    twin = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = twin("<tool_call>1+1</tool_call><|im_end|>")["input_ids"]
    assert twin.decode(ids, skip_special_tokens=True) == "<tool_call>1+1</tool_call>"


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    model = export(tmp_path / "out", case)
    arch = arch_of(model.config)
    own = {from_hf_name(arch, n): t for n, t in weights_of(tmp_path / "out").items()}
    expected = model.state_dict()
    assert own.keys() == expected.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name
    config = read_json(tmp_path / "out" / "config.json")
    assert config_from_hf(config, "here") == model.config
    # transformers would give a qwen2 model Qwen's tokenizer, whatever is in the folder
    twin = "seed_oss" if case == "qwen, untied, own tokenizer" else None
    assert config["model_type"] == (twin or MODEL_TYPES[arch])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_import_export_import_is_the_identity(
    case: str, dtype: str, own_base_dir: Path, tmp_path: Path
) -> None:
    """From a folder that transformers itself wrote."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    register_turbo()
    export(tmp_path / "first", case, dtype=dtype)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    theirs = tmp_path / "theirs"
    twin.save_pretrained(theirs, max_shard_size="50KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "first" / name, theirs / name)

    import_model(str(theirs), "one", max_seq_len=32)
    one, tokenizer, _ = load_model("sft", "cpu", "one")
    assert one.config.sequence_len == 32
    one.config = replace(one.config, sequence_len=128)  # as the script does
    export_model(tmp_path / "ours", one, tokenizer, True, "# card", dtype)
    import_model(str(tmp_path / "ours"), "two", max_seq_len=32)
    two, again, _ = load_model("sft", "cpu", "two")

    before, between = weights_of(theirs), weights_of(tmp_path / "ours")
    assert before.keys() == between.keys()
    bits = {"float32": torch.int32, "bfloat16": torch.int16}[dtype]
    for name, tensor in before.items():
        assert torch.equal(tensor.view(bits), between[name].view(bits)), name
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor.view(torch.int32), two.state_dict()[name].view(torch.int32)), name
    assert replace(two.config, sequence_len=128) == one.config
    assert again.fingerprint == tokenizer.fingerprint == make(case)[1].fingerprint
    ours = read_json(tmp_path / "ours" / "config.json")
    assert config_from_hf(ours, "") == config_from_hf(read_json(theirs / "config.json"), "")


def test_the_default_system_prompt_comes_back(own_base_dir: Path, tmp_path: Path) -> None:
    """It differs between the published models, and decides the ids of most conversations."""
    model, plain = make("qwen, tied, padded rows")
    tokenizer = Tokenizer(plain.vocabulary, "You're terse.\n")
    export_model(tmp_path / "out", model, tokenizer, True, "")
    import_model(str(tmp_path / "out"), "again")
    _, again, _ = load_model("sft", "cpu", "again")
    hello = {"messages": [{"role": "user", "content": "Hi"}]}
    assert again.render_conversation(hello) == tokenizer.render_conversation(hello)
    assert again.default_system == "You're terse.\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shorter_types(dtype: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = export(tmp_path / "out", dtype=dtype)
    for name, tensor in weights_of(tmp_path / "out").items():
        own = model.state_dict()[from_hf_name("gpt", name)]
        assert torch.equal(tensor, own.to(getattr(torch, dtype))), name
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert twin.dtype == getattr(torch, dtype)  # nobody has to say it


def test_what_a_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    model, tokenizer = make("gpt")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 1e5
    with pytest.raises(UserError, match=r"lm_head.weight goes up to 1e\+05, which float16"):
        export_model(tmp_path / "out", model, tokenizer, True, "", "float16")
    export_model(tmp_path / "out", model, tokenizer, True, "", "bfloat16")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="no numbers"):
        export_model(tmp_path / "nan", model, tokenizer, True, "", "bfloat16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_several_files(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = export(tmp_path / "out", "qwen, untied, own tokenizer", max_shard_size="40KB")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    for file in files:  # no file is larger than asked for, unless it is one tensor
        tensors = load_file(tmp_path / "out" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 40_000
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    x = tokens_of(model, 1, 20)
    with torch.no_grad():
        assert (twin(x).logits - model(x)).abs().max() < 1e-4
    with pytest.raises(UserError, match="--max_shard_size=many"):
        export(tmp_path / "other", max_shard_size="many")


def test_a_plain_vocabulary_serves_a_base_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    own = tiny_tokenizer().vocabulary
    specials = {"<|endoftext|>": len(own.ranks)}
    tokenizer = Tokenizer(Vocabulary(own.pattern, own.ranks, specials))
    model = tiny_model("gpt", vocab_size=tokenizer.get_vocab_size())
    export_model(tmp_path / "out", model, tokenizer, False, "")
    twin = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert twin("A town")["input_ids"] == tokenizer.encode("A town", prepend="<|bos|>")
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [
        len(own.ranks)
    ]


# ---- whole or not at all -------------------------------------------------------------------------


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(hf_export, "save_file", full)
    for name in ("out", "new"):
        with pytest.raises(UserError, match="No space left"):
            export(tmp_path / name, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(hf_export.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(UserError, match=r"0.00 GB are free.*--dtype=bfloat16"):
        export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_of_somebody_elses_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be used
    export(out)
    with pytest.raises(UserError, match=r"is not empty.*--overwrite"):
        export(out)
    (out / "model-00001-of-00002.safetensors").touch()  # of an earlier export in several files
    export(out, overwrite=True)
    assert not (out / "model-00001-of-00002.safetensors").exists()
    (out / "thesis.doc").touch()
    with pytest.raises(UserError, match=r"thesis\.doc"):
        export(out, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        export(tmp_path / "file", overwrite=True)


# ---- without us ----------------------------------------------------------------------------------

ALONE = """
import json, sys
sys.modules["nanochat"] = None  # an import of it would fail
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, trust, texts, idx = sys.argv[1], sys.argv[2] == "yes", *map(json.loads, sys.argv[3:])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.padding_side = "left"
messages = [[{"role": "user", "content": text}] for text in texts]
how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
one = tokenizer.apply_chat_template(messages[0], **how)
many = tokenizer.apply_chat_template(messages, padding=True, **how)
answers = {}
for cached in (True, False):
    answers[f"one, {cached}"] = model.generate(**one, max_new_tokens=24, use_cache=cached)
    found = model.generate(**many, max_new_tokens=24, use_cache=cached)
    answers[f"many, {cached}"] = found[:, many["input_ids"].shape[1] :]
answers["beams"] = model.generate(**one, max_new_tokens=24, num_beams=3)
answers["beams, naive"] = model.generate(**one, max_new_tokens=24, num_beams=3, use_cache=False)
answers["looked up"] = model.generate(**one, max_new_tokens=24, prompt_lookup_num_tokens=3)
idx = torch.tensor(idx)
with torch.no_grad():
    answers["logits"] = model(idx).logits
    mask = torch.ones_like(idx)
    mask[0, :20] = 0  # as if it began later
    answers["padded left"] = model(idx, attention_mask=mask).logits[0, 20:]
with open("answers.json", "w") as f:
    json.dump({name: tensor.tolist() for name, tensor in answers.items()}, f)
"""


@pytest.mark.parametrize("case", ["gpt", "turbo"])
def test_a_process_without_nanochat(case: str, tmp_path: Path) -> None:
    """Isolated (-I), elsewhere: no folder of ours is on its path, and none of our modules loads. A
    Turbo comes with its code. Windows are 5 here, so that every text is longer than they are."""
    pytest.importorskip("transformers", minversion="5.0")
    model = export(tmp_path / "out", case)
    tokenizer = tiny_tokenizer()
    texts = ["What is 2+2?", "Hi", "Name the capital of the town by the long, long river."]
    idx = tokens_of(model, 2, 60)
    trust = "yes" if case == "turbo" else "no"
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, "out", trust, json.dumps(texts),
         json.dumps(idx.tolist())],
        cwd=tmp_path, capture_output=True, encoding="utf-8", check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = read_json(tmp_path / "answers.json")
    prompts = [
        tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]})
        for text in texts
    ]
    engine = Engine(model, tokenizer)
    (ours,), _ = engine.generate_batch(prompts[0], max_tokens=24, temperature=0)
    batch, _ = engine.generate_batch(prompts, max_tokens=24, temperature=0)
    for cached in ("True", "False"):
        assert answers[f"one, {cached}"] == [ours]
        for prompt, own, found in zip(prompts, batch, answers[f"many, {cached}"]):
            reply = own[len(prompt) :]
            assert found[: len(reply)] == reply  # what follows its end is padding
    assert answers["beams"] == answers["beams, naive"]
    assert answers["looked up"] == [ours]
    with torch.no_grad():
        assert (torch.tensor(answers["logits"]) - model(idx)).abs().max() < 1e-4
        later = model(idx[:1, 20:])[0]
        assert (torch.tensor(answers["padded left"]) - later).abs().max() < 1e-4


def test_the_code_is_for_turbo_only_and_goes_with_an_overwritten_folder(tmp_path: Path) -> None:
    export(tmp_path / "out", "turbo")
    code = tmp_path / "out" / "modeling_nanochat_turbo.py"
    assert "import nanochat" not in code.read_text(encoding="utf-8")
    assert "from nanochat" not in code.read_text(encoding="utf-8")
    places = read_json(tmp_path / "out" / "config.json")["auto_map"].values()
    assert {place.split(".")[0] for place in places} == {code.stem}
    export(tmp_path / "out", "gpt", overwrite=True)
    assert not code.exists()
    assert "auto_map" not in read_json(tmp_path / "out" / "config.json")


def test_what_the_turbo_in_transformers_cannot_do_is_refused() -> None:
    register_turbo()
    twin = test_turbo.oracle(make("turbo")[0])
    idx = torch.arange(12).view(2, 6)
    with pytest.raises(ValueError, match="inputs_embeds"):
        twin(inputs_embeds=twin.wte(idx))
    with pytest.raises(ValueError, match="2D attention_mask"):
        twin(idx, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 5\), the text \(2, 6\)"):
        twin(idx, attention_mask=torch.ones(2, 5))
    with pytest.raises(NotImplementedError, match="vocabulary is fixed"):
        twin.resize_token_embeddings(500)
