"""NIfTI volumes, through nibabel (extra ``medical``)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.data import restore_dtype
from napari_innergs.geometry.frames import LPS_ZYX, RAS, Frame, unit_scale
from napari_innergs.geometry.grid import Grid
from napari_innergs.io.files import PathLike, StoredVolume, atomic_path, check_size, need_file, suffix_of

__all__ = ["open_nifti", "write_nifti"]

_UNITS = {"mm": "mm", "micron": "um", "meter": "m"}
_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise ValueError(
            "NIfTI files need nibabel, which is not installed: pip install 'napari-innergs[medical]'."
        ) from error
    return nibabel


def open_nifti(path: PathLike, world: Frame = LPS_ZYX) -> StoredVolume:
    """Find out what a NIfTI file holds.

    Parameters
    ----------
    path : path
        ``.nii`` or ``.nii.gz``.
    world : Frame
        Orientation of the world that the affine leads to.

    Returns
    -------
    StoredVolume
        The array is turned from (i, j, k) to (k, j, i). Slices are counted along the axis with the largest
        spacing, else along k.

    Raises
    ------
    ValueError
        Naming the file, if nibabel is missing or the file damaged.
    """
    nibabel = _nibabel()
    file = need_file(path)
    try:
        image = nibabel.load(file)
        if not isinstance(image, (nibabel.Nifti1Pair, nibabel.Nifti2Pair)):
            raise ValueError("it is not NIfTI")
        shape = tuple(int(size) for size in image.shape)
        stored = image.get_data_dtype()
        unit = _UNITS.get(image.header.get_xyzt_units()[0], "mm")
        affine = world_affine = np.array(image.affine, dtype=np.float64)
    except Exception as error:  # nibabel has several base classes for damage
        raise ValueError(f"path: {str(file)!r} is not a NIfTI file that can be read: {error}.") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) < 3 or len(shape) > 5 or min(shape) < 1:
        raise ValueError(
            f"path: {str(file)!r} has shape {shape}, need three axes, and at most time and channels."
        )
    times = shape[3] if len(shape) > 3 else 1
    planes = math.prod(shape) // times
    raw = math.prod(shape) * stored.itemsize
    if suffix_of(file) == ".nii" and raw > file.stat().st_size:
        raise ValueError(
            f"path: {str(file)!r} is truncated: its header announces {raw} bytes of pixels, the file has "
            f"{file.stat().st_size}."
        )
    check_size(planes * max(stored.itemsize, 4), file)
    world_affine = RAS.convert_affine(affine, world, reverse_index=True)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    axis = int(np.argmax(steps))
    # a difference below 1 % is rounding, not a choice of the person who scanned
    default = 2 - axis if steps[axis] > 1.01 * np.delete(steps, axis).max() else 0

    def read(time: int) -> NDArray[Any]:
        try:
            proxy = image.dataobj
            full = tuple(int(size) for size in image.shape)
            pick: tuple[Any, ...] = (slice(None),) * 3
            if len(full) > 3:
                pick += (time,) + (slice(None) if len(shape) > 4 else 0,) * (len(full) > 4)
                pick += (0,) * (len(full) - len(pick))
            pixels = np.asarray(proxy[pick])
        except Exception as error:
            raise ValueError(f"path: the pixels of {str(file)!r} can not be read: {error}.") from error
        if pixels.dtype.names is not None:
            pixels = np.stack([pixels[name] for name in pixels.dtype.names], axis=-1)
        if pixels.dtype == np.float64 and stored.kind in "iu":
            # a scale factor in the header: double precision is not in the file
            pixels = pixels.astype(np.float32)
        return pixels.transpose(2, 1, 0, *range(3, pixels.ndim))

    return StoredVolume(read, times, world_affine, unit, axis=default)


def write_nifti(path: PathLike, volume: NDArray[Any], grid: Grid, world: Frame = LPS_ZYX) -> None:
    """Write a volume as NIfTI.

    Parameters
    ----------
    path : path
        ``.nii`` or ``.nii.gz``.
    volume : ndarray (z, y, x) or (z, y, x, c)
        Pixels; channels become the fifth NIfTI axis (a vector).
    grid : Grid
        Their place. NIfTI keeps the affine in float32.
    world : Frame
        Orientation of the grid's world.

    Raises
    ------
    ValueError
        If nibabel is missing, the pixels' type can not be held, or the folder can not be written.
    """
    nibabel = _nibabel()
    if volume.dtype == np.float16:
        volume = restore_dtype(volume, np.float32)
    if volume.dtype.name not in _TYPES:
        raise ValueError(f"volume: NIfTI can not hold {volume.dtype}, need one of {', '.join(_TYPES)}.")
    units = grid.units[2] if grid.units is not None else None
    known = {ours: theirs for theirs, ours in _UNITS.items()}
    affine = np.array(grid.affine)
    if units is not None and units not in known and units != "pixel":
        # NIfTI knows no nanometres and no centimetres
        affine[:3] *= unit_scale(units, "um" if unit_scale(units, "um") < 1 else "mm")
        units = "um" if unit_scale(units, "um") < 1 else "mm"
    matrix = world.convert_affine(affine, RAS, reverse_index=True)
    pixels = volume.transpose(2, 1, 0, *range(3, volume.ndim))
    if pixels.ndim == 4:
        pixels = pixels[:, :, :, np.newaxis]
    large = max(pixels.shape) > 32767
    kind = nibabel.Nifti2Image if large else nibabel.Nifti1Image
    image = kind(pixels, matrix, dtype=pixels.dtype)
    image.header.set_xyzt_units("unknown" if units in (None, "pixel") else known[str(units)])
    image.set_sform(matrix, code=1)
    gram = matrix[:3, :3].T @ matrix[:3, :3]
    if np.abs(gram - np.diag(np.diag(gram))).max() < 1e-6 * np.diag(gram).max():
        # some programs read the qform only; it can not hold a shear
        image.set_qform(matrix, code=1)
    if volume.ndim == 4:
        image.header.set_intent("vector")
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)
