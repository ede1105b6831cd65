"""Sheared Gaussians from their parameters, and Adam, on the GPU: each in one pass over the Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from napari_innergs.cuda import _module

Saved = tuple[Tensor, ...]


@_module.guarded
def forward(
    shear: Tensor, log_through: Tensor, cholesky: Tensor, amplitude: Tensor, log_weight: Tensor
) -> tuple[Tensor, Tensor, Saved]:
    """Return covariances (N, 6), channels (N, C + 1) and what `backward` needs; all float32, contiguous."""
    count, channels = amplitude.shape
    covs, out = shear.new_empty((count, 6)), shear.new_empty((count, channels + 1))
    inputs = (shear, log_through, cholesky, amplitude, log_weight)
    arguments = (*inputs, channels, count, covs, out)
    _module.launch("shear", "shear_forward", count, arguments, device=shear.device)
    return covs, out, inputs


@_module.guarded
def backward(grad_covs: Tensor, grad_channels: Tensor, saved: Saved) -> tuple[Tensor, ...]:
    """Return the gradients of the five inputs."""
    grads = tuple(torch.empty_like(x) for x in saved)
    count, channels = saved[3].shape
    arguments = (*saved, grad_covs, grad_channels, channels, count, *grads)
    _module.launch("shear", "shear_backward", count, arguments, device=grad_covs.device)
    return grads


@_module.guarded
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
    count = value.numel()
    arguments = (value, gradient, first, second, beta1, beta2, rate, tiny, count)
    _module.launch("shear", "adam", count, arguments, device=value.device)
