"""Write what a form would do as a Python script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pprint import pformat
from typing import Any

import numpy as np

from napari_innergs.config import PRESETS, SliceConfig
from napari_innergs.layers.read import LayerView, Source
from napari_innergs.layers.write import placement


def slices_script(
    sources: Source | Sequence[Source],
    config: SliceConfig,
    grid: Callable[[Any], Any],
    device: str = "auto",
    seed: int = 0,
) -> str:
    """Return a script that reconstructs a volume from one stack or several with these settings.

    Layers that came from a file or a sample are read again, with the place in the world that they have now;
    layers that exist in the viewer alone are taken from it by name, which works in napari's console.
    """
    listed = [sources] if isinstance(sources, Source) else list(sources)
    several = len(listed) > 1
    source = listed[0]
    lines = ["import napari_innergs as igs"]
    count = sum(len(one.views) for one in listed)
    names = [f"layer_{number}" if count > 1 else "layer" for number in range(count)]
    left = iter(names)
    body: list[str] = []
    stacks: list[str] = []
    for number, one in enumerate(listed):
        own = [next(left) for _ in one.views]
        for view, name in zip(one.views, own, strict=True):
            lines += ["", *layer_lines(view, name, placed=True)]
        stacks.append(f"stack_{number}" if several else "stack")
        body += _stack_lines(one, stacks[-1], own, str(one.time_index) if several else "time_index")
    call = ["[" + ", ".join(stacks) + "]" if several else "stack"]
    blank = [one.stack(one.time_points[0], blank=True) for one in listed]
    custom = grid(blank if several else blank[0])
    if custom is not None:
        affine = np.array2string(custom.affine, separator=", ", floatmode="unique", max_line_width=100)
        body.append(f"grid = igs.Grid({custom.shape}, {affine}, units={custom.units!r})")
        call.append("grid=grid")
    call += ["config=config", f"device={device!r}", f"seed={seed}"]
    reconstruct = f"igs.reconstruct_slices({', '.join(call)})"
    lines += ["", f"config = igs.SliceConfig.coerce({config_code(config, PRESETS)})", ""]
    file = file_stem(source.view.name, "volume")
    if source.all_times:
        lines += [f"for time_index in range({source.view.shape[0]}):"]
        lines += _indent([*body, f"result = {reconstruct}", f'result.save(f"{file}-{{time_index:03d}}")'])
    else:
        if source.has_time and not several:
            lines += [f"time_index = {source.time_index}"]
        lines += [*body, f"result = {reconstruct}", "print(result.report)", f'result.save("{file}")']
    return "\n".join(lines) + "\n"


def _stack_lines(source: Source, stack: str, layers: list[str], time_index: str) -> list[str]:
    """Return lines that make a stack of layers."""
    options: dict[str, Any] = {"axis": source.axis}
    if source.keep_every != 1:
        options["keep_every"] = source.keep_every
    if source.view.ndim == 4 and not source.has_time:
        options["channel_axis"] = 0
    # also 0: the layer's metadata may say otherwise
    options["thickness"] = source.thickness
    if source.thickness:
        options["profile"] = source.profile
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    if source.has_time:
        arguments += f", time_index={time_index}"
    reads = [f"igs.SliceStack.from_layer({layer}, {arguments})" for layer in layers]
    made = reads[0] if len(reads) == 1 else "igs.SliceStack.from_channels(\n    [" + ", ".join(reads) + "]\n)"
    lines = [f"{stack} = {made}"]
    if source.region is not None:
        lines.append(f"{stack} = {stack}.crop({_crop(source)})")
    return lines


def layer_lines(view: LayerView, name: str, *, placed: bool = False) -> list[str]:
    """Return lines that find a layer: opened again, with its place in the world on request, or the viewer's."""
    if view.sample is None and view.path is None:
        return [
            "# this layer is in the viewer only: run the script in napari's console",
            "import napari",
            f"{name} = napari.current_viewer().layers[{view.name!r}]",
        ]
    opened = f"open_sample({view.sample[0]!r}, {view.sample[1]!r})" if view.sample else f"open({view.path!r})"
    found = f"next((one for one in opened if one.name == {view.name!r}), opened[0])"
    lines = ["from napari.components import ViewerModel", f"opened = ViewerModel().{opened}"]
    if not placed:
        return [*lines, f"{name} = {found}"]
    units = tuple(str(unit) for unit in view.units)
    place = {key: np.asarray(value).tolist() for key, value in placement(view.affine).items()}
    arguments = ", ".join(f"{key}={value!r}" for key, value in place.items())
    return [
        lines[0],
        "from napari.layers import Image",
        lines[1],
        f"data = {found}.data",
        "# where the layer is in the world",
        f"{name} = Image(data, name={view.name!r}, rgb={view.rgb}, units={units!r},",
        f"    {arguments})",
    ]


def _crop(source: Source) -> str:
    """Keywords of `SliceStack.crop`: the region in pixels and kept slices."""
    assert source.region is not None
    cuts = list(source.region.slices)
    shape = list(source.spatial_shape)
    start, stop, _ = cuts.pop(source.axis).indices(shape.pop(source.axis))
    keep = source.keep_every
    rows, cols = (slice(*cut.indices(size)[:2]) for cut, size in zip(cuts, shape, strict=True))
    slices = slice(start // keep, (stop + keep - 1) // keep)
    return ", ".join(
        f"{name}=slice({cut.start}, {cut.stop})"
        for name, cut in (("rows", rows), ("cols", cols), ("slices", slices))
    )


def config_code(config: Any, presets: Sequence[str]) -> str:
    """Write the nearest preset and what differs from it."""
    differences = {
        preset: {
            name: value
            for name, value in config.model_dump().items()
            if value != getattr(type(config).preset(preset), name)
        }
        for preset in presets
    }
    nearest = min(differences, key=lambda preset: len(differences[preset]))
    if not differences[nearest]:
        return repr(nearest)
    return pformat({"preset": nearest, **differences[nearest]}, width=100, sort_dicts=False)


def file_stem(name: str, otherwise: str) -> str:
    """Return a name for files that is like a layer's."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-") or otherwise


def _indent(lines: list[str]) -> list[str]:
    return ["    " + line.replace("\n", "\n    ") for line in lines]
