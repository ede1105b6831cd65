"""Photographs of Gaussians: sorted alpha compositing of their projections, differentiable in torch.

A Gaussian with mean m and covariance S, seen by a pinhole camera, is drawn as a 2D Gaussian about its projected mean
with covariance ``J R S R^T J^T``, where R turns the world into the camera and J is the derivative of the projection
at the mean (Zwicker et al., EWA volume splatting, 2001). From front to back, by the depth of the means,

    colour = sum_i c_i a_i T_i,   T_i = prod_{j < i} (1 - a_j),   a_i = min(o_i exp(-q_i / 2), MOST)

(Kerbl et al., 3D Gaussian splatting, 2023). ``a_i`` below LEAST counts as zero, and nothing is added to a pixel once
its T is below STOP. The 2D covariance is widened by DILATION; ``antialias`` takes the light that this adds away again
by the factor ``sqrt(det / det widened)`` (Yu et al., Mip-Splatting, 2024).

The projection is done in float64, by torch and its derivatives; on the CPU the backend does it and the spherical
harmonics in closed form. What is drawn is six numbers for each Gaussian, with which
``q = ixx x^2 + pyy (y + slope x)^2`` is a sum of squares and nothing cancels in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from napari_innergs.operators import _dispatch
from napari_innergs.operators._dispatch import Backend
from napari_innergs.reference.slices import usable

__all__ = ["evaluate_harmonics", "render_rgb"]

#: An opacity at a pixel that is below this counts as zero.
LEAST = 1 / 255
#: The greatest opacity of one Gaussian at a pixel.
MOST = 0.99
#: A pixel to which less than this share of light comes through is finished.
STOP = 1e-4
#: What is added to both variances of a projection, in pixels squared.
DILATION = 0.3
#: A Gaussian whose support comes nearer to the plane through the camera than this share of its depth is left out.
NEAR = 0.01
#: Directions further outside the image than this share of its size count as that far where J is taken.
MARGIN = 0.3

# What the polynomials of the unit vector in `evaluate_harmonics` are multiplied by, which makes them the real
# spherical harmonics: roots of numbers over pi.
_SQUARES = [1 / 4, *[3 / 4] * 3, 15 / 4, 15 / 4, 5 / 16, 15 / 4, 15 / 16]
_SQUARES += [35 / 32, 105 / 4, 21 / 32, 7 / 16, 21 / 32, 105 / 16, 35 / 32]
_SIGNS = [1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1]
_FACTORS = [sign * math.sqrt(x / math.pi) for sign, x in zip(_SIGNS, _SQUARES, strict=True)]


class _Rgb(torch.autograd.Function):
    """Saves, calls and returns; the arithmetic is the backend's."""

    @staticmethod
    def forward(
        ctx: Any, splats: Tensor, colours: Tensor, depths: Tensor, size: tuple[int, int], backend: Backend
    ) -> Tensor:
        arrays = [backend.enter(x) for x in (splats, colours, depths)]
        out, ctx.saved = backend.module.forward(*arrays, size, (LEAST, MOST, STOP))
        ctx.backend = backend
        # The backend shares their memory: torch raises if they are changed in place before backward.
        ctx.save_for_backward(splats, colours)
        return backend.leave(out, colours)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        splats, colours = ctx.saved_tensors
        d_splats, d_colours = ctx.backend.module.backward(ctx.backend.enter(grad_out), ctx.saved)
        return ctx.backend.leave(d_splats, splats), ctx.backend.leave(d_colours, colours), None, None, None


class _Project(torch.autograd.Function):
    """The projection of a backend that has one of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        covs: Tensor,
        opacities: Tensor,
        camera: Tensor,
        edges: Tensor,
        antialias: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        arrays = [backend.enter(x) for x in (means, covs, opacities)]
        lens = [x.detach().numpy() for x in (camera, edges)]
        rules = (-2 * math.log(LEAST), NEAR, DILATION)
        splats, depths, ctx.saved = backend.module.project(*arrays, *lens, rules, antialias)
        ctx.backend = backend
        ctx.save_for_backward(means, covs, opacities, camera)
        return torch.from_numpy(splats), torch.from_numpy(depths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_splats: Tensor, d_depths: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        arrays = [ctx.backend.enter(x) for x in (d_splats, d_depths)]
        grads = ctx.backend.module.project_backward(*arrays, ctx.saved, bool(ctx.needs_input_grad[3]))
        return (*(ctx.backend.leave(g, x) for g, x in zip(grads, inputs, strict=True)), None, None, None)


class _Shade(torch.autograd.Function):
    """Spherical harmonics of a backend that has its own."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, directions: Tensor, backend: Backend) -> Tensor:
        factors = torch.tensor(_FACTORS, dtype=torch.float64).numpy()
        arrays = [backend.enter(x) for x in (coefficients, directions)]
        out, ctx.saved = backend.module.shade(*arrays, factors)
        ctx.backend = backend
        ctx.save_for_backward(coefficients, directions)
        return backend.leave(out, directions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.backend.module.shade_backward(ctx.backend.enter(grad), ctx.saved)
        return (*(ctx.backend.leave(g, x) for g, x in zip(grads, ctx.saved_tensors, strict=True)), None)


def evaluate_harmonics(coefficients: Tensor, directions: Tensor) -> Tensor:
    """Return colours seen along directions: half plus a sum of real spherical harmonics, never below zero.

    Parameters
    ----------
    coefficients : Tensor, (N, K, 3)
        K = 1, 4, 9 or 16 coefficients of each colour, by degree, then from -degree to degree; the signs are those of
        splat files (degree 1: -y, z, -x).
    directions : Tensor, (N, 3)
        From the camera to the Gaussians, in world coordinates (z, y, x); need not be of unit length.

    Returns
    -------
    Tensor, (N, 3)
        Differentiable in both.
    """
    terms = coefficients.shape[1]
    z, y, x = torch.nn.functional.normalize(directions, dim=1).to(coefficients).unbind(1)
    xx, yy, zz = x * x, y * y, z * z
    basis = [torch.ones_like(x)]
    if terms > 1:
        basis += [y, z, x]
    if terms > 4:
        basis += [x * y, y * z, 3 * zz - 1, x * z, xx - yy]
    if terms > 9:
        basis += [y * (3 * xx - yy), x * y * z, y * (5 * zz - 1), z * (5 * zz - 3), x * (5 * zz - 1)]
        basis += [z * (xx - yy), x * (xx - 3 * yy)]
    values = torch.stack([c * b for c, b in zip(_FACTORS, basis, strict=False)], 1)
    return ((values[:, :, None] * coefficients).sum(1) + 0.5).clamp_min(0)


def _edges(intrinsics: Tensor, size: tuple[int, int]) -> list[float]:
    """Return the least and greatest x / z, then y / z, at which J is taken."""
    lens = intrinsics.detach().cpu()
    return [
        x
        for n, centre, focal in ((size[1], lens[0, 2], lens[0, 0]), (size[0], lens[1, 2], lens[1, 1]))
        for x in sorted(float((end - centre) / focal) for end in (-MARGIN * n, (1 + MARGIN) * n))
    ]


def project_splats(
    means: Tensor,
    covs: Tensor,
    opacities: Tensor,
    world_to_camera: Tensor,
    intrinsics: Tensor,
    size: tuple[int, int],
    antialias: bool,
) -> tuple[Tensor, Tensor]:
    """Return what the backends draw, (N, 6), and the depths, (N,), both float64.

    The six numbers: column; row; 1 / C_cc; -C_cr / C_cc; C_cc / det C; opacity, with C the widened 2D covariance. The
    opacity is zero where a Gaussian is left out.
    """
    good = usable(means, covs) & torch.isfinite(opacities.detach())
    means = torch.where(good[:, None], means.double(), 0.0)
    covs = torch.where(good[:, None], covs.double(), means.new_tensor([1.0, 0, 0, 1, 0, 1]))
    turn, shift = world_to_camera[:3, :3], world_to_camera[:3, 3]
    points = means @ turn.T + shift
    # R S R^T for the two triangles: a linear map of the six numbers.
    i, j = torch.triu_indices(3, 3, device=means.device)
    left, right = turn[i], turn[j]
    pairs = left[:, i] * right[:, j]
    spread = covs @ torch.where(i == j, pairs, pairs + left[:, j] * right[:, i]).T
    with torch.no_grad():
        depth = points[:, 2]
        cut = -2 * math.log(LEAST)
        good = good & (depth - torch.sqrt(cut * spread[:, 5].clamp_min(0)) > NEAR * depth)
    xx, xy, xz, yy, yz, zz = spread.unbind(1)
    x, y, z = torch.where(good[:, None], points, points.new_tensor([0.0, 0, 1])).unbind(1)
    (fx, skew, cx), (_, fy, cy) = intrinsics[0].unbind(), intrinsics[1].unbind()
    inverse = 1 / z
    a, b = x * inverse, y * inverse
    columns, rows = fx * a + skew * b + cx, fy * b + cy
    edges = _edges(intrinsics, size)
    a, b = a.clamp(*edges[:2]), b.clamp(*edges[2:])
    # The covariance of (x / z, y / z), then of pixels.
    square = inverse * inverse
    zb, za = yz - b * zz, xz - a * zz
    aa = square * (xx - a * (xz + za))
    ab = square * (xy - a * yz - b * za)
    bb = square * (yy - b * (yz + zb))
    cc0 = fx * fx * aa + 2 * fx * skew * ab + skew * skew * bb
    cr = fy * (fx * ab + skew * bb)
    rr0 = fy * fy * bb
    cc, rr = cc0 + DILATION, rr0 + DILATION
    det = cc * rr - cr * cr
    seen = torch.where(good, opacities.double(), 0.0)
    if antialias:
        seen = seen * torch.sqrt(((cc0 * rr0 - cr * cr) / det).clamp_min(1e-12))
    splats = torch.stack([columns, rows, 1 / cc, -cr / cc, cc / det, seen], 1)
    return splats, z


def _check(
    means: Tensor,
    covs: Tensor,
    opacities: Tensor,
    colours: Tensor,
    world_to_camera: Tensor,
    intrinsics: Tensor,
    size: Sequence[int],
) -> None:
    n = len(means) if means.ndim else 0
    _dispatch.check_gaussians(means, covs, opacities[:, None] if opacities.ndim == 1 else opacities)
    if opacities.shape != (n,):
        raise ValueError(f"opacities must have shape ({n},) to match means, not {tuple(opacities.shape)}.")
    harmonic = colours.ndim == 3 and colours.shape[1] in (1, 4, 9, 16)
    if not (colours.ndim == 2 or harmonic) or colours.shape[0] != n or colours.shape[-1] != 3:
        raise ValueError(
            f"colours must have shape ({n}, 3), or ({n}, K, 3) with K = 1, 4, 9 or 16 coefficients of spherical "
            f"harmonics, not {tuple(colours.shape)}."
        )
    if not colours.is_floating_point():
        raise ValueError(f"colours must be floating point, not {colours.dtype}.")
    for name, matrix, k in (("world_to_camera", world_to_camera, 4), ("intrinsics", intrinsics, 3)):
        if matrix.shape != (k, k) or not matrix.is_floating_point():
            raise ValueError(
                f"{name}: got {matrix.dtype} of shape {tuple(matrix.shape)}, need floating point ({k}, {k})."
            )
        if not bool(torch.isfinite(matrix.detach()).all()):
            raise ValueError(f"{name}: some numbers are not finite; check the camera.")
    if not bool((intrinsics.detach().diagonal()[:2].abs() > 0).all()):
        raise ValueError("intrinsics: a focal length is zero; check the camera.")
    if len(size) != 2 or min(size) < 1 or max(size) > 1 << 15:
        raise ValueError(f"size: got {tuple(size)}, need rows and columns from 1 to {1 << 15}.")


def render_rgb(
    means: Tensor,
    covs: Tensor,
    opacities: Tensor,
    colours: Tensor,
    world_to_camera: Tensor,
    intrinsics: Tensor,
    size: Sequence[int],
    *,
    background: Tensor | Sequence[float] | float = 0.0,
    backend: str = "auto",
    antialias: bool = True,
    depth: bool = False,
    shifts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Render a photograph of Gaussians.

    Gaussians are drawn from front to back by the depth of their means; the formulas are at the top of this module.

    Parameters
    ----------
    means : Tensor, (N, 3)
        Centres (z, y, x), in the world of the camera.
    covs : Tensor, (N, 6)
        Covariances as [zz, zy, zx, yy, yx, xx]. A Gaussian that is not finite, whose covariance is not positive
        definite, which is behind the camera or so near that its support reaches the plane through it is left out and
        gets zero gradients.
    opacities : Tensor, (N,)
        Opacity at the centres, 0 to 1.
    colours : Tensor, (N, 3) or (N, K, 3)
        Colours, or coefficients of spherical harmonics: see :func:`evaluate_harmonics`.
    world_to_camera : Tensor, (4, 4)
        Takes (z, y, x, 1) of the world to (x right, y down, z forward, 1) of the camera. Best in float64.
    intrinsics : Tensor, (3, 3)
        Takes camera coordinates to (column, row, 1), in pixels whose centres are at integers.
    size : sequence of int
        Rows and columns.
    background : Tensor, sequence or float
        Colour behind everything.
    backend : str
        "auto" (where ``means`` is), "cpu", "cuda", "cuda:1" and so on, or "reference".
    antialias : bool
        Whether a Gaussian smaller than a pixel is made fainter as it is widened to be seen, which keeps its light.
    depth : bool
        Whether to return the expected depth too.
    shifts : Tensor, (N, 2), optional
        Added to the projected means, as (row, column) in pixels. Zeros whose gradient is wanted tell how far a
        Gaussian wants to move in the image.

    Returns
    -------
    image : Tensor, (rows, columns, 3)
        Of the type and on the device of ``means``.
    alpha : Tensor, (rows, columns)
        Opacity of the sum of all Gaussians, 0 to 1.
    depth : Tensor, (rows, columns)
        Only if asked for: mean depth of what is seen (the coordinate along the axis of the camera), zero where there
        is nothing. All are differentiable in all tensors; the gradient of an off-diagonal covariance counts both of
        its places in the matrix. The CPU backend gives the same bits each time.

    Raises
    ------
    ValueError
        If shapes, types or values do not fit.
    RuntimeError
        If the backend cannot be used on this computer.

    Examples
    --------
    >>> means, covs = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0, 1.0]])
    >>> pose = torch.tensor([[0.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 10], [0, 0, 0, 1]])
    >>> lens = torch.tensor([[20.0, 0, 4], [0, 20, 4], [0, 0, 1]])
    >>> red = torch.tensor([[1.0, 0, 0]])
    >>> image, alpha = render_rgb(means, covs, torch.tensor([0.5]), red, pose, lens, (9, 9), antialias=False)
    >>> round(float(image[4, 4, 0]), 3), round(float(alpha[4, 4]), 3)
    (0.5, 0.5)
    """
    _check(means, covs, opacities, colours, world_to_camera, intrinsics, size)
    if shifts is not None and shifts.shape != (len(means), 2):
        raise ValueError(f"shifts must have shape ({len(means)}, 2), not {tuple(shifts.shape)}.")
    behind = torch.as_tensor(background).to(means)
    if behind.shape not in ((), (3,)):
        raise ValueError(f"background: got shape {tuple(behind.shape)}, need one number or three.")
    chosen = _dispatch.get_backend(backend, "rgb", means.device)
    rows, columns = (int(one) for one in size)
    pose, lens = (x.to(means.device, torch.float64) for x in (world_to_camera, intrinsics))
    # The sum is not finite if a number is not; should it overflow, nothing is lost but time.
    if not bool(torch.isfinite(colours.detach().sum() + means.detach().sum())):
        known = torch.isfinite(colours.detach()).flatten(1).all(1) & torch.isfinite(means.detach()).all(1)
        opacities = torch.where(known, opacities, 0.0)
        colours = torch.where(known.reshape(-1, *[1] * (colours.ndim - 1)), colours, 0.0)
        means = torch.where(known[:, None], means, 0.0)
    if colours.ndim == 3:
        centre = -torch.linalg.solve(pose[:3, :3], pose[:3, 3])
        directions = means - centre.to(means)
        if chosen.name == "cpu":
            colours = _Shade.apply(colours, directions, chosen)
        else:
            colours = evaluate_harmonics(colours, directions)
    colours = colours.to(means)
    if chosen.name == "cpu":
        camera = torch.cat([pose[:3, :3].reshape(-1), pose[:3, 3], lens[0], lens[1, 1:]])
        edges = torch.tensor(_edges(lens, (rows, columns)), dtype=torch.float64)
        splats, depths = _Project.apply(means, covs, opacities, camera, edges, bool(antialias), chosen)
    else:
        splats, depths = project_splats(means, covs, opacities, pose, lens, (rows, columns), bool(antialias))
    if shifts is not None:
        splats = splats + torch.nn.functional.pad(shifts.flip(1).to(splats), (0, 4))
    if depth:
        colours = torch.cat([colours, depths[:, None].to(colours)], 1)
    out = _Rgb.apply(splats, colours, depths.detach().float(), (rows, columns), chosen)
    image, *more = out.split([3, *[1] * (len(out) - 3)])
    alpha = more[-1].squeeze(0).clone()  # backward uses `out`, which a caller must not change
    image = image.permute(1, 2, 0) + (1 - alpha)[..., None] * behind
    if not depth:
        return image, alpha
    return image, alpha, more[0].squeeze(0) / alpha.clamp_min(LEAST)
