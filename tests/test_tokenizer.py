"""Text to ids and back: against Hugging Face's tokenizers, on odd text, and finding a tokenizer."""

from __future__ import annotations

import dataclasses
import json
import pickle
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from nanochat import tokenizer as module
from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.vocabulary import SPLIT_PATTERN, Vocabulary
from tests.tokenizers_for_tests import (
    ODD_TEXTS,
    QWEN_PATTERN,
    TEXT,
    naive_bpe,
    random_texts,
    real_texts,
    tiny_qwen,
    tiny_tokenizer,
)

# All of Qwen2.5's 22 added tokens; those from <tool_call> on are not marked special in its file
QWEN_ADDED = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>"),
    *("</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]


def as_hugging_face(tokenizer: Tokenizer, folder: Path) -> tokenizers.Tokenizer:
    tokenizer.save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*ODD_TEXTS, TEXT])
def test_round_trip(text: str) -> None:
    assert tiny_tokenizer().decode(tiny_tokenizer().encode(text)) == text
    assert tiny_tokenizer().decode_bytes(tiny_tokenizer().encode(text)) == text.encode()


def test_round_trip_on_random_unicode() -> None:
    for text in random_texts(seed=1, count=2000):
        assert tiny_tokenizer().decode(tiny_tokenizer().encode(text)) == text


def test_qwen_brings_text_into_nfc_first() -> None:
    for text in [*ODD_TEXTS, *random_texts(seed=2, count=500)]:
        assert tiny_qwen().decode(tiny_qwen().encode(text)) == unicodedata.normalize("NFC", text)
    assert tiny_qwen().encode("e\u0301") == tiny_qwen().encode("é")
    assert tiny_tokenizer().encode("e\u0301") != tiny_tokenizer().encode("é")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(600), tiny_qwen(600)], ids=["ours", "qwen"])
def test_same_ids_as_hugging_face_on_real_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = real_texts(100)
    hugging_face = as_hugging_face(tokenizer, tmp_path)
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert hugging_face.encode(text).ids == ids


def test_conversations_have_the_same_ids_as_hugging_face(tmp_path: Path) -> None:
    """There the rendered text is encoded at once, special tokens and all."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "\n\nWhat is  2+2? é"},
        {"role": "assistant", "content": "It is 4.\n"},
        {"role": "user", "content": "Thank you!"},
        {"role": "assistant", "content": "Good bye."},
    ]
    for name, tokenizer in (("ours", tiny_tokenizer()), ("qwen", tiny_qwen())):
        hugging_face = as_hugging_face(tokenizer, tmp_path / name)
        ids, _ = tokenizer.render_conversation({"messages": messages})
        assert hugging_face.encode(tokenizer.decode(ids)).ids == ids


def test_a_list_is_encoded_like_its_texts() -> None:
    texts = [*ODD_TEXTS, *random_texts(seed=4, count=50)]
    for tokenizer in (tiny_tokenizer(), tiny_qwen()):
        one_by_one = [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode(texts) == one_by_one
        assert tokenizer.encode(texts, num_threads=1) == one_by_one
        bos = tokenizer.get_bos_token_id()
        assert tokenizer.encode(texts, prepend="<|bos|>", append=5, num_threads=2) == [
            [bos, *ids, 5] for ids in one_by_one
        ]
    assert tiny_tokenizer().encode([]) == []


@pytest.mark.parametrize("fast", [True, False], ids=["rustbpe", "tiktoken"])
def test_a_batch_is_encoded_like_its_texts(fast: bool) -> None:
    texts = [*ODD_TEXTS, "", "a\ud800b", *random_texts(seed=5, count=50)]
    for made in (tiny_tokenizer(), tiny_qwen()):
        tokenizer = Tokenizer(made.vocabulary)
        if not fast:
            tokenizer.__dict__["_encoder"] = None  # as where PyPI's rustbpe 0.1.0 is installed
        elif tokenizer._encoder is None:
            pytest.skip("PyPI's rustbpe 0.1.0 has no Encoder")
        ids, offsets = tokenizer.encode_batch(texts, prepend="<|bos|>")
        assert ids.dtype == np.uint16 and offsets.dtype == np.int64
        rows = [ids[a:b].tolist() for a, b in pairwise(offsets.tolist())]
        assert rows == tokenizer.encode(texts, prepend="<|bos|>")
        ids, offsets = tokenizer.encode_batch([])
        assert len(ids) == 0 and offsets.tolist() == [0]
        tokenizer.get_vocab_size = lambda: 65_537  # type: ignore[method-assign]
        assert tokenizer.encode_batch(texts)[0].dtype == np.uint32


def test_prepend_and_append_take_names_and_ids() -> None:
    tokenizer = tiny_tokenizer(400)
    text = tokenizer.encode("Hi")
    assert tokenizer.encode("Hi", prepend="<|bos|>", append="<|user_end|>") == [391, *text, 393]
    assert tokenizer.encode("Hi", prepend=0, append=391) == [0, *text, 391]
    with pytest.raises(UserError, match=r"'<\|nobody\|>' is not a special token"):
        tokenizer.encode("Hi", prepend="<|nobody|>")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_qwen()], ids=["ours", "qwen"])
def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    for name in tokenizer.vocabulary.specials:
        ids = tokenizer.encode(f"{name} x{name}")
        assert max(ids) < len(tokenizer.vocabulary.ranks)
        assert tokenizer.decode(ids) == f"{name} x{name}"


def test_lone_surrogates_become_replacement_characters() -> None:
    for tokenizer in (tiny_tokenizer(), tiny_qwen()):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
        assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"  # a pair is a character
        assert tokenizer.encode(["a\ud800b", "x"])[0] == tokenizer.encode("a\ufffdb")


def test_a_million_spaces() -> None:
    """tiktoken alone panics here."""
    text = "x" + " " * 1_200_000 + "y\n"
    ids = tiny_tokenizer().encode(text)
    assert tiny_tokenizer().decode(ids) == text
    assert tiny_tokenizer().encode([text, "x"]) == [ids, tiny_tokenizer().encode("x")]


def test_long_text_is_cut_in_overlong_space_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word " * 100 + " " * 25 + "\n" * 9 + "end"
    whole = tiny_tokenizer().encode(text[:500])
    monkeypatch.setattr(module, "MAX_SPACE_RUN", 10)
    assert tiny_tokenizer().encode(text[:500]) == whole
    pieces = list(module._cut_long_spaces(text))
    assert "".join(pieces) == text
    assert [len(piece) for piece in pieces] == [499 + 10, 10, 10, 5 + 3]


def test_decode_of_parts_of_a_character() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("\U0010fffd")  # 4 bytes that no merge has seen
    assert len(ids) == 4
    assert tokenizer.decode_bytes(ids[:3]) == "\U0010fffd".encode()[:3]
    assert tokenizer.decode(ids[:3]) == "\ufffd"


def test_ids_past_the_vocabulary_decode_as_replacement() -> None:
    tokenizer = tiny_tokenizer(400)
    assert tokenizer.decode([ord("a"), 400, 151_935, ord("b")]) == "a\ufffd\ufffdb"
    assert tokenizer.decode(np.array([ord("a"), 391])) == "a<|bos|>"
    assert tokenizer.decode(torch.tensor([ord("a")])) == "a"  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        tokenizer.decode([-1])  # an ignored target, never an id


def test_token_bytes_are_raw_bytes() -> None:
    for tokenizer in (tiny_tokenizer(), tiny_qwen()):
        counts = tokenizer.token_bytes
        assert counts.dtype == np.int32
        assert counts.shape == (tokenizer.get_vocab_size(),)
        for token, id in tokenizer.vocabulary.ranks.items():
            assert counts[id] == len(token) == len(tokenizer.decode_bytes([id]))
        assert all(counts[id] == 0 for id in tokenizer.vocabulary.specials.values())
        text = "naïve 안녕 🙂"
        assert counts[tokenizer.encode(text)].sum() == len(text.encode())


def test_visualize_shows_every_token_in_its_color() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "4"}]
    ids, mask = tokenizer.render_conversation({"messages": messages})
    shown = tokenizer.visualize(ids, mask)
    assert "\n" not in shown
    assert "\033[32m4\033[0m" in shown
    assert "\033[32m<|assistant_end|>" in shown
    assert "\033[31m<|assistant_start|>" in shown
    assert shown.count("\033[32m") == 2
    assert shown.count("\033[31m") == len(ids) - 2


def test_stop_tokens() -> None:
    assert tiny_tokenizer(400).stop_token_ids == {391, 395}
    qwen = tiny_qwen()
    assert qwen.stop_token_ids == {
        qwen.encode_special("<|endoftext|>"),
        qwen.encode_special("<|im_end|>"),
    }


@pytest.mark.parametrize("bos", ["<|endoftext|>", "<|begin_of_text|>"])
def test_a_vocabulary_without_chat_tokens_is_for_plain_text(bos: str) -> None:
    ranks = tiny_tokenizer(400).vocabulary.ranks
    tokenizer = Tokenizer(Vocabulary(SPLIT_PATTERN, ranks, {"<|pad|>": 391, bos: 392}))
    assert tokenizer.get_bos_token_id() == tokenizer.encode_special("<|bos|>") == 392
    assert tokenizer.encode("Hi", prepend="<|bos|>") == [392, *tiny_tokenizer().encode("Hi")]
    assert tokenizer.stop_token_ids == {392}
    conversation = {"messages": [{"role": "user", "content": "Hi"}]}
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(UserError, match="no special tokens for conversations"):
            render(conversation)
    with pytest.raises(UserError, match="python_start"):
        _ = tokenizer.tool_call_ids  # so that generation does without the calculator


# ---- training ------------------------------------------------------------------------------------


def test_training_learns_what_the_slow_twin_learns() -> None:
    trained = Tokenizer.train([TEXT], 600)
    assert trained.vocabulary == tiny_tokenizer(600).vocabulary
    assert trained.vocabulary.pattern == SPLIT_PATTERN
    lines = Tokenizer.train(iter(TEXT.splitlines(keepends=True)), 300)
    assert lines.get_vocab_size() == 300


def test_training_takes_lone_surrogates() -> None:
    assert Tokenizer.train(["ab\ud800 ab ab"], 266).vocabulary.ranks[b"ab"] == 256


def test_too_little_text_gives_a_smaller_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.train(["abc abc"], 1000)
    assert tokenizer.get_vocab_size() == 256 + len(naive_bpe("abc abc", 1000)[256:]) + 9
    assert "--vocab_size=1000" in capsys.readouterr().err
    assert tokenizer.decode(tokenizer.encode("abc!")) == "abc!"


def test_a_vocabulary_that_cannot_be_is_refused() -> None:
    assert Tokenizer.train([TEXT], 265).get_vocab_size() == 265
    for size in (264, 100_000_000):
        with pytest.raises(UserError, match=rf"--vocab_size={size} must be from 265 \(256 bytes"):
            Tokenizer.train([TEXT], size)


# ---- Qwen, from a file that `tokenizers` made ----------------------------------------------------


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with the structure of Qwen2.5's, trained and written by `tokenizers`."""
    hf = tokenizers.Tokenizer(models.BPE(byte_fallback=False, fuse_unk=False))
    hf.normalizer = normalizers.NFC()
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    hf.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    hf.train_from_iterator([TEXT], trainer)
    hf.add_special_tokens(QWEN_ADDED[:14])
    hf.add_tokens([tokenizers.AddedToken(t, special=False) for t in QWEN_ADDED[14:]])
    folder = tmp_path_factory.mktemp("qwen")
    hf.save(str(folder / "tokenizer.json"))
    return folder


def test_qwen_from_a_folder_has_the_same_ids(qwen_folder: Path) -> None:
    hf = tokenizers.Tokenizer.from_file(str(qwen_folder / "tokenizer.json"))
    qwen = get_tokenizer(qwen_folder)
    assert qwen.get_vocab_size() == 722 == hf.get_vocab_size()
    assert [qwen.encode_special(t) for t in QWEN_ADDED] == list(range(700, 722))
    assert qwen.get_bos_token_id() == 700
    for text in [TEXT, *ODD_TEXTS, *random_texts(seed=5, count=1000)]:
        if "<|" not in text:
            assert qwen.encode(text) == hf.encode(text).ids
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    ids, mask = qwen.render_conversation({"messages": messages})
    assert hf.encode(qwen.decode(ids)).ids == ids
    assert qwen.decode([i for i, m in zip(ids, mask) if m]) == "Hello!"


def test_qwen_by_name(qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    kept = tmp_path / "tokenizer_qwen2.5" / "tokenizer.json"

    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match="could not fetch") as error:
        get_tokenizer("qwen2.5")
    assert str(kept) in str(error.value)
    assert not kept.exists()

    source = str(qwen_folder / "tokenizer.json")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: source)
    fingerprint = get_tokenizer("qwen2.5").fingerprint
    assert kept.read_bytes() == Path(source).read_bytes()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert get_tokenizer("qwen2.5").fingerprint == fingerprint


# ---- files and finding them ----------------------------------------------------------------------


def test_save_writes_three_files_and_all_agree(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("token_bytes.pt", "tokenizer.json", "tokenizer.pkl"),
    ]
    token_bytes = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
    assert token_bytes.dtype == torch.int32
    assert token_bytes.tolist() == tokenizer.token_bytes.tolist()
    loaded = get_tokenizer(tmp_path)
    assert loaded.vocabulary == tokenizer.vocabulary
    assert loaded.fingerprint == tokenizer.fingerprint
    # For others the pickle is a plain tiktoken.Encoding
    encoding = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())  # noqa: S301
    assert encoding.encode_ordinary(TEXT) == tokenizer.encode(TEXT)
    assert encoding.n_vocab == tokenizer.get_vocab_size()
    (tmp_path / "tokenizer.json").unlink()
    assert get_tokenizer(str(tmp_path)).vocabulary == tokenizer.vocabulary


def test_get_tokenizer_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"python -m scripts\.tok_train"):
        get_tokenizer()
    tiny_tokenizer().save(tmp_path / "tokenizer")
    assert get_tokenizer().fingerprint == tiny_tokenizer().fingerprint
    assert get_tokenizer("").fingerprint == tiny_tokenizer().fingerprint


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tokenizer=qwen3 is neither"):
        get_tokenizer("qwen3")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        get_tokenizer(tmp_path)
    vocabulary = tiny_tokenizer().vocabulary
    with pytest.raises(UserError, match=r"neither nanochat's .* but <\|im_start\|>"):
        Tokenizer(Vocabulary(vocabulary.pattern, vocabulary.ranks, {"<|im_start|>": 391}))
    with pytest.raises(UserError, match="but none"):
        Tokenizer(Vocabulary(vocabulary.pattern, vocabulary.ranks, {}))
    with pytest.raises(UserError, match=r"split pattern '\(\?:a': .*parenthesis"):
        Tokenizer(dataclasses.replace(vocabulary, pattern="(?:a"))


def test_the_json_is_what_other_readers_expect(tmp_path: Path) -> None:
    tiny_tokenizer(400).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert [token["id"] for token in config["added_tokens"]] == list(range(391, 400))
    assert list(config["model"]["vocab"].values()) == list(range(391))
    assert len(config["model"]["merges"]) == 391 - 256
    assert all(merge.count(" ") == 1 for merge in config["model"]["merges"])
