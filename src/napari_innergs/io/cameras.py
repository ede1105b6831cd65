"""Read cameras and photographs: COLMAP models, transforms.json."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.camera import Lens, check_factor
from napari_innergs.io import _colmap
from napari_innergs.io._camera_set import CameraSet, clean_name, named
from napari_innergs.io._pictures import (
    PICTURE_SUFFIXES,
    Folder,
    picture_size,
    read_mask,
    read_picture,
    sampling,
    straighten,
)
from napari_innergs.io._transforms import read_transforms
from napari_innergs.io.files import PathLike, check_size, need_file
from napari_innergs.photographs import Photographs, as_unit, block_mean

__all__ = ["CameraSet", "read_cameras", "read_photographs"]

_FEWEST = 3
# where COLMAP and the programs that call it put their models below a project's folder
_MODELS = ("sparse/0", "sparse", "colmap", "colmap/sparse/0", "colmap/sparse")
_TABLES = ("transforms.json", "transforms_train.json")


def read_cameras(path: PathLike, images: PathLike | None = None) -> CameraSet:
    """Read cameras.

    Parameters
    ----------
    path : path
        - a folder with a COLMAP model, binary or text (``cameras``, ``images``, perhaps ``points3D``), or one of its
          files;
        - ``transforms.json`` of nerfstudio or instant-ngp, or of Blender (``camera_angle_x`` only);
        - a folder with one of them at the usual place.
    images : path, optional
        Folder of the photographs; only needed for files that do not say how large they are.

    Returns
    -------
    CameraSet
        Names, cameras (pinhole), lenses, sparse points and their colours, in a world (z, y, x): the file's
        (x, y, z) reversed.

    Raises
    ------
    ValueError
        Naming the file, if it is damaged, truncated, mirrored, or has camera models that are not understood.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     frame = {"file_path": "a.png", "transform_matrix": np.eye(4).tolist()}
    ...     table = {"w": 8, "h": 6, "fl_x": 10, "frames": [frame]}
    ...     _ = Path(f"{folder}/transforms.json").write_text(json.dumps(table))
    ...     read_cameras(folder).cameras[0].size
    (6, 8)
    """
    place = need_file(path)
    model: tuple[Path, str] | None = None
    table: Path | None = None
    if place.is_dir():
        model = _colmap.find_model(place)
        if model is None:
            table = next((place / name for name in _TABLES if (place / name).is_file()), None)
        if model is None and table is None:
            model = next(filter(None, (_colmap.find_model(place / inner) for inner in _MODELS)), None)
    elif place.suffix.lower() == ".json":
        table = place
    elif place.stem in ("cameras", "images", "points3D"):
        # one of two models in the folder may be asked for
        own = place.suffix.lower()
        both = all((place.parent / f"{part}{own}").is_file() for part in ("cameras", "images"))
        model = (place.parent, own) if both else _colmap.find_model(place.parent)
    if table is not None:
        file = need_file(table)
        roots = _roots(file.parent, images, "transforms")

        def size_of(name: str) -> tuple[int, int]:
            for root in roots:
                found = root.find(name)
                if found is not None:
                    return picture_size(found)
            raise ValueError(
                f"path: {str(file)!r} has no 'w' and 'h', and the photograph {name!r} is not there; need one of both."
            )

        return read_transforms(file, size_of)
    if model is None:
        raise ValueError(
            f"path: {str(path)!r} holds no cameras, need a folder with a COLMAP model (cameras and images, .bin or "
            ".txt) or a transforms.json."
        )
    return _colmap.read_model(*model)


def read_photographs(
    path: PathLike, images: PathLike | None = None, masks: PathLike | None = None, *, factor: int = 1
) -> Photographs:
    """Read photographs together with their cameras.

    The lens's distortion is taken out. An alpha channel becomes the mask, and colours are multiplied by it, as if
    seen before black; so they are with masks from files. Photographs that are missing, or whose mask is empty, are
    left out with a warning.

    Parameters
    ----------
    path : path
        As for :func:`read_cameras`.
    images : path, optional
        Folder of the photographs. Default: beside `path`, where the usual programs put them.
    masks : path, optional
        Folder of masks (bright: object), named as the photographs, with another ending or ``.png`` appended. Default:
        alpha, or the masks that the file names.
    factor : int
        Average squares of so many pixels along a side.

    Returns
    -------
    Photographs
        uint8 where nothing was computed, else float32.

    Raises
    ------
    ValueError
        Naming the file, if one is damaged, fewer than three photographs are left, sizes are mixed, masks are missing
        for some, or memory does not suffice.
    """
    found = read_cameras(path, images)
    places = _find_pictures(found, images)
    keep = [i for i, place in enumerate(places) if place is not None]
    cure = "give the folder of the photographs as images" if len(keep) < len(found) else "take more"
    _need_views(len(keep), f"of {len(found)} cameras have photographs", cure)
    names = [found.names[i] for i in keep]
    cameras = [found.cameras[i] for i in keep]
    files = [place for place in places if place is not None]
    size = cameras[0].size
    for name, camera, file in zip(names, cameras, files, strict=True):
        if camera.size != size:
            raise ValueError(
                f"path: mixed sizes: {name!r} has {_pixels(camera.size)}, {names[0]!r} {_pixels(size)}; need one "
                "size, crop or scale them before the cameras are computed."
            )
        if (real := picture_size(file)) != size:
            raise ValueError(
                f"images: {str(file)!r} has {_pixels(real)}, its camera {_pixels(size)}; need the photographs that "
                "the cameras were computed from."
            )
    step = check_factor(factor, size)
    smaller = (size[0] // step, size[1] // step)
    check_size(len(keep) * smaller[0] * smaller[1] * 32 + size[0] * size[1] * 100, files[0])
    covers = _find_masks(found, keep, masks)
    pixels: list[NDArray[Any]] = []
    shades: list[NDArray[np.float32] | None] = []
    trusted: list[NDArray[np.bool_]] = []
    last: tuple[Lens, bytes] | None = None
    for i, file, cover in zip(keep, files, covers, strict=True):
        colours, alpha = _read_one(file, cover, size)
        lens = found.lenses[i]
        valid = np.ones(size, dtype=bool)
        if alpha is not None or not lens.is_ideal or step > 1:
            plain = as_unit(colours)
            layers = [plain] if alpha is None else [plain * alpha[..., np.newaxis], alpha]
            if not lens.is_ideal:
                # photographs of one lens share its camera, and mostly follow each other
                key = (lens, found.cameras[i].intrinsics.tobytes())
                if key != last:
                    last, sources = key, sampling(lens, found.cameras[i])
                layers = [straighten(layer, sources) for layer in layers]
                valid = sources[2]
            if step > 1:
                layers = [block_mean(layer, step) for layer in layers]
                valid = block_mean(valid, step) == 1
            colours, alpha = layers[0], layers[1] if alpha is not None else None
        pixels.append(colours)
        shades.append(alpha)
        trusted.append(valid)
    chosen = _with_object(names, shades, trusted)
    masked = chosen is not None and shades[chosen[0]] is not None
    if chosen is None:
        chosen = list(range(len(names)))
    return Photographs(
        _stack([pixels[i] for i in chosen]),
        [cameras[i].downsampled(step) for i in chosen],
        np.stack([shades[i] for i in chosen]) if masked else None,  # type: ignore[misc]
        [names[i] for i in chosen],
        found.points,
        found.colours,
        valid=None if all(one.all() for one in trusted) else np.stack([trusted[i] for i in chosen]),
    )


def _pixels(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def _need_views(count: int, what: str, cure: str) -> None:
    if count < _FEWEST:
        raise ValueError(f"path: {count} {what}, need at least {_FEWEST}; {cure}.")


def _read_one(
    file: Path, cover: Path | None, size: tuple[int, int]
) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Read a photograph and what covers it: its alpha, its mask, or both."""
    colours, alpha = read_picture(file)
    if cover is None:
        return colours, alpha
    mask = read_mask(cover)
    if mask.shape != size:
        raise ValueError(
            f"masks: {str(cover)!r} has {_pixels(mask.shape)}, its photograph {_pixels(size)}; need one size."
        )
    return colours, mask if alpha is None else alpha * mask


def _stack(pixels: list[NDArray[Any]]) -> NDArray[Any]:
    """Join photographs; eight bits and others become floating point together."""
    if len({one.dtype for one in pixels}) > 1:
        pixels = [as_unit(one) for one in pixels]
    return np.stack(pixels)


def _folder(path: PathLike, name: str, what: str) -> Path:
    place = Path(path)
    if not place.is_dir():
        raise ValueError(f"{name}: {str(path)!r} is no folder, need the folder of {what}.")
    return place


def _roots(folder: Path, images: PathLike | None, kind: str) -> list[Folder]:
    """Folders in which the photographs may be."""
    if images is not None:
        return [Folder(_folder(images, "images", "the photographs"), given=True)]
    if kind == "transforms":
        return [Folder(folder)]
    parent = folder.resolve().parent
    above = (folder, parent, parent.parent, parent.parent.parent)
    return [Folder(place / "images") for place in above if (place / "images").is_dir()] + [Folder(folder)]


def _find_pictures(found: CameraSet, images: PathLike | None) -> list[Path | None]:
    """Find the photograph of each camera, and warn of what has no partner."""
    best: list[Path | None] = []
    chosen = None
    for root in _roots(found.folder, images, found.kind):
        places = [root.find(name) for name in found.names]
        if chosen is None or sum(place is not None for place in places) > sum(
            place is not None for place in best
        ):
            best, chosen = places, root
    missing = [name for name, place in zip(found.names, best, strict=True) if place is None]
    if missing and len(missing) < len(best):
        warnings.warn(
            f"images: {len(missing)} of {len(best)} cameras have no photograph and are left out, the first are "
            f"{named(missing)}; add the files, or give their folder as images.",
            stacklevel=3,
        )
    twice = [place for place, count in Counter(best).items() if place is not None and count > 1]
    if twice:
        raise ValueError(f"images: {str(twice[0])!r} is the photograph of two cameras, need one for each.")
    if chosen is None or len(missing) == len(best):
        return best
    known = {place for place in (*best, *_of_other_splits(found, chosen)) if place is not None}
    # only folders in which photographs were found: a project's folder holds other pictures too
    homes = {place.parent for place in best if place is not None}
    alone = sorted(
        place
        for home in homes
        for place in home.iterdir()
        if place.suffix.lower() in PICTURE_SUFFIXES and place not in known
    )
    if alone:
        warnings.warn(
            f"images: {len(alone)} photographs have no camera and are left out, the first are "
            f"{named([place.name for place in alone])}; compute their cameras to use them.",
            stacklevel=3,
        )
    return best


def _of_other_splits(found: CameraSet, root: Folder) -> set[Path | None]:
    """Photographs that another transforms*.json of the folder names: training, validation, test."""
    out: set[Path | None] = set()
    if found.kind != "transforms":
        return out
    for file in sorted(found.folder.glob("transforms*.json")):
        try:
            frames = json.loads(file.read_text(encoding="utf-8-sig"))["frames"]
            names = [clean_name(frame["file_path"]) for frame in frames]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # not the file that was asked for: what is wrong with it does not matter here
            continue
        out |= {root.find(name) for name in names}
    return out


def _find_masks(found: CameraSet, keep: list[int], masks: PathLike | None) -> list[Path | None]:
    names = [found.names[i] for i in keep]
    if masks is None:
        given = [found.mask_names[i] for i in keep]
        root = Folder(found.folder)
        out = [None if mask is None else root.find(mask) for mask in given]
        lost = [mask for mask, place in zip(given, out, strict=True) if mask is not None and place is None]
        if lost:
            raise ValueError(
                f"masks: {len(lost)} of the masks that the file names are missing, the first are {named(lost)}; "
                "give their folder as masks."
            )
        return out
    root = Folder(_folder(masks, "masks", "the masks"), given=True)
    # COLMAP appends .png to the whole name
    out = [root.find(f"{name}.png") or root.find(name, other_endings=True) for name in names]
    lost = [name for name, mask in zip(names, out, strict=True) if mask is None]
    if lost:
        raise ValueError(
            f"masks: {len(lost)} of {len(names)} photographs have no mask in {str(masks)!r}, the first are "
            f"{named(lost)}; need one for each, or none."
        )
    return out


def _with_object(
    names: list[str], masks: list[NDArray[np.float32] | None], valid: list[NDArray[np.bool_]]
) -> list[int] | None:
    """Give the photographs whose masks show something; None if the masks say nothing at all."""
    given = [mask for mask in masks if mask is not None]
    # an alpha channel of a program that always writes one; interpolation leaves rounding errors
    if all(mask is None or (mask[seen] > 1 - 1e-6).all() for mask, seen in zip(masks, valid, strict=True)):
        return None
    lost = [name for name, mask in zip(names, masks, strict=True) if mask is None]
    if lost:
        raise ValueError(
            f"masks: {len(lost)} of {len(names)} photographs have no alpha or mask, the first are {named(lost)}; "
            "need one for each, or none."
        )
    empty = [i for i, mask in enumerate(given) if not mask.any()]
    chosen = [i for i in range(len(names)) if i not in set(empty)]
    if empty:
        _need_views(len(chosen), f"of {len(names)} masks show an object", "give better masks")
        warnings.warn(
            f"masks: {len(empty)} of {len(names)} masks are empty and their photographs left out, the first are "
            f"{named([names[i] for i in empty])}; mend the masks to use them.",
            stacklevel=3,
        )
    return chosen
