"""
The files of a vocabulary: what is written loads elsewhere with the same ids, what is read gives the
ids that Hugging Face's `tokenizers` gives or is refused by name, and a pickle runs nothing.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from nanochat.common import UserError, write_json
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.tokenizer_files import (
    BYTE_TO_CHAR,
    GPT2_PATTERN,
    GPT4_PATTERN,
    GPT4O_PATTERN,
    QWEN_PATTERN,
    read_default_system,
    read_tokenizer_json,
    read_tokenizer_pkl,
    read_vocabulary,
    tokenizer_json,
)
from nanochat.vocabulary import SPLIT_PATTERN, Vocabulary
from tests.qwen_template_for_tests import SYSTEM, oracle, template
from tests.tokenizers_for_tests import (
    ODD_TEXTS,
    TEXT,
    random_texts,
    real_texts,
    tiny_qwen,
    tiny_tokenizer,
)

OWN_PATTERN = r"\p{L}+(?=[a-z!])|[A-F]{2,3}|'(?:s|t)|\s+(?!\S)"  # leaves much between its matches
NFC = normalizers.NFC()
SPECIALS = ["<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>"]


def test_the_byte_alphabet_is_gpt2s() -> None:
    assert len(set(BYTE_TO_CHAR)) == 256
    assert BYTE_TO_CHAR[ord("A")] == "A"
    assert BYTE_TO_CHAR[ord(" ")] == "Ġ"
    assert BYTE_TO_CHAR[ord("\n")] == "Ċ"
    assert BYTE_TO_CHAR[0xAD] == "Ń"  # the last of those that stand for something else


# ---- what `tokenizers` made, read by us ----------------------------------------------------------


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer) -> dict[str, Any]:
    """The tokenizer.json of a small BPE that `tokenizers` trained on TEXT."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    hf.train_from_iterator([TEXT], trainer)
    hf.post_processor = processors.ByteLevel(trim_offsets=False)
    return as_json(hf)


def as_json(hf: tokenizers.Tokenizer) -> dict[str, Any]:
    hf.add_special_tokens(SPECIALS)
    return json.loads(hf.to_str())


def split_by(pattern: str, behavior: str = "isolated", invert: bool = False) -> dict[str, Any]:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return trained(pre_tokenizers.Sequence([split, byte_level]))


def gpt2() -> dict[str, Any]:
    """ByteLevel splits by itself, the bytes come in the order of the alphabet, <|endoftext|> is in
    the vocabulary too, and the model has options that do nothing."""
    config = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    config["model"]["vocab"] |= {t["content"]: t["id"] for t in config["added_tokens"]}
    nothing = {"continuing_subword_prefix": "", "end_of_word_suffix": "", "dropout": 0.0}
    unknown = {"unk_token": "<|endoftext|>", "fuse_unk": True, "byte_fallback": True}
    config["model"] |= nothing | unknown
    config["model"]["merges"] = [" ".join(pair) for pair in config["model"]["merges"]]
    del config["model"]["type"]  # as in the file that GPT-2 has on the hub
    return config


def llama3() -> dict[str, Any]:
    """Every way to cut a token in two is a merge, some tokens are made by none of them, and there
    is a post-processor that puts <|begin_of_text|> first."""
    config = split_by(GPT4_PATTERN)
    config["added_tokens"] = []
    model = config["model"]
    vocab = model["vocab"]
    for word in ("Ġzzyzx", "Ġharbourmaster", "))))]"):
        vocab[word] = len(vocab)
    model["ignore_merges"] = True
    model["merges"] = [
        [token[:cut], token[cut:]]
        for token in sorted(vocab, key=vocab.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    hf = tokenizers.Tokenizer.from_str(json.dumps(config))
    hf.add_special_tokens(SPECIALS)
    bos = SPECIALS[1]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, hf.token_to_id(bos))]
    )
    hf.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return json.loads(hf.to_str())


def qwen() -> dict[str, Any]:
    config = split_by(QWEN_PATTERN)
    config["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    added = config["added_tokens"]
    # Not special, and yet no text: as in Qwen2.5's file
    added.append({**added[0], "content": "<tool_call>", "id": len(added) + 900, "special": False})
    return config


STYLES: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt2": gpt2,
    "qwen2.5": qwen,
    "llama3": llama3,
    "gpt4": lambda: split_by(GPT4_PATTERN, "removed", invert=True),
    "gpt4o": lambda: split_by(GPT4O_PATTERN),
    "ours": lambda: split_by(SPLIT_PATTERN),
    "own pattern": lambda: split_by(OWN_PATTERN),
}


@pytest.fixture(scope="module", params=STYLES, ids=str)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """(ours, theirs) from the same file."""
    config = STYLES[request.param]()
    folder = tmp_path_factory.mktemp("style")
    (folder / "tokenizer.json").write_text(json.dumps(config), encoding="utf-8")
    return get_tokenizer(folder), tokenizers.Tokenizer.from_str(json.dumps(config))


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def assert_same_ids(ours: Tokenizer, theirs: tokenizers.Tokenizer, texts: list[str]) -> None:
    texts = [text for text in texts if "<|" not in text]  # a special token only there
    expected = [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
    ids, offsets = ours.encode_batch(texts)  # by rustbpe
    assert ours.encode(texts) == expected  # by tiktoken
    assert ids.tolist() == [id for row in expected for id in row]
    assert offsets[-1] == len(ids)


def test_odd_texts_have_the_same_ids(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, theirs = pair
    assert_same_ids(ours, theirs, [TEXT, *ODD_TEXTS, *random_texts(seed=7, count=1000)])
    assert_same_ids(ours, theirs, [" zzyzx", " zzyzxx ))))] harbourmaster" * 3])
    assert theirs.get_vocab_size() == ours.get_vocab_size()
    for name, id in ours.vocabulary.specials.items():
        assert theirs.token_to_id(name) == id


def test_code_points_have_the_same_ids(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    """Code points from all over, alone, after letters, digits and line ends."""
    some = [*range(0x250), *range(0x250, 0x3400, 5), *range(0x3400, 0xD800, 41)]
    chars = [chr(c) for c in [*some, *range(0xE000, 0x110000, 101)]]
    # But for marks of which Python's Unicode knows more than theirs (between the last and the first
    # in the order of marks, any other moves)
    known = [c for c in chars if NFC.normalize_str(f"\u0345{c}\u0334") == nfc(f"\u0345{c}\u0334")]
    assert len(chars) - 50 < len(known)
    texts = [
        "".join(f"{c}a {c}1\n{c}" for c in known[i : i + 64]) for i in range(0, len(known), 64)
    ]
    assert_same_ids(*pair, texts)


def test_real_text_has_the_same_ids(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    assert_same_ids(*pair, real_texts(25))


def test_a_token_that_no_merge_makes_is_found_whole(tmp_path: Path) -> None:
    config = llama3()
    path = write(config, tmp_path)
    ours = Tokenizer(read_tokenizer_json(path))
    id = config["model"]["vocab"]["Ġzzyzx"]
    assert ours.encode("a zzyzx")[-1] == id  # else the tests above show little
    assert id not in ours.encode("a zzyzxx")
    config["model"]["ignore_merges"] = False
    assert id not in tokenizers.Tokenizer.from_str(json.dumps(config)).encode("a zzyzx").ids
    with pytest.raises(UserError, match="no merges make the token 'Ġzzyzx', and ignore_merges is"):
        read_tokenizer_json(write(config, tmp_path))


def write(config: dict[str, Any], folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def test_merges_in_disorder_are_read_only_if_the_ids_are_the_same(tmp_path: Path) -> None:
    """Vocabularies that nobody trained, with merges added, lost and misplaced."""
    rng = random.Random(1)
    read = refused = 0
    for _ in range(150):
        config = random_merges(rng)
        try:
            vocabulary = read_tokenizer_json(write(config, tmp_path))
        except UserError:
            refused += 1
            continue
        read += 1
        theirs = tokenizers.Tokenizer.from_str(json.dumps(config))
        texts = ["".join(rng.choices("abc", k=rng.randint(1, 14))) for _ in range(40)]
        specials = {"<|endoftext|>": len(vocabulary.ranks)}
        ours = Tokenizer(Vocabulary(vocabulary.pattern, vocabulary.ranks, specials))
        assert_same_ids(ours, theirs, texts)
        # And what we write of it says the same
        again = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours.vocabulary)))
        assert_same_ids(ours, again, texts)
    assert read > 30 and refused > 30


def random_merges(rng: random.Random) -> dict[str, Any]:
    """A tokenizer.json of three letters and some random merges."""
    vocab = {char: id for id, char in enumerate(BYTE_TO_CHAR)}
    tokens, merges = ["a", "b", "c"], []
    for _ in range(rng.randint(1, 7)):
        left, right = rng.choices(tokens, k=2)
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            tokens.append(left + right)
            merges.append([left, right])
    way = rng.randrange(4)
    if way == 1:
        rng.shuffle(merges)
    elif way == 2:
        merges.pop()
    elif way == 3:  # other ways to make the same tokens
        cuts = [[t[:i], t[i:]] for t in tokens for i in range(1, len(t))]
        merges += [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        merges.sort(key=lambda cut: (vocab["".join(cut)], rng.random()))
    config = tokenizer_json(tiny_tokenizer().vocabulary)
    config["added_tokens"] = []
    config["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = GPT2_PATTERN
    config["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": rng.random() < 0.5}
    return config


def random_pattern(rng: random.Random) -> str:
    """A regular expression of constructs that mean the same to both engines; never matches ""."""
    atoms = ["a", "[ab1]", r"[^\s\p{L}]", r"\p{L}", r"\p{N}", r"\s", r"\S", "(?:b|a1)", " ", "'"]
    quantifiers = ["", "?", "*", "+", "?+", "*+", "++", "+?", "*?", "{1,2}", "{2}", "{2,}"]
    ways = []
    for _ in range(rng.randint(1, 3)):
        first = rng.choice(atoms) + rng.choice(["", "+", "++", "{1,2}"])
        rest = [rng.choice(atoms) + rng.choice(quantifiers) for _ in range(rng.randint(0, 2))]
        ways.append(first + "".join(rest) + rng.choice(["", "", "", "(?!a)", r"(?=\s)", r"(?!\S)"]))
    return "|".join(ways)


def test_patterns_of_ones_own_cut_as_there(tmp_path: Path) -> None:
    rng = random.Random(2)
    letters = "ab1 '!\n"
    # Any two letters are a token, so that it shows where a piece begins
    pairs = [(a + b).encode() for a in letters for b in letters]
    ranks = {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + pairs)}
    config = tokenizer_json(Vocabulary(GPT2_PATTERN, ranks, {"<|endoftext|>": len(ranks)}))
    for _ in range(80):
        _pattern(random_pattern(rng))(config)
        ours = Tokenizer(read_tokenizer_json(write(config, tmp_path)))
        theirs = tokenizers.Tokenizer.from_str(json.dumps(config))
        texts = ["".join(rng.choices(letters, k=rng.randint(1, 25))) for _ in range(20)]
        assert_same_ids(ours, theirs, texts)
        path = write(tokenizer_json(ours.vocabulary), tmp_path)
        assert read_tokenizer_json(path) == ours.vocabulary


# ---- what cannot be followed ---------------------------------------------------------------------


def _swap_merges(config: dict[str, Any]) -> None:
    merges = config["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def _split(config: dict[str, Any]) -> dict[str, Any]:
    return config["pre_tokenizer"]["pretokenizers"][0]


def _byte_level(config: dict[str, Any]) -> dict[str, Any]:
    return config["pre_tokenizer"]["pretokenizers"][1]


def _pattern(pattern: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: _split(config).update(pattern={"Regex": pattern})


def _vocab(change: Callable[[dict[str, int]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda config: (config["added_tokens"].clear(), change(config["model"]["vocab"]))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda c: c.pop("model"), "not the tokenizer.json of a byte-level BPE"),
        (lambda c: c["model"].update(type="WordPiece"), "only BPE"),
        (lambda c: c["model"].update(dropout=0.1), "dropout is 0.1"),
        (lambda c: c["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
        (lambda c: c.update(truncation={"max_length": 9}), "truncation is {'max_length': 9}"),
        (lambda c: c.update(padding={"pad_id": 0}), "padding is"),
        # normalizer
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "normalizer is Lowercase, only NFC"),
        (
            lambda c: c.update(
                normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}
            ),
            "NFC and Strip",
        ),
        # pre_tokenizer
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "is Whitespace, only ByteLevel"),
        (lambda c: c.update(pre_tokenizer=None), "is null, only ByteLevel"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"].insert(0, _split(c)), "Split and Split and"),
        (lambda c: _byte_level(c).update(use_regex=True), "use_regex is True in Split and Byte"),
        (lambda c: _byte_level(c).pop("use_regex"), "use_regex is True"),  # what is left out is on
        (lambda c: _byte_level(c).update(add_prefix_space=True), "add_prefix_space is on"),
        (lambda c: _split(c).update(behavior="Removed"), "behavior Removed, invert False"),
        (lambda c: _split(c).update(behavior="MergedWithNext"), "behavior MergedWithNext"),
        (lambda c: _split(c).update(pattern={"String": " "}), "split pattern {'String': ' '} may"),
        (_pattern(r"\s++$|\S+"), "may mean another thing"),
        (_pattern(r"\p{N}{1,3}+|\D"), "may mean another thing"),
        (_pattern(r"(?i:strasse)|\s|\S"), "may mean another thing"),
        (_pattern(r"\w+|\W+"), "may mean another thing"),
        # vocabulary and merges
        (lambda c: c["model"]["merges"].pop(), "the merges lack"),
        (_swap_merges, "not in the order"),
        (_vocab(lambda v: v.update({"a b": 391})), "'a b' does not spell bytes"),
        (_vocab(lambda v: v.update({"▁the": 391})), "'▁the' does not spell bytes"),
        (_vocab(lambda v: v.pop("Ġ")), "1 of the 256 bytes have no token"),
        (_vocab(lambda v: v.update({"qqq": 395})), "ordinary tokens are not 0, 1, 2"),
        # added tokens
        (lambda c: c["added_tokens"][3].update(id=399), "has the id 399, but `tokenizers` .* 394"),
        (lambda c: c["added_tokens"][3].update(rstrip=True), "swallows white space"),
        (
            lambda c: c["added_tokens"][0].update(content="the river", special=False),
            "'the river' is not special: text would become it",
        ),
    ],
)
def test_json_that_we_would_encode_differently_is_refused(
    damage: Any, told: str, tmp_path: Path
) -> None:
    config = tokenizer_json(tiny_tokenizer().vocabulary)
    damage(config)
    path = write(config, tmp_path)
    with pytest.raises(UserError, match=told) as error:
        read_tokenizer_json(path)
    assert str(path) in str(error.value)


def test_a_torn_json_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(tiny_tokenizer().vocabulary))[:1000], "utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json is not valid JSON"):
        read_tokenizer_json(path)


# ---- what we write -------------------------------------------------------------------------------


def odd_vocabulary() -> Vocabulary:
    """With ids that nobody has between the special tokens, and a token that no merge makes."""
    ranks = dict(tiny_tokenizer(600).vocabulary.ranks)
    ranks[b" zzyzx"] = len(ranks)
    specials = {"<|endoftext|>": len(ranks) + 1, "<|endofprompt|>": len(ranks) + 20}
    return Vocabulary(GPT4_PATTERN, ranks, specials)


VOCABULARIES = [tiny_tokenizer(600).vocabulary, tiny_qwen(600).vocabulary, odd_vocabulary()]


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=["ours", "qwen", "odd"])
def test_what_we_write_has_the_same_ids_there(vocabulary: Vocabulary, tmp_path: Path) -> None:
    ours = Tokenizer(vocabulary)
    ours.save(tmp_path)
    assert read_vocabulary(tmp_path) == vocabulary
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [TEXT, *ODD_TEXTS, *random_texts(seed=3, count=2000), "a zzyzx zzyzxx"]
    assert_same_ids(ours, theirs, texts)
    for text in texts:
        ids = ours.encode(text)
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    for name, id in vocabulary.specials.items():
        assert theirs.token_to_id(name) == id
        assert theirs.encode(name).ids == [id] != ours.encode(name)


# ---- the pickle ----------------------------------------------------------------------------------


def encoding(specials: dict[str, int] | None = None) -> tiktoken.Encoding:
    vocabulary = tiny_tokenizer().vocabulary
    return tiktoken.Encoding(
        "somebody's",
        pat_str=vocabulary.pattern,
        mergeable_ranks=vocabulary.ranks,
        special_tokens=specials or vocabulary.specials,
    )


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_lone_pickle_is_read(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(), protocol))
    assert read_vocabulary(tmp_path) == tiny_tokenizer().vocabulary


class Malicious:
    """Its pickle is a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_malicious_pickle_does_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "was here"
    path = tmp_path / "tokenizer.pkl"
    hidden = encoding()
    hidden._special_tokens = {"<|bos|>": Malicious(f"touch '{witness}'")}  # type: ignore[dict-item]
    for value in (Malicious(f"touch '{witness}'"), [Malicious(f"touch '{witness}'")], hidden):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match=r"wants to load (posix|nt)\.system"):
            read_tokenizer_pkl(path)
    assert not witness.exists()
    pickle.loads(path.read_bytes())  # noqa: S301  the trap is a real one
    assert witness.exists()


GLOBAL = b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93"  # pushes the class


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps({"mergeable_ranks": {}}),
        pickle.dumps(encoding())[:-100],
        pickle.dumps(encoding({"<|im_start|>": 391})),
        GLOBAL + b".",  # the class itself
        GLOBAL + b")\x81.",  # without a state
        GLOBAL + b")\x81\x8c\x04gpt2b.",  # by name, which would start a download
        GLOBAL + b"(\x8c\x01xtR.",  # called with an argument
        b"\x80\x04\x8c\x0dtiktoken.core\x8c\x11Encoding.__init__\x93.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"cbuiltins\nexec\n.",
    ],
)
def test_any_other_pickle_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"tokenizer\.pkl is refused"):
        read_tokenizer_pkl(path)


def test_the_json_wins_over_the_pickle(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Malicious("false")))
    text = json.dumps(tokenizer_json(tiny_tokenizer().vocabulary))
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    assert read_vocabulary(tmp_path) == tiny_tokenizer().vocabulary


# ---- the default system prompt -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelled", "system"),
    [
        (SYSTEM, SYSTEM),
        ("You are a helpful assistant.", "You are a helpful assistant."),
        (r"Put it within \\\\boxed{}. It\'s\nall.", "Put it within \\\\boxed{}. It's\nall."),
    ],
)
def test_the_default_system_prompt_is_the_templates(
    spelled: str, system: str, tmp_path: Path
) -> None:
    pytest.importorskip("jinja2")
    twin = oracle(tiny_qwen(), tmp_path)
    twin.chat_template = template(spelled)
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": twin.chat_template})
    tokenizer = get_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    ids, _ = tokenizer.render_conversation({"messages": messages})
    assert twin.apply_chat_template(messages)["input_ids"] == ids
    assert f"system\n{system}<|im_end|>" in tokenizer.decode(ids)
    # Which prompt is the default decides no id of a text
    assert tokenizer.fingerprint == tiny_qwen().fingerprint


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}, {"chat_template": "x"}])
def test_without_a_template_the_default_is_the_instruct_models(
    config: dict | None, tmp_path: Path
) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json(tiny_qwen().vocabulary))
    if config is not None:
        write_json(tmp_path / "tokenizer_config.json", config)
    assert read_default_system(tmp_path) is None
    conversation = {"messages": [{"role": "user", "content": "Hi"}]}
    ids, _ = get_tokenizer(tmp_path).render_conversation(conversation)
    assert SYSTEM in tiny_qwen().decode(ids)
