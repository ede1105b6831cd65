"""What all readers and writers share: checks before long work, writing without half-made files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_innergs.data import SliceStack
from napari_innergs.geometry.frames import affine_from_spacing, check_units
from napari_innergs.geometry.grid import available_memory, format_bytes

__all__ = [
    "PathLike",
    "StoredVolume",
    "atomic_path",
    "check_size",
    "ensure_writable",
    "need_file",
    "suffix_of",
    "to_stack",
]

PathLike = str | os.PathLike[str]
_DOUBLE = (".ome.tiff", ".ome.tif", ".nii.gz", ".ome.zarr")


def suffix_of(path: PathLike) -> str:
    """Give a file name's ending in lower case, both parts where they belong together.

    Parameters
    ----------
    path : path
        A file name.

    Returns
    -------
    str
        For example ``".nii.gz"``.

    Examples
    --------
    >>> suffix_of("Brain.NII.gz"), suffix_of("a.b.tif")
    ('.nii.gz', '.tif')
    """
    name = Path(path).name.lower()
    for double in _DOUBLE:
        if name.endswith(double):
            return double
    return Path(name).suffix


def need_file(path: PathLike) -> Path:
    """Give the path of a file or folder that exists.

    Parameters
    ----------
    path : path
        Where it should be.

    Returns
    -------
    Path
        The path.

    Raises
    ------
    ValueError
        If there is nothing, or an empty file.
    """
    found = Path(path)
    if not found.exists():
        raise ValueError(f"path: there is no file or folder {str(path)!r}.")
    if found.is_file() and found.stat().st_size == 0:
        raise ValueError(f"path: the file {str(path)!r} is empty.")
    return found


def check_size(nbytes: int, path: PathLike) -> None:
    """Refuse a file whose contents do not fit in memory, before anything is allocated.

    Parameters
    ----------
    nbytes : int
        Bytes that its header announces.
    path : path
        For the error.

    Raises
    ------
    ValueError
        If memory does not suffice.
    """
    limit = available_memory()
    if nbytes > limit:
        raise ValueError(
            f"path: {str(path)!r} announces {format_bytes(nbytes)} of pixels, but {format_bytes(limit)} "
            "of memory is available; crop it, or read one time point."
        )


def ensure_writable(folder: PathLike) -> Path:
    """Make a folder if needed, and find out now whether files can be made in it.

    Parameters
    ----------
    folder : path
        Where results will be written.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If it can not be made or written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ensure_writable(folder).is_dir()
    True
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        # permission bits say nothing about read-only mounts and quotas: try it
        with tempfile.NamedTemporaryFile(dir=place, prefix=".innergs-"):
            pass
    except OSError as error:
        raise ValueError(
            f"path: can not write in the folder {str(folder)!r} ({error.strerror or error}); "
            "need a folder with write permission."
        ) from error
    return place


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there takes its place when all went well.

    Parameters
    ----------
    path : path
        Final name; a folder is replaced only if it is empty or a Zarr group.

    Yields
    ------
    Path
        Where to write, with the same ending. It is removed when an exception leaves the block.

    Raises
    ------
    ValueError
        If the folder can not be written, or `path` is a folder with other things in it.
    """
    target = Path(path)
    folder = ensure_writable(target.parent)
    if target.is_dir() and any(target.iterdir()):
        zarr_group = any((target / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs"))
        if not zarr_group:
            raise ValueError(f"path: {str(path)!r} is a folder with other files, need another name.")
    room = Path(tempfile.mkdtemp(dir=folder, prefix=".innergs-"))
    temporary = room / target.name
    try:
        try:
            yield temporary
            if temporary.is_dir() and target.is_dir():
                # a folder can not replace a folder in one step: move the old one aside first
                os.replace(target, room / "old")
            os.replace(temporary, target)
        except OSError as error:
            raise ValueError(f"path: writing {str(path)!r} failed ({error.strerror or error}).") from error
    finally:
        old = room / "old"
        if old.exists() and not target.exists():
            with suppress(OSError):
                os.replace(old, target)
        shutil.rmtree(room, ignore_errors=True)


@dataclass(frozen=True)
class StoredVolume:
    """What a reader found: how to get the pixels of a time point, and where they are in the world.

    Parameters
    ----------
    read : callable
        ``read(time)`` gives (z, y, x) or (z, y, x, c).
    n_times : int
        Number of time points.
    affine : ndarray (4, 4)
        Index to world (z, y, x).
    units : str or tuple of 3 str, or None
        Units of the world axes.
    channel_names : tuple of str, or None
        One for each channel.
    axis : int
        Array axis that counts the slices by default.
    positions : ndarray, or None
        Positions of the slices along that axis.
    mask : ndarray, or None
        Trusted pixels, (z, y, x).
    exact : bool
        Whether the affine comes from the file; False when it is only a default.
    """

    read: Callable[[int], NDArray[Any]]
    n_times: int
    affine: NDArray[np.float64]
    units: Any = None
    channel_names: tuple[str, ...] | None = None
    axis: int = 0
    positions: NDArray[np.float64] | None = None
    mask: NDArray[np.bool_] | None = None
    exact: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)


def to_stack(
    stored: StoredVolume,
    path: PathLike,
    *,
    axis: int | None = None,
    time_index: int | None = None,
    spacing: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    thickness: float = 0.0,
    profile: str = "gaussian",
    mask: ArrayLike | None = None,
    units: Any = None,
    channel_names: Sequence[str] | None = None,
    name: str | None = None,
) -> SliceStack:
    """Make a stack from what a reader found.

    Parameters
    ----------
    stored : StoredVolume
        The reader's answer.
    path : path
        The file, for names and errors.
    axis, time_index, spacing, positions, thickness, profile, mask, units, channel_names, name
        See :func:`napari_innergs.io.read.read_stack`.

    Returns
    -------
    SliceStack
        The slices.

    Raises
    ------
    ValueError
        Naming the file.
    """
    if time_index is None:
        if stored.n_times > 1:
            raise ValueError(
                f"time_index: {str(path)!r} has {stored.n_times} time points, need one of 0 to "
                f"{stored.n_times - 1} (read_times reads them one after the other)."
            )
        time_index = 0
    if int(time_index) != time_index or not 0 <= time_index < stored.n_times:
        raise ValueError(
            f"time_index: got {time_index} for {str(path)!r}, need an integer from 0 to {stored.n_times - 1}."
        )
    which = stored.axis if axis is None else axis
    if which not in (0, 1, 2):
        raise ValueError(
            f"axis: got {axis}, need 0, 1 or 2: the array axis (z, y, x) that counts the slices."
        )
    affine = np.array(stored.affine)
    if spacing is not None:
        steps = affine_from_spacing(spacing).diagonal()[:3]
        affine[:3, :3] *= steps / np.linalg.norm(affine[:3, :3], axis=0)
    if positions is None and which == stored.axis:
        positions = stored.positions
    elif stored.positions is not None and which != stored.axis:
        raise ValueError(
            f"axis: the slices of {str(path)!r} are irregular along axis {stored.axis}; need that."
        )
    if spacing is not None and stored.positions is not None and positions is stored.positions:
        raise ValueError(f"spacing: {str(path)!r} has its own slice positions; give positions instead.")
    pixels = stored.read(int(time_index))
    trusted = stored.mask if mask is None else np.asarray(mask)
    pixels = np.moveaxis(pixels, which, 0)
    if mask is None and trusted is not None:
        trusted = np.moveaxis(trusted, which, 0)
    order = [which, *(d for d in range(3) if d != which), 3]
    try:
        return SliceStack(
            pixels,
            affine[:, order],
            positions,
            thickness,
            profile,
            trusted,
            units=check_units(stored.units if units is None else units),
            channel_names=stored.channel_names if channel_names is None else channel_names,
            name=Path(path).name[: -len(suffix_of(path)) or None] if name is None else name,
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{error} (file {str(path)!r})") from error
