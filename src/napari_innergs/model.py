"""The continuous volume: a set of 3D Gaussians in the world."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from napari_innergs._constants import CUT_3D, EPSILON
from napari_innergs.geometry.frames import check_affine, check_units
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import matrix_to_quaternion, normalise_quaternion, quaternion_to_matrix

__all__ = ["FIELDS", "GaussianModel"]

FloatArray = NDArray[np.float64]
# accumulators of this size at a time while sampling
_SLAB_BYTES = 2**28
FIELDS = ("normalised", "additive")


class GaussianModel:
    """Anisotropic 3D Gaussians with amplitudes.

    With ``g_i(x) = exp(-1/2 (x - m_i)^T S_i^-1 (x - m_i))``, ``S_i = R_i diag(exp(log_scales_i))^2 R_i^T``:

    - additive field: ``f = sum_i a_i g_i``;
    - normalised field: ``f = (sum_i w_i a_i g_i + eps b) / (sum_i w_i g_i + eps)``, ``w = exp(log_weights)``.

    Parameters
    ----------
    means : array_like (N, 3)
        Centres, world (z, y, x).
    log_scales : array_like (N, 3)
        Logarithms of the standard deviations along the Gaussian's own axes, world units.
    quaternions : array_like (N, 4)
        Rotations (w, a, b, c), w first, acting on (z, y, x) triples: column k of ``R`` is the k-th own axis
        in world (z, y, x). They are normalised.
    amplitudes : array_like (N, C) or (N,)
        In the intensity units of the data.
    log_weights : array_like (N,), optional
        Logarithms of the weights; default 0. Not used by the additive field.
    field : {"normalised", "additive"}
        How Gaussians combine.
    background : float or array_like (C,)
        b of the normalised field: the value far from every Gaussian.
    eps : float
        Weight of the background in the normalised field.
    cut : float
        Squared radius of a Gaussian's support in standard deviations, at most 80; the field is fitted with one.
    units : str or sequence of 3 str, optional
        Units of the world axes.

    Raises
    ------
    ValueError
        If shapes disagree, a number is not finite, or a quaternion is zero.

    Examples
    --------
    >>> model = GaussianModel([[1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0]], [[1, 0, 0, 0]], [5.0])
    >>> len(model), model.n_channels
    (1, 1)
    """

    means: FloatArray
    log_scales: FloatArray
    quaternions: FloatArray
    amplitudes: FloatArray
    log_weights: FloatArray
    field: str
    background: FloatArray
    eps: float
    cut: float
    units: tuple[str, str, str] | None

    def __init__(
        self,
        means: ArrayLike,
        log_scales: ArrayLike,
        quaternions: ArrayLike,
        amplitudes: ArrayLike,
        log_weights: ArrayLike | None = None,
        *,
        field: str = "normalised",
        background: ArrayLike = 0.0,
        eps: float = EPSILON,
        cut: float = CUT_3D,
        units: Any = None,
    ) -> None:
        centres = _finite(means, "means")
        if centres.ndim != 2 or centres.shape[1] != 3:
            raise ValueError(f"means: got shape {centres.shape}, need (N, 3).")
        count = len(centres)
        scales = _finite(log_scales, "log_scales", (count, 3))
        if count and (np.abs(scales) > 300).any():
            raise ValueError("log_scales: got a value beyond +-300, need logarithms of standard deviations.")
        rotations = _finite(quaternions, "quaternions", (count, 4))
        heights = _finite(amplitudes, "amplitudes")
        if heights.ndim == 1:
            heights = heights[:, np.newaxis]
        if heights.ndim != 2 or len(heights) != count or heights.shape[1] < 1:
            raise ValueError(f"amplitudes: got shape {heights.shape}, need ({count}, C).")
        weights = np.zeros(count) if log_weights is None else _finite(log_weights, "log_weights")
        if weights.shape == (count, 1):
            weights = weights[:, 0]
        if weights.shape != (count,):
            raise ValueError(f"log_weights: got shape {weights.shape}, need ({count},).")
        if field not in FIELDS:
            raise ValueError(f"field: got {field!r}, need 'normalised' or 'additive'.")
        level = _finite(background, "background")
        if level.shape not in ((), (1,), (heights.shape[1],)):
            raise ValueError(
                f"background: got shape {level.shape}, need one number or ({heights.shape[1]},)."
            )
        if not (np.isfinite(eps) and eps > 0):
            raise ValueError(f"eps: got {eps}, need a positive number.")
        if not 0 < cut <= 80:
            raise ValueError(f"cut: got {cut}, need a squared radius above 0 and at most 80.")
        arrays = {
            "means": centres,
            "log_scales": scales,
            "quaternions": normalise_quaternion(rotations) if count else rotations,
            "amplitudes": heights,
            "log_weights": weights,
            "background": np.array(np.broadcast_to(level, heights.shape[1:])),
        }
        for array in arrays.values():
            array.flags.writeable = False
        self.__dict__.update(arrays, field=field, eps=float(eps), cut=float(cut), units=check_units(units))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"GaussianModel is immutable: {name} can not be set; make a new one.")

    def __len__(self) -> int:
        return len(self.means)

    def __repr__(self) -> str:
        return f"GaussianModel({len(self)} Gaussians, {self.n_channels} channel(s), {self.field} field)"

    @property
    def n_channels(self) -> int:
        """Amplitudes per Gaussian."""
        return int(self.amplitudes.shape[1])

    @property
    def scales(self) -> FloatArray:
        """Standard deviations along each Gaussian's own axes, (N, 3), world units."""
        return np.exp(self.log_scales)

    @property
    def rotations(self) -> FloatArray:
        """Rotation matrices in (z, y, x), (N, 3, 3)."""
        return quaternion_to_matrix(self.quaternions) if len(self) else np.zeros((0, 3, 3))

    def covariances(self) -> FloatArray:
        """Covariances in the world.

        Returns
        -------
        ndarray (N, 3, 3)
            In (z, y, x), world units squared.
        """
        half = self.rotations * self.scales[:, None, :]
        return half @ np.swapaxes(half, 1, 2)

    @classmethod
    def from_covariances(
        cls,
        means: ArrayLike,
        covariances: ArrayLike,
        amplitudes: ArrayLike,
        log_weights: ArrayLike | None = None,
        **options: Any,
    ) -> GaussianModel:
        """Make a model from covariance matrices.

        Parameters
        ----------
        means : array_like (N, 3)
            World (z, y, x).
        covariances : array_like (N, 3, 3) or (N, 6)
            Symmetric and positive definite; six numbers are [zz, zy, zx, yy, yx, xx].
        amplitudes, log_weights
            As for :class:`GaussianModel`.
        **options
            Keywords of :class:`GaussianModel`.

        Returns
        -------
        GaussianModel
            The same Gaussians. Scales ascend; the largest component of an axis is positive, except where the
            third axis must be turned round to make a rotation: the answer depends on nothing else.

        Raises
        ------
        ValueError
            If a matrix is not symmetric and positive definite.

        Examples
        --------
        >>> model = GaussianModel.from_covariances([[0, 0, 0]], [np.diag([1.0, 4.0, 9.0])], [1.0])
        >>> model.scales.round(6).tolist()
        [[1.0, 2.0, 3.0]]
        """
        matrices = _finite(covariances, "covariances")
        if matrices.ndim == 2 and matrices.shape[1] == 6:
            matrices = matrices[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]]
        if matrices.ndim != 3 or matrices.shape[1:] != (3, 3):
            raise ValueError(f"covariances: got shape {matrices.shape}, need (N, 3, 3) or (N, 6).")
        if not len(matrices):
            return cls(means, np.zeros((0, 3)), np.zeros((0, 4)), amplitudes, log_weights, **options)
        size = np.abs(matrices).max(axis=(1, 2), keepdims=True)
        skew = np.abs(matrices - np.swapaxes(matrices, 1, 2)).max(axis=(1, 2))
        bad = np.flatnonzero(skew > 1e-5 * size[:, 0, 0])
        if bad.size:
            raise ValueError(f"covariances: number {bad[0]} is not symmetric, need symmetric matrices.")
        values, vectors = np.linalg.eigh((matrices + np.swapaxes(matrices, 1, 2)) / 2)
        bad = np.flatnonzero(~(values[:, 0] > 0))
        if bad.size:
            raise ValueError(
                f"covariances: number {bad[0]} has eigenvalue {values[bad[0], 0]:.3g}, "
                "need positive definite ones."
            )
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None, :], axis=1)
        vectors = vectors * np.where(largest < 0, -1.0, 1.0)
        vectors[np.linalg.det(vectors) < 0, :, 2] *= -1.0
        return cls(
            means, np.log(values) / 2, matrix_to_quaternion(vectors), amplitudes, log_weights, **options
        )

    def _options(self) -> dict[str, Any]:
        return {
            "field": self.field,
            "background": self.background,
            "eps": self.eps,
            "cut": self.cut,
            "units": self.units,
        }

    def subset(self, indices: Any) -> GaussianModel:
        """Keep some of the Gaussians.

        Parameters
        ----------
        indices : index array, slice or bool array (N,)
            Which ones.

        Returns
        -------
        GaussianModel
            The smaller model.
        """
        return GaussianModel(
            self.means[indices],
            self.log_scales[indices],
            self.quaternions[indices],
            self.amplitudes[indices],
            self.log_weights[indices],
            **self._options(),
        )

    def transformed(self, affine: ArrayLike) -> GaussianModel:
        """Move the model by an affine map of the world: f_new(A x) = f(x).

        Parameters
        ----------
        affine : array_like (4, 4)
            World (z, y, x) to world (z, y, x); shears and reflections are allowed.

        Returns
        -------
        GaussianModel
            The moved model; amplitudes and weights are unchanged.

        Raises
        ------
        ValueError
            If the map is singular.

        Examples
        --------
        >>> model = GaussianModel([[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]], [[1, 0, 0, 0]], [5.0])
        >>> model.transformed(np.diag([2.0, 1.0, 1.0, 1.0])).means.tolist()
        [[2.0, 0.0, 0.0]]
        """
        matrix = check_affine(affine)
        means, covariances = _push(self.means, self.covariances(), matrix)
        return GaussianModel.from_covariances(
            means, covariances, self.amplitudes, self.log_weights, **self._options()
        )

    def in_index(self, grid: Grid) -> tuple[FloatArray, FloatArray]:
        """Give means and covariances in a grid's index coordinates, as kernels want them.

        Parameters
        ----------
        grid : Grid
            The grid.

        Returns
        -------
        means : ndarray (N, 3)
            Index (k, j, i).
        covariances : ndarray (N, 6)
            [zz, zy, zx, yy, yx, xx] in voxels squared.
        """
        means, matrices = _push(self.means, self.covariances(), grid.inverse_affine)
        return means, matrices[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]

    def bounds(self, radius: float = CUT_3D**0.5) -> FloatArray:
        """Give the box in the world that holds the Gaussians' support.

        Parameters
        ----------
        radius : float
            Radius of the support in standard deviations.

        Returns
        -------
        ndarray (2, 3)
            Lowest and highest (z, y, x).

        Raises
        ------
        ValueError
            If the model is empty.

        Examples
        --------
        >>> GaussianModel([[1, 2, 3]], [[0, 0, 0]], [[1, 0, 0, 0]], [5.0]).bounds(2.0).tolist()
        [[-1.0, 0.0, 1.0], [3.0, 4.0, 5.0]]
        """
        if not len(self):
            raise ValueError("model: it holds no Gaussians, need at least one for a box.")
        reach = radius * np.sqrt(np.diagonal(self.covariances(), axis1=1, axis2=2))
        return np.stack([(self.means - reach).min(axis=0), (self.means + reach).max(axis=0)])

    def voxelise(
        self,
        grid: Grid,
        *,
        background: ArrayLike | None = None,
        cut: float | None = None,
        backend: str = "auto",
    ) -> NDArray[np.float32]:
        """Sample the field at the centres of a grid's voxels.

        Parameters
        ----------
        grid : Grid
            Any place and direction.
        background : float, array_like (C,) or (z, y, x, C), optional
            Replaces the model's background (normalised field only).
        cut : float, optional
            Squared radius of a Gaussian's support in standard deviations; default the model's own.
        backend : {"auto", "cpu", "cuda", "reference"}
            What computes.

        Returns
        -------
        ndarray (z, y, x) or (z, y, x, C)
            float32; no channel axis for one channel.

        Raises
        ------
        ValueError
            If the grid and the model have different units, or the grid does not fit in memory.

        Examples
        --------
        >>> ball = GaussianModel([[4, 4, 4]], [[0, 0, 0]], [[1, 0, 0, 0]], [5.0], field="additive")
        >>> round(float(ball.voxelise(Grid((9, 9, 9)))[4, 4, 4]), 3)
        5.0
        """
        from napari_innergs.operators import voxels

        return _voxelise(self, grid, background, self.cut if cut is None else cut, backend, voxels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a ``.ply`` or ``.npz`` file.

        Parameters
        ----------
        path : path
            The name's ending chooses the format.

        Raises
        ------
        ValueError
            For another ending, or a folder that can not be written.

        Examples
        --------
        >>> import tempfile
        >>> model = GaussianModel([[1.0, 2.0, 3.0]], [[0, 0, 0]], [[1, 0, 0, 0]], [5.0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(f"{folder}/model.ply")
        ...     GaussianModel.load(f"{folder}/model.ply").means.tolist()
        [[1.0, 2.0, 3.0]]
        """
        from napari_innergs.io import ply

        names = ("means", "log_scales", "quaternions", "amplitudes", "log_weights")
        header = {**self._options(), "background": self.background.tolist()}
        ply.write_gaussians(path, {name: getattr(self, name) for name in names}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GaussianModel:
        """Read a model from a ``.ply`` or ``.npz`` file.

        Parameters
        ----------
        path : path
            A file written by :meth:`save`, or a 3D Gaussian splatting PLY.

        Returns
        -------
        GaussianModel
            The model.

        Raises
        ------
        ValueError
            If the file is damaged or not of this kind.
        """
        from napari_innergs.io import ply

        values, header = ply.read_gaussians(path)
        try:
            return cls(
                values["means"],
                values["log_scales"],
                values["quaternions"],
                values["amplitudes"],
                values.get("log_weights"),
                field=header.get("field", "normalised"),
                background=header.get("background", 0.0),
                units=header.get("units"),
                **{name: float(header[name]) for name in ("eps", "cut") if name in header},
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"path: {str(path)!r} holds a damaged model: {error}") from error


def _finite(
    value: ArrayLike, name: str, shape: tuple[int, ...] | None = None, dtype: DTypeLike = float
) -> Any:
    try:
        array = np.array(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: got something that is not an array of numbers.") from error
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, need {shape}.")
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(f"{name}: {bad} values are NaN or infinite, need finite numbers.")
    return array


def _push(means: FloatArray, covariances: FloatArray, affine: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Carry means (N, 3) and covariances (N, 3, 3) through an affine map."""
    linear = affine[:3, :3]
    return means @ linear.T + affine[:3, 3], linear @ covariances @ linear.T


def _voxelise(
    model: GaussianModel, grid: Grid, background: ArrayLike | None, cut: float, backend: str, voxels: Any
) -> NDArray[np.float32]:
    """Sample slab by slab: the accumulators of a whole large grid would double the memory."""
    import torch

    if model.units is not None and grid.units is not None and model.units != grid.units:
        raise ValueError(
            f"grid: got units {grid.units}, the model has {model.units}; need the same, or model.transformed."
        )
    nz, ny, nx = grid.shape
    channels = model.n_channels
    grid.check_memory(channels, 1.5)
    level = model.background if background is None else np.asarray(background, dtype=np.float64)
    if level.shape == grid.shape:
        level = level[..., np.newaxis]
    if level.ndim not in (0, 1) and level.shape[:3] != grid.shape:
        raise ValueError(
            f"background: got shape {level.shape}, need ({channels},) or {(*grid.shape, channels)}."
        )
    out = np.empty((nz, ny, nx, channels), np.float32)
    means, covariances = model.in_index(grid)
    # the support is what the covariance says: everything is double until here
    tensors = [
        torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        for array in (means, covariances, model.amplitudes)
    ]
    weights = torch.from_numpy(model.log_weights.astype(np.float32))
    step = max(8, int(_SLAB_BYTES // (4 * ny * nx * (channels + 1))))
    with torch.no_grad():
        for start in range(0, nz, step):
            stop = min(start + step, nz)
            options = {"z_range": (start, stop), "cut": cut, "backend": backend}
            if model.field == "additive":
                slab = voxels.voxelise(*tensors, grid.shape, **options)
            else:
                part = np.broadcast_to(
                    level[start:stop] if level.ndim == 4 else level, (stop - start, ny, nx, channels)
                )
                behind = torch.from_numpy(np.moveaxis(part, -1, 0).astype(np.float32))
                slab = voxels.voxelise_normalised(*tensors, weights, grid.shape, behind, model.eps, **options)
            out[start:stop] = np.moveaxis(slab.numpy(), 0, -1)
    return out[..., 0] if channels == 1 else out
