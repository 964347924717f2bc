"""
The chunked loss against its slow twin, which makes all logits and lets autograd do the rest.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nanochat.models import loss as loss_module
from nanochat.models.layers import lm_logits, token_losses
from nanochat.models.loss import (
    chunk_rows,
    loss_kernel,
    losses_in_place,
    losses_of_rows,
    rows_of_chunk,
    sum_of_losses,
)
from tests.models_for_tests import tiny_model, tokens_of

N, D, V = 22, 6, 40  # two rows of 11
CHUNKS = [1, 3, 11, 22, 100]
softcaps = pytest.mark.parametrize("softcap", [0.0, 15.0])
reductions = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def inputs(ignored: str = "some", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """(2, 11, D), (V, D), (2, 11). Logits are large enough for the cap to bend them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 11, D, generator=generator).to(dtype)
    head = (4 * torch.randn(V, D, generator=generator)).to(dtype)
    targets = torch.randint(0, V, (2, 11), generator=generator)
    if ignored == "some":
        targets[0, :5] = -1  # with a chunk of 3, one whole chunk of it
        targets[1, 7] = -1
    if ignored == "all":
        targets[:] = -1
    return x.requires_grad_(), head.requires_grad_(), targets


def plain(x: Tensor, head: Tensor, targets: Tensor, reduction: str, softcap: float) -> Tensor:
    logits = lm_logits(x, head, softcap).flatten(0, -2)
    flat = targets.flatten()
    nll = F.cross_entropy(logits, flat, ignore_index=-1, reduction="none")
    if reduction == "none":
        return nll.view(targets.shape)
    return nll.sum() / (max(1, int((flat != -1).sum())) if reduction == "mean" else 1)


def differentiated(function: Any, x: Tensor, head: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The loss and its two gradients. What comes from above is neither 1 nor equal everywhere."""
    x, head = x.detach().requires_grad_(), head.detach().requires_grad_()
    value = function(x, head, *rest)
    above = torch.linspace(-0.5, 2.0, value.numel()).view(value.shape) if value.ndim else 3.7
    (value * above).sum().backward()
    assert x.grad is not None and head.grad is not None
    return value.detach(), x.grad, head.grad


def assert_same(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], rtol: float = 1e-5
) -> None:
    """Each to rtol of the largest number in its tensor."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0.0, atol=rtol * (float(b.abs().max()) + 1e-3))


@reductions
@softcaps
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_loss_and_gradients_are_the_plain_ones(
    reduction: str, softcap: float, ignored: str
) -> None:
    x, head, targets = inputs(ignored)
    assert lm_logits(x, head).abs().max() > 20
    expected = differentiated(plain, x, head, targets, reduction, softcap)
    for chunk in [*CHUNKS, None]:
        found = differentiated(token_losses, x, head, targets, reduction, softcap, chunk)
        assert_same(found, expected)


@softcaps
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_ignored_positions_may_stay_in_their_places(softcap: float, ignored: str) -> None:
    """As they do on a GPU, where dropping them would cost a sync."""
    x, head, targets = inputs(ignored)
    flat = (x.flatten(0, 1), head, targets.flatten())
    for chunk in CHUNKS:
        found = differentiated(sum_of_losses, *flat, softcap, chunk)
        assert_same(found, differentiated(plain, *flat, "sum", softcap))
        found = differentiated(losses_of_rows, *flat, softcap, chunk)
        assert_same(found, differentiated(plain, *flat, "none", softcap))


@softcaps
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_in_the_place_of_the_logits(
    softcap: float, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compiled step has it on a GPU."""
    monkeypatch.setattr(loss_module, "_kernel_for", lambda x: losses_in_place)
    x, head, targets = inputs(ignored)
    flat = (x.flatten(0, 1), head, targets.flatten())
    for chunk in CHUNKS:
        found = differentiated(sum_of_losses, *flat, softcap, chunk)
        assert_same(found, differentiated(plain, *flat, "sum", softcap))


def test_a_kernel_is_taken_within_a_compiled_step_and_off_the_cpu() -> None:
    cpu, gpu = torch.empty(1), torch.empty(1, device="meta")
    assert loss_module._kernel_for(gpu) is None
    with loss_kernel(losses_in_place):
        assert loss_module._kernel_for(cpu) is None
        assert loss_module._kernel_for(gpu) is losses_in_place
    assert loss_module._kernel_for(gpu) is None


@softcaps
@pytest.mark.parametrize("in_place", [False, True])
def test_gradcheck_in_float64(
    softcap: float, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite differences, which know nothing of how the gradient is written down."""
    if in_place:
        monkeypatch.setattr(loss_module, "_kernel_for", lambda x: losses_in_place)
    x, head, targets = inputs(dtype=torch.float64)
    x, head = x.detach().flatten(0, 1).requires_grad_(), (0.3 * head.detach()).requires_grad_()
    for function in (sum_of_losses, losses_of_rows):

        def value(x: Tensor, head: Tensor, function: Any = function) -> Tensor:
            return function(x, head, targets.flatten(), softcap, 5)

        assert torch.autograd.gradcheck(value, (x, head))


@pytest.mark.parametrize("function", [sum_of_losses, losses_of_rows])
def test_what_is_frozen_gets_no_gradient(function: Any) -> None:
    x, head, targets = inputs()
    x, flat = x.detach().flatten(0, 1), targets.flatten()
    _, of_x, of_head = differentiated(function, x, head, flat, 15.0, 4)
    for frozen, trained, expected in ((x, head, of_head), (head, x, of_x)):
        frozen, trained = frozen.detach(), trained.detach().requires_grad_()
        both = (frozen, trained) if frozen.shape == x.shape else (trained, frozen)
        value = function(*both, flat, 15.0, 4)
        above = torch.linspace(-0.5, 2.0, value.numel()).view(value.shape) if value.ndim else 3.7
        (value * above).sum().backward()
        assert frozen.grad is None and trained.grad is not None
        assert_same((trained.grad,), (expected,))


def test_backward_twice_is_the_same_twice() -> None:
    """What was saved is not used up."""
    x, head, targets = inputs()
    value = token_losses(x, head, targets, "mean", 15.0, 4)
    first = torch.autograd.grad(2 * value, (x, head), retain_graph=True)
    assert_same(torch.autograd.grad(2 * value, (x, head)), first, rtol=0.0)


# ---- memory


class Sizes(TorchDispatchMode):
    """Every tensor that an operation returns, by its number of elements; matmuls counted."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.matmuls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        self.matmuls += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return out


@reductions
def test_no_more_logits_exist_than_those_of_a_chunk(reduction: str) -> None:
    x, head, targets = inputs("none")
    with Sizes() as whole:
        differentiated(plain, x, head, targets, reduction, 15.0)
    assert whole.largest == N * V
    with Sizes() as chunked:
        differentiated(token_losses, x, head, targets, reduction, 15.0, 3)
    assert chunked.largest == V * D  # the head's gradient
    matmuls = 4 if reduction == "none" else 3  # logits (twice?), gradient in x, in the head
    assert chunked.matmuls == matmuls * 8  # chunks


class Alive(TorchDispatchMode):
    """How many tensors of so many elements there are at once, at most."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.most = numel, 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.numel:
            storage = out.untyped_storage()
            key = storage._cdata
            self.alive[key] = weakref.ref(storage, lambda _: self.alive.pop(key, None))
            self.most = max(self.most, len(self.alive))
        return out


@pytest.mark.parametrize("in_place", [False, True])
def test_the_logits_of_a_chunk_are_gone_before_the_next_ones(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 they would be twice what a model's activations are."""
    x, head, targets = (t.detach() for t in inputs("none"))
    rows = [x.flatten(0, 1)[:20].requires_grad_(), head.requires_grad_(), targets.flatten()[:20]]
    most = []
    for chunk in (20, 5):  # one chunk, four
        if in_place:
            monkeypatch.setattr(loss_module, "_kernel_for", lambda x: made_in_one)
        with Alive(chunk * V) as alive:
            sum_of_losses(*rows, 15.0, chunk)
        most.append(alive.most)
    assert most[0] == most[1] and most[0] == (1 if in_place else 3)


def made_in_one(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """losses_in_place as a compiler makes it: nothing in between."""
    with _disable_current_modes():
        return losses_in_place(logits, targets, softcap)


@reductions
def test_without_gradients_none_are_computed(reduction: str) -> None:
    x, head, targets = inputs()
    for frozen in (False, True):
        with torch.set_grad_enabled(frozen), Sizes() as sizes:
            x, head = x.detach(), head.detach()
            if not frozen:
                x.requires_grad_()
            token_losses(x, head, targets, reduction, 15.0, 4)
        assert sizes.matmuls == 4, "16 positions with a target, 4 at a time"


def test_chunks_are_neither_too_small_nor_too_large() -> None:
    for device in ("cpu", "cuda", "mps"):
        for reduction in ("sum", "mean", "none"):
            for vocab_size in (300, 8192, 65_536, 151_936):
                rows = chunk_rows(vocab_size, device, reduction)
                assert rows >= loss_module.MIN_CHUNK_ROWS
                assert rows * vocab_size * 4 <= 2**30
    assert chunk_rows(8192, "cpu", "sum") < chunk_rows(8192, "cuda", "sum")
    assert chunk_rows(8192, "cpu", "sum") < chunk_rows(8192, "cpu", "none")


def test_in_place_chunks_are_larger_and_no_more_than_a_gigabyte() -> None:
    x = torch.empty(1, 4, dtype=torch.bfloat16, device="meta", requires_grad=True)
    head = torch.empty(65_536, 4, dtype=torch.bfloat16, device="meta")
    plain = rows_of_chunk(x, head, "sum")
    assert plain == chunk_rows(65_536, "meta", "sum") == 2048
    with loss_kernel(losses_in_place):
        assert rows_of_chunk(x, head, "sum") * 65_536 * 2 == 2**30
        assert rows_of_chunk(x.float(), head.float(), "mean") * 65_536 * 4 == 2**30
        assert rows_of_chunk(x, head, "none") == chunk_rows(65_536, "meta", "none")
        assert rows_of_chunk(x.detach(), head, "sum") == plain


# ---- narrow dtypes


@pytest.fixture
def plain_kernels() -> Any:
    """PyTorch's own matmul: oneDNN's for bfloat16 is an illegal instruction on some CPUs."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@reductions
@softcaps
def test_under_autocast_only_the_matmuls_are_narrow(
    reduction: str, softcap: float, plain_kernels: None
) -> None:
    """Closer to the plain loss under autocast than that is to float32."""
    x, head, targets = inputs()
    exact = differentiated(plain, x, head, targets, reduction, softcap)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = differentiated(plain, x, head, targets, reduction, softcap)
        for chunk in CHUNKS:
            found = differentiated(token_losses, x, head, targets, reduction, softcap, chunk)
            torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
            assert_same(found[1:], expected[1:], rtol=0.01)
            assert found[2].dtype == torch.float32
    assert not torch.allclose(exact[0], expected[0], rtol=1e-5, atol=1e-5), "was it narrow at all?"


def test_the_gradient_of_the_head_is_summed_in_float32(plain_kernels: None) -> None:
    """One column of the head gets the same small share from each of 4,096 chunks: in bfloat16 the
    sum would stop growing at 256 shares."""
    x = torch.ones(4096, 1, dtype=torch.bfloat16)
    head = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    sum_of_losses(x, head, torch.zeros(4096, dtype=torch.int64), 0.0, 1).backward()
    assert head.grad is not None and head.grad.dtype == torch.bfloat16
    assert head.grad[:, 0].tolist() == [-0.75 * 4096, 1024.0, 1024.0, 1024.0]


def test_float16_keeps_gradients_that_its_scale_saves(plain_kernels: None) -> None:
    """Probability 2^-27 of each of the unlikely tokens is nothing in float16; times 2^16 it is."""
    x = torch.ones(8, 1, dtype=torch.float16, requires_grad=True)
    head = torch.tensor([[18.7], [0.0], [0.0]], dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(1, 8, dtype=torch.int64)
    (2**16 * token_losses(x[None], head, targets, "sum", chunk=4)).backward()
    assert head.grad is not None
    share = 8 * float(torch.tensor(-18.7).half().double().exp())
    assert float(head.grad[1, 0]) / 2**16 == pytest.approx(share, rel=0.01)


def test_dtypes_that_do_not_fit_are_refused() -> None:
    x, head, targets = inputs()
    with pytest.raises(ValueError, match="bfloat16"):
        sum_of_losses(x.flatten(0, 1).bfloat16(), head, targets.flatten(), 0.0, 4)


# ---- torch.compile


def test_torch_compile_takes_the_training_step_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph: a graph break anywhere is an error. Chunks of 16 positions, three and a rest. The
    backend divides the graph as the real one does, and what passes from forward to backward is
    checked: never logits."""
    monkeypatch.setattr(loss_module, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setitem(loss_module.SUM_CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(loss_module, "ROWS_CHUNK_BYTES", 1)
    model = tiny_model("gpt", n_layer=1, vocab_size=500, sequence_len=30)
    idx, targets = tokens_of(model, 2, 25), tokens_of(model, 2, 25, seed=1)
    targets[0, 3:9] = -1
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    for reduction in ("sum", "mean", "none"):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        results = []
        for function in (model, compiled):
            model.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                value = function(idx, targets, reduction=reduction)
            value.square().sum().backward()
            results.append((value.detach(), *(p.grad.clone() for p in model.parameters())))
        assert_same(results[1], results[0])
    assert 0 < max(saved) <= model.lm_head.weight.numel()
