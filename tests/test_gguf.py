"""GGUF: what stands in the file is the model; llama.cpp, where it is installed, agrees."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unicodedata import is_normalized

import pytest
import torch

from bench import gguf as bench
from nanochat import gguf as ours
from nanochat.chat_template import chat_template
from nanochat.common import UserError, read_json
from nanochat.engine import Engine
from nanochat.gguf import check_gguf, gguf_tensors, write_gguf
from nanochat.hf_export import DTYPES, OWN_FILES
from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer_files import BYTE_TO_CHAR
from nanochat.vocabulary import SPLIT_PATTERN, Vocabulary
from tests.models_for_tests import tiny_model
from tests.tokenizers_for_tests import ODD_TEXTS, tiny_qwen, tiny_tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: uv sync")
TIED = {"sequence_len": 128, "vocab_size": 512}  # more rows than the tokenizers have ids
UNTIED = {**TIED, "tied": False, "n_kv_head": 1}


def export(
    out: Path, tokenizer: Tokenizer, chat: bool = True, dtype: str = "float32", **shape: Any
):
    """(model, what GGUFReader finds in its file)."""
    model = tiny_model("qwen2.5", **{**TIED, **shape}).eval()
    write_gguf(out, model, tokenizer, "tiny", chat, dtype)
    return model, gguf.GGUFReader(out)


def value(reader: Any, key: str) -> Any:
    """One metadata value."""
    return reader.fields[key].contents()


def as_torch(tensor: Any) -> torch.Tensor:
    """A tensor of the file, in the shape that PyTorch would give it."""
    data = torch.from_numpy(tensor.data.copy())
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:  # the reader gives bytes
        data = data.contiguous().view(torch.bfloat16)
    return data.reshape([int(n) for n in reversed(tensor.shape)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [TIED, UNTIED], ids=["tied", "untied"])
def test_every_tensor_is_there_bit_by_bit(shape: dict, dtype: str, tmp_path: Path) -> None:
    tokenizer = tiny_qwen()
    model, reader = export(tmp_path / "m.gguf", tokenizer, dtype=dtype, **shape)
    found = {tensor.name: as_torch(tensor) for tensor in reader.tensors}
    wanted = dict(model.named_parameters())
    assert len(found) == len(wanted)
    layer, rows = "model.layers.2", tokenizer.get_vocab_size()
    pairs = {
        "token_embd.weight": wanted["model.embed_tokens.weight"][:rows],
        "output_norm.weight": wanted["model.norm.weight"],
        "blk.2.attn_norm.weight": wanted[f"{layer}.input_layernorm.weight"],
        "blk.2.ffn_norm.weight": wanted[f"{layer}.post_attention_layernorm.weight"],
        "blk.2.attn_output.weight": wanted[f"{layer}.self_attn.o_proj.weight"],
    }
    for x in "qkv":
        for part in ("weight", "bias"):
            pairs[f"blk.2.attn_{x}.{part}"] = wanted[f"{layer}.self_attn.{x}_proj.{part}"]
    for x in ("gate", "up", "down"):
        pairs[f"blk.2.ffn_{x}.weight"] = wanted[f"{layer}.mlp.{x}_proj.weight"]
    if not model.config.tied:
        pairs["output.weight"] = wanted["lm_head.weight"][:rows]
    assert len(pairs) == len(found) - 2 * 12  # the other two layers
    for name, tensor in pairs.items():
        kind = DTYPES[dtype] if tensor.ndim == 2 else torch.float32
        assert found[name].dtype == kind, name
        assert torch.equal(found[name], tensor.to(kind)), name
    # every tensor of every layer, by the table this time
    for name, tensor in gguf_tensors(model, rows).items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def test_names_are_those_of_the_gguf_package() -> None:
    """llama.cpp takes no other: its list for the architecture, and nothing else."""
    arch = gguf.MODEL_ARCH.QWEN2
    names = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[arch]} - {"rope_freqs"}
    written = gguf_tensors(tiny_model("qwen2.5", **UNTIED), 400)
    bare = {name.rpartition(".")[0] for name in written}
    assert bare == {n.format(bid=i) for n in names for i in range(3)}
    assert gguf.MODEL_ARCH_NAMES[arch] == ours.ARCH


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shape_is_told(dtype: str, tmp_path: Path) -> None:
    shape = {"rope_theta": 12345.0, "norm_eps": 1e-5, **UNTIED}
    model, reader = export(tmp_path / "m.gguf", tiny_qwen(), dtype=dtype, **shape)
    config = model.config
    assert value(reader, "general.architecture") == "qwen2"
    assert value(reader, "general.name") == "tiny"
    types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    assert value(reader, "general.file_type") == gguf.LlamaFileType[types[dtype]]
    told = {
        "context_length": config.sequence_len,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_mlp,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_kv_head,
        "rope.freq_base": config.rope_theta,
    }
    assert {key: value(reader, f"qwen2.{key}") for key in told} == told
    eps = value(reader, "qwen2.attention.layer_norm_rms_epsilon")
    assert eps == pytest.approx(config.norm_eps, rel=1e-6)  # a float32 there


@pytest.mark.parametrize("make", [tiny_qwen, tiny_tokenizer])
def test_the_vocabulary_is_told(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    _, reader = export(tmp_path / "m.gguf", tokenizer)
    vocabulary, kinds = tokenizer.vocabulary, gguf.TokenType
    tokens, types = (
        value(reader, "tokenizer.ggml.tokens"),
        value(reader, "tokenizer.ggml.token_type"),
    )
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    names = {tiny_qwen: "qwen2", tiny_tokenizer: ours.NEAREST}
    assert value(reader, "tokenizer.ggml.pre") == names[make]
    assert len(tokens) == len(types) == len(set(tokens)) == tokenizer.get_vocab_size() == 400
    for token, id in vocabulary.ranks.items():
        assert tokens[id] == "".join(BYTE_TO_CHAR[b] for b in token)
        assert types[id] == kinds.NORMAL
    for name, id in vocabulary.specials.items():
        assert tokens[id] == name
        assert types[id] == (kinds.USER_DEFINED if "tool_call" in name else kinds.CONTROL)
    # The merges, done on the longest token's bytes, give that token
    merges = [tuple(merge.split(" ")) for merge in value(reader, "tokenizer.ggml.merges")]
    assert len(merges) == len(vocabulary.ranks) - 256
    assert [a + b for a, b in merges] == tokens[256 : len(vocabulary.ranks)]
    parts = list(max(tokens[: len(vocabulary.ranks)], key=len))
    for merge in merges:
        for i in range(len(parts) - 1, 0, -1):
            if tuple(parts[i - 1 : i + 1]) == merge:
                parts[i - 1 : i + 1] = ["".join(merge)]
    assert len(parts) == 1


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("make", [tiny_qwen, tiny_tokenizer])
def test_where_replies_end_and_texts_begin(make: Any, chat: bool, tmp_path: Path) -> None:
    tokenizer = make()
    _, reader = export(tmp_path / "m.gguf", tokenizer, chat)
    ids = {
        key: value(reader, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom")
    }
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    assert ids == {"bos": bos, "eos": end if chat else bos, "eot": end, "eom": bos}
    assert {ids["eos"], ids["eot"], ids["eom"]} == tokenizer.stop_token_ids
    begins = make is tiny_tokenizer and not chat
    assert value(reader, "tokenizer.ggml.add_bos_token") == begins
    if chat:
        template = value(reader, "tokenizer.chat_template")
        assert template == chat_template(tokenizer.chat_format, tokenizer.default_system)
    else:
        assert "tokenizer.chat_template" not in reader.fields


def test_ids_without_a_token_are_unused(tmp_path: Path) -> None:
    vocabulary = tiny_qwen().vocabulary
    specials = {name: id + 3 * (id > 396) for name, id in vocabulary.specials.items()}
    gaps = Vocabulary(vocabulary.pattern, vocabulary.ranks, specials, vocabulary.normalization)
    _, reader = export(tmp_path / "m.gguf", Tokenizer(gaps))
    types = value(reader, "tokenizer.ggml.token_type")
    assert [id for id, kind in enumerate(types) if kind == gguf.TokenType.UNUSED] == [397, 398, 399]
    assert len(set(value(reader, "tokenizer.ggml.tokens"))) == 403


# ---- refused ----


@pytest.mark.parametrize("arch", ["gpt", "turbo"])
def test_ours_are_refused_and_the_reason_holds(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch, vocab_size=400)
    with pytest.raises(UserError, match=rf"\(--arch={arch}\), and llama\.cpp has no such archit"):
        write_gguf(tmp_path / "m.gguf", model, tiny_tokenizer(), arch, True, "float32")
    assert not list(tmp_path.iterdir())
    # If a release of the package learns of it, the refusal is to go
    assert not [name for name in gguf.MODEL_ARCH_NAMES.values() if "nanochat" in name.lower()]


def test_an_unknown_split_pattern_is_refused() -> None:
    vocabulary = tiny_tokenizer().vocabulary
    odd = Tokenizer(Vocabulary(r"\s+|\S+", vocabulary.ranks, vocabulary.specials))
    with pytest.raises(UserError, match="no name for this tokenizer's split pattern"):
        check_gguf(tiny_model("qwen2.5", **TIED), odd)


def test_tokens_that_no_merge_makes_are_refused(tmp_path: Path) -> None:
    vocabulary = tiny_qwen().vocabulary
    last = max(vocabulary.ranks, key=vocabulary.ranks.__getitem__)
    ranks = {token: id for token, id in vocabulary.ranks.items() if token != last}
    ranks[b"\xff\xfe\xfd"] = vocabulary.ranks[last]
    odd = Tokenizer(Vocabulary(vocabulary.pattern, ranks, vocabulary.specials, "NFC"))
    with pytest.raises(UserError, match="tokens that no merge makes"):
        export(tmp_path / "m.gguf", odd)


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="uv sync --extra gguf"):
        check_gguf(tiny_model("qwen2.5", **TIED), tiny_qwen())


def test_nothing_half_written_gets_the_name(tmp_path: Path) -> None:
    model = tiny_model("qwen2.5", **TIED)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")  # one of the last tensors
    out = tmp_path / "m.gguf"
    out.write_bytes(b"earlier")
    with pytest.raises(UserError, match=r"output_norm\.weight has values that are no numbers"):
        write_gguf(out, model, tiny_qwen(), "tiny", True, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert out.read_bytes() == b"earlier"
    with torch.no_grad():
        model.model.norm.weight[3] = 1.0
        model.model.embed_tokens.weight[5, 5] = 1e5
    with pytest.raises(UserError, match="float16 cannot hold"):
        write_gguf(out, model, tiny_qwen(), "tiny", True, "float16")


def test_an_export_folder_may_hold_the_file() -> None:
    assert OWN_FILES.fullmatch("model.gguf")


# ---- what was measured ----


def test_what_the_export_says_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = read_json(bench.OUT)
    rows = [row for row in result["tokenization"] if row["pattern"] == "ours"]
    best = min(rows, key=lambda row: row["documents_that_differ"])
    assert best["pre_tokenizer"] == ours.NEAREST
    measured = {"documents": best["documents"], "differ": best["documents_that_differ"]}
    assert measured == ours.MEASURED
    export(tmp_path / "m.gguf", tiny_tokenizer())
    said = capsys.readouterr().err
    assert f"{measured['differ']} of {measured['documents']} documents" in said
    export(tmp_path / "q.gguf", tiny_qwen())
    assert not capsys.readouterr().err


def test_the_benchmark_knows_every_pre_tokenizer_of_the_export() -> None:
    result = read_json(bench.OUT)
    found = {row["pattern"]: row for row in result["tokenization"] if row["pattern"] != "ours"}
    for name, pattern in bench.PATTERNS.items():
        if pattern != SPLIT_PATTERN:
            assert found[name]["pre_tokenizer"] == ours.PRE_TOKENIZERS[pattern]
    bench.check(result["tokenization"], result["models"])
    assert {row["dtype"] for row in result["models"]} == set(DTYPES)


def test_the_benchmark_notices_a_difference() -> None:
    result = read_json(bench.OUT)
    tokenization, models = result["tokenization"], result["models"]
    for name, wrong in {
        "continuations_that_differ": 1, "same_stop_tokens": False, "same_chat_ids": False
    }.items():  # fmt: skip
        with pytest.raises(UserError, match="does another thing"):
            bench.check(tokenization, [{**models[0], name: wrong}, *models[1:]])
    for row in tokenization:
        changed = {**row, "documents_that_differ": row["documents_that_differ"] + 1}
        if row["pattern"] == "qwen2.5":
            with pytest.raises(UserError, match=r"with Qwen2\.5's pattern the ids differ"):
                bench.check([changed, *tokenization], models)
        elif row["pattern"] == "ours":
            none = {**row, "documents_that_differ": 0, "pre_tokenizer": "new"}
            with pytest.raises(UserError, match="NEAREST should be 'new'"):
                bench.check([none, *tokenization], models)


def test_llama_cpp_agrees(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokenizer = tiny_qwen()
    model, _ = export(tmp_path / "m.gguf", tokenizer)
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, verbose=False, **exact)
    for text in [t for t in ODD_TEXTS if "<" not in t and is_normalized("NFC", t)]:
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text)
    prompt = tokenizer.encode("What is the capital of the town?", prepend="<|bos|>")
    (wanted,), _ = Engine(model, tokenizer).generate_batch(prompt, max_tokens=64, temperature=0)
    found = list(prompt)
    for token in llama.generate(prompt, temp=0.0):
        found.append(token)
        if len(found) == len(wanted):
            break
    assert found == wanted
