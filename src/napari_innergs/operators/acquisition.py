"""Slices of a volume as a scanner takes them: slice profile, size of the pixels, motion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtr
from torch import Tensor
from torch.autograd.function import once_differentiable

from napari_innergs.cpu import acquisition as kernels
from napari_innergs.data import SliceStack
from napari_innergs.geometry.grid import Grid
from napari_innergs.operators.linear import LinearOperator

# Full width at half maximum in standard deviations of a Gaussian.
FWHM = 2 * np.sqrt(2 * np.log(2))
# Half-width at which a Gaussian profile is cut, in full widths at half maximum (3.5 standard deviations).
_REACH = 1.5
# Pixels larger than this in voxels are averages of several samples.
_LARGE_PIXEL = 1.25
_NEAR = 0.02


class SliceAcquisition:
    """The linear map from a volume to the slices of a stack, and its exact transpose.

    A pixel is the volume's average over the slice profile along the normal, and over the pixel's area where
    pixels are larger than voxels. Profile and area are integrated over voxels, as if the volume were constant in
    each; with a box of whole voxels that lie on the grid, a pixel is exactly the mean of its voxels.

    Parameters
    ----------
    stack : SliceStack
        Where the slices are, with thickness and profile.
    grid : Grid
        Where the volume is.
    transforms : array_like (n, 4, 4) or None
        Rigid motion of each slice in the world: the slice was taken where the transform puts it.
    thickness : float or None
        Replaces the stack's own, world units.

    Examples
    --------
    >>> stack = SliceStack(np.zeros((2, 4, 4), np.float32), np.diag([2.0, 1, 1, 1]), thickness=2, profile="box")
    >>> grid = Grid((4, 4, 4), [[1, 0, 0, -0.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    >>> volume = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    >>> SliceAcquisition(stack, grid).apply(volume)[1, 0, 0]  # the mean of 32 and 48
    np.float32(40.0)
    """

    def __init__(
        self,
        stack: SliceStack,
        grid: Grid,
        transforms: ArrayLike | None = None,
        thickness: float | None = None,
    ) -> None:
        frame = stack.frame_affine
        world = np.zeros((stack.n_slices, 4, 4))
        world[:, 0, :3] = frame[:3, 3] + stack.positions[:, None] * frame[:3, 0]
        world[:, 1, :3] = stack.normal
        world[:, 2, :3], world[:, 3, :3] = frame[:3, 1], frame[:3, 2]
        world[:, 0, 3] = 1  # a place, the others are directions
        if transforms is not None:
            world = world @ np.asarray(transforms, np.float64).swapaxes(1, 2)
        self.profile = stack.profile
        self.thickness = stack.thickness if thickness is None else float(thickness)
        self._place(world, grid, (stack.height, stack.width))

    def _place(self, world: np.ndarray, grid: Grid, size: tuple[int, int]) -> None:
        self.world, self.grid, self._size = world, grid, size
        self.domain_shape = grid.shape
        self.range_shape = (len(world), *size)
        self.vectors = np.ascontiguousarray((world @ grid.inverse_affine.T)[..., :3])
        self.offsets, self.weights = self._samples(self.thickness)

    def part(self, grid: Grid, slices: np.ndarray, rows: slice, columns: slice) -> SliceAcquisition:
        """Return the same for another grid and some of the pixels.

        Parameters
        ----------
        grid : Grid
            Where the volume is.
        slices : ndarray of int
            Which slices.
        rows, columns : slice
            Windows with start and stop.
        """
        out = object.__new__(SliceAcquisition)
        out.profile, out.thickness = self.profile, self.thickness
        world = self.world[slices].copy()
        world[:, 0] += rows.start * world[:, 2] + columns.start * world[:, 3]
        out._place(world, grid, (rows.stop - rows.start, columns.stop - columns.start))
        return out

    def _samples(self, thickness: float) -> tuple[np.ndarray, np.ndarray]:
        normal = self.vectors[0, 1]
        voxel = 1 / float(np.linalg.norm(normal))
        axis = int(np.abs(normal).argmax())
        shift = 0.0
        # a profile thinner than a voxel would move with the planes
        if thickness >= voxel and abs(abs(normal[axis]) * voxel - 1) < 1e-6:
            # sub-slices on the grid's own planes, where all slices lie alike between them
            place = self.vectors[:, 0, axis]
            turned = np.exp(2j * np.pi * place).mean()
            if abs(turned) > np.cos(2 * np.pi * _NEAR):
                shift = -float(np.angle(turned)) / (2 * np.pi) * voxel * np.sign(normal[axis])
        depth, share = _profile(thickness, self.profile, voxel, shift)
        parts = [(depth, share)]
        for direction in (self.vectors[0, 2], self.vectors[0, 3]):
            size = float(np.linalg.norm(direction))
            count = round(size) if size > _LARGE_PIXEL else 1
            parts.append(((np.arange(count) - (count - 1) / 2) / count, np.full(count, 1 / count)))
        offsets = np.stack(np.meshgrid(*(at for at, _ in parts), indexing="ij"), -1).reshape(-1, 3)
        weights = np.einsum("i,j,k->ijk", *(share for _, share in parts)).ravel()
        return np.ascontiguousarray(offsets), weights.astype(np.float32)

    def apply(self, volume: np.ndarray) -> np.ndarray:
        """Return the slices (n, h, w) of a volume (Z, Y, X), float32."""
        volume = np.ascontiguousarray(volume, np.float32)
        return kernels.forward(volume, self.vectors, self.offsets, self.weights, self._size)

    def adjoint(self, data: np.ndarray) -> np.ndarray:
        """Return the transpose applied to slices (n, h, w): a volume (Z, Y, X), float32."""
        data = np.ascontiguousarray(data, np.float32)
        return kernels.adjoint(data, self.vectors, self.offsets, self.weights, self.grid.shape)

    def inside(self, whole: ArrayLike = False) -> np.ndarray:
        """Return which pixels have their centre, or their whole profile, inside the grid, (n, h, w).

        Parameters
        ----------
        whole : bool or array_like (3, 2) of bool
            Whether the whole profile counts: everywhere, or at the first and last face of each axis.
        """
        n, h, w = self.range_shape
        seen = np.ones((n, h, w), bool)
        row, column = np.ogrid[:h, :w]
        faces = np.broadcast_to(np.asarray(whole, bool), (3, 2))
        ends = (self.offsets[:, 0].min(), self.offsets[:, 0].max())
        for axis, size in enumerate(self.grid.shape):
            origin, normal, down, along = (
                v[:, None, None] for v in np.moveaxis(self.vectors[..., axis], 1, 0)
            )
            centre = origin + row * down + column * along
            for depth in (0.0, *ends):
                at = centre + depth * normal
                if depth == 0 or faces[axis, 0]:
                    seen &= at > -0.5 - 1e-6
                if depth == 0 or faces[axis, 1]:
                    seen &= at < size - 0.5 + 1e-6
        return seen


class _Misfit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        volume: Tensor,
        operators: Sequence[LinearOperator],
        data: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
    ) -> Tensor:
        channels = volume.detach().cpu().numpy()
        gradient = np.zeros_like(channels)
        total = 0.0
        for one, measured, weight in zip(operators, data, weights, strict=True):
            for c, channel in enumerate(channels):
                residual = one.apply(channel) - measured[c]
                pull = weight * residual
                total += float(np.vdot(pull, residual))
                gradient[c] += one.adjoint(pull)
        ctx.gradient = torch.from_numpy(2 * gradient).to(volume)
        return volume.new_tensor(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_out * ctx.gradient, None, None, None


def misfit(
    volume: Tensor,
    operators: Sequence[LinearOperator],
    data: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
) -> Tensor:
    """Return ``sum w (A x - data)^2`` over operators and channels, differentiable in the volume.

    Parameters
    ----------
    volume : Tensor, (C, Z, Y, X)
        On any device; the operators work on the CPU.
    operators : sequence of LinearOperator
        What measures it.
    data : sequence of ndarray, (C, ...), float32
        What each measured.
    weights : sequence of ndarray, float32
        Weights of the values, the same for all channels.

    Returns
    -------
    Tensor
        A number.
    """
    return _Misfit.apply(volume, operators, data, weights)  # type: ignore[no-any-return]


def _profile(thickness: float, kind: str, voxel: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Return sub-slices (world units along the normal) and their shares of the profile."""
    if thickness <= 0:
        return np.zeros(1), np.ones(1)
    reach = thickness / 2 if kind == "box" else _REACH * thickness
    count = int(np.ceil(reach / voxel)) + 1
    at = np.arange(-count, count + 1) * voxel + shift
    edges = np.append(at - voxel / 2, at[-1] + voxel / 2)
    if kind == "box":
        cumulative = (edges / thickness + 0.5).clip(0, 1)
    else:
        cumulative = ndtr(edges * FWHM / thickness)
    share = np.diff(cumulative)
    keep = share > 1e-4
    return at[keep], share[keep] / share[keep].sum()
