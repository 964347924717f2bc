"""DPO's pairs, batches and loss: against a dense reference, for both chat formats."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.dataloader import IGNORE
from nanochat.distributed import DistInfo
from nanochat.dpo import (
    PairBatch,
    Pairs,
    by_length,
    encode_reply,
    evaluate_pairs,
    load_pairs,
    make_batch,
    read_pair,
    reference_log_probs,
    seen_by,
)
from tests.models_for_tests import TINY, tiny_model
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer

CPU = torch.device("cpu")
BETA = 0.4


# ---- pairs


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_a_pair_is_read_in_every_usual_form() -> None:
    wanted = [{"messages": [user("Hi"), assistant(text)]} for text in ("Hello!", "What?")]
    for prompt, wrap in [
        ("Hi", lambda text: text),
        ([user("Hi")], lambda text: text),
        ("Hi", lambda text: [assistant(text)]),
        ([user("Hi")], lambda text: [user("Hi"), assistant(text)]),
    ]:
        row = {"prompt": prompt, "chosen": wrap("Hello!"), "rejected": wrap("What?")}
        assert list(read_pair(row, "here")) == wanted


@pytest.mark.parametrize(
    "change, said",
    [
        ({"chosen": None}, "x:1: expected a pair as .*, found prompt, rejected"),
        ({"prompt": []}, "x:1: expected a pair"),
        ({"prompt": ""}, "x:1: .*is empty"),
        ({"prompt": [assistant("Hi")]}, 'x:1: "prompt": message 0 has role .assistant.'),
        ({"prompt": [user("a"), assistant("b")]}, 'x:1: "prompt" must end with the user'),
        ({"chosen": [user("Hi")]}, 'x:1: "chosen": message 1 has role .user.'),
        ({"rejected": 5}, 'x:1: "rejected" must be text or a list'),
        ({"rejected": [user("Ho"), assistant("b")]}, "is not the prompt"),
    ],
)
def test_what_is_no_pair_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_pair({"prompt": "Hi", "chosen": "a", "rejected": "b", **change}, "x:1")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(400), tiny_qwen()], ids=["ours", "qwen2.5"])
def test_the_last_reply_and_its_end_are_learned_and_nothing_else(tokenizer: Any) -> None:
    """Not the reply before it, no tool output."""
    parts = [
        {"type": "text", "text": "one "},
        {"type": "python", "text": "2+2"},
        {"type": "python_output", "text": "444"},
        {"type": "text", "text": "two"},
    ]
    history = [user("first"), assistant("earlier"), user("now")]
    ids, trained = encode_reply(tokenizer, {"messages": [*history, assistant(parts)]})
    end = tokenizer.encode_special("<|assistant_end|>")
    learned = [id for id, t in zip(ids, trained, strict=True) if t]
    assert learned[-1] == end
    text = tokenizer.decode(learned)
    assert "one" in text and "2+2" in text and "two" in text
    assert not any(word in text for word in ("earlier", "first", "now", "444"))
    ids, trained = encode_reply(tokenizer, {"messages": [*history, assistant("plain")]})
    learned = [id for id, t in zip(ids, trained, strict=True) if t]
    assert learned == [*tokenizer.encode("plain"), end]


def test_pairs_are_split_by_prompt_and_accounted_for(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i // 2}?", "chosen": f"Yes {i}.", "rejected": "No."} for i in range(300)
    ]
    rows += [{"prompt": "a?", "chosen": "same", "rejected": "same"}] * 2
    rows += [{"prompt": "b?", "chosen": "long " * 99, "rejected": "short"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = tiny_tokenizer(400)
    train, val, said = load_pairs(str(path), None, tokenizer, 64)
    assert said == "pairs.jsonl: 1 document in 50, by its hash" and val is not None
    assert len(train) + len(val) == 300 and len(val) % 2 == 0  # both rows of a prompt
    dropped = "3 dropped (1: longer than --max_seq_len; 2: both replies are the same tokens)"
    assert train.account() == f"pairs: {len(train)} kept, {dropped}"
    assert 5 < train.longest <= 64
    prompts = [{tuple(a[0][:6]) for a, _ in side.replies} for side in (train, val)]
    assert len(val) and not prompts[0] & prompts[1]
    assert load_pairs(str(path), None, tokenizer, 64)[0].fingerprint == train.fingerprint
    assert val.fingerprint != train.fingerprint
    with pytest.raises(UserError, match="leaves nothing to train on"):
        load_pairs(str(path), None, tokenizer, 3)


# ---- the loss


def some_pairs(vocab_size: int, count: int = 7) -> Pairs:
    """Random prompts of 2 to 4 tokens, replies of 1 to 6, some of their tokens not learned."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    pairs = Pairs([])
    for _ in range(count):
        prompt = [draw(0, vocab_size) for _ in range(draw(2, 5))]
        both = []
        for _ in range(2):
            reply = [draw(0, vocab_size) for _ in range(draw(1, 7))]
            learned = [int(draw(0, 5) > 0) for _ in reply[:-1]] + [1]
            both.append(([*prompt, *reply], [0] * len(prompt) + learned))
        pairs.replies.append((both[0], both[1]))
    return pairs


def dense_log_prob(model: Any, reply: tuple[list[int], list[int]]) -> Tensor:
    """Token by token, each from its own forward pass."""
    total = torch.zeros(())
    for at, (id, learned) in enumerate(zip(*reply, strict=True)):
        if learned:
            total = total + model(torch.tensor([reply[0][:at]]))[0, -1].log_softmax(-1)[id]
    return total


def dense_loss(model: Any, start: Any, pairs: Pairs, smoothing: float = 0.0) -> Tensor:
    """Equation 7 of arXiv 2305.18290, as it stands there; mean over the pairs."""
    total = torch.zeros(())
    for chosen, rejected in pairs.replies:
        with torch.no_grad():
            reference = dense_log_prob(start, chosen), dense_log_prob(start, rejected)
        ratios = [dense_log_prob(model, reply) - ref
                  for reply, ref in zip((chosen, rejected), reference)]  # fmt: skip
        p = 1 / (1 + torch.exp(-BETA * (ratios[0] - ratios[1])))
        total = total - (1 - smoothing) * p.log() - smoothing * (1 - p).log()
    return total / len(pairs)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def info(rank: int = 0, world: int = 1) -> DistInfo:
    return DistInfo(rank, rank, world, CPU)


@pytest.mark.parametrize("arch", TINY)
def test_the_gradient_is_the_dense_references_however_it_is_batched(arch: str) -> None:
    model, start = tiny_model(arch), tiny_model(arch, seed=3)
    pairs = some_pairs(96)
    wanted_loss = dense_loss(model, start, pairs)
    wanted = gradients(model, wanted_loss)
    for size in (1, 3, 100):
        reference = reference_log_probs(start, pairs, size, 95, info(), nullcontext)
        batches = [make_batch(pairs, numbers, reference, 95, CPU, BETA)
                   for numbers in by_length(pairs, range(7), size)]  # fmt: skip
        count = sum(int(b.count()) for b in batches)
        assert count == 7
        loss = torch.stack([b.loss(model) for b in batches]).sum() / count  # as TrainStep does
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(model, loss).items():
            assert wanted[name].abs().max() > 1e-7, f"{name} says nothing"
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


def test_label_smoothing_is_a_mean_of_both_ways_round() -> None:
    model, start, pairs = tiny_model("gpt"), tiny_model("gpt", seed=3), some_pairs(96)
    reference = reference_log_probs(start, pairs, 7, 95, info(), nullcontext)
    batch = make_batch(pairs, range(7), reference, 95, CPU, BETA, label_smoothing=0.2)
    wanted = dense_loss(model, start, pairs, 0.2)
    torch.testing.assert_close(batch.loss(model) / 7, wanted, rtol=1e-5, atol=1e-5)


def test_at_the_start_it_is_log_2_and_a_better_model_has_margins() -> None:
    model, pairs = tiny_model("gpt"), some_pairs(96)
    reference = reference_log_probs(model, pairs, 3, 95, info(), nullcontext)
    batch = make_batch(pairs, range(7), reference, 95, CPU)
    assert batch.loss(model).item() == pytest.approx(7 * math.log(2), rel=1e-5)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for name, g in gradients(model, batch.loss(model)).items():
        dict(model.named_parameters())[name].data.copy_(before[name] - 1e-3 * g)
    found = evaluate_pairs(model, iter([batch]), info())
    assert found["loss"] < math.log(2) and found["margin"] > 0 and found["accuracy"] > 0.5
    difference = found["chosen_reward"] - found["rejected_reward"]
    assert found["margin"] == pytest.approx(difference, abs=1e-5)
    seen = seen_by([batch], info())
    assert seen == {name: value for name, value in found.items() if name != "loss"}
    assert set(seen_by([], info()).values()) == {0.0}  # a rank without a pair


def test_ranks_share_the_reference_out() -> None:
    model, pairs = tiny_model("gpt"), some_pairs(96)
    whole = reference_log_probs(model, pairs, 2, 95, info(), nullcontext)
    assert whole.abs().min() > 0
    parts = [reference_log_probs(model, pairs, 2, 95, info(r, 3), nullcontext) for r in range(3)]
    assert torch.equal(sum(parts), whole)  # what the sum over the ranks gives
    assert all((part == 0).any() for part in parts)
    dense = [[dense_log_prob(model, reply).item() for reply in pair] for pair in pairs.replies]
    torch.testing.assert_close(whole, torch.tensor(dense), rtol=1e-4, atol=1e-4)


def test_pairs_stay_together_and_padding_says_nothing() -> None:
    pairs = some_pairs(90)
    reference = torch.arange(14.0).view(7, 2)
    groups = by_length(pairs, range(7), 3)
    assert sorted(i for g in groups for i in g) == list(range(7))
    assert [len(g) for g in groups] == [3, 3, 1]
    lengths = [pairs.length(i) for group in groups for i in group]
    assert lengths == sorted(lengths)
    for numbers in groups:
        batch: PairBatch = make_batch(pairs, numbers, reference, 95, CPU)
        n = len(numbers)
        assert batch.idx.size(0) == 2 * n
        for row in range(2 * n):
            i, side = numbers[row % n], row // n
            ids, learned = pairs.replies[i][side]
            assert batch.reference[row] == reference[i, side]
            assert batch.idx[row, : len(ids) - 1].tolist() == ids[:-1]
            assert set(batch.idx[row, len(ids) - 1 :].tolist()) <= {95}
            wanted = [id if t else IGNORE for id, t in zip(ids[1:], learned[1:])]
            assert batch.targets[row, : len(ids) - 1].tolist() == wanted
            assert set(batch.targets[row, len(ids) - 1 :].tolist()) <= {IGNORE}
