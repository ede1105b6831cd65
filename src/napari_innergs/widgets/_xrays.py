"""What the docks that take X-rays have in common: the layer, its values, the scan and the grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from magicgui.widgets import ComboBox, FloatSpinBox
from napari.layers import Image
from napari.qt.threading import create_worker

from napari_innergs.fit.engine import Preview
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.layers.read import LayerView
from napari_innergs.layers.xray import field_of_layer, grid_of_layer, make_scan, volume_layer
from napari_innergs.scan import Scan
from napari_innergs.widgets._job import JobWidget
from napari_innergs.widgets._run_panel import complain
from napari_innergs.widgets._scan_form import AS_LAYER
from napari_innergs.widgets._script import layer_lines
from napari_innergs.widgets._worker import attempt

INTEGRALS, COUNTS = "line integrals", "counts"
SEEN, SPACING = "what the panel sees", "custom spacing"


@dataclass(frozen=True)
class XrayJob:
    """What every run on X-rays needs, taken from the form when Run is pressed."""

    view: LayerView
    geometry: XrayGeometry | None
    grid: Grid
    i0: Any
    flat: LayerView | None
    dark: LayerView | None
    config: Any
    device: str
    seed: int
    gaussians: str
    limit: int

    def scan(self, *, blank: bool = False) -> Scan:
        """Return the projections with their geometry; blank ones for checks."""
        flat, dark = (
            None
            if field is None
            else np.broadcast_to(np.zeros((), field.dtype), field.shape)
            if blank
            else np.asarray(field.data)
            for field in (self.flat, self.dark)
        )
        return make_scan(self.view, self.geometry, self.grid, blank=blank, i0=self.i0, flat=flat, dark=dark)


class XrayDock(JobWidget):
    """Base of the docks that take X-rays.

    A subclass makes `layer`, `values`, `i0` and `scan`, calls `_make_grid`, and fills in the methods below.
    """

    # -- what a subclass says --------------------------------------------------------------------------------

    def _offers(self, layer: Any) -> bool:
        """Whether a layer with three axes may be taken."""
        raise NotImplementedError

    def _field(self, kind: str) -> Any:
        """Return the layer of the flat or the dark field, None if there is none."""
        raise NotImplementedError

    def _take_file(self, found: Any) -> None:
        """Show what was read from a file."""
        raise NotImplementedError

    def _look_at(self, layers: list[Any]) -> None:
        """Show the first layers of a run, and hide what is no part of their world."""
        raise NotImplementedError

    # -- the form --------------------------------------------------------------------------------------------

    def _make_grid(self) -> list[Any]:
        """Make the choice of the grid, for a column."""
        self.grid = ComboBox(
            label="Grid",
            choices=self._grid_choices,
            tooltip="Where the volume is wanted: as in the layer's metadata, all that the panel sees, or that with "
            "voxels of your own.",
        )
        self.spacing = FloatSpinBox(
            label="Voxel size",
            value=1.0,
            min=1e-6,
            max=1e6,
            step=0.1,
            tooltip="Edge of the cubic voxels in the scan's unit of length.",
        )
        self.spacing.native.setDecimals(6)
        return [self.grid, self.spacing]

    def _layer_choices(self, *_: Any) -> list[tuple[str, Any]]:
        layers = [
            layer
            for layer in self.viewer.layers
            if isinstance(layer, Image) and not layer.rgb and layer.ndim == 3 and self._offers(layer)
        ]
        # those that say how they were taken come first
        layers.sort(key=lambda layer: not _is_described(layer))
        return [(layer.name, layer) for layer in layers]

    def _grid_choices(self, *_: Any) -> list[str]:
        layer = self.layer.value
        own = [] if layer is None or not _has_grid(layer) else [AS_LAYER]
        return [*own, SEEN, SPACING]

    def _prefer_described(self) -> None:
        """Take a layer that says how it was taken instead of one that does not."""
        if self.layer.value is not None and not _is_described(self.layer.value):
            better = [one for one in self.layer.choices if _is_described(one)]
            if better:
                self.layer.value = better[0]

    def _take_layer(self, layer: Any) -> None:
        """Fill in what a new layer says."""
        self.scan.take_layer(layer)
        # not the box's own order, in which new choices come last
        self.grid.value = self._grid_choices()[0]
        known = field_of_layer(layer, "values")
        if known not in (INTEGRALS, COUNTS):
            known = COUNTS if np.dtype(layer.dtype).kind in "iu" else INTEGRALS
        self.values.value = known
        i0 = field_of_layer(layer, "i0")
        self.i0.value = () if i0 is None else np.atleast_1d(np.asarray(i0, float)).tolist()

    # -- files -----------------------------------------------------------------------------------------------

    def _read_file(self, path: str | Path, read: Callable[..., Any], *arguments: Any) -> None:
        """Read a file in the background; `_take_file` shows it."""
        self.estimate_line.setText(f"Reading {Path(path).name}.")
        create_worker(attempt, read, Path(path), *arguments, _connect={"returned": self._on_read})

    def _on_read(self, found: Any) -> None:
        if isinstance(found, str):
            self.estimate_line.setText(found)
            complain(found)
        else:
            self._take_file(found)

    # -- the job ---------------------------------------------------------------------------------------------

    def _chosen_grid(self, layer: Any, geometry: XrayGeometry, name: str) -> tuple[Grid, str]:
        """Return the grid as chosen, and Python for it with that name of the geometry; empty if the layer says it."""
        if self.grid.value == AS_LAYER:
            own = grid_of_layer(layer)
            if own is None:
                raise ValueError(f"grid: the layer {layer.name!r} has none any more; choose {SEEN!r}.")
            return own, ""
        spacing = float(self.spacing.value) if self.grid.value == SPACING else None
        argument = "" if spacing is None else f"spacing={spacing!r}"
        return geometry.default_grid(spacing=spacing), f"{name}.default_grid({argument})"

    def _options(self, geometry: XrayGeometry | None, grid: Grid) -> dict[str, Any]:
        """Return the fields of an `XrayJob` from the form."""
        counts = geometry is not None and self.values.value == COUNTS
        i0 = self.i0.value if counts else ()
        flat, dark = (self._field(kind) if counts else None for kind in ("flat", "dark"))
        if counts and not i0 and flat is None:
            raise ValueError(
                "i0: counts need the blank scan, the counts without an object, or a flat field; give one of them."
            )
        return {
            "view": LayerView.of(self.layer.value),
            "geometry": geometry,
            "grid": grid,
            "i0": (i0[0] if len(i0) == 1 else list(i0)) if i0 else None,
            "flat": None if flat is None else LayerView.of(flat),
            "dark": None if dark is None else LayerView.of(dark),
            "config": self.form.config,
            "device": self.device.value,
            "seed": int(self.seed.value),
            "gaussians": self.gaussians.value,
            "limit": int(self.limit.value),
        }

    def _scan_lines(self, job: XrayJob, pixels: str) -> list[str]:
        """Return Python that makes the scan of pixels and `geometry`."""
        lines = []
        fields = [] if job.i0 is None else [f"i0={job.i0!r}"]
        for kind in ("flat", "dark"):
            if getattr(job, kind) is not None:
                lines += layer_lines(LayerView.of(self._field(kind)), kind)
                fields.append(f"{kind}=np.asarray({kind}.data)")
        arguments = ", ".join([pixels, "geometry", *fields, f"name={self.layer.value.name!r}"])
        return [*lines, f"scan = igs.Scan({arguments})"]

    def _preview_layers(self, preview: Preview, metadata: dict[str, Any]) -> list[Any]:
        name = f"{self._job.view.name} volume (preview)"
        return [volume_layer(preview.volume, preview.grid, name, metadata=metadata)]

    def _on_preview(self, preview: Preview) -> None:
        first = self._live is not None and not self._live.layers
        super()._on_preview(preview)
        if first and self._live is not None and self._live.layers:
            self._look_at(self._live.layers)

    def _show_layers(self, tuples: list[Any]) -> None:
        """Turn the preview into the result."""
        assert self._live is not None
        fresh = not self._live.layers
        layers = self._live.show(tuples)
        if fresh:
            self._look_at(layers)
        self.viewer.layers.selection.active = layers[0]

    def _to_the_middle(self, layer: Any) -> None:
        """Show the middle slice of a layer, if slices are shown."""
        if self.viewer.dims.ndisplay == 2:
            middle = np.asarray(layer.extent.world).mean(axis=0)
            self.viewer.dims.set_point(range(self.viewer.dims.ndim - 3, self.viewer.dims.ndim), middle)


def fields_with(layers: Any, layer: Any, kind: str) -> list[Any]:
    """Return those layers that are the flat or dark field that came with a layer of projections."""
    return [
        one
        for one in layers
        if isinstance(one, Image)
        and field_of_layer(one, "kind") == f"{kind} field"
        and one.name.startswith(layer.name)
    ]


def _is_described(layer: Any) -> bool:
    return field_of_layer(layer, "geometry") is not None


def _has_grid(layer: Any) -> bool:
    try:
        return grid_of_layer(layer) is not None
    except ValueError:
        return False
