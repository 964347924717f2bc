"""
Import: bit for bit what transformers saved, the same continuations, and refusals by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import hf_import
from nanochat.checkpoint import LOG, list_steps, load_model, run_dir, stage_dir
from nanochat.common import UserError, read_json, write_json
from nanochat.engine import Engine
from nanochat.hf import to_hf_name
from nanochat.hf_import import import_model, locate
from nanochat.tokenizer import get_tokenizer
from tests.hf_for_tests import config_of, save_hf, tokenizer_of
from tests.models_for_tests import tiny_model, tokens_of
from tests.tokenizers_for_tests import tiny_qwen

SAVED = [
    ("qwen2.5", "bfloat16", "5GB", {}),
    ("qwen2.5", "float32", "30KB", {"tied": False, "n_kv_head": 4}),
    ("qwen2.5", "float16", "20KB", {}),
    ("gpt", "bfloat16", "40KB", {}),
    ("gpt", "float32", "5GB", {}),
    ("turbo", "bfloat16", "50KB", {}),
    ("turbo", "float32", "5GB", {"n_layer": 4, "n_kv_head": 4}),
]


@pytest.mark.parametrize("arch, dtype, shard, changes", SAVED)
def test_every_weight_comes_over_bit_for_bit(
    arch: str, dtype: str, shard: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    twin = save_hf(folder, arch, dtype, shard, **changes)
    assert len(list(folder.glob("*.safetensors"))) > 1 or shard == "5GB"
    import_model(str(folder), max_seq_len=32)
    model, tokenizer, meta = load_model("base", "cpu", "theirs")
    assert model.config == config_of(arch, **{**changes, "sequence_len": 32})
    assert meta["imported"]["max_position_embeddings"] == 64
    theirs = twin.state_dict()
    for name, weight in model.state_dict().items():
        wanted = theirs[to_hf_name(arch, name)].float()
        assert weight.dtype == torch.float32 and torch.equal(weight, wanted), name
    assert tokenizer.fingerprint == tokenizer_of(arch).fingerprint
    assert get_tokenizer("theirs").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("arch", ["gpt", "turbo", "qwen2.5"])
def test_it_continues_as_transformers_does(arch: str, tmp_path: Path) -> None:
    """Greedily, 40 tokens, past the row length that was asked for."""
    twin = save_hf(tmp_path / "theirs", arch, vocab_size=400)
    twin.generation_config.eos_token_id = None
    import_model(str(tmp_path / "theirs"), max_seq_len=16)
    model, tokenizer, _ = load_model("base", "cpu")
    idx = tokens_of(model, 1, 9)
    assert (model(idx) - twin(input_ids=idx).logits).abs().max() < 1e-4
    tokenizer.stop_token_ids = set()
    wanted = twin.generate(idx, max_new_tokens=40, do_sample=False, pad_token_id=0)
    (ours,), _ = Engine(model, tokenizer).generate_batch(
        idx[0].tolist(), max_tokens=40, temperature=0
    )
    assert ours == wanted[0].tolist()


def test_a_tied_model_may_store_its_head_if_it_is_the_embedding(tmp_path: Path) -> None:
    save_hf(tmp_path, dtype="bfloat16")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, path)
    import_model(str(tmp_path), "twice")
    assert list_steps("base", "twice") == [0]
    other = embedding.clone()
    other[7, 3] += 1
    save_file({**tensors, "lm_head.weight": other}, path)
    with pytest.raises(UserError, match=r"lm_head\.weight is not"):
        import_model(str(tmp_path), "differs")


def test_a_chat_model_is_sft_and_another_base_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arch, end in (("qwen2.5", "<|im_end|>"), ("gpt", "<|assistant_end|>")):
        save_hf(tmp_path / arch, arch, eos=end)
        import_model(str(tmp_path / arch))
        said = capsys.readouterr().out
        assert list_steps("sft", arch) == [0], said
        assert f"stage sft, because its replies end with {end}" in said
        import_model(str(tmp_path / arch), "told", stage="mid")
        assert list_steps("mid", "told") == [0]
    assert "stage mid, because --stage says so" in capsys.readouterr().out
    (tmp_path / "gpt" / "generation_config.json").unlink()  # then config.json says it
    import_model(str(tmp_path / "gpt"), "older")
    assert list_steps("sft", "older") == [0]


# ---- refusals


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return changed


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def to_index(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
        write_json(folder / "model.safetensors.index.json", index)

    return change


def bad_index(folder: Path) -> None:
    to_index()(folder)
    write_json(folder / "model.safetensors.index.json", {"weight_map": ["one.safetensors"]})


def twice(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "two.safetensors")
    to_index("one.safetensors", "two.safetensors")(folder)


NORM, LAST = "model.norm.weight", "model.layers.2.mlp.up_proj.weight"
REFUSALS: list[tuple[Callable[[Path], Any], str]] = [
    (change_config(model_type="llama"), "model_type is 'llama'"),
    (change_config(use_sliding_window=True), "use_sliding_window is True"),
    (change_config(quantization_config={"bits": 4}), "quantization_config"),
    (change_config(num_hidden_layers=2), f"no place for .*{LAST}"),
    (change_config(num_hidden_layers=4), r"lacks model\.layers\.3\.input_layernorm\.weight"),
    (change_config(tie_word_embeddings=False), r"lacks lm_head\.weight"),
    (
        change_config(intermediate_size=41),
        r"down_proj.weight has shape \(32, 40\), and .*\(32, 41\)",
    ),
    (lambda f: tiny_qwen(430).save(f), "the tokenizer has 430 ids, and the model only 416 rows"),
    (change_tensors(lambda t: t.pop(NORM)), f"lacks {NORM}"),
    (change_tensors(lambda t: t.update(extra=t[NORM].clone())), "has no tensor extra"),
    (change_tensors(lambda t: t.update({NORM: t[NORM].double()})), f"{NORM} is of type F64"),
    (change_tensors(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), f"{NORM} is of type I8"),
    (to_pickle, "pytorch_model.bin is a pickle"),
    (truncate, "model.safetensors cannot be read"),
    (to_index("gone.safetensors"), "lacks gone.safetensors, which model.safetensors.index.json"),
    (to_index("../one.safetensors"), "lacks ../one.safetensors"),
    (bad_index, "model.safetensors.index.json has no weight_map"),
    (twice, r"two.safetensors: model\.\S+ is in another file"),
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json .* --tokenizer"),
    (lambda f: (f / "config.json").unlink(), "neither a config.json"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_hf(folder)
    return folder


@pytest.mark.parametrize("spoil, complaint", REFUSALS)
def test_what_is_not_our_model_is_refused_and_nothing_written(
    spoil: Callable[[Path], Any],
    complaint: str,
    saved: Path,
    tmp_path: Path,
    own_base_dir: Path,
) -> None:
    shutil.copytree(saved, tmp_path / "theirs")
    spoil(tmp_path / "theirs")
    with pytest.raises(UserError, match=complaint):
        import_model(str(tmp_path / "theirs"))
    assert not [path for path in own_base_dir.rglob("*") if path.is_file()]


def test_a_full_disk_is_noticed_before_anything_is_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(saved)._replace(free=1000)
    monkeypatch.setattr(hf_import.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(hf_import, "read_weights", lambda *a: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"GB and 0\.00 GB are free"):
        import_model(str(saved))


# ---- places


def test_the_hub_is_asked_for_what_is_read_and_no_more(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetched(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    import_model("Qwen/Qwen2.5-0.5B")
    assert list_steps("base", "Qwen2.5-0.5B") == [0]
    assert asked == [("Qwen/Qwen2.5-0.5B", ["*.json", "*.safetensors", "model_*.pt",
                                            "tokenizer.pkl"])]  # fmt: skip

    def offline(repo: str, allow_patterns: list[str]) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"no route .* `hf download Qwen/X --local-dir=DIR`"):
        locate("Qwen/X")


@pytest.mark.parametrize("where", ["nowhere", "a/b/c", "https://x/y", ""])
def test_a_place_that_is_none_is_refused(where: str) -> None:
    with pytest.raises(UserError, match="neither a folder nor a model of the hub"):
        locate(where)


def test_importing_again_moves_the_first_aside_and_keeps_its_tokenizer(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_model(str(saved), "tag")
    (run_dir("base", "tag") / LOG).write_text("of a run that had this tag", encoding="utf-8")
    import_model(str(saved), "tag")
    old = stage_dir("base") / ".old" / "tag"
    assert (old / "step_000000").is_dir()
    assert (old / LOG).exists() and not (run_dir("base", "tag") / LOG).exists()
    with pytest.raises(UserError, match="must be the name of a folder"):
        import_model(str(saved), "a/tag")
    save_hf(tmp_path / "gpt", "gpt")
    import_model(str(tmp_path / "gpt"), "tag", stage="mid")
    other = tokenizer_of("gpt").fingerprint
    assert "tokenizer tag-" in capsys.readouterr().out
    assert load_model("base", "cpu")[1].fingerprint == tokenizer_of("qwen2.5").fingerprint
    assert load_model("mid", "cpu")[1].fingerprint == other


def test_qwens_own_tokenizer_keeps_its_name(saved: Path, own_base_dir: Path) -> None:
    tokenizer_of("qwen2.5").save(own_base_dir / "tokenizer_qwen2.5")
    import_model(str(saved), "tag")
    assert load_model("base", "cpu")[2]["tokenizer"] == "qwen2.5"
    assert not (own_base_dir / "tokenizers").exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_one_vocabulary_and_two_prompts_are_two_tokenizers(
    file: str, saved: Path, tmp_path: Path, own_base_dir: Path
) -> None:
    """Qwen2.5's base and instruct models differ in what they say without a system message."""
    shutil.copytree(saved, tmp_path / "other")
    template = r"{{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
    text = template if file.endswith("jinja") else json.dumps({"chat_template": template})
    (tmp_path / "other" / file).write_text(text, encoding="utf-8")
    tokenizer_of("qwen2.5").save(own_base_dir / "tokenizer_qwen2.5")
    import_model(str(saved), "first")
    import_model(str(tmp_path / "other"), "second")
    hello = {"messages": [{"role": "user", "content": "Hello"}]}
    said = []
    for tag in ("first", "second"):
        _, tokenizer, meta = load_model("base", "cpu", tag)
        said.append(tokenizer.decode(tokenizer.render_for_completion(hello)))
        assert meta["tokenizer"] == {"first": "qwen2.5", "second": "second"}[tag]
    assert "system\nYou are Qwen" in said[0] and "system\nBe brief.<|im_end|>" in said[1]


# ---- the original nanochat's


def save_old(folder: Path, prefix: str = "_orig_mod.", **meta: Any) -> Any:
    """model_000650.pt with meta_000650.json and tokenizer.pkl, as the original writes them."""
    model = tiny_model("gpt", vocab_size=400)
    folder.mkdir(parents=True)
    state = {f"{prefix}{name}": weight for name, weight in model.state_dict().items()}
    state[f"{prefix}transformer.wte.weight"] = model.transformer.wte.weight.bfloat16()
    torch.save(state, folder / "model_000650.pt")
    config = {**vars(model.config), **meta}
    (folder / "meta_000650.json").write_text(json.dumps({"step": 650, "model_config": config}))
    return model


def test_an_old_checkpoint_with_its_pickled_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "old" / "chatsft_checkpoints" / "d2"
    old = save_old(folder)
    save_old(tmp_path / "bare", prefix="")
    (tmp_path / "bare" / "model_000010.pt").write_bytes(b"an older one is not read")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "of a page on the hub"}')
    tokenizer_of("gpt").save(tmp_path / "old" / "tokenizer")
    (tmp_path / "old" / "tokenizer" / "tokenizer.json").unlink()
    import_model(str(folder))
    import_model(str(tmp_path / "bare"), stage="base", tokenizer_dir=f"{tmp_path}/old/tokenizer")
    for stage, tag in (("sft", "d2"), ("base", "bare")):
        assert list_steps(stage, tag) == [650]
        model, tokenizer, _ = load_model(stage, "cpu", tag)
        for name, weight in old.state_dict().items():
            wanted = weight.bfloat16().float() if "wte" in name else weight
            assert torch.equal(model.state_dict()[name], wanted), name
        assert tokenizer.fingerprint == tokenizer_of("gpt").fingerprint


def test_old_checkpoints_that_are_refused(tmp_path: Path) -> None:
    save_old(tmp_path / "newer", window_pattern="SSSL")
    with pytest.raises(UserError, match="does not know: window_pattern"):
        import_model(str(tmp_path / "newer"))
    model = save_old(tmp_path / "odd")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json .*--tokenizer"):
        import_model(str(tmp_path / "odd"))
    tokenizer_of("gpt").save(tmp_path / "odd")
    with pytest.raises(UserError, match="Give --stage=base, mid, sft or rl"):
        import_model(str(tmp_path / "odd"))
    path = tmp_path / "odd" / "model_000650.pt"
    torch.save({**model.state_dict(), "resid_lambdas": torch.ones(3)}, path)
    with pytest.raises(UserError, match="there is no place for resid_lambdas"):
        import_model(str(tmp_path / "odd"))
    torch.save({"weights": Path("anything but tensors")}, path)
    with pytest.raises(UserError, match=r"model_000650.pt is refused"):
        import_model(str(tmp_path / "odd"))
    (tmp_path / "odd" / "meta_000650.json").write_text('{"model_config": {"n_layer": 3}}')
    with pytest.raises(UserError, match="model_config has no whole number sequence_len"):
        import_model(str(tmp_path / "odd"))
    (tmp_path / "odd" / "meta_000650.json").unlink()
    with pytest.raises(UserError, match=r"has no meta_000650.json beside it"):
        import_model(str(tmp_path / "odd"))


def original_rotary(x: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    """The original's apply_rotary_emb, written out: (B, T, H, E); y2 has the minus."""
    half = x.size(-1) // 2
    angle = torch.arange(x.size(1))[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos + x2 * sin, x1 * -sin + x2 * cos], dim=-1)


def test_the_gpt_turns_its_positions_as_the_original_did() -> None:
    from nanochat.models.layers import apply_rotary

    model, x = tiny_model("gpt"), torch.randn(2, 10, 4, 8)
    cos, sin = model.rotary(10, None)
    assert torch.allclose(apply_rotary(x, cos, sin), original_rotary(x), atol=1e-6)
