"""The part of a form that says how a scan was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from magicgui.widgets import CheckBox, ComboBox, FileEdit, FloatSpinBox, SpinBox
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QPushButton, QWidget

from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry, check_angles
from napari_innergs.layers.xray import field_of_layer, geometry_of_layer
from napari_innergs.widgets._form import column, push_button, stack
from napari_innergs.widgets._job import buttons, wrapped_label

AS_LAYER, CORRECTED = "as in the layer", "corrected"
CONE, FAN, HELIX, PARALLEL = "cone beam", "fan beam", "helical cone beam", "parallel beam"
EVENLY, FROM_FILE = "evenly spaced", "from a file"
DEGREES, RADIANS = "degrees", "radians"
_ADVISED = "font-weight: bold; color: orange;"


@dataclass(frozen=True)
class Corrected:
    """A geometry that the scan's own projections have changed.

    Attributes
    ----------
    geometry : XrayGeometry
        What it is now.
    base : str
        Python that makes what it was; empty if the layer says it.
    steps : tuple of str
        Python of each correction, in which `scan` is the scan so far.
    facts : tuple of dict
        The same for the report.
    """

    geometry: XrayGeometry
    base: str = ""
    steps: tuple[str, ...] = ()
    facts: tuple[dict[str, Any], ...] = field(default=())


class ScanForm(QWidget):
    """Geometry of a scan: what the layer says, numbers of one's own, or either one corrected.

    Parameters
    ----------
    main_layer : callable
        Returns the layer of projections, or None.
    """

    changed = Signal()

    def __init__(self, main_layer: Callable[[], Any], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._main_layer = main_layer
        self._corrected: Corrected | None = None
        self._make()
        self.draw_button = push_button(
            "Show geometry", "Draw the source, the panels and the volume's box in 3D."
        )
        self.check_button = push_button(
            "Check scan",
            "Do the projections agree with the sense of rotation and the geometry? Takes seconds; every run does it.",
        )
        self.centre_button = push_button(
            "Find centre",
            "Find the column on which the rotation axis is seen, and move the panel accordingly.",
        )
        self.reverse_button = push_button("Reverse rotation", "Let the angles run the other way.")
        self.refine_button = push_button(
            "Refine geometry",
            "Find offset and roll of the panel, and angle and shift of each view, from the projections; takes from "
            "half a minute to some minutes. The result becomes the geometry of the form.",
        )
        self.verdict = wrapped_label()
        self.verdict.setVisible(False)
        stack(
            self,
            self.container.native,
            buttons(self.draw_button, self.check_button),
            buttons(self.centre_button, self.reverse_button),
            self.refine_button,
            self.verdict,
        )
        for widget in (self.geometry, *self._described):
            # what was found was said of another geometry
            widget.changed.connect(lambda *_: self.say(""))
        for widget in (self.geometry, self.angles):
            widget.changed.connect(self.show_fields)
        for widget in self._described:
            widget.changed.connect(lambda *_: self.changed.emit())

    def _make(self) -> None:
        self.geometry = ComboBox(
            label="Geometry",
            choices=self.choices,
            tooltip="How the scan was made: what the layer's metadata say, that after a correction, or the numbers "
            "below.",
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
        self.pitch = length(
            "Rise per turn", 10.0, "How far source and panel rise in one whole turn; negative: they sink."
        )
        self.tilt = FloatSpinBox(
            label="Tilt (°)",
            value=0.0,
            min=-90.0,
            max=90.0,
            step=1.0,
            tooltip="Laminography: angle of the source, or of parallel rays, above the plane of rotation; 0 for an "
            "ordinary scan.",
        )
        self.units = ComboBox(
            label="Lengths in", choices=["mm", "um", "cm", "pixel"], tooltip="Unit of all lengths here."
        )
        self.angles = ComboBox(
            label="Angles", choices=[EVENLY, FROM_FILE], tooltip="Evenly spaced, or read from a file."
        )
        self.first = length("First angle (°)", 0.0, "Angle of the first view, degrees.")
        self.range = length(
            "Range (°)",
            360.0,
            "Angle covered by all views, degrees; more than 360 for a helix of several turns.",
        )
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
        self._even = (self.first, self.range, self.views, self.closed)
        self._from_file = (self.angle_file, self.angle_unit)
        self._described = (
            *(self.source_origin, self.source_detector, self.pixel_v, self.pixel_u),
            *(self.offset_v, self.offset_u, self.pitch, self.tilt, self.units),
            *(self.angles, *self._even, *self._from_file, self.rotation),
        )
        self.container = column([self.geometry, *self._described])

    # -- what is shown ---------------------------------------------------------------------------------------

    def choices(self, *_: Any) -> list[str]:
        """Return what the geometry can be for the present layer."""
        layer = self._main_layer()
        own = layer is not None and field_of_layer(layer, "geometry") is not None
        fixed = [*([CORRECTED] if self._corrected else []), *([AS_LAYER] if own else [])]
        return [*fixed, CONE, FAN, HELIX, PARALLEL]

    @property
    def described(self) -> bool:
        """Whether the numbers of the form are the geometry."""
        return self.geometry.value not in (AS_LAYER, CORRECTED)

    def take_layer(self, layer: Any) -> None:
        """Start from what a new layer says."""
        self._corrected = None
        self.say("")
        self.geometry.reset_choices()
        # not the box's own order, in which new choices come last
        self.geometry.value = self.choices()[0]
        self.views.value = max(1, int(layer.data.shape[0]))

    def show_fields(self, *_: Any) -> None:
        """Show the numbers that belong to the chosen kind of scan."""
        kind = self.geometry.value
        for widget in self._described:
            widget.visible = self.described
        if self.described:
            for widget in (self.source_origin, self.source_detector):
                widget.visible = kind != PARALLEL
            for widget in (self.pixel_v, self.offset_v):
                widget.visible = kind != FAN
            self.pitch.visible = kind == HELIX
            self.tilt.visible = kind in (CONE, PARALLEL)
            for widget in self._even:
                widget.visible = self.angles.value == EVENLY
            for widget in self._from_file:
                widget.visible = self.angles.value == FROM_FILE
        self.changed.emit()

    def allow(self, allowed: bool) -> None:
        """Enable the buttons that change the geometry or need the run panel."""
        for button in (self.check_button, self.centre_button, self.reverse_button, self.refine_button):
            button.setEnabled(allowed)

    def say(self, text: str, advised: QPushButton | None = None) -> None:
        """Show what was found, and mark the button that is advised."""
        self.verdict.setText(text)
        self.verdict.setVisible(bool(text))
        for button in (self.reverse_button, self.refine_button):
            button.setStyleSheet(_ADVISED if button is advised else "")

    # -- the geometry ----------------------------------------------------------------------------------------

    def resolve(self, layer: Any) -> Corrected:
        """Return the geometry as chosen; ValueError with a sentence if it does not fit the layer."""
        choice = self.geometry.value
        if choice == CORRECTED and self._corrected is not None:
            return self._corrected
        if choice != AS_LAYER:
            return Corrected(*self._from_numbers(layer))
        found = geometry_of_layer(layer)
        if found is None:
            raise ValueError(f"geometry: the layer {layer.name!r} has none any more; describe the scan.")
        return Corrected(found)

    def correct(self, before: Corrected, geometry: XrayGeometry, step: str, fact: dict[str, Any]) -> None:
        """Take a corrected geometry as that of the form; choosing another one in the form takes it back."""
        self._corrected = replace(
            before, geometry=geometry, steps=(*before.steps, step), facts=(*before.facts, fact)
        )
        self.geometry.reset_choices()
        self.geometry.value = CORRECTED
        self.show_fields()

    def _angles(self) -> tuple[np.ndarray, str]:
        """Return the angles of the form in radians, and Python that makes them."""
        if self.angles.value == EVENLY:
            count, first, extent = int(self.views.value), float(self.first.value), float(self.range.value)
            end = bool(self.closed.value)
            code = f"np.deg2rad(np.linspace({first:.12g}, {first + extent:.12g}, {count}, endpoint={end}))"
            return np.deg2rad(np.linspace(first, first + extent, count, endpoint=end)), code
        path = Path(self.angle_file.value)
        if not path.is_file():
            raise ValueError(f"angles: there is no file {str(path)!r}; choose a text or NPY file.")
        try:
            if path.suffix == ".npy":
                read = f"np.load({str(path)!r})"
                angles = np.asarray(np.load(path, allow_pickle=False), float)
            else:
                read = f"np.array(open({str(path)!r}).read().replace(',', ' ').split(), float)"
                angles = np.array(path.read_text(encoding="utf-8").replace(",", " ").split(), float)
        except (ValueError, TypeError, OSError, EOFError) as error:
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

    def _from_numbers(self, layer: Any) -> tuple[XrayGeometry, str]:
        """Return the geometry of the form, and Python that makes it."""
        angles, angles_code = self._angles()
        data = layer.data[0] if layer.multiscale else layer.data
        if len(data) != len(angles):
            raise ValueError(
                f"angles: got {len(angles)}, the layer {layer.name!r} has {len(data)} views; need one angle for "
                "each view."
            )
        choice = self.geometry.value
        rows, columns = (int(size) for size in data.shape[1:])
        beam: Any = ParallelBeam if choice == PARALLEL else ConeBeam
        how, options = "circular", {}
        if choice != PARALLEL:
            options["source_origin"] = float(self.source_origin.value)
            options["source_detector"] = float(self.source_detector.value)
        if choice == FAN:
            if rows != 1:
                raise ValueError(
                    f"geometry: a fan beam has one row of pixels, the layer {layer.name!r} has {rows}; choose "
                    f"{CONE!r}, or take one row of it."
                )
            how = "fan"
            options |= {"n_columns": columns, "pixel_size": float(self.pixel_u.value)}
            options["detector_offset"] = (0.0, float(self.offset_u.value))
        else:
            options |= {
                "detector_shape": (rows, columns),
                "pixel_size": (float(self.pixel_v.value), float(self.pixel_u.value)),
                "detector_offset": (float(self.offset_v.value), float(self.offset_u.value)),
            }
        if choice == HELIX:
            how = "helical"
            options["pitch"] = float(self.pitch.value)
        tilt = float(self.tilt.value) if choice in (CONE, PARALLEL) else 0.0
        if tilt:
            how = "laminography"
            options["tilt"] = float(np.deg2rad(tilt))
        options["rotation"] = self.rotation.value
        options["units"] = None if self.units.value == "pixel" else self.units.value
        arguments = "".join(f"    {name}={value!r},\n" for name, value in options.items())
        code = f"igs.{beam.__name__}.{how}(\n    {angles_code},\n{arguments})"
        return getattr(beam, how)(angles, **options), code
