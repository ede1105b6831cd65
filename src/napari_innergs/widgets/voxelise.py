"""The "Gaussians to volume" dock widget."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from magicgui.widgets import ComboBox, FileEdit, FloatSpinBox, SpinBox
from napari.layers import Image
from qtpy.QtWidgets import QLabel, QVBoxLayout, QWidget

from napari_innergs.fit.engine import Done, Event, Progress, background
from napari_innergs.geometry.grid import Grid
from napari_innergs.layers.read import LayerView
from napari_innergs.layers.write import METADATA_KEY, gaussian_layers, placement
from napari_innergs.widgets._form import MINIMUM_WIDTH, align_labels, column
from napari_innergs.widgets._qt import follow_layers
from napari_innergs.widgets._run_panel import RunPanel

BOX = "box around them"
SLAB = 8


class VoxeliseWidget(QWidget):
    """Turn a file of Gaussians into an image layer.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        Where the layer goes.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.setMinimumWidth(MINIMUM_WIDTH)
        self.viewer = napari_viewer
        self.path = FileEdit(
            label="File",
            mode="r",
            filter="Gaussians (*.ply *.npz)",
            tooltip="Gaussians as written by this package, or a 3D Gaussian splatting PLY.",
        )
        self.extent = ComboBox(
            label="Extent",
            choices=self._extents,
            tooltip="The box that holds all Gaussians, or the voxels of a layer.",
        )
        self.spacing = FloatSpinBox(
            label="Spacing",
            value=1.0,
            min=1e-6,
            max=1e6,
            step=0.1,
            tooltip="Distance between voxel centres in the Gaussians' world units (as in the file).",
        )
        self.gaussians = ComboBox(
            label="Also show",
            choices=["none", "points", "axes", "ellipsoids"],
            tooltip="Add the Gaussians themselves: points of 2 sigma across, principal axes, or 1-sigma "
            "surfaces.",
        )
        self.limit = SpinBox(
            label="At most", value=2000, min=1, max=200000, tooltip="Largest number of Gaussians to show."
        )
        self.form = column([self.path, self.extent, self.spacing, self.gaussians, self.limit])
        self.limit.visible = False
        self.panel = RunPanel(self._prepare)
        note = QLabel("Values are in the intensity units of the data the Gaussians were fitted to.")
        note.setWordWrap(True)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(4, 4, 4, 4)
        align_labels(self.form.native)
        layout.addWidget(self.form.native)
        layout.addWidget(note)
        layout.addWidget(self.panel)
        layout.addStretch(1)

        follow_layers(self, self.viewer, self._refresh)
        self.extent.changed.connect(self._on_extent)
        self.gaussians.changed.connect(lambda kind: setattr(self.limit, "visible", kind != "none"))
        self.panel.finished.connect(self._on_finished)

    def _extents(self, *_: Any) -> list[tuple[str, Any]]:
        layers = [
            (f"Voxels of {one.name}", one)
            for one in self.viewer.layers
            if isinstance(one, Image) and one.ndim == 3
        ]
        return [(BOX, BOX), *layers]

    def _refresh(self) -> None:
        self.extent.reset_choices()

    def _on_extent(self, extent: Any) -> None:
        self.spacing.enabled = extent == BOX

    def _prepare(self) -> Callable[[], Generator[Event, None, None]]:
        path = Path(self.path.value)
        if not path.is_file():
            raise ValueError(f"file: there is no file {str(path)!r}; choose a .ply or .npz file.")
        like = None if self.extent.value == BOX else LayerView.of(self.extent.value)
        return partial(
            _voxelise, path, like, float(self.spacing.value), self.gaussians.value, int(self.limit.value)
        )

    def _on_finished(self, tuples: list[Any]) -> None:
        for data, kwargs, kind in tuples:
            getattr(self.viewer, f"add_{kind}")(data, **kwargs)


def _voxelise(
    path: Path, like: LayerView | None, spacing: float, gaussians: str, limit: int
) -> Generator[Event, None, None]:
    """Load and sample plane by plane, so that it can be paused and cancelled; `Done` carries layer tuples."""
    progress = Progress()
    progress.enter("reading the file", 0.05)
    model = (yield from background([partial(_load, path)], progress))[0]
    if like is not None:
        grid = Grid(like.shape, like.affine, model.units)
    else:
        low, high = model.bounds()
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = low
        grid = Grid((np.floor((high - low) / spacing).astype(int) + 1).tolist(), affine, model.units)
    grid.check_memory(model.n_channels, 2.0)
    progress.enter("sampling the Gaussians", 0.95)
    slabs = [grid.crop(z=slice(start, start + SLAB)) for start in range(0, grid.shape[0], SLAB)]
    # one at a time: sampling uses all processors by itself
    parts = yield from background(
        [partial(model.voxelise, slab) for slab in slabs], progress, total=len(slabs), workers=1
    )
    volume = np.concatenate(parts)
    units = grid.units or (like.units if like is not None else ("pixel",) * 3)
    labels = like.axis_labels if like is not None else ("z", "y", "x")
    info: dict[str, Any] = {
        "units": units,
        "axis_labels": labels,
        "metadata": {
            METADATA_KEY: {"kind": "voxelised Gaussians", "file": path.name, "n_gaussians": len(model)}
        },
        **placement(grid.affine),
    }
    channels = [volume] if volume.ndim == 3 else list(np.moveaxis(volume, -1, 0))
    tuples = []
    for number, channel in enumerate(channels):
        name = path.stem if len(channels) == 1 else f"{path.stem} channel {number}"
        low_, high_ = float(channel.min()), float(channel.max())
        limits = (low_, high_ if high_ > low_ else low_ + 1.0)
        tuples.append(
            (np.ascontiguousarray(channel), {"name": name, "contrast_limits": limits, **info}, "image")
        )
    if gaussians != "none":
        tuples += gaussian_layers(
            model, kind=gaussians, limit=limit, name=f"{path.stem} Gaussians", units=units, axis_labels=labels
        )
    yield Done(tuples)


def _load(path: Path) -> Any:
    from napari_innergs.model import GaussianModel

    return GaussianModel.load(path)
