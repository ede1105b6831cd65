"""From reconstructions to napari layers, on the layers they were made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np

from napari_innergs.data import restore_dtype
from napari_innergs.geometry.frames import unit_scale
from napari_innergs.geometry.grid import Grid
from napari_innergs.layers.read import METADATA_KEY, LayerView, Source

__all__ = [
    "METADATA_KEY",
    "axis_order",
    "gaussian_layers",
    "grid_layer",
    "json_only",
    "out_of_slice",
    "placement",
    "reconstruction_layers",
    "unit_factors",
    "volume_layers",
]

LayerData = tuple[Any, dict[str, Any], str]

# Unit icosahedron: the coarsest mesh that still looks like an ellipsoid.
_GOLDEN = (1 + 5**0.5) / 2
_VERTICES = np.array(
    [(-1, _GOLDEN, 0), (1, _GOLDEN, 0), (-1, -_GOLDEN, 0), (1, -_GOLDEN, 0)]
    + [(0, -1, _GOLDEN), (0, 1, _GOLDEN), (0, -1, -_GOLDEN), (0, 1, -_GOLDEN)]
    + [(_GOLDEN, 0, -1), (_GOLDEN, 0, 1), (-_GOLDEN, 0, -1), (-_GOLDEN, 0, 1)]
) / np.hypot(1, _GOLDEN)
_FACES = np.array(
    [
        (0, 11, 5),
        (0, 5, 1),
        (0, 1, 7),
        (0, 7, 10),
        (0, 10, 11),
        (1, 5, 9),
        (5, 11, 4),
        (11, 10, 2),
        (10, 7, 6),
    ]
    + [(7, 1, 8), (3, 9, 4), (3, 4, 2), (3, 2, 6), (3, 6, 8), (3, 8, 9), (4, 9, 5), (2, 4, 11), (6, 2, 10)]
    + [(8, 6, 7), (9, 8, 1)]
)


def json_only(report: Any) -> Any:
    """Return a copy of a report that holds JSON types only; what isn't JSON becomes text."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            return value.tolist()
        return str(value)

    return json.loads(json.dumps(report, default=plain))


def placement(affine: np.ndarray) -> dict[str, Any]:
    """Split an affine into layer arguments: scale and translate where they are enough, else scale and affine.

    Parameters
    ----------
    affine : ndarray, shape (n + 1, n + 1)
        Data to world.

    Returns
    -------
    dict
        `scale` and `translate`, or `scale` and `affine`; a scale is always given, so that the layer's
        `scale` is its spacing.
    """
    linear, shift = affine[:-1, :-1], affine[:-1, -1]
    scale = np.linalg.norm(linear, axis=0)
    rest = linear / scale
    if np.allclose(rest, np.eye(len(rest)), rtol=0, atol=1e-12):
        return {"scale": tuple(scale.tolist()), "translate": tuple(shift.tolist())}
    matrix = np.eye(len(affine))
    matrix[:-1, :-1] = rest
    matrix[:-1, -1] = shift
    return {"scale": tuple(scale.tolist()), "affine": matrix}


def axis_order(grid: Grid, like: np.ndarray) -> tuple[int, int, int]:
    """Return the order of a grid's axes in which they run along the axes of a layer.

    napari slices along data axes, so a result must have its axes in the order of the world's. A grid has them
    in the order of the stack (slice axis first).

    Parameters
    ----------
    grid : Grid
        The grid.
    like : ndarray, shape (3, 3)
        Linear part of the layer's affine.
    """
    ours = grid.affine[:3, :3] / grid.spacing
    theirs = like / np.linalg.norm(like, axis=0)
    likeness = np.abs(ours.T @ theirs)
    best = max(permutations(range(3)), key=lambda order: sum(likeness[order[i], i] for i in range(3)))
    return (best[0], best[1], best[2])


def _full_affine(grid: Grid, order: Sequence[int], view: LayerView, extra: bool) -> np.ndarray:
    """Affine of the result; an axis before the spatial ones (time, channels) stays as in the input."""
    spatial = grid.affine[:, [*order, 3]]
    spatial[:3] *= unit_factors(grid.units, view)[:, None]
    if not extra:
        return spatial
    out = np.eye(5)
    out[1:, 1:] = spatial
    out[0, 0], out[0, 4] = view.affine[0, 0], view.affine[0, 4]
    return out


def unit_factors(units: Sequence[str] | None, view: LayerView) -> np.ndarray:
    """Return the factors from a stack's one unit to the layer's, which may have one for each axis."""
    if units is None:
        return np.ones(3)
    return np.array([unit_scale(unit, str(own)) for unit, own in zip(units, view.units[-3:], strict=True)])


def volume_layers(
    volume: np.ndarray, grid: Grid, source: Source, *, name: str = "{}", restore: bool = True, **extra: Any
) -> list[LayerData]:
    """Place a volume on the layers it was made from.

    Parameters
    ----------
    volume : ndarray, shape (z, y, x), (z, y, x, c), or with time (t, ...) if `source` has all time points
        Intensities in the units of the input.
    grid : Grid
        Where it is.
    source : Source
        Where it came from: its channels decide whether the result is one layer, RGB, a channel axis or
        several layers.
    name : str
        Name of a layer; `{}` stands for the input's name.
    restore : bool
        Cast to the type of the input (rounded and clipped). RGB is always cast: napari shows it by its type.
    **extra
        More layer arguments, for all layers.

    Returns
    -------
    list of LayerData
        With scale, translate or affine, units, axis labels, contrast limits and colormap of the input.
    """
    view = source.view
    lead = 1 if source.all_times else 0
    order = axis_order(grid, view.affine[-4:-1, -4:-1])
    channels = volume.ndim - lead - 3
    axes = [*range(lead), *(lead + o for o in order), *([lead + 3] if channels else [])]
    data = volume.transpose(axes)
    if len(source.views) > 1:
        arrays = [data[..., c] for c in range(data.shape[-1])]
    elif source.view.rgb or not channels:
        arrays = [data]
    elif view.ndim == 4:
        arrays = [np.moveaxis(data, -1, 0)]
    else:
        arrays = [data[..., 0]]
    layers: list[LayerData] = []
    for array, one in zip(arrays, source.views, strict=True):
        has_extra = array.ndim - (1 if one.rgb else 0) == 4
        cast = one.dtype.kind in "iu" and (restore or one.rgb)
        labels = one.axis_labels if has_extra else one.axis_labels[-3:]
        kwargs: dict[str, Any] = {
            "name": name.format(one.name),
            "rgb": one.rgb,
            "units": one.units if has_extra else one.units[-3:],
            "axis_labels": labels,
            "blending": one.blending,
            **placement(_full_affine(grid, order, one, has_extra)),
        }
        if not one.rgb:
            kwargs |= {"contrast_limits": one.contrast_limits, "colormap": one.colormap, "gamma": one.gamma}
        kwargs |= extra
        layers.append((restore_dtype(array, one.dtype) if cast else array, kwargs, "image"))
    return layers


def grid_layer(volume: np.ndarray, grid: Grid, source: Source, **extra: Any) -> LayerData:
    """Place a scalar volume (z, y, x) or (t, z, y, x) that isn't an intensity: a distance, a difference."""
    view = source.view
    order = axis_order(grid, view.affine[-4:-1, -4:-1])
    lead = volume.ndim - 3
    data = volume.transpose([*range(lead), *(lead + o for o in order)])
    labels = view.axis_labels if lead else view.axis_labels[-3:]
    kwargs: dict[str, Any] = {
        "units": view.units if lead else view.units[-3:],
        "axis_labels": labels,
        **placement(_full_affine(grid, order, view, bool(lead))),
    }
    return data, {**kwargs, **extra}, "image"


def reconstruction_layers(
    results: Sequence[Any],
    source: Source,
    *,
    uncertainty: bool = False,
    distance: bool = False,
    gaussians: str = "none",
    limit: int = 5000,
) -> list[LayerData]:
    """Turn reconstructions into layers.

    Parameters
    ----------
    results : sequence of Reconstruction
        One, or one for each time point of `source`.
    source : Source
        What they were made from.
    uncertainty : bool
        Add the half-width of the 90 % band of the error, intensity units.
    distance : bool
        Add the distance to the nearest real slice, world units.
    gaussians : {"none", "points", "axes", "ellipsoids"}
        Add the Gaussians of the first result.
    limit : int
        Show at most so many Gaussians.

    Returns
    -------
    list of LayerData
        The volume's layers first.
    """
    first = results[0]
    grid: Grid = first.grid
    reports = [json_only(result.report) for result in results]
    metadata = {METADATA_KEY: reports[0] if not source.all_times else {"time_points": reports}}

    def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(arrays) if source.all_times else np.asarray(arrays[0])

    layers = volume_layers(
        join([result.volume for result in results]), grid, source, name="{} volume", metadata=metadata
    )
    if uncertainty and all(result.uncertainty is not None for result in results):
        band = join([result.uncertainty for result in results])
        if source.view.rgb:
            # as a scalar: the widest band of the colours
            band = band.max(axis=-1)
        top = float(np.percentile(band[:: max(1, len(band) // 16)], 99.5)) or 1.0
        look = {"colormap": "inferno", "contrast_limits": (0.0, top), "gamma": 1.0, "visible": False}
        look["metadata"] = {METADATA_KEY: {"kind": "half-width of the 90 % band of the error"}}
        name = "{} uncertainty"
        if source.view.rgb:
            layers.append(grid_layer(band, grid, source, name=name.format(source.view.name), **look))
        else:
            layers += volume_layers(band, grid, source, name=name, restore=False, **look)
    if distance and all(result.distance is not None for result in results):
        away = np.asarray(first.distance)
        look = {"colormap": "viridis", "contrast_limits": (0.0, float(away.max()) or 1.0), "visible": False}
        look["metadata"] = {METADATA_KEY: {"kind": "distance to the nearest real slice"}}
        layers.append(grid_layer(away, grid, source, name=f"{source.view.name} distance to slice", **look))
    if gaussians != "none" and first.model is not None:
        layers += gaussian_layers(
            first.model,
            kind=gaussians,
            limit=limit,
            name=f"{source.view.name} Gaussians",
            units=source.view.units[-3:],
            scale=tuple(unit_factors(grid.units, source.view).tolist()),
            axis_labels=source.view.axis_labels[-3:],
        )
    return layers


def gaussian_layers(model: Any, *, kind: str = "points", limit: int = 5000, **extra: Any) -> list[LayerData]:
    """Show Gaussians as points, principal axes or ellipsoids, in world coordinates.

    Parameters
    ----------
    model : GaussianModel
        The Gaussians.
    kind : {"points", "axes", "ellipsoids"}
        Points: sized by the geometric mean of the standard deviations (diameter 2 sigma). Axes: three
        vectors from
        -sigma to +sigma. Ellipsoids: one mesh of the 1-sigma surfaces.
    limit : int
        At most so many: points are sub-sampled evenly, axes and ellipsoids are those of the largest volume.
    **extra
        More layer arguments.
    """
    means, sigmas, axes = model.means, model.scales, model.rotations
    # several channels: their mean; the layer has one colour
    amplitudes = model.amplitudes.mean(axis=1)
    count = len(means)
    size = np.cbrt(np.prod(sigmas, axis=1))
    if kind == "points":
        keep = np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int)) if count else np.arange(0)
    elif kind in ("axes", "ellipsoids"):
        keep = np.argsort(-size, kind="stable")[:limit]
    else:
        raise ValueError(f"kind: got {kind!r}, need 'points', 'axes' or 'ellipsoids'.")
    means, sigmas, axes, size, amplitudes = (a[keep] for a in (means, sigmas, axes, size, amplitudes))
    info: dict[str, Any] = {
        "metadata": {METADATA_KEY: {"kind": f"gaussians as {kind}", "shown": len(keep), "of": count}},
        **extra,
    }
    limits = (float(amplitudes.min()), float(amplitudes.max())) if len(keep) else (0.0, 1.0)
    limits = limits if limits[1] > limits[0] else (limits[0], limits[0] + 1.0)
    if kind == "points":
        info |= {
            "size": 2 * size,
            "features": {"amplitude": amplitudes, "sigma": size},
            "face_color": "amplitude",
            "face_colormap": "viridis",
            "face_contrast_limits": limits,
            "border_width": 0,
            **out_of_slice("rescale_spherical"),
            "opacity": 0.7,
        }
        return [(means, info, "points")]
    # columns of `axes` are directions: (n, axis, zyx)
    spokes = np.swapaxes(axes * sigmas[:, None, :], 1, 2)
    if kind == "axes":
        vectors = np.stack([means[:, None] - spokes, 2 * spokes], axis=2).reshape(-1, 2, 3)
        info |= {
            "features": {"amplitude": np.repeat(amplitudes, 3)},
            "edge_color": "amplitude",
            "edge_colormap": "viridis",
            "edge_contrast_limits": limits,
            "edge_width": float(np.median(size)) / 5 if len(keep) else 1.0,
            "vector_style": "line",
            **out_of_slice("all"),
        }
        return [(vectors, info, "vectors")]
    vertices = (means[:, None] + np.einsum("vk,nkd->nvd", _VERTICES, spokes)).reshape(-1, 3)
    faces = (_FACES[None] + (np.arange(len(means)) * len(_VERTICES))[:, None, None]).reshape(-1, 3)
    values = np.repeat(amplitudes, len(_VERTICES))
    info |= {"colormap": "viridis", "contrast_limits": limits, "opacity": 0.7, "shading": "smooth"}
    return [((vertices, faces, values), info, "surface")]


def out_of_slice(mode: str) -> dict[str, Any]:
    """Return the option that shows what lies near the slice: napari 0.9 renamed it."""
    from importlib.metadata import version

    major, minor = (int(part) for part in version("napari").split(".")[:2])
    return {"projection_mode": mode} if (major, minor) >= (0, 9) else {"out_of_slice_display": True}
