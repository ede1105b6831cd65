"""X-ray scans as layers: projections that know their geometry, the scanner in 3D, volumes, radiographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_innergs.geometry.frames import unit_scale
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry
from napari_innergs.io.scans import geometry_from_dict
from napari_innergs.layers.read import METADATA_KEY
from napari_innergs.layers.write import LayerData, gaussian_layers, json_only, out_of_slice, placement
from napari_innergs.scan import Scan

__all__ = [
    "WATER_PER_MM",
    "attenuation_layers",
    "describe_geometry",
    "field_of_layer",
    "free_view",
    "geometry_layers",
    "geometry_of_layer",
    "grid_of_layer",
    "make_scan",
    "projection_layers",
    "radiograph_layers",
    "render_radiographs",
    "scan_from_layer",
    "to_hounsfield",
    "view_layer",
    "volume_layer",
    "water_attenuation",
]

#: Attenuation of water at about 60 keV, 1/mm (NIST XCOM, with coherent scattering).
WATER_PER_MM = 0.0206

# Views that are drawn at most, spread evenly.
_DRAWN = 90
# Gap between radiographs side by side, as a share of their width.
_GAP = 0.06
# Pixels along the edge of a free view at most.
_WIDEST = 1024


def describe_geometry(geometry: XrayGeometry, grid: Grid | None = None, **facts: Any) -> dict[str, Any]:
    """Write a geometry as layer metadata.

    Parameters
    ----------
    geometry : XrayGeometry
        The scan.
    grid : Grid, optional
        Where the volume is wanted.
    **facts
        What else to keep; JSON types.

    Returns
    -------
    dict
        For a layer's ``metadata``; `geometry_of_layer` and `grid_of_layer` read it.
    """
    own: dict[str, Any] = {
        "kind": "projections",
        "geometry": {
            "mode": geometry.kind,
            "vectors": geometry.vectors.tolist(),
            "nDetector": list(geometry.detector_shape),
            "units": None if geometry.units is None else list(geometry.units),
            "angles_rad": geometry.angles.tolist(),
            "isocentre": geometry.isocentre.tolist(),
        },
    }
    if grid is not None:
        own["grid"] = {
            "shape": list(grid.shape),
            "affine": grid.affine.tolist(),
            "units": None if grid.units is None else list(grid.units),
        }
    return {METADATA_KEY: json_only({**own, **facts})}


def _own(layer: Any) -> Mapping[str, Any]:
    own = layer.metadata.get(METADATA_KEY)
    return own if isinstance(own, Mapping) else {}


def field_of_layer(layer: Any, name: str) -> Any:
    """Return what a layer's metadata say under a name (``"i0"``, ``"file"``, ``"array"``), None if nothing."""
    return _own(layer).get(name)


def _described(layer: Any) -> tuple[XrayGeometry, Grid | None] | None:
    table = _own(layer).get("geometry")
    if not isinstance(table, Mapping):
        return None
    shape = tuple(layer.data[0].shape if layer.multiscale else layer.data.shape)
    try:
        if table.get("vectors") is None:
            return geometry_from_dict(table, detector_shape=shape[-2:])
        units = table.get("units")
        geometry = XrayGeometry(
            table["vectors"],
            table.get("nDetector", shape[-2:]),
            str(table.get("mode", "cone")),
            tuple(units) if isinstance(units, list) else units,
            angles=table.get("angles_rad"),
            isocentre=table.get("isocentre"),
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"layer: the geometry in the metadata of {layer.name!r} is damaged: {error}"
        ) from error
    return geometry, None


def geometry_of_layer(layer: Any) -> XrayGeometry | None:
    """Return the geometry in a layer's metadata.

    Parameters
    ----------
    layer : napari.layers.Image
        Its ``metadata["napari-innergs"]["geometry"]`` is what `describe_geometry` writes, or any description
        that `geometry_from_dict` knows (``DSO``, ``DSD``, ``dDetector``, ``angles_rad``, ...).

    Returns
    -------
    XrayGeometry or None
        None if there is none.

    Raises
    ------
    ValueError
        If there is one that cannot be understood.
    """
    found = _described(layer)
    return None if found is None else found[0]


def grid_of_layer(layer: Any) -> Grid | None:
    """Return the grid in a layer's metadata, None if there is none.

    Raises
    ------
    ValueError
        If there is one that cannot be understood.
    """
    table = _own(layer).get("grid")
    if isinstance(table, Mapping):
        try:
            units = table.get("units")
            return Grid(table["shape"], table["affine"], tuple(units) if isinstance(units, list) else units)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise ValueError(
                f"layer: the grid in the metadata of {layer.name!r} is damaged: {error}"
            ) from error
    found = _described(layer)
    return None if found is None else found[1]


def _units(*things: XrayGeometry | Grid | None) -> tuple[str, str, str]:
    for thing in things:
        if thing is not None and thing.units is not None:
            return thing.units
    return ("pixel", "pixel", "pixel")


def _panel_place(geometry: XrayGeometry, grid: Grid | None, columns_aside: float = 0.0) -> dict[str, Any]:
    """Layer arguments that put views on the first axis and the panel's middle at 0 of the two others.

    Views lie where the planes of the volume do: napari's slider steps through both.
    """
    dv, du = geometry.pixel_size
    rows, cols = geometry.detector_shape
    volume = geometry.default_grid() if grid is None else grid
    first = float(volume.index_to_world(np.zeros(3))[0])
    return {
        "scale": (float(volume.spacing[0]), dv, du),
        "translate": (first, -0.5 * (rows - 1) * dv, (columns_aside - 0.5 * (cols - 1)) * du),
        # one unit, also for the views: napari's scale bar needs the same on all axes
        "units": _units(geometry, grid),
        "axis_labels": ("view", "v", "u"),
    }


def projection_layers(scan: Scan, **facts: Any) -> list[LayerData]:
    """Show a scan: its projections with their geometry, and the fields that came with it.

    Parameters
    ----------
    scan : Scan
        The scan.
    **facts
        What else the metadata shall hold, such as the ``file``.

    Returns
    -------
    list of LayerData
        The projections, (n, v, u), then the flat and the dark field if there are any, hidden.
    """
    name = scan.name or "scan"
    if scan.i0 is not None:
        facts["i0"] = np.asarray(scan.i0).tolist()
    facts["values"] = "counts" if scan.is_counts else "line integrals"
    look = {"contrast_limits": _limits(scan.projections), "colormap": "gray"}
    place = _panel_place(scan.geometry, scan.grid)
    metadata = describe_geometry(scan.geometry, scan.grid, **facts)
    layers: list[LayerData] = [
        (scan.projections, {"name": name, "metadata": metadata, **look, **place}, "image")
    ]
    for kind in ("flat", "dark"):
        field = getattr(scan, kind)
        if field is not None:
            own = {METADATA_KEY: {"kind": f"{kind} field"}}
            layers.append(
                (
                    field,
                    {"name": f"{name} {kind}", "metadata": own, "visible": False, **look, **place},
                    "image",
                )
            )
    return layers


def _limits(values: NDArray[Any], share: float = 99.9) -> tuple[float, float]:
    """Contrast limits from a sample of the values."""
    sample = np.asarray(values).ravel()
    sample = sample[:: max(1, sample.size // 200_000)]
    low, high = np.percentile(sample, [100 - share, share])
    low = min(0.0, float(low))
    return low, (float(high) if high > low else low + 1.0)


def scan_from_layer(
    layer: Any,
    geometry: XrayGeometry | None = None,
    grid: Grid | None = None,
    *,
    i0: ArrayLike | None = None,
    flat: ArrayLike | None = None,
    dark: ArrayLike | None = None,
) -> Scan:
    """Make a scan of a layer with projections.

    Parameters
    ----------
    layer : napari.layers.Image
        Views, rows, columns.
    geometry : XrayGeometry, optional
        Default: the one in the layer's metadata.
    grid : Grid, optional
        Default: the one in the layer's metadata, if the geometry is that one too.
    i0, flat, dark : optional
        As for `Scan`. Default for `i0`: what the metadata say, unless `flat` is given.

    Returns
    -------
    Scan
        The scan.

    Raises
    ------
    ValueError, TypeError
        If the layer is no stack of projections, has no geometry, or does not fit it.
    """
    if geometry is None:
        geometry = geometry_of_layer(layer)
        grid = grid_of_layer(layer) if grid is None else grid
        if geometry is None:
            raise ValueError(
                f"geometry: the layer {layer.name!r} has none in its metadata; describe the scan."
            )
    if i0 is None and flat is None:
        i0 = field_of_layer(layer, "i0")
    return make_scan(layer, geometry, grid, i0=i0, flat=flat, dark=dark)


def make_scan(
    layer: Any, geometry: XrayGeometry, grid: Grid | None = None, *, blank: bool = False, **fields: Any
) -> Scan:
    """Make a scan of a layer's pixels; its metadata are not looked at.

    Parameters
    ----------
    layer : napari.layers.Image or LayerView
        Views, rows, columns.
    geometry, grid
        As for `Scan`.
    blank : bool
        Take zeros instead of the pixels, for checks and estimates: lazy layers are not loaded.
    **fields
        ``i0``, ``flat`` and ``dark``, as for `Scan`.

    Raises
    ------
    ValueError, TypeError
        If the layer is no stack of projections, or does not fit the geometry.
    """
    data = layer.data[0] if layer.multiscale else layer.data
    if layer.rgb or data.ndim != 3:
        what = "colours" if layer.rgb else f"{data.ndim} dimensions"
        raise ValueError(f"layer: {layer.name!r} has {what}, need projections: views, rows, columns.")
    dtype = np.dtype(data.dtype)
    pixels = np.broadcast_to(np.zeros((), dtype), tuple(data.shape)) if blank else np.asarray(data)
    return Scan(pixels, geometry, grid, name=str(layer.name), **fields)


def geometry_layers(geometry: XrayGeometry, grid: Grid | None = None, name: str = "scan") -> list[LayerData]:
    """Draw a scanner: positions of the source, frames of the panel, central rays of the first view, the volume.

    Parameters
    ----------
    geometry : XrayGeometry
        The scan. Of many views, 90 spread evenly are drawn.
    grid : Grid, optional
        The volume. Default: ``geometry.default_grid()``.
    name : str
        Beginning of the layers' names.

    Returns
    -------
    list of LayerData
        Panels and volume (Vectors), first rays (Vectors), and for a cone beam sources (Points); world (z, y, x).
        The panels of a parallel beam, which may be anywhere along the rays, are drawn beside the volume.
    """
    volume = geometry.default_grid() if grid is None else grid
    drawn = np.unique(np.linspace(0, geometry.n_views - 1, min(_DRAWN, geometry.n_views)).round().astype(int))
    shown = geometry.subset(drawn)
    rows, cols = geometry.detector_shape
    around = np.array([(-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5)]) * (rows, cols)
    corners = shown.center[:, None] + around[:, :1] * shown.v[:, None] + around[:, 1:] * shown.u[:, None]
    box = volume.affine[:3, :3] @ np.diag(volume.shape)
    middle = volume.index_to_world(0.5 * (np.array(volume.shape) - 1))
    radius = 0.5 * float(np.linalg.norm(box, axis=0).max()) * 3**0.5
    if geometry.kind == "parallel":
        # from the panel's plane to a plane beyond the volume
        beyond = np.sum((middle - shown.center) * shown.direction, axis=1) + 1.2 * radius
        corners = corners + (beyond[:, None] * shown.direction)[:, None]
        starts = corners - 2.4 * radius * shown.direction[:, None]
    else:
        starts = np.broadcast_to(shown.source[:, None], corners.shape)
    frames = np.stack([corners, np.roll(corners, -1, axis=1) - corners], axis=2).reshape(-1, 2, 3)
    edges = np.array(
        [
            (middle + box @ (np.array(at) - 0.5), box[:, axis])
            for axis in range(3)
            for at in product((0, 1), repeat=3)
            if at[axis] == 0
        ]
    )
    ends = [corners.reshape(-1, 3), starts.reshape(-1, 3)]
    extent = float(np.ptp(np.concatenate(ends), axis=0).max())
    # so wide that it can be seen when the whole scanner is in sight
    width = max(0.01 * radius, 0.003 * extent)
    common: dict[str, Any] = {
        "units": _units(geometry, volume),
        "axis_labels": ("z", "y", "x"),
        "metadata": {METADATA_KEY: {"kind": "scan geometry", "drawn": len(drawn), "of": geometry.n_views}},
    }
    lines = {"edge_width": width, "vector_style": "line", **out_of_slice("all"), **common}
    # napari takes a few whole numbers for categories
    views = drawn.astype(float)
    last = float(max(geometry.n_views - 1, 1))
    layers: list[LayerData] = [
        (
            frames,
            {
                "name": f"{name} panels",
                "features": {"view": np.repeat(views, 4), "angle": np.repeat(np.degrees(shown.angles), 4)},
                "edge_color": "view",
                "edge_colormap": "viridis",
                "edge_contrast_limits": (0.0, last),
                **lines,
            },
            "vectors",
        ),
        (edges, {"name": f"{name} volume box", "edge_color": "orange", **lines}, "vectors"),
        (
            np.stack([starts[0], corners[0] - starts[0]], axis=1),
            {"name": f"{name} first view", "edge_color": "red", **lines},
            "vectors",
        ),
    ]
    if geometry.kind == "cone":
        layers.append(
            (
                np.array(shown.source),
                {
                    "name": f"{name} sources",
                    "features": {"view": views, "angle": np.degrees(shown.angles)},
                    "face_color": "view",
                    "face_colormap": "viridis",
                    "face_contrast_limits": (0.0, last),
                    "border_width": 0,
                    "size": 6 * width,
                    **out_of_slice("all"),
                    **common,
                },
                "points",
            )
        )
    return layers


def volume_layer(volume: np.ndarray, grid: Grid, name: str, **extra: Any) -> LayerData:
    """Place a volume (z, y, x) in the world of its grid.

    Parameters
    ----------
    volume : ndarray, shape (z, y, x)
        Attenuation per world unit, or its error.
    grid : Grid
        Where it is.
    name : str
        Of the layer.
    **extra
        More layer arguments.
    """
    kwargs: dict[str, Any] = {
        "name": name,
        "units": _units(grid),
        "axis_labels": ("z", "y", "x"),
        "contrast_limits": (0.0, max(_limits(volume)[1], 1e-12)),
        "colormap": "gray",
        **placement(grid.affine),
    }
    return volume, {**kwargs, **extra}, "image"


def attenuation_layers(
    result: Any,
    name: str,
    *,
    uncertainty: bool = True,
    gaussians: str = "none",
    limit: int = 5000,
    tv: NDArray[Any] | None = None,
    water: float | None = None,
) -> list[LayerData]:
    """Turn a reconstruction from projections into layers.

    Parameters
    ----------
    result : Reconstruction
        Volume, uncertainty, Gaussians and report.
    name : str
        Of the projections.
    uncertainty : bool
        Add the half-width of the 90 % band of the error, hidden.
    gaussians : {"none", "points", "axes", "ellipsoids"}
        Add the Gaussians.
    limit : int
        Show at most so many Gaussians.
    tv : ndarray, optional
        Volume of the total variation, to add, hidden.
    water : float, optional
        Attenuation of water per world unit: adds the volume in Hounsfield units.

    Returns
    -------
    list of LayerData
        The volume, in attenuation per world unit, first.
    """
    grid: Grid = result.grid
    report = json_only({**result.report, "unit": f"1/{_units(grid)[0]}"})
    layers = [volume_layer(result.volume, grid, f"{name} volume", metadata={METADATA_KEY: report})]
    if water is not None:
        values = to_hounsfield(result.volume, water)
        own: dict[str, Any] = {METADATA_KEY: {"kind": "Hounsfield units", "unit": "HU", "water": water}}
        top = max(_limits(values)[1], 0.0)
        layers.append(
            volume_layer(values, grid, f"{name} volume (HU)", metadata=own, contrast_limits=(-1000.0, top))
        )
    if tv is not None:
        own = {METADATA_KEY: {"kind": "total variation", "unit": f"1/{_units(grid)[0]}"}}
        layers.append(volume_layer(tv, grid, f"{name} total variation", visible=False, metadata=own))
    if uncertainty and result.uncertainty is not None:
        own = {METADATA_KEY: {"kind": "half-width of the 90 % band of the error"}}
        look: dict[str, Any] = {"colormap": "inferno", "visible": False, "metadata": own}
        layers.append(volume_layer(result.uncertainty, grid, f"{name} uncertainty", **look))
    if gaussians != "none" and result.model is not None:
        layers += gaussian_layers(
            result.model,
            kind=gaussians,
            limit=limit,
            name=f"{name} Gaussians",
            units=_units(grid),
            axis_labels=("z", "y", "x"),
        )
    return layers


def water_attenuation(units: Any, given: float | None = None) -> float:
    """Return the attenuation of water per world unit.

    Parameters
    ----------
    units : sequence of 3 str, or None
        Of the volume's world.
    given : float, optional
        A value of one's own, which is checked. Default: 0.0206 per millimetre, for about 60 keV.

    Returns
    -------
    float
        1 / world unit.

    Raises
    ------
    ValueError
        If it is not positive, or missing where the units are no lengths.

    Examples
    --------
    >>> round(water_attenuation(("cm", "cm", "cm")), 4)
    0.206
    """
    if given is not None:
        if not (np.isfinite(given) and given > 0):
            raise ValueError(f"water: got {given:g}, need a positive attenuation per world unit.")
        return float(given)
    try:
        return WATER_PER_MM * unit_scale("pixel" if units is None else str(units[0]), "mm")
    except ValueError:
        raise ValueError(
            "water: the scan's units are no lengths, so there is no default; give the attenuation of water per unit."
        ) from None


def to_hounsfield(volume: ArrayLike, water: float) -> NDArray[np.float32]:
    """Convert attenuation to Hounsfield units: 1000 (mu - mu_water) / mu_water.

    Parameters
    ----------
    volume : array_like
        Attenuation per world unit.
    water : float
        That of water, in the same unit.

    Returns
    -------
    ndarray of float32
        Air is -1000, water 0.

    Raises
    ------
    ValueError
        If `water` is not positive.

    Examples
    --------
    >>> to_hounsfield([0.0, 0.02, 0.04], 0.02).tolist()
    [-1000.0, 0.0, 1000.0]
    """
    mu = water_attenuation(None, water)
    return np.asarray(np.asarray(volume, np.float32) * np.float32(1000 / mu) - np.float32(1000))


def free_view(
    geometry: XrayGeometry,
    grid: Grid,
    azimuth: float = 0.0,
    elevation: float = 0.0,
    distance: float | None = None,
) -> XrayGeometry:
    """Make one view of a volume from anywhere, with a panel that holds all of it.

    Parameters
    ----------
    geometry : XrayGeometry
        The scan, whose kind of beam and distance are taken where none is given.
    grid : Grid
        The volume; the view looks at its middle.
    azimuth, elevation : float
        Angle about z as for a circular scan, and above the plane of rotation, radians.
    distance : float, optional
        From the source to the middle, world units; makes a cone of a parallel beam.

    Returns
    -------
    XrayGeometry
        One view, with pixels as large as the smallest edge of a voxel at the middle.

    Raises
    ------
    ValueError
        If the source would be inside the sphere around the volume.
    """
    sizes = np.array(grid.shape)
    middle = grid.index_to_world(0.5 * (sizes - 1))
    corners = grid.index_to_world(np.array(list(product(*((-0.5, size - 0.5) for size in sizes)))))
    half = radius = float(np.linalg.norm(corners - middle, axis=1).max())
    pixel = float(grid.spacing.min())
    if geometry.kind == "cone" or distance is not None:
        away = float(np.median(geometry.source_origin)) if distance is None else float(distance)
        if not away > radius:
            raise ValueError(
                f"distance: got {away:g}, need more than {radius:.4g}: the source must be outside the volume."
            )
        reach = away + radius
        # the edge of the sphere's shadow
        half = radius * reach / float(np.sqrt(away**2 - radius**2))
        pixel *= reach / away
    count = min(int(np.ceil(2 * half / pixel)), _WIDEST)
    options: dict[str, Any] = {
        "detector_shape": (count, count),
        "pixel_size": 2 * half / count,
        "elevation": elevation,
        "units": geometry.units,
    }
    view: XrayGeometry
    if geometry.kind == "cone" or distance is not None:
        view = ConeBeam.circular([azimuth], source_origin=away, source_detector=reach, **options)
    else:
        view = ParallelBeam.circular([azimuth], **options)
    to_middle = np.eye(4)
    to_middle[:3, 3] = middle
    return view.moved(to_middle)


def view_layer(image: NDArray[Any], geometry: XrayGeometry, name: str, **facts: Any) -> LayerData:
    """Show one rendered view.

    Parameters
    ----------
    image : ndarray (v, u)
        Line integrals.
    geometry : XrayGeometry
        The view.
    name : str
        Of the layer.
    **facts
        What else the metadata shall hold; JSON types.
    """
    place = _panel_place(geometry, None)
    own = {METADATA_KEY: json_only({"kind": "radiograph, free view", **facts})}
    kwargs = {
        "name": name,
        "metadata": own,
        "contrast_limits": _limits(image),
        "colormap": "gray",
        "scale": place["scale"][1:],
        "translate": place["translate"][1:],
        "units": place["units"][1:],
        "axis_labels": place["axis_labels"][1:],
    }
    return image, kwargs, "image"


def render_radiographs(
    result: Any, geometry: XrayGeometry, views: Sequence[int] | None = None, source: str = "volume"
) -> NDArray[np.float32]:
    """Compute what a scanner would see of a reconstruction.

    Parameters
    ----------
    result : Reconstruction
        From projections: attenuation per world unit.
    geometry : XrayGeometry
        Any scan in the same world.
    views : sequence of int, optional
        Which views; default all.
    source : {"volume", "model"}
        Rays through the voxels of the product, or exact integrals of the Gaussians.

    Returns
    -------
    ndarray (n, v, u) of float32
        Line integrals.

    Raises
    ------
    ValueError
        If `source` is unknown, "model" and there are no (additive) Gaussians, or a source is inside the volume.
    """
    chosen = geometry if views is None else geometry.subset(views)
    if source == "volume":
        from napari_innergs.operators.project import VoxelProjector

        return np.asarray(VoxelProjector(chosen, result.grid).apply(np.asarray(result.volume, np.float32)))
    if source != "model":
        raise ValueError(f"source: got {source!r}, need 'volume' or 'model'.")
    if result.model is None or result.model.field != "additive":
        raise ValueError("source: this result has no additive Gaussians; take 'volume'.")
    import torch

    from napari_innergs.operators.xray import render_xray

    model = result.model
    # about the isocentre: float32 is finest near 0
    middle = geometry.isocentre
    affine = np.eye(4)
    affine[:3, 3] = middle
    frames = chosen.to_index_frame(Grid((1, 1, 1), affine))
    covariances = model.covariances()[:, (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]
    images = render_xray(
        torch.from_numpy((model.means - middle).astype(np.float32)),
        torch.from_numpy(covariances.astype(np.float32)),
        torch.from_numpy(model.amplitudes.astype(np.float32)),
        torch.from_numpy(frames),
        chosen.detector_shape,
        kind=chosen.kind,
    )
    return np.asarray(images[:, 0].numpy())


def radiograph_layers(
    measured: NDArray[Any],
    rendered: NDArray[Any],
    geometry: XrayGeometry,
    name: str,
    grid: Grid | None = None,
) -> list[LayerData]:
    """Show measured and rendered line integrals side by side, and what is left between them.

    Parameters
    ----------
    measured, rendered : ndarray (n, v, u)
        Line integrals.
    geometry : XrayGeometry
        The scan.
    name : str
        Of the projections.
    grid : Grid, optional
        The volume's, with which the slider steps. Default: ``geometry.default_grid()``.

    Returns
    -------
    list of LayerData
        Measured, rendered, residual (measured minus rendered): the same views, next to each other along u.
    """
    residual = np.asarray(measured, np.float32) - np.asarray(rendered, np.float32)
    width = geometry.detector_shape[1] * (1 + _GAP)
    limits = _limits(measured)
    most = max(-_limits(residual, 99.5)[0], _limits(residual, 99.5)[1])
    rms = float(np.sqrt(np.mean(np.square(residual, dtype=np.float64))))
    layers: list[LayerData] = []
    for number, (title, values, look) in enumerate(
        (
            ("measured", measured, {"contrast_limits": limits, "colormap": "gray"}),
            ("rendered", rendered, {"contrast_limits": limits, "colormap": "gray"}),
            ("residual", residual, {"contrast_limits": (-most, most), "colormap": "PiYG"}),
        )
    ):
        own: dict[str, Any] = {"kind": f"radiographs, {title}"}
        if title == "residual":
            own["rms"] = float(f"{rms:.6g}")
        layers.append(
            (
                values,
                {
                    "name": f"{name} {title}",
                    "metadata": {METADATA_KEY: own},
                    **look,
                    **_panel_place(geometry, grid, number * width),
                },
                "image",
            )
        )
    return layers
