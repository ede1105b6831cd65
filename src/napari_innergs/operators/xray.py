"""Radiographs of a continuous volume made of Gaussians, differentiable in torch.

Along the ray from the source ``p`` through the pixel at ``p + D`` the integral of a Gaussian with mean m and
precision P is known in closed form. With the ray through the mean scaled to reach the panel, ``m - p = s d``, the
offset (x, y) of the pixel from the projected mean, and ``A = d^T P d``:

    p(x, y) = |D| sqrt(2 pi / (A r)) exp(-(x, y) K (x, y)^T / (2 r))
    r = D^T P D / A = 1 + 2 g.(x, y) + (x, y) H (x, y)^T
    K = s^2 det P / A  [(d x u)^T S (d x u), ...; ...]

``K`` comes from cross products: nothing cancels in float32. ``r = 1`` and ``|D| = |d|`` give the affine
approximation (Zwicker et al., EWA volume splatting, 2001) of published splatting codes. The factor ``|D|`` belongs
to the pixel, not to the Gaussian, so the kernels leave it out and it is multiplied in afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from napari_innergs._constants import CUT_2D
from napari_innergs.operators import _dispatch
from napari_innergs.operators._dispatch import Backend

__all__ = ["panel_frames", "render_xray"]

#: A Gaussian whose support comes nearer to the plane through the source, parallel to the panel, than this share
#: of its depth is left out: its projection would have no end.
NEAR = 0.01
#: The least sine of the angles between u and v, and between the panel and its rays.
GRAZING = 1e-6


class _Xray(torch.autograd.Function):
    """Saves, calls and returns; the arithmetic is the backend's."""

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        covs: Tensor,
        amps: Tensor,
        frames: Tensor,
        cone: bool,
        exact: bool,
        size: tuple[int, int],
        cut: float,
        backend: Backend,
    ) -> Tensor:
        arrays = [backend.enter(x) for x in (means, covs, amps)]
        views: Any = frames.detach().to(backend.device).contiguous()
        if backend.name == "cpu":
            views = views.numpy()
        out, ctx.saved = backend.module.forward(*arrays, views, cone, exact, size, cut, NEAR)
        ctx.backend = backend
        # The backend shares their memory: torch raises if they are changed in place before backward.
        ctx.save_for_backward(means, covs, amps, frames)
        return backend.leave(out, means)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        grad = ctx.backend.enter(grad_out)
        grads = ctx.backend.module.backward(grad, ctx.saved, bool(ctx.needs_input_grad[3]))
        return (
            *(ctx.backend.leave(g, x) for g, x in zip(grads, inputs, strict=True)),
            None,
            None,
            None,
            None,
            None,
        )


def panel_frames(vectors: Tensor, kind: str) -> Tensor:
    """Return what the backends need of each view, differentiable in ``vectors``.

    Parameters
    ----------
    vectors : Tensor of float64, (n, 12)
        Source (cone) or ray direction (parallel), centre of pixel (0, 0), u, v; each (z, y, x).
    kind : str
        "cone" or "parallel".

    Returns
    -------
    Tensor of float64, (n, 20)
        Source or direction; u; v; normal (dotted with a vector from the source it gives 1 on the panel; zeros for
        parallel rays); the dual vectors of u and v, which give columns and rows; the column and row to take off.

    Raises
    ------
    ValueError
        If a panel has no area, or the rays lie in it.
    """
    p, corner, u, v = vectors.unflatten(1, (4, 3)).unbind(1)
    across = torch.linalg.cross(u, v)
    offset = corner - p if kind == "cone" else corner
    ray = offset if kind == "cone" else p
    volume = (across * ray).sum(1)
    with torch.no_grad():
        area, lengths = across.norm(dim=1), u.norm(dim=1) * v.norm(dim=1)
        good = (area > GRAZING * lengths) & (volume.abs() > GRAZING * area * ray.norm(dim=1))
    if not bool(good.all()):
        raise ValueError(
            f"vectors: view {int((~good).nonzero()[0])} has a panel without area or one that its rays run along; "
            "check u, v and the source."
        )
    if kind == "cone":
        area = (across * across).sum(1, keepdim=True)
        to_column = torch.linalg.cross(v, across) / area
        to_row = torch.linalg.cross(across, u) / area
        normal = across / volume[:, None]
    else:
        to_column = torch.linalg.cross(v, p) / volume[:, None]
        to_row = torch.linalg.cross(p, u) / volume[:, None]
        normal = torch.zeros_like(p)
    shift = torch.stack([(to_column * offset).sum(1), (to_row * offset).sum(1)], 1)
    return torch.cat([p, u, v, normal, to_column, to_row, shift], 1)


def pixel_distances(vectors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the distance of each pixel from the source, (n, rows, columns), differentiable in ``vectors``."""
    p, corner, u, v = vectors.unflatten(1, (4, 3)).unbind(1)
    rows, columns = (torch.arange(k, dtype=vectors.dtype, device=vectors.device) for k in size)
    start = corner - p

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1)[:, None, None]

    y, x = rows[:, None], columns[None]
    square = dot(start, start) + x * (2 * dot(start, u) + x * dot(u, u))
    square = square + y * (2 * dot(start, v) + 2 * x * dot(u, v) + y * dot(v, v))
    return torch.sqrt(square)


def render_xray(
    means: Tensor,
    covs: Tensor,
    amps: Tensor,
    vectors: Tensor,
    detector_shape: tuple[int, int],
    *,
    kind: str = "cone",
    exact: bool = True,
    cut: float = CUT_2D,
    backend: str = "auto",
) -> Tensor:
    """Render line integrals of the additive field of Gaussians on flat panels.

    ``out[k, c, row, col]`` is the integral of ``sum_i amps[i, c] exp(-d^T S_i^-1 d / 2)`` along the whole line
    through the pixel, over the Gaussians whose line comes within the squared Mahalanobis distance ``cut``. Exact
    for cone and parallel beam; the formula is at the top of this module.

    Parameters
    ----------
    means : Tensor, (N, 3)
        Centres (z, y, x), in the frame and unit of length of ``vectors``.
    covs : Tensor, (N, 6)
        Covariances as [zz, zy, zx, yy, yx, xx]. A Gaussian that is not finite, whose covariance is not positive
        definite, or whose support reaches the plane through the source parallel to the panel is left out (of the
        view concerned) and gets zero gradients.
    amps : Tensor, (N, C)
        Attenuation for each unit of length at the centres; any sign.
    vectors : Tensor, (n, 12)
        For each view the source (cone) or the direction of the rays (parallel), the centre of pixel (0, 0), the
        step u from column to column and the step v from row to row; each (z, y, x). Best in float64.
    detector_shape : tuple of int
        Rows and columns.
    kind : str
        "cone" or "parallel".
    exact : bool
        False takes the affine approximation for a cone beam, which published codes use: for comparison.
    cut : float
        Squared radius of the support in standard deviations. The default leaves out 0.1 % of a projection.
    backend : str
        "auto" (where ``means`` is), "cpu", "cuda", "cuda:1" and so on, or "reference".

    Returns
    -------
    Tensor, (n, C, rows, columns)
        Of the type and on the device of ``means``. Differentiable in ``means``, ``covs``, ``amps`` and
        ``vectors``; the gradient of an off-diagonal covariance counts both of its places in the matrix. The CPU
        backend computes in float32, with a geometry in float64, and gives the same bits each time.

    Raises
    ------
    ValueError
        If shapes, types or values do not fit.
    RuntimeError
        If the backend cannot be used on this computer.

    Examples
    --------
    >>> means, covs = torch.zeros(1, 3), torch.tensor([[4.0, 0.0, 0.0, 4.0, 0.0, 4.0]])
    >>> view = torch.tensor([[0.0, -50, 0, -2, 50, -2, 0, 0, 1, 1, 0, 0]])
    >>> image = render_xray(means, covs, torch.ones(1, 1), view, (5, 5))
    >>> round(float(image[0, 0, 2, 2]), 3)  # 2 sqrt(2 pi)
    5.013
    """
    _dispatch.check_gaussians(means, covs, amps)
    if kind not in ("cone", "parallel"):
        raise ValueError(f"kind: got {kind!r}, need 'cone' or 'parallel'.")
    if vectors.ndim != 2 or vectors.shape[1] != 12 or not vectors.is_floating_point():
        raise ValueError(
            f"vectors: got {vectors.dtype} of shape {tuple(vectors.shape)}, need floating point (n, 12)."
        )
    if not bool(torch.isfinite(vectors.detach()).all()):
        raise ValueError("vectors: some numbers are not finite; check the geometry.")
    rows, columns = (int(one) for one in detector_shape)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"detector_shape: got {tuple(detector_shape)}, need at least one row and one column."
        )
    cut = _dispatch.check_cut(cut)
    chosen = _dispatch.get_backend(backend, "xray", means.device)
    vectors = vectors.double()
    frames = panel_frames(vectors, kind)
    cone = kind == "cone"
    size = (rows, columns)
    out = _Xray.apply(means, covs, amps, frames, cone, bool(exact), size, cut, chosen)
    if cone and exact:
        out = out * pixel_distances(vectors, size).to(out)[:, None]
    return out
