"""``innergs demo``: the sample data, reconstructed and compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from napari_innergs.cli._options import Device, Json
from napari_innergs.cli._run import Interrupted, Progress, complain

if TYPE_CHECKING:
    from napari_innergs.fit.engine import Preview


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "demo-output"
    ),
    preset: Annotated[str, typer.Option(help="fast, balanced or best.")] = "balanced",
    device: Device = "auto",
    as_json: Json = False,
) -> int:
    """Reconstruct sample data from every 4th slice and compare with the others.

    Writes the volume, a picture with error maps, and a report. Takes about a minute.

    \b
    Example:
      innergs demo --output demo-output
    """
    from napari_innergs.io.write import ensure_writable

    ensure_writable(output)
    progress = Progress(sys.stderr, "demo")
    from napari_innergs import _demo
    from napari_innergs.fit.engine import Preview
    from napari_innergs.io.write import write_volume

    last: Preview | None = None
    try:
        for event in _demo.run(output, preset, device, progress.show):
            if isinstance(event, Preview):
                last = event
    except KeyboardInterrupt:
        progress.clear()
        if last is None:
            raise
        write_volume(output / "volume.tif", last.volume, last.grid)
        complain(f"interrupted; the best state so far ({last.label}) is saved in {output / 'volume.tif'}")
        raise Interrupted({}) from None
    progress.clear()
    if as_json:
        print((output / "report.json").read_text(encoding="utf-8"))
    else:
        print((output / "report.md").read_text(encoding="utf-8"))
        print(f"picture: {output / 'picture.png'}")
    return 0
