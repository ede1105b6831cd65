"""A form made from a pydantic model: basic fields in sight, advanced ones behind a fold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from magicgui.widgets import CheckBox, ComboBox, Container, LineEdit, create_widget
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from qtpy.QtCore import QEvent, QSize, Qt, Signal
from qtpy.QtWidgets import (
    QFrame,
    QLabel,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

CUSTOM = "custom"
# so that napari does not cut the titles of our docks, pixels
MINIMUM_WIDTH = 340


class Choices(Container):
    """Several of a few named choices: one check box each, the value is a tuple in the given order."""

    def __init__(self, options: Iterable[str], value: Iterable[str] = (), **kwargs: Any) -> None:
        self._boxes = {str(name): CheckBox(text=str(name)) for name in options}
        super().__init__(widgets=list(self._boxes.values()), labels=False, **kwargs)
        self.margins = (0, 0, 0, 0)
        self.value = tuple(value)

    @property
    def value(self) -> tuple[str, ...]:
        """The names that are checked."""
        return tuple(name for name, box in self._boxes.items() if box.value)

    @value.setter
    def value(self, names: Iterable[str]) -> None:
        chosen = set(names)
        for name, box in self._boxes.items():
            box.value = name in chosen


class Numbers(LineEdit):
    """Numbers with commas between them; what is no number stays a text, for the model to refuse."""

    @property
    def value(self) -> tuple[float | str, ...]:
        """The parts of the text."""
        parts = str(self._widget._mgui_get_value()).split(",")
        return tuple(_number(part.strip()) for part in parts if part.strip())

    @value.setter
    def value(self, numbers: Iterable[float]) -> None:
        self._widget._mgui_set_value(", ".join(f"{number:g}" for number in numbers))


class OptionalNumber(LineEdit):
    """One number or nothing; what is no number stays a text, for the model to refuse.

    Parameters
    ----------
    hint : str
        What an empty field means.
    """

    def __init__(self, value: float | None = None, hint: str = "automatic", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hint = hint
        self.value = value

    @property
    def hint(self) -> str:
        """What is shown while the field is empty."""
        return str(self.native.placeholderText())

    @hint.setter
    def hint(self, text: str) -> None:
        self.native.setPlaceholderText(text)

    @property
    def value(self) -> float | str | None:
        """The number, None when the field is empty."""
        text = str(self._widget._mgui_get_value()).strip()
        return _number(text) if text else None

    @value.setter
    def value(self, number: float | None) -> None:
        self._widget._mgui_set_value("" if number is None else f"{number:.12g}")


def column(widgets: Iterable[Any]) -> Container:
    """Put widgets below each other, labels on the left."""
    container = Container(labels=True)
    for widget in widgets:
        # one by one: only appending makes magicgui give all labels one width
        container.append(widget)
    container.margins = (0, 0, 0, 0)
    return container


def push_button(text: str, tooltip: str) -> QPushButton:
    """Make a button."""
    made = QPushButton(text)
    made.setToolTip(tooltip)
    return made


def stack(holder: QWidget, *parts: QWidget) -> None:
    """Put widgets below each other in one that has no frame of its own."""
    layout = QVBoxLayout(holder)
    layout.setContentsMargins(0, 0, 0, 0)
    layout.setSpacing(4)
    for part in parts:
        layout.addWidget(part)


def align_labels(*parts: QWidget) -> None:
    """Give the labels of several columns the same width."""
    labels = [label for part in parts for label in part.findChildren(QLabel)]
    # napari's style sheet, which comes later, has a slightly wider font
    widths = (max(label.sizeHint().width(), label.minimumWidth()) for label in labels)
    width = int(1.12 * max(widths, default=0))
    for label in labels:
        label.setMinimumWidth(width)


class TallForm(QScrollArea):
    """Scrolls up and down only, and is always wide enough for what it holds."""

    def __init__(self, inside: QWidget) -> None:
        super().__init__()
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setWidget(inside)
        inside.installEventFilter(self)

    def eventFilter(self, watched: Any, event: Any) -> bool:
        """Ask for room again when rows appear or disappear."""
        if event.type() == QEvent.Type.LayoutRequest:
            self.updateGeometry()
        return bool(super().eventFilter(watched, event))

    def minimumSizeHint(self) -> QSize:
        """Width of the contents and the scroll bar."""
        inside = self.widget().minimumSizeHint().width() if self.widget() is not None else 0
        return QSize(inside + self.verticalScrollBar().sizeHint().width() + 2, 150)

    def sizeHint(self) -> QSize:
        """As high as the contents, if there is room."""
        inside = self.widget().sizeHint() if self.widget() is not None else QSize(0, 0)
        return QSize(self.minimumSizeHint().width(), inside.height())


def field_widget(field: FieldInfo) -> Any:
    """Make the magicgui widget of one field; its description becomes the tooltip."""
    annotation: Any = field.annotation
    options: dict[str, Any] = {"tooltip": field.description or ""}
    parts = set(get_args(annotation))
    if type(None) in parts and parts <= {float, int, type(None)}:
        return OptionalNumber(field.default, label=field.title, **options)
    if get_origin(annotation) is tuple and get_origin(get_args(annotation)[0]) is Literal:
        return Choices(get_args(get_args(annotation)[0]), field.default, label=field.title, **options)
    if get_origin(annotation) is tuple:
        numbers = Numbers(label=field.title, **options)
        numbers.value = field.default
        return numbers
    if get_origin(annotation) is Literal:
        return ComboBox(choices=get_args(annotation), value=field.default, label=field.title, **options)
    for limit in field.metadata:
        for name, option in (("ge", "min"), ("gt", "min"), ("le", "max"), ("lt", "max")):
            if getattr(limit, name, None) is not None:
                options[option] = getattr(limit, name)
    if annotation is int:
        options.setdefault("max", 10**6)
    if annotation is float:
        options.setdefault("max", 1e6)
        options["step"] = 0.05 if options["max"] <= 2 else 0.5
    return create_widget(value=field.default, annotation=annotation, label=field.title, options=options)


class ConfigForm(QWidget):
    """The settings of a job.

    Parameters
    ----------
    model : type of BaseModel
        The settings' class; titles, descriptions, limits and the `group` of its fields make the form.
    presets : sequence of str
        Names that ``model.preset(name)`` knows; choosing one fills the form.
    preset : str
        The one to start with.
    """

    changed = Signal()

    def __init__(
        self,
        model: type[BaseModel],
        presets: Iterable[str] = (),
        preset: str = "balanced",
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._model = model
        self._filling = False
        self.fields = {name: field_widget(field) for name, field in model.model_fields.items()}
        self._presets = {name: model.preset(name) for name in presets}  # type: ignore[attr-defined]
        self.preset = ComboBox(
            label="Preset",
            choices=[*self._presets, CUSTOM],
            tooltip="Fills the form: fast for a first look, balanced by default, best when time does not "
            "matter, innergs-paper to compare with the published recipe.",
        )
        basic = column([self.preset] if self._presets else [])
        advanced = column([])
        for name, field in model.model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            (advanced if extra.get("group") == "advanced" else basic).append(self.fields[name])
            self.fields[name].changed.connect(self._on_field)
        self.preset.changed.connect(self._on_preset)
        # Qt widgets live as long as their magicgui owners
        self.containers = (basic, advanced)

        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        layout.addWidget(basic.native)
        # hidden, not squeezed to no height: the Tab key must not walk through fields that can't be seen
        self.advanced = QToolButton()
        self.advanced.setText("Advanced")
        self.advanced.setCheckable(True)
        self.advanced.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self.advanced.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.advanced.toggled.connect(self._unfold)
        self._folded = advanced.native
        layout.addWidget(self.advanced)
        layout.addWidget(self._folded)
        self.advanced.setVisible(bool(len(advanced)))
        self._unfold(False)
        if self._presets:
            self.config = self._presets[preset]

    def _unfold(self, shown: bool) -> None:
        self.advanced.setArrowType(Qt.ArrowType.DownArrow if shown else Qt.ArrowType.RightArrow)
        self._folded.setVisible(shown)

    @property
    def config(self) -> Any:
        """The settings as the form shows them; ValueError with a sentence when they don't fit."""
        return self._model.coerce({name: widget.value for name, widget in self.fields.items()})  # type: ignore[attr-defined]

    @config.setter
    def config(self, config: BaseModel) -> None:
        self._filling = True
        try:
            for name, widget in self.fields.items():
                widget.value = getattr(config, name)
        finally:
            self._filling = False
        self._on_field()

    def matching_preset(self) -> str:
        """Return the preset that the form shows, or "custom"."""
        shown = {name: widget.value for name, widget in self.fields.items()}
        for name, config in self._presets.items():
            if all(_equal(getattr(config, key), value) for key, value in shown.items()):
                return name
        return CUSTOM

    def _on_field(self, *_: Any) -> None:
        if self._filling:
            return
        if self._presets:
            with self.preset.changed.blocked():
                self.preset.value = self.matching_preset()
        self.changed.emit()

    def _on_preset(self, name: str) -> None:
        if name in self._presets:
            self.config = self._presets[name]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, (int, float)):
        # spin boxes round to their decimals
        return abs(first - second) < 1e-6
    return bool(first == second)
