"""Photographs as layers: stacks that know their cameras, both worlds in one scene, colours, rendered pictures."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.camera import Camera
from napari_innergs.geometry.grid import Grid
from napari_innergs.layers.read import METADATA_KEY
from napari_innergs.layers.write import LayerData, json_only, out_of_slice, placement
from napari_innergs.layers.xray import attenuation_layers
from napari_innergs.photographs import Photographs, as_unit

__all__ = [
    "camera_edges",
    "colour_layers",
    "dual_layers",
    "is_photographs",
    "landmark_layers",
    "moved_points",
    "photograph_layer",
    "photographs_of_layer",
    "picture_layers",
    "rough_transform",
    "scene_layers",
    "surface_layer",
]

FloatArray = NDArray[np.float64]

KIND = "photographs"
# Gap between pictures side by side, as a share of their width.
_GAP = 0.06
# How far a drawn camera reaches, as a share of the cameras' usual distance from their middle.
_REACH = 0.14
# Points of the surface and Gaussians with colour that are drawn at most.
_SURFACE, _SPLATS = 6000, 20_000
# Gaussians fainter than this are not drawn.
_FAINT = 0.1


def photograph_layer(photographs: Photographs, name: str, like: Any = None, **facts: Any) -> LayerData:
    """Show photographs as a stack that keeps cameras, masks and sparse points.

    Parameters
    ----------
    photographs : Photographs
        What to show.
    name : str
        Of the layer.
    like : napari.layers.Image, optional
        A layer of projections, beside which they are put, as high as its views.
    **facts
        What else the metadata shall hold, such as the ``file``; JSON types.

    Returns
    -------
    LayerData
        An RGB image (n, H, W, 3), or with masks (n, H, W, 4), alpha being the mask; `photographs_of_layer` reads it.
    """
    pixels: NDArray[Any] = photographs.images
    if photographs.masks is not None:
        alpha = photographs.masks[..., None]
        # layers are blended with alpha; photographs are multiplied by it already
        plain = as_unit(pixels) / np.maximum(alpha, 1e-6) * (alpha > 0)
        pixels = np.concatenate([plain.clip(0, 1), alpha], axis=-1)
    own: dict[str, Any] = {
        "kind": KIND,
        "names": list(photographs.names),
        "cameras": [
            {"intrinsics": camera.intrinsics.tolist(), "world_to_camera": camera.world_to_camera.tolist()}
            for camera in photographs.cameras
        ],
    }
    if photographs.points is not None:
        own["points"] = photographs.points.tolist()
        if photographs.point_colours is not None:
            own["point_colours"] = np.rint(255 * photographs.point_colours).astype(int).tolist()
    if photographs.valid is not None:
        own["valid"] = base64.b64encode(zlib.compress(np.packbits(photographs.valid).tobytes())).decode()
    rows = photographs.size[0]
    place: dict[str, Any] = {"scale": (1.0, 1.0, 1.0), "translate": (0.0, 0.0, 0.0), "units": ("pixel",) * 3}
    if like is not None and like.ndim == 3 and not like.rgb:
        ends = np.asarray(like.extent.world)
        pixel = float(np.ptp(ends[:, 1]) + like.scale[1]) / rows
        right = float(ends[1, 2] + 0.5 * like.scale[2] + _GAP * np.ptp(ends[:, 2]))
        middle = float(ends[:, 1].mean())
        place = {
            "scale": (float(like.scale[0]), pixel, pixel),
            "translate": (float(ends[0, 0]), middle - 0.5 * (rows - 1) * pixel, right + 0.5 * pixel),
            "units": tuple(str(unit) for unit in like.units),
        }
    kwargs = {
        "name": name,
        "rgb": True,
        "axis_labels": ("view", "row", "column"),
        "metadata": {METADATA_KEY: json_only({**own, **facts})},
        **place,
    }
    return pixels, kwargs, "image"


def is_photographs(layer: Any) -> bool:
    """Tell whether a layer holds photographs with their cameras."""
    own = layer.metadata.get(METADATA_KEY)
    return isinstance(own, Mapping) and own.get("kind") == KIND and bool(getattr(layer, "rgb", False))


def photographs_of_layer(layer: Any) -> Photographs:
    """Return the photographs that a layer shows, with their cameras.

    Parameters
    ----------
    layer : napari.layers.Image
        As `photograph_layer` makes it: RGB or RGBA, its metadata with ``cameras``, perhaps ``names``, ``points`` and
        ``point_colours``.

    Returns
    -------
    Photographs
        Multiplied by their masks, if there are some.

    Raises
    ------
    ValueError
        If the layer is none of photographs, or its metadata are damaged.
    """
    if not is_photographs(layer):
        raise ValueError(f"photographs: the layer {layer.name!r} has no cameras; open photographs first.")
    own = layer.metadata[METADATA_KEY]
    pixels = np.asarray(layer.data)
    shape = pixels.shape[:3]
    images, masks = pixels[..., :3], None
    if pixels.shape[-1] == 4:
        masks = as_unit(pixels[..., 3])
        images = as_unit(images) * masks[..., None]
    try:
        cameras = [
            Camera(table["intrinsics"], table["world_to_camera"], shape[1:]) for table in own["cameras"]
        ]
        points, colours = own.get("points"), own.get("point_colours")
        packed, valid = own.get("valid"), None
        if packed is not None:
            bits = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)
            valid = np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)
        return Photographs(
            images,
            cameras,
            masks,
            own.get("names"),
            None if points is None else np.asarray(points, np.float64),
            None if colours is None else np.asarray(colours, np.uint8),
            valid=valid,
        )
    except (KeyError, ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"photographs: the layer {layer.name!r} is damaged: {error}") from error


def moved_points(points: NDArray[Any], transform: FloatArray) -> FloatArray:
    """Apply a (4, 4) matrix to points (n, 3)."""
    return np.asarray(np.asarray(points, np.float64) @ transform[:3, :3].T + transform[:3, 3])


def rough_transform(photographs: Photographs, surface: FloatArray) -> FloatArray:
    """Return a similarity that lays the photographs' object over a surface in size and place, but not turned.

    Parameters
    ----------
    photographs : Photographs
        In their own world.
    surface : ndarray (m, 3)
        Points on the surface in the X-rays' world.

    Returns
    -------
    ndarray (4, 4)
        Photographs' world to X-rays' world: for a first look, and for landmarks to be picked in one scene.
    """
    from napari_innergs.fit.photos import object_frame

    middle = np.median(surface, axis=0)
    radius = float(np.percentile(np.linalg.norm(surface - middle, axis=1), 95))
    place = np.diag([radius, radius, radius, 1.0])
    place[:3, 3] = middle
    return np.asarray(place @ object_frame(photographs))


def camera_edges(photographs: Photographs) -> FloatArray:
    """Return what draws cameras: four edges from each centre and the four of its picture, (8 n, 2, 3), as vectors."""
    rows, columns = photographs.size
    centres = np.array([camera.centre for camera in photographs.cameras])
    reach = _REACH * (float(np.median(np.linalg.norm(centres - centres.mean(axis=0), axis=1))) or 1.0)
    edges = []
    for camera in photographs.cameras:
        at = np.array([-0.5, -0.5, rows - 0.5, rows - 0.5]), np.array([-0.5, columns - 0.5] * 2)
        _, rays = camera.rays(*at)
        # round the picture
        rays = rays[[0, 1, 3, 2]] / (rays[[0, 1, 3, 2]] @ camera.direction)[:, None]
        corners = camera.centre + reach * rays
        edges.append(
            np.stack([np.broadcast_to(camera.centre, corners.shape), corners - camera.centre], axis=1)
        )
        edges.append(np.stack([corners, np.roll(corners, -1, axis=0) - corners], axis=1))
    return np.concatenate(edges)


def _common(units: Any, kind: str) -> dict[str, Any]:
    return {
        "units": tuple(units),
        "axis_labels": ("z", "y", "x"),
        "metadata": {METADATA_KEY: {"kind": kind}},
    }


def scene_layers(
    photographs: Photographs, transform: FloatArray, name: str, units: Any = ("pixel",) * 3
) -> list[LayerData]:
    """Draw the cameras and the sparse points of photographs in the world of the X-rays.

    Parameters
    ----------
    photographs : Photographs
        In their own world.
    transform : ndarray (4, 4)
        Their world to that of the X-rays.
    name : str
        Beginning of the layers' names.
    units : sequence of 3 str
        Of the X-rays' world.

    Returns
    -------
    list of LayerData
        Cameras (Vectors), coloured by number; and the points (Points) in their colours, if there are some.
    """
    edges = camera_edges(photographs)
    starts = moved_points(edges[:, 0], transform)
    vectors = np.stack([starts, edges[:, 1] @ transform[:3, :3].T], axis=1)
    extent = float(np.ptp(starts, axis=0).max()) or 1.0
    numbers = np.arange(len(photographs), dtype=float)
    layers: list[LayerData] = [
        (
            vectors,
            {
                "name": f"{name} cameras",
                "features": {"photograph": np.repeat(numbers, 8)},
                "edge_color": "photograph",
                "edge_colormap": "viridis",
                "edge_contrast_limits": (0.0, max(float(len(numbers) - 1), 1.0)),
                "edge_width": 0.003 * extent,
                "vector_style": "line",
                **out_of_slice("all"),
                **_common(units, "cameras"),
            },
            "vectors",
        )
    ]
    if photographs.points is not None and len(photographs.points):
        points = moved_points(photographs.points, transform)
        spread = float(np.median(np.linalg.norm(points - np.median(points, axis=0), axis=1))) or 1.0
        colours: Any = "yellow" if photographs.point_colours is None else photographs.point_colours
        layers.append(
            (
                points,
                {
                    "name": f"{name} points",
                    "face_color": colours,
                    "border_width": 0,
                    "size": 0.1 * spread,
                    **out_of_slice("all"),
                    **_common(units, "photo points"),
                },
                "points",
            )
        )
    return layers


def surface_layer(surface: FloatArray, name: str, units: Any = ("pixel",) * 3) -> LayerData:
    """Draw the surface of the X-rays' volume as points, at most some thousands.

    Parameters
    ----------
    surface : ndarray (m, 3)
        World (z, y, x).
    name : str
        Beginning of the layer's name.
    units : sequence of 3 str
        Of the world.
    """
    keep = np.unique(np.linspace(0, len(surface) - 1, min(_SURFACE, len(surface))).astype(int))
    points = np.asarray(surface, np.float64)[keep]
    spread = float(np.median(np.linalg.norm(points - np.median(points, axis=0), axis=1))) or 1.0
    kwargs = {
        "name": f"{name} surface",
        "face_color": "lightgray",
        "border_width": 0,
        "size": 0.03 * spread,
        "opacity": 0.4,
        **out_of_slice("all"),
        **_common(units, "surface of the X-rays"),
    }
    return points, kwargs, "points"


def landmark_layers(
    of_photographs: FloatArray, of_xrays: FloatArray, size: float, name: str, units: Any = ("pixel",) * 3
) -> list[LayerData]:
    """Show pairs of landmarks, numbered, in the world of the X-rays.

    Parameters
    ----------
    of_photographs, of_xrays : ndarray (n, 3)
        The same places, in the same order.
    size : float
        Of the points, world units.
    name : str
        Beginning of the layers' names.
    units : sequence of 3 str
        Of the world.
    """
    layers: list[LayerData] = []
    for what, points, colour, symbol in (
        ("photographs", of_photographs, "magenta", "disc"),
        ("X-rays", of_xrays, "cyan", "cross"),
    ):
        kwargs = {
            "name": f"{name} landmarks, {what}",
            "ndim": 3,
            "face_color": colour,
            "symbol": symbol,
            "size": size,
            **out_of_slice("all"),
            **_common(units, f"landmarks, {what}"),
        }
        layers.append((np.asarray(points, np.float64).reshape(-1, 3), kwargs, "points"))
    return layers


def colour_layers(result: Any, name: str, units: Any = ("pixel",) * 3) -> list[LayerData]:
    """Show the colours of a reconstruction: the shell of voxels, and the Gaussians as points.

    Parameters
    ----------
    result : Reconstruction
        Of photographs and X-rays.
    name : str
        Beginning of the layers' names.
    units : sequence of 3 str
        Of the world.

    Returns
    -------
    list of LayerData
        An RGBA volume, transparent away from the surface, hidden; and points, best seen in 3D.
    """
    layers: list[LayerData] = []
    grid: Grid = result.grid
    if result.colour is not None:
        colour = np.asarray(result.colour, np.float32)
        alpha = (colour > 0).any(axis=-1, keepdims=True).astype(np.float32)
        kwargs = {
            "name": f"{name} colour",
            "rgb": True,
            "visible": False,
            **_common(units, "colour of the surface"),
            **placement(grid.affine),
        }
        layers.append((np.concatenate([colour, alpha], axis=-1), kwargs, "image"))
    if result.splats is not None and len(result.splats):
        splats = result.splats
        solid = np.flatnonzero(splats.opacities > _FAINT)
        keep = solid[np.unique(np.linspace(0, len(solid) - 1, min(_SPLATS, len(solid))).astype(int))]
        colours = np.concatenate([splats.colours[keep], splats.opacities[keep, None]], axis=1)
        kwargs = {
            "name": f"{name} Gaussians with colour",
            "face_color": colours,
            "border_width": 0,
            # of two standard deviations to each side of the two wider axes
            "size": 4 * np.exp(np.sort(splats.log_scales[keep], axis=1)[:, 1:].mean(axis=1)),
            "shading": "none",
            "features": {"opacity": splats.opacities[keep]},
            **out_of_slice("rescale_spherical"),
            **_common(units, "Gaussians with colour"),
        }
        layers.append((splats.means[keep], kwargs, "points"))
    return layers


def dual_layers(
    result: Any, name: str, *, gaussians: str = "none", limit: int = 5000, uncertainty: bool = True
) -> list[LayerData]:
    """Turn a reconstruction from photographs and X-rays into layers.

    Parameters
    ----------
    result : Reconstruction
        Attenuation, colours, Gaussians and report.
    name : str
        Of the X-rays.
    gaussians : {"none", "points", "axes", "ellipsoids"}
        Also show the attenuation's Gaussians.
    limit : int
        At most so many of these.
    uncertainty : bool
        Add the half-width of the 90 % band of the error, where there is one, hidden.

    Returns
    -------
    list of LayerData
        The attenuation first.
    """
    layers = attenuation_layers(result, name, uncertainty=uncertainty, gaussians=gaussians, limit=limit)
    data, kwargs, kind = layers[0]
    transform = None if result.transform is None else np.asarray(result.transform).tolist()
    own = {**kwargs["metadata"][METADATA_KEY], "transform": transform}
    layers[0] = (data, {**kwargs, "metadata": {METADATA_KEY: own}}, kind)
    return [*layers, *colour_layers(result, name, kwargs["units"])]


def picture_layers(
    measured: NDArray[Any] | None,
    rendered: NDArray[Any],
    name: str,
    *,
    pixel: float = 1.0,
    units: Any = ("pixel",) * 2,
    **facts: Any,
) -> list[LayerData]:
    """Show a rendered picture beside the photograph from the same place.

    Parameters
    ----------
    measured : ndarray (H, W, 3), optional
        The photograph, 0 to 1.
    rendered : ndarray (H, W, 3)
        The picture, 0 to 1.
    name : str
        Beginning of the layers' names.
    pixel : float
        Edge of a pixel in the canvas.
    units : sequence of 2 str
        Of that.
    **facts
        What the metadata shall hold; JSON types.

    Returns
    -------
    list of LayerData
        The picture, and the photograph, if there is one, to its left.
    """
    across = pixel * rendered.shape[1] * (1 + _GAP)
    pictures = [("photograph rendered", rendered, 0.0 if measured is None else across)]
    if measured is not None:
        pictures.append(("photograph", measured, 0.0))
    layers: list[LayerData] = []
    for what, picture, left in pictures:
        kwargs = {
            "name": f"{name} {what}",
            "rgb": True,
            "scale": (pixel, pixel),
            "translate": (0.0, left),
            "units": tuple(units),
            "axis_labels": ("row", "column"),
            "metadata": {METADATA_KEY: json_only({"kind": f"picture, {what}", **facts})},
        }
        layers.append((np.asarray(picture, np.float32), kwargs, "image"))
    return layers
