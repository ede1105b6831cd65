"""Slices through a continuous volume made of Gaussians, differentiable in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from napari_innergs._constants import CUT_3D, EPSILON
from napari_innergs.operators import _dispatch
from napari_innergs.operators._dispatch import morton_order

__all__ = ["morton_order", "render_normalised", "render_slices"]


def render_slices(
    means: Tensor,
    covs: Tensor,
    amps: Tensor,
    positions: Tensor | Sequence[float],
    size: tuple[int, int],
    *,
    cut: float = CUT_3D,
    backend: str = "auto",
) -> Tensor:
    """Render the additive field of Gaussians on parallel slices.

    ``out[m, c, y, x] = sum_i amps[i, c] exp(-d^T S_i^-1 d / 2)`` with ``d = (positions[m], y, x) -
    means[i]``, over the Gaussians whose squared Mahalanobis distance ``d^T S_i^-1 d`` is at most ``cut``.
    This is the exact cut through the 3D Gaussians: a 2D Gaussian from the Schur complement times its peak
    along the normal (InnerGS, arXiv:2508.13287).

    Parameters
    ----------
    means : Tensor, (N, 3)
        Centres in the stack's own frame: position along the slice normal (any unit), row and column (pixels;
        the centre of a pixel is at its integer index).
    covs : Tensor, (N, 6)
        Covariances in the same frame and units, as [tt, tr, tc, rr, rc, cc]. A Gaussian that is not finite or
        whose covariance is not positive definite is left out and gets zero gradients.
    amps : Tensor, (N, C)
        Amplitudes; any sign.
    positions : Tensor or sequence of float, (M,)
        Positions of the slices along the normal, in the unit of ``means[:, 0]``, in any order and spacing.
        No gradient flows to them: move the Gaussians instead.
    size : tuple of int
        Height and width of the slices in pixels.
    cut : float
        Squared radius of the support in standard deviations. The default leaves out 0.1 % of the mass.
    backend : str
        "auto" (where the tensors are), "cpu", "cuda", "cuda:1" and so on, or "reference".

    Returns
    -------
    Tensor, (M, C, H, W)
        Of the type and on the device of ``means``. The gradient of an off-diagonal covariance counts both of
        its places in the matrix. The CPU backend computes in float32 and gives the same bits each time.

    Raises
    ------
    ValueError
        If shapes, types or values do not fit.
    RuntimeError
        If the backend cannot be used on this computer.

    Examples
    --------
    >>> means = torch.tensor([[0.0, 8.0, 8.0]])
    >>> covs = torch.tensor([[4.0, 0.0, 0.0, 4.0, 0.0, 4.0]])
    >>> image = render_slices(means, covs, torch.ones(1, 1), [0.0, 2.0], (16, 16))
    >>> [round(float(one), 3) for one in image[:, 0, 8, 8]]
    [1.0, 0.607]
    """
    _dispatch.check_gaussians(means, covs, amps)
    positions = torch.as_tensor(positions, dtype=means.dtype, device=means.device).detach()
    if positions.ndim != 1 or not bool(torch.isfinite(positions).all()):
        raise ValueError("positions must be a list of finite numbers.")
    height, width = (int(s) for s in size)
    if height < 1 or width < 1:
        raise ValueError(f"size must be a height and a width of at least one pixel, not {tuple(size)}.")
    chosen = _dispatch.get_backend(backend, "slices", means.device)
    cut = _dispatch.check_cut(cut)
    in_order = len(positions) < 2 or bool((positions[1:] >= positions[:-1]).all())
    ascending, order = (positions, None) if in_order else torch.sort(positions)
    arguments = (chosen.enter(ascending), height, width, cut)
    images = _dispatch.Sums.apply(chosen, arguments, means, covs, amps)
    return images if order is None else images[torch.argsort(order)]


def render_normalised(
    means: Tensor,
    covs: Tensor,
    amps: Tensor,
    log_weights: Tensor,
    positions: Tensor | Sequence[float],
    size: tuple[int, int],
    background: Tensor | float | None = None,
    eps: float = EPSILON,
    *,
    cut: float = CUT_3D,
    backend: str = "auto",
) -> Tensor:
    """Render the normalised field of Gaussians (kernel regression) on parallel slices.

    ``out = (sum_i w_i a_i g_i + eps b) / (sum_i w_i g_i + eps)`` with ``w = exp(log_weights)`` and ``g_i``
    the Gaussians of :func:`render_slices` (Nadaraya 1964, Watson 1964). Flat regions stay flat however the
    Gaussians lie.

    Parameters
    ----------
    means, covs, amps, positions, size, cut, backend
        As in :func:`render_slices`; ``amps`` are values of the field here.
    log_weights : Tensor, (N,) or (N, 1)
        Logarithms of the weights.
    background : Tensor or float, optional
        Value where no Gaussian reaches, broadcast against (M, C, H, W); zero by default.
    eps : float
        Weight of the background.

    Returns
    -------
    Tensor, (M, C, H, W)

    Raises
    ------
    ValueError
        If shapes, types or values do not fit.

    Examples
    --------
    >>> means = torch.tensor([[0.0, 4.0, 4.0], [0.0, 9.0, 11.0]])
    >>> covs = torch.tensor([[9.0, 0.0, 0.0, 9.0, 0.0, 9.0]]).repeat(2, 1)
    >>> image = render_normalised(means, covs, torch.full((2, 1), 5.0), torch.zeros(2), [0.0], (16, 16), 5.0)
    >>> bool(((image - 5).abs() < 1e-4).all())
    True
    """
    channels = _dispatch.normalised_channels(amps, log_weights)
    sums = render_slices(means, covs, channels, positions, size, cut=cut, backend=backend)
    return _dispatch.normalise(sums, 1, background, eps)
