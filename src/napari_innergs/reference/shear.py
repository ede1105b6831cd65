"""Sheared Gaussians from their parameters in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

Saved = tuple[Tensor, ...]


def _build(
    shear: Tensor, log_through: Tensor, cholesky: Tensor, amplitude: Tensor, log_weight: Tensor
) -> tuple[Tensor, Tensor]:
    tt = torch.exp(2 * log_through)
    l11, l21, l22 = torch.exp(cholesky[:, 0]), cholesky[:, 1], torch.exp(cholesky[:, 2])
    tr, tc = shear[:, 0] * tt, shear[:, 1] * tt
    rr = l11 * l11 + shear[:, 0] * tr
    rc = l11 * l21 + shear[:, 0] * tc
    cc = l21 * l21 + l22 * l22 + shear[:, 1] * tc
    weight = torch.exp(log_weight)[:, None]
    return torch.stack([tt, tr, tc, rr, rc, cc], 1), torch.cat([weight * amplitude, weight], 1)


def forward(
    shear: Tensor, log_through: Tensor, cholesky: Tensor, amplitude: Tensor, log_weight: Tensor
) -> tuple[Tensor, Tensor, Saved]:
    """Return covariances (N, 6), channels (N, C + 1) and what `backward` needs."""
    inputs = (shear, log_through, cholesky, amplitude, log_weight)
    with torch.no_grad():
        return *_build(*inputs), inputs


def backward(grad_covs: Tensor, grad_channels: Tensor, saved: Saved) -> tuple[Tensor, ...]:
    """Return the gradients of the five inputs, by automatic differentiation."""
    leaves = [x.detach().clone().requires_grad_() for x in saved]
    with torch.enable_grad():
        outputs = _build(*leaves)
    return torch.autograd.grad(outputs, leaves, (grad_covs, grad_channels))


def adam(
    value: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    beta1: float,
    beta2: float,
    rate: float,
    tiny: float,
) -> None:
    """Update flat tensors `value`, `first` and `second` in place by one step of Adam."""
    first.lerp_(gradient, 1 - beta1)
    second.lerp_(gradient * gradient, 1 - beta2)
    value.sub_(rate * first / (second.sqrt() + tiny))
