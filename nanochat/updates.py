"""
The arithmetic of the optimizer's steps; who does which of them is nanochat/optim.py's concern.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by
the nearest orthogonal matrix, so that every direction of the matrix learns at the same speed. The
nearest orthogonal matrix is found by Polar Express (Amsel et al., arXiv 2505.16932); NorMuon (Li et
al., arXiv 2510.05491) then gives the neurons of a matrix equal steps over time; weights decay only
where the step shrinks them anyway (cautious weight decay, arXiv 2510.12402). AdamW is Loshchilov &
Hutter (arXiv 1711.05101).

All that changes from step to step reaches the arithmetic as tensors, and nothing of it is read back
on the host: on a GPU the step is compiled once and launched without waiting. Floor 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Polar Express: the best quintic of each of five iterations for singular values from 1e-3 to 1
# (their algorithm 1 with a safety factor of 1.02, cushion 0.02; tests/test_optim.py derives them).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_SAFETY = 1.01  # norms in bfloat16 are this inexact, and above 1 the iteration diverges
NORMUON_BETA2 = 0.9


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximately the nearest orthogonal matrix of each matrix: (..., R, C) -> (..., R, C)."""
    tall = x.size(-2) > x.size(-1)
    x = x.to(dtype)
    x = x.mT if tall else x  # the Gram matrix is then the smaller one
    # Frobenius norm 1 bounds the spectral norm by 1, where the iteration converges.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * POLAR_SAFETY).clamp(min=1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def neuron_dim(shape: torch.Size) -> int:
    """The dimension along which NorMuon averages: that of the shorter vectors' entries, so that a
    tall matrix has one second moment a row and a wide one one a column."""
    return -1 if shape[-2] >= shape[-1] else -2


def look_ahead(
    grads: list[Tensor], momenta: list[Tensor], momentum: Tensor, scale: Tensor
) -> Tensor:
    """Muon's first part, elementwise: takes gradients of one shape into their momenta, in place.
    Returns what to orthogonalise, stacked: Nesterov's look ahead."""
    alive = scale > 0
    grad = torch.where(alive, torch.stack(grads) * scale, 0.0)  # (n, R, C); 0 * NaN would be NaN
    buffer = torch.stack(momenta)
    buffer = buffer.lerp(grad, (1 - momentum) * alive)
    torch._foreach_copy_(momenta, list(buffer.unbind()))
    return grad.lerp(buffer, momentum)


def direction(x: Tensor, second: list[Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Muon's second part, of whole matrices (n, R, C): orthogonalised, and normalised by NorMuon's
    second moments, which are updated in place."""
    x = orthogonalize(x, dtype).to(x.dtype)
    # NorMuon: divide each neuron's part by its running root mean square, keep the matrix's norm.
    square = x.square().mean(neuron_dim(x.shape), keepdim=True)  # (n, R, 1) or (n, 1, C)
    moments = torch.stack(second).lerp(square, (1 - NORMUON_BETA2) * (scale > 0))
    inverse = moments.clamp(min=1e-10).rsqrt()
    kept = (square.sum((-2, -1), keepdim=True) / (square * inverse.square()).sum(
        (-2, -1), keepdim=True
    ).clamp(min=1e-10)).sqrt()  # fmt: skip
    torch._foreach_copy_(second, list(moments.unbind()))
    return x * (inverse * kept)


def move(
    params: list[Tensor], x: Tensor, lr: Tensor, decay: Tensor, scale: Tensor, stretch: float
) -> None:
    """Muon's third part, elementwise: weights go in the direction x, in place. `stretch` makes
    steps longer; `decay` is the share of the weights that goes, learning rate included."""
    alive = scale > 0
    weights = torch.stack(params)
    decayed = weights * (x * weights >= 0) * (decay * alive)
    torch._foreach_copy_(params, list((weights - lr * alive * stretch * x - decayed).unbind()))


def stretch_of(shape: torch.Size) -> float:
    """Tall matrices get longer steps, so that outputs move alike whatever the shape."""
    return max(1.0, shape[-2] / shape[-1]) ** 0.5


def muon_update(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    second: list[Tensor],
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> None:
    """One Muon step of matrices of one shape (R, C), in place.

    `scale` multiplies the gradients; where it is 0 nothing moves. `decay` as for move."""
    x = direction(look_ahead(grads, momenta, momentum, scale), second, scale, dtype)
    move(params, x, lr, decay, scale, stretch_of(params[0].shape))


def adamw_update(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    decay: Tensor,
    bias1: Tensor,
    bias2: Tensor,
    scale: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One AdamW step of a tensor of any shape, in place; bias1 and bias2 are 1 - beta**steps.

    `scale` and `decay` as for muon_update."""
    alive = scale > 0
    grad = torch.where(alive, grad * scale, 0.0)
    exp_avg.lerp_(grad, (1 - betas[0]) * alive)
    exp_avg_sq.lerp_(grad.square(), (1 - betas[1]) * alive)
    step = exp_avg / bias1 / (exp_avg_sq / bias2).sqrt().add(eps)
    p.sub_(p * (decay * alive)).sub_(step * (lr * alive))
