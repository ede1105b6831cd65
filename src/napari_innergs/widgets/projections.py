"""The "Projections to volume" dock widget."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from magicgui.widgets import CheckBox, ComboBox
from napari.layers import Image
from qtpy.QtWidgets import QFileDialog

from napari_innergs.config_projections import PROJECTION_PRESETS, ProjectionConfig
from napari_innergs.fit.engine import Done, Event, Progress, background
from napari_innergs.geometry.grid import Grid
from napari_innergs.io.scans import SCAN_SUFFIXES, read_scan
from napari_innergs.layers.read import LayerView
from napari_innergs.layers.write import METADATA_KEY
from napari_innergs.layers.xray import (
    attenuation_layers,
    field_of_layer,
    geometry_layers,
    projection_layers,
    water_attenuation,
)
from napari_innergs.scan import Scan
from napari_innergs.widgets._form import ConfigForm, Numbers, OptionalNumber, column, push_button
from napari_innergs.widgets._job import cost_in_words
from napari_innergs.widgets._radiographs import Radiographs
from napari_innergs.widgets._run_panel import complain
from napari_innergs.widgets._scan_form import Corrected, ScanForm
from napari_innergs.widgets._script import config_code, file_stem, layer_lines
from napari_innergs.widgets._worker import until_done
from napari_innergs.widgets._xrays import COUNTS, INTEGRALS, SPACING, XrayDock, XrayJob, fields_with

# files that need more than their own name to be read
WITHOUT_GEOMETRY = (".tif", ".tiff", ".npy", ".xml")

ATTENUATION, HOUNSFIELD = "attenuation", "also Hounsfield (HU)"


@dataclass(frozen=True)
class ProjectionsJob(XrayJob):
    """All that a run needs, taken from the form when Run is pressed."""

    tv: bool = False
    water: float | None = None
    corrections: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Product:
    """What a run made: layers, what radiographs are made of, and what the scan says about its geometry."""

    tuples: list[Any]
    result: Any
    scan: Scan
    check: Any
    sentence: str


def run_job(job: ProjectionsJob) -> Generator[Event, None, None]:
    """Reconstruct; `Done` carries a `Product`."""
    progress = Progress()
    progress.enter("reading the layer", 0.01)
    fit, scan = yield from background([_engine, job.scan], progress)
    found = yield from until_done(fit(scan, job.grid, job.config, device=job.device, seed=job.seed))
    if found is None:
        return
    report = found.result.report
    if job.corrections:
        report["corrections"] = list(job.corrections)
    if job.water is not None:
        report["hounsfield"] = {"water": job.water}
    if job.tv and found.tv is None:
        report.setdefault("warnings", []).append("These settings make no volume of total variation.")
    make = partial(
        attenuation_layers,
        found.result,
        scan.name,
        uncertainty=job.config.uncertainty,
        gaussians=job.gaussians,
        limit=job.limit,
        tv=found.tv if job.tv else None,
        water=job.water,
    )
    progress.enter("making layers", 1.0)
    tuples = (yield from background([make], progress))[0]
    yield Done(Product(tuples, found.result, scan, found.check, _verdict(report)))


def run_check(job: ProjectionsJob) -> Generator[Event, None, None]:
    """Check sense of rotation and geometry; `Done` carries a `ScanCheck`."""
    from napari_innergs.tasks.scan_checks import check_scan

    yield from _in_background("Checking the scan", lambda: check_scan(job.scan(), job.grid))


def run_centre(job: ProjectionsJob) -> Generator[Event, None, None]:
    """Find the rotation axis; `Done` carries a `CentreEstimate`."""
    from napari_innergs.tasks.scan_checks import find_centre

    yield from _in_background("Looking for the rotation axis", lambda: find_centre(job.scan()))


def _in_background(what: str, work: Callable[[], Any]) -> Generator[Event, None, None]:
    progress = Progress()
    progress.enter(what, 1.0)
    (found,) = yield from background([work], progress)
    yield Done(found)


def run_refinement(job: ProjectionsJob) -> Generator[Event, None, None]:
    """Refine the geometry; `Done` carries a `Refinement`."""
    from napari_innergs.tasks.scan_checks import refine_steps

    progress = Progress()
    progress.enter("reading the layer", 0.0)
    (scan,) = yield from background([job.scan], progress)
    yield from refine_steps(scan, job.grid)


def _engine() -> Callable[..., Any]:
    # a function of its own because it imports torch, which takes seconds: it runs in the background
    from napari_innergs.tasks.scan_checks import fit_checked

    return fit_checked


def _estimate(job: ProjectionsJob) -> str:
    """Size of the result, memory, time and doubts about the geometry; runs in a worker: it imports torch."""
    from napari_innergs.tasks.projections import estimate_projections

    grid, geometry = job.grid, job.geometry
    doubt = geometry.check_covers(grid)
    cost = estimate_projections(job.scan(blank=True), None, grid, job.config)
    shape = " × ".join(str(size) for size in grid.shape)
    steps = dict.fromkeys(f"{step:.4g}" for step in grid.spacing)
    unit = {"um": "µm"}.get(grid.units[-1], grid.units[-1]) if grid.units else "pixel"
    memory, duration = cost_in_words(cost)
    turn = np.degrees(np.ptp(geometry.angles))
    return (
        f"{geometry.n_views} views over {turn:.0f}° to {shape} voxels of {' × '.join(steps)} {unit}; "
        f"{memory} and {duration}. {doubt or ''}"
    ).strip()


class ProjectionsWidget(XrayDock):
    """Make a volume of attenuation from X-ray projections.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        The viewer whose layers are offered and to which the result is added.
    """

    DOCS = "https://github.com/napari-innergs/napari-innergs/blob/main/docs/projections.md"
    CONFIG = ProjectionConfig
    SETTINGS = "projections.yaml"
    ESTIMATING = "Checking the scan."

    # -- making the form -----------------------------------------------------------------------------------

    def _make(self) -> None:
        self._source: Any = None
        self._drawn: list[Any] = []
        self._known: Any = None
        self._make_inputs()
        self.scan = ScanForm(lambda: self.layer.value)
        self.form = ConfigForm(ProjectionConfig, PROJECTION_PRESETS, "balanced")
        self.form.preset.tooltip = (
            "Fills the form: fast for a first look, balanced by default, best when time does not matter, "
            "r2-paper to compare with the published recipe."
        )
        self._make_outputs()
        self.radiographs = Radiographs(self)

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
        self.open_button = push_button(
            "Open a scan file",
            "Projections with their geometry: JSON + NPZ, R2-Gaussian, NAF, Nikon, DXchange. Open TIFF stacks with "
            "napari and describe the scan below.",
        )
        self.open_button.clicked.connect(lambda: self.open_scan())

    def _make_outputs(self) -> None:
        self.unit = ComboBox(
            label="Output unit",
            choices=[ATTENUATION, HOUNSFIELD],
            tooltip="The volume is attenuation per unit of length; on request a second one in Hounsfield units: "
            "1000 (mu - mu of water) / mu of water.",
        )
        self.water = OptionalNumber(
            label="Water",
            hint="0.0206 / mm",
            tooltip="Attenuation of water per unit of length of the scan. Empty: 0.0206 per mm, right for about 60 "
            "keV; must be given when the scan has no unit of length.",
        )
        self.tv = CheckBox(
            text="Total variation",
            value=False,
            tooltip="Also add the volume of the total variation alone, hidden.",
        )
        self.outputs = column(
            [*self._make_grid(), self.unit, self.water, self.tv, *self._make_result_options()]
        )
        self.water.visible = False
        self.unit.changed.connect(lambda unit: setattr(self.water, "visible", unit == HOUNSFIELD))

    def _sections(self) -> list[tuple[str, Any]]:
        return [
            ("Input", (self.open_button, self.inputs.native)),
            ("Scan", (self.scan,)),
            ("Method", (self.form,)),
            ("Output", (self.outputs.native,)),
            ("Radiographs", (self.radiographs,)),
        ]

    def _columns(self) -> list[Any]:
        return [self.inputs, self.scan.container, self.outputs, self.radiographs.container]

    def _connect(self) -> None:
        self.layer.changed.connect(self._on_layer)
        self.array.changed.connect(self._on_array)
        for widget in (self.values, self.grid):
            widget.changed.connect(self._on_shape)
        for widget in (self.i0, self.flat, self.dark, self.spacing, self.unit, self.water):
            widget.changed.connect(self._on_change)
        self.scan.changed.connect(self._on_change)
        self.scan.draw_button.clicked.connect(self.show_geometry)
        self.scan.check_button.clicked.connect(self.check_scan)
        self.scan.centre_button.clicked.connect(self.find_centre)
        self.scan.reverse_button.clicked.connect(self.reverse_rotation)
        self.scan.refine_button.clicked.connect(self.refine_geometry)

    # -- choices that follow the viewer ----------------------------------------------------------------------

    def _offers(self, layer: Any) -> bool:
        return not _is_product(layer)

    def _field_choices(self, *_: Any) -> list[tuple[str, Any]]:
        return [
            (layer.name, layer)
            for layer in self.viewer.layers
            if isinstance(layer, Image) and not layer.rgb and layer.ndim in (2, 3)
            if layer != self.layer.value and not _is_product(layer)
        ]

    def _array_choices(self, *_: Any) -> list[str]:
        names = None if self.layer.value is None else field_of_layer(self.layer.value, "arrays")
        return [str(name) for name in names] if isinstance(names, list) else []

    def _main_layer(self) -> Any:
        return self.layer.value

    def _refresh_choices(self) -> str:
        self.layer.reset_choices()
        self.flat.reset_choices()
        self.dark.reset_choices()
        self._prefer_described()
        return "Open projections, a scan file, or a sample: File > Open Sample > InnerGS."

    def _on_layer(self, *_: Any) -> None:
        layer = self.layer.value
        for choice in (self.scan.geometry, self.grid, self.flat, self.dark):
            choice.reset_choices()
        with self.array.changed.blocked():
            self.array.reset_choices()
            name = None if layer is None else field_of_layer(layer, "array")
            if name in self.array.choices:
                self.array.value = name
        self.array.visible = len(self.array.choices) > 1
        if layer is not None and layer != self._known:
            self._known = layer
            self._take_layer(layer)
            for choice, kind in ((self.flat, "flat"), (self.dark, "dark")):
                fields = fields_with(choice.choices, layer, kind)
                choice.value = fields[0] if fields else None
        self.scan.show_fields()
        self._on_shape()

    def _on_array(self, name: str | None) -> None:
        layer = self.layer.value
        if layer is not None and name and name != field_of_layer(layer, "array"):
            self.open_scan(field_of_layer(layer, "file"), name)

    def _on_shape(self, *_: Any) -> None:
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
        self._read_file(path, _read, array)

    def _take_file(self, tuples: list[Any]) -> None:
        layers = [self.viewer.add_image(data, **kwargs) for data, kwargs, _ in tuples]
        self.layer.reset_choices()
        self.layer.value = layers[0]
        self.viewer.layers.selection.active = layers[0]
        self.viewer.reset_view()

    # -- the job ---------------------------------------------------------------------------------------------

    def _resolve(self, layer: Any) -> tuple[Corrected, Grid, str]:
        """Return geometry and grid as chosen, and Python for the grid; empty if the layer says it."""
        scan = self.scan.resolve(layer)
        return scan, *self._chosen_grid(layer, scan.geometry, "scan.geometry")

    def _field(self, kind: str) -> Any:
        return getattr(self, kind).value

    def job(self) -> ProjectionsJob:
        """Return what Run would do now; ValueError or TypeError with a sentence when it can't."""
        layer = self.layer.value
        if layer is None:
            raise ValueError("layer: there are no projections; open some, a scan file, or a sample first.")
        scan, grid, _ = self._resolve(layer)
        options = self._options(scan.geometry, grid)
        water = None
        if self.unit.value == HOUNSFIELD:
            if isinstance(self.water.value, str):
                raise ValueError(f"water: got {self.water.value!r}, need a number, or nothing.")
            water = water_attenuation(grid.units or scan.geometry.units, self.water.value)
        job = ProjectionsJob(**options, tv=bool(self.tv.value), water=water, corrections=scan.facts)
        job.scan(blank=True)
        return job

    def _work(self, job: ProjectionsJob) -> Callable[[], Generator[Event, None, None]]:
        job.geometry.check_covers(job.grid)
        self._source = self.layer.value
        return partial(run_job, job)

    def _estimator(self, job: ProjectionsJob) -> Callable[[], str]:
        return partial(_estimate, job)

    def _allow(self, allowed: bool) -> None:
        self.scan.allow(allowed)
        self.radiographs.allow(allowed)

    def _look_at(self, layers: list[Any]) -> None:
        """Show the middle of the volume instead of the projections, which are no part of its world."""
        if self._source is not None and self._source in self.viewer.layers:
            self._source.visible = False
        self.viewer.reset_view()
        self._to_the_middle(layers[0])

    def _show_product(self, product: Product) -> str:
        self._show_layers(product.tuples)
        self.radiographs.offer(product.result, product.scan)
        if self._source == self.layer.value:
            self._say_check(product.check)
        return product.sentence

    def _facts(self) -> dict[str, Any]:
        return {"corrections": self._job.corrections} if self._job.corrections else {}

    def _free(self) -> None:
        self._source = None
        super()._free()

    # -- the scan's own word about its geometry --------------------------------------------------------------

    def show_geometry(self) -> None:
        """Draw the scanner in 3D; the layers of an earlier call are replaced."""
        layer = self.layer.value
        try:
            if layer is None:
                raise ValueError("layer: there are no projections; open some first.")
            scan, grid, _ = self._resolve(layer)
            tuples = geometry_layers(scan.geometry, grid, layer.name)
        except (ValueError, TypeError) as error:
            complain(str(error))
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

    def _ask(self, work: Callable[[ProjectionsJob], Any], take: Callable[..., None]) -> None:
        """Put a question about the geometry to the projections; the answer is for the layer and form of now."""
        layer = self.layer.value
        try:
            job = self.job()
            scan, _, grid = self._resolve(layer)
        except (ValueError, TypeError) as error:
            complain(str(error))
            return

        def answer(found: Any) -> None:
            if self.layer.value == layer:
                take(found, scan, grid or self._own(layer)[2])

        self.run_aside(partial(work, job), answer)

    def check_scan(self) -> None:
        """Check sense of rotation and geometry, in the run panel."""
        self._ask(run_check, lambda check, *_: self._say_check(check))

    def _say_check(self, check: Any) -> None:
        """Show what a check found, and mark the button that mends it."""
        if check is None:
            return
        if check.reversed:
            self.scan.say(check.message, self.scan.reverse_button)
        else:
            self.scan.say(check.message, self.scan.refine_button if check.likely else None)

    def find_centre(self) -> None:
        """Find the rotation axis, and move the panel, in the run panel."""
        self._ask(run_centre, self._take_centre)

    def _take_centre(self, found: Any, scan: Corrected, grid: str) -> None:
        from napari_innergs.tasks.scan_checks import describe_centre

        if self.scan.described:
            self.scan.offset_u.value -= found.shift * float(self.scan.pixel_u.value)
        else:
            fact = {"kind": "rotation centre", "column": found.column, "shift": found.shift}
            step = f"scan.geometry.with_offset(0.0, {-found.shift!r})"
            self.scan.correct(scan, found.corrected(scan.geometry), step, fact)
        self.scan.say(describe_centre(found))

    def reverse_rotation(self) -> None:
        """Let the angles run the other way."""
        from napari_innergs.tasks.scan_checks import reverse_rotation

        layer = self.layer.value
        try:
            if layer is None:
                raise ValueError("layer: there are no projections; open some first.")
            scan = self.scan.resolve(layer)
        except (ValueError, TypeError) as error:
            complain(str(error))
            return
        if self.scan.described:
            self.scan.rotation.value = "ccw" if self.scan.rotation.value == "cw" else "cw"
        else:
            step = "reverse_rotation(scan.geometry)"
            self.scan.correct(scan, reverse_rotation(scan.geometry), step, {"kind": "reversed rotation"})
        self.scan.say("The rotation was reversed. Check the scan again.")

    def refine_geometry(self) -> None:
        """Find errors of the geometry from the projections, in the run panel."""
        self._ask(run_refinement, self._take_refinement)

    def _take_refinement(self, found: Any, scan: Corrected, grid: str) -> None:
        from napari_innergs.tasks.scan_checks import describe_refinement, improves

        if improves(found):
            fact = {"kind": "refined geometry", **found.summary()}
            self.scan.correct(scan, found.geometry, f"refine_scan(scan, {grid}).geometry", fact)
        self.scan.say(describe_refinement(found))

    # -- the script ------------------------------------------------------------------------------------------

    def _own(self, layer: Any) -> tuple[str, str, str]:
        """Return Python for pixels, geometry and grid of a layer, as `_script` names things."""
        if field_of_layer(layer, "file") is None:
            return "np.asarray(layer.data)", "geometry_of_layer(layer)", "grid_of_layer(layer)"
        return "source.projections", "source.geometry", "source.grid"

    def _script(self) -> str:
        job, layer = self.job(), self.layer.value
        found, _, grid = self._resolve(layer)
        file = field_of_layer(layer, "file")
        pixels, own, own_grid = self._own(layer)
        steps = " ".join(found.steps)
        used = [name for name in ("refine_scan", "reverse_rotation") if f"{name}(" in steps]
        lines = ["import numpy as np", "", "import napari_innergs as igs"]
        if file is None:
            lines.append("from napari_innergs.layers.xray import geometry_of_layer, grid_of_layer")
        lines.append("from napari_innergs.tasks.projections import reconstruct_projections")
        if used:
            lines.append(f"from napari_innergs.tasks.scan_checks import {', '.join(used)}")
        lines.append("")
        if file is None:
            lines += layer_lines(LayerView.of(layer), "layer")
        else:
            array = field_of_layer(layer, "array")
            lines.append(f"source = igs.read_scan({str(file)!r}{'' if array is None else f', {array!r}'})")
        lines.append(f"geometry = {found.base or own}")
        lines += self._scan_lines(job, pixels)
        lines += [f"scan = scan.with_geometry({step})" for step in found.steps]
        options = f"config=config, device={job.device!r}, seed={job.seed}"
        lines += [
            f"grid = {grid or own_grid}",
            "",
            f"config = {config_code(job.config, PROJECTION_PRESETS)}",
            f"result = reconstruct_projections(scan, grid=grid, {options})",
            "print(result.report)",
            f"result.save({file_stem(layer.name, 'volume')!r})",
        ]
        if job.water is not None:
            lines += [
                "",
                "from napari_innergs.layers.xray import to_hounsfield",
                f"hounsfield = to_hounsfield(result.volume, {job.water!r})",
            ]
        return "\n".join(lines) + "\n"


def _is_product(layer: Any) -> bool:
    """Whether a layer was made by the package and is nothing that a scanner took."""
    own = layer.metadata.get(METADATA_KEY)
    if not isinstance(own, dict):
        return own is not None
    taken = {"geometry", "thickness"} & set(own) or own.get("kind") in ("flat field", "dark field")
    return not taken


def _read(path: Path, array: str | None) -> list[Any]:
    """Read a scan file as layers, in a worker."""
    scan = read_scan(path, array)
    facts = {"file": str(path.resolve()), "array": array}
    if len(scan.arrays) > 1:
        names = [str(name) for name in scan.arrays]
        facts["arrays"] = names  # type: ignore[assignment]
        if array is None:
            facts["array"] = next((name for name in ("proj", "projections", "data") if name in names), None)
    return projection_layers(scan, **facts)


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
