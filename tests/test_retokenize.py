"""A model that goes on with another tokenizer: every row is where its token's meaning is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.checkpoint import save_checkpoint
from nanochat.common import UserError
from nanochat.models import build_model
from nanochat.retokenize import plan_rows, retrain_embeddings
from nanochat.start import load_base
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.vocabulary import Vocabulary
from tests.models_for_tests import TINY, tiny_model, tokens_of
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

OURS, QWEN = tiny_tokenizer(400), tiny_qwen(440)
PAIRS = [(OURS, QWEN), (QWEN, OURS), (OURS, tiny_tokenizer(300)), (tiny_tokenizer(300), OURS)]
# Special tokens with the same work; the others, <|output_start|> for one, have none
FROM_QWEN = {
    "<|bos|>": "<|endoftext|>",
    "<|user_start|>": "<|im_start|>",
    "<|user_end|>": "<|im_end|>",
    "<|assistant_start|>": "<|im_start|>",
    "<|assistant_end|>": "<|im_end|>",
    "<|python_start|>": "<tool_call>",
    "<|python_end|>": "</tool_call>",
}
FROM_OURS = {
    "<|endoftext|>": "<|bos|>",
    "<|im_start|>": "<|assistant_start|>",  # the one whose place a model learned to speak at
    "<|im_end|>": "<|assistant_end|>",  # the one that a model learned to produce
    "<tool_call>": "<|python_start|>",
    "</tool_call>": "<|python_end|>",
}


def wanted_rows(old: Tokenizer, new: Tokenizer, table: Tensor, count: int) -> Tensor:
    """The slow twin: one token at a time, in words."""
    if old.vocabulary.specials.keys() == new.vocabulary.specials.keys():
        twins = {name: name for name in new.vocabulary.specials}
    else:
        twins = FROM_QWEN if new.vocabulary.specials.keys() >= FROM_QWEN.keys() else FROM_OURS
    rows = [table[: old.get_vocab_size()].mean(0)] * count
    for token, id in new.vocabulary.ranks.items():
        if token in old.vocabulary.ranks:
            rows[id] = table[old.vocabulary.ranks[token]]
            continue
        try:
            pieces = old.encode(token.decode())
        except UnicodeDecodeError:
            continue  # checked by its bytes, below
        rows[id] = sum(table[piece] for piece in pieces) / len(pieces)  # type: ignore[assignment]
    for name, id in new.vocabulary.specials.items():
        pieces = [old.vocabulary.specials[twins[name]]] if name in twins else old.encode(name)
        rows[id] = sum(table[piece] for piece in pieces) / len(pieces)  # type: ignore[assignment]
    return torch.stack(rows)


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=["ours-qwen", "qwen-ours", "fewer", "more"])
@pytest.mark.parametrize(
    ("arch", "tied"),
    [("gpt", None), ("turbo", None), ("qwen2.5", True), ("qwen2.5", False)],
    ids=str,
)
def test_tables_are_made_row_by_row_and_the_rest_is_as_it_was(
    old: Tokenizer, new: Tokenizer, arch: str, tied: bool | None
) -> None:
    changes = {} if tied is None else {"tied": tied}
    old_rows, new_rows = old.get_vocab_size() + 5, new.get_vocab_size() + 3  # with padding
    source = tiny_model(arch, vocab_size=old_rows, **changes)
    target = tiny_model(arch, seed=1, vocab_size=new_rows, **changes)
    said = retrain_embeddings(source, old, target, new)
    whole = [id for token, id in new.vocabulary.ranks.items() if _is_text(token)]
    checked = torch.tensor(sorted({*whole, *range(len(new.vocabulary.ranks), new_rows)}))
    tables = 0
    for name, p in target.named_parameters():
        before = source.get_parameter(name)
        if p.shape == before.shape:
            assert torch.equal(p, before), name
        else:
            tables += 1
            wanted = wanted_rows(old, new, before, new_rows)
            assert torch.allclose(p[checked], wanted[checked], atol=1e-6), name
    value_tables = 2 if arch == "turbo" else 0  # of layers 0 and 2
    assert tables == (1 if tied else 2) + value_tables
    # The numbers that are printed, counted by their meaning
    shared = len(old.vocabulary.ranks.keys() & new.vocabulary.ranks.keys())
    same = len(FROM_QWEN if new is OURS else FROM_OURS) if QWEN in (old, new) else 9
    assert said == (
        f"embeddings for another tokenizer: of {new_rows} rows {shared} are carried over (the same "
        f"bytes), {same} are those of special tokens with the same work, "
        f"{new.get_vocab_size() - shared - same} begin with the mean of their pieces' rows, 3 "
        "belong to no token"
    )


def _is_text(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


def test_the_same_vocabulary_changes_nothing() -> None:
    source = tiny_model("gpt", vocab_size=400)
    target = tiny_model("gpt", seed=1, vocab_size=400)
    retrain_embeddings(source, OURS, target, OURS)
    idx = tokens_of(source, 2, 12)
    assert torch.equal(source(idx), target(idx))


def test_a_model_goes_on_with_what_it_knows() -> None:
    """Where both tokenizers cut a text into the same tokens, predictions of shared tokens keep
    their order, though every id is another."""
    specials = {name: 256 + i for i, name in enumerate(OURS.vocabulary.specials)}
    backwards = {bytes([b]): 255 - b for b in range(256)}
    old, new = (
        tiny_tokenizer(265),
        Tokenizer(Vocabulary(OURS.vocabulary.pattern, backwards, specials)),
    )
    source = tiny_model("qwen2.5", vocab_size=265)
    target = tiny_model("qwen2.5", seed=1, vocab_size=265)
    retrain_embeddings(source, old, target, new)
    text = "The harbour town of Selby"
    before = source(torch.tensor([old.encode(text, prepend="<|bos|>")]))
    after = target(torch.tensor([new.encode(text, prepend="<|bos|>")]))
    assert old.encode(text) != new.encode(text)
    assert torch.allclose(after[..., :256], before[..., :256].flip(-1), atol=1e-5)
    assert torch.allclose(after[..., 256:], before[..., 256:], atol=1e-5)


def test_halves_of_characters_are_cut_by_their_bytes() -> None:
    """Tokens need be no UTF-8: the Korean and Japanese of the training text make such."""
    ranks = {**tiny_tokenizer(265).vocabulary.ranks, "東".encode()[:2]: 256, b"\xff\xfeA": 257}
    new = Tokenizer(Vocabulary(OURS.vocabulary.pattern, ranks, {"<|endoftext|>": 258}))
    plan = plan_rows(tiny_tokenizer(265), new)
    pieces = [plan.pieces[a:b].tolist() for a, b in zip(plan.offsets, plan.offsets[1:])]
    assert pieces[256:] == [[0xE6, 0x9D], [0xFF, 0xFE, ord("A")], [256]]
    assert (plan.num_shared, plan.num_mixed, plan.num_by_work) == (256, 2, 1)


def test_a_target_with_too_few_rows_is_refused() -> None:
    source, target = tiny_model("gpt", vocab_size=400), tiny_model("gpt", vocab_size=399)
    with pytest.raises(UserError, match="399 rows, the tokenizer 440 ids"):
        retrain_embeddings(source, OURS, target, QWEN)


# ---- the flag ------------------------------------------------------------------------------------


def saved_base(base_dir: Path) -> Any:
    """A base model with our tokenizer, and Qwen's where a flag can name it."""
    OURS.save(base_dir / "tokenizer")
    QWEN.save(base_dir / "other")
    model = tiny_model("gpt", vocab_size=400)
    meta = {"tokenizer": None, "tokenizer_fingerprint": OURS.fingerprint, "step": 7}
    save_checkpoint("base", "d3", 7, model, {}, meta)
    return model


def test_another_tokenizer_needs_the_flag(
    own_base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved_base(own_base_dir)
    new = get_tokenizer(own_base_dir / "other")
    target = build_model(replace(TINY["gpt"], vocab_size=440, sequence_len=32), seed=2)
    with pytest.raises(UserError, match=r"another tokenizer, .* say --retrain_embeddings"):
        load_base("d3", target, new)
    assert load_base("d3", target, new, new_tokenizer=True).startswith("base d3 step_000007 (")
    said = capsys.readouterr().out
    assert re.search(r"of 440 rows \d+ are carried over .* \d+ begin with the mean", said)
    matrix = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(target.get_parameter(matrix), source.get_parameter(matrix))
    wanted = wanted_rows(OURS, new, source.lm_head.weight, 440)
    assert torch.allclose(target.lm_head.weight[:256], wanted[:256])
    # The shape is still looked at, and the same tokenizer is no reason for another one
    with pytest.raises(UserError, match="but --arch and --depth ask for"):
        load_base("d3", tiny_model("gpt", vocab_size=440, n_layer=2), new, new_tokenizer=True)
    load_base("d3", tiny_model("gpt", vocab_size=400), get_tokenizer(), new_tokenizer=True)
    assert "the tokenizer is the same" in capsys.readouterr().err
