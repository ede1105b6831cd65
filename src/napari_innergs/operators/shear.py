"""Sheared Gaussians: the parameters that are fitted to slices, and what the renderers take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from napari_innergs.operators import _dispatch
from napari_innergs.operators._dispatch import Backend


class _Shear(torch.autograd.Function):
    """Saves, calls and returns; the arithmetic is the backend's."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        covs, channels, ctx.saved = backend.module.forward(*(backend.enter(x) for x in inputs))
        ctx.backend = backend
        ctx.save_for_backward(*inputs)
        return backend.leave(covs, inputs[0]), backend.leave(channels, inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_covs: Tensor, grad_channels: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        grads = ctx.backend.module.backward(
            *(ctx.backend.enter(g) for g in (grad_covs, grad_channels)), ctx.saved
        )
        return None, *(ctx.backend.leave(g, x) for g, x in zip(grads, inputs, strict=True))


def sheared_gaussians(
    shear: Tensor,
    log_through: Tensor,
    cholesky: Tensor,
    amplitude: Tensor,
    log_weight: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the covariances and channels of Gaussians given by shear and in-plane shape.

    With k the shear, s the through-plane standard deviation and L the Cholesky factor of the in-plane covariance
    at fixed t, the blocks of the covariance are S_tt = s^2, S_ut = s^2 k and S_uu = L L^T + s^2 k k^T (the Schur
    complement of S_tt is L L^T).

    Parameters
    ----------
    shear : Tensor, (N, 2)
        In-plane displacement (row, column) per unit of t.
    log_through : Tensor, (N,)
        log s.
    cholesky : Tensor, (N, 3)
        (log l11, l21, log l22).
    amplitude : Tensor, (N, C)
        Values a.
    log_weight : Tensor, (N,)
        log w.
    backend : str
        "auto", "cpu", "cuda" or "reference".

    Returns
    -------
    covs : Tensor, (N, 6)
        [tt, tr, tc, rr, rc, cc].
    channels : Tensor, (N, C + 1)
        (w a, w), whose rendered sums give the normalised field.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> n = torch.zeros(1)
    >>> covs, channels = sheared_gaussians(torch.tensor([[2.0, 0.0]]), n, torch.zeros(1, 3), torch.ones(1, 1), n)
    >>> covs.tolist()
    [[1.0, 2.0, 0.0, 5.0, 0.0, 1.0]]
    """
    n = len(shear)
    wanted = {"shear": (n, 2), "log_through": (n,), "cholesky": (n, 3), "log_weight": (n,)}
    given = {"shear": shear, "log_through": log_through, "cholesky": cholesky, "log_weight": log_weight}
    for name, shape in wanted.items():
        if tuple(given[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(given[name].shape)}.")
    if amplitude.ndim != 2 or len(amplitude) != n:
        raise ValueError(f"amplitude must have shape ({n}, C), not {tuple(amplitude.shape)}.")
    chosen = _dispatch.get_backend(backend, "shear", shear.device)
    return _Shear.apply(chosen, shear, log_through, cholesky, amplitude, log_weight)


class Adam:
    """Adam (Kingma and Ba 2015) over named tensors with a rate each, able to follow added and removed rows.

    Parameters
    ----------
    beta1, beta2 : float
        Decay of the first and second moments.
    backend : str
        "auto", "cpu", "cuda" or "reference".
    """

    TINY = 1e-12

    def __init__(self, beta1: float = 0.9, beta2: float = 0.99, backend: str = "auto") -> None:
        self.beta1, self.beta2, self.count = beta1, beta2, 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.backend = backend

    @torch.no_grad()
    def step(self, tensors: dict[str, Tensor], rates: dict[str, float]) -> None:
        """Move each tensor along its gradient and forget the gradient."""
        self.count += 1
        correct = (1 - self.beta2**self.count) ** 0.5 / (1 - self.beta1**self.count)
        for name, value in tensors.items():
            gradient = value.grad
            if gradient is None:
                continue
            if name not in self.moments:
                self.moments[name] = torch.zeros_like(value), torch.zeros_like(value)
            backend = _dispatch.get_backend(self.backend, "shear", value.device)
            state = (value, gradient, *self.moments[name])
            arrays = [backend.enter(x).reshape(-1) for x in state]
            backend.module.adam(*arrays, self.beta1, self.beta2, rates[name] * correct, self.TINY)
            if backend.device != value.device:  # what was updated is a copy
                for tensor, array in zip(state, arrays, strict=True):
                    if tensor is not gradient:
                        tensor.copy_(backend.leave(array, tensor).view_as(tensor))
            value.grad = None

    def rearrange(self, keep: Tensor, added: int) -> None:
        """Follow a selection of rows and rows added at the end."""
        for name, (first, second) in self.moments.items():
            new = [torch.cat([m[keep], m.new_zeros(added, *m.shape[1:])]) for m in (first, second)]
            self.moments[name] = new[0], new[1]
