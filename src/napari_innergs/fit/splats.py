"""Gaussians with opacity and colour as a result: in the world, for views, and for files of splat viewers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import binary_fill_holes, map_coordinates

from napari_innergs.fit.photos import SplatField, rotate_harmonics
from napari_innergs.geometry.camera import Camera
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import (
    matrix_to_quaternion,
    multiply_quaternions,
    normalise_quaternion,
    reverse_quaternion,
)
from napari_innergs.io.files import PathLike, atomic_path, need_file, suffix_of
from napari_innergs.io.ply import read_npz_arrays, read_ply, write_ply
from napari_innergs.operators.voxels import voxelise

__all__ = ["SplatModel", "colour_volume", "render_cutaway"]

FloatArray = NDArray[np.float64]
_NAMES = ("means", "log_scales", "quaternions", "opacities", "harmonics")


@dataclass(frozen=True)
class SplatModel:
    """Gaussians that are seen in photographs, in the world.

    Attributes
    ----------
    means : ndarray (N, 3)
        Centres, world (z, y, x).
    log_scales : ndarray (N, 3)
        Logarithms of the standard deviations along the own axes, world units.
    quaternions : ndarray (N, 4)
        Rotations (w, a, b, c) acting on (z, y, x).
    opacities : ndarray (N,)
        0 to 1.
    harmonics : ndarray (N, K, 3)
        Spherical harmonics of red, green and blue, K = 1, 4, 9 or 16, as in splat files.
    """

    means: FloatArray
    log_scales: FloatArray
    quaternions: FloatArray
    opacities: FloatArray
    harmonics: NDArray[np.float32]

    def __post_init__(self) -> None:
        n = len(self.means)
        shapes = {"means": (n, 3), "log_scales": (n, 3), "quaternions": (n, 4), "opacities": (n,)}
        for name, shape in shapes.items():
            if np.shape(getattr(self, name)) != shape:
                raise ValueError(f"{name}: got shape {np.shape(getattr(self, name))}, need {shape}.")
        shape = np.shape(self.harmonics)
        if len(shape) != 3 or shape[0] != n or shape[1] not in (1, 4, 9, 16) or shape[2] != 3:
            raise ValueError(f"harmonics: got shape {shape}, need ({n}, 1, 4, 9 or 16, 3).")
        for name in _NAMES:
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name}: some numbers are not finite, need finite ones.")

    def __len__(self) -> int:
        return len(self.means)

    @classmethod
    def from_field(cls, field: SplatField, transform: FloatArray) -> SplatModel:
        """Make a model from a field and the similarity that takes its frame to the world."""
        scale = float(np.cbrt(np.linalg.det(transform[:3, :3])))
        turn = transform[:3, :3] / scale
        arrays = {name: t.detach().double().cpu().numpy() for name, t in field.tensors().items()}
        own = normalise_quaternion(arrays["quaternion"])
        rotation = np.broadcast_to(matrix_to_quaternion(turn[None]), own.shape)
        return cls(
            arrays["mean"] @ transform[:3, :3].T + transform[:3, 3],
            arrays["log_scale"] + np.log(scale),
            multiply_quaternions(rotation, own),
            1 / (1 + np.exp(-arrays["opacity"])),
            rotate_harmonics(np.concatenate([arrays["colour"], arrays["harmonics"]], 1), turn),
        )

    def field(self, centre: ArrayLike = (0.0, 0.0, 0.0)) -> SplatField:
        """Return the same Gaussians as tensors, relative to a place."""
        solid = np.clip(self.opacities, 1e-6, 1 - 1e-6)
        colours = np.asarray(self.harmonics, np.float32)
        arrays = (
            self.means - np.asarray(centre),
            self.log_scales,
            self.quaternions,
            np.log(solid / (1 - solid)),
        )
        tensors = [
            torch.from_numpy(np.array(a, np.float32)) for a in (*arrays, colours[:, :1], colours[:, 1:])
        ]
        return SplatField(*tensors)

    def subset(self, indices: Any) -> SplatModel:
        """Keep some of the Gaussians."""
        return SplatModel(**{name: getattr(self, name)[indices] for name in _NAMES})

    def render(
        self, camera: Camera, background: float | ArrayLike = 0.0, backend: str = "auto"
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return a photograph and its alpha.

        Parameters
        ----------
        camera : Camera
            In the model's world.
        background : float or array_like (3,)
            Colour behind everything.
        backend : str
            "auto", "cpu", "cuda" or "reference".

        Returns
        -------
        image : ndarray of float32 (H, W, 3)
            Display values, 0 to 1.
        alpha : ndarray of float32 (H, W)
            0 to 1.
        """
        middle = np.median(self.means, axis=0) if len(self) else np.zeros(3)
        pose = np.array(camera.world_to_camera)
        pose[:3, 3] += pose[:3, :3] @ middle
        with torch.no_grad():
            image, alpha = self.field(middle).render(
                camera,
                torch.as_tensor(np.asarray(background, np.float32)),
                pose=torch.from_numpy(pose),
                backend=backend,
            )
        return image.clamp(0, 1).cpu().numpy(), alpha.cpu().numpy()

    def save(self, path: PathLike) -> None:
        """Write the model; the name's ending, ``.ply`` (for splat viewers, float32) or ``.npz``, chooses the format.

        The PLY has the property names and units of Kerbl et al. (2023), in (x, y, z).

        Raises
        ------
        ValueError
            For another ending or a folder that can not be written.
        """
        suffix = suffix_of(path)
        if suffix == ".npz":
            with atomic_path(path) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, **{name: getattr(self, name) for name in _NAMES})
            return
        if suffix != ".ply":
            raise ValueError(f"path: got {str(path)!r}, need a name that ends in .ply or .npz.")
        rest = 3 * (self.harmonics.shape[1] - 1)
        names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
        names += [f"f_rest_{i}" for i in range(rest)] + ["opacity"]
        names += [f"scale_{i}" for i in range(3)] + [f"rot_{i}" for i in range(4)]
        table = np.zeros(len(self), [(name, "<f4") for name in names])
        for i, name in enumerate("xyz"):
            table[name] = self.means[:, 2 - i]
            table[f"scale_{i}"] = self.log_scales[:, 2 - i]
            table[f"f_dc_{i}"] = self.harmonics[:, 0, i]
        # all terms of red, then of green, then of blue
        for i, values in enumerate(np.moveaxis(self.harmonics[:, 1:], 2, 1).reshape(len(self), rest).T):
            table[f"f_rest_{i}"] = values
        solid = np.clip(self.opacities, 1e-6, 1 - 1e-6)
        table["opacity"] = np.log(solid / (1 - solid))
        turned = reverse_quaternion(self.quaternions)
        for i in range(4):
            table[f"rot_{i}"] = turned[:, i]
        write_ply(path, table)

    @classmethod
    def load(cls, path: PathLike) -> SplatModel:
        """Read a model from a ``.npz`` file of `save`, or a ``.ply`` of any splatting program.

        Raises
        ------
        ValueError
            Naming the file, if it is damaged or not of this kind.
        """
        file = need_file(path)
        if suffix_of(file) == ".npz":
            arrays = read_npz_arrays(file)
            missing = set(_NAMES) - set(arrays)
        else:
            table, _ = read_ply(file)
            names = table.dtype.names or ()
            rest = sum(name.startswith("f_rest_") for name in names)
            needed = ["x", "y", "z", "opacity", *(f"f_dc_{i}" for i in range(3))]
            needed += [f"scale_{i}" for i in range(3)] + [f"rot_{i}" for i in range(4)]
            missing = set(needed) - set(names)
            if not missing:

                def columns(*wanted: str) -> FloatArray:
                    return np.stack([table[name].astype(np.float64) for name in wanted], axis=1)

                dc = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
                others = np.zeros((len(table), 3, 0))
                if rest:
                    others = columns(*(f"f_rest_{i}" for i in range(rest))).reshape(len(table), 3, -1)
                arrays = {
                    "means": columns("z", "y", "x"),
                    "log_scales": columns("scale_2", "scale_1", "scale_0"),
                    "quaternions": reverse_quaternion(columns("rot_0", "rot_1", "rot_2", "rot_3")),
                    "opacities": 1 / (1 + np.exp(-columns("opacity")[:, 0])),
                    "harmonics": np.concatenate([dc, np.moveaxis(others, 1, 2)], 1).astype(np.float32),
                }
        if missing:
            raise ValueError(
                f"path: {str(file)!r} holds no Gaussians with colour, {sorted(missing)} is missing."
            )
        try:
            return cls(**{name: arrays[name] for name in _NAMES})
        except ValueError as error:
            raise ValueError(f"path: {str(file)!r} holds a damaged model: {error}") from error

    @property
    def colours(self) -> FloatArray:
        """Colours without regard to the direction, (N, 3), 0 to 1."""
        return np.clip(0.5 + 0.28209479177387814 * self.harmonics[:, 0].astype(np.float64), 0, 1)


def colour_volume(
    model: SplatModel, grid: Grid, surface: FloatArray, shell: float = 1.5, backend: str = "auto"
) -> NDArray[np.float32]:
    """Return the colours of the surface in voxels: the mean of the Gaussians' by opacity, zero away from the surface.

    Parameters
    ----------
    model : SplatModel
        In the grid's world.
    grid : Grid
        Where the voxels are.
    surface : ndarray (m, 3)
        Points on the surface, world (z, y, x).
    shell : float
        Voxels further from the surface stay zero.
    backend : str
        Where the Gaussians are voxelised.

    Returns
    -------
    ndarray of float32 (Z, Y, X, 3)
        0 to 1.
    """
    from scipy.spatial import cKDTree

    inverse = np.linalg.inv(grid.affine)
    linear = inverse[:3, :3]
    field = model.field()
    six = field.covariances().double().numpy()
    matrices = linear @ six[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]] @ linear.T
    # at least as large as a voxel: none is missed
    matrices = 0.5 * (matrices + matrices.swapaxes(1, 2)) + 0.25 * np.eye(3)
    covs = matrices[:, (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]
    means = grid.world_to_index(model.means)
    weights = model.opacities[:, None]
    values = np.concatenate([weights * model.colours, weights], 1)
    tensors = [torch.from_numpy(np.array(a, np.float32)) for a in (means, covs, values)]
    sums = voxelise(tensors[0], tensors[1], tensors[2], grid.shape, backend=backend).numpy()
    out = np.zeros((*grid.shape, 3), np.float32)
    found = np.argwhere(sums[3] > 1e-3)
    if len(found) and len(surface):
        away = cKDTree(grid.world_to_index(surface)).query(found, distance_upper_bound=shell)[0]
        z, y, x = found[np.isfinite(away)].T
        out[z, y, x] = (sums[:3, z, y, x] / sums[3, z, y, x]).T
    return out.clip(0, 1)


def render_cutaway(
    model: SplatModel,
    volume: NDArray[np.floating],
    grid: Grid,
    camera: Camera,
    point: ArrayLike,
    normal: ArrayLike,
    *,
    window: tuple[float, float] | None = None,
    background: float | ArrayLike = 0.0,
    backend: str = "auto",
) -> NDArray[np.float32]:
    """Render the object cut open: the outside in colour, the cut by attenuation, in grey.

    What lies on the side of the plane to which the normal points is taken away.

    Parameters
    ----------
    model : SplatModel
        The outside.
    volume : ndarray (Z, Y, X)
        Attenuation.
    grid : Grid
        Where it is.
    camera : Camera
        In the same world.
    point, normal : array_like (3,)
        The plane, world (z, y, x).
    window : (float, float), optional
        Attenuations that are black and white. Default: 0 and the 99.9th percentile.
    background : float or array_like (3,)
        Colour behind everything.
    backend : str
        Where the Gaussians are rendered.

    Returns
    -------
    ndarray of float32 (H, W, 3)
        Display values, 0 to 1.

    Raises
    ------
    ValueError
        If the normal is zero.
    """
    from skimage.filters import threshold_otsu

    place, away = np.asarray(point, np.float64), np.asarray(normal, np.float64)
    if place.shape != (3,) or away.shape != (3,) or not np.linalg.norm(away) > 0:
        raise ValueError("normal: got a plane that is none, need a point and a direction, (z, y, x) each.")
    away = away / np.linalg.norm(away)
    low, high = window or (0.0, float(np.percentile(volume, 99.9)))
    behind = np.broadcast_to(np.asarray(background, np.float32), 3)
    kept = (model.means - place) @ away <= 0
    image, alpha = model.subset(kept).render(camera, 0.0, backend)
    rows, columns = np.indices(camera.size)
    origins, directions = camera.rays(rows, columns)
    slope = directions @ away
    with np.errstate(divide="ignore", invalid="ignore"):
        length = ((place - origins) @ away) / slope
    hits = np.isfinite(length) & (length > 0)
    at = grid.world_to_index((origins + np.where(hits, length, 0)[..., None] * directions).reshape(-1, 3))
    values = map_coordinates(np.asarray(volume, np.float32), at.T, order=1, cval=0.0).reshape(camera.size)
    # holes inside the object belong to the cut
    solid = np.array(volume, np.float32)
    level = 0.5 * float(threshold_otsu(solid)) if solid.max() > solid.min() else np.inf
    cut = binary_fill_holes(hits & (values > level))
    section = np.repeat(np.clip((values - low) / max(high - low, 1e-30), 0, 1)[..., None], 3, axis=2)
    section = section * cut[..., None]
    open_side = (camera.centre - place) @ away > 0
    if open_side:
        # the cut hides all that is behind it
        image, alpha = np.where(cut[..., None], section, image), np.maximum(cut, alpha)
    else:
        image = image + (1 - alpha)[..., None] * section
        alpha = alpha + (1 - alpha) * cut
    return np.asarray(np.clip(image + (1 - alpha)[..., None] * behind, 0, 1), np.float32)
