"""Slices through a sum of Gaussians on the GPU."""

from __future__ import annotations

from torch import Tensor

from napari_innergs.cuda import _module, _planes


@_module.guarded
def forward(
    means: Tensor, covs: Tensor, amps: Tensor, t: Tensor, height: int, width: int, cut: float
) -> tuple[Tensor, _planes.Prepared]:
    """Render slices; see :func:`napari_innergs.operators.slices.render_slices` for the formula.

    Parameters
    ----------
    means, covs, amps : Tensor of float32, (N, 3), (N, 6), (N, C)
        Contiguous, on one CUDA device. The frame is (t, row, column), the covariances are
        [tt, tr, tc, rr, rc, cc].
    t : Tensor of float32, (M,)
        Positions of the slices, ascending.
    height, width : int
        Pixels.
    cut : float
        Squared Mahalanobis radius of the support.

    Returns
    -------
    out : Tensor of float32, (M, C, H, W)
    saved : Prepared
        What :func:`backward` needs.
    """
    prepared = _planes.prepare(means, covs, amps, t, height, width, cut)
    return _planes.forward(prepared, 1), prepared


@_module.guarded
def backward(grad_out: Tensor, saved: _planes.Prepared) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of means, covariances and amplitudes for ``grad_out`` (M, C, H, W)."""
    return _planes.backward(saved, grad_out, 1)
