"""DICOM series, through pydicom (extra ``medical``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.frames import LPS, LPS_ZYX, Frame
from napari_innergs.io.files import PathLike, StoredVolume, check_size, need_file

__all__ = ["is_dicom", "open_dicom"]

FloatArray = NDArray[np.float64]


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise ValueError(
            "DICOM files need pydicom, which is not installed: pip install 'napari-innergs[medical]'."
        ) from error
    return pydicom


def is_dicom(path: PathLike) -> bool:
    """Say whether a file starts as DICOM files do.

    Parameters
    ----------
    path : path
        A file.

    Returns
    -------
    bool
        True if the letters DICM follow the preamble.
    """
    try:
        with Path(path).open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


@dataclass(frozen=True)
class _Frame:
    """One image of a series: where its pixels are, and where it lies (LPS, x, y, z)."""

    file: Path
    index: int | None
    shape: tuple[int, int]
    position: FloatArray
    orientation: FloatArray
    pixel_size: FloatArray
    slope: float
    intercept: float
    time: tuple[float, ...]


def open_dicom(path: PathLike, series: str | None = None, world: Frame = LPS_ZYX) -> StoredVolume:
    """Find out what a DICOM series holds.

    Slices are sorted by their position along the normal, whatever the files are called. A stack whose slices
    are shifted against each other along one direction (gantry tilt) keeps that direction; missing slices give
    irregular positions. Rescale slope and intercept are applied.

    Parameters
    ----------
    path : path
        A folder with the files of one series, one of its files, or one multi-frame file.
    series : str, optional
        Series instance UID or series number, where the folder holds several.
    world : Frame
        Orientation of the world that the affine leads to.

    Returns
    -------
    StoredVolume
        Pixels are read when asked for.

    Raises
    ------
    ValueError
        Naming the files, if pydicom is missing, series are mixed, images do not belong together, or a file is
        damaged.
    """
    pydicom = _pydicom()
    place = need_file(path)
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.is_file() and p.name != "DICOMDIR")
    else:
        files = [place]
    found: dict[str, list[tuple[Path, Any]]] = {}
    kinds: set[str] = set()
    others: list[tuple[Path, str]] = []
    for file in files:
        if place.is_dir() and not is_dicom(file):
            continue
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            kind = str(
                getattr(header.file_meta, "MediaStorageSOPClassUID", "") or header.get("SOPClassUID", "")
            )
            if "Rows" not in header:
                others.append((file, kind))
            else:
                kinds.add(kind)
                # decoded now, while a failure can still name the file
                header.get("SeriesNumber"), header.get("SeriesDescription")
                found.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((file, header))
        except Exception as error:
            raise ValueError(f"path: {str(file)!r} is not a DICOM file that can be read: {error}.") from error
    for file, kind in others:
        # reports and the like stand beside images; an image that ends in its header must not go missing
        if not kind or kind in kinds:
            raise ValueError(f"path: {str(file)!r} is truncated: its header has no image size.")
    if not found:
        raise ValueError(f"path: there are no DICOM images in {str(place)!r}.")
    if series is not None:
        chosen = {
            uid: members
            for uid, members in found.items()
            if str(series) in (uid, str(members[0][1].get("SeriesNumber", "")))
        }
        if len(chosen) != 1:
            raise ValueError(
                f"series: {str(place)!r} has no single series {series!r}; it has {_list(found)}."
            )
        found = chosen
    if len(found) > 1:
        raise ValueError(f"series: {str(place)!r} holds {len(found)} series, need one of: {_list(found)}.")
    frames = []
    for file, header in next(iter(found.values())):
        try:
            frames += _frames(file, header)
        except Exception as error:  # pydicom decodes values when they are asked for
            if isinstance(error, ValueError) and str(error).startswith("path:"):
                raise
            raise ValueError(f"path: {str(file)!r} lacks what places its images: {error}.") from error
    return _assemble(frames, place, world)


def _list(found: dict[str, list[tuple[Path, Any]]]) -> str:
    words = []
    for uid, members in found.items():
        header = members[0][1]
        words.append(
            f"{header.get('SeriesNumber', '?')} {str(header.get('SeriesDescription', ''))!r} "
            f"({len(members)} files, {uid})"
        )
    return "; ".join(words)


def _frames(file: Path, header: Any) -> list[_Frame]:
    """Give the images of one file."""
    if str(header.get("PhotometricInterpretation", "")) == "PALETTE COLOR":
        raise ValueError(f"path: {str(file)!r} has palette colours, need grey values or RGB.")
    shape = (int(header.Rows), int(header.Columns))
    count = int(header.get("NumberOfFrames", 1) or 1)
    if "PerFrameFunctionalGroupsSequence" not in header:
        if count > 1:
            raise ValueError(f"path: {str(file)!r} has {count} frames without positions, need them.")
        if "ImagePositionPatient" not in header or "ImageOrientationPatient" not in header:
            raise ValueError(f"path: {str(file)!r} has no position in space, need ImagePositionPatient.")
        return [_frame(file, None, shape, header, header, header, header, header)]
    shared = header.SharedFunctionalGroupsSequence[0] if "SharedFunctionalGroupsSequence" in header else None
    out = []
    for index, own in enumerate(header.PerFrameFunctionalGroupsSequence):

        def group(name: str, own: Any = own) -> Any:
            for owner in (own, shared):
                if owner is not None and name in owner:
                    return owner[name].value[0]
            return {}

        out.append(
            _frame(
                file,
                index,
                shape,
                group("PlanePositionSequence"),
                group("PlaneOrientationSequence"),
                group("PixelMeasuresSequence"),
                group("PixelValueTransformationSequence"),
                group("FrameContentSequence"),
            )
        )
    return out


def _frame(
    file: Path,
    index: int | None,
    shape: tuple[int, int],
    position: Any,
    orientation: Any,
    measures: Any,
    transform: Any,
    content: Any,
) -> _Frame:
    place = np.array([float(v) for v in position.ImagePositionPatient])
    cosines = np.array([float(v) for v in orientation.ImageOrientationPatient])
    size = np.array([float(v) for v in measures.get("PixelSpacing", None) or (0, 0)])
    if place.shape != (3,) or cosines.shape != (6,) or size.shape != (2,):
        raise ValueError(f"path: {str(file)!r} has a damaged position, orientation or pixel spacing.")
    if not (np.isfinite(place).all() and np.isfinite(cosines).all() and (size > 0).all()):
        raise ValueError(
            f"path: {str(file)!r} has a pixel spacing of {size.tolist()}, need positive numbers."
        )
    order = []
    for name in (
        "TemporalPositionIdentifier",
        "TemporalPositionIndex",
        "AcquisitionNumber",
        "InstanceNumber",
    ):
        value = content.get(name, None)
        order.append(float(value) if value is not None else 0.0)
    slope, intercept = transform.get("RescaleSlope", None), transform.get("RescaleIntercept", None)
    return _Frame(
        file,
        index,
        shape,
        place,
        cosines.reshape(2, 3),
        size,
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
        tuple(order),
    )


def _assemble(frames: Sequence[_Frame], place: Path, world: Frame) -> StoredVolume:
    first = frames[0]
    if len(frames) < 2:
        raise ValueError(f"path: {str(place)!r} holds 1 image, need at least 2 slices.")
    for frame in frames[1:]:
        for what, a, b, tolerance in (
            ("size", np.array(first.shape), np.array(frame.shape), 0.0),
            ("direction", first.orientation, frame.orientation, 1e-3),
            ("pixel spacing", first.pixel_size, frame.pixel_size, 1e-3 * float(first.pixel_size.min())),
        ):
            if np.abs(a - b).max() > tolerance:
                raise ValueError(
                    f"path: {first.file.name!r} and {frame.file.name!r} in {str(place)!r} differ in {what} "
                    f"({a.ravel().tolist()} and {b.ravel().tolist()}), need images of one stack."
                )
    along_columns, along_rows = first.orientation / np.linalg.norm(first.orientation, axis=1, keepdims=True)
    normal = np.cross(along_columns, along_rows)
    where = np.array([frame.position for frame in frames])
    height = (where - where[0]) @ normal
    order = sorted(range(len(frames)), key=lambda i: (height[i], frames[i].time))
    # images closer together than this lie at one place: time points, echoes
    close = 1e-3 * float(first.pixel_size.min())
    groups: list[list[int]] = []
    for i in order:
        if groups and height[i] - height[groups[-1][0]] <= close:
            groups[-1].append(i)
        else:
            groups.append([i])
    times = len(groups[0])
    for group in groups:
        if len(group) != times:
            names = [frames[i].file.name for i in (group if len(group) > 1 else groups[0])[:2]]
            raise ValueError(
                f"path: {names[0]!r} and {names[-1]!r} in {str(place)!r} lie at one position and other "
                "slices are there less often, need one image "
                "for each position (or the same number of time points)."
            )
    if len(groups) < 2:
        raise ValueError(f"path: all images in {str(place)!r} lie at one position, need at least 2 slices.")
    columns = [sorted(group, key=lambda i: frames[i].time) for group in groups]
    base = where[[group[0] for group in columns]]
    span = base[-1] - base[0]
    direction = span / np.linalg.norm(span)
    positions = (base - base[0]) @ direction
    off = np.linalg.norm(base - base[0] - positions[:, None] * direction, axis=1)
    worst = int(np.argmax(off))
    if off[worst] > 0.1 * first.pixel_size.min():
        raise ValueError(
            f"path: {frames[columns[worst][0]].file.name!r} in {str(place)!r} lies {off[worst]:.3g} mm off "
            "the line of the other slices, need parallel slices along one line."
        )
    affine = np.eye(4)
    affine[:3, 0] = direction * np.median(np.diff(positions))
    affine[:3, 1] = along_rows * first.pixel_size[0]
    affine[:3, 2] = along_columns * first.pixel_size[1]
    affine[:3, 3] = base[0]

    def read(time: int) -> NDArray[Any]:
        return _pixels([frames[group[time]] for group in columns], place)

    # 8 bytes: pixels, and the sum of slope and intercept
    check_size(len(columns) * first.shape[0] * first.shape[1] * 8, place)
    return StoredVolume(read, times, LPS.convert_affine(affine, world), "mm", positions=positions)


def _pixels(frames: Sequence[_Frame], place: Path) -> NDArray[Any]:
    """Read, decode and rescale; integers stay integers when the scale allows it."""
    pydicom = _pydicom()
    whole = all(f.slope == 1.0 and f.intercept == round(f.intercept) for f in frames)
    images: list[NDArray[Any]] = []
    cache: dict[Path, NDArray[Any]] = {}
    for frame in frames:
        try:
            if frame.index is None:
                image = np.asarray(pydicom.dcmread(frame.file).pixel_array)
            else:
                if frame.file not in cache:
                    cache[frame.file] = np.asarray(pydicom.dcmread(frame.file).pixel_array)
                image = cache[frame.file][frame.index]
        except Exception as error:
            raise ValueError(
                f"path: the pixels of {frame.file.name!r} in {str(place)!r} can not be read: {error}."
            ) from error
        if image.shape[:2] != frame.shape:
            raise ValueError(
                f"path: {frame.file.name!r} has an image of shape {image.shape}, need {frame.shape}."
            )
        if not whole:
            image = (image * frame.slope + frame.intercept).astype(np.float32)
        elif any(f.intercept for f in frames):
            image = image.astype(np.int64) + int(frame.intercept)
            image = image.astype(np.int32) if np.abs(image).max(initial=0) < 2**31 else image
        images.append(image)
    volume = np.stack(images)
    if volume.dtype in (np.int32, np.int64) and whole and any(f.intercept for f in frames):
        low, high = int(volume.min()), int(volume.max())
        if low >= -(2**15) and high < 2**15:
            volume = volume.astype(np.int16)
    return volume
