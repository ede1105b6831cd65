"""The shipped volumes and the layers the sample menu makes from them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

# Voxels in a slice of the thick stacks.
_THICK = 4

LayerData = tuple[np.ndarray, dict[str, Any], str]

_TITLES = {"brain": "T1 brain", "bone": "Bone", "cells": "Cells"}
_CHANNELS = {"cells": (("signal", "green"), ("background", "magenta"))}
# Fixed limits: the brightest voxels of the cells are artefacts that would darken everything else.
_CONTRAST = {"brain": ((0, 150),), "bone": ((0, 255),), "cells": ((150, 2000), (50, 700))}


@dataclass(frozen=True)
class Sample:
    """A shipped volume with its geometry.

    Attributes
    ----------
    data : ndarray, shape (z, y, x) or (z, y, x, c)
        Intensities as published.
    affine : ndarray, shape (4, 4)
        Index (z, y, x) to world (z, y, x), in `unit`.
    unit : str
        Unit of the world: "mm", "um" or "pixel".
    title : str
        Name to show.
    """

    data: np.ndarray
    affine: np.ndarray
    unit: str
    title: str


def names() -> tuple[str, ...]:
    """Return the names of the shipped volumes.

    Examples
    --------
    >>> names()
    ('brain', 'bone', 'cells')
    """
    return tuple(_TITLES)


def volume(name: str) -> Sample:
    """Return a shipped volume.

    Parameters
    ----------
    name : {"brain", "bone", "cells"}
        Which volume; `samples/data/NOTICE.md` says where each comes from.

    Raises
    ------
    ValueError
        If there is no volume of that name.

    Examples
    --------
    >>> volume("brain").data.shape
    (64, 96, 80)
    """
    if name not in _TITLES:
        raise ValueError(f"name: there is no sample {name!r}; use one of {', '.join(_TITLES)}")
    source = resources.files("napari_innergs.samples") / "data" / f"{name}.npz"
    with source.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        return Sample(archive["data"], archive["affine"], str(archive["unit"]), _TITLES[name])


def layers(name: str, keep_every: int = 1) -> list[LayerData]:
    """Return a shipped volume as napari layer tuples, one for each channel.

    Parameters
    ----------
    name : str
        As for `volume`.
    keep_every : int
        Keep every k-th slice along z only; the voxels get that much longer along z.
    """
    sample = volume(name)
    spacing = np.diag(sample.affine)[:3]
    kwargs: dict[str, Any] = {
        "scale": tuple(spacing * (keep_every, 1, 1)),
        "translate": tuple(sample.affine[:3, 3]),
        "units": (sample.unit,) * 3,
        "axis_labels": ("z", "y", "x"),
    }
    title = sample.title + (f" 1 of {keep_every}" if keep_every > 1 else "")
    data = sample.data[::keep_every]
    channels = _CHANNELS.get(name, (("", "gray"),))
    arrays = np.moveaxis(data, -1, 0) if data.ndim == 4 else data[None]
    return [
        (
            np.ascontiguousarray(array),
            {
                "name": f"{title} {channel}" if channel else title,
                "colormap": colormap,
                "contrast_limits": limits,
                "blending": "additive" if channel else "translucent_no_depth",
                **kwargs,
            },
            "image",
        )
        for array, (channel, colormap), limits in zip(arrays, channels, _CONTRAST[name], strict=True)
    ]


def _sparse(name: str, keep_every: int) -> list[LayerData]:
    """Every k-th slice, with the complete volume hidden below it to compare with."""
    complete = layers(name)
    for _, kwargs, _ in complete:
        kwargs["name"] += " complete"
        kwargs["visible"] = False
    return complete + layers(name, keep_every)


def brain() -> list[LayerData]:
    """Return the T1 brain, 1 mm voxels."""
    return layers("brain")


def brain_sparse() -> list[LayerData]:
    """Return every 4th slice of the T1 brain, and the complete volume hidden below."""
    return _sparse("brain", 4)


def brain_stacks() -> list[LayerData]:
    """Return the T1 brain as three orthogonal stacks of thick slices, and the complete volume hidden below.

    A slice is the mean of 4 voxels (a box profile of 4 mm, 4 mm apart) with noise of 1 % of the volume's range.
    The layers' metadata say so, for `SliceStack` and the dock widget.
    """
    ((data, kwargs, kind),) = layers("brain")
    kwargs["name"] += " complete"
    kwargs["visible"] = False
    out: list[LayerData] = [(data, kwargs, kind)]
    k = _THICK
    rng = np.random.default_rng(4)
    step, place = np.array(kwargs["scale"]), np.array(kwargs["translate"])
    for axis, title in enumerate(("axial", "coronal", "sagittal")):
        count = data.shape[axis] // k
        groups = np.moveaxis(data, axis, 0)[: count * k].reshape(count, k, *np.delete(data.shape, axis))
        means = groups.mean(1, dtype=np.float32)
        means += rng.normal(0, 0.01 * float(np.ptp(data)), means.shape).astype(np.float32)
        along = np.eye(3)[axis]
        own = {
            "name": f"T1 brain {title}",
            "visible": True,
            "scale": tuple(step * (1 + (k - 1) * along)),
            "translate": tuple(place + step * along * (k - 1) / 2),
            "metadata": {"napari-innergs": {"thickness": float(k * step[axis]), "profile": "box"}},
        }
        out.append((np.ascontiguousarray(np.moveaxis(means, 0, axis)), {**kwargs, **own}, kind))
    return out


def bone() -> list[LayerData]:
    """Return the trabecular bone."""
    return layers("bone")


def bone_sparse() -> list[LayerData]:
    """Return every 4th slice of the trabecular bone, and the complete volume hidden below."""
    return _sparse("bone", 4)


def cells() -> list[LayerData]:
    """Return the two-photon cells, two channels."""
    return layers("cells")


def cells_sparse() -> list[LayerData]:
    """Return every 2nd slice of the two-photon cells, and the complete volume hidden below."""
    return _sparse("cells", 2)
