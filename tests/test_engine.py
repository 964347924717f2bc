"""
The engine against its slow twin, which runs the whole text through the model for every token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine, KVCache
from tests.decoding_for_tests import (
    assert_close,
    assert_pieces_are_the_whole,
    assert_rows_keep_to_themselves,
    naive_greedy,
)
from tests.models_for_tests import TINY, tiny_model, tokens_of
from tests.tokenizers_for_tests import tiny_tokenizer

every_architecture = pytest.mark.parametrize("arch", TINY)
VOCAB, ROWS = 400, 416  # the model has more rows than the tokenizer has ids


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def engine_of(arch: str, tools: bool = True) -> Engine:
    engine = Engine(tiny_model(arch, vocab_size=ROWS), tiny_tokenizer(VOCAB))
    engine.has_tools = tools
    return engine


def prompts_of_lengths(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


# ---- the cache -----------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("n_head, n_kv_head", [(4, 2), (3, 1), (4, 4)])
@pytest.mark.parametrize(
    "steps, allocations",
    [([5, 1, 7, 1, 1, 3], 1), ([200, 1, 1], 1), ([3, *[1] * 150], 3), ([64, 65, 64, 1, 200], 3)],
    ids=["chunks", "long prompt", "growth by ones", "growth by chunks"],
)
def test_cached_logits_are_the_naive_ones_at_every_position(
    arch: str, steps: list[int], allocations: int, n_head: int, n_kv_head: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same text in pieces of any size; the cache grows several times on the way. (Turbo's
    windows are of 5 positions.)"""
    sizes: list[int] = []
    grown = KVCache._grown

    def counted(self: KVCache, held: Any, like: Any, rows: int, end: int) -> Any:
        fresh = grown(self, held, like, rows, end)
        sizes.append(fresh[0].size(2))
        return fresh

    monkeypatch.setattr(KVCache, "_grown", counted)
    model = tiny_model(arch, n_head=n_head, n_kv_head=n_kv_head, n_embd=16 * n_head)
    assert_pieces_are_the_whole(model, steps)
    assert len(set(sizes)) == allocations and len(sizes) == 3 * allocations, sizes


@every_architecture
def test_rows_of_different_lengths_share_a_cache(arch: str) -> None:
    assert_rows_keep_to_themselves(tiny_model(arch), passes=45)


@every_architecture
def test_a_row_goes_on_by_itself(arch: str) -> None:
    """As one does whose tool has spoken: many tokens at once, while the others stay."""
    model = tiny_model(arch)
    idx = tokens_of(model, 3, 120)
    naive = model(idx)
    cache = KVCache(model.config.n_layer, batch=3)
    model(idx[:, :10], kv_cache=cache)
    cache.set_lengths([10, 4, 7])
    logits = model(idx[1:2, 4:100], kv_cache=cache.row(1, 96))  # the cache grows for it
    cache.set_lengths([10, 100, 7])
    assert_close(logits[0], naive[1, 4:100])
    rows, at = [0, 1, 2], [10, 100, 7]
    logits = model(idx[rows, at][:, None], kv_cache=cache)
    assert_close(logits[:, 0], naive[rows, at])


def test_the_cache_has_the_dtype_of_the_model() -> None:
    cache = KVCache(1, batch=1)
    keys = torch.ones(1, 2, 3, 4, dtype=torch.float16)
    k, v = cache.insert(0, keys, keys)
    assert k.dtype == v.dtype == torch.float16


# ---- the engine and its twin ---------------------------------------------------------------------


def twin_of(engine: Engine, prompt: list[int], max_tokens: int) -> list[int]:
    """What the naive twin says."""
    return naive_greedy(engine.model, VOCAB, prompt, max_tokens, engine.stops)


@every_architecture
def test_greedy_replies_are_those_of_the_naive_twin(arch: str) -> None:
    """Alone and in a batch of prompts of all lengths: batch-mates do not change a row."""
    engine = engine_of(arch, tools=False)
    prompts = prompts_of_lengths(1, 40, 7, 19, 7)
    twins = [twin_of(engine, p, 30) for p in prompts]
    together, _ = engine.generate_batch(prompts, max_tokens=30, temperature=0.0)
    assert together == twins
    for prompt, twin in zip(prompts, twins):
        alone, _ = engine.generate_batch(prompt, max_tokens=30, temperature=0.0)
        assert alone == [twin]


def all_continuations(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    sequences, _ = engine.generate_batch(prompts, max_tokens=30, temperature=0.0)
    return [s[len(p) :] for s, p in zip(sequences, prompts)]


def test_rows_that_stop_leave_and_the_others_go_on() -> None:
    """What some rows say early is made a stop token: they must end there, and nothing else move.

    Of nine rows one may idle in the batch for a while before the cache is cut."""
    engine = engine_of("gpt", tools=False)
    prompts = prompts_of_lengths(3, 12, 5, 30, 1, 8, 2, 17, 9)
    full = all_continuations(engine, prompts)
    said_by = [set(reply) for reply in full]
    stops = [full[1][2], full[3][9], full[6][20]]  # row 1 ends after 3 tokens, row 3 by 10, ...
    engine.stops = set(stops)
    cut = all_continuations(engine, prompts)
    for reply, whole, said in zip(cut, full, said_by):
        ends = [whole.index(s) for s in stops if s in said]
        assert reply == whole[: min(ends) + 1 if ends else None]
    lengths = sorted(len(reply) for reply in cut)
    assert lengths[0] < lengths[1] < lengths[-1] == 30, "too few ways of ending"


def test_samples_of_a_prompt_begin_differently() -> None:
    """Each sample draws its own first token, it is not one draw copied to all."""
    engine = engine_of("gpt")
    sequences, _ = engine.generate_batch([1, 2, 3], num_samples=16, max_tokens=1)
    assert len({s[3] for s in sequences}) > 4


def test_sequences_come_prompt_major_with_their_masks() -> None:
    engine = engine_of("qwen2.5", tools=False)
    prompts = prompts_of_lengths(4, 2)
    sequences, masks = engine.generate_batch(prompts, num_samples=3, max_tokens=5, top_k=10)
    assert len(sequences) == len(masks) == 6
    for i, (sequence, mask) in enumerate(zip(sequences, masks)):
        prompt = prompts[i // 3]
        assert sequence[: len(prompt)] == prompt
        assert mask == [0] * len(prompt) + [1] * (len(sequence) - len(prompt))
        assert len(sequence) - len(prompt) <= 5


def test_a_seed_gives_the_same_text_whoever_shares_the_batch() -> None:
    engine = engine_of("gpt")
    a, b, c = prompts_of_lengths(9, 3, 21)
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "num_samples": 2}
    together, _ = engine.generate_batch([b, a, c], seed=[7, 8, 9], **settings)
    alone, _ = engine.generate_batch([a], seed=[8], **settings)
    assert together[2:4] == alone
    # fewer samples are a beginning of more
    assert engine.generate_batch([a], seed=[8], **{**settings, "num_samples": 1})[0] == alone[:1]
    again, _ = engine.generate_batch([b, a, c], seed=[7, 8, 9], **settings)
    assert again == together
    other, _ = engine.generate_batch([a], seed=[10], **settings)
    assert other != alone


def test_two_equal_prompts_with_one_seed_get_different_replies() -> None:
    engine = engine_of("gpt")
    sequences, _ = engine.generate_batch([[1, 2], [1, 2]], max_tokens=12, seed=3)
    assert sequences[0] != sequences[1]


@every_architecture
def test_rows_beyond_the_vocabulary_are_never_sampled(arch: str) -> None:
    """The model's head is made to want nothing else."""
    engine = engine_of(arch)
    head = engine.model.model.embed_tokens if arch == "qwen2.5" else engine.model.lm_head
    head.weight[VOCAB:] *= 50.0
    whole = engine.model(torch.tensor([[1, 2, 3]]))[0, -1]
    assert int(whole.argmax()) >= VOCAB, "the head does not want them"
    for temperature, top_k in ((0.0, None), (1.0, None), (3.0, None), (1.0, 3), (1.0, ROWS)):
        sequences, _ = engine.generate_batch(
            [1, 2, 3], num_samples=8, max_tokens=12, temperature=temperature, top_k=top_k
        )
        assert max(map(max, sequences)) < VOCAB


def test_generating_past_the_configured_length_works_and_training_goes_on() -> None:
    """sequence_len is 16. The rotary table grows in inference mode, and autograd takes it still."""
    engine = engine_of("gpt", tools=False)
    engine.stops = set()
    sequences, _ = engine.generate_batch([1, 2, 3], max_tokens=60, temperature=0.0)
    assert sequences == [twin_of(engine, [1, 2, 3], 60)]
    idx = torch.tensor(sequences)
    with torch.enable_grad():
        engine.model(idx[:, :-1], idx[:, 1:]).backward()


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_an_empty_prompt_is_refused(prompts: Any) -> None:
    with pytest.raises(UserError, match="at least one token"):
        engine_of("gpt").generate_batch(prompts)


def test_no_tokens_wanted_gives_the_prompts() -> None:
    assert engine_of("gpt").generate_batch([[1, 2]], max_tokens=0) == ([[1, 2]], [[0, 0]])
