"""The "Photos + X-rays" dock widget."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np
from magicgui.widgets import ComboBox, FileEdit, SpinBox
from qtpy.QtWidgets import QFileDialog

from napari_innergs.config_dual import DUAL_PRESETS, DualConfig
from napari_innergs.fit.engine import Done, Event, Preview, Progress, Step, background
from napari_innergs.geometry.grid import Grid
from napari_innergs.io.cameras import read_photographs
from napari_innergs.layers.photographs import (
    dual_layers,
    is_photographs,
    photograph_layer,
    photographs_of_layer,
)
from napari_innergs.layers.read import LayerView
from napari_innergs.layers.write import METADATA_KEY
from napari_innergs.layers.xray import field_of_layer
from napari_innergs.photographs import Photographs
from napari_innergs.scan import Scan
from napari_innergs.widgets._alignment import AlignmentForm
from napari_innergs.widgets._form import ConfigForm, Numbers, column, push_button
from napari_innergs.widgets._job import buttons, cost_in_words, look_at
from napari_innergs.widgets._photo_views import LivePictures, PhotoViews, Slot
from napari_innergs.widgets._radiographs import Radiographs
from napari_innergs.widgets._run_panel import complain
from napari_innergs.widgets._scan_form import ScanForm
from napari_innergs.widgets._script import config_code, file_stem, layer_lines
from napari_innergs.widgets._worker import until_done
from napari_innergs.widgets._xrays import COUNTS, INTEGRALS, SPACING, XrayDock, XrayJob, fields_with

PROJECTIONS, VOLUME = "projections", "a volume"
# Pictures of a run at most so often, and for at most this share of its time.
PICTURE_S, PICTURE_SHARE = 1.5, 0.1


@dataclass(frozen=True)
class PhotoSource:
    """What a layer of photographs holds, taken in the main thread."""

    name: str
    data: Any
    metadata: dict[str, Any]
    rgb: bool = True

    @classmethod
    def of(cls, layer: Any) -> PhotoSource:
        """Take it from a layer."""
        return cls(str(layer.name), layer.data, dict(layer.metadata))


@dataclass(frozen=True)
class DualRun(XrayJob):
    """All that a run needs, taken from the form when Run is pressed."""

    source: PhotoSource
    pose: dict[str, Any] = field(default_factory=dict)

    def photographs(self) -> Photographs:
        """Return the photographs."""
        return photographs_of_layer(self.source)

    def xrays(self, *, blank: bool = False) -> tuple[Scan | None, np.ndarray | None]:
        """Return the scan, or the volume given in its place."""
        if self.geometry is None:
            return None, np.asarray(self.view.data)
        return self.scan(blank=blank), None

    def scene_key(self) -> tuple[Any, ...]:
        """Return what a scene depends on."""
        return (id(self.view.data), id(self.source.data), self.geometry, self.grid)


@dataclass(frozen=True)
class Product:
    """What a run made: layers, and what pictures are made of."""

    tuples: list[Any]
    result: Any
    scan: Scan | None
    photographs: Photographs
    sentence: str


def run_job(job: DualRun, slot: Slot) -> Generator[Event, None, None]:
    """Fit both; `Done` carries a `Product`, and the slot is given pictures on the way."""
    progress = Progress()
    progress.enter("reading the layers", 0.01)
    fit, photographs, (scan, volume) = yield from background([_engine, job.photographs, job.xrays], progress)
    given: dict[str, Any] = {"volume": volume} if scan is None else {}
    running: list[Any] = []
    # what is wrong with the numbers is said by the check of the arguments
    steps = fit(
        scan,
        None,
        photographs,
        None,
        job.grid,
        job.config,
        device=job.device,
        seed=job.seed,
        watch=running.append,
        **given,
        **job.pose,
    )
    (state,) = running
    result = yield from until_done(_with_pictures(steps, state, photographs, slot))
    if result is None:
        return
    progress.enter("making layers", 1.0)
    make = partial(dual_layers, result, job.view.name, gaussians=job.gaussians, limit=job.limit)
    tuples = (yield from background([make], progress))[0]
    yield Done(Product(tuples, result, scan, photographs, _verdict(result.report)))


def _with_pictures(
    events: Generator[Event, None, None], state: Any, photographs: Photographs, slot: Slot
) -> Generator[Event, None, None]:
    """Pass on the events of a fit, and put pictures of it into the slot."""
    due = 0.0
    with closing(events):
        for event in events:
            yield event
            # only between the steps of a fit: nothing is being changed then
            still = isinstance(event, Step) and event.loss is not None
            if (still or isinstance(event, Preview)) and time.monotonic() > due:
                begin = time.monotonic()
                slot.put(pictures_of(state, photographs))
                took = time.monotonic() - begin
                due = begin + max(PICTURE_S, took / PICTURE_SHARE)


def _engine() -> Callable[..., Any]:
    # a function of its own because it imports torch, which takes seconds: it runs in the background
    from napari_innergs.tasks.dual import fit_dual

    return fit_dual


def pictures_of(state: Any, photographs: Photographs) -> dict[str, np.ndarray]:
    """Render one photograph and one radiograph of a run as it stands.

    Parameters
    ----------
    state : DualJob
        Between two steps.
    photographs : Photographs
        What it is fitted to.

    Returns
    -------
    dict
        Pictures from 0 to 1, by the names of `LivePictures`.
    """
    import torch

    pictures: dict[str, np.ndarray] = {}
    if state.splats is not None:
        camera = state.framed.cameras[0]
        with torch.no_grad():
            image, _ = state.splats.render(camera, backend=state.device.name)
        pictures["photograph measured"] = photographs.image(0)
        pictures["photograph rendered"] = image.cpu().numpy()
    data = getattr(getattr(state, "job", None), "data", None)
    if state.scan is not None and data is not None and state.volume is not None:
        geometry = state.scan.geometry.subset([0])
        if state.dual is not None:
            from napari_innergs.fit.attenuation import render_radiographs

            seen = render_radiographs(state.dual.model(state.grid, state.scale), geometry)
        else:
            from napari_innergs.operators.project import VoxelProjector

            seen = VoxelProjector(geometry, state.grid).apply(np.asarray(state.volume, np.float32))
        top = float(np.percentile(data[0], 99.9)) or 1.0
        pictures["radiograph measured"] = np.asarray(data[0]) / top
        pictures["radiograph rendered"] = np.asarray(seen)[0] / top
    return pictures


def _estimate(job: DualRun) -> str:
    """Size of the input and the result, memory and time; runs in a worker: it imports torch."""
    from napari_innergs.tasks.dual import estimate_dual

    count, rows, columns = job.source.data.shape[:3]
    shape = " × ".join(str(size) for size in job.grid.shape)
    scan, _ = job.xrays(blank=True)
    memory, duration = cost_in_words(estimate_dual(scan, None, (count, rows, columns), job.grid, job.config))
    text = f"{count} photographs of {rows} × {columns}"
    if scan is None:
        return f"{text} and a volume of {shape} voxels; {memory}; about {duration} in all."
    doubt = scan.geometry.check_covers(job.grid)
    return (
        f"{text} and {scan.n_views} X-ray views to {shape} voxels; {memory}; about {duration} in all. {doubt or ''}"
    ).strip()


class DualWidget(XrayDock):
    """Make one model of an object's photographs and X-rays: colour outside, attenuation inside.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        The viewer whose layers are offered and to which the result is added.
    """

    DOCS = "https://github.com/napari-innergs/napari-innergs/blob/main/docs/dual.md"
    CONFIG = DualConfig
    SETTINGS = "dual.yaml"

    # -- making the form -------------------------------------------------------------------------------------

    def _make(self) -> None:
        self._known: Any = None
        self._inputs: Any = None
        self._result: Any = None
        self._make_xrays()
        self._make_photographs()
        self.scan = ScanForm(lambda: self.layer.value)
        # corrections are made in the dock for projections
        for button in (
            self.scan.check_button,
            self.scan.centre_button,
            self.scan.reverse_button,
            self.scan.refine_button,
            self.scan.draw_button,
        ):
            button.setVisible(False)
        self.alignment = AlignmentForm(self)
        self.form = ConfigForm(DualConfig, DUAL_PRESETS, "balanced")
        self.form.preset.tooltip = (
            "Fills the form: fast for a first look, balanced by default, best when time does not matter."
        )
        self.outputs = column(self._make_result_options())
        self.pictures = LivePictures()
        self.photo_views = PhotoViews(self)
        self.radiographs = Radiographs(self)
        self.export_button = push_button(
            "Export",
            "Write the last result to a folder: volumes, Gaussians, the report with the transform, and a PLY for "
            "viewers of splats.",
        )
        self.export_button.setEnabled(False)

    def _make_xrays(self) -> None:
        self.layer = ComboBox(
            label="X-rays",
            choices=self._layer_choices,
            tooltip="Projections (views, rows, columns), or a volume of attenuation (z, y, x).",
        )
        self.kind = ComboBox(
            label="They are",
            choices=[PROJECTIONS, VOLUME],
            tooltip="Projections with the geometry of their scan, or a CT volume that is there already.",
        )
        self.values = ComboBox(
            label="Values",
            choices=[INTEGRALS, COUNTS],
            tooltip="line integrals: minus the logarithm of the transmission; counts: as the detector gives them.",
        )
        self.i0 = Numbers(
            label="Blank scan",
            tooltip="Counts without an object: one number, or one for each view. Empty: the layer that ends in "
            "'flat', if there is one, tells it.",
        )
        self.xrays = column([self.layer, self.kind, self.values, self.i0, *self._make_grid()])

    def _make_photographs(self) -> None:
        self.folder_button = push_button(
            "Open COLMAP folder", "Folder of a COLMAP model, text or binary, or one with a transforms.json."
        )
        self.file_button = push_button(
            "Open transforms.json", "Cameras of nerfstudio, instant-ngp or Blender."
        )
        self.images = FileEdit(
            label="Pictures in",
            mode="d",
            nullable=True,
            tooltip="Folder of the photographs, if it is not beside the cameras.",
        )
        self.masks = FileEdit(
            label="Masks in",
            mode="d",
            nullable=True,
            tooltip="Folder of masks, bright where the object is. Empty: alpha channels, if there are any.",
        )
        self.factor = SpinBox(
            label="Shrink by",
            value=1,
            min=1,
            max=64,
            tooltip="Average squares of so many pixels along a side.",
        )
        self.photos = ComboBox(
            label="Photographs",
            choices=self._photo_choices,
            tooltip="A layer of photographs with their cameras.",
        )
        self.reading = column([self.images, self.masks, self.factor])
        self.taken = column([self.photos])

    def _sections(self) -> list[tuple[str, Any]]:
        return [
            ("X-rays", (self.xrays.native, self.scan)),
            (
                "Photographs",
                (
                    buttons(self.folder_button, self.file_button),
                    self.reading.native,
                    self.taken.native,
                ),
            ),
            ("Alignment", (self.alignment,)),
            ("Method", (self.form,)),
            ("Output", (self.outputs.native,)),
            ("Views of the result", (self.photo_views, self.radiographs, self.export_button)),
        ]

    def _columns(self) -> list[Any]:
        return [
            self.xrays,
            self.scan.container,
            self.reading,
            self.taken,
            self.alignment.container,
            self.alignment.marks,
            self.outputs,
            self.photo_views.container,
            self.radiographs.container,
        ]

    def _connect(self) -> None:
        # always in sight while it runs
        self.panel.layout().addWidget(self.pictures)
        self.layer.changed.connect(self._on_layer)
        for widget in (self.kind, self.values, self.grid):
            widget.changed.connect(self._on_shape)
        for widget in (self.i0, self.spacing, self.photos):
            widget.changed.connect(self._on_change)
        self.photos.changed.connect(self._on_inputs)
        self.scan.changed.connect(self._on_change)
        self.alignment.changed.connect(self._on_change)
        self.folder_button.clicked.connect(lambda: self.open_photographs())
        self.file_button.clicked.connect(lambda: self.open_photographs(folder=False))
        self.export_button.clicked.connect(lambda: self.export())

    # -- choices that follow the viewer ----------------------------------------------------------------------

    def _offers(self, layer: Any) -> bool:
        # neither what was made beside projections nor beside a volume
        return field_of_layer(layer, "kind") in (None, "projections")

    def _photo_choices(self, *_: Any) -> list[tuple[str, Any]]:
        return [(layer.name, layer) for layer in self.viewer.layers if is_photographs(layer)]

    def _main_layer(self) -> Any:
        return self.layer.value if self.photos.value is not None else None

    def _refresh_choices(self) -> str:
        self.layer.reset_choices()
        self.photos.reset_choices()
        self.alignment.refresh()
        if self.kind.value == PROJECTIONS:
            self._prefer_described()
        if self.layer.value is None:
            return "Open X-ray projections or a volume, or the sample: File > Open Sample > InnerGS > Tooth."
        return "Open photographs with their cameras."

    def _on_layer(self, *_: Any) -> None:
        layer = self.layer.value
        for choice in (self.scan.geometry, self.grid):
            choice.reset_choices()
        if layer is not None and layer != self._known:
            self._known = layer
            self._take_layer(layer)
            described = field_of_layer(layer, "geometry") is not None
            own = layer.metadata.get(METADATA_KEY)
            made = isinstance(own, dict) and ("grid" in own or "task" in own) and not described
            self.kind.value = VOLUME if made else PROJECTIONS
        self.scan.show_fields()
        self._on_shape()
        self._on_inputs()

    def _on_inputs(self, *_: Any) -> None:
        """Forget a pose that was found for other layers."""
        inputs = (self.layer.value, self.photos.value)
        if self._inputs != inputs:
            self._inputs = inputs
            self.alignment.forget()

    def _on_shape(self, *_: Any) -> None:
        projections = self.kind.value == PROJECTIONS
        self.scan.setVisible(projections)
        self.values.visible = self.grid.visible = projections
        self.i0.visible = projections and self.values.value == COUNTS
        self.spacing.visible = projections and self.grid.value == SPACING
        self._on_change()

    # -- photographs from files ------------------------------------------------------------------------------

    def open_photographs(self, path: str | Path | None = None, *, folder: bool = True) -> None:
        """Read photographs and cameras in the background and add a layer; asks where they are if not told."""
        if path is None and folder:
            path = QFileDialog.getExistingDirectory(self, "Open a COLMAP folder")
        elif path is None:
            path, _ = QFileDialog.getOpenFileName(self, "Open cameras", "", "Cameras (*.json)")
        if not path:
            return
        options = {"images": _folder(self.images), "masks": _folder(self.masks), "factor": self.factor.value}
        self._read_file(path, _read, options, self.layer.value)

    def _take_file(self, found: tuple[Any, list[str]]) -> None:
        (data, kwargs, _), told = found
        layer = self.viewer.add_image(data, **kwargs)
        self.photos.reset_choices()
        self.photos.value = layer
        self._refresh_layers()
        self.panel.status.setText(" ".join([f"{len(data)} photographs.", *told]))
        self.viewer.reset_view()

    # -- the job ---------------------------------------------------------------------------------------------

    def _volume_grid(self, layer: Any) -> Grid:
        view = LayerView.of(layer)
        own = layer.metadata.get(METADATA_KEY)
        units = [str(unit) for unit in view.units]
        if set(units) == {"pixel"} and np.allclose(layer.scale, 1) and own is None:
            raise ValueError(
                f"volume: the layer {layer.name!r} does not say how far apart its voxels are; set its scale and "
                "units, for example layer.scale = (0.2, 0.1, 0.1), layer.units = 'mm'."
            )
        return Grid(view.shape, view.affine, units)

    def _resolve(self, layer: Any) -> tuple[Any, Grid, str]:
        """Return geometry and grid as chosen, and Python for the grid; empty if the layer says it."""
        if self.kind.value == VOLUME:
            return None, self._volume_grid(layer), ""
        found = self.scan.resolve(layer)
        return found, *self._chosen_grid(layer, found.geometry, "geometry")

    def _field(self, kind: str) -> Any:
        """Return the layer of a field that came with the projections; no flat one beside a blank scan."""
        if kind == "flat" and self.i0.value:
            return None
        return next(iter(fields_with(self.viewer.layers, self.layer.value, kind)), None)

    def job(self) -> DualRun:
        """Return what Run would do now; ValueError or TypeError with a sentence when it can't."""
        layer, photos = self.layer.value, self.photos.value
        if layer is None:
            raise ValueError("layer: there are no X-rays; open projections, a volume, or the sample first.")
        if photos is None:
            raise ValueError("photographs: there are none; open a COLMAP folder or a transforms.json first.")
        found, grid, _ = self._resolve(layer)
        options = self._options(None if found is None else found.geometry, grid)
        return DualRun(**options, source=PhotoSource.of(photos), pose=self.alignment.chosen())

    def _work(self, job: DualRun) -> Callable[[], Generator[Event, None, None]]:
        if job.geometry is not None:
            job.geometry.check_covers(job.grid)
            job.xrays(blank=True)
        self.pictures.clear()
        return partial(run_job, job, self.pictures.slot)

    def _estimator(self, job: DualRun) -> Callable[[], str]:
        return partial(_estimate, job)

    def _allow(self, allowed: bool) -> None:
        self.pictures.watch(not allowed)
        self.alignment.allow(allowed)
        self.photo_views.allow(allowed)
        self.radiographs.allow(allowed)
        self.export_button.setEnabled(allowed and self._result is not None)

    def _look_at(self, layers: list[Any]) -> None:
        """Show the results only: projections and photographs are no part of their world."""
        for layer in self.viewer.layers:
            if layer not in layers:
                layer.visible = False
        look_at(self.viewer, layers)
        self._to_the_middle(layers[0])

    def _show_product(self, product: Product) -> str:
        self._show_layers(product.tuples)
        self._result = product.result
        if product.scan is not None:
            self.radiographs.offer(product.result, product.scan)
        if product.result.splats is not None and product.result.transform is not None:
            self.photo_views.offer(product.result, product.photographs, self._job.view.name)
        return product.sentence

    # -- export ----------------------------------------------------------------------------------------------

    def export(self, folder: str | Path | None = None) -> None:
        """Write the last result to a folder; asks for it when none is given."""
        if self._result is None:
            return
        if folder is None:
            folder = QFileDialog.getExistingDirectory(self, "Export to a folder")
        if not folder:
            return
        try:
            self._result.save(folder)
        except (ValueError, OSError) as error:
            complain(f"The result was not written: {error}")
            return
        self.panel.status.setText(f"Written to {folder}.")

    # -- the script ------------------------------------------------------------------------------------------

    def _script(self) -> str:
        job, layer, photos = self.job(), self.layer.value, self.photos.value
        found, _, grid = self._resolve(layer)
        lines = ["import numpy as np", "", "import napari_innergs as igs"]
        tail = []
        file = field_of_layer(photos, "file")
        if file is None:
            lines.append("from napari_innergs.layers.photographs import photographs_of_layer")
            tail += [
                *layer_lines(LayerView.of(photos), "pictures"),
                "photographs = photographs_of_layer(pictures)",
            ]
        else:
            options = {
                name: value
                for name in ("images", "masks", "factor")
                if (value := field_of_layer(photos, name)) not in (None, 1)
            }
            arguments = "".join(f", {name}={value!r}" for name, value in options.items())
            tail.append(f"photographs = igs.read_photographs({str(file)!r}{arguments})")
        tail += layer_lines(LayerView.of(layer), "layer")
        if found is None:
            given = "None, None, photographs, None, grid, config, volume=np.asarray(layer.data)"
            tail.append(
                f"grid = igs.Grid({job.grid.shape!r}, np.array({job.grid.affine.tolist()!r}), {job.grid.units!r})"
            )
        else:
            if not found.base or not grid:
                names = [*([] if found.base else ["geometry_of_layer"]), *([] if grid else ["grid_of_layer"])]
                lines.append(f"from napari_innergs.layers.xray import {', '.join(names)}")
            tail += [
                f"geometry = {found.base or 'geometry_of_layer(layer)'}",
                f"grid = {grid or 'grid_of_layer(layer)'}",
                *self._scan_lines(job, "np.asarray(layer.data)"),
            ]
            given = "scan, None, photographs, None, grid, config"
        for name, value in job.pose.items():
            made = [np.asarray(one).tolist() for one in value] if name == "landmarks" else value.tolist()
            tail.append(f"{name} = {pformat(made, width=100)}")
            given += f", {name}={name}"
        return "\n".join(
            [
                *lines,
                "",
                *tail,
                "",
                f"config = {config_code(job.config, DUAL_PRESETS)}",
                f"result = igs.reconstruct_dual(\n    {given}, device={job.device!r}, seed={job.seed}\n)",
                "print(result.report)",
                f"result.save({file_stem(layer.name, 'dual')!r})",
                "",
            ]
        )


def _folder(widget: Any) -> str | None:
    """Return what a field for a folder says, None when it is empty."""
    value = widget.value
    return None if value is None or str(value) in ("", ".") else str(value)


def _read(path: Path, options: dict[str, Any], like: Any) -> tuple[Any, list[str]]:
    """Read photographs as a layer, in a worker; also what was wrong with some of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        photographs = read_photographs(
            path, options["images"], options["masks"], factor=int(options["factor"])
        )
    facts = {"file": str(path.resolve()), **options}
    name = path.stem if path.is_file() else path.name
    told = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    return photograph_layer(photographs, name, like, **facts), told


def _verdict(report: dict[str, Any]) -> str:
    """Say in a sentence or more what a run found."""
    parts = []
    if report.get("n_gaussians"):
        parts.append(f"{report['n_gaussians']} Gaussians, {report.get('n_surface', 0)} with colour.")
    found = report.get("alignment") or {}
    if found.get("score") is not None and found.get("rms") is not None:
        parts.append(f"Alignment: score {found['score']:.3f}, scale {found['scale']:.4g}.")
    return " ".join([*parts, *(report.get("warnings") or ())])
