"""Gaussians sampled at the centres of voxels, differentiable in torch."""

from __future__ import annotations

from torch import Tensor

from napari_innergs._constants import CUT_3D, EPSILON
from napari_innergs.operators import _dispatch

__all__ = ["voxelise", "voxelise_normalised"]


def voxelise(
    means: Tensor,
    covs: Tensor,
    amps: Tensor,
    shape: tuple[int, int, int],
    *,
    z_range: tuple[int, int] | None = None,
    cut: float = CUT_3D,
    backend: str = "auto",
) -> Tensor:
    """Sample the additive field of Gaussians at the centres of voxels.

    ``out[c, z, y, x] = sum_i amps[i, c] exp(-d^T S_i^-1 d / 2)`` with ``d = (z, y, x) - means[i]``, over the
    Gaussians whose squared Mahalanobis distance is at most ``cut``: the same field, with the same support, as
    :func:`napari_innergs.operators.slices.render_slices`.

    Parameters
    ----------
    means : Tensor, (N, 3)
        Centres in voxel indices (z, y, x); the centre of a voxel is at its integer index.
    covs : Tensor, (N, 6)
        Covariances in voxels squared, as [zz, zy, zx, yy, yx, xx]. A Gaussian that is not finite or whose
        covariance is not positive definite is left out and gets zero gradients.
    amps : Tensor, (N, C)
        Amplitudes; any sign.
    shape : tuple of int
        Voxels (Z, Y, X) of the whole volume.
    z_range : tuple of int, optional
        First plane and the one after the last, to make a large volume in slabs; all planes by default.
    cut : float
        Squared radius of the support in standard deviations. The default leaves out 0.1 % of the mass.
    backend : str
        "auto" (where the tensors are), "cpu", "cuda", "cuda:1" and so on, or "reference".

    Returns
    -------
    Tensor, (C, Z, Y, X)
        Of the type and on the device of ``means``; with ``z_range``, the planes of that range.

    Raises
    ------
    ValueError
        If shapes, types or values do not fit.
    RuntimeError
        If the backend cannot be used on this computer.

    Examples
    --------
    >>> import torch
    >>> means = torch.tensor([[3.0, 8.0, 8.0]])
    >>> covs = torch.tensor([[1.0, 0.0, 0.0, 4.0, 0.0, 4.0]])
    >>> volume = voxelise(means, covs, torch.ones(1, 1), (6, 16, 16))
    >>> tuple(volume.shape), round(float(volume[0, 4, 8, 8]), 3)
    ((1, 6, 16, 16), 0.607)
    """
    _dispatch.check_gaussians(means, covs, amps)
    depth, height, width = (int(s) for s in shape)
    if min(depth, height, width) < 1:
        raise ValueError(f"shape must be three numbers of voxels of at least one, not {tuple(shape)}.")
    start, stop = (0, depth) if z_range is None else (int(z) for z in z_range)
    if not 0 <= start < stop <= depth:
        raise ValueError(f"z_range must be inside the {depth} planes and not empty, not {z_range}.")
    block = (stop - start, height, width)
    cut = _dispatch.check_cut(cut)
    chosen = _dispatch.get_backend(backend, "voxels", means.device)
    return _dispatch.Sums.apply(chosen, (block, cut, start), means, covs, amps)


def voxelise_normalised(
    means: Tensor,
    covs: Tensor,
    amps: Tensor,
    log_weights: Tensor,
    shape: tuple[int, int, int],
    background: Tensor | float | None = None,
    eps: float = EPSILON,
    *,
    z_range: tuple[int, int] | None = None,
    cut: float = CUT_3D,
    backend: str = "auto",
) -> Tensor:
    """Sample the normalised field of Gaussians (kernel regression) at the centres of voxels.

    ``out = (sum_i w_i a_i g_i + eps b) / (sum_i w_i g_i + eps)`` with ``w = exp(log_weights)`` and ``g_i``
    the Gaussians of :func:`voxelise` (Nadaraya 1964, Watson 1964).

    Parameters
    ----------
    means, covs, amps, shape, z_range, cut, backend
        As in :func:`voxelise`; ``amps`` are values of the field here.
    log_weights : Tensor, (N,) or (N, 1)
        Logarithms of the weights.
    background : Tensor or float, optional
        Value where no Gaussian reaches, broadcast against the returned (C, Z, Y, X); zero by default.
    eps : float
        Weight of the background.

    Returns
    -------
    Tensor, (C, Z, Y, X)

    Raises
    ------
    ValueError
        If shapes, types or values do not fit.

    Examples
    --------
    >>> import torch
    >>> means = torch.tensor([[3.0, 8.0, 8.0]])
    >>> covs = torch.tensor([[4.0, 0.0, 0.0, 9.0, 0.0, 9.0]])
    >>> volume = voxelise_normalised(means, covs, torch.full((1, 1), 7.0), torch.zeros(1), (6, 16, 16), 7.0)
    >>> bool(((volume - 7).abs() < 1e-4).all())
    True
    """
    channels = _dispatch.normalised_channels(amps, log_weights)
    sums = voxelise(means, covs, channels, shape, z_range=z_range, cut=cut, backend=backend)
    return _dispatch.normalise(sums, 0, background, eps)
