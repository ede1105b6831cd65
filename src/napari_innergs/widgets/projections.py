"""The "Projections to volume" dock widget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pprint import pformat
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
from magicgui.widgets import CheckBox, ComboBox, FileEdit, FloatSpinBox, SpinBox
from napari.layers import Image
from napari.qt.threading import create_worker
from napari.utils.notifications import show_error, show_info
from qtpy.QtCore import QTimer, QUrl
from qtpy.QtGui import QDesktopServices, QGuiApplication
from qtpy.QtWidgets import (
    QFileDialog,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from napari_innergs.config_projections import PROJECTION_PRESETS, ProjectionConfig
from napari_innergs.fit.engine import Done, Event, Failed, Preview, Progress, background
from napari_innergs.geometry.grid import Grid, format_bytes
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry, check_angles
from napari_innergs.io.scans import SCAN_SUFFIXES, read_scan
from napari_innergs.layers.preview import LiveLayers
from napari_innergs.layers.read import LayerView
from napari_innergs.layers.write import METADATA_KEY, json_only
from napari_innergs.layers.xray import (
    attenuation_layers,
    field_of_layer,
    geometry_layers,
    geometry_of_layer,
    grid_of_layer,
    make_scan,
    projection_layers,
    radiograph_layers,
    render_radiographs,
    volume_layer,
)
from napari_innergs.scan import Scan
from napari_innergs.widgets._form import MINIMUM_WIDTH, ConfigForm, Numbers, TallForm, align_labels, column
from napari_innergs.widgets._qt import follow_layers
from napari_innergs.widgets._run_panel import RunPanel

DOCS = "https://github.com/napari-innergs/napari-innergs/blob/main/docs/projections.md"
ESTIMATE_DELAY_MS = 250
# files that need more than their own name to be read
WITHOUT_GEOMETRY = (".tif", ".tiff", ".npy", ".xml")

AS_LAYER, CONE, PARALLEL = "as in the layer", "cone beam", "parallel beam"
EVENLY, FROM_FILE = "evenly spaced", "from a file"
DEGREES, RADIANS = "degrees", "radians"
INTEGRALS, COUNTS = "line integrals", "counts"
SEEN, SPACING = "what the panel sees", "custom spacing"
VOLUME, GAUSSIANS = "volume", "Gaussians"


@dataclass(frozen=True)
class ProjectionsJob:
    """All that a run needs, taken from the form when Run is pressed."""

    view: LayerView
    geometry: XrayGeometry
    grid: Grid
    i0: Any
    flat: LayerView | None
    dark: LayerView | None
    config: ProjectionConfig
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


@dataclass(frozen=True)
class Product:
    """What a run made: layers, and for the other button what radiographs are made of."""

    tuples: list[Any]
    result: Any
    scan: Scan
    sentence: str


@dataclass(frozen=True)
class RadiographJob:
    """A reconstruction to look through, as the scan's own views do."""

    result: Any
    scan: Scan
    source: str


def run_job(job: ProjectionsJob) -> Generator[Event, None, None]:
    """Reconstruct; `Done` carries a `Product`."""
    progress = Progress()
    progress.enter("reading the layer", 0.01)
    fit, scan = yield from background([_engine, job.scan], progress)
    with closing(fit(scan, None, job.grid, job.config, device=job.device, seed=job.seed)) as events:
        for event in events:
            if not isinstance(event, Done):
                yield event
                if isinstance(event, Failed):
                    return
                continue
            result = event.result
            make = partial(
                attenuation_layers,
                result,
                scan.name,
                uncertainty=job.config.uncertainty,
                gaussians=job.gaussians,
                limit=job.limit,
            )
            progress.enter("making layers", 1.0)
            tuples = (yield from background([make], progress))[0]
            yield Done(Product(tuples, result, scan, _verdict(result.report)))
            return


def run_radiographs(job: RadiographJob) -> Generator[Event, None, None]:
    """Render the scan's views of a reconstruction, one by one; `Done` carries a `Product`."""
    from napari_innergs.baselines.preprocess import scan_line_integrals

    progress = Progress()
    progress.enter("reading the projections", 0.1)
    (measured,) = yield from background([partial(scan_line_integrals, job.scan)], progress)
    geometry, count = job.scan.geometry, job.scan.n_views
    progress.enter("rendering radiographs", 0.95)
    render = partial(render_radiographs, job.result, geometry, source=job.source)
    # one at a time: rendering uses all processors by itself
    images = yield from background(
        [partial(render, views=[number]) for number in range(count)], progress, total=count, workers=1
    )
    progress.enter("making layers", 1.0)
    rendered = np.concatenate(images)
    make = partial(
        radiograph_layers, measured.projections, rendered, geometry, job.scan.name, job.result.grid
    )
    tuples = (yield from background([make], progress))[0]
    rms = tuples[-1][1]["metadata"][METADATA_KEY]["rms"]
    signal = float(np.sqrt(np.mean(np.square(measured.projections, dtype=np.float64)))) or 1.0
    sentence = f"Residual {rms:.4g} RMS, {100 * rms / signal:.1f} % of the measured line integrals' RMS."
    yield Done(Product(tuples, job.result, job.scan, sentence))


def _engine() -> Callable[..., Any]:
    # a function of its own because it imports torch, which takes seconds: it runs in the background
    from napari_innergs.tasks.projections import fit_projections

    return fit_projections


def _estimate(job: ProjectionsJob) -> str:
    """Size of the result, memory, time and doubts about the geometry; runs in a worker: it imports torch."""
    from napari_innergs.tasks.projections import estimate_projections

    grid, geometry = job.grid, job.geometry
    doubt = geometry.check_covers(grid)
    cost = estimate_projections(job.scan(blank=True), None, grid, job.config)
    shape = " × ".join(str(size) for size in grid.shape)
    steps = dict.fromkeys(f"{step:.4g}" for step in grid.spacing)
    unit = {"um": "µm"}.get(grid.units[-1], grid.units[-1]) if grid.units else "pixel"
    seconds = float(cost["seconds"])
    duration = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    turn = np.degrees(np.ptp(geometry.angles))
    return (
        f"{geometry.n_views} views over {turn:.0f}° to {shape} voxels of {' × '.join(steps)} {unit}; "
        f"about {format_bytes(cost['bytes'])} of memory and {duration}. {doubt or ''}"
    ).strip()


class _FormModel:
    """The settings as the form can show them: an optional number is a text that may be empty."""

    optional = tuple(
        name
        for name, field in ProjectionConfig.model_fields.items()
        if type(None) in get_args(field.annotation)
    )
    model_fields: dict[str, Any] = {}  # noqa: RUF012 - filled below, as pydantic does

    @classmethod
    def show(cls, config: ProjectionConfig) -> Any:
        values = config.model_dump()
        for name in cls.optional:
            values[name] = () if values[name] is None else (values[name],)
        return SimpleNamespace(**values)

    @classmethod
    def preset(cls, name: str) -> Any:
        return cls.show(ProjectionConfig.preset(name))

    @classmethod
    def coerce(cls, values: dict[str, Any]) -> ProjectionConfig:
        plain = {
            name: (None if not value else value[0] if len(value) == 1 else value)
            if name in cls.optional
            else value
            for name, value in values.items()
        }
        return ProjectionConfig.coerce(plain)


for _name, _field in ProjectionConfig.model_fields.items():
    if _name in _FormModel.optional:
        _field = copy.copy(_field)
        _field.annotation, _field.default = tuple[float, ...], ()  # type: ignore[assignment]
    _FormModel.model_fields[_name] = _field


class ProjectionsWidget(QWidget):
    """Make a volume of attenuation from X-ray projections.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        The viewer whose layers are offered and to which the result is added.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.setMinimumWidth(MINIMUM_WIDTH)
        self.viewer = napari_viewer
        self._live: LiveLayers | None = None
        self._job: ProjectionsJob | None = None
        self._source: Any = None
        self._next: RadiographJob | None = None
        self._product: Product | None = None
        self._drawn: list[Any] = []
        self._shown: LiveLayers | None = None
        self._estimate_number = 0
        self._known: Any = None

        self._make_inputs()
        self._make_geometry()
        self.form = ConfigForm(_FormModel, PROJECTION_PRESETS, "balanced")  # type: ignore[arg-type]
        self.form.preset.tooltip = (
            "Fills the form: fast for a first look, balanced by default, best when time does not matter, "
            "r2-paper to compare with the published recipe."
        )
        self._make_outputs()
        self.panel = RunPanel(self._prepare)
        self._lay_out()

        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(ESTIMATE_DELAY_MS)
        self._timer.timeout.connect(self._start_estimate)

        follow_layers(self, self.viewer, self._refresh_layers)
        self.layer.changed.connect(self._on_layer)
        self.array.changed.connect(self._on_array)
        for widget in (self.geometry, self.angles, self.values, self.grid):
            widget.changed.connect(self._on_shape)
        for widget in (*self.numbers, self.i0, self.flat, self.dark, self.spacing):
            widget.changed.connect(self._on_change)
        self.device.changed.connect(self._show_device)
        self.form.changed.connect(self._on_change)
        self.panel.preview.connect(self._on_preview)
        self.panel.finished.connect(self._on_finished)
        self.panel.stopped.connect(self._on_stopped)
        self.panel.failed.connect(self._on_failed)
        self.panel.started.connect(self._on_started)
        self._refresh_layers()
        self._on_layer()
        self._show_device()

    # -- making the form -----------------------------------------------------------------------------------

    def _make_inputs(self) -> None:
        self.layer = ComboBox(
            label="Projections",
            choices=self._layer_choices,
            tooltip="Views, rows, columns: an Image layer with three axes.",
        )
        self.array = ComboBox(
            label="Array",
            choices=self._array_choices,
            tooltip="Which of the file's arrays are the projections; another one is read as a new layer.",
        )
        self.values = ComboBox(
            label="Values",
            choices=[INTEGRALS, COUNTS],
            tooltip="line integrals: minus the logarithm of the transmission, without unit; counts: as the "
            "detector gives them, with the blank scan or a flat field below.",
        )
        self.i0 = Numbers(
            label="Blank scan",
            tooltip="Counts without an object: one number, or one for each view with commas between them. "
            "Empty: the flat field tells it.",
        )
        self.flat = ComboBox(
            label="Flat field",
            choices=self._field_choices,
            nullable=True,
            tooltip="Layer with one image without an object, or several.",
        )
        self.dark = ComboBox(
            label="Dark field",
            choices=self._field_choices,
            nullable=True,
            tooltip="Layer with one image without X-rays, or several.",
        )
        self.inputs = column([self.layer, self.array, self.values, self.i0, self.flat, self.dark])
        self.open_button = QPushButton("Open a scan file")
        self.open_button.setToolTip(
            "Projections with their geometry: JSON + NPZ, R2-Gaussian, NAF, Nikon, DXchange. Open TIFF stacks with "
            "napari and describe the scan below."
        )
        self.open_button.clicked.connect(lambda: self.open_scan())

    def _make_geometry(self) -> None:
        self.geometry = ComboBox(
            label="Geometry",
            choices=self._geometry_choices,
            tooltip="How the scan was made: what the layer's metadata say, or the numbers below.",
        )

        def length(label: str, value: float, tooltip: str, low: float = -1e6) -> FloatSpinBox:
            box = FloatSpinBox(label=label, value=value, min=low, max=1e6, step=0.1, tooltip=tooltip)
            # pixels of a micrometre, in millimetres
            box.native.setDecimals(5)
            return box

        self.source_origin = length("Source to axis", 500.0, "From the source to the rotation axis.", 0.0)
        self.source_detector = length("Source to panel", 1000.0, "From the source to the panel.", 0.0)
        self.pixel_v = length("Pixel height", 1.0, "Distance between rows of the panel.", 0.0)
        self.pixel_u = length("Pixel width", 1.0, "Distance between columns of the panel.", 0.0)
        self.offset_v = length(
            "Offset along v", 0.0, "How far the panel's centre is moved towards higher rows."
        )
        self.offset_u = length(
            "Offset along u", 0.0, "How far the panel's centre is moved towards higher columns."
        )
        self.units = ComboBox(
            label="Lengths in", choices=["mm", "um", "cm", "pixel"], tooltip="Unit of all lengths here."
        )
        self.angles = ComboBox(
            label="Angles", choices=[EVENLY, FROM_FILE], tooltip="Evenly spaced, or read from a file."
        )
        self.first = length("First angle (°)", 0.0, "Angle of the first view, degrees.")
        self.range = length("Range (°)", 360.0, "Angle covered by all views, degrees.")
        self.views = SpinBox(
            label="Number", value=1, min=1, max=100_000, tooltip="How many angles there are."
        )
        self.closed = CheckBox(
            text="Last view at the end",
            value=False,
            tooltip="Checked: the last view is at the end of the range; else one step before it.",
        )
        self.angle_file = FileEdit(
            label="Angle file",
            mode="r",
            filter="Angles (*.txt *.csv *.npy)",
            tooltip="One angle for each view: text or NPY.",
        )
        self.angle_unit = ComboBox(
            label="File is in", choices=[DEGREES, RADIANS], tooltip="Unit of the angles in the file."
        )
        self.rotation = ComboBox(
            label="Rotation",
            choices=["ccw", "cw"],
            tooltip="Sense in which the source turns about the object, seen from above (+z): counter-clockwise or "
            "clockwise. A turntable turning clockwise is the same as a source turning counter-clockwise.",
        )
        self.distances = (self.source_origin, self.source_detector)
        self.even = (self.first, self.range, self.views, self.closed)
        self.from_file = (self.angle_file, self.angle_unit)
        lengths = (self.pixel_v, self.pixel_u, self.offset_v, self.offset_u, self.units)
        self.described = (*self.distances, *lengths, self.angles, *self.even, *self.from_file, self.rotation)
        self.numbers = tuple(widget for widget in self.described if widget is not self.angles)
        self.scanner = column([self.geometry, *self.described])
        self.geometry_button = QPushButton("Show geometry")
        self.geometry_button.setToolTip("Draw the source, the panels and the volume's box in 3D.")
        self.geometry_button.clicked.connect(self.show_geometry)

    def _make_outputs(self) -> None:
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
        self.gaussians = ComboBox(
            label="Gaussians",
            choices=["none", "points", "axes", "ellipsoids"],
            tooltip="Also show the Gaussians: points of 2 sigma across, principal axes, or 1-sigma surfaces.",
        )
        self.limit = SpinBox(
            label="At most", value=2000, min=1, max=200000, tooltip="Largest number of Gaussians to show."
        )
        self.device = ComboBox(
            label="Device",
            choices=["auto", "cpu", "cuda"],
            tooltip="Where to compute; the line below says why.",
        )
        self.seed = SpinBox(
            label="Seed", value=0, min=0, max=2**31 - 1, tooltip="Same seed and settings, same result."
        )
        self.outputs = column([self.grid, self.spacing, self.gaussians, self.limit, self.device, self.seed])
        self.limit.visible = False
        self.gaussians.changed.connect(lambda kind: setattr(self.limit, "visible", kind != "none"))
        self.through = ComboBox(
            label="Rays through",
            choices=[VOLUME, GAUSSIANS],
            tooltip="volume: the voxels of the result; Gaussians: exact integrals of the model.",
        )
        self.radiographs = column([self.through])
        self.render_button = QPushButton("Render radiographs")
        self.render_button.setToolTip(
            "What the scanner would see of the last result: measured, rendered and their difference side by side; "
            "the slider goes through the views."
        )
        self.render_button.setEnabled(False)
        self.render_button.clicked.connect(self.render_radiographs)

    def _lay_out(self) -> None:
        inside = QWidget()
        rows = QVBoxLayout(inside)
        rows.setContentsMargins(4, 4, 4, 4)
        rows.setSpacing(4)
        columns = (self.inputs, self.scanner, self.outputs, self.radiographs)
        for title, widgets in (
            ("Input", (self.open_button, self.inputs.native)),
            ("Scan", (self.scanner.native, self.geometry_button)),
            ("Method", (self.form,)),
            ("Output", (self.outputs.native,)),
            ("Radiographs", (self.radiographs.native, self.render_button)),
        ):
            heading = QLabel(f"<b>{title}</b>")
            heading.setContentsMargins(0, 4, 0, 0)
            rows.addWidget(heading)
            for widget in widgets:
                rows.addWidget(widget)
        rows.addStretch(1)
        align_labels(*(part.native for part in (*columns, *self.form.containers)))
        scroll = TallForm(inside)

        self.device_line = QLabel("")
        self.estimate_line = QLabel("")
        for label in (self.device_line, self.estimate_line):
            label.setWordWrap(True)
            label.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Minimum)

        self.script_button = QPushButton("Copy as script")
        self.script_button.setToolTip("Put a Python script that does the same on the clipboard.")
        self.save_button = QPushButton("Save settings")
        self.save_button.setToolTip(
            "Write the method's settings to a YAML file, for this form and the command line."
        )
        self.load_button = QPushButton("Load settings")
        self.load_button.setToolTip("Fill the form from a YAML file.")
        self.docs_button = QPushButton("Help")
        self.docs_button.setToolTip(f"Open the documentation: {DOCS}")
        self.script_button.clicked.connect(self.copy_script)
        self.save_button.clicked.connect(lambda: self.save_settings())
        self.load_button.clicked.connect(lambda: self.load_settings())
        self.docs_button.clicked.connect(lambda: QDesktopServices.openUrl(QUrl(DOCS)))

        layout = QVBoxLayout(self)
        layout.setContentsMargins(4, 4, 4, 4)
        layout.addWidget(scroll, 1)
        layout.addWidget(self.device_line)
        layout.addWidget(self.estimate_line)
        layout.addWidget(self.panel)
        for pair in ((self.script_button, self.docs_button), (self.save_button, self.load_button)):
            row = QHBoxLayout()
            for button in pair:
                row.addWidget(button)
            layout.addLayout(row)

    # -- choices that follow the viewer ----------------------------------------------------------------------

    def _layer_choices(self, *_: Any) -> list[tuple[str, Any]]:
        layers = [
            layer
            for layer in self.viewer.layers
            if isinstance(layer, Image) and not layer.rgb and layer.ndim == 3 and not _is_product(layer)
        ]
        # those that say how they were taken come first
        layers.sort(key=lambda layer: field_of_layer(layer, "geometry") is None)
        return [(layer.name, layer) for layer in layers]

    def _field_choices(self, *_: Any) -> list[tuple[str, Any]]:
        return [
            (layer.name, layer)
            for layer in self.viewer.layers
            if isinstance(layer, Image) and not layer.rgb and layer.ndim in (2, 3)
            if layer is not self.layer.value and not _is_product(layer)
        ]

    def _array_choices(self, *_: Any) -> list[str]:
        names = None if self.layer.value is None else field_of_layer(self.layer.value, "arrays")
        return [str(name) for name in names] if isinstance(names, list) else []

    def _geometry_choices(self, *_: Any) -> list[str]:
        layer = self.layer.value
        known = layer is not None and field_of_layer(layer, "geometry") is not None
        return [*([AS_LAYER] if known else []), CONE, PARALLEL]

    def _grid_choices(self, *_: Any) -> list[str]:
        layer = self.layer.value
        own = [] if layer is None or not _has_grid(layer) else [AS_LAYER]
        return [*own, SEEN, SPACING]

    def _refresh_layers(self) -> None:
        self.layer.reset_choices()
        self.flat.reset_choices()
        self.dark.reset_choices()
        layer, choices = self.layer.value, self.layer.choices
        if layer is not None and field_of_layer(layer, "geometry") is None:
            better = [one for one in choices if field_of_layer(one, "geometry") is not None]
            if better:
                self.layer.value = better[0]
        self.panel.run_button.setEnabled(self.layer.value is not None or self.panel.is_running)
        if self.layer.value is None:
            self.estimate_line.setText(
                "Open projections, a scan file, or a sample: File > Open Sample > InnerGS."
            )

    def _on_layer(self, *_: Any) -> None:
        layer = self.layer.value
        for choice in (self.geometry, self.grid, self.flat, self.dark):
            choice.reset_choices()
        with self.array.changed.blocked():
            self.array.reset_choices()
            name = None if layer is None else field_of_layer(layer, "array")
            if name in self.array.choices:
                self.array.value = name
        self.array.visible = len(self.array.choices) > 1
        if layer is not None and layer is not self._known:
            self._known = layer
            # not the boxes' own order, in which new choices come last
            self.geometry.value = self._geometry_choices()[0]
            self.grid.value = self._grid_choices()[0]
            self.views.value = max(1, int(layer.data.shape[0]))
            known = field_of_layer(layer, "values")
            if known not in (INTEGRALS, COUNTS):
                known = COUNTS if np.dtype(layer.dtype).kind in "iu" else INTEGRALS
            self.values.value = known
            i0 = field_of_layer(layer, "i0")
            self.i0.value = () if i0 is None else np.atleast_1d(np.asarray(i0, float)).tolist()
            for choice, kind in ((self.flat, "flat field"), (self.dark, "dark field")):
                fields = [
                    one
                    for one in choice.choices
                    if one is not None
                    and field_of_layer(one, "kind") == kind
                    and one.name.startswith(layer.name)
                ]
                choice.value = fields[0] if fields else None
        self._on_shape()

    def _on_array(self, name: str | None) -> None:
        layer = self.layer.value
        if layer is not None and name and name != field_of_layer(layer, "array"):
            self.open_scan(field_of_layer(layer, "file"), name)

    def _on_shape(self, *_: Any) -> None:
        given = self.geometry.value == AS_LAYER
        for widget in self.described:
            widget.visible = not given
        if not given:
            for widget in self.distances:
                widget.visible = self.geometry.value == CONE
            for widget in self.even:
                widget.visible = self.angles.value == EVENLY
            for widget in self.from_file:
                widget.visible = self.angles.value == FROM_FILE
        for widget in (self.i0, self.flat, self.dark):
            widget.visible = self.values.value == COUNTS
        self.spacing.visible = self.grid.value == SPACING
        self._on_change()

    # -- scan files ------------------------------------------------------------------------------------------

    def open_scan(self, path: str | Path | None = None, array: str | None = None) -> None:
        """Read a scan file in the background and add its layers; asks for the file when none is given."""
        if path is None:
            endings = " ".join(f"*{suffix}" for suffix in SCAN_SUFFIXES if suffix not in WITHOUT_GEOMETRY)
            path, _ = QFileDialog.getOpenFileName(self, "Open a scan file", "", f"Scans ({endings})")
        if not path:
            return
        self.estimate_line.setText(f"Reading {Path(path).name}.")
        create_worker(_read, Path(path), array, _connect={"returned": self._on_read})

    def _on_read(self, answer: list[Any] | str) -> None:
        if isinstance(answer, str):
            self.estimate_line.setText(answer)
            show_error(answer)
            return
        layers = [self.viewer.add_image(data, **kwargs) for data, kwargs, _ in answer]
        self.layer.reset_choices()
        self.layer.value = layers[0]
        self.viewer.layers.selection.active = layers[0]
        self.viewer.reset_view()

    # -- the job ---------------------------------------------------------------------------------------------

    def _angles(self) -> tuple[np.ndarray, str]:
        """Return the angles of the form in radians, and Python that makes them."""
        if self.angles.value == EVENLY:
            count, first, extent = int(self.views.value), float(self.first.value), float(self.range.value)
            end = bool(self.closed.value)
            code = f"np.deg2rad(np.linspace({first:g}, {first + extent:g}, {count}, endpoint={end}))"
            return np.deg2rad(np.linspace(first, first + extent, count, endpoint=end)), code
        path = Path(self.angle_file.value)
        if not path.is_file():
            raise ValueError(f"angles: there is no file {str(path)!r}; choose a text or NPY file.")
        try:
            if path.suffix == ".npy":
                read = f"np.load({str(path)!r})"
                angles = np.load(path, allow_pickle=False)
            else:
                read = f"np.array(open({str(path)!r}).read().replace(',', ' ').split(), float)"
                angles = np.array(path.read_text(encoding="utf-8").replace(",", " ").split(), float)
        except (ValueError, OSError) as error:
            raise ValueError(f"angles: {str(path)!r} does not hold numbers: {error}.") from error
        angles = np.atleast_1d(angles).ravel()
        if self.angle_unit.value == DEGREES:
            return np.deg2rad(angles), f"np.deg2rad({read})"
        try:
            return check_angles(angles, turns=True), read
        except ValueError as error:
            if "look like degrees" not in str(error):
                raise
            raise ValueError(
                f"angles: {path.name} holds {angles.min():g} to {angles.max():g}, which look like degrees; choose "
                f"{DEGREES!r} for the file's unit."
            ) from error

    def _described_scan(self, layer: Any) -> tuple[XrayGeometry, str]:
        """Return the geometry of the form, and Python that makes it."""
        angles, angles_code = self._angles()
        data = layer.data[0] if layer.multiscale else layer.data
        if len(data) != len(angles):
            raise ValueError(
                f"angles: got {len(angles)}, the layer {layer.name!r} has {len(data)} views; need one angle for "
                "each view."
            )
        options: dict[str, Any] = {
            "detector_shape": tuple(int(size) for size in data.shape[1:]),
            "pixel_size": (float(self.pixel_v.value), float(self.pixel_u.value)),
            "detector_offset": (float(self.offset_v.value), float(self.offset_u.value)),
            "rotation": self.rotation.value,
            "units": None if self.units.value == "pixel" else self.units.value,
        }
        kind: Any = ParallelBeam
        if self.geometry.value == CONE:
            kind = ConeBeam
            options = {
                "source_origin": float(self.source_origin.value),
                "source_detector": float(self.source_detector.value),
                **options,
            }
        arguments = "".join(f"    {name}={value!r},\n" for name, value in options.items())
        code = f"igs.{kind.__name__}.circular(\n    {angles_code},\n{arguments})"
        return kind.circular(angles, **options), code

    def _resolve(self, layer: Any) -> tuple[XrayGeometry, Grid, str, str]:
        """Return geometry and grid as chosen, and Python for both."""
        if self.geometry.value == AS_LAYER:
            found = geometry_of_layer(layer)
            if found is None:
                raise ValueError(f"geometry: the layer {layer.name!r} has none any more; describe the scan.")
            geometry, code = found, ""
        else:
            geometry, code = self._described_scan(layer)
        if self.grid.value == AS_LAYER:
            own = grid_of_layer(layer)
            if own is None:
                raise ValueError(f"grid: the layer {layer.name!r} has none any more; choose {SEEN!r}.")
            return geometry, own, code, ""
        spacing = float(self.spacing.value) if self.grid.value == SPACING else None
        argument = "" if spacing is None else f"spacing={spacing!r}"
        return geometry, geometry.default_grid(spacing=spacing), code, f"geometry.default_grid({argument})"

    def job(self) -> ProjectionsJob:
        """Return what Run would do now; ValueError or TypeError with a sentence when it can't."""
        layer = self.layer.value
        if layer is None:
            raise ValueError("layer: there are no projections; open some, a scan file, or a sample first.")
        geometry, grid, _, _ = self._resolve(layer)
        counts = self.values.value == COUNTS
        i0 = self.i0.value if counts else ()
        flat, dark = (
            LayerView.of(choice.value) if counts and choice.value is not None else None
            for choice in (self.flat, self.dark)
        )
        if counts and not i0 and flat is None:
            raise ValueError(
                "i0: counts need the blank scan, the counts without an object, or a flat field; give one of them."
            )
        job = ProjectionsJob(
            view=LayerView.of(layer),
            geometry=geometry,
            grid=grid,
            i0=(i0[0] if len(i0) == 1 else list(i0)) if i0 else None,
            flat=flat,
            dark=dark,
            config=self.form.config,
            device=self.device.value,
            seed=int(self.seed.value),
            gaussians=self.gaussians.value,
            limit=int(self.limit.value),
        )
        job.scan(blank=True)
        return job

    def _prepare(self) -> Callable[[], Generator[Event, None, None]]:
        radiographs, self._next = self._next, None
        if radiographs is not None:
            self._live = None
            return partial(run_radiographs, radiographs)
        job = self.job()
        job.geometry.check_covers(job.grid)
        self._job, self._source = job, self.layer.value
        self._live = LiveLayers(self.viewer)
        return partial(run_job, job)

    def show_geometry(self) -> None:
        """Draw the scanner in 3D; the layers of an earlier call are replaced."""
        layer = self.layer.value
        try:
            if layer is None:
                raise ValueError("layer: there are no projections; open some first.")
            geometry, grid, _, _ = self._resolve(layer)
            tuples = geometry_layers(geometry, grid, layer.name)
        except (ValueError, TypeError) as error:
            show_error(str(error))
            return
        for old in self._drawn:
            if old in self.viewer.layers:
                self.viewer.layers.remove(old)
        active = self.viewer.layers.selection.active
        self._drawn = [getattr(self.viewer, f"add_{kind}")(data, **kwargs) for data, kwargs, kind in tuples]
        # projections are no part of the world that the scanner is drawn in
        layer.visible = False
        self.viewer.layers.selection.active = active
        self.viewer.dims.ndisplay = 3
        self.viewer.reset_view()

    def render_radiographs(self) -> None:
        """Render the views of the last result, in the run panel."""
        if self._product is None or self.panel.is_running:
            return
        source = "volume" if self.through.value == VOLUME else "model"
        if source == "model" and self._product.result.model is None:
            show_error("There are no Gaussians in this result; render the volume.")
            return
        self._next = RadiographJob(self._product.result, self._product.scan, source)
        self.panel.run()

    def _on_started(self) -> None:
        self.render_button.setEnabled(False)

    def _on_preview(self, preview: Preview) -> None:
        if self._job is None or self._live is None:
            return
        own = {METADATA_KEY: {"kind": "preview", "label": preview.label}}
        name = f"{self._job.view.name} volume (preview)"
        first = not self._live.layers
        self._live.show([volume_layer(preview.volume, preview.grid, name, metadata=own)])
        if first:
            self._look_at(preview.grid)

    def _look_at(self, grid: Grid) -> None:
        """Show the middle of the volume instead of the projections, which are no part of its world."""
        if self._source is not None and self._source in self.viewer.layers:
            self._source.visible = False
        self.viewer.reset_view()
        if self.viewer.dims.ndisplay == 2:
            middle = grid.index_to_world(0.5 * (np.array(grid.shape) - 1))
            self.viewer.dims.set_point(range(self.viewer.dims.ndim - 3, self.viewer.dims.ndim), middle)

    def _on_finished(self, product: Product) -> None:
        if self._job is None:
            self._show_radiographs(product)
        else:
            assert self._live is not None
            fresh = not self._live.layers
            layers = self._live.show(product.tuples)
            if fresh:
                self._look_at(product.result.grid)
            self._product = product
            self.viewer.layers.selection.active = layers[0]
        self.panel.status.setText(f"{self.panel.status.text()} {product.sentence}".strip())
        self._free()

    def _show_radiographs(self, product: Product) -> None:
        if self._shown is None:
            self._shown = LiveLayers(self.viewer)
        layers = self._shown.show(product.tuples)
        for layer in self.viewer.layers:
            layer.visible = layer in layers
        self.viewer.dims.ndisplay = 2
        self.viewer.reset_view()
        self.viewer.dims.set_point(self.viewer.dims.ndim - 3, layers[0].translate[0])
        self.viewer.layers.selection.active = layers[-1]

    def _on_stopped(self, best: Preview | None) -> None:
        self._keep_preview("stopped early", best)

    def _on_failed(self, event: Failed) -> None:
        self._keep_preview("incomplete", self.panel.last_preview)

    def _keep_preview(self, what: str, best: Preview | None) -> None:
        """Turn the preview into the result of a run that did not finish, and say so in the layer."""
        if self._live is not None and self._job is not None and best is not None:
            config = json_only(self._job.config.model_dump(mode="json"))
            report = {"kind": what, "label": best.label, "config": config}
            for layer in self._live.layers:
                layer.name = layer.name.replace("(preview)", f"({what})")
                layer.metadata = {**layer.metadata, METADATA_KEY: report}
        self._free()

    def _free(self) -> None:
        # the job holds the pixels of a layer that may be deleted by now
        self._live = self._job = self._source = None
        self.panel.last_preview = None
        self.panel.run_button.setEnabled(self.layer.value is not None)
        self.render_button.setEnabled(self._product is not None)
        self._on_change()

    # -- lines before Run ------------------------------------------------------------------------------------

    def _on_change(self, *_: Any) -> None:
        self._timer.start()

    def _show_device(self, *_: Any) -> None:
        from napari_innergs.device import describe_device

        try:
            choice = describe_device(self.device.value)
            self.device_line.setText(f"Device: {choice.name}. {choice.reason}")
        except (ValueError, RuntimeError) as error:
            self.device_line.setText(f"Device: {error}")

    def _start_estimate(self) -> None:
        if self.layer.value is None or self.panel.is_running:
            return
        try:
            job = self.job()
        except (ValueError, TypeError) as error:
            self.estimate_line.setText(str(error))
            return
        self._estimate_number += 1
        if not self.estimate_line.text():
            self.estimate_line.setText("Checking the scan.")
        create_worker(
            _safely,
            partial(_estimate, job),
            self._estimate_number,
            _connect={"returned": self._show_estimate},
        )

    def _show_estimate(self, answer: tuple[int, str]) -> None:
        number, text = answer
        if number == self._estimate_number and self.layer.value is not None:
            self.estimate_line.setText(text)

    # -- scripts and settings --------------------------------------------------------------------------------

    def copy_script(self) -> str:
        """Put the script on the clipboard and return it; an empty text if the form can't run."""
        try:
            text = self._script()
        except (ValueError, TypeError) as error:
            show_error(str(error))
            return ""
        QGuiApplication.clipboard().setText(text)
        self.panel.status.setText("The script is on the clipboard.")
        return text

    def _script(self) -> str:
        job, layer = self.job(), self.layer.value
        _, _, geometry, grid = self._resolve(layer)
        file = field_of_layer(layer, "file")
        lines = ["import numpy as np", "", "import napari_innergs as igs"]
        if file is None:
            lines.append("from napari_innergs.layers.xray import geometry_of_layer, grid_of_layer")
        lines += ["from napari_innergs.tasks.projections import reconstruct_projections", ""]
        if file is None:
            lines += _layer_lines(layer, "layer")
            pixels, own, own_grid = (
                "np.asarray(layer.data)",
                "geometry_of_layer(layer)",
                "grid_of_layer(layer)",
            )
        else:
            array = field_of_layer(layer, "array")
            lines.append(f"source = igs.read_scan({str(file)!r}{'' if array is None else f', {array!r}'})")
            pixels, own, own_grid = "source.projections", "source.geometry", "source.grid"
        lines += [f"geometry = {geometry or own}", f"grid = {grid or own_grid}"]
        fields = [] if job.i0 is None else [f"i0={job.i0!r}"]
        for kind in ("flat", "dark"):
            field = getattr(job, kind)
            if field is not None:
                lines += _layer_lines(getattr(self, kind).value, kind)
                fields.append(f"{kind}=np.asarray({kind}.data)")
        arguments = ", ".join([pixels, "geometry", "grid", *fields, f"name={layer.name!r}"])
        stem = "".join(c if c.isalnum() else "-" for c in layer.name.lower()).strip("-") or "volume"
        lines += [
            f"scan = igs.Scan({arguments})",
            "",
            f"config = {_config(job.config)}",
            f"result = reconstruct_projections(scan, config=config, device={job.device!r}, seed={job.seed})",
            "print(result.report)",
            f"result.save({stem!r})",
        ]
        return "\n".join(lines) + "\n"

    def save_settings(self, path: str | Path | None = None) -> None:
        """Write the method's settings to a YAML file; asks for the name when none is given."""
        if path is None:
            path, _ = QFileDialog.getSaveFileName(
                self, "Save settings", "projections.yaml", "YAML (*.yaml *.yml)"
            )
        if not path:
            return
        try:
            self.form.config.to_yaml(path)
        except (ValueError, OSError) as error:
            show_error(f"The settings were not saved: {error}")
            return
        show_info(f"Settings saved to {path}.")

    def load_settings(self, path: str | Path | None = None) -> None:
        """Fill the form from a YAML file; asks for the name when none is given."""
        if path is None:
            path, _ = QFileDialog.getOpenFileName(self, "Load settings", "", "YAML (*.yaml *.yml)")
        if not path:
            return
        try:
            self.form.config = _FormModel.show(ProjectionConfig.from_yaml(path))
        except (ValueError, OSError) as error:
            show_error(f"The settings were not loaded: {error}")


def _is_product(layer: Any) -> bool:
    """Whether a layer was made by the package and is nothing that a scanner took."""
    own = layer.metadata.get(METADATA_KEY)
    if not isinstance(own, dict):
        return own is not None
    taken = {"geometry", "thickness"} & set(own) or own.get("kind") in ("flat field", "dark field")
    return not taken


def _has_grid(layer: Any) -> bool:
    try:
        return grid_of_layer(layer) is not None
    except ValueError:
        return False


def _read(path: Path, array: str | None) -> list[Any] | str:
    """Read a scan file as layers, in a worker; a sentence when it can't be read."""
    try:
        scan = read_scan(path, array)
        facts = {"file": str(path.resolve()), "array": array}
        if len(scan.arrays) > 1:
            names = [str(name) for name in scan.arrays]
            facts["arrays"] = names  # type: ignore[assignment]
            if array is None:
                facts["array"] = next(
                    (name for name in ("proj", "projections", "data") if name in names), None
                )
        return projection_layers(scan, **facts)
    except Exception as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def _safely(make: Callable[[], str], number: int) -> tuple[int, str]:
    """Run in a worker; an estimate that fails is a sentence in its line, never an exception."""
    try:
        return number, make()
    except Exception as error:
        return number, str(error).splitlines()[0] if str(error) else type(error).__name__


def _layer_lines(layer: Any, name: str) -> list[str]:
    """Return Python that finds a layer: opened again, or the one in the viewer."""
    view = LayerView.of(layer)
    if view.sample is None and view.path is None:
        return [
            "# this layer is in the viewer only: run the script in napari's console",
            "import napari",
            f"{name} = napari.current_viewer().layers[{view.name!r}]",
        ]
    opened = f"open_sample({view.sample[0]!r}, {view.sample[1]!r})" if view.sample else f"open({view.path!r})"
    return [
        "from napari.components import ViewerModel",
        f"opened = ViewerModel().{opened}",
        f"{name} = next((one for one in opened if one.name == {view.name!r}), opened[0])",
    ]


def _config(config: ProjectionConfig) -> str:
    """Write the nearest preset and what differs from it."""
    values = config.model_dump()
    differences = {
        preset: {
            name: value
            for name, value in values.items()
            if value != getattr(ProjectionConfig.preset(preset), name)
        }
        for preset in PROJECTION_PRESETS
    }
    nearest = min(differences, key=lambda preset: len(differences[preset]))
    if not differences[nearest]:
        return repr(nearest)
    return pformat({"preset": nearest, **differences[nearest]}, width=100, sort_dicts=False)


def _verdict(report: dict[str, Any]) -> str:
    """One sentence or more from the report: how many Gaussians, how well the projections are met, warnings."""
    parts = []
    if report.get("n_gaussians"):
        parts.append(f"{report['n_gaussians']} Gaussians.")
    residuals = report.get("residual_rms") or {}
    if residuals:
        parts.append(
            "Weighted residuals: " + ", ".join(f"{name} {rms:.3g}" for name, rms in residuals.items()) + "."
        )
    return " ".join([*parts, *(report.get("warnings") or ())])
