"""What a reconstruction returns: a volume that explains itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from napari_innergs.geometry.camera import Camera
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.slices import SlicePlane
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.io.files import atomic_path, ensure_writable, need_file
from napari_innergs.io.npz import open_npz, write_npz
from napari_innergs.model import GaussianModel

if TYPE_CHECKING:
    from napari_innergs.fit.splats import SplatModel

_FORMAT = 1
_VOLUMES = ("uncertainty", "distance", "colour")


@dataclass
class Reconstruction:
    """A dense volume with its geometry, its model and the report of how it came about.

    Attributes
    ----------
    volume : ndarray, shape (z, y, x) or (z, y, x, c), float32
        Intensities in the units of the input.
    grid : Grid
        Where the volume is: shape and affine (index to world).
    model : GaussianModel or None
        The fitted Gaussians, in world coordinates.
    report : dict
        JSON-able: device, seconds, iterations, n_gaussians, psnr_heldout, baseline, baseline_psnr_heldout,
        chosen, config, seed, versions, and what each candidate was worth.
    uncertainty : ndarray or None
        Half-width of the 90 % band of the error, same shape and unit as `volume`.
    distance : ndarray or None
        Distance of each output plane's voxels to the nearest real slice, world units, shape (z, y, x).
    transform : ndarray (4, 4) or None
        Photographs' world to X-rays' world, (z, y, x) (dual reconstructions only, as what follows).
    splats : SplatModel or None
        The Gaussians that are seen in photographs, with opacity and colour.
    colour : ndarray (z, y, x, 3) or None
        Colours of the surface, 0 to 1; 0 elsewhere.
    """

    volume: np.ndarray
    grid: Grid
    model: GaussianModel | None = None
    report: dict[str, Any] = field(default_factory=dict)
    uncertainty: np.ndarray | None = None
    distance: np.ndarray | None = None
    transform: np.ndarray | None = None
    splats: SplatModel | None = None
    colour: np.ndarray | None = None
    _state: Any = field(default=None, repr=False, compare=False)

    def save(self, folder: str | Path) -> Path:
        """Write everything to a folder: volume.npz, model.npz, report.json and the other volumes there are.

        Parameters
        ----------
        folder : path
            Made when it does not exist; files of an earlier result in it are replaced.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        ValueError
            If the folder cannot be written.
        """
        place = Path(folder)
        ensure_writable(place)
        write_npz(place / "volume.npz", self.volume, self.grid)
        for name in _VOLUMES:
            values = getattr(self, name)
            if values is not None:
                write_npz(place / f"{name}.npz", values, self.grid)
            else:
                (place / f"{name}.npz").unlink(missing_ok=True)
        if self.model is not None:
            self.model.save(place / "model.npz")
        else:
            (place / "model.npz").unlink(missing_ok=True)
        # the PLY is for splat viewers
        for name in ("splats.npz", "splats.ply"):
            if self.splats is not None:
                self.splats.save(place / name)
            else:
                (place / name).unlink(missing_ok=True)
        content = {
            "format": _FORMAT,
            "transform": None if self.transform is None else self.transform.tolist(),
            "report": self.report,
        }
        # the report is written last: a folder that has one is complete
        with atomic_path(place / "report.json") as path:
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return place

    def candidate(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Return one candidate by itself on planes of the stack.

        Parameters
        ----------
        name : str
            One of the names in ``report["contributions"]``.
        positions : array_like, shape (m,)
            Positions along the slices' axis, world units.

        Returns
        -------
        ndarray, shape (m, h, w, c), float32

        Raises
        ------
        ValueError
            If the candidates were not kept, or there is none of that name.
        """
        kept = getattr(self._state, "candidates", None)
        if kept is None:
            raise ValueError("the candidates were not kept; reconstruct with keep_candidates=True")
        if name not in kept.names:
            raise ValueError(f"name: there is no candidate {name!r}; use one of {', '.join(kept.names)}")
        at = np.asarray(positions, float)
        index = kept.names.index(name)
        return np.concatenate([kept.planes(at[i : i + 4])[index] for i in range(0, len(at), 4)])

    def render_slice(self, plane: SlicePlane, source: str = "volume") -> np.ndarray:
        """Return the image on a plane anywhere in the world.

        Parameters
        ----------
        plane : SlicePlane
            Where: origin, directions, shape and spacing.
        source : {"volume", "model"}
            The combined volume (cubic interpolation; 0 more than half a voxel outside), or the Gaussians alone.

        Returns
        -------
        ndarray, shape (rows, columns) or (rows, columns, c), float32

        Raises
        ------
        ValueError
            If `source` is unknown, or "model" and there are no Gaussians.
        """
        if source == "model":
            if self.model is None:
                raise ValueError(
                    "source: 'model' was asked for, but this result has no Gaussians; use 'volume'"
                )
            return self.model.voxelise(plane.grid())[0]
        if source != "volume":
            raise ValueError(f"source: got {source!r}, need 'volume' or 'model'")
        from scipy.ndimage import map_coordinates

        where = np.moveaxis(self.grid.world_to_index(plane.points()), -1, 0)
        channels = self.volume.reshape(*self.grid.shape, -1)
        image = np.stack(
            [
                map_coordinates(channels[..., c], where, order=3, mode="nearest")
                for c in range(channels.shape[-1])
            ],
            -1,
        ).astype(np.float32)
        # a jump to 0 at the border would ring through the spline: it is cut off afterwards
        sizes = np.reshape(self.grid.shape, (3, 1, 1))
        image[((where < -0.5) | (where > sizes - 0.5)).any(0)] = 0
        return image if self.volume.ndim == 4 else image[..., 0]

    def render_xray(self, geometry: XrayGeometry) -> np.ndarray:
        """Return radiographs of the Gaussians: exact line integrals along the rays of a geometry.

        Parameters
        ----------
        geometry : XrayGeometry
            Where source and panel are, in the result's world.

        Returns
        -------
        ndarray, shape (views, rows, columns), float32

        Raises
        ------
        ValueError
            If there are no Gaussians, or they are not those of an attenuation.
        """
        from napari_innergs.fit.attenuation import render_radiographs

        if self.model is None or self.model.field != "additive":
            raise ValueError(
                "model: this result has no Gaussians of an attenuation; radiographs need those of a projections task"
            )
        return render_radiographs(self.model, geometry)

    def render_rgb(self, camera: Camera, background: float | ArrayLike = 0.0) -> np.ndarray:
        """Return a photograph of the Gaussians with colour.

        Parameters
        ----------
        camera : Camera
            In the result's world; a camera of the photographs' world is brought there by
            ``camera.moved(result.transform)``.
        background : float or array_like (3,)
            Colour behind everything.

        Returns
        -------
        ndarray, shape (rows, columns, 3), float32
            Display values, 0 to 1.

        Raises
        ------
        ValueError
            If there are no Gaussians with colour.
        """
        return self._need_splats().render(camera, background)[0]

    def render_cutaway(
        self,
        camera: Camera,
        point: ArrayLike,
        normal: ArrayLike,
        *,
        window: tuple[float, float] | None = None,
        background: float | ArrayLike = 0.0,
    ) -> np.ndarray:
        """Return the object cut open: the outside in colour, the cut by attenuation, in grey.

        Parameters
        ----------
        camera : Camera
            In the result's world.
        point, normal : array_like (3,)
            The plane of the cut, world (z, y, x); what lies where the normal points is taken away.
        window : (float, float), optional
            Attenuations that are black and white.
        background : float or array_like (3,)
            Colour behind everything.

        Returns
        -------
        ndarray, shape (rows, columns, 3), float32

        Raises
        ------
        ValueError
            If there are no Gaussians with colour, or the plane is none.
        """
        from napari_innergs.fit.splats import render_cutaway

        return render_cutaway(
            self._need_splats(),
            self.volume,
            self.grid,
            camera,
            point,
            normal,
            window=window,
            background=background,
        )

    def _need_splats(self) -> SplatModel:
        if self.splats is None:
            raise ValueError(
                "splats: this result has no Gaussians with colour; photographs need a dual reconstruction"
            )
        return self.splats


def load(folder: str | Path) -> Reconstruction:
    """Read a result that `Reconstruction.save` wrote.

    Parameters
    ----------
    folder : path
        The folder.

    Raises
    ------
    ValueError
        If a file is missing, damaged, or written by a newer version.
    """
    place = Path(folder)
    path = need_file(place / "report.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, report, transform = content["format"], content["report"], content["transform"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is not the report of a reconstruction; load the folder that save() wrote"
        ) from None
    if version != _FORMAT:
        raise ValueError(
            f"{path} has format {version!r}, this version reads {_FORMAT}; update napari-innergs"
        )
    volume, grid = _read(place / "volume.npz")
    others = {name: _read(place / f"{name}.npz")[0] for name in _VOLUMES if (place / f"{name}.npz").exists()}
    model = GaussianModel.load(place / "model.npz") if (place / "model.npz").exists() else None
    splats = None
    # the command line writes the one for viewers only
    colours = next((file for ending in ("npz", "ply") if (file := place / f"splats.{ending}").exists()), None)
    if colours is not None:
        from napari_innergs.fit.splats import SplatModel

        splats = SplatModel.load(colours)
    return Reconstruction(
        volume,
        grid,
        model,
        report,
        transform=None if transform is None else np.array(transform),
        splats=splats,
        **others,
    )


def _read(path: Path) -> tuple[np.ndarray, Grid]:
    stored = open_npz(need_file(path))
    volume = stored.read(0)
    return volume, Grid(volume.shape[:3], stored.affine, stored.units)
