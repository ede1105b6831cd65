"""The "Slices to volume" dock widget."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from magicgui.widgets import CheckBox, ComboBox, FloatSpinBox, Select, SpinBox
from napari.layers import Labels, Shapes
from napari.utils.notifications import show_error
from qtpy.QtWidgets import QLabel

from napari_innergs.config import PRESETS, SliceConfig
from napari_innergs.data import SliceStack
from napari_innergs.fit.engine import Done, Event, Failed, Preview, Progress, Step, background
from napari_innergs.layers.planes import motion_layers, plane_layer
from napari_innergs.layers.read import (
    LayerView,
    Region,
    Source,
    centre_region,
    custom_grid,
    guess_first_axis,
    region_corners,
    region_from_shapes,
    region_of_points,
)
from napari_innergs.layers.write import reconstruction_layers, volume_layers
from napari_innergs.widgets._form import ConfigForm, column
from napari_innergs.widgets._job import JobWidget, cost_in_words
from napari_innergs.widgets._script import slices_script
from napari_innergs.widgets._settings import default_preset
from napari_innergs.widgets._stacks import StackList, is_result

DOCS = "https://github.com/napari-innergs/napari-innergs/tree/main/docs"

WHOLE, CENTRE = "whole layer", "block in the centre"
ISOTROPIC, SPACING = "isotropic", "custom spacing"
CURRENT, EVERY = "current one", "every one"


@dataclass(frozen=True)
class SlicesJob:
    """All that a run needs, taken from the form when Run is pressed."""

    sources: tuple[Source, ...]
    config: SliceConfig
    spacing: tuple[float, float, float] | None
    device: str
    seed: int
    distance: bool
    gaussians: str
    limit: int

    @property
    def source(self) -> Source:
        """The first stack, whose layer the result is like."""
        return self.sources[0]

    def grid(self, stacks: Any) -> Any:
        """Return the output grid of a stack or several, or None for the default one."""
        return None if self.spacing is None else custom_grid(stacks, self.spacing)

    def readers(self, time_index: int | None, *, blank: bool = False) -> list[Callable[[], SliceStack]]:
        """Return what reads the stacks, the first one at a time point."""
        first, *others = self.sources
        return [
            partial(first.stack, time_index, blank=blank),
            *(partial(source.stack, source.time_index, blank=blank) for source in others),
        ]


def run_job(job: SlicesJob) -> Generator[Event, None, None]:
    """Reconstruct every time point; `Done` carries (results, layer tuples).

    Previews of a time series hold all time points, so that the preview layer keeps its shape.
    """
    points = job.source.time_points
    progress = Progress()
    progress.enter("reading the layer", 0.01)
    results: list[Any] = []
    series: np.ndarray | None = None
    fit: Callable[..., Any] = (yield from background([_engine], progress))[0]
    for number, point in enumerate(points):
        # in the background: a lazy layer is loaded here, and cancelling must not wait for it
        stacks = yield from background(job.readers(point), progress)
        given = stacks[0] if len(stacks) == 1 else stacks
        # a time series of thin slices starts each volume from the one before
        thin = len(stacks) == 1 and stacks[0].thickness <= stacks[0].pixel_size.mean()
        options = {"warm_start": results[-1]} if results and thin else {}
        with closing(
            fit(given, job.grid(given), job.config, device=job.device, seed=job.seed, **options)
        ) as events:
            for event in events:
                if isinstance(event, Step):
                    phase = (
                        f"time {number + 1} of {len(points)}: {event.phase}"
                        if len(points) > 1
                        else event.phase
                    )
                    share = (number + event.fraction) / len(points)
                    yield Step(phase, share, event.iteration, event.total, event.loss, event.psnr_heldout)
                elif isinstance(event, Preview):
                    volume = event.volume
                    if job.source.all_times:
                        if series is None or series.shape[1:] != volume.shape:
                            series = np.zeros((len(points), *volume.shape), np.float32)
                        series[number] = volume
                        volume = series
                    yield Preview(volume, event.grid, event.label)
                elif isinstance(event, Done):
                    results.append(event.result)
                elif isinstance(event, Failed):
                    yield event
                    return
    progress.enter("making layers", 1.0)
    tuples = (yield from background([partial(_layers, job, results, stacks)], progress))[0]
    yield Done((results, tuples))


def _layers(job: SlicesJob, results: list[Any], stacks: list[SliceStack]) -> list[Any]:
    """Make the layers of the results, and of motion if it was estimated."""
    tuples = reconstruction_layers(
        results,
        job.source,
        distance=job.distance,
        uncertainty=job.config.uncertainty,
        gaussians=job.gaussians,
        limit=job.limit,
    )
    motion = results[-1].report.get("motion") or {}
    if len(results) == 1 and motion.get("transforms"):
        tuples += motion_layers(stacks, motion["transforms"], job.source.view, motion.get("outliers"))
    return tuples


def _engine() -> Callable[..., Any]:
    # a function of its own because it imports torch, which takes seconds: it runs in the background
    from napari_innergs.tasks.slices import fit_slices

    return fit_slices


def _estimate(job: SlicesJob) -> str:
    """One line on the size of the result, memory and time; runs in a worker because it imports torch."""
    from napari_innergs.tasks.slices import default_grid, estimate_slices

    stacks = [read() for read in job.readers(job.source.time_points[0], blank=True)]
    given = stacks[0] if len(stacks) == 1 else stacks
    grid = job.grid(given) or default_grid(stacks)
    cost = estimate_slices(given, grid, job.config)
    times = len(job.source.time_points)
    shape = " × ".join(str(size) for size in ((times,) if times > 1 else ()) + tuple(grid.shape))
    spacing = dict.fromkeys(f"{step:.4g}" for step in grid.spacing)
    steps = " × ".join(spacing if len(spacing) == 1 else (f"{step:.4g}" for step in grid.spacing))
    unit = {"um": "µm"}.get(grid.units[-1], grid.units[-1]) if grid.units else ""
    memory, duration = cost_in_words(cost, times)
    counts = " + ".join(str(stack.n_slices) for stack in stacks)
    return f"{counts} slices to {shape} voxels of {steps} {unit}; {memory} and {duration}."


class SlicesWidget(JobWidget):
    """Make a dense volume from the sparse slices of an Image layer, or of several that show the same object.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        The viewer whose layers are offered and to which the result is added.
    """

    DOCS = DOCS
    CONFIG = SliceConfig
    SETTINGS = "slices.yaml"

    # -- making the form -----------------------------------------------------------------------------------

    def _make(self) -> None:
        self._planes: Any = None
        self._make_inputs()
        self.form = ConfigForm(SliceConfig, PRESETS, default_preset())
        self._make_outputs()

    def _connect(self) -> None:
        self.stacks.first_changed.connect(self._on_layer)
        self.stacks.changed.connect(self._on_stacks)
        self.stacks.planes.connect(self.show_planes)
        self.first_axis.changed.connect(self._on_shape)
        for widget in (
            self.keep_every,
            self.region,
            self.grid,
            self.times,
            self.channels,
            *self.spacing,
        ):
            widget.changed.connect(self._on_change)
        self.grid.changed.connect(self._on_grid)

    def _make_inputs(self) -> None:
        self.stacks = StackList(self.viewer)
        self.channels = Select(
            label="More channels",
            choices=self._channel_choices,
            tooltip="Other layers of the same shape that show the same object: they are reconstructed "
            "together. "
            "Ctrl-click to choose several or none.",
        )
        self.channels.native.setMaximumHeight(54)
        self.first_axis = ComboBox(
            label="First axis", choices=["time", "channels"], tooltip="What the first axis of a 4D layer is."
        )
        self.times = ComboBox(
            label="Time points",
            choices=[CURRENT, EVERY],
            tooltip="Only the time point that is shown, or one volume for each.",
        )
        self.keep_every = SpinBox(
            label="Keep every",
            value=1,
            min=1,
            max=64,
            tooltip="Use every k-th slice only, to see what the others would have shown; 1 uses all.",
        )
        self.region = ComboBox(
            label="Region",
            choices=self._region_choices,
            tooltip="Try the settings on a part first: a block in the centre, or the box around the "
            "selected shape of a "
            "Shapes layer.",
        )
        self.inputs = column(
            [
                self.channels,
                self.first_axis,
                self.times,
                self.keep_every,
                self.region,
            ]
        )
        for widget in (self.channels, self.first_axis, self.times):
            widget.visible = False

    def _make_outputs(self) -> None:
        self.grid = ComboBox(
            label="Grid",
            choices=[ISOTROPIC, SPACING],
            tooltip="isotropic: in-plane pixels as they are and about as far apart through the slices; "
            "custom: choose "
            "the spacing.",
        )
        names = ("Through slices", "Rows", "Columns")
        self.spacing = [
            FloatSpinBox(
                label=name,
                value=1.0,
                min=1e-6,
                max=1e6,
                step=0.1,
                tooltip="Distance between voxel centres in the layer's world units.",
            )
            for name in names
        ]
        self.distance = CheckBox(
            text="Distance to slice",
            value=False,
            tooltip="Also add a layer with the distance to the nearest real slice, in world units: detail "
            "far from any "
            "slice is invented.",
        )
        self.outputs = column([self.grid, *self.spacing, self.distance, *self._make_result_options()])
        for widget in self.spacing:
            widget.visible = False

    def _sections(self) -> list[tuple[str, Any]]:
        return [
            ("Input", (self.stacks, self.inputs.native)),
            ("Method", (self.form,)),
            ("Output", (self.outputs.native,)),
        ]

    def _columns(self) -> list[Any]:
        return [self.inputs, self.outputs]

    def _lay_out(self) -> None:
        super()._lay_out()
        self.stacks.align(max(label.minimumWidth() for label in self.inputs.native.findChildren(QLabel)))

    # -- choices that follow the viewer ----------------------------------------------------------------------

    @property
    def layer(self) -> Any:
        """The choice of the first stack's layer."""
        return self.stacks.rows[0].layer

    @property
    def axis(self) -> Any:
        """The choice of the first stack's slice axis."""
        return self.stacks.rows[0].axis

    def _channel_choices(self, *_: Any) -> list[tuple[str, Any]]:
        first = self.layer.value
        if first is None or first.rgb or first.ndim != 3 or self.stacks.several:
            return []
        return [(layer.name, layer) for _, layer in self.stacks.images() if _same_place(layer, first)]

    def _region_choices(self, *_: Any) -> list[tuple[str, Any]]:
        shapes = [
            (f"Shapes: {layer.name}", layer) for layer in self.viewer.layers if isinstance(layer, Shapes)
        ]
        return [(WHOLE, WHOLE), (CENTRE, CENTRE), *shapes]

    def _main_layer(self) -> Any:
        return self.layer.value

    def _refresh_choices(self) -> str:
        self.stacks.refresh()
        self.channels.reset_choices()
        self.channels.visible = bool(self.channels.choices)
        self.region.reset_choices()
        if any(isinstance(layer, Labels) for layer in self.viewer.layers):
            return "Labels can't be used: their numbers must not be blended. Open an image with slices."
        return "Open an image with slices, or a sample: File > Open Sample > InnerGS."

    def _on_layer(self, *_: Any) -> None:
        layer = self.layer.value
        if layer is None:
            return
        four = layer.ndim == 4
        if four:
            self.first_axis.value = guess_first_axis(layer)
        self.first_axis.visible = four
        if layer.ndim >= 3:
            finest = float(np.min(np.asarray(layer.scale)[-3:]))
            for box in self.spacing:
                box.step = finest / 4
                box.value = finest
        self._on_stacks()

    def _on_stacks(self, *_: Any) -> None:
        self.channels.reset_choices()
        self.channels.visible = bool(self.channels.choices)
        self._on_shape()

    def _on_shape(self, *_: Any) -> None:
        layer = self.layer.value
        series = layer is not None and layer.ndim == 4 and self.first_axis.value == "time"
        self.times.visible = series and not self.stacks.several
        self._on_change()

    def _on_grid(self, *_: Any) -> None:
        for box in self.spacing:
            box.visible = self.grid.value == SPACING

    # -- the job ---------------------------------------------------------------------------------------------

    def job(self) -> SlicesJob:
        """Return what Run would do now; ValueError or TypeError with a sentence when it can't."""
        rows = self.stacks.rows
        if self.layer.value is None:
            raise ValueError("layer: there is no Image layer; open an image or a sample first.")
        chosen = [row.layer.value for row in rows]
        for layer in chosen:
            if chosen.count(layer) > 1:
                raise ValueError(
                    f"stacks: {layer.name!r} was chosen {chosen.count(layer)} times; choose another layer in "
                    "each row, or remove a row."
                )
        several = self.stacks.several
        more = [other for other in (self.channels.value or []) if other in self.viewer.layers and not several]
        sources: list[Source] = []
        for row, layer in zip(rows, chosen, strict=True):
            first = not sources
            views = tuple(LayerView.of(one) for one in (layer, *(more if first else ())))
            view = views[0]
            if view.ndim not in (3, 4):
                raise ValueError(
                    f"layer: {view.name!r} has {view.ndim} dimensions, need 3 (slices, rows, columns) or 4."
                )
            first_axis = self.first_axis.value if first else guess_first_axis(layer)
            current = several or self.times.value == CURRENT
            source = row.source(
                views=views,
                keep_every=int(self.keep_every.value),
                first_axis=first_axis,
                time_index=self._time_index(view)
                if view.ndim == 4 and first_axis == "time" and current
                else None,
            )
            sources.append(replace(source, region=self._region(source, sources)))
        return SlicesJob(
            sources=tuple(sources),
            config=self.form.config,
            spacing=tuple(box.value for box in self.spacing) if self.grid.value == SPACING else None,  # type: ignore[arg-type]
            device=self.device.value,
            seed=int(self.seed.value),
            distance=bool(self.distance.value),
            gaussians=self.gaussians.value,
            limit=int(self.limit.value),
        )

    def _time_index(self, view: LayerView) -> int:
        """Return the time point of a layer that is shown."""
        point = np.asarray(self.viewer.dims.point)[-4:]
        return int(np.clip(round(view.world_to_data(point)[0]), 0, view.shape[0] - 1))

    def _region(self, source: Source, earlier: list[Source]) -> Region | None:
        """Return the chosen part of a stack: the same place in the world in all of them."""
        choice = self.region.value
        if choice is None or choice == WHOLE:
            return None
        if choice != CENTRE:
            return region_from_shapes(choice, source.view)
        if not earlier:
            return centre_region(source.spatial_shape, source.axis, source.keep_every)
        first = earlier[0]
        assert first.region is not None
        corners = region_corners(first.region, first.view)[:, -3:]
        return region_of_points(corners, source.view, f"the centre of {first.view.name!r}")

    def show_planes(self) -> None:
        """Draw the outlines of all slices in a layer, in 3D; the layer of an earlier call is replaced."""
        try:
            job = self.job()
            stacks = [read() for read in job.readers(job.source.time_points[0], blank=True)]
            name = f"{job.source.view.name} planes"
            data, kwargs, _ = plane_layer(stacks, job.source.view, name=name)
        except (ValueError, TypeError) as error:
            show_error(str(error))
            return
        if self._planes is not None and self._planes in self.viewer.layers:
            self.viewer.layers.remove(self._planes)
        active = self.viewer.layers.selection.active
        self._planes = self.viewer.add_vectors(data, **kwargs)
        # the active layer is the one that a new form starts from
        self.viewer.layers.selection.active = active
        if self.viewer.dims.ndisplay == 2:
            self.viewer.dims.ndisplay = 3
            self.viewer.reset_view()

    def _work(self, job: SlicesJob) -> Callable[[], Generator[Event, None, None]]:
        return partial(run_job, job)

    def _estimator(self, job: SlicesJob) -> Callable[[], str]:
        return partial(_estimate, job)

    def _preview_layers(self, preview: Preview, metadata: dict[str, Any]) -> list[Any]:
        return volume_layers(
            preview.volume,
            preview.grid,
            self._job.source,
            name="{} volume (preview)",
            restore=False,
            metadata=metadata,
        )

    def _show_product(self, product: tuple[list[Any], list[Any]]) -> str:
        assert self._live is not None
        results, tuples = product
        layers = self._live.show(tuples)
        self.viewer.layers.selection.active = layers[0]
        return _verdict(results[0].report)

    def _script(self) -> str:
        job = self.job()
        return slices_script(job.sources, job.config, job.grid, job.device, job.seed)


def _same_place(layer: Any, first: Any) -> bool:
    """Whether a layer can be another channel of the first one."""
    if layer is first or layer.rgb or layer.multiscale or first.multiscale or layer.ndim != first.ndim:
        return False
    return (
        layer.data.shape == first.data.shape
        and layer.data.dtype == first.data.dtype
        and layer.units == first.units
        and np.allclose(layer.extent.world, first.extent.world)
        and not is_result(layer)
    )


def _verdict(report: dict[str, Any]) -> str:
    """One sentence from the report: how good, compared to what, on slices that were left out."""
    warned = " ".join(report.get("warnings") or ())
    ours, theirs = report.get("psnr_heldout"), report.get("baseline_psnr_heldout")
    if ours is None:
        return warned
    # thick slices: single pixels, or thinner slices at half the resolution
    text = f"On {'what was held out' if 'stacks' in report else 'left-out slices'}: {ours:.2f} dB"
    if theirs is not None:
        text += f", best conventional ({report.get('baseline', '?')}) {theirs:.2f} dB"
    return f"{text}. {warned}".strip()
